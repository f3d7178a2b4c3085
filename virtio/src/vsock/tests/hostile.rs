// SPDX-License-Identifier: Apache-2.0
//! A guest, or a program on the host, that does as it likes.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use vm_memory::{Bytes, GuestAddress};

use super::guest::{CID, Guest, Peer, SOON, pattern};
use crate::device::VirtioDevice;
use crate::testing::{Used, readable, writable};
use crate::vsock::packet::{HEADER_LEN, Header, PORT_ANY, op};

#[test]
fn packets_without_a_connection_are_reset() {
    let mut guest = Guest::new();
    let peer = Peer::new(1, 9);
    let mut count = 0;
    for op in [
        op::REQUEST,
        op::RESPONSE,
        op::SHUTDOWN,
        op::RW,
        op::CREDIT_UPDATE,
        op::CREDIT_REQUEST,
        0,
        8,
        u16::MAX,
    ] {
        guest.send(&peer.header(op, 0), &[]);
        let answer = guest.expect(op::RST);
        assert_eq!((answer.src_port, answer.dst_port), (9, 1));
        assert_eq!((answer.src_cid, answer.dst_cid), (2, CID.into()));
        count += u64::from(op != op::REQUEST);
    }
    guest.send(&peer.header(op::RST, 0), &[]);
    guest.expect_nothing();
    let counts = guest.device.control().counts();
    assert_eq!((counts.bad_packets, counts.connections_refused), (count, 1));
}

#[test]
fn addresses_that_are_none_are_reset_or_ignored() {
    let mut guest = Guest::new();
    let _listener = guest.listen(9);
    let _any = guest.listen(PORT_ANY);
    let good = Peer::new(1, 9).header(op::REQUEST, 0);
    for (header, answered) in [
        (Header { dst_cid: 3, ..good }, true),
        (
            Header {
                dst_cid: CID.into(),
                ..good
            },
            true,
        ),
        (Header { src_cid: 2, ..good }, false),
        (
            Header {
                src_cid: 99,
                ..good
            },
            false,
        ),
        (
            Header {
                src_port: PORT_ANY,
                ..good
            },
            true,
        ),
        (
            Header {
                dst_port: PORT_ANY,
                ..good
            },
            true,
        ),
    ] {
        guest.send(&header, &[]);
        if answered {
            let answer = guest.expect(op::RST);
            assert_eq!(answer.src_cid, header.dst_cid);
        } else {
            guest.expect_nothing();
        }
    }
    assert_eq!(guest.device.control().counts().connections_added, 0);
}

#[test]
fn another_socket_type_is_reset_with_its_own() {
    let mut guest = Guest::new();
    let _listener = guest.listen(9);
    let mut header = Peer::new(1, 9).header(op::REQUEST, 0);
    header.kind = 2;
    guest.send(&header, &[]);
    let start = Instant::now();
    let used = loop {
        if let Some(used) = guest.rx.take_used() {
            break used;
        }
        assert!(start.elapsed() < SOON);
    };
    let mut packet = [0; HEADER_LEN];
    let buffer = guest.rx_buffer(used.head);
    guest.memory.read_slice(&mut packet, buffer).unwrap();
    let answer = Header::from_bytes(&packet);
    assert_eq!((answer.op, answer.kind), (op::RST, 2));
}

#[test]
fn what_may_not_be_sent_on_a_connection_ends_it() {
    let mut guest = Guest::new();
    let listener = guest.listen(9);
    for (port, op) in [(1, op::REQUEST), (2, op::RESPONSE), (3, 0), (4, 77)] {
        let mut peer = guest.connect(&listener, port, 9);
        guest.send(&peer.header(op, 0), &[]);
        guest.expect(op::RST);
        assert!(peer.is_at_end());
    }
    // Data after the promise to send none.
    let mut peer = guest.connect(&listener, 5, 9);
    let mut header = peer.header(op::SHUTDOWN, 0);
    header.flags = !1;
    guest.send(&header, &[]);
    peer.send(&mut guest, b"x");
    guest.expect(op::RST);
}

#[test]
fn a_request_of_the_host_can_be_refused_and_not_be_answered_otherwise() {
    let mut guest = Guest::new();
    for answer in [
        op::RST,
        op::RW,
        op::CREDIT_UPDATE,
        op::SHUTDOWN,
        op::REQUEST,
    ] {
        let mut client = UnixStream::connect(guest.path()).unwrap();
        client.write_all(b"CONNECT 7\n").unwrap();
        let request = guest.expect(op::REQUEST);
        let peer = Peer::new(7, request.src_port);
        guest.send(&peer.header(answer, 0), &[]);
        if answer != op::RST {
            guest.expect(op::RST);
        }
        let mut said = String::new();
        client.read_to_string(&mut said).unwrap();
        assert_eq!(said, "", "op {answer}");
    }
}

#[test]
fn a_request_of_the_host_that_is_not_answered_ends_after_a_while() {
    let mut guest = Guest::new();
    let mut client = UnixStream::connect(guest.path()).unwrap();
    client.set_read_timeout(Some(SOON)).unwrap();
    client.write_all(b"CONNECT 7\n").unwrap();
    guest.expect(op::REQUEST);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    guest.expect(op::RST);
}

#[test]
fn more_than_the_credit_ends_the_connection() {
    let mut guest = Guest::new();
    let listener = guest.listen(9);
    let mut peer = guest.connect(&listener, 1, 9);
    // The host reads nothing; sooner or later the device has to keep all of it.
    let chunk = pattern(65536);
    for _ in 0..20 {
        peer.send(&mut guest, &chunk);
    }
    while guest.next().0.op != op::RST {}
    assert_eq!(guest.device.control().counts().connections_removed, 1);
}

#[test]
fn credit_that_makes_no_sense_only_stalls_its_connection() {
    let mut guest = Guest::new();
    let listener = guest.listen(9);
    let mut peer = guest.connect(&listener, 1, 9);
    peer.forwarded = 0x8000_0000;
    guest.send(&peer.header(op::CREDIT_UPDATE, 0), &[]);
    peer.stream().write_all(b"abc").unwrap();
    guest.expect(op::CREDIT_REQUEST);
    peer.forwarded = 0;
    peer.buf_alloc = u32::MAX;
    guest.send(&peer.header(op::CREDIT_UPDATE, 0), &[]);
    assert_eq!(peer.receive(&mut guest, 3), b"abc");
}

#[test]
fn chains_that_hold_no_packet_are_given_back_empty() {
    let mut guest = Guest::without_buffers();
    let outside = 0x4000_0000;
    let here = 0x80_0000;
    for pieces in [
        &[readable(here, HEADER_LEN as u32 - 1)][..],
        &[readable(outside, 64)],
        &[writable(here, 64)],
        &[readable(here, 0)],
    ] {
        guest.tx.add(pieces);
    }
    for pieces in [
        &[writable(here, HEADER_LEN as u32)][..],
        &[writable(outside, 4096)],
        &[readable(here, 4096)],
        &[writable(here, 100), writable(outside, 100)],
    ] {
        guest.rx.add(pieces);
    }
    let good = guest
        .rx
        .add(&[writable(here, 22), writable(here + 4096, 100)]);
    // Something to be said, for which the bad buffers are tried.
    let header = Peer::new(1, 9).header(op::REQUEST, 0);
    guest
        .memory
        .write_slice(&header.to_bytes(), GuestAddress(here + 8192))
        .unwrap();
    guest
        .tx
        .add(&[readable(here + 8192, 20), readable(here + 8212, 24)]);
    guest.start();
    let mut used = Vec::new();
    let start = Instant::now();
    while used.len() < 5 {
        used.extend(guest.rx.take_used());
        assert!(start.elapsed() < SOON);
    }
    let expected = [0, 1, 2, 3, good.into()].map(|head| Used {
        head,
        len: if head == u32::from(good) {
            HEADER_LEN as u32
        } else {
            0
        },
    });
    assert_eq!(used, expected);
    assert_eq!(guest.device.control().counts().bad_chains, 8);
    assert!(!guest.signals.is_reset_needed());
}

#[test]
fn a_packet_without_all_of_its_payload_ends_its_connection() {
    let mut guest = Guest::new();
    let listener = guest.listen(9);
    let mut peer = guest.connect(&listener, 1, 9);
    guest.send(&peer.header(op::RW, 100), &[1; 99]);
    guest.expect(op::RST);
    assert!(peer.is_at_end());
    let peer = guest.connect(&listener, 2, 9);
    guest.send(&peer.header(op::RW, u32::MAX), &[1; 99]);
    guest.expect(op::RST);
    // In the chain, but not in memory.
    let peer = guest.connect(&listener, 3, 9);
    let at = 0x80_0000;
    let header = peer.header(op::RW, 100).to_bytes();
    guest.memory.write_slice(&header, GuestAddress(at)).unwrap();
    guest
        .tx
        .add(&[readable(at, HEADER_LEN as u32), readable(0x4000_0000, 100)]);
    guest.tx.kick();
    guest.expect(op::RST);
}

#[test]
fn a_guest_that_takes_no_answers_is_not_listened_to_for_ever() {
    let mut guest = Guest::without_buffers();
    guest.start();
    let peer = Peer::new(1, 9);
    let header = peer.header(op::RW, 0);
    let at = 0x80_0000;
    guest
        .memory
        .write_slice(&header.to_bytes(), GuestAddress(at))
        .unwrap();
    let mut taken = 0;
    let begun = Instant::now();
    let mut idle = Instant::now();
    // All that it takes, and no more in a while.
    while taken < 256 && begun.elapsed() < SOON || idle.elapsed().as_millis() < 200 {
        while guest.tx.avail.wrapping_sub(guest.tx.used) < 128 {
            guest.tx.add(&[readable(at, HEADER_LEN as u32)]);
        }
        guest.tx.kick();
        while guest.tx.take_used().is_some() {
            taken += 1;
            idle = Instant::now();
        }
    }
    assert_eq!(taken, 256);
    // With buffers it goes on.
    guest.give_buffers(200);
    for _ in 0..300 {
        guest.expect(op::RST);
    }
}

#[test]
fn requests_and_resets_without_end_leave_nothing_behind() {
    let mut guest = Guest::without_buffers();
    guest.start();
    let listener = guest.listen(9);
    listener.set_nonblocking(true).unwrap();
    for round in 0..2000 {
        let peer = Peer::new(round, 9);
        guest.send(&peer.header(op::REQUEST, 0), &[]);
        guest.send(&peer.header(op::RST, 0), &[]);
        while listener.accept().is_ok() {}
    }
    guest.give_buffers(64);
    // Whatever could not be said of them is forgotten with them.
    let start = Instant::now();
    let at_rest = |guest: &Guest| {
        let counts = guest.device.control().counts();
        counts.tx_packets >= 4000 && counts.connections_added == counts.connections_removed
    };
    while !at_rest(&guest) {
        assert!(start.elapsed() < SOON);
        while guest.tx.take_used().is_some() {}
        while listener.accept().is_ok() {}
    }
    let counts = guest.device.control().counts();
    assert_eq!(counts.connections_added + counts.connections_refused, 2000);
}

#[test]
fn a_ring_that_makes_no_sense_stops_the_device_alone() {
    let mut guest = Guest::new();
    guest.tx.set_avail_index(9999);
    guest.tx.kick();
    let start = Instant::now();
    while !guest.signals.is_reset_needed() {
        assert!(start.elapsed() < SOON);
    }
    assert_eq!(guest.device.stop().len(), 3);
}

#[test]
fn clients_that_say_something_else_are_sent_away() {
    let mut guest = Guest::new();
    for said in ["GET / HTTP/1.1\r\n", "CONNECT x\n", &"C".repeat(100)] {
        let mut client = UnixStream::connect(guest.path()).unwrap();
        client.set_read_timeout(Some(SOON)).unwrap();
        client.write_all(said.as_bytes()).unwrap();
        // The end, or an error for what nobody read.
        assert!(!matches!(client.read(&mut [0]), Ok(1)), "{said}");
    }
    for _ in 0..100 {
        drop(UnixStream::connect(guest.path()).unwrap());
    }
    let peer = guest.accept(5);
    assert_eq!(peer.guest_port, 5);
    assert_eq!(guest.device.control().counts().connections_added, 1);
}
