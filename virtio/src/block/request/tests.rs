// SPDX-License-Identifier: Apache-2.0
//! What is taken as a request, and what is refused, with which status.

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::testing::{BUFFERS, Driver, MEMORY_END, Piece, memory, readable, writable};

const SECTORS: u64 = 1000;
const ALL: u64 = F_FLUSH | F_DISCARD | F_WRITE_ZEROES;
const DATA: u64 = BUFFERS + 0x1000;

fn limits(features: u64) -> Limits {
    Limits {
        sectors: SECTORS,
        features,
        read_only: false,
    }
}

/// Parses a chain of `pieces` over the bytes `readable`, which are written to `BUFFERS`.
fn parse_bytes(limits: Limits, bytes: &[u8], pieces: &[Piece]) -> Result<Request, Refusal> {
    let mut driver = Driver::new(memory(), 256);
    driver
        .memory
        .write_slice(bytes, GuestAddress(BUFFERS))
        .unwrap();
    driver.add(pieces);
    let mut chain = Chain::new();
    assert!(driver.queue(0).pop(&mut chain).unwrap());
    limits.parse(&chain, &driver.memory)
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0xaa; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

/// Parses a request with a header, then the buffers `rest`.
fn parse(limits: Limits, kind: u32, sector: u64, rest: &[Piece]) -> Result<Request, Refusal> {
    let pieces = [&[readable(BUFFERS, 16)], rest].concat();
    parse_bytes(limits, &header(kind, sector), &pieces)
}

/// Parses a request with one range.
fn parse_range(
    limits: Limits,
    kind: u32,
    (sector, count, flags): (u64, u32, u32),
) -> Result<Request, Refusal> {
    let mut bytes = header(kind, 0);
    bytes.extend(sector.to_le_bytes());
    bytes.extend(count.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    parse_bytes(limits, &bytes, &[readable(BUFFERS, 32), STATUS])
}

const STATUS: Piece = Piece {
    address: DATA + 0x10_0000,
    len: 1,
    write: true,
};

#[track_caller]
fn refused(result: Result<Request, Refusal>, status: u8) {
    match result {
        Ok(request) => panic!("taken: {request:?}"),
        Err(refusal) => assert_eq!(refusal.status(), status, "{refusal}"),
    }
}

#[test]
fn each_kind_of_request_is_taken() {
    let all = limits(ALL);
    let read = parse(all, T_IN, 3, &[writable(DATA, 1024), STATUS]);
    let expected = Request::Read {
        offset: 3 * 512,
        len: 1024,
    };
    assert_eq!(read.unwrap(), expected);
    let write = parse(all, T_OUT, 998, &[readable(DATA, 1024), STATUS]);
    let expected = Request::Write {
        offset: 998 * 512,
        len: 1024,
    };
    assert_eq!(write.unwrap(), expected);
    assert_eq!(parse(all, T_FLUSH, 0, &[STATUS]).unwrap(), Request::Flush);
    let id = parse(all, T_GET_ID, 0, &[writable(DATA, 20), STATUS]);
    assert_eq!(id.unwrap(), Request::GetId);
    let discard = parse_range(all, T_DISCARD, (10, 20, 0));
    let (offset, len) = (10 * 512, 20 * 512);
    assert_eq!(discard.unwrap(), Request::Discard { offset, len });
    for unmap in [false, true] {
        let zeroes = parse_range(all, T_WRITE_ZEROES, (10, 20, unmap.into()));
        let expected = Request::WriteZeroes { offset, len, unmap };
        assert_eq!(zeroes.unwrap(), expected);
    }
}

#[test]
fn how_a_request_is_cut_into_buffers_does_not_matter() {
    let mut pieces: Vec<_> = (0..16).map(|at| readable(BUFFERS + at, 1)).collect();
    pieces.insert(7, readable(u64::MAX, 0));
    pieces.extend((0..100).map(|at| writable(DATA + at * 7, 5)));
    pieces.push(writable(DATA, 12 + 1));
    let read = parse_bytes(limits(0), &header(T_IN, 1), &pieces).unwrap();
    let expected = Request::Read {
        offset: 512,
        len: 512,
    };
    assert_eq!(read, expected);
    // Header and data in one buffer.
    let write = parse_bytes(
        limits(0),
        &header(T_OUT, 1),
        &[readable(BUFFERS, 16 + 512), STATUS],
    );
    let expected = Request::Write {
        offset: 512,
        len: 512,
    };
    assert_eq!(write.unwrap(), expected);
}

#[test]
fn a_request_without_a_whole_header_is_an_error() {
    for len in [0, 1, 15] {
        let pieces = [readable(BUFFERS, len), writable(DATA, 512), STATUS];
        refused(parse_bytes(limits(ALL), &header(T_IN, 0), &pieces), S_IOERR);
    }
    let outside = [readable(MEMORY_END - 15, 16), writable(DATA, 512), STATUS];
    refused(parse_bytes(limits(ALL), &[], &outside), S_IOERR);
    refused(parse_bytes(limits(ALL), &[], &[STATUS]), S_IOERR);
}

#[test]
fn a_range_that_is_not_on_the_disk_is_an_error() {
    let all = limits(ALL);
    for (sector, len) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (SECTORS + 1, 0),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (u64::MAX - 1, 1024),
        (1 << 55, 512),
    ] {
        refused(
            parse(all, T_IN, sector, &[writable(DATA, len), STATUS]),
            S_IOERR,
        );
        refused(
            parse(all, T_OUT, sector, &[readable(DATA, len), STATUS]),
            S_IOERR,
        );
        for kind in [T_DISCARD, T_WRITE_ZEROES] {
            refused(parse_range(all, kind, (sector, len / 512, 0)), S_IOERR);
        }
    }
    let empty = parse(all, T_IN, SECTORS, &[STATUS]).unwrap();
    let offset = SECTORS * 512;
    assert_eq!(empty, Request::Read { offset, len: 0 });
}

#[test]
fn data_of_no_whole_number_of_sectors_is_an_error() {
    for len in [1, 511, 513, 1023] {
        refused(
            parse(limits(0), T_IN, 0, &[writable(DATA, len), STATUS]),
            S_IOERR,
        );
        refused(
            parse(limits(0), T_OUT, 0, &[readable(DATA, len), STATUS]),
            S_IOERR,
        );
    }
}

#[test]
fn more_data_than_a_used_length_can_say_is_an_error() {
    let huge = Limits {
        sectors: u64::MAX >> 9,
        ..limits(0)
    };
    let half = writable(DATA, 1 << 31);
    refused(parse(huge, T_IN, 0, &[half, half, STATUS]), S_IOERR);
    let most = writable(DATA, (1 << 31) - 512);
    let read = parse(huge, T_IN, 0, &[half, most, STATUS]).unwrap();
    let len = (1 << 32) - 512;
    assert_eq!(read, Request::Read { offset: 0, len });
}

#[test]
fn data_in_the_wrong_direction_is_an_error() {
    let all = limits(ALL);
    let (there, back) = (readable(DATA, 512), writable(DATA, 512));
    refused(parse(all, T_IN, 0, &[there, STATUS]), S_IOERR);
    refused(parse(all, T_IN, 0, &[there, back, STATUS]), S_IOERR);
    refused(parse(all, T_OUT, 0, &[back, STATUS]), S_IOERR);
    refused(parse(all, T_OUT, 0, &[there, back, STATUS]), S_IOERR);
    refused(parse(all, T_GET_ID, 0, &[there, STATUS]), S_IOERR);
    for kind in [T_DISCARD, T_WRITE_ZEROES] {
        refused(parse(all, kind, 0, &[writable(DATA, 16), STATUS]), S_IOERR);
    }
}

#[test]
fn a_serial_id_needs_its_room() {
    refused(
        parse(limits(0), T_GET_ID, 0, &[writable(DATA, 19), STATUS]),
        S_IOERR,
    );
    parse(limits(0), T_GET_ID, 0, &[writable(DATA, 512), STATUS]).unwrap();
}

#[test]
fn what_was_not_agreed_on_is_unsupported() {
    refused(parse(limits(0), T_FLUSH, 0, &[STATUS]), S_UNSUPP);
    for kind in [T_DISCARD, T_WRITE_ZEROES] {
        refused(parse_range(limits(0), kind, (0, 1, 0)), S_UNSUPP);
    }
    for kind in [2, 3, 5, 6, 7, 9, 10, 12, 14, 0x8000_0000, u32::MAX] {
        refused(parse(limits(ALL), kind, 0, &[STATUS]), S_UNSUPP);
        let data = [writable(DATA, 512), STATUS];
        refused(parse(limits(ALL), kind, 0, &data), S_UNSUPP);
    }
}

#[test]
fn ranges_keep_to_what_the_configuration_says() {
    let all = Limits {
        sectors: u64::MAX >> 9,
        ..limits(ALL)
    };
    for (kind, max) in [
        (T_DISCARD, MAX_DISCARD_SECTORS),
        (T_WRITE_ZEROES, MAX_WRITE_ZEROES_SECTORS),
    ] {
        parse_range(all, kind, (0, max, 0)).unwrap();
        parse_range(all, kind, (0, 0, 0)).unwrap();
        refused(parse_range(all, kind, (0, max + 1, 0)), S_IOERR);
        refused(parse_range(all, kind, (0, u32::MAX, 0)), S_IOERR);
        for flags in [2, 3, 0x8000_0000, u32::MAX] {
            refused(parse_range(all, kind, (0, 1, flags)), S_UNSUPP);
        }
        for len in [0, 1, 15, 17, 32, 512] {
            let data = [readable(DATA, len), STATUS];
            refused(parse(all, kind, 0, &data), S_IOERR);
        }
        let outside = [readable(MEMORY_END - 8, 16), STATUS];
        refused(parse(all, kind, 0, &outside), S_IOERR);
    }
    // A discard may not ask for what only write-zeroes has.
    refused(parse_range(all, T_DISCARD, (0, 1, 1)), S_UNSUPP);
}

#[test]
fn a_read_only_disk_takes_no_change_whatever_was_agreed_on() {
    let read_only = Limits {
        read_only: true,
        ..limits(ALL)
    };
    refused(
        parse(read_only, T_OUT, 0, &[readable(DATA, 512), STATUS]),
        S_IOERR,
    );
    for kind in [T_DISCARD, T_WRITE_ZEROES] {
        refused(parse_range(read_only, kind, (0, 1, 0)), S_IOERR);
    }
    parse(read_only, T_IN, 0, &[writable(DATA, 512), STATUS]).unwrap();
}
