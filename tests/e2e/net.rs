// SPDX-License-Identifier: Apache-2.0
//! Network interfaces: what the guest sends, the host receives, and the other way round.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use brume_tests::frame;
use brume_tests::netns::NetNs;
use brume_tests::vm::{Outcome, SOON, outcome, run_bare};

const MAKE_TAP: &str = "ip tuntap add tap0 mode tap vnet_hdr; ip link set tap0 up";

/// Runs the guest on `tap0` with the host sending every test frame back; also counts the frames.
fn with_echo(network: &NetNs, args: &str, spec: &str) -> (Outcome, usize) {
    let mut command = run_bare(args);
    command.args(["--net", spec]);
    // Before the guest is there: it sends a frame once.
    let socket = network.frame_socket("tap0");
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let echo = scope.spawn(|| {
            let mut bytes = vec![0; 1 << 16];
            let mut count = 0;
            while !done.load(Ordering::Relaxed) {
                let Some(len) = socket.receive(&mut bytes) else {
                    continue;
                };
                count += 1;
                frame::turn_round(&mut bytes[..len]);
                // A full TAP loses a frame, as a full wire would; the guest says what is missing.
                socket.send(&bytes[..len]);
            }
            count
        });
        let outcome = outcome(network.wrap(&command), SOON);
        done.store(true, Ordering::Relaxed);
        (outcome, echo.join().unwrap())
    })
}

#[test]
fn frames_of_all_sizes_come_back_as_they_went() {
    // With and without mergeable buffers, events and indirect descriptors, as drivers differ.
    for features in ["", "bare.mrg=0", "bare.event_idx=0 bare.indirect=0"] {
        let network = NetNs::new();
        network.sh(MAKE_TAP);
        let args = format!("bare.do=net-echo bare.frames=2000 bare.qd=16 {features}");
        let (outcome, frames) = with_echo(&network, &args, "tap=tap0");
        let line = outcome.assert_clean().line("bare: net-echo sent");
        assert!(
            line.contains("sent=2000 good=2000 bad=0 lost=0 twice=0"),
            "{features}: {line}"
        );
        assert!(
            line.contains("broken=0") && frames >= 2000,
            "{features}: {line}"
        );
    }
}

#[test]
fn the_guest_is_told_the_mac_and_mtu_that_were_given() {
    let network = NetNs::new();
    network.sh(MAKE_TAP);
    let spec = "tap=tap0,mac=06:00:ac:10:00:02,mtu=1400";
    let (outcome, _) = with_echo(&network, "bare.do=net-echo bare.frames=1", spec);
    let line = outcome.assert_clean().line("bare: net-echo ready mac");
    assert!(
        line.contains("mac=06:00:ac:10:00:02") && line.contains("mtu=1400"),
        "{line}"
    );
}
