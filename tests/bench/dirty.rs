// SPDX-License-Identifier: Apache-2.0
//! Which pages a guest has written: what it costs to ask, and what it costs the guest.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::guest::{Files, Guest, Size};
use crate::program::Programs;
use crate::session::unless_refused;
use crate::table::{Better, Head, Table, median};

const ROUNDS: usize = 3;
/// Read-outs of each form in each round.
const READS: usize = 20;
const PERCENTS: [u64; 2] = [1, 100];
/// The machine that writes as fast as it can: all of a half of its memory.
const WRITER: Size = Size {
    mib: 128,
    percent: 50,
};
/// How often its pages are asked for and forgotten.
const PERIOD: Duration = Duration::from_millis(100);

/// Takes the rows, for machines of so many MiB.
///
/// # Errors
///
/// A measurement fails.
pub(crate) fn measure(
    programs: &Programs,
    table: &mut Table,
    sizes: &[u64],
    ms: u32,
) -> io::Result<()> {
    let time = Duration::from_millis(ms.into());
    for size in sizes
        .iter()
        .flat_map(|&mib| PERCENTS.map(|percent| Size { mib, percent }))
    {
        let name = format!("dirty read-out, {}, {} %", size.name(), size.percent);
        let heads = ["bitmap", "ranges", "bitmap per GiB"]
            .map(|what| Head::new(format!("{name}, {what}"), "ms", Better::Lower));
        table.take_all(&heads, ROUNDS, &["brume"], |monitor| {
            let [bitmap, ranges] = read_outs(programs, monitor, size)?;
            Ok(vec![bitmap, ranges, bitmap * 1024.0 / size.mib as f64])
        })?;
    }
    let heads = [
        Head::new("writes, untracked", "GB/s", Better::Higher),
        Head::new("writes, tracked from then on", "GB/s", Better::Higher),
        Head::new("writes, tracked, over untracked", "", Better::Higher),
    ];
    table.take_all(&heads, ROUNDS, &programs.monitors(), |monitor| {
        let free = round(programs, monitor, false)?;
        let tracked = round(programs, monitor, true)?;
        Ok(vec![free, tracked, tracked / free])
    })?;
    let heads = [
        Head::new("writes on and on, untracked", "GB/s", Better::Higher),
        Head::new(
            "writes on and on, read out at 10 Hz",
            "GB/s",
            Better::Higher,
        ),
    ];
    table.take_all(&heads, ROUNDS, &["brume"], |monitor| {
        let mut guest = Guest::live(programs, monitor, WRITER, false, "bare.rate=max")?;
        let free = rate(&mut guest, time, |_| {
            thread::sleep(time);
            Ok(())
        })?;
        if !track(&mut guest, "On")? {
            return Ok(vec![free, f64::NAN]);
        }
        let asked = rate(&mut guest, time, |guest| {
            read(guest, "bitmap")?;
            track(guest, "Reset")?;
            thread::sleep(PERIOD);
            Ok(())
        })?;
        Ok(vec![free, asked])
    })
}

/// Median times in milliseconds of read-outs, as a bitmap and as ranges, after the guest has
/// written what it touches.
fn read_outs(programs: &Programs, monitor: &str, size: Size) -> io::Result<[f64; 2]> {
    let mut guest = Guest::live(programs, monitor, size, false, "")?;
    if !track(&mut guest, "On")? {
        return Ok([f64::NAN; 2]);
    }
    guest.ask(b'w', "wrote", "ns")?;
    let mut median_of = |form| {
        let times: io::Result<Vec<f64>> = (0..READS)
            .map(|_| {
                let begun = Instant::now();
                read(&mut guest, form)?;
                Ok(begun.elapsed().as_secs_f64() * 1e3)
            })
            .collect();
        times.map(|times| median(&times))
    };
    Ok([median_of("bitmap")?, median_of("ranges")?])
}

fn read(guest: &mut Guest, form: &str) -> io::Result<()> {
    let path = format!("/memory/dirty?form={form}");
    guest.session.send(("GET", &path, String::new())).map(drop)
}

/// Asks for tracking `On`, `Off` or `Reset`; whether it is not refused.
fn track(guest: &mut Guest, how: &str) -> io::Result<bool> {
    let body = json!({ "tracking": how }).to_string();
    unless_refused(guest.session.send(("PUT", "/memory/dirty", body))).map(|body| body.is_some())
}

/// How fast the guest writes all of its area once: without tracking, or just after a diff, when
/// the first write to each page costs it something.
fn round(programs: &Programs, monitor: &str, tracked: bool) -> io::Result<f64> {
    let mut guest = Guest::live(programs, monitor, WRITER, tracked, "")?;
    if tracked {
        let files = Files::new(programs, "round");
        guest.set_paused(true)?;
        guest.create(&files, "Diff")?;
        guest.set_paused(false)?;
    }
    let ns = guest.ask(b'w', "wrote", "ns")?;
    Ok((WRITER.touched() << 20) as f64 / ns)
}

/// How fast the guest writes while `act` is done again and again for `time`.
fn rate(
    guest: &mut Guest,
    time: Duration,
    mut act: impl FnMut(&mut Guest) -> io::Result<()>,
) -> io::Result<f64> {
    let before = guest.ask(b'?', "alive", "writes")?;
    let begun = Instant::now();
    while begun.elapsed() < time {
        act(guest)?;
    }
    let took = begun.elapsed();
    let pages = guest.ask(b'?', "alive", "writes")? - before;
    Ok(pages * 4096.0 / 1e9 / took.as_secs_f64())
}
