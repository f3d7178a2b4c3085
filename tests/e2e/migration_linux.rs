// SPDX-License-Identifier: Apache-2.0
//! Linux at work moves between two hosts, there and back: it must not notice, and who talks to it
//! hardly.
//!
//! A boot takes long where kernel code is emulated, so all of this shares one. The guest runs its
//! step `witness`, which see in `resources/guest/README.md`.

use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use brume_tests::api::eventually;
use brume_tests::lan::{Lan, TAP};
use brume_tests::ping::{Announcements, Listener, Losses, Ping, Probe, Train};
use brume_tests::placed::Placed;
use brume_tests::vm::{LINUX, SOON};
use brume_tests::witness::{self, Asker, Status, assert_journal, status_over, stream};
use brume_tests::{artefacts, linux_slot};
use serde_json::json;
use tempfile::TempDir;

use crate::migration::in_turn;

const MAC: [u8; 6] = [0x06, 0, 0, 0, 0, 0x0a];
/// The MAC address of who pings, on the switch.
const PINGER: [u8; 6] = [0x02, 0, 0, 0, 0, 0x01];
/// Between two pings, if the guest is fast enough.
const INTERVAL: Duration = Duration::from_millis(10);
/// So many are tried alone before.
const TRIES: usize = 5;
/// Pings go on for so long before a move and after it, or for three of them.
const AROUND: Duration = Duration::from_millis(700);
/// How often the network is told.
const ANNOUNCED: Announcements = Announcements { rarp: 5, arp: 5 };
/// By how much one move may set the guest's uptime off, in milliseconds.
const MAX_STEP: f64 = 50.0;
/// The same of one move in four: others may have the processor when a clock is set.
const MAX_LATE_STEP: f64 = 500.0;

/// All around the machine that outlives each of its processes.
struct Surroundings {
    lan: Lan,
    folder: TempDir,
    asker: Asker,
    disk: PathBuf,
}

/// One process of the machine.
struct Machine {
    placed: Placed,
    vsock: PathBuf,
}

impl Surroundings {
    fn new() -> Self {
        let lan = Lan::new();
        let commands = format!(
            "ip link set lan0 address {}; ip addr add {} dev lan0",
            text(PINGER),
            witness::HOST
        );
        lan.switch.sh(&commands);
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("disk.ext4");
        fs::copy(artefacts::rootfs(), &disk).unwrap();
        let asker = Asker::new(&lan.switch);
        Self {
            lan,
            folder,
            asker,
            disk,
        }
    }

    /// The vsock device's socket of generation `number`.
    fn vsock(&self, number: usize) -> PathBuf {
        self.folder.path().join(format!("{number}.sock"))
    }

    fn boot(&self, vcpus: usize) -> Machine {
        let machine = Machine {
            placed: Placed::start(&self.lan, 0),
            vsock: self.vsock(0),
        };
        let interface = json!({"iface_id": "eth0", "host_dev_name": TAP, "guest_mac": text(MAC)});
        let parts = [
            (
                "/machine-config",
                json!({"vcpu_count": vcpus, "mem_size_mib": 64}),
            ),
            ("/network-interfaces/eth0", interface),
        ];
        witness::boot(&machine.placed.api, &self.disk, &machine.vsock, &parts);
        machine
    }

    /// A process on the other host that waits for the machine.
    fn receiver(&self, source: &Machine, number: usize) -> Machine {
        let vsock = self.vsock(number);
        let overrides = json!({"vsock_override": {"uds_path": vsock}});
        Machine {
            placed: source.placed.other(&self.lan, &overrides),
            vsock,
        }
    }

    /// Pings from the switch until it ends.
    fn pings(&self, interval: Duration) -> Train {
        let addresses = [witness::ADDRESS, witness::HOST].map(address);
        let probe = Probe::Echo([MAC, PINGER], addresses);
        Train::start(&self.lan.switch, "lan0", probe, interval)
    }

    /// How often the guest can be pinged: an emulated kernel takes long for an answer, and loses
    /// what comes faster.
    fn interval(&self) -> Duration {
        let wait = Duration::from_millis(200);
        let train = self.pings(wait);
        // More than are waited for: who sends may stand still, too.
        thread::sleep(wait * 2 * u32::try_from(TRIES).unwrap());
        let mut times: Vec<_> = train.end().iter().filter_map(Ping::time).collect();
        times.sort();
        assert!(times.len() >= TRIES - 1, "only {times:?} were answered");
        INTERVAL.max(times[times.len() / 2] * 3)
    }
}

fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn address(text: &str) -> Ipv4Addr {
    text.split('/').next().unwrap().parse().unwrap()
}

/// Checks that the guest said nothing but what it was asked: its kernel warned of nothing, and
/// does not take itself for a copy. What it says of its boot does not count, nor what it says of its
/// end: a frame may still be on its way out when its devices are taken from it.
#[track_caller]
fn assert_silent(console: &str) {
    let work = console
        .split_once("witness note ready")
        .map_or(console, |(_, work)| work);
    let work = work
        .split_once("brume-guest: poweroff ok")
        .map_or(work, |(work, _)| work);
    let mut others = work.lines().filter(|line| {
        let line = line.trim();
        !line.is_empty() && !line.starts_with("brume-guest: ")
    });
    assert_eq!(others.next(), None, "{console}");
}

/// Moves the machine for the `number`th time while the switch pings it; where it is then.
fn moved(around: &Surroundings, machine: Machine, number: usize, losses: &mut Losses) -> Machine {
    let interval = around.interval();
    let target = around.receiver(&machine, number);
    let announcements = Listener::start(&around.lan.switch, "lan0", MAC);
    let train = around.pings(interval);
    let around_move = AROUND.max(interval * 3);
    thread::sleep(around_move);
    let status = machine.placed.move_to(&target.placed, &in_turn(number));
    thread::sleep(around_move);
    let pings = train.end();
    let heard = announcements.end(ANNOUNCED);
    assert!(heard.has(ANNOUNCED), "{heard:?}");
    let port = format!("port{}", target.placed.host);
    assert_eq!(around.lan.port_of(&text(MAC)), port);

    let downtime = Duration::from_micros(status.downtime.unwrap().total_us);
    let lost = losses.note(&pings, interval, downtime);
    let sent = pings.len();
    println!("{number}: {downtime:?}, {lost} of {sent} pings lost, one each {interval:?}");
    println!("{number}: {heard:?}, {} passes", status.passes.len());
    let source = machine.placed.api.vm.wait(SOON);
    source.assert_clean();
    assert_silent(&source.stdout);
    target
}

/// Checks that all devices work after the `number`th move.
#[track_caller]
fn assert_works(machine: &Machine, asker: &Asker, number: usize) {
    let vm = &machine.placed.api.vm;
    let before = asker.status(vm);
    eventually("the second CPU goes on", || {
        asker.status(vm).number("busy") > before.number("busy")
    });
    eventually("the guest has lost the stream", || {
        asker.status(vm).number("resets") == number as u64
    });
    let streams = status_over(&mut stream(&machine.vsock, vm)).number("streams");
    assert!(streams > before.number("streams"));
    // The data move; the tokens are of a process.
    assert!(asker.ask(vm, "m").ends_with(" after=200"));
}

/// Has the balloon filled, or emptied, while the machine moves.
#[track_caller]
fn set_balloon(machine: &Machine, mib: u64) {
    let api = &machine.placed.api;
    api.done("PATCH", "/balloon", &json!({"amount_mib": mib}));
}

fn move_often(vcpus: usize, times: usize) {
    let _slot = linux_slot(vcpus);
    let around = Surroundings::new();
    let asker = &around.asker;
    let mut machine = around.boot(vcpus);
    assert_eq!(
        asker.ask(&machine.placed.api.vm, "m"),
        "mmds before=0 after=200"
    );
    let mut uptime = asker.uptime(&machine.placed.api.vm);
    let (mut losses, mut off) = (Losses::default(), 0);
    for number in 1..=times {
        let open = stream(&machine.vsock, &machine.placed.api.vm);
        let balloon = match number {
            2 => Some(12),
            5 => Some(0),
            _ => None,
        };
        if let Some(mib) = balloon {
            set_balloon(&machine, mib);
        }
        let before = asker.status(&machine.placed.api.vm);
        machine = moved(&around, machine, number, &mut losses);
        drop(open);
        let vm = &machine.placed.api.vm;
        asker.status(vm).assert_after(&before);
        let now = asker.uptime(vm);
        let (step, known) = (now.distance(uptime), now.uncertainty());
        println!("{number}: uptime off by {step:.1} ms, known to {known:.1} ms");
        off += usize::from(step > MAX_STEP);
        assert!(step <= MAX_LATE_STEP, "{uptime:?} {now:?}");
        uptime = now;
        assert_works(&machine, asker, number);
        if let Some(mib) = balloon {
            wait_for_balloon(&machine, mib);
        }
    }
    losses.assert_few();
    assert!(off <= times / 4, "the guest's uptime was off {off} times");
    let status = Status::parse(&asker.ask(&machine.placed.api.vm, "q"));
    let outcome = machine.placed.api.vm.wait(LINUX);
    outcome.assert_clean();
    outcome.line("brume-guest: witness ok");
    assert_silent(&outcome.stdout);
    assert_journal(&around.disk, status.number("records"));
}

#[track_caller]
fn wait_for_balloon(machine: &Machine, mib: u64) {
    eventually("the balloon is as large as it should be", || {
        machine.placed.api.get("/balloon/statistics")["actual_mib"] == mib
    });
}

#[test]
fn linux_moves_there_and_back_and_does_not_notice() {
    move_often(2, 8);
}

#[test]
#[ignore = "takes minutes"]
fn linux_moves_fifty_times() {
    move_often(2, 50);
}

#[test]
#[ignore = "takes minutes"]
fn linux_moves_with_more_cpus_than_the_host_has_to_spare() {
    move_often(4, 8);
}
