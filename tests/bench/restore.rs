// SPDX-License-Identifier: Apache-2.0
//! Going on from what was written down: one machine, and many at once.
//!
//! The guest says a dot every 200 us, so the first byte is a sign of its first instructions.

use std::fs;
use std::io::{self, Read};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use crate::guest::{Files, Guest, Size};
use crate::program::Programs;
use crate::table::{Better, Head, Table, median};

const ROUNDS: usize = 3;
/// Restores and fresh starts in each round.
const STARTS: usize = 9;
const PERCENT: u64 = 10;
/// The machine that is cloned.
const CLONED: Size = Size {
    mib: 128,
    percent: 10,
};

/// Takes the rows, for machines of so many MiB, and for so many clones.
///
/// # Errors
///
/// A measurement fails.
pub(crate) fn measure(
    programs: &Programs,
    table: &mut Table,
    sizes: &[u64],
    clones: usize,
) -> io::Result<()> {
    for &mib in sizes {
        let size = Size {
            mib,
            percent: PERCENT,
        };
        let heads = [
            ("exec to first sign", "ms"),
            ("load to first sign", "ms"),
            ("exec to answer", "ms"),
            ("load to answer", "ms"),
            ("a fresh start beside", "ms"),
            ("exec to first sign, over fresh", ""),
        ]
        .map(|(what, unit)| {
            Head::new(
                format!("restore {}, {what}", size.name()),
                unit,
                Better::Lower,
            )
        });
        table.take_all(&heads, ROUNDS, &programs.monitors(), |monitor| {
            restores(programs, monitor, size)
        })?;
    }
    let heads = [
        Head::new(format!("clones, {clones} at once"), "1/s", Better::Higher),
        Head::new("memory of an idle clone's own", "KiB", Better::Lower),
    ];
    table.take_all(&heads, ROUNDS, &programs.monitors(), |monitor| {
        many(programs, monitor, clones)
    })
}

/// Writes down a machine that has just been started.
fn saved(programs: &Programs, monitor: &str, size: Size, args: &str) -> io::Result<Files> {
    let files = Files::new(programs, "restore");
    let mut guest = Guest::live(programs, monitor, size, false, args)?;
    guest.set_paused(true)?;
    guest.create(&files, "Full")?;
    Ok(files)
}

/// Medians of restores and fresh starts in turn, in milliseconds.
fn restores(programs: &Programs, monitor: &str, size: Size) -> io::Result<Vec<f64>> {
    let files = saved(programs, monitor, size, "bare.beat=1")?;
    let mut samples = [const { Vec::new() }; 5];
    for _ in 0..STARTS {
        let times = restore(programs, monitor, &files)?;
        let fresh = fresh(programs, monitor, size)?;
        for (samples, time) in samples.iter_mut().zip(times.into_iter().chain([fresh])) {
            samples.push(time);
        }
    }
    let mut figures = samples.map(|samples| median(&samples)).to_vec();
    figures.push(figures[0] / figures[4]);
    Ok(figures)
}

/// From exec and from the request to the first sign, then to an answer.
fn restore(programs: &Programs, monitor: &str, files: &Files) -> io::Result<[f64; 4]> {
    let (mut guest, asked) = Guest::restored(programs, monitor, "api", files)?;
    let begun = guest.session.begun;
    let since = |start: Instant| start.elapsed().as_secs_f64() * 1e3;
    guest.session.monitor.stdout()?.read_exact(&mut [0])?;
    let sign = [since(begun), since(asked)];
    guest.session.monitor.send(b"?")?;
    guest.byte(b'b')?;
    Ok([sign[0], sign[1], since(begun), since(asked)])
}

/// From exec to the first byte of a machine that is set up by requests.
fn fresh(programs: &Programs, monitor: &str, size: Size) -> io::Result<f64> {
    let args = "bare.do=first-byte bare.end=spin";
    let mut guest = Guest::boot(programs, monitor, size, false, args)?;
    guest.session.monitor.stdout()?.read_exact(&mut [0])?;
    Ok(guest.session.begun.elapsed().as_secs_f64() * 1e3)
}

/// Clones a second, and KiB that each has to itself.
fn many(programs: &Programs, monitor: &str, count: usize) -> io::Result<Vec<f64>> {
    let files = saved(programs, monitor, CLONED, "")?;
    let next = AtomicUsize::new(0);
    let begun = Instant::now();
    let workers = thread::available_parallelism().map_or(2, |count| 2 * count.get());
    let clones: io::Result<Vec<Vec<Guest>>> = thread::scope(|scope| {
        let work = || {
            let mut clones = Vec::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    return Ok(clones);
                }
                clones.push(answering(programs, monitor, number, &files)?);
            }
        };
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        let joined = threads.into_iter().map(|thread| {
            let panicked = |_| Err(io::Error::other("a thread panicked"));
            thread.join().unwrap_or_else(panicked)
        });
        joined.collect()
    });
    let rate = count as f64 / begun.elapsed().as_secs_f64();
    let clones: Vec<Guest> = clones?.into_iter().flatten().collect();
    let own: io::Result<Vec<f64>> = clones
        .iter()
        .map(|guest| own_memory(guest.session.monitor.id()))
        .collect();
    Ok(vec![rate, own?.iter().sum::<f64>() / count as f64])
}

/// A clone that has answered, and is then paused: this guest would never idle by itself.
fn answering(
    programs: &Programs,
    monitor: &str,
    number: usize,
    files: &Files,
) -> io::Result<Guest> {
    let socket = format!("clone{number}");
    let (mut guest, _) = Guest::restored(programs, monitor, &socket, files)?;
    guest.ask(b'?', "alive", "tick")?;
    guest.set_paused(true)?;
    Ok(guest)
}

/// What no other process has of a process's memory, in KiB.
fn own_memory(id: u32) -> io::Result<f64> {
    let rollup = fs::read_to_string(format!("/proc/{id}/smaps_rollup"))?;
    let private = rollup.lines().filter_map(|line| {
        let (name, rest) = line.split_once(':')?;
        let kib = rest.trim().strip_suffix(" kB")?.parse::<f64>().ok()?;
        matches!(name, "Private_Clean" | "Private_Dirty").then_some(kib)
    });
    Ok(private.sum())
}
