// SPDX-License-Identifier: Apache-2.0
//! Moving a machine to another process while its guest runs.
//!
//! The guest itself measures how long it stood still and how fast its loop went before and
//! meanwhile: its counter has to go on while the machine moves, as one does that no monitor sets.
//! Every monitor may let it stand still for 20 ms, and has 30 s; "refused" is a move that was not
//! over by then, or a figure that a monitor does not tell. What it has touched is checked after.
//!
//! On a machine that is itself a virtual one, a guest stands still too while another machine has the
//! processors: a move from which the host took more than a little of them is made again.

use std::fs;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use brume_tests::live::Gap;
use brume_tests::netns::NetNs;

use crate::guest::Size;
use crate::mover::{Link, Moved, Mover, Way};
use crate::plain_copy;
use crate::program::{Programs, Running};
use crate::session::unless_refused;
use crate::table::{Better, Head, Table};

const ROUNDS: usize = 3;
/// How long the guest is watched before it moves.
const BEFORE: Duration = Duration::from_millis(300);
/// How often a move is made, at most, for one that the host leaves alone; else the one from which it
/// took least counts.
const TRIES: usize = 3;
/// How much of the time a host may take that leaves a move alone, of one processor.
const STOLEN: f64 = 0.02;
/// How much of it `/proc/stat` counts as one: a hundredth of a second on every Linux.
const TICK_S: f64 = 0.01;
/// Bytes in a page.
const PAGE: u64 = 4096;

/// What a guest does, how much of its memory it has touched, in percent, and its arguments.
const LOADS: [(&str, u64, &str); 4] = [
    ("empty", 0, ""),
    ("idle", 100, ""),
    ("100 MB/s", 100, "bare.rate=100"),
    ("1 GB/s", 100, "bare.rate=1000"),
];
const LINKS: [(&str, Link); 2] = [("unix", Link::Unix), ("tcp", Link::Tcp)];

/// Takes the rows, for machines of so many MiB, on a thread in a namespace of its own, where
/// nothing else is on the loopback interface.
///
/// # Errors
///
/// A measurement fails.
pub(crate) fn measure(programs: &Programs, table: &mut Table, sizes: &[u64]) -> io::Result<()> {
    thread::scope(|scope| {
        let rows = scope.spawn(|| {
            let network = NetNs::new();
            network.sh("ip link set lo up");
            network.enter();
            rows(programs, table, sizes)
        });
        rows.join()
            .unwrap_or_else(|_| Err(io::Error::other("the migration thread panicked")))
    })
}

fn rows(programs: &Programs, table: &mut Table, sizes: &[u64]) -> io::Result<()> {
    for &mib in sizes {
        for (load, percent, args) in LOADS {
            let size = Size { mib, percent };
            let name = format!("move {load}, {}", size.name());
            if percent == 0 {
                let way = Way {
                    link: Link::OneHost,
                    post_copy: false,
                };
                row(
                    programs,
                    table,
                    &format!("{name}, one host"),
                    size,
                    args,
                    way,
                )?;
            }
            for (on, link) in LINKS {
                for (mode, post_copy) in [("", false), (", post-copy", true)] {
                    let way = Way { link, post_copy };
                    let name = format!("{name}, {on}{mode}");
                    row(programs, table, &name, size, args, way)?;
                }
            }
        }
        for (on, link) in LINKS {
            beside_plain_copy(programs, table, mib, on, link)?;
        }
    }
    Ok(())
}

/// Takes the rows of one load, size and way.
fn row(
    programs: &Programs,
    table: &mut Table,
    name: &str,
    size: Size,
    args: &str,
    way: Way,
) -> io::Result<()> {
    let mut heads = vec![
        ("in all", "ms", Better::Lower),
        ("stands still", "ms", Better::Lower),
        ("beyond its longest turn", "ms", Better::Lower),
        ("as told", "ms", Better::Lower),
        ("guest's speed over before", "", Better::Higher),
    ];
    if size.percent > 0 {
        heads.push(("memory", "GB/s", Better::Higher));
    }
    if size.percent > 0 && way.link == Link::Tcp {
        heads.push(("bytes over touched and written", "", Better::Lower));
    }
    let count = heads.len();
    let heads: Vec<Head> = heads
        .into_iter()
        .map(|(what, unit, better)| Head::new(format!("{name}, {what}"), unit, better))
        .collect();
    table.take_all(&heads, ROUNDS, &programs.movers(), |monitor| {
        let mut best = (f64::INFINITY, [f64::NAN; 7]);
        for _ in 0..TRIES {
            let start = Mover::start(programs, monitor, size, args, way);
            let Some(mut mover) = unless_refused(start)? else {
                break;
            };
            let (begun, before) = (Instant::now(), stolen_s()?);
            let Some(figures) = one(&mut mover, size)? else {
                break;
            };
            let stolen = (stolen_s()? - before) / begun.elapsed().as_secs_f64();
            if stolen < best.0 {
                best = (stolen, figures);
            }
            if stolen <= STOLEN {
                break;
            }
        }
        let mut figures = best.1.to_vec();
        figures.truncate(count);
        Ok(figures)
    })
}

/// How long the host has given the processors to others while they were wanted here, in seconds.
fn stolen_s() -> io::Result<f64> {
    let stat = fs::read_to_string("/proc/stat")?;
    let counters = stat.lines().next().unwrap_or_default();
    // After its name, and user, nice, system, idle, iowait, irq and softirq.
    let stolen = counters.split_whitespace().nth(8);
    let ticks: Option<f64> = stolen.and_then(|ticks| ticks.parse().ok());
    let ticks = ticks.ok_or_else(|| io::Error::other("/proc/stat is not as it was"))?;
    Ok(ticks * TICK_S)
}

/// The figures of one move, if it was over in time.
fn one(mover: &mut Mover, size: Size) -> io::Result<Option<[f64; 7]>> {
    gap(mover.source())?;
    thread::sleep(BEFORE);
    let before = gap(mover.source())?;
    let carried = loopback_bytes()?;
    let Some(Moved {
        took, downtime_ms, ..
    }) = mover.go()?
    else {
        return Ok(None);
    };
    let carried = loopback_bytes()? - carried;
    let meanwhile = gap(mover.target())?;
    let hash = mover.target().answer(b'h', "hash")?;
    if !hash.ends_with(" ok") {
        return Err(io::Error::other(format!(
            "the guest's memory is not what it was: {hash}"
        )));
    }
    let touched = (size.touched() << 20) as f64;
    let written = (meanwhile.pages * PAGE) as f64;
    let still = meanwhile.max_us as f64 / 1e3;
    Ok(Some([
        took.as_secs_f64() * 1e3,
        still,
        (still - before.max_us as f64 / 1e3).max(0.0),
        downtime_ms,
        meanwhile.rate() / before.rate(),
        touched / 1e9 / took.as_secs_f64(),
        carried as f64 / (touched + written),
    ]))
}

/// What brume's first pass reaches of what the socket can carry, while the same guest runs.
fn beside_plain_copy(
    programs: &Programs,
    table: &mut Table,
    mib: u64,
    on: &str,
    link: Link,
) -> io::Result<()> {
    let size = Size { mib, percent: 100 };
    let name = format!("move idle, {}, {on}", size.name());
    let heads = [
        Head::new(format!("{name}, plain copy"), "GB/s", Better::Higher),
        Head::new(format!("{name}, first pass"), "GB/s", Better::Higher),
        Head::new(
            format!("{name}, first pass over plain copy"),
            "",
            Better::Higher,
        ),
    ];
    table.take_all(&heads, ROUNDS, &["brume"], |monitor| {
        let way = Way {
            link,
            post_copy: false,
        };
        let start = Mover::start(programs, monitor, size, "", way);
        let Some(mut mover) = unless_refused(start)? else {
            return Ok(vec![f64::NAN; 3]);
        };
        let bytes = (size.touched() << 20) as usize;
        let plain = plain_copy::rate(bytes, link == Link::Tcp)?;
        let first = mover.go()?.map_or(f64::NAN, |moved| moved.first_pass);
        Ok(vec![plain / 1e9, first / 1e9, first / plain])
    })
}

/// How the guest's loop got on since it was asked last.
fn gap(monitor: &mut Running) -> io::Result<Gap> {
    let line = monitor.answer(b'd', "gap")?;
    Gap::parse(&line).ok_or_else(|| io::Error::other(format!("not a gap: {line}")))
}

/// What this thread's loopback interface has carried.
fn loopback_bytes() -> io::Result<u64> {
    let interfaces = fs::read_to_string("/proc/thread-self/net/dev")?;
    let loopback = interfaces.lines().find_map(|line| {
        let counters = line.trim_start().strip_prefix("lo:")?;
        counters.split_whitespace().next()?.parse().ok()
    });
    loopback.ok_or_else(|| io::Error::other("there is no loopback interface"))
}
