// SPDX-License-Identifier: Apache-2.0
//! The metadata service at a device with its worker: where frames go, and what wakes it.

use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::time::Duration;

use brume_mmds::{SharedMmds, Stack, StackConfig};

use super::device::{RX_BUFFERS, Rig, config};
use super::{HEADER, eventually, frame, read};
use crate::net::features::MRG_RXBUF;
use crate::net::{Net, Tap};

pub(super) const SERVICE: [u8; 4] = [169, 254, 169, 254];
const SERVICE_MAC: [u8; 6] = [6, 1, 0x23, 0x45, 0x67, 1];
const GUEST: [u8; 4] = [172, 16, 0, 2];
const GUEST_MAC: [u8; 6] = [6, 0, 0xac, 0x10, 0, 2];

fn rig(features: u64) -> Rig {
    let (tap, wire) = Tap::mock();
    let config_of_stack = StackConfig {
        address: Ipv4Addr::from(SERVICE),
        needs_token: false,
        imds_compat: false,
    };
    let stack = Stack::new(config_of_stack, SharedMmds::default()).unwrap();
    let net = Net::new(config(), tap).unwrap();
    Rig::of(net.with_metadata(stack).unwrap(), wire, 64, features)
}

/// A frame of `parts` behind a virtio header.
fn whole(parts: &[&[u8]]) -> Vec<u8> {
    let mut frame = vec![0; HEADER];
    frame.extend(parts.concat());
    frame
}

fn arp_for(address: [u8; 4]) -> Vec<u8> {
    let kind = [0, 1, 8, 0, 6, 4, 0, 1];
    whole(&[
        &[0xff; 6],
        &GUEST_MAC,
        &[8, 6],
        &kind,
        &GUEST_MAC,
        &GUEST,
        &[0; 6],
        &address,
    ])
}

/// A segment of TCP to the service, without checksum, as a driver leaves it to its card.
pub(super) fn segment(flags: u8, sequence: u32, acknowledged: u32, data: &[u8]) -> Vec<u8> {
    let ip_len = u16::try_from(40 + data.len()).unwrap().to_be_bytes();
    let ip = [0x45, 0, ip_len[0], ip_len[1], 0, 0, 0x40, 0, 64, 6, 0, 0];
    let ports = [0xc0, 0, 0, 80];
    let rest = [0x50, flags, 0x40, 0, 0, 0, 0, 0];
    whole(&[
        &SERVICE_MAC,
        &GUEST_MAC,
        &[8, 0],
        &ip,
        &GUEST,
        &SERVICE,
        &ports,
        &sequence.to_be_bytes(),
        &acknowledged.to_be_bytes(),
        &rest,
        data,
    ])
}

pub(super) const SYN: u8 = 2;
pub(super) const ACK: u8 = 0x10;
pub(super) const PUSH_ACK: u8 = 0x18;

/// The next frame at the guest, in buffer `slot`.
fn next(rig: &mut Rig, slot: u64) -> Vec<u8> {
    let mut used = None;
    eventually("a frame arrives", || {
        used = rig.rx.take_used();
        used.is_some()
    });
    let len = used.unwrap().len.try_into().unwrap();
    read(&rig.rx.memory, RX_BUFFERS + 2048 * slot, len)
}

/// Sequence number of a segment.
pub(super) fn sequence(frame: &[u8]) -> u32 {
    u32::from_be_bytes(frame[HEADER + 38..HEADER + 42].try_into().unwrap())
}

pub(super) fn flags(frame: &[u8]) -> u8 {
    frame[HEADER + 47]
}

#[test]
fn the_guest_finds_the_service_and_the_tap_does_not_hear_of_it() {
    for features in [0, MRG_RXBUF] {
        let mut rig = rig(features);
        rig.start();
        rig.add_rx(0);
        rig.add_tx(0, &arp_for(SERVICE));
        rig.add_tx(1, &arp_for([169, 254, 169, 253]));
        rig.tx.kick();
        let answer = next(&mut rig, 0);
        // One buffer, and an answer to who asked.
        let header = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
        assert_eq!(answer[..HEADER], header);
        assert_eq!(answer[HEADER..][..6], GUEST_MAC);
        assert_eq!(
            answer[HEADER + 20..][..8],
            [0, 2, 6, 1, 0x23, 0x45, 0x67, 1]
        );
        assert_eq!(answer[HEADER + 28..][..4], SERVICE);
        // The first frame on the wire is the second one that was sent.
        let mut data = [0; 2048];
        let len = rig.wire.read(&mut data).unwrap();
        assert_eq!(data[..len], arp_for([169, 254, 169, 253]));
        eventually("both buffers are given back", || rig.tx.used_index() == 2);
        // And the other way the TAP is still heard.
        rig.add_rx(1);
        rig.rx.kick();
        assert_eq!(rig.wire.write(&frame(100, 5)).unwrap(), 100);
        assert_eq!(next(&mut rig, 1)[HEADER..], frame(100, 5)[HEADER..]);
    }
}

#[test]
fn a_connection_outlives_a_pause() {
    let mut rig = rig(MRG_RXBUF);
    rig.start();
    for slot in 0..8 {
        rig.add_rx(slot);
    }
    rig.add_tx(0, &segment(SYN, 999, 0, b""));
    rig.tx.kick();
    let answer = next(&mut rig, 0);
    assert_eq!(flags(&answer), SYN | ACK);
    let theirs = sequence(&answer).wrapping_add(1);
    rig.add_tx(1, &segment(ACK, 1000, theirs, b""));
    rig.tx.kick();
    eventually("the frame is taken", || rig.tx.used_index() == 2);
    rig.stop();
    rig.start();
    let request = b"GET /nothing HTTP/1.1\r\n\r\n";
    rig.add_tx(2, &segment(PUSH_ACK, 1000, theirs, request));
    rig.tx.kick();
    let answer = String::from_utf8_lossy(&next(&mut rig, 1)).into_owned();
    assert!(answer.contains("HTTP/1.1 404"), "{answer}");
    assert!(
        answer.ends_with("Resource not found: /nothing."),
        "{answer}"
    );
}

#[test]
fn time_alone_wakes_the_worker() {
    let mut rig = rig(MRG_RXBUF);
    rig.start();
    for slot in 0..8 {
        rig.add_rx(slot);
    }
    rig.add_tx(0, &segment(SYN, 999, 0, b""));
    rig.tx.kick();
    let first = next(&mut rig, 0);
    // Nothing is said by anybody, until the service says it again.
    let again = next(&mut rig, 1);
    assert_eq!(
        (flags(&again), sequence(&again)),
        (SYN | ACK, sequence(&first))
    );
}

#[test]
fn answers_wait_for_buffers() {
    for features in [0, MRG_RXBUF] {
        let mut rig = rig(features);
        rig.start();
        rig.add_tx(0, &arp_for(SERVICE));
        rig.tx.kick();
        std::thread::sleep(Duration::from_millis(5));
        rig.add_rx(0);
        rig.rx.kick();
        assert_eq!(next(&mut rig, 0)[HEADER + 28..][..4], SERVICE);
    }
}

#[test]
fn a_frame_that_is_too_large_goes_nowhere() {
    let mut rig = rig(MRG_RXBUF);
    rig.start();
    let address = crate::testing::BUFFERS + 0x300_000;
    let mut huge = segment(PUSH_ACK, 0, 0, b"");
    huge.resize(60_000, 0);
    rig.add_tx(0, &arp_for(SERVICE));
    vm_memory::Bytes::write_slice(&rig.tx.memory, &huge, vm_memory::GuestAddress(address)).unwrap();
    rig.tx.add(&[crate::testing::readable(address, 60_000)]);
    rig.add_tx(1, &frame(100, 1));
    rig.tx.kick();
    let mut data = [0; 2048];
    let len = rig.wire.read(&mut data).unwrap();
    assert!(data[..len] == frame(100, 1));
    assert!(!rig.signals.is_reset_needed());
}
