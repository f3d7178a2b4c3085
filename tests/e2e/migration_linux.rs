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
use std::time::{Duration, Instant};

use brume_api::{MigrationPhase, MigrationStatus};
use brume_tests::api::{ApiVm, eventually};
use brume_tests::lan::{Lan, TAP};
use brume_tests::ping::{Listener, Ping, Route, Train};
use brume_tests::vm::{LINUX, SOON, brume, output_of};
use brume_tests::witness::{self, Asker, Status, assert_journal, status_over, stream};
use brume_tests::{artefacts, linux_slot};
use serde_json::json;
use tempfile::TempDir;

const MAC: [u8; 6] = [0x06, 0, 0, 0, 0, 0x0a];
/// The MAC address of who pings, on the switch.
const PINGER: [u8; 6] = [0x02, 0, 0, 0, 0, 0x01];
const PORT: u16 = 7000;
/// Between two pings, if the guest is fast enough.
const INTERVAL: Duration = Duration::from_millis(10);
/// So many are tried alone before.
const TRIES: usize = 5;
/// Pings go on for so long before a move and after it.
const AROUND: Duration = Duration::from_millis(700);
/// How often the network is told.
const ROUNDS: usize = 5;
/// By how much one move may set the guest's uptime off, in milliseconds.
const MAX_STEP: f64 = 50.0;

/// All around the machine that outlives each of its processes.
struct Surroundings {
    lan: Lan,
    folder: TempDir,
    asker: Asker,
    disk: PathBuf,
}

/// One process of the machine.
struct Machine {
    api: ApiVm,
    vsock: PathBuf,
    /// The number of its host.
    host: usize,
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

    /// A process on a host, for generation `number` of the machine.
    fn process(&self, host: usize, number: usize) -> Machine {
        let lan = &self.lan;
        Machine {
            api: ApiVm::start_with(brume(), |command| lan.hosts[host].wrap(&command)),
            vsock: self.folder.path().join(format!("{number}.sock")),
            host,
        }
    }

    fn boot(&self) -> Machine {
        let machine = self.process(0, 0);
        let interface = json!({"iface_id": "eth0", "host_dev_name": TAP, "guest_mac": text(MAC)});
        let parts = [
            (
                "/machine-config",
                json!({"vcpu_count": 2, "mem_size_mib": 64}),
            ),
            ("/network-interfaces/eth0", interface),
        ];
        witness::boot(&machine.api, &self.disk, &machine.vsock, &parts);
        machine
    }

    /// A process on the other host that waits for the machine.
    fn receiver(&self, source: &Machine, number: usize) -> (Machine, String) {
        let target = self.process(1 - source.host, number);
        let address = format!("tcp:{}:{PORT}", Lan::address(target.host));
        let body = json!({
            "listen": address, "vsock_override": {"uds_path": target.vsock},
        });
        target.api.done("PUT", "/migration/receive", &body);
        (target, address)
    }

    /// Pings from the switch until it ends.
    fn pings(&self, interval: Duration) -> Train {
        let route = Route {
            macs: [MAC, PINGER],
            addresses: [witness::ADDRESS, witness::HOST].map(address),
        };
        Train::start(&self.lan.switch, "lan0", route, interval)
    }

    /// How often the guest can be pinged: an emulated kernel takes long for an answer, and loses
    /// what comes faster.
    fn interval(&self) -> Duration {
        let wait = Duration::from_millis(200);
        let train = self.pings(wait);
        thread::sleep(wait * u32::try_from(TRIES).unwrap());
        let mut times: Vec<_> = train.end().iter().filter_map(Ping::time).collect();
        times.sort();
        assert!(times.len() >= TRIES - 1, "only {times:?} were answered");
        INTERVAL.max(times[times.len() / 2] * 3)
    }

    /// The port by which the switch reaches the guest.
    fn port(&self) -> String {
        let switch = self.lan.switch.name();
        let table = output_of("bridge", &["-n", switch, "fdb", "show", "br", "lan0"]);
        let mac = text(MAC);
        let line = table.lines().find(|line| line.starts_with(&mac));
        let words = line.unwrap_or_default().split(' ');
        words
            .skip_while(|word| *word != "dev")
            .nth(1)
            .unwrap_or_default()
            .to_owned()
    }
}

impl Machine {
    fn progress(&self) -> MigrationStatus {
        serde_json::from_value(self.api.get("/migration")).unwrap()
    }

    /// Moves to `target`; how that went.
    fn move_to(&self, target: &Self, address: &str) -> MigrationStatus {
        let body = json!({"destination": address, "connections": 2});
        self.api.done("PUT", "/migration/send", &body);
        let begun = Instant::now();
        let status = loop {
            let status = self.progress();
            if status.phase.is_over() {
                break status;
            }
            assert!(begun.elapsed() < SOON, "{status:#?}");
            thread::sleep(Duration::from_millis(5));
        };
        let logs = || format!("{status:#?}\n{}\n{}", self.api.log(), target.api.log());
        assert_eq!(status.phase, MigrationPhase::Completed, "{}", logs());
        eventually("the target says so, too", || {
            target.progress().phase == MigrationPhase::Completed
        });
        status
    }
}

fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn address(text: &str) -> Ipv4Addr {
    text.split('/').next().unwrap().parse().unwrap()
}

/// Checks that no more pings were lost than the guest stood still for, and one.
#[track_caller]
fn assert_answered(pings: &[Ping], interval: Duration, downtime_us: u64) {
    let lost: Vec<_> = pings
        .iter()
        .filter(|ping| ping.answered.is_none())
        .collect();
    let slowest = pings.iter().filter_map(Ping::time).max();
    println!(
        "downtime {downtime_us} us, {} of {} pings lost at {interval:?}, slowest {slowest:?}",
        lost.len(),
        pings.len()
    );
    let interval_us = u64::try_from(interval.as_micros()).unwrap();
    let allowed = downtime_us.div_ceil(interval_us) + 1;
    let first = pings[0].sent;
    let when: Vec<_> = lost.iter().map(|ping| ping.sent - first).collect();
    assert!(
        lost.len() as u64 <= allowed,
        "{downtime_us} us stood still, lost at {when:?} of {}",
        pings.len()
    );
}

/// Checks that the guest said nothing but what it was asked: its kernel warned of nothing, and
/// does not take itself for a copy. What it says of its boot does not count.
#[track_caller]
fn assert_silent(console: &str) {
    let work = console
        .split_once("witness note ready")
        .map_or(console, |(_, work)| work);
    let mut others = work.lines().filter(|line| {
        let line = line.trim();
        !line.is_empty() && !line.starts_with("brume-guest: ")
    });
    assert_eq!(others.next(), None, "{console}");
}

fn move_often(times: usize) {
    let _slot = linux_slot(2);
    let around = Surroundings::new();
    let asker = &around.asker;
    let mut machine = around.boot();
    assert_eq!(asker.ask(&machine.api.vm, "m"), "mmds before=0 after=200");
    let mut uptime = asker.uptime(&machine.api.vm);
    for number in 1..=times {
        let open = stream(&machine.vsock, &machine.api.vm);
        match number {
            // It moves while it is being filled, and while it is being emptied.
            2 => machine
                .api
                .done("PATCH", "/balloon", &json!({"amount_mib": 12})),
            5 => machine
                .api
                .done("PATCH", "/balloon", &json!({"amount_mib": 0})),
            _ => {}
        }
        let before = asker.status(&machine.api.vm);
        let interval = around.interval();
        let (target, to) = around.receiver(&machine, number);
        let announcements = Listener::start(&around.lan.switch, "lan0", MAC);
        let pings = around.pings(interval);
        thread::sleep(AROUND);
        let status = machine.move_to(&target, &to);
        thread::sleep(AROUND);
        let pings = pings.end();
        let port = format!("port{}", target.host);
        assert_eq!(around.port(), port);
        let downtime = status.downtime.unwrap().total_us;
        let source = machine.api.vm.wait(SOON);
        source.assert_clean();
        assert_silent(&source.stdout);
        machine = Machine { ..target };
        drop(open);
        let vm = &machine.api.vm;
        assert_answered(&pings, interval, downtime);

        let after = asker.status(vm);
        after.assert_after(&before);
        let now = asker.uptime(vm);
        println!(
            "uptime off by {:.1} ms, known to {:.1} ms",
            now.distance(uptime),
            now.uncertainty()
        );
        assert!(now.distance(uptime) <= MAX_STEP, "{uptime:?} {now:?}");
        uptime = now;
        eventually("the second CPU goes on", || {
            asker.status(vm).number("busy") > after.number("busy")
        });
        eventually("the guest has lost the stream", || {
            asker.status(vm).number("resets") == number as u64
        });
        let streams = status_over(&mut stream(&machine.vsock, vm)).number("streams");
        assert!(streams > after.number("streams"));
        let heard = announcements.end();
        println!("{heard:?}");
        assert!(heard.rarp >= ROUNDS && heard.arp >= ROUNDS, "{heard:?}");
        match number {
            2 => wait_for_balloon(&machine, 12),
            5 => wait_for_balloon(&machine, 0),
            _ => {}
        }
    }
    let status = Status::parse(&asker.ask(&machine.api.vm, "q"));
    let outcome = machine.api.vm.wait(LINUX);
    outcome.assert_clean();
    outcome.line("brume-guest: witness ok");
    assert_silent(&outcome.stdout);
    assert_journal(&around.disk, status.number("records"));
}

#[track_caller]
fn wait_for_balloon(machine: &Machine, mib: u64) {
    eventually("the balloon is as large as it should be", || {
        machine.api.get("/balloon/statistics")["actual_mib"] == mib
    });
}

#[test]
fn linux_moves_there_and_back_and_does_not_notice() {
    move_often(8);
}

#[test]
#[ignore = "takes minutes"]
fn linux_moves_fifty_times() {
    move_often(50);
}
