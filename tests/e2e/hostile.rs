// SPDX-License-Identifier: Apache-2.0
//! A hostile driver: after whatever it does, a reset makes the device work again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use brume_tests::host::FrameSocket;
use brume_tests::netns::NetNs;
use brume_tests::vm::{Outcome, SOON, outcome, run_bare};

use crate::block::disk;

#[test]
fn a_disk_survives_a_hostile_driver() {
    for engine in ["sync", "async"] {
        let (_folder, path) = disk();
        let mut command = run_bare("bare.do=hostile-blk");
        command
            .arg("--disk")
            .arg(format!("{},engine={engine}", path.display()));
        check(&outcome(command, SOON), "hostile-blk");
    }
}

#[test]
fn a_network_interface_survives_a_hostile_driver() {
    let network = NetNs::new();
    network.sh("ip tuntap add tap0 mode tap vnet_hdr; ip link set tap0 up");
    let mut command = run_bare("bare.do=hostile-net");
    command.args(["--net", "tap=tap0"]);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        // Bad receive buffers do nothing to a device that receives nothing.
        let sender = scope.spawn(|| send_until(&network.frame_socket("tap0"), &done));
        let outcome = outcome(network.wrap(&command), SOON);
        done.store(true, Ordering::Relaxed);
        assert!(sender.join().unwrap() > 1000, "too few frames were sent");
        check(&outcome, "hostile-net");
    });
}

/// Sends frames of several lengths to the guest, about two every millisecond; how many.
fn send_until(socket: &FrameSocket, done: &AtomicBool) -> usize {
    let mut frame = vec![0xff; 1514];
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    let mut sent = 0;
    while !done.load(Ordering::Relaxed) {
        sent += usize::from(socket.send(&frame)) + usize::from(socket.send(&frame[..60]));
        thread::sleep(Duration::from_millis(1));
    }
    sent
}

fn check(outcome: &Outcome, step: &str) {
    assert_eq!(outcome.status, 0, "{outcome:#?}");
    let sums: Vec<_> = outcome
        .stdout
        .lines()
        .filter(|line| line.starts_with(&format!("bare: {step}")) && line.contains(" cases="))
        .collect();
    assert!(
        !sums.is_empty(),
        "the guest did not come to an end: {outcome:#?}"
    );
    assert!(
        sums.iter().all(|sum| sum.contains("dead=0 wrong=0")),
        "{sums:#?}: {outcome:#?}"
    );
    let cases = outcome
        .stdout
        .lines()
        .filter(|line| line.contains(" case="))
        .count();
    assert!(cases > 50, "only {cases} cases: {outcome:#?}");
    // A hundred mistakes are no reason for a hundred lines.
    assert!(outcome.stderr.lines().count() < 10, "{}", outcome.stderr);
}
