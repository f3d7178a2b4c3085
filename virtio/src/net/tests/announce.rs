// SPDX-License-Identifier: Apache-2.0
//! What a device does when its machine goes on in another place, and the queue for commands.

use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::device::config;
use super::{HEADER, eventually};
use crate::limiter::{BucketLimits, BucketUpdate, LimiterUpdate};
use crate::memory::GuestMemory;
use crate::net::features::{ANNOUNCING, CTRL_VQ, GUEST_ANNOUNCE, MRG_RXBUF};
use crate::net::{Net, NetConfig, NetControl, Tap};
use crate::testing::machine::{FREE, Machine, transport};
use crate::testing::{MEMORY_END, Piece, memory, readable, writable};
use crate::transport::TransportState;

const MAC: [u8; 6] = [6, 0, 0xac, 0x10, 0, 2];
const TX: u64 = FREE + 0x10_0000;
const COMMANDS: u64 = FREE + 0x20_0000;

/// A device whose MAC address is `mac`, and its wire.
fn net(mac: Option<[u8; 6]>) -> (Net, UnixStream) {
    let (tap, wire) = Tap::mock();
    (Net::new(NetConfig { mac, ..config() }, tap).unwrap(), wire)
}

fn machine(mac: Option<[u8; 6]>, accepted: u64) -> (Machine, NetControl, UnixStream) {
    let (net, wire) = net(mac);
    let control = net.control();
    (Machine::new(Box::new(net), accepted), control, wire)
}

/// An ARP packet with its headers.
fn arp(mac: [u8; 6], operation: u8, sender: [u8; 6], address: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![0; HEADER];
    frame.extend([0xff; 6]);
    frame.extend(mac);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, operation]);
    frame.extend(sender);
    frame.extend(address);
    frame.extend([0; 6]);
    frame.extend([10, 0, 0, 1]);
    frame
}

fn send(machine: &mut Machine, wire: &mut UnixStream, frame: &[u8]) {
    machine.put(TX, frame);
    machine.drivers[1].add(&[readable(TX, frame.len() as u32)]);
    machine.drivers[1].kick();
    assert_eq!(read_sent(wire), frame);
}

/// The next frame of the guest's own.
fn read_sent(wire: &mut UnixStream) -> Vec<u8> {
    loop {
        let frame = read(wire);
        // Announcements go on meanwhile.
        if frame[HEADER + 12..HEADER + 14] != [0x80, 0x35] {
            return frame;
        }
    }
}

fn read(wire: &mut UnixStream) -> Vec<u8> {
    let mut data = vec![0; 2048];
    let len = wire.read(&mut data).unwrap();
    data.truncate(len);
    data
}

/// The addresses of one round, whose first frame has to name `mac`.
fn round(wire: &mut UnixStream, mac: [u8; 6], count: usize) -> Vec<[u8; 4]> {
    let reverse = read(wire);
    assert_eq!(reverse.len(), HEADER + 60);
    let mut expected = vec![0; HEADER];
    expected.extend([0xff; 6]);
    expected.extend(mac);
    expected.extend([0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    expected.extend(mac);
    expected.extend([0; 4]);
    expected.extend(mac);
    expected.extend([0; 4 + 18]);
    assert_eq!(reverse, expected);
    let address = |_| {
        let request = read(wire);
        let address: [u8; 4] = request[HEADER + 28..HEADER + 32].try_into().unwrap();
        let mut expected = arp(mac, 1, mac, address);
        expected[HEADER + 38..].copy_from_slice(&address);
        expected.resize(HEADER + 60, 0);
        assert_eq!(request, expected);
        address
    };
    (0..count).map(address).collect()
}

fn is_silent(wire: &mut UnixStream) -> bool {
    wire.set_nonblocking(true).unwrap();
    let silent = wire.read(&mut [0; 1]).is_err();
    wire.set_nonblocking(false).unwrap();
    silent
}

#[test]
fn the_latest_four_addresses_are_announced_five_times_at_growing_distances() {
    let (mut machine, control, mut wire) = machine(Some(MAC), 0);
    for last in [1, 2, 3, 1, 4, 5, 5] {
        let operation = 1 + last % 2;
        send(
            &mut machine,
            &mut wire,
            &arp(MAC, operation, MAC, [10, 0, 0, last]),
        );
    }
    let start = Instant::now();
    control.announce();
    for earliest in [0, 50, 200, 450, 800] {
        let addresses = round(&mut wire, MAC, 4);
        let elapsed = start.elapsed();
        assert!(elapsed >= Duration::from_millis(earliest), "{elapsed:?}");
        let last: Vec<_> = addresses.iter().map(|address| address[3]).collect();
        assert_eq!(last, [3, 1, 4, 5]);
    }
    std::thread::sleep(Duration::from_millis(600));
    assert!(is_silent(&mut wire), "five are enough");
}

#[test]
fn what_is_not_said_in_the_guests_own_name_is_not_learnt() {
    const OTHER: [u8; 6] = [6, 0, 0, 0, 0, 9];
    let (mut machine, control, mut wire) = machine(Some(MAC), 0);
    let good = arp(MAC, 1, MAC, [10, 0, 0, 7]);
    let mut wrong_hardware = good.clone();
    wrong_hardware[HEADER + 15] = 6;
    let mut wrong_type = good.clone();
    wrong_type[HEADER + 13] = 0;
    let mut long = good.clone();
    long.resize(HEADER + 65, 0);
    for frame in [
        arp(OTHER, 1, OTHER, [10, 0, 0, 8]),
        arp(MAC, 1, OTHER, [10, 0, 0, 8]),
        arp(OTHER, 1, MAC, [10, 0, 0, 8]),
        arp(MAC, 1, MAC, [0; 4]),
        arp(MAC, 1, MAC, [255; 4]),
        arp(MAC, 1, MAC, [224, 0, 0, 1]),
        wrong_hardware,
        wrong_type,
        long,
        good[..good.len() - 1].to_vec(),
        good[..HEADER + 14].to_vec(),
        good,
    ] {
        send(&mut machine, &mut wire, &frame);
    }
    control.announce();
    // The next round begins where the first ends.
    for _ in 0..2 {
        assert_eq!(round(&mut wire, MAC, 1), [[10, 0, 0, 7]]);
    }
}

#[test]
fn a_mac_address_that_the_driver_chose_is_learnt_and_an_unknown_one_is_not_announced() {
    const CHOSEN: [u8; 6] = [2, 1, 2, 3, 4, 5];
    let (mut machine, control, mut wire) = machine(None, 0);
    control.announce();
    std::thread::sleep(Duration::from_millis(20));
    assert!(is_silent(&mut wire));
    send(
        &mut machine,
        &mut wire,
        &arp([3, 1, 1, 1, 1, 1], 1, [3, 1, 1, 1, 1, 1], [10, 0, 0, 1]),
    );
    send(
        &mut machine,
        &mut wire,
        &arp(CHOSEN, 1, CHOSEN, [10, 0, 0, 2]),
    );
    control.announce();
    assert_eq!(round(&mut wire, CHOSEN, 1), [[10, 0, 0, 2]]);
}

#[test]
fn neither_the_limiter_nor_the_guests_queues_hold_an_announcement_up() {
    let nothing = LimiterUpdate {
        ops: BucketUpdate::Set(BucketLimits {
            size: 1,
            refill_time: Duration::from_secs(3600),
            one_time_burst: 0,
        }),
        ..LimiterUpdate::default()
    };
    let (mut machine, control, mut wire) = machine(Some(MAC), 0);
    control.limit(nothing, nothing);
    send(&mut machine, &mut wire, &arp(MAC, 1, MAC, [10, 0, 0, 7]));
    machine.drivers[1].add(&[readable(TX, 60)]);
    machine.drivers[1].kick();
    control.announce();
    for _ in 0..2 {
        assert_eq!(round(&mut wire, MAC, 1), [[10, 0, 0, 7]]);
    }
    machine.stays_used(1, 1);
}

/// Gives the device a command in `pieces`; how much of an answer there is, and its first byte.
fn command(machine: &mut Machine, bytes: &[u8], pieces: &[Piece]) -> (u32, u8) {
    machine.put(COMMANDS, bytes);
    machine.put(COMMANDS + 0x1000, &[0xee]);
    let queue = machine.drivers.len() - 1;
    machine.drivers[queue].add(pieces);
    machine.drivers[queue].kick();
    let driver = &mut machine.drivers[queue];
    let mut used = None;
    eventually("a command is answered", || {
        used = driver.take_used();
        used.is_some()
    });
    (used.unwrap().len, machine.get(COMMANDS + 0x1000, 1)[0])
}

fn status(machine: &mut Machine) -> u32 {
    machine.read(0x104) >> 16
}

#[test]
fn a_driver_that_can_is_asked_once_and_its_answer_ends_it() {
    let (mut machine, control, mut wire) = machine(Some(MAC), ANNOUNCING);
    let ack = [readable(COMMANDS, 2), writable(COMMANDS + 0x1000, 1)];
    assert_eq!(status(&mut machine), 1);
    machine.write(0x64, 3);
    control.announce();
    eventually("the driver is told", || machine.read(0x60) & 2 != 0);
    assert_eq!(status(&mut machine), 3);
    machine.write(0x64, 2);
    round(&mut wire, MAC, 0);
    assert_eq!(command(&mut machine, &[3, 0], &ack), (1, 0));
    assert_eq!(status(&mut machine), 1);
    // All rounds, and no second question.
    for _ in 0..4 {
        round(&mut wire, MAC, 0);
    }
    assert_eq!((machine.read(0x60) & 2, status(&mut machine)), (0, 1));
}

#[test]
fn a_driver_that_cannot_is_left_in_peace() {
    for accepted in [0, MRG_RXBUF, CTRL_VQ] {
        let (mut machine, control, mut wire) = machine(Some(MAC), accepted);
        machine.write(0x64, 3);
        control.announce();
        round(&mut wire, MAC, 0);
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!((machine.read(0x60) & 2, status(&mut machine)), (0, 1));
    }
}

#[test]
fn other_commands_are_refused_and_broken_ones_harm_nobody() {
    let (mut machine, control, mut wire) = machine(Some(MAC), ANNOUNCING);
    control.announce();
    round(&mut wire, MAC, 0);
    assert_eq!(status(&mut machine), 3);
    let answer = writable(COMMANDS + 0x1000, 1);
    let outside = MEMORY_END;
    for (bytes, pieces, expected) in [
        (&[0, 0, 1][..], vec![readable(COMMANDS, 3), answer], (1, 1)),
        (&[3, 1], vec![readable(COMMANDS, 2), answer], (1, 1)),
        (&[4, 0, 1, 0], vec![readable(COMMANDS, 4), answer], (1, 1)),
        (&[255, 255], vec![readable(COMMANDS, 2), answer], (1, 1)),
        // Half a command, none, one that is not there.
        (&[3], vec![readable(COMMANDS, 1), answer], (1, 1)),
        (&[], vec![answer], (1, 1)),
        (&[], vec![readable(outside, 2), answer], (1, 1)),
        (&[], vec![readable(u64::MAX, 2), answer], (1, 1)),
        // No place for an answer, or one that is not there.
        (&[5, 0], vec![readable(COMMANDS, 2)], (0, 0xee)),
        (
            &[5, 0],
            vec![readable(COMMANDS, 2), writable(outside, 1)],
            (0, 0xee),
        ),
        (
            &[5, 0],
            vec![readable(COMMANDS, 2), writable(COMMANDS, 0)],
            (0, 0xee),
        ),
    ] {
        assert_eq!(
            command(&mut machine, bytes, &pieces),
            expected,
            "{pieces:?}"
        );
        assert_eq!(status(&mut machine), 3, "{pieces:?}");
    }
    // In pieces, with more room than an answer takes, and more said than is needed.
    let pieces = [
        readable(COMMANDS, 1),
        readable(COMMANDS + 1, 7),
        writable(COMMANDS + 0x1000, 100),
    ];
    assert_eq!(command(&mut machine, &[3, 0, 9, 9], &pieces), (1, 0));
    assert_eq!(status(&mut machine), 1);
    send(&mut machine, &mut wire, &arp(MAC, 1, MAC, [10, 0, 0, 7]));
}

#[test]
fn a_control_queue_that_loops_asks_for_a_reset() {
    let (mut machine, ..) = machine(Some(MAC), ANNOUNCING);
    let looped = (COMMANDS, 2, crate::testing::NEXT, 0);
    machine.drivers[2].set_descriptor(0, looped);
    machine.drivers[2].offer(0);
    machine.drivers[2].kick();
    eventually("a reset is asked for", || machine.read(0x70) & 64 != 0);
}

#[test]
fn what_is_known_of_the_guest_goes_with_it() {
    let (mut machine, control, mut wire) = machine(None, ANNOUNCING);
    send(&mut machine, &mut wire, &arp(MAC, 2, MAC, [10, 0, 0, 7]));
    control.announce();
    eventually("the driver is told", || machine.read(0x60) & 2 != 0);
    assert_eq!(status(&mut machine), 3);

    let (device, mut wire) = net(None);
    let control = device.control();
    // Before the device runs.
    control.announce();
    let mut machine = machine.reborn(|| Box::new(device));
    assert_eq!(status(&mut machine), 3, "the driver has not answered yet");
    assert_eq!(round(&mut wire, MAC, 1), [[10, 0, 0, 7]]);
    let ack = [readable(COMMANDS, 2), writable(COMMANDS + 0x1000, 1)];
    assert_eq!(command(&mut machine, &[3, 0], &ack), (1, 0));
    assert_eq!(status(&mut machine), 1);
    // Another driver has another machine, for all that is known.
    machine.write(0x70, 0);
    assert!(
        machine
            .transport
            .core()
            .device()
            .save()
            .get("presence")
            .is_none()
    );
}

#[test]
fn more_addresses_than_are_kept_are_no_state() {
    let (mut machine, ..) = machine(Some(MAC), 0);
    let (state, _) = machine.save();
    for (count, taken) in [(4, true), (5, false)] {
        let mut state = state.clone();
        let addresses: Vec<_> = (0..count)
            .map(|last| Ipv4Addr::new(10, 0, 0, last))
            .collect();
        state.device["presence"] =
            serde_json::json!({"mac": null, "addresses": addresses, "asked": false});
        let (mut transport, _) = transport(Box::new(net(Some(MAC)).0), &machine.memory);
        assert_eq!(transport.restore(state).is_ok(), taken, "{count}");
    }
}

/// `state` as it was before the device had a queue for commands.
fn older(mut state: TransportState) -> TransportState {
    state.device_features &= !ANNOUNCING;
    state.queues.truncate(2);
    state.running.truncate(2);
    state
}

fn restored(
    state: TransportState,
    memory: &GuestMemory,
    device: Net,
) -> Result<crate::transport::MmioTransport, crate::transport::RestoreError> {
    let (mut transport, interrupts) = transport(Box::new(device), memory);
    let running = transport.restore(state)?;
    transport.core().resume(running);
    assert!(interrupts.load(Ordering::SeqCst) > 0);
    Ok(transport)
}

#[test]
fn a_device_of_an_older_state_goes_on_with_two_queues() {
    let (mut old, ..) = machine(Some(MAC), MRG_RXBUF);
    let (state, _) = old.save();
    let state = older(state);
    let (device, mut wire) = net(Some(MAC));
    let control = device.control();
    let mut new = restored(state.clone(), &old.memory, device).unwrap();
    assert_eq!(new.core().device().queue_sizes().len(), 2);
    assert_eq!(new.core().device_features(0) & ANNOUNCING as u32, 0);
    assert!(new.core().queue(2).is_none());
    new.core().notify(2);
    control.announce();
    round(&mut wire, MAC, 0);
    // It works, and what is saved of it is such a state again.
    old.put(TX, &arp(MAC, 1, MAC, [10, 0, 0, 7]));
    old.drivers[1].add(&[readable(TX, 54)]);
    new.core().notify(1);
    assert_eq!(read_sent(&mut wire).len(), 54);
    let running = new.core().pause();
    let again = new.save(&running);
    assert_eq!((again.queues.len(), again.running.len()), (2, 2));
    assert_eq!(again.device_features, state.device_features);
    restored(again, &old.memory, net(Some(MAC)).0).unwrap();
}

#[test]
fn a_state_with_a_feature_that_it_says_was_not_offered_is_refused() {
    let (mut old, ..) = machine(Some(MAC), ANNOUNCING);
    let (state, _) = old.save();
    let mut few_queues = state.clone();
    few_queues.queues.truncate(2);
    few_queues.running.truncate(2);
    let mut no_feature = state.clone();
    no_feature.device_features &= !GUEST_ANNOUNCE;
    let mut many_queues = older(state.clone());
    many_queues.driver_features &= !ANNOUNCING;
    many_queues.queues = state.queues.clone();
    for wrong in [few_queues, no_feature, many_queues] {
        assert!(restored(wrong, &memory(), net(Some(MAC)).0).is_err());
    }
    restored(state, &memory(), net(Some(MAC)).0).unwrap();
}

#[test]
fn a_guest_that_stops_answering_and_keeps_talking_grows_nothing() {
    let (mut machine, _control, mut wire) = machine(None, 0);
    for number in 0..200_u16 {
        let [high, low] = number.to_be_bytes();
        let mac = [2, 0, 0, 0, high, low];
        send(
            &mut machine,
            &mut wire,
            &arp(mac, 1, mac, [10, 0, high, low]),
        );
    }
    let (state, _) = machine.save();
    let addresses = state.device["presence"]["addresses"]
        .as_array()
        .unwrap()
        .len();
    assert_eq!(addresses, 4);
    wire.flush().unwrap();
}
