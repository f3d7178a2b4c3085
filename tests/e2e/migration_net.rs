// SPDX-License-Identifier: Apache-2.0
//! A guest that sends back every frame moves between two hosts: hardly one is lost, and the network
//! knows at once where it is.

use std::thread;
use std::time::Duration;

use brume_tests::lan::{Lan, TAP};
use brume_tests::ping::{Announcements, Listener, Losses, Probe, Train};
use brume_tests::placed::Placed;
use brume_tests::vm::SOON;
use serde_json::json;

use crate::migration::in_turn;

const MAC: [u8; 6] = [0x06, 0, 0, 0, 0, 0x0b];
const MAC_TEXT: &str = "06:00:00:00:00:0b";
/// The MAC address of who sends, on the switch.
const SENDER: [u8; 6] = [0x02, 0, 0, 0, 0, 0x01];
const INTERVAL: Duration = Duration::from_millis(10);
/// Frames come for so long before a move and after it.
const AROUND: Duration = Duration::from_millis(300);
const MOVES: usize = 10;
/// How often the network is told where the guest is, within 1.25 s. The bare guest has no ARP.
const ANNOUNCED: Announcements = Announcements { rarp: 5, arp: 0 };

#[test]
fn frames_are_lost_while_the_guest_stands_still_only() {
    let lan = Lan::new();
    lan.switch.sh("ip link set lan0 address 02:00:00:00:00:01");
    let mut machine = Placed::start(&lan, 0);
    let interface = json!({
        "iface_id": "eth0", "host_dev_name": TAP, "guest_mac": MAC_TEXT,
    });
    let parts = [("/network-interfaces/eth0", interface)];
    let api = &machine.api;
    api.start_bare("bare.do=net-respond bare.ms=600000", &parts);
    api.vm.wait_for("bare: net-respond ready", SOON);
    let mut losses = Losses::default();
    for number in 1..=MOVES {
        let target = machine.other(&lan, &json!({}));
        let listener = Listener::start(&lan.switch, "lan0", MAC);
        let probe = Probe::Frame([MAC, SENDER]);
        let train = Train::start(&lan.switch, "lan0", probe, INTERVAL);
        thread::sleep(AROUND);
        let status = machine.move_to(&target, &in_turn(number));
        thread::sleep(AROUND);
        let frames = train.end();
        let told = status.downtime.expect("a downtime").total_us;
        let downtime = Duration::from_micros(told);
        let lost = losses.note(&frames, INTERVAL, downtime);
        let sent = frames.len();
        println!("{number}: {downtime:?}, {lost} of {sent} frames lost");
        let heard = listener.end(ANNOUNCED);
        assert!(heard.has(ANNOUNCED), "{heard:?}");
        assert_eq!(lan.port_of(MAC_TEXT), format!("port{}", target.host));
        machine.api.vm.wait(SOON).assert_clean();
        machine = target;
    }
    losses.assert_few();
}
