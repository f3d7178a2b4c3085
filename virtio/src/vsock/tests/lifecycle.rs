// SPDX-License-Identifier: Apache-2.0
//! The device as such: its configuration, start and stop, many connections, the socket file.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::Instant;

use vm_memory::{Bytes, GuestAddress};

use super::guest::{CID, Guest, Peer, SOON};
use crate::device::VirtioDevice;
use crate::testing::{Used, writable};
use crate::vsock::packet::op;
use crate::vsock::{MAX_CONNECTIONS, Vsock, VsockConfig, VsockError};

#[test]
fn the_configuration_holds_the_cid() {
    let guest = Guest::without_buffers();
    let mut space = [9; 10];
    guest.device.read_config(0, &mut space);
    assert_eq!(space, [CID as u8, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(guest.device.device_type(), 19);
    assert_eq!(guest.device.queue_sizes().len(), 3);
}

#[test]
fn a_cid_that_is_not_a_guests_is_refused_and_leaves_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let uds_path = folder.path().join("v");
    for guest_cid in [0, 1, 2, u32::MAX] {
        let config = VsockConfig {
            guest_cid,
            uds_path: uds_path.clone(),
        };
        assert!(matches!(Vsock::new(&config), Err(VsockError::Cid(cid)) if cid == guest_cid));
        assert!(!uds_path.exists());
    }
}

#[test]
fn an_existing_file_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let uds_path = folder.path().join("taken");
    std::fs::write(&uds_path, "").unwrap();
    let config = VsockConfig {
        guest_cid: 3,
        uds_path: uds_path.clone(),
    };
    let error = Vsock::new(&config).err().unwrap().to_string();
    assert!(error.contains(uds_path.to_str().unwrap()), "{error}");
    assert!(error.contains("Address already in use"), "{error}");
    assert!(uds_path.exists());
    std::fs::remove_file(&uds_path).unwrap();
    let device = Vsock::new(&config).unwrap();
    assert!(uds_path.exists());
    drop(device);
    assert!(!uds_path.exists());
}

#[test]
fn connections_survive_a_pause() {
    let mut guest = Guest::new();
    let mut peer = guest.accept(1);
    guest.stop();
    let rx = guest.rx.state;
    assert_eq!(rx.next_avail, rx.next_used, "unused buffers are put back");
    peer.stream().write_all(b"meanwhile").unwrap();
    let mut client = UnixStream::connect(guest.path()).unwrap();
    client.write_all(b"CONNECT 8\n").unwrap();
    guest.start();
    assert_eq!(peer.receive(&mut guest, 9), b"meanwhile");
    assert_eq!(guest.expect(op::REQUEST).dst_port, 8);
    peer.send(&mut guest, b"after");
    assert_eq!(peer.read(5), b"after");
}

#[test]
fn a_reset_ends_all_connections_without_a_word() {
    let mut guest = Guest::new();
    let mut peer = guest.accept(1);
    guest.stop();
    guest.device.reset();
    assert!(peer.is_at_end());
    guest.start();
    guest.expect_nothing();
    guest.accept(1);
}

#[test]
fn the_guest_is_told_of_a_transport_reset_once_it_has_a_buffer() {
    let mut guest = Guest::new();
    let mut peer = guest.accept(1);
    guest.stop();
    guest.device.announce_transport_reset();
    assert!(peer.is_at_end());
    guest.start();
    let at = 0x80_0000;
    guest.memory.write_obj(u32::MAX, GuestAddress(at)).unwrap();
    // One that is too small for it, and one that is not.
    guest.events.add(&[writable(at, 3)]);
    guest.events.kick();
    let mut next = || {
        let start = Instant::now();
        loop {
            if let Some(used) = guest.events.take_used() {
                return used;
            }
            assert!(start.elapsed() < SOON);
        }
    };
    assert_eq!(next(), Used { head: 0, len: 0 });
    let memory = guest.memory.clone();
    guest.events.add(&[writable(at, 4)]);
    guest.events.kick();
    let start = Instant::now();
    let used = loop {
        if let Some(used) = guest.events.take_used() {
            break used;
        }
        assert!(start.elapsed() < SOON);
    };
    assert_eq!(used, Used { head: 1, len: 4 });
    assert_eq!(memory.read_obj::<u32>(GuestAddress(at)).unwrap(), 0);
    guest.events.add(&[writable(at, 4)]);
    guest.events.kick();
    guest.expect_nothing();
    assert_eq!(guest.events.take_used(), None, "it is told once");
}

#[test]
fn a_device_without_work_raises_no_interrupts() {
    let mut guest = Guest::new();
    let peer = guest.accept(1);
    guest.expect_nothing();
    let before = guest.interrupts.load(Ordering::SeqCst);
    assert!(before > 0);
    guest.expect_nothing();
    assert_eq!(guest.interrupts.load(Ordering::SeqCst), before);
    assert_eq!(peer.guest_port, 1);
}

#[test]
fn as_many_connections_as_promised_are_open_at_once() {
    let mut guest = Guest::new();
    crate::vsock::socket::allow_open_files(4096).unwrap();
    let listener = guest.listen(9);
    let mut peers = Vec::new();
    for port in 0..MAX_CONNECTIONS as u32 {
        // From either side in turn.
        if port % 2 == 0 {
            peers.push(guest.connect(&listener, port, 9));
        } else {
            peers.push(guest.accept(port));
        }
    }
    assert_eq!(peers.len(), 1023);
    // One more is too many, from either side.
    guest.send(&Peer::new(5000, 9).header(op::REQUEST, 0), &[]);
    guest.expect(op::RST);
    let mut client = UnixStream::connect(guest.path()).unwrap();
    let _ = client.write_all(b"CONNECT 1\n");
    assert!(!matches!(std::io::Read::read(&mut client, &mut [0]), Ok(1)));
    for peer in &mut peers {
        peer.send(&mut guest, &peer.guest_port.to_le_bytes());
        assert_eq!(peer.read(4), peer.guest_port.to_le_bytes());
        peer.stream().write_all(b"ok").unwrap();
        assert_eq!(peer.receive(&mut guest, 2), b"ok");
    }
    guest.send(&peers[0].header(op::RST, 0), &[]);
    assert!(peers[0].is_at_end());
    guest.connect(&listener, 5000, 9);
}

#[test]
fn a_thousand_connections_one_after_the_other_leave_nothing_behind() {
    let mut guest = Guest::new();
    let listener = guest.listen(9);
    for round in 0..1000 {
        let mut peer = guest.connect(&listener, 1, 9);
        peer.send(&mut guest, b"hello");
        assert_eq!(peer.read(5), b"hello");
        let mut header = peer.header(op::SHUTDOWN, 0);
        if round % 2 == 0 {
            header.flags = 3;
            guest.send(&header, &[]);
            guest.expect(op::RST);
            assert!(peer.is_at_end());
        } else {
            peer.close();
            guest.expect(op::SHUTDOWN);
            guest.send(&peer.header(op::RST, 0), &[]);
        }
    }
    let start = Instant::now();
    while guest.device.control().counts().connections_removed < 1000 {
        assert!(start.elapsed() < SOON);
    }
    let counts = guest.device.control().counts();
    assert_eq!(
        (counts.connections_added, counts.connections_killed),
        (1000, 0)
    );
}
