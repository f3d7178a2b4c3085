// SPDX-License-Identifier: Apache-2.0
//! Bytes both ways, credit, and the ends of connections.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::thread;
use std::time::Instant;

use super::guest::{Guest, Peer, RX_LEN, SOON, pattern};
use crate::vsock::packet::{HEADER_LEN, NO_MORE, NO_RECEIVE, NO_SEND, op};

#[test]
fn the_guest_connects_and_both_sides_talk() {
    let mut guest = Guest::new();
    let listener = guest.listen(80);
    let mut peer = guest.connect(&listener, 1000, 80);
    peer.send(&mut guest, b"hello host");
    assert_eq!(peer.read(10), b"hello host");
    peer.stream().write_all(b"hello guest").unwrap();
    assert_eq!(peer.receive(&mut guest, 11), b"hello guest");
}

#[test]
fn the_host_connects_and_both_sides_talk() {
    let mut guest = Guest::new();
    let mut peer = guest.accept(52);
    assert!(peer.host_port >= 1 << 30);
    peer.stream().write_all(b"hello guest").unwrap();
    assert_eq!(peer.receive(&mut guest, 11), b"hello guest");
    peer.send(&mut guest, b"hello host");
    assert_eq!(peer.read(10), b"hello host");
    let other = guest.accept(52);
    assert_ne!(other.host_port, peer.host_port);
}

#[test]
fn what_a_client_says_with_its_first_line_is_for_the_guest() {
    let mut guest = Guest::new();
    let mut stream = std::os::unix::net::UnixStream::connect(guest.path()).unwrap();
    stream.write_all(b"CONNE").unwrap();
    guest.expect_nothing();
    stream.write_all(b"CT 7\nearly").unwrap();
    let request = guest.expect(op::REQUEST);
    let mut peer = Peer::new(7, request.src_port);
    guest.send(&peer.header(op::RESPONSE, 0), &[]);
    assert_eq!(peer.receive(&mut guest, 5), b"early");
}

#[test]
fn megabytes_arrive_whole_in_the_guest() {
    let mut guest = Guest::new();
    let mut peer = guest.accept(1);
    let data = pattern(3_000_000);
    let mut writer = peer.stream().try_clone().unwrap();
    let sent = data.clone();
    let writer = thread::spawn(move || writer.write_all(&sent).unwrap());
    let mut got = Vec::new();
    let mut told = 0;
    while got.len() < data.len() {
        let (header, payload) = guest.next();
        match header.op {
            op::RW => got.extend(payload),
            op::CREDIT_REQUEST => {}
            other => panic!("{other}"),
        }
        peer.forwarded = got.len() as u32;
        if peer.forwarded - told > peer.buf_alloc / 2 || header.op == op::CREDIT_REQUEST {
            told = peer.forwarded;
            guest.send(&peer.header(op::CREDIT_UPDATE, 0), &[]);
        }
    }
    writer.join().unwrap();
    assert!(got == data);
}

#[test]
fn megabytes_arrive_whole_on_the_host() {
    let mut guest = Guest::new();
    let listener = guest.listen(9);
    let mut peer = guest.connect(&listener, 1, 9);
    let data = pattern(3_000_000);
    let mut reader = peer.stream().try_clone().unwrap();
    let len = data.len();
    let reader = thread::spawn(move || {
        let mut got = vec![0; len];
        reader.read_exact(&mut got).unwrap();
        got
    });
    let mut rest = data.as_slice();
    while !rest.is_empty() {
        while peer.credit() == 0 {
            let header = guest.expect(op::CREDIT_UPDATE);
            peer.hear(&header);
        }
        let len = rest.len().min(peer.credit() as usize).min(65536);
        let (now, later) = rest.split_at(len);
        peer.send(&mut guest, now);
        rest = later;
    }
    assert!(reader.join().unwrap() == data);
}

#[test]
fn no_more_is_sent_than_the_guest_has_room_for() {
    let mut guest = Guest::new();
    let listener = guest.listen(9);
    let mut peer = Peer::new(1, 9);
    peer.buf_alloc = 6000;
    guest.send(&peer.header(op::REQUEST, 0), &[]);
    let (mut stream, _) = listener.accept().unwrap();
    guest.expect(op::RESPONSE);
    let data = pattern(10_000);
    stream.write_all(&data).unwrap();
    assert_eq!(peer.receive(&mut guest, 6000), data[..6000]);
    guest.expect(op::CREDIT_REQUEST);
    guest.expect_nothing();
    // Half of it is free again.
    peer.forwarded = 3000;
    guest.send(&peer.header(op::CREDIT_UPDATE, 0), &[]);
    assert_eq!(peer.receive(&mut guest, 3000), data[6000..9000]);
    guest.expect(op::CREDIT_REQUEST);
    peer.forwarded = 9000;
    guest.send(&peer.header(op::CREDIT_UPDATE, 0), &[]);
    assert_eq!(peer.receive(&mut guest, 1000), data[9000..]);
}

#[test]
fn a_host_that_never_reads_costs_no_more_than_its_credit_and_nobody_else() {
    let mut guest = Guest::new();
    let listener = guest.listen(9);
    let mut slow = guest.connect(&listener, 1, 9);
    let mut other = guest.connect(&listener, 2, 9);
    let chunk = pattern(65536);
    let mut sent: Vec<u8> = Vec::new();
    let mut full = false;
    while !full {
        let len = (slow.credit() as usize).min(chunk.len());
        slow.send(&mut guest, &chunk[..len]);
        sent.extend(&chunk[..len]);
        other.send(&mut guest, b"ping");
        assert_eq!(other.read(4), b"ping", "while another does not read");
        // All of the update that there will be is there, now that the later ping has come back.
        other.stream().write_all(b"p").unwrap();
        loop {
            let (header, _) = guest.next();
            if header.dst_port == 2 {
                break;
            }
            assert_eq!(header.op, op::CREDIT_UPDATE);
            slow.hear(&header);
        }
        full = slow.credit() == 0;
    }
    let kernel = sent.len() - slow.host_alloc as usize;
    assert!(kernel < 1 << 20, "the device took {} bytes", sent.len());
    // Nothing is lost when it reads after all.
    assert!(slow.read(sent.len()) == sent);
    slow.hear(&guest.expect(op::CREDIT_UPDATE));
    assert!(slow.credit() > 0);
}

#[test]
fn a_credit_request_is_answered() {
    let mut guest = Guest::new();
    let listener = guest.listen(9);
    let mut peer = guest.connect(&listener, 1, 9);
    peer.send(&mut guest, b"abc");
    guest.send(&peer.header(op::CREDIT_REQUEST, 0), &[]);
    let header = guest.expect(op::CREDIT_UPDATE);
    assert_eq!(header.fwd_cnt, 3);
}

#[test]
fn the_host_may_end_its_half_and_still_be_answered() {
    let mut guest = Guest::new();
    let mut peer = guest.accept(1);
    peer.stream().write_all(b"question").unwrap();
    peer.stream().shutdown(Shutdown::Write).unwrap();
    assert_eq!(peer.receive(&mut guest, 8), b"question");
    assert_eq!(guest.expect(op::SHUTDOWN).flags, NO_SEND);
    peer.send(&mut guest, b"answer");
    assert_eq!(peer.read(6), b"answer");
    // Then it goes.
    peer.close();
    assert_eq!(guest.expect(op::SHUTDOWN).flags, NO_MORE);
    guest.send(&peer.header(op::RST, 0), &[]);
    guest.expect_nothing();
}

#[test]
fn the_guest_may_end_its_half_and_still_be_answered() {
    let mut guest = Guest::new();
    let mut peer = guest.accept(1);
    peer.send(&mut guest, b"question");
    let mut header = peer.header(op::SHUTDOWN, 0);
    header.flags = NO_SEND;
    guest.send(&header, &[]);
    assert_eq!(peer.read(8), b"question");
    assert!(peer.is_at_end());
    peer.stream().write_all(b"answer").unwrap();
    assert_eq!(peer.receive(&mut guest, 6), b"answer");
    header.flags = NO_RECEIVE;
    guest.send(&header, &[]);
    guest.expect(op::RST);
    assert!(peer.stream().write_all(b"more").is_err());
}

#[test]
fn the_guests_last_bytes_reach_a_slow_host_before_the_end() {
    let mut guest = Guest::new();
    let listener = guest.listen(9);
    let mut peer = guest.connect(&listener, 1, 9);
    let data = pattern(peer.credit() as usize);
    for part in data.chunks(65536) {
        peer.send(&mut guest, part);
    }
    let mut header = peer.header(op::SHUTDOWN, 0);
    header.flags = NO_MORE;
    guest.send(&header, &[]);
    let start = Instant::now();
    while guest.device.control().counts().tx_packets < 6 {
        assert!(start.elapsed() < SOON);
    }
    assert!(peer.read(data.len()) == data);
    assert!(peer.is_at_end());
    while guest.next().0.op != op::RST {}
}

#[test]
fn a_host_that_closes_is_the_end_after_all_that_it_sent() {
    let mut guest = Guest::new();
    let mut peer = guest.accept(1);
    let data = pattern(20_000);
    peer.stream().write_all(&data).unwrap();
    peer.close();
    assert_eq!(peer.receive(&mut guest, data.len()), data);
    assert_eq!(guest.expect(op::SHUTDOWN).flags, NO_MORE);
    // A guest that does not confirm is reset after a while.
    guest.expect(op::RST);
    let counts = guest.device.control().counts();
    assert_eq!(
        (counts.connections_killed, counts.connections_removed),
        (1, 1)
    );
}

#[test]
fn a_reset_in_the_middle_of_a_transfer_ends_it_on_the_host() {
    let mut guest = Guest::new();
    let mut peer = guest.accept(1);
    let mut writer = peer.stream().try_clone().unwrap();
    let writer = thread::spawn(move || {
        let chunk = pattern(65536);
        while writer.write_all(&chunk).is_ok() {}
    });
    peer.receive(&mut guest, RX_LEN as usize - HEADER_LEN);
    guest.send(&peer.header(op::RST, 0), &[]);
    writer.join().unwrap();
    let start = Instant::now();
    while guest.device.control().counts().connections_removed == 0 {
        assert!(start.elapsed() < SOON);
    }
    guest.inbox.clear();
    peer.send(&mut guest, b"late");
    while guest.next().0.op != op::RST {}
}

#[test]
fn a_host_that_goes_in_the_middle_of_a_transfer_is_the_end_for_the_guest() {
    let mut guest = Guest::new();
    let listener = guest.listen(9);
    let mut peer = guest.connect(&listener, 1, 9);
    peer.send(&mut guest, &pattern(1000));
    peer.read(1);
    peer.close();
    // It had not read everything, which is an error for the other end.
    guest.expect(op::RST);
    let other = guest.connect(&listener, 2, 9);
    assert_eq!(other.host_port, 9, "the device goes on");
}
