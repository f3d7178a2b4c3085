// SPDX-License-Identifier: Apache-2.0
//! Where a machine runs: by the time that its vCPU threads are on a CPU, in two processes of which
//! one has it.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// How often it is looked.
const LOOK: Duration = Duration::from_millis(20);
/// A vCPU that has run for so long runs; one that has run for less has not.
pub const RUNS: Duration = Duration::from_millis(20);

/// How long the vCPU threads of a process have been on a CPU; no time for one that has ended. A bare
/// guest never waits for anything, so that they always are while it runs.
pub fn vcpu_time(pid: i32) -> Duration {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Duration::ZERO;
    };
    let times = threads.flatten().filter_map(|thread| {
        let name = fs::read_to_string(thread.path().join("comm")).ok()?;
        let times = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        let time = times.split(' ').next()?.parse().ok()?;
        let is_vcpu = name.starts_with("fc_vcpu");
        is_vcpu.then(|| Duration::from_nanos(time))
    });
    times.sum()
}

/// Watches all the time that a machine that has run at the target never runs at the source again.
pub struct Runs {
    over: Arc<AtomicBool>,
    watch: JoinHandle<Result<(), String>>,
}

impl Runs {
    /// Watches two processes, of which the second has not run the machine yet.
    pub fn watch(source: i32, target: i32) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let ends = Arc::clone(&over);
        let watch = thread::spawn(move || {
            let mut history = History::default();
            while !ends.load(Ordering::Relaxed) {
                // In this order: a source whose machine is seen to run elsewhere has stopped before.
                let target = vcpu_time(target);
                history.next(vcpu_time(source), target)?;
                thread::sleep(LOOK);
            }
            Ok(())
        });
        Self { over, watch }
    }

    /// Ends it.
    ///
    /// # Panics
    ///
    /// The machine has run twice.
    #[track_caller]
    pub fn end(self) {
        self.over.store(true, Ordering::Relaxed);
        if let Err(twice) = self.watch.join().expect("the watch") {
            panic!("{twice}");
        }
    }
}

/// What was seen so far.
#[derive(Default)]
struct History {
    /// How long the source had run when the target was first seen to run.
    left: Option<Duration>,
}

impl History {
    fn next(&mut self, source: Duration, target: Duration) -> Result<(), String> {
        match self.left {
            None if target >= RUNS => self.left = Some(source),
            Some(left) if source >= left + RUNS => {
                let more = source.saturating_sub(left);
                return Err(format!(
                    "the machine ran at the target, and {more:?} more at the source"
                ));
            }
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_machine_that_goes_over_once_runs_once() {
        let mut history = History::default();
        for (source, target) in [(50, 0), (90, 1), (95, 15), (99, 30), (99, 900), (0, 950)] {
            history.next(source * MS, target * MS).unwrap();
        }
    }

    #[test]
    fn a_machine_that_goes_on_at_both_sides_or_comes_back_runs_twice() {
        let mut history = History::default();
        for (source, target) in [(50, 0), (90, 25), (105, 60)] {
            history.next(source * MS, target * MS).unwrap();
        }
        let twice = history.next(120 * MS, 60 * MS).unwrap_err();
        assert!(twice.contains("30ms more"), "{twice}");
    }
}
