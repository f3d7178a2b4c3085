// SPDX-License-Identifier: Apache-2.0
//! Hostile cases of frames to send and of receive buffers.
//!
//! The receive cases bite only while the host sends frames to this guest.

use crate::clock;
use crate::frame;
use crate::hostile::{Case, DATA, Entry, Piece, SIZE, flag};
use crate::memory;
use crate::net::{HEADER, MRG_RXBUF, Net, OFFLOADS};
use alloc::vec::Vec;

/// The cases of the transmit queue.
pub const TX_CASES: &[Entry] = &[
    ("frame-empty", |c| frame_of(c, HEADER as u32)),
    ("frame-one-byte", |c| frame_of(c, HEADER as u32 + 1)),
    ("frame-thirteen-bytes", |c| frame_of(c, HEADER as u32 + 13)),
    ("header-part", |c| frame_of(c, HEADER as u32 - 1)),
    ("header-one-byte", |c| frame_of(c, 1)),
    ("frame-64k", |c| long_frame(c, 16)),
    ("frame-16m", |c| long_frame(c, 4096)),
    ("frame-in-bytes", frame_in_bytes),
    ("header-all-ones", |c| header(c, [0xff; HEADER])),
    ("gso-without-size", |c| {
        header(c, [1, 1, 54, 0, 0, 0, 34, 0, 16, 0, 0, 0])
    }),
    ("gso-unknown", |c| {
        header(c, [0, 0x7f, 54, 0, 1, 0, 0, 0, 0, 0, 0, 0])
    }),
    ("checksum-beyond", |c| {
        header(c, [1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0])
    }),
    ("checksum-last-byte", |c| {
        header(c, [1, 0, 0, 0, 0, 0, 59, 0, 0, 0, 0, 0])
    }),
];

/// The cases of the receive queue.
pub const RX_CASES: &[Entry] = &[
    ("buffer-one-byte", |c| buffers(c, 0, 1, flag::WRITE)),
    ("buffer-of-header", |c| {
        buffers(c, 0, HEADER as u32, flag::WRITE)
    }),
    ("buffer-part-of-header", |c| {
        buffers(c, 0, HEADER as u32 - 1, flag::WRITE)
    }),
    ("buffer-short", |c| buffers(c, 0, 40, flag::WRITE)),
    ("buffer-one-byte-merged", |c| {
        buffers(c, MRG_RXBUF, 1, flag::WRITE)
    }),
    ("buffer-of-header-merged", |c| {
        buffers(c, MRG_RXBUF, HEADER as u32, flag::WRITE)
    }),
    ("buffer-thirteen-merged", |c| {
        buffers(c, MRG_RXBUF, HEADER as u32 + 1, flag::WRITE)
    }),
    ("buffer-part-merged", |c| {
        buffers(c, MRG_RXBUF, HEADER as u32 - 1, flag::WRITE)
    }),
    ("buffer-readable", buffer_readable),
    ("offloads-with-short-buffers", |c| {
        buffers(c, OFFLOADS, 100, flag::WRITE)
    }),
];

/// Sends a frame; nobody need answer.
pub fn alive(base: u64) -> bool {
    let Some(mut net) = Net::open_at(base, frame::MAX) else {
        return false;
    };
    let Some(slot) = net.tx.take() else {
        return false;
    };
    let source = net.mac;
    let bytes = &mut net.tx.buffer(slot)[HEADER..HEADER + frame::MIN];
    frame::build(bytes, [0xff; 6], source, frame::DATA, 0, 1);
    net.tx.submit(slot, frame::MIN, 1);
    net.kick();
    clock::wait(clock::LONG_MS, || net.tx.reap() == 1)
}

/// A frame of the shortest length, header before it, in one piece.
pub fn transmit(case: &mut Case) -> Vec<Piece> {
    // SAFETY: the page was taken for the case.
    let page = unsafe { core::slice::from_raw_parts_mut(case.data as *mut u8, DATA) };
    page[..HEADER].fill(0);
    let bytes = &mut page[HEADER..HEADER + frame::MIN];
    frame::build(bytes, [0xff; 6], [2, 0, 0, 0, 0, 1], frame::DATA, 0, 1);
    [(case.data, (HEADER + frame::MIN) as u32, 0)].into()
}

/// A receive buffer of a page.
pub fn receive(case: &mut Case) -> Vec<Piece> {
    [(case.data, DATA as u32, flag::WRITE)].into()
}

fn frame_of(case: &mut Case, len: u32) {
    case.start();
    let mut pieces = case.good();
    pieces[0].1 = len;
    case.send(&pieces);
}

/// One piece of so many pages, all of it memory.
fn long_frame(case: &mut Case, pages: usize) {
    case.start();
    let (start, end) = memory::free();
    let len = ((pages * DATA) as u64).min(end - start);
    case.send(&[(start, len as u32, 0)]);
}

/// A frame in as many pieces as the queue has descriptors, one byte each.
fn frame_in_bytes(case: &mut Case) {
    case.start();
    case.good();
    let pieces: Vec<Piece> = (0..u64::from(SIZE))
        .map(|i| (case.data + i, 1, 0))
        .collect();
    case.send(&pieces);
}

/// A good frame behind a header that makes no sense, with all offloads negotiated.
fn header(case: &mut Case, bytes: [u8; HEADER]) {
    case.features = OFFLOADS;
    case.start();
    let pieces = case.good();
    // SAFETY: the page was taken for the case.
    unsafe { (case.data as *mut [u8; HEADER]).write_volatile(bytes) };
    case.send(&pieces);
}

/// A queue full of buffers of one kind, all in the same place; time passes for frames to come.
fn buffers(case: &mut Case, features: u64, len: u32, flags: u16) {
    case.features = features;
    case.start();
    case.chain(case.rings[0], &[(case.data, len, flags)]);
    for _ in 0..SIZE {
        case.offer(0, 1);
    }
    case.notify();
    clock::wait(20, || false);
}

fn buffer_readable(case: &mut Case) {
    buffers(case, 0, DATA as u32, 0);
    case.ok = case.untouched();
}
