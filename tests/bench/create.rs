// SPDX-License-Identifier: Apache-2.0
//! Writing a machine down: how long that takes, and how long the guest stands still for it.
//!
//! The guest itself measures how long it stood still. It writes 100 MB/s all the while, to the
//! memory that it has touched. A diff is taken after it has written all of that once more.
//! Firecracker does not copy ahead: beside a pre-copied diff stands its ordinary one.

use std::io;
use std::thread;
use std::time::Duration;

use crate::guest::{Files, Guest, Size};
use crate::program::Programs;
use crate::session::unless_refused;
use crate::table::{Better, Head, Table};

const ROUNDS: usize = 3;
const SETTLE: Duration = Duration::from_millis(5);
const PERCENTS: [u64; 3] = [1, 10, 100];
const KINDS: [&str; 3] = ["Full", "Diff", "pre-copied"];

/// Takes the rows, for machines of so many MiB.
///
/// # Errors
///
/// A measurement fails.
pub(crate) fn measure(programs: &Programs, table: &mut Table, sizes: &[u64]) -> io::Result<()> {
    let all = sizes
        .iter()
        .flat_map(|&mib| PERCENTS.map(|percent| Size { mib, percent }));
    for size in all {
        let heads = KINDS.map(|kind| {
            let name = format!("create {kind}, {}, {} %", size.name(), size.percent);
            [", stands still", ", in all"]
                .map(|what| Head::new(format!("{name}{what}"), "ms", Better::Lower))
        });
        table.take_all(
            heads.as_flattened(),
            ROUNDS,
            &programs.monitors(),
            |monitor| one(programs, monitor, size),
        )?;
    }
    Ok(())
}

/// The figures of one machine, in milliseconds.
fn one(programs: &Programs, monitor: &str, size: Size) -> io::Result<Vec<f64>> {
    let mut guest = Guest::live(programs, monitor, size, true, "bare.rate=100")?;
    let mut figures = Vec::new();
    for kind in KINDS {
        if kind != "Full" {
            guest.ask(b'w', "wrote", "ns")?;
        }
        figures.extend(take(programs, monitor, &mut guest, kind)?);
    }
    Ok(figures)
}

/// How long the guest stood still, and how long the request took.
fn take(programs: &Programs, monitor: &str, guest: &mut Guest, kind: &str) -> io::Result<[f64; 2]> {
    let files = Files::new(programs, "create");
    guest.ask(b'g', "gap", "ns")?;
    // Its answers do not count, so it must not be stopped at the end of this one.
    thread::sleep(SETTLE);
    let took = if kind == "pre-copied" && monitor == "brume" {
        match unless_refused(guest.create_pre_copied(&files))? {
            Some(took) => took,
            None => return Ok([f64::NAN; 2]),
        }
    } else {
        let kind = if kind == "Full" { "Full" } else { "Diff" };
        guest.set_paused(true)?;
        let took = guest.create(&files, kind)?;
        guest.set_paused(false)?;
        took
    };
    let still = guest.ask(b'g', "gap", "ns")?;
    Ok([still / 1e6, took.as_secs_f64() * 1e3])
}
