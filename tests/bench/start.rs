// SPDX-License-Identifier: Apache-2.0
//! From exec to the guest's first byte, and the memory that a monitor takes for itself.

use std::fs;
use std::io::{self, Read};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::program::{MEMORY_MIB, Programs, Running};
use crate::table::{Better, Table};

/// Takes the rows.
///
/// # Errors
///
/// A measurement fails.
pub(crate) fn measure(programs: &Programs, table: &mut Table) -> io::Result<()> {
    let mut all = programs.monitors();
    all.push("bare C");
    table.take("exec to first byte", "ms", Better::Lower, &all, |name| {
        first_byte(programs, name)
    })?;
    let monitors = programs.monitors();
    let name = "memory beyond the guest's";
    table.take(name, "KiB", Better::Lower, &monitors, |name| {
        let args = "bare.do=blk-randread bare.ms=1000";
        memory(programs, name, args, &json!({}))
    })?;
    let name = "memory beyond the guest's, devices idle";
    table.take(name, "KiB", Better::Lower, &monitors, |name| {
        let socket = programs.folder().join("vsock");
        // One that was killed leaves its socket behind.
        let _ = fs::remove_file(&socket);
        let devices = json!({
            "balloon": {"amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1},
            "entropy": {},
            "vsock": {"guest_cid": 3, "uds_path": socket},
        });
        memory(programs, name, "bare.do=hello bare.end=spin", &devices)
    })
}

/// The median of several starts, in milliseconds.
fn first_byte(programs: &Programs, name: &str) -> io::Result<f64> {
    let mut times = Vec::new();
    for _ in 0..9 {
        let command = programs.command(name, "bare.do=first-byte", &json!({}))?;
        let start = Instant::now();
        let mut child = Running::spawn(command)?;
        child.stdout()?.read_exact(&mut [0])?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
        child.finish()?;
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// Resident memory without the guest's own, with a disk and `devices`, in KiB.
fn memory(programs: &Programs, name: &str, args: &str, devices: &Value) -> io::Result<f64> {
    let disk = programs.folder().join("small.img");
    fs::File::create(&disk)?.set_len(16 << 20)?;
    let mut parts = devices.clone();
    parts["drives"] = json!([{"drive_id": "d", "is_root_device": false, "path_on_host": disk}]);
    let child = Running::spawn(programs.command(name, args, &parts)?)?;
    thread::sleep(Duration::from_millis(500));
    let maps = fs::read_to_string(format!("/proc/{}/smaps", child.id()))?;
    let mut guest = false;
    let mut total = 0.0;
    for line in maps.lines() {
        if let Some(range) = line.split(' ').next().and_then(|word| word.split_once('-')) {
            let [start, end] = [range.0, range.1].map(|hex| u64::from_str_radix(hex, 16));
            if let (Ok(start), Ok(end)) = (start, end) {
                guest = end - start >= MEMORY_MIB << 20;
            }
        }
        if let (false, Some(size)) = (guest, line.strip_prefix("Rss:")) {
            let kib = size.trim().trim_end_matches(" kB").parse().unwrap_or(0.0);
            total += f64::max(kib, 0.0);
        }
    }
    if total == 0.0 {
        return Err(io::Error::other(format!(
            "{name} ended before its memory could be read"
        )));
    }
    Ok(total)
}
