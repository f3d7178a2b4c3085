// SPDX-License-Identifier: Apache-2.0
//! A device that goes on from a state that was saved in the middle of its work.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use super::guest::{CID, SOON};
use crate::testing::machine::{FREE, Machine, eventually};
use crate::testing::{readable, writable};
use crate::vsock::packet::{HEADER_LEN, Header, TYPE_STREAM, op};
use crate::vsock::{Vsock, VsockConfig};

const RX: usize = 0;
const TX: usize = 1;
const EVENTS: usize = 2;
const EVENT: u64 = FREE;
const PACKET: u64 = FREE + 0x1000;
const BUFFERS: u64 = FREE + 0x2000;

fn device(folder: &Path) -> Box<Vsock> {
    let config = VsockConfig {
        guest_cid: CID,
        uds_path: folder.join("v"),
    };
    Box::new(Vsock::new(&config).unwrap())
}

/// The next packet for the guest, the `number`th of all.
fn next(machine: &mut Machine, number: &mut u16) -> (Header, Vec<u8>) {
    let address = BUFFERS + 0x1000 * u64::from(*number);
    *number += 1;
    machine.wait_used(RX, *number);
    let used = machine.drivers[RX].take_used().unwrap();
    let bytes = machine.get(address, used.len as usize);
    let (header, payload) = bytes.split_at(HEADER_LEN);
    (
        Header::from_bytes(header.try_into().unwrap()),
        payload.to_vec(),
    )
}

fn send(machine: &mut Machine, to: &Header, op: u16, data: &[u8]) {
    let header = Header {
        src_cid: CID.into(),
        dst_cid: 2,
        src_port: to.dst_port,
        dst_port: to.src_port,
        len: data.len() as u32,
        kind: TYPE_STREAM,
        op,
        flags: 0,
        buf_alloc: 0x10000,
        fwd_cnt: 0,
    };
    machine.put(PACKET, &[&header.to_bytes()[..], data].concat());
    let before = machine.drivers[TX].used_index();
    machine.drivers[TX].add(&[readable(PACKET, (HEADER_LEN + data.len()) as u32)]);
    machine.drivers[TX].kick();
    machine.wait_used(TX, before + 1);
}

/// A client of the guest's port 7, connected, and the request that the guest saw.
fn client(machine: &mut Machine, number: &mut u16, folder: &Path) -> (UnixStream, Header) {
    let mut client = UnixStream::connect(folder.join("v")).unwrap();
    client.set_read_timeout(Some(SOON)).unwrap();
    client.write_all(b"CONNECT 7\n").unwrap();
    let (request, _) = next(machine, number);
    assert_eq!((request.op, request.dst_port), (op::REQUEST, 7));
    send(machine, &request, op::RESPONSE, b"");
    let mut line = [0; 3];
    client.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"OK ");
    while line[0] != b'\n' {
        client.read_exact(&mut line[..1]).unwrap();
    }
    (client, request)
}

#[test]
fn the_guest_is_told_that_its_connections_are_gone_and_its_listeners_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = Machine::new(device(folder.path()), u64::MAX);
    let mut number = 0;
    for slot in 0..32 {
        machine.drivers[RX].add(&[writable(BUFFERS + 0x1000 * slot, 4096)]);
    }
    machine.put(EVENT, &[0xff; 4]);
    machine.drivers[EVENTS].add(&[writable(EVENT, 4)]);
    machine
        .drivers
        .iter()
        .for_each(crate::testing::Driver::kick);
    let (mut old, request) = client(&mut machine, &mut number, folder.path());
    send(&mut machine, &request, op::RW, b"before");
    let mut data = [0; 6];
    old.read_exact(&mut data).unwrap();
    // What is under way is lost with the connection.
    old.write_all(b"never").unwrap();
    next(&mut machine, &mut number);

    machine = machine.reborn(|| device(folder.path()));
    assert_eq!(old.read(&mut data).unwrap(), 0, "the host's end is closed");
    machine.wait_used(EVENTS, 1);
    assert_eq!(machine.drivers[EVENTS].take_used().unwrap().len, 4);
    assert_eq!(
        machine.get(EVENT, 4),
        [0; 4],
        "VIRTIO_VSOCK_EVENT_TRANSPORT_RESET"
    );
    // A guest that has not heard yet is told what its packet deserves.
    send(&mut machine, &request, op::RW, b"late");
    assert_eq!(next(&mut machine, &mut number).0.op, op::RST);
    let (mut new, request) = client(&mut machine, &mut number, folder.path());
    send(&mut machine, &request, op::RW, b"after!");
    new.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"after!");
    new.write_all(b"and back").unwrap();
    assert_eq!(next(&mut machine, &mut number).1, b"and back");

    // The other direction too, and again after another time.
    machine = machine.reborn(|| device(folder.path()));
    let host = UnixListener::bind(folder.path().join("v_9")).unwrap();
    let from = Header {
        src_port: 9,
        dst_port: 1000,
        ..request
    };
    send(&mut machine, &from, op::REQUEST, b"");
    host.accept().unwrap();
    eventually("the guest hears", || {
        next(&mut machine, &mut number).0.op == op::RESPONSE
    });
    assert_eq!(
        machine.drivers[EVENTS].used_index(),
        1,
        "there was no buffer for it"
    );
    machine.drivers[EVENTS].add(&[writable(EVENT, 4)]);
    machine.drivers[EVENTS].kick();
    machine.wait_used(EVENTS, 2);
}

#[test]
fn a_reset_that_the_guest_was_not_told_of_is_not_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = Machine::new(device(folder.path()), u64::MAX);
    for _ in 0..3 {
        machine = machine.reborn(|| device(folder.path()));
    }
    machine.drivers[EVENTS].add(&[writable(EVENT, 4), writable(EVENT + 4, 4)]);
    machine.drivers[EVENTS].add(&[writable(EVENT, 4)]);
    machine.drivers[EVENTS].kick();
    machine.stays_used(EVENTS, 1);
}
