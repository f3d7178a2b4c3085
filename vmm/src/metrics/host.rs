// SPDX-License-Identifier: Apache-2.0
//! What the process takes of the host, as `/proc` tells it.

use std::fs;
use std::path::Path;
use std::time::Duration;

/// What the process takes of the host. What `/proc` does not tell is left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct HostUse {
    /// The name of each thread and the CPU time that it had.
    pub(crate) threads: Vec<(String, Duration)>,
    /// Memory that is there, that of the guest included, in bytes.
    pub(crate) resident_bytes: Option<u64>,
}

/// What the process takes of the host now.
pub(crate) fn host_use() -> HostUse {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten();
    let mut threads: Vec<_> = tasks
        .flatten()
        .filter_map(|task| thread_use(&task.path()))
        .collect();
    threads.sort();
    HostUse {
        threads,
        resident_bytes: resident_bytes(),
    }
}

fn thread_use(task: &Path) -> Option<(String, Duration)> {
    let name = fs::read_to_string(task.join("comm")).ok()?;
    // Nanoseconds on a CPU, nanoseconds in a queue, time slices.
    let times = fs::read_to_string(task.join("schedstat")).ok()?;
    let ran = times.split_whitespace().next()?.parse().ok()?;
    Some((name.trim_end().to_owned(), Duration::from_nanos(ran)))
}

fn resident_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_threads_and_memory() {
        let found = host_use();
        assert!(!found.threads.is_empty());
        assert!(found.resident_bytes.unwrap() > 1 << 16);
    }
}
