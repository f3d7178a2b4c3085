// SPDX-License-Identifier: Apache-2.0
//! Devices that are busy while their machine moves, and what they are given at the target.

use std::fs;
use std::io::Read;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use brume_api::MigrationPhase;
use brume_tests::frame;
use brume_tests::lan::Lan;
use brume_tests::live::Live;
use brume_tests::migration::{Link, Pair, Setup, Side};
use brume_tests::vm::SOON;
use serde_json::json;

use crate::block::disk;
use crate::migration::{LIMIT, WRITES, assert_settled, in_turn};
use crate::snapshot_devices::exchange;
use crate::vsock::{connect, echo};

#[test]
fn metadata_moves_along() {
    let interface = json!({"iface_id": "e", "host_dev_name": "tap0"});
    let data = json!({"latest": {"meta-data": {"name": "it"}}});
    let mut pair = Pair::start(&Setup {
        args: WRITES,
        link: Link::TwoHosts,
        parts: &[
            ("/network-interfaces/e", interface),
            (
                "/mmds/config",
                json!({"network_interfaces": ["e"], "version": "V2"}),
            ),
            ("/mmds", data.clone()),
        ],
        ..Setup::default()
    });
    pair.moved(&json!({}), LIMIT);
    assert_eq!(pair.api(Side::Target).get("/mmds"), data);
    assert_settled(&mut pair);
    let target = pair.api(Side::Target);
    target.done("PATCH", "/mmds", &json!({"more": 1}));
    assert_eq!(target.get("/mmds")["latest"], data["latest"]);
}

#[test]
fn the_target_gives_other_files_sockets_and_taps() {
    let (folder, path) = disk();
    let copy = folder.path().join("copy.img");
    fs::copy(&path, &copy).unwrap();
    let [first, second] = ["first", "second"].map(|name| folder.path().join(name));
    let drive = json!({"drive_id": "d", "is_root_device": false, "path_on_host": path});
    let receive = json!({
        "drive_overrides": [{"drive_id": "d", "path_on_host": copy}],
        "network_overrides": [{"iface_id": "e", "host_dev_name": "tap5"}],
        "vsock_override": {"uds_path": second},
    });
    let mut pair = Pair::start(&Setup {
        args: WRITES,
        link: Link::TwoHosts,
        parts: &[
            ("/drives/d", drive),
            (
                "/network-interfaces/e",
                json!({"iface_id": "e", "host_dev_name": "tap0"}),
            ),
            ("/vsock", json!({"guest_cid": 7, "uds_path": first})),
        ],
        receive,
        ..Setup::default()
    });
    let lan = pair.lan.as_ref().unwrap();
    lan.hosts[1].sh("ip tuntap add tap5 mode tap vnet_hdr; ip link set tap5 up");
    pair.moved(&json!({}), LIMIT);
    let config = pair.api(Side::Target).get("/vm/config");
    assert_eq!(config["drives"][0]["path_on_host"], json!(copy));
    assert_eq!(config["network-interfaces"][0]["host_dev_name"], "tap5");
    assert_eq!(config["vsock"]["uds_path"], json!(second));
    assert!(second.exists());
    assert_settled(&mut pair);
}

/// A number of what the guest says of its disk, with which nothing may be wrong.
#[track_caller]
fn disk_work(machine: &mut Live, command: u8) -> u64 {
    let line = machine.ask(command, "live-blk");
    assert!(line.contains("errors=0 bad=0"), "{line}");
    let ops = line.split(' ').find_map(|word| word.strip_prefix("ops="));
    ops.unwrap().parse().unwrap()
}

#[track_caller]
fn disk_goes_on(machine: &mut Live) {
    let done = disk_work(machine, b'?');
    let begun = Instant::now();
    while disk_work(machine, b'?') < done + 200 {
        assert!(begun.elapsed() < SOON, "the disk has stopped");
    }
}

/// A machine whose disk never rests moves to and fro.
fn move_with_disk(engine: &str, lock: Option<bool>, link: Link) {
    let (_folder, path) = disk();
    let drive = json!({
        "drive_id": "d", "is_root_device": false, "path_on_host": path, "io_engine": engine,
        "lock": lock,
    });
    let setup = Setup {
        link,
        ..Setup::default()
    };
    let mut pair = Pair::start_with(&setup, |api| {
        let args = "bare.do=live-blk bare.qd=32 bare.bytes=65536 bare.area=4";
        api.start_bare(args, &[("/drives/d", drive)]);
        api.vm.wait_for("bare: live-blk ready\n", SOON);
        Live { api }
    });
    for number in 0..6 {
        disk_goes_on(pair.live(Side::Source));
        pair.live(Side::Source).ask(b'w', "wrote");
        pair.send(&in_turn(number));
        pair.arrived(LIMIT);
        assert_eq!(pair.runs_on(), Side::Target);
        let target = pair.live(Side::Target);
        disk_goes_on(target);
        target.hash();
        pair.again(&setup);
    }
    // Not one request is lost, or this would wait for ever.
    let line = pair.live(Side::Source).ask(b's', "live-blk");
    assert!(line.contains("inflight=0"), "{line}");
}

#[test]
fn block_requests_are_all_answered_rightly() {
    for (engine, link) in [("Sync", Link::Unix), ("Async", Link::Tcp)] {
        move_with_disk(engine, None, link);
    }
}

#[test]
fn locks_of_disks_are_handed_over() {
    move_with_disk("Async", Some(true), Link::Unix);
}

#[test]
fn a_disk_that_another_machine_has_locked_stays_with_its_machine() {
    let (folder, path) = disk();
    let other = folder.path().join("other.img");
    fs::copy(&path, &other).unwrap();
    let drive = |path| json!({"drive_id": "d", "is_root_device": false, "path_on_host": path, "lock": true});
    let holder = Live::start("", &[("/drives/d", drive(&other))]);
    let mut pair = Pair::start(&Setup {
        args: WRITES,
        parts: &[("/drives/d", drive(&path))],
        receive: json!({"drive_overrides": [{"drive_id": "d", "path_on_host": other}]}),
        ..Setup::default()
    });
    pair.send(&json!({}));
    let status = pair.wait(Side::Source, &[MigrationPhase::Failed], LIMIT);
    let error = status.error.unwrap();
    assert!(error.contains("lock"), "{error}");
    pair.assert_runs_on(Side::Source);
    drop(holder);
    pair.wait(Side::Target, &[MigrationPhase::Listening], LIMIT);
    pair.moved(&json!({}), LIMIT);
    assert_settled(&mut pair);
}

/// The guest's address. Whoever talks to it finds it where it has been heard last.
const GUEST: [u8; 6] = [6, 0, 0, 0, 0, 1];

/// A place on the network for who talks to the guest.
const PROBE: &str = "ip link add probe0 type veth peer name probe1
    ip link set probe1 master lan0 up; ip link set probe0 up";

#[test]
fn frames_go_on_coming_back_from_the_other_host() {
    let mac = "06:00:00:00:00:01";
    let interface = json!({"iface_id": "e", "host_dev_name": "tap0", "guest_mac": mac});
    let setup = Setup {
        link: Link::TwoHosts,
        ..Setup::default()
    };
    let mut pair = Pair::start_with(&setup, |api| {
        let args = "bare.do=net-respond bare.ms=600000 bare.end=poweroff";
        api.start_bare(args, &[("/network-interfaces/e", interface)]);
        api.vm.wait_for("bare: net-respond ready", SOON);
        Live { api }
    });
    let lan: &Lan = pair.lan.as_ref().unwrap();
    lan.switch.sh(PROBE);
    let socket = lan.switch.frame_socket("probe0");
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let talk = || {
            let mut next = 0;
            while !stop.load(Ordering::Relaxed) {
                exchange(&socket, GUEST, next..next + 20);
                next += 20;
                // Many at once, so that the rings are in use when the machine moves.
                let mut many = [0; 600];
                frame::build(&mut many, GUEST, [2; 6], frame::DATA, 1 << 40, 3);
                socket.send_many(&many, 100);
            }
            exchange(&socket, GUEST, next..next + 50);
            next
        };
        let talk = scope.spawn(talk);
        for number in 0..6 {
            thread::sleep(Duration::from_millis(200));
            pair.send(&in_turn(number));
            pair.arrived(LIMIT);
            assert_eq!(pair.runs_on(), Side::Target);
            pair.again(&setup);
        }
        stop.store(true, Ordering::Relaxed);
        assert!(talk.join().unwrap() > 100);
    });
}

#[test]
fn a_socket_that_listens_does_so_at_the_target_and_streams_are_reset() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let vsock = json!({"guest_cid": 7, "uds_path": path("0")});
    let named = |name: &str| Setup {
        receive: json!({"vsock_override": {"uds_path": path(name)}}),
        ..Setup::default()
    };
    let mut pair = Pair::start_with(&named("1"), |api| {
        let args = "bare.do=vsock-listen bare.conns=1000 bare.timeout_ms=600000";
        api.start_bare(args, &[("/vsock", vsock)]);
        api.vm.wait_for("bare: vsock-listen ready cid=7", SOON);
        Live { api }
    });
    for number in 1..4 {
        let before = path(&(number - 1).to_string());
        let mut open = connect(&before, 52);
        echo(&mut open, 100_000);
        pair.send(&in_turn(number));
        pair.arrived(LIMIT);
        let mut rest = Vec::new();
        // Its end is seen, in order or not.
        let _ = open.read_to_end(&mut rest);
        assert!(rest.is_empty());
        for mut stream in [(); 3].map(|()| connect(&path(&number.to_string()), 52)) {
            echo(&mut stream, 50_000);
        }
        assert_eq!(pair.end_of(Side::Source), 0);
        pair.again(&named(&(number + 1).to_string()));
    }
}
