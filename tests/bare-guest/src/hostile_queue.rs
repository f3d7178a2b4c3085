// SPDX-License-Identifier: Apache-2.0
//! Hostile cases in descriptors, rings and indirect tables, the same for every device.

use crate::hostile::{Case, DATA, Entry, Piece, SIZE, end_of_memory, flag, reg, state};
use crate::mmio::{EVENT_IDX, INDIRECT_DESC};
use crate::{clock, params};
use alloc::vec::Vec;

/// The cases.
pub const CASES: &[Entry] = &[
    ("good-request", good_request),
    ("loop-two", |c| link_last_to(c, 0)),
    ("loop-self", loop_self),
    ("next-is-size", |c| link_last_to(c, SIZE)),
    ("next-is-65535", |c| link_last_to(c, u16::MAX)),
    ("head-is-size", |c| offer_head(c, SIZE)),
    ("head-is-65535", |c| offer_head(c, u16::MAX)),
    ("same-head-twice", same_head_twice),
    ("address-at-top", |c| pieces(c, |p| p.0 = u64::MAX - 15)),
    ("address-last-byte", |c| pieces(c, |p| p.0 = u64::MAX)),
    ("address-beyond-width", |c| pieces(c, |p| p.0 = 1 << 52)),
    ("address-of-registers", |c| pieces(c, |p| p.0 = 0xc000_1000)),
    ("address-in-hole", |c| pieces(c, |p| p.0 = 0xd000_0000)),
    ("address-over-end", |c| {
        pieces(c, |p| p.0 = end_of_memory() - 1)
    }),
    ("length-zero", |c| pieces(c, |p| p.1 = 0)),
    ("length-max", |c| pieces(c, |p| p.1 = u32::MAX)),
    ("length-huge-sectors", |c| pieces(c, |p| p.1 = 0xffff_fe00)),
    ("direction-turned", |c| pieces(c, |p| p.2 ^= flag::WRITE)),
    ("direction-all-read", direction_all_read),
    ("flags-all", |c| pieces(c, |p| p.2 |= 0xfff8)),
    ("available-ahead-17", |c| offer_step(c, SIZE + 1)),
    ("available-ahead-32768", |c| offer_step(c, 0x8000)),
    ("available-ahead-65535", |c| offer_step(c, u16::MAX)),
    ("available-back", available_back),
    ("indirect-not-negotiated", |c| indirect(c, 0, |_, _| {})),
    ("indirect-good", |c| indirect(c, INDIRECT_DESC, |_, _| {})),
    ("indirect-nested", |c| {
        indirect(c, INDIRECT_DESC, indirect_nested)
    }),
    ("indirect-loop", |c| {
        indirect(c, INDIRECT_DESC, indirect_loop)
    }),
    ("indirect-empty", |c| {
        indirect(c, INDIRECT_DESC, |_, p| p.1 = 0)
    }),
    ("indirect-odd-length", |c| {
        indirect(c, INDIRECT_DESC, |_, p| p.1 -= 1)
    }),
    ("indirect-huge", |c| {
        indirect(c, INDIRECT_DESC, |_, p| p.1 = 0xffff_fff0)
    }),
    ("indirect-over-end", |c| {
        indirect(c, INDIRECT_DESC, |_, p| p.0 = end_of_memory() - 16)
    }),
    ("indirect-beyond", |c| {
        indirect(c, INDIRECT_DESC, |_, p| p.0 = 1 << 50)
    }),
    ("indirect-with-next", |c| {
        indirect(c, INDIRECT_DESC, |_, p| p.2 |= flag::NEXT)
    }),
    ("indirect-with-write", |c| {
        indirect(c, INDIRECT_DESC, |_, p| p.2 |= flag::WRITE)
    }),
    ("indirect-long", indirect_long),
    ("rings-beyond", |c| rings(c, [1 << 50; 3])),
    ("rings-at-top", |c| rings(c, [u64::MAX - 15; 3])),
    ("rings-over-end", |c| rings(c, [end_of_memory() - 16; 3])),
    ("rings-of-registers", |c| rings(c, [0xc000_1000; 3])),
    ("rings-odd", |c| rings(c, c.rings.map(|at| at + 1))),
    ("rings-one-page", |c| rings(c, [c.rings[0]; 3])),
    ("used-over-table", |c| {
        rings(c, [c.rings[0], c.rings[1], c.rings[0]])
    }),
    ("used-beyond", |c| {
        rings(c, [c.rings[0], c.rings[1], 1 << 50])
    }),
    ("rings-at-zero", |c| rings(c, [0; 3])),
    ("size-zero", |c| size(c, 0)),
    ("size-three", |c| size(c, 3)),
    ("size-65536", |c| size(c, 0x1_0000)),
    ("size-max", |c| size(c, u32::MAX)),
    ("ring-moved-while-running", ring_moved),
    ("ring-moved-and-readied", ring_moved_and_readied),
    ("size-raised-while-running", size_raised),
    ("event-index-anywhere", event_index),
    ("reset-in-flight", reset_in_flight),
    ("broken-and-reset", broken_and_reset),
];

/// Waits until `count` requests were used; says whether they were.
fn served(case: &Case, count: u16) -> bool {
    clock::wait(clock::LONG_MS, || case.used() == count)
}

/// No attack: the machinery itself must work, or no other case means anything.
fn good_request(case: &mut Case) {
    case.start();
    let pieces = case.good();
    case.send(&pieces);
    case.ok = case.queue_waits() || served(case, 1);
}

impl Case {
    /// Whether a request stays with the device until something else happens: a receive buffer.
    pub fn queue_waits(&mut self) -> bool {
        let pieces = self.good();
        pieces.len() == 1 && pieces[0].2 & flag::WRITE != 0
    }
}

/// A good request with its last descriptor leading on.
fn link_last_to(case: &mut Case, next: u16) {
    case.start();
    let pieces = case.good();
    let last = pieces.len() - 1;
    case.chain(case.rings[0], &pieces);
    let (address, len, flags) = pieces[last];
    case.describe(
        case.rings[0],
        last as u16,
        (address, len, flags | flag::NEXT),
        next,
    );
    case.offer(0, 1);
    case.notify();
}

fn loop_self(case: &mut Case) {
    case.start();
    let (address, len, flags) = case.good()[0];
    case.describe(case.rings[0], 0, (address, len, flags | flag::NEXT), 0);
    case.offer(0, 1);
    case.notify();
}

fn offer_head(case: &mut Case, head: u16) {
    case.start();
    let pieces = case.good();
    case.chain(case.rings[0], &pieces);
    case.offer(head, 1);
    case.notify();
}

fn same_head_twice(case: &mut Case) {
    case.start();
    let pieces = case.good();
    case.chain(case.rings[0], &pieces);
    case.offer(0, 1);
    case.offer(0, 1);
    case.notify();
}

/// A good request with every piece changed alike.
fn pieces(case: &mut Case, change: fn(&mut Piece)) {
    case.start();
    let mut pieces = case.good();
    pieces.iter_mut().for_each(change);
    case.send(&pieces);
}

/// What the device may only read, it must not write.
fn direction_all_read(case: &mut Case) {
    case.start();
    let mut pieces = case.good();
    pieces.iter_mut().for_each(|piece| piece.2 = 0);
    case.send(&pieces);
    clock::wait(20, || false);
    // A frame to send lies in the data page, and is no canary.
    case.ok = case.queue == 1 || case.untouched();
}

fn offer_step(case: &mut Case, step: u16) {
    case.start();
    let pieces = case.good();
    case.chain(case.rings[0], &pieces);
    case.offer(0, step);
    case.notify();
}

fn available_back(case: &mut Case) {
    case.start();
    let pieces = case.good();
    case.send(&pieces);
    clock::wait(20, || case.used() == 1);
    case.offer(0, u16::MAX);
    case.notify();
}

/// A good request in an indirect table on the spare page, after `change`, which gets the table's
/// own descriptor.
fn indirect(case: &mut Case, features: u64, change: fn(&mut Case, &mut Piece)) {
    case.features = features;
    case.start();
    let pieces = case.good();
    case.chain(case.spare, &pieces);
    let mut table = (case.spare, 16 * pieces.len() as u32, flag::INDIRECT);
    change(case, &mut table);
    case.describe(case.rings[0], 0, table, 1);
    case.offer(0, 1);
    case.notify();
}

fn indirect_nested(case: &mut Case, _: &mut Piece) {
    case.describe(case.spare, 0, (case.spare, 16, flag::INDIRECT), 0);
}

fn indirect_loop(case: &mut Case, _: &mut Piece) {
    let (address, len, flags) = case.good()[0];
    case.describe(case.spare, 0, (address, len, flags | flag::NEXT), 0);
}

/// A table of a page, far longer than the queue.
fn indirect_long(case: &mut Case) {
    case.features = INDIRECT_DESC;
    case.start();
    let pieces: Vec<Piece> = (0..DATA / 16).map(|_| (case.data, 16, 0)).collect();
    case.chain(case.spare, &pieces);
    case.describe(
        case.rings[0],
        0,
        (case.spare, DATA as u32, flag::INDIRECT),
        0,
    );
    case.offer(0, 1);
    case.notify();
}

/// Rings in wrong places; the requests are offered at the right ones.
fn rings(case: &mut Case, rings: [u64; 3]) {
    case.begin();
    case.place_others();
    case.place(case.queue, rings, SIZE.into());
    case.set(reg::QUEUE_READY, 1);
    case.set_status(state::RUNNING);
    let pieces = case.good();
    case.send(&pieces);
}

fn size(case: &mut Case, size: u32) {
    case.begin();
    case.place_others();
    case.place(case.queue, case.rings, size);
    case.set(reg::QUEUE_READY, 1);
    case.set_status(state::RUNNING);
    let pieces = case.good();
    case.send(&pieces);
}

/// Addresses written to a running queue change nothing.
fn ring_moved(case: &mut Case) {
    case.start();
    case.place(case.queue, [1 << 50; 3], SIZE.into());
    let pieces = case.good();
    case.send(&pieces);
    case.ok = case.queue_waits() || served(case, 1);
}

fn ring_moved_and_readied(case: &mut Case) {
    case.start();
    case.set(reg::QUEUE_READY, 0);
    case.place(case.queue, [1 << 50; 3], SIZE.into());
    case.set(reg::QUEUE_READY, 1);
    let pieces = case.good();
    case.send(&pieces);
}

/// A size written to a running queue changes nothing: with 16 slots, the 17th request is found in
/// the first one.
fn size_raised(case: &mut Case) {
    case.start();
    case.set(reg::QUEUE_SEL, case.queue);
    case.set(reg::QUEUE_NUM, 0x8000);
    if case.queue_waits() {
        let pieces = case.good();
        case.send(&pieces);
        return;
    }
    for count in 1..=SIZE + 1 {
        let pieces = case.good();
        case.send(&pieces);
        case.ok &= served(case, count);
    }
}

/// Every value of `used_event` is allowed.
fn event_index(case: &mut Case) {
    case.features = EVENT_IDX;
    case.start();
    let used_event = (case.rings[1] + 4 + 2 * u64::from(SIZE)) as *mut u16;
    let waits = case.queue_waits();
    for (count, event) in (1..).zip([0, 1, 2, 0x7fff, 0x8000, 0xffff, 5]) {
        // SAFETY: the ring is a page that the case took.
        unsafe { used_event.write_volatile(event) };
        let pieces = case.good();
        case.send(&pieces);
        case.ok &= waits || served(case, count);
    }
}

/// Fills the queue and resets at once, many times over. After a reset the device must leave the
/// buffers alone.
fn reset_in_flight(case: &mut Case) {
    for _ in 0..50 {
        case.restart();
        let pieces = case.good();
        case.chain(case.rings[0], &pieces);
        for _ in 0..SIZE {
            case.offer(0, 1);
        }
        case.notify();
        case.set(reg::STATUS, 0);
        case.ok &= clock::wait(clock::LONG_MS, || case.get(reg::STATUS) == 0);
        case.fill();
        clock::wait(1, || false);
        case.ok &= case.untouched();
    }
}

/// Breaks the queue and resets, many times over: each is worth a line in the VMM's log, all
/// together are not.
fn broken_and_reset(case: &mut Case) {
    for _ in 0..params::number("bare.breaks", 200) {
        case.restart();
        let pieces = case.good();
        case.chain(case.rings[0], &pieces);
        case.offer(SIZE, 1);
        case.notify();
        clock::wait(5, || case.get(reg::STATUS) & state::NEEDS_RESET != 0);
    }
}
