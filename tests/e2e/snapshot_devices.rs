// SPDX-License-Identifier: Apache-2.0
//! Devices saved and restored in the middle of their work, with the bare guest.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use brume_tests::api::ApiVm;
use brume_tests::frame;
use brume_tests::host::{self, FrameSocket};
use brume_tests::live::{Live, Snapshot};
use brume_tests::memory_files::{assert_same_memory, merge};
use brume_tests::netns::NetNs;
use brume_tests::vm::SOON;
use serde_json::{Value, json};

use crate::block::disk;
use crate::vsock::{connect, echo};

const TAP: &str = "ip tuntap add tap0 mode tap vnet_hdr; ip link set tap0 up";

fn small(track: bool) -> (&'static str, Value) {
    let machine = json!({"vcpu_count": 1, "mem_size_mib": 32, "track_dirty_pages": track});
    ("/machine-config", machine)
}

/// The guest whose disk never rests (the step `live-blk`).
struct Disk(Live);

/// What that guest says of its disk.
#[derive(Clone, Copy, Debug)]
struct Work {
    ops: u64,
    bytes: u64,
    in_flight: u64,
}

impl Disk {
    fn start(args: &str, path: &Path, engine: &str, limiter: &Value) -> Self {
        let drive = json!({
            "drive_id": "d", "is_root_device": false, "path_on_host": path, "io_engine": engine,
            "rate_limiter": limiter,
        });
        let api = ApiVm::new();
        let args = format!("bare.do=live-blk {args}");
        api.start_bare(&args, &[small(true), ("/drives/d", drive)]);
        api.vm.wait_for("bare: live-blk ready\n", SOON);
        Self(Live { api })
    }

    fn restored(snapshot: &Snapshot) -> Self {
        let tracked = json!({"track_dirty_pages": true});
        Self(Live::restored(snapshot, &tracked))
    }

    /// Tells the guest something; nothing may have gone wrong with the disk so far.
    #[track_caller]
    fn ask(&mut self, command: u8) -> Work {
        let line = self.0.ask(command, "live-blk");
        let number = |key: &str| -> u64 {
            let word = line.split(' ').find_map(|word| word.strip_prefix(key));
            word.unwrap().strip_prefix('=').unwrap().parse().unwrap()
        };
        assert_eq!((number("errors"), number("bad")), (0, 0), "{line}");
        Work {
            ops: number("ops"),
            bytes: number("bytes"),
            in_flight: number("inflight"),
        }
    }

    /// Waits until the guest has done more than `ops` requests.
    #[track_caller]
    fn work_past(&mut self, ops: u64) -> Work {
        let start = Instant::now();
        loop {
            let work = self.ask(b'?');
            if work.ops > ops {
                return work;
            }
            assert!(start.elapsed() < SOON, "{work:?}");
        }
    }
}

#[test]
fn block_requests_in_flight_are_all_answered_rightly() {
    thread::scope(|scope| {
        for engine in ["Sync", "Async"] {
            scope.spawn(move || block_generations(engine));
        }
    });
}

/// Snapshot after snapshot of a disk at work, each restored.
fn block_generations(engine: &str) {
    let (folder, path) = disk();
    // Large enough requests to be in flight whenever the machine is paused.
    let mut machine = Disk::start("bare.qd=32 bare.bytes=65536", &path, engine, &json!({}));
    let mut done = machine.work_past(500).ops;
    let mut in_flight = 0;
    for generation in 0..12 {
        let snapshot = Snapshot::named(folder.path(), &generation.to_string());
        machine.0.pause();
        machine.0.save("Full", &snapshot);
        machine = Disk::restored(&snapshot);
        let work = machine.work_past(done + 200);
        in_flight = in_flight.max(work.in_flight);
        done = work.ops;
        fs::remove_file(snapshot.memory).unwrap();
    }
    assert!(in_flight > 8, "{engine}: never more than {in_flight}");
    // Not one is lost, or this would wait for ever.
    assert_eq!(machine.ask(b's').in_flight, 0);
}

#[test]
fn a_limiter_gives_no_more_because_of_restores() {
    let (folder, path) = disk();
    let rate = 1 << 20;
    let limiter = json!({"bandwidth": {"size": rate, "refill_time": 1000}});
    let start = Instant::now();
    let mut machine = Disk::start("bare.qd=8 bare.bytes=65536", &path, "Async", &limiter);
    // The bucket is empty then.
    machine.work_past(16);
    for generation in 0..5 {
        let snapshot = Snapshot::named(folder.path(), &generation.to_string());
        machine.0.pause();
        machine.0.save("Full", &snapshot);
        machine = Disk::restored(&snapshot);
        // Time to take what the bucket has.
        thread::sleep(Duration::from_millis(100));
    }
    let work = machine.ask(b'?');
    // The bucket was full at the start, and fills from then on.
    let allowed = rate as f64 * (1.0 + start.elapsed().as_secs_f64());
    let share = work.bytes as f64 / allowed;
    assert!(share <= 1.01, "{work:?}, and {allowed} are allowed");
    // And it goes on.
    machine.work_past(work.ops + 16);
}

#[test]
fn base_and_diffs_are_the_memory_of_that_instant() {
    for (engine, seed) in [("Sync", 7_u64), ("Async", 11)] {
        let (folder, path) = disk();
        let args = format!("bare.qd=32 bare.seed={seed} bare.area=4");
        let mut machine = Disk::start(&args, &path, engine, &json!({}));
        let mut numbers = seed;
        let mut draw = |bound: u64| {
            numbers = numbers
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (numbers >> 33) % bound
        };
        let named = |name: String| Snapshot::named(folder.path(), &name);
        let mut base = named("base".into());
        machine.0.pause();
        machine.0.save("Full", &base);
        machine.0.resume();
        for round in 0..8 {
            for _ in 0..draw(4) {
                match draw(2) {
                    0 => machine.0.ask(b'w', "wrote"),
                    _ => machine.0.ask(b'z', "zeroed"),
                };
            }
            thread::sleep(Duration::from_millis(draw(30)));
            machine.0.pause();
            let [diff, merged, full] =
                ["diff", "merged", "full"].map(|what| named(format!("{what}-{round}")));
            machine.0.save("Diff", &diff);
            merge(&base.memory, &diff.memory, &merged.memory);
            let state = Snapshot {
                state: diff.state,
                memory: merged.memory,
            };
            machine.0.save("Full", &full);
            assert_same_memory(&state.memory, &full.memory);
            // Now on in this machine, now in another made of what was merged.
            if draw(3) == 0 {
                machine = Disk::restored(&state);
                machine.0.hash();
            } else {
                machine.0.resume();
            }
            for file in [&base.memory, &diff.memory, &full.memory] {
                fs::remove_file(file).unwrap();
            }
            // The full one was the last, so the next diff is since then; both are the same.
            base = state;
        }
        machine.ask(b's');
        machine.0.hash();
    }
}

#[test]
fn what_was_copied_while_the_machine_ran_is_one_instant() {
    let (folder, path) = disk();
    let args = "bare.qd=32 bare.area=4";
    let mut machine = Disk::start(args, &path, "Async", &json!({}));
    let mut base: Option<Snapshot> = None;
    for round in 0..4 {
        // The disk is that of both machines, so it is only read while there are two.
        machine.ask(b'r');
        let saved = Snapshot::named(folder.path(), &round.to_string());
        let mut target = saved.clone();
        let kind = if base.is_some() { "Diff" } else { "Full" };
        if base.is_some() {
            target.memory = folder.path().join("diff");
        }
        let mut request = target.create_request(kind);
        request["pre_copy"] = true.into();
        machine.0.ask(b'w', "wrote");
        machine.0.api.done("PUT", "/snapshot/create", &request);
        if let Some(base) = &base {
            merge(&base.memory, &target.memory, &saved.memory);
            fs::remove_file(&base.memory).unwrap();
        }
        // The machine that was saved goes on as well.
        let first = machine.ask(b'?');
        machine.0.hash();
        machine.work_past(first.ops + 100);
        machine = Disk::restored(&saved);
        machine.0.hash();
        machine.work_past(first.ops / 2);
        machine.ask(b'g');
        machine.0.ask(b'z', "zeroed");
        base = Some(saved);
    }
    machine.ask(b's');
    machine.0.hash();
}

/// The address of all on a network.
const EVERYBODY: [u8; 6] = [0xff; 6];

/// Sends frames to `to` one after the other, each until it comes back; how often one had to be sent again.
pub(crate) fn exchange(socket: &FrameSocket, to: [u8; 6], numbers: std::ops::Range<u64>) -> u64 {
    let mut again = 0;
    for number in numbers {
        let mut sent = vec![0; frame::length(3, number, frame::MAX)];
        frame::build(&mut sent, to, [2; 6], frame::DATA, number, 3);
        let mut bytes = vec![0; 1 << 16];
        let start = Instant::now();
        'sending: loop {
            assert!(start.elapsed() < SOON, "frame {number} does not come back");
            socket.send(&sent);
            while let Some(len) = socket.receive(&mut bytes) {
                let back = &bytes[..len];
                if frame::parse(back) == Some((frame::DATA, number)) {
                    assert!(
                        len == sent.len() && frame::intact(back, 3),
                        "frame {number}"
                    );
                    break 'sending;
                }
            }
            again += 1;
        }
    }
    again
}

#[test]
fn frames_go_both_ways_before_and_after() {
    let network = NetNs::new();
    network.sh(TAP);
    let folder = tempfile::tempdir().unwrap();
    let interface = json!({"iface_id": "e", "host_dev_name": "tap0"});
    let process = || ApiVm::start_with(brume_tests::vm::brume(), |c| network.wrap(&c));
    let api = process();
    let args = "bare.do=net-respond bare.ms=600000 bare.end=poweroff";
    let parts = [small(false), ("/network-interfaces/e", interface)];
    api.start_bare(args, &parts);
    api.vm.wait_for("bare: net-respond ready", SOON);
    let mut machine = Live { api };
    let socket = network.frame_socket("tap0");
    let mut next = 0;
    for generation in 0..5 {
        exchange(&socket, EVERYBODY, next..next + 150);
        next += 150;
        // Many at once, so that the rings are in use when the machine is saved.
        let mut many = [0; 600];
        frame::build(&mut many, [0xff; 6], [2; 6], frame::DATA, 1 << 40, 3);
        socket.send_many(&many, 200);
        let snapshot = Snapshot::named(folder.path(), &generation.to_string());
        machine.pause();
        machine.save("Full", &snapshot);
        // A TAP has one user.
        drop(machine);
        machine = Live::restored_in(process(), &snapshot, &json!({}));
    }
    exchange(&socket, EVERYBODY, next..next + 150);
    let mut stop = [0; frame::MIN];
    frame::build(&mut stop, [0xff; 6], [2; 6], frame::STOP, 0, 3);
    socket.send(&stop);
    let outcome = machine.api.vm.wait(SOON);
    let line = outcome.line("bare: net-respond frames");
    assert!(
        line.contains("dropped=0") && line.contains("broken=0 stopped=1"),
        "{line}"
    );
}

#[test]
fn a_socket_that_listens_does_so_in_the_restored_machine() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let vsock = json!({"guest_cid": 7, "uds_path": path("first")});
    let api = ApiVm::new();
    let args = "bare.do=vsock-listen bare.conns=1000 bare.timeout_ms=600000";
    api.start_bare(args, &[small(false), ("/vsock", vsock)]);
    api.vm.wait_for("bare: vsock-listen ready cid=7", SOON);
    let mut machine = Live { api };
    let mut socket = path("first");
    for name in ["second", "third", "fourth"] {
        // The guest's driver knows nothing of a transport that is reset: it keeps this for open, and
        // must not take the streams to come for it.
        let mut open = connect(&socket, 52);
        echo(&mut open, 100_000);
        let snapshot = Snapshot::named(folder.path(), name);
        machine.pause();
        machine.save("Full", &snapshot);
        socket = path(name);
        let other = json!({"vsock_override": {"uds_path": socket}});
        machine = Live::restored(&snapshot, &other);
        drop(open);
        let streams = [(); 3].map(|()| connect(&socket, 52));
        for (number, mut stream) in (1..).zip(streams) {
            echo(&mut stream, 50_000 * number);
        }
    }
}

#[test]
fn what_was_typed_and_not_read_is_read_after_the_restore() {
    let folder = tempfile::tempdir().unwrap();
    let snapshot = Snapshot::named(folder.path(), "s");
    // A guest that looks at its serial port so seldom that the machine is saved before it does.
    let args = format!("bare.tsc_khz={} bare.poll_us=4000000", host::tsc_khz());
    let mut machine = Live::start(&args, &[small(false)]);
    machine.api.vm.send(b"?h");
    thread::sleep(Duration::from_millis(300));
    machine.pause();
    machine.save("Full", &snapshot);
    let said = machine.api.vm.stdout();
    assert!(!said.contains("alive"), "it was read too early: {said}");
    drop(machine);
    let machine = Live::restored(&snapshot, &json!({}));
    machine.api.vm.wait_for("bare: alive tick=", SOON);
    machine.api.vm.wait_for(" ok\n", SOON);
}
