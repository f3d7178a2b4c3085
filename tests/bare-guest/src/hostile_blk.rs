// SPDX-License-Identifier: Apache-2.0
//! Hostile cases of block requests.

use crate::blk::{self, Blk, SECTOR, kind};
use crate::clock;
use crate::hostile::{Case, DATA, Entry, Piece, SIZE, flag};
use alloc::vec::Vec;

const STATUS_AT: u64 = 64;

/// The cases.
pub const CASES: &[Entry] = &[
    ("header-empty", |c| change(c, kind::IN, 0, |p| p[0].1 = 0)),
    ("header-short", |c| change(c, kind::IN, 0, |p| p[0].1 = 15)),
    ("header-long", |c| change(c, kind::IN, 0, |p| p[0].1 = 32)),
    ("header-writable", |c| {
        change(c, kind::IN, 0, |p| p[0].2 = flag::WRITE)
    }),
    ("header-alone", |c| {
        change(c, kind::IN, 0, |p| p.truncate(1))
    }),
    ("status-missing", |c| {
        change(c, kind::IN, 0, |p| p.truncate(2))
    }),
    ("status-readable", |c| {
        change(c, kind::IN, 0, |p| p[2].2 = 0)
    }),
    ("status-empty", |c| change(c, kind::IN, 0, |p| p[2].1 = 0)),
    ("status-long", |c| change(c, kind::IN, 0, |p| p[2].1 = 64)),
    ("status-alone", |c| {
        change(c, kind::IN, 0, |p| drop(p.drain(..2)))
    }),
    ("data-missing", |c| {
        change(c, kind::IN, 0, |p| drop(p.drain(1..2)))
    }),
    ("data-one-byte", |c| change(c, kind::IN, 0, |p| p[1].1 = 1)),
    ("data-no-sectors", |c| {
        change(c, kind::IN, 0, |p| p[1].1 = SECTOR as u32 - 1)
    }),
    ("data-before-header", |c| {
        change(c, kind::IN, 0, |p| p.swap(0, 1))
    }),
    ("read-into-readable", read_into_readable),
    ("write-from-writable", |c| {
        change(c, kind::OUT, 0, |p| p[1].2 = flag::WRITE)
    }),
    ("sector-max", |c| change(c, kind::IN, u64::MAX, |_| {})),
    ("sector-times-512-wraps", |c| {
        change(c, kind::IN, 1 << 55, |_| {})
    }),
    ("sector-write-max", |c| {
        change(c, kind::OUT, u64::MAX - 7, |p| p[1].2 = 0)
    }),
    ("type-max", |c| change(c, u32::MAX, 0, |_| {})),
    ("id-in-five-bytes", |c| {
        change(c, kind::GET_ID, 0, |p| p[1].1 = 5)
    }),
    ("id-in-a-page", |c| change(c, kind::GET_ID, 0, |_| {})),
    ("id-nowhere", |c| {
        change(c, kind::GET_ID, 0, |p| drop(p.drain(1..2)))
    }),
    ("flush-with-data", |c| {
        change(c, kind::FLUSH, u64::MAX, |_| {})
    }),
    ("discard-empty", |c| ranges(c, kind::DISCARD, 0)),
    ("discard-one-byte", |c| ranges(c, kind::DISCARD, 1)),
    ("discard-odd", |c| ranges(c, kind::DISCARD, 17)),
    ("discard-page", |c| ranges(c, kind::DISCARD, DATA as u32)),
    ("zeroes-page", |c| {
        ranges(c, kind::WRITE_ZEROES, DATA as u32)
    }),
    ("zeroes-huge", |c| ranges(c, kind::WRITE_ZEROES, u32::MAX)),
    ("pieces-fill-queue", pieces_fill_queue),
];

/// Reads a sector.
pub fn alive(base: u64) -> bool {
    Blk::open_at(base).is_some_and(|mut blk| blk.read(0, blk::buffer(SECTOR)) == blk::status::OK)
}

fn control(case: &Case, kind: u32, sector: u64) {
    // SAFETY: the page was taken for the case.
    unsafe { (case.control as *mut [u8; 16]).write_volatile(blk::header(kind, sector)) };
}

/// A read of eight sectors at the start of the disk.
pub fn request(case: &mut Case) -> Vec<Piece> {
    control(case, kind::IN, 0);
    [
        (case.control, 16, 0),
        (case.data, DATA as u32, flag::WRITE),
        (case.control + STATUS_AT, 1, flag::WRITE),
    ]
    .into()
}

/// A read, with another header and with its pieces changed.
fn change(case: &mut Case, kind: u32, sector: u64, change: fn(&mut Vec<Piece>)) {
    case.features = blk::FLUSH | blk::DISCARD | blk::WRITE_ZEROES;
    case.start();
    let mut pieces = case.good();
    control(case, kind, sector);
    change(&mut pieces);
    case.send(&pieces);
}

/// The device was not allowed to write there, so it must not have.
fn read_into_readable(case: &mut Case) {
    change(case, kind::IN, 0, |p| p[1].2 = 0);
    clock::wait(20, || false);
    case.ok = case.untouched();
}

/// A discard or a write-zeroes whose ranges are canary bytes, so many of them.
fn ranges(case: &mut Case, kind: u32, len: u32) {
    case.features = blk::DISCARD | blk::WRITE_ZEROES;
    case.start();
    let mut pieces = case.good();
    control(case, kind, 0);
    pieces[1] = (case.data, len, 0);
    case.send(&pieces);
}

/// As many pieces as the queue has descriptors, most of them no whole sector.
fn pieces_fill_queue(case: &mut Case) {
    case.start();
    let good = case.good();
    let mut pieces = Vec::from([good[0]]);
    for i in 0..u64::from(SIZE) - 2 {
        pieces.push((case.data + 7 * i, 3, flag::WRITE));
    }
    pieces.push(good[2]);
    case.send(&pieces);
}
