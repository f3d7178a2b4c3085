// SPDX-License-Identifier: Apache-2.0
//! The network device: a TAP in a network namespace of its own, with the host at its other end.

use std::io::{self, BufRead, BufReader};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use brume_tests::frame;
use brume_tests::host::FrameSocket;
use brume_tests::netns::NetNs;
use serde_json::json;

use crate::program::{Output, Programs, Running};
use crate::table::{Better, Table};

const TAP: &str = "bench0";
const BATCH: usize = 64;
/// Step, frame size, what is counted, unit, and how many of that the unit holds.
const RATES: [(&str, usize, &str, &str, f64); 4] = [
    ("net-tx", frame::MIN, "frames", "kpps", 1e3),
    ("net-tx", frame::MAX, "bytes", "Gbit/s", 1e9 / 8.0),
    ("net-rx", frame::MIN, "frames", "kpps", 1e3),
    ("net-rx", frame::MAX, "bytes", "Gbit/s", 1e9 / 8.0),
];

/// Takes the rows, on a thread that is in a namespace of its own.
///
/// # Errors
///
/// A measurement fails.
pub(crate) fn measure(programs: &Programs, table: &mut Table, ms: u32) -> io::Result<()> {
    thread::scope(|scope| {
        let rows = scope.spawn(|| {
            let network = NetNs::new();
            network.sh(&format!(
                "ip tuntap add {TAP} mode tap vnet_hdr; ip link set {TAP} up"
            ));
            network.enter();
            rows(programs, table, ms)
        });
        rows.join()
            .unwrap_or_else(|_| Err(io::Error::other("the network thread panicked")))
    })
}

fn rows(programs: &Programs, table: &mut Table, ms: u32) -> io::Result<()> {
    for (step, size, key, unit, scale) in RATES {
        let args = format!("bare.do={step} bare.bytes={size} bare.ms={ms}");
        let peer = if step == "net-tx" {
            Peer::Silent
        } else {
            Peer::Flood(size)
        };
        let name = format!("{step} of {size} bytes");
        table.take(&name, unit, Better::Higher, &programs.monitors(), |name| {
            Ok(run(programs, name, &args, peer)?.rate(step, key)? / scale)
        })?;
    }
    table.take(
        "net-rtt",
        "us",
        Better::Lower,
        &programs.monitors(),
        |name| {
            let output = run(programs, name, "bare.do=net-rtt bare.ops=2000", Peer::Echo)?;
            Ok(output.number("net-rtt", "median_ns")? / 1e3)
        },
    )
}

/// What the host does at the other end.
#[derive(Clone, Copy)]
enum Peer {
    Silent,
    /// Sends frames of that size as fast as it can.
    Flood(usize),
    /// Sends each frame back.
    Echo,
}

/// Runs a guest with the host's end at work as soon as the guest is.
fn run(programs: &Programs, name: &str, args: &str, peer: Peer) -> io::Result<Output> {
    let parts = json!({"network-interfaces": [{"iface_id": "n", "host_dev_name": TAP}]});
    let mut guest = Running::spawn(programs.command(name, args, &parts)?)?;
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        if !matches!(peer, Peer::Silent) {
            let mut line = String::new();
            // A byte at a time, so that what follows stays for the figures.
            BufReader::with_capacity(1, guest.stdout()?).read_line(&mut line)?;
            scope.spawn(|| serve(peer, &done));
        }
        let output = guest.finish();
        done.store(true, Ordering::Relaxed);
        output
    })
}

fn serve(peer: Peer, done: &AtomicBool) {
    let Ok(socket) = FrameSocket::open(TAP) else {
        return;
    };
    let mut bytes = [0; 2048];
    while !done.load(Ordering::Relaxed) {
        match peer {
            Peer::Silent => return,
            Peer::Flood(size) => {
                let flood = &mut bytes[..size];
                frame::build(flood, [0xff; 6], [6, 0, 0, 0, 0, 1], frame::DATA, 0, 1);
                while !done.load(Ordering::Relaxed) {
                    if socket.send_many(flood, BATCH) < BATCH {
                        // The TAP's queue is full; the guest has enough to do.
                        thread::yield_now();
                    }
                }
            }
            Peer::Echo => {
                let Some(len) = socket.receive(&mut bytes) else {
                    continue;
                };
                frame::turn_round(&mut bytes[..len]);
                socket.send(&bytes[..len]);
            }
        }
    }
}
