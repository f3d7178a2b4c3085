// SPDX-License-Identifier: Apache-2.0
//! Receiving, without a worker, so that each step is seen.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{HEADER, ends, frame, read, signals};
use crate::device::feature;
use crate::net::counters::NetCounts;
use crate::net::rx::Rx;
use crate::net::{BATCH, NetCounters, Tap};
use crate::queue::QueueError;
use crate::signals::DeviceSignals;
use crate::testing::{BUFFERS, Driver, MEMORY_END, NEXT, Piece, WRITE, memory, readable, writable};

/// A receiving half with its driver and its wire.
struct Rig {
    rx: Option<Rx>,
    driver: Driver,
    wire: UnixStream,
    signals: DeviceSignals,
    interrupts: Arc<AtomicU32>,
    counters: Arc<NetCounters>,
    tap: Arc<Tap>,
    mergeable: bool,
    features: u64,
}

impl Rig {
    fn new(size: u16, mergeable: bool, features: u64) -> Self {
        let (tap, wire) = Tap::mock();
        let (signals, interrupts) = signals();
        let mut rig = Self {
            rx: None,
            driver: Driver::new(memory(), size),
            wire,
            signals,
            interrupts,
            counters: Arc::default(),
            tap: Arc::new(tap),
            mergeable,
            features,
        };
        rig.start();
        rig
    }

    fn mergeable(size: u16) -> Self {
        Self::new(size, true, 0)
    }

    fn start(&mut self) {
        self.rx = Some(Rx::new(
            self.driver.queue(self.features),
            &self.driver.memory,
            self.mergeable,
            ends(&self.tap, &self.counters),
        ));
    }

    /// Stops the half and starts it again from what it left.
    fn restart(&mut self) {
        self.driver.state = self.rx.take().unwrap().finish();
        self.start();
    }

    fn process(&mut self) -> Result<bool, QueueError> {
        self.rx.as_mut().unwrap().process(&self.signals, None)
    }

    /// Adds a chain for each of `lens`, one after the other in memory; their addresses.
    fn add(&mut self, lens: &[u32]) -> Vec<u64> {
        let mut address = BUFFERS;
        let mut all = Vec::new();
        for &len in lens {
            self.driver.add(&[writable(address, len)]);
            all.push(address);
            address += u64::from(len);
        }
        all
    }

    fn send(&mut self, frame: &[u8]) {
        assert_eq!(self.wire.write(frame).unwrap(), frame.len());
    }

    fn counts(&self) -> NetCounts {
        self.counters.get()
    }

    /// Lengths of all used elements that were not taken yet.
    fn used(&mut self) -> Vec<u32> {
        std::iter::from_fn(|| self.driver.take_used().map(|used| used.len)).collect()
    }

    fn interrupts(&self) -> u32 {
        self.interrupts.swap(0, Ordering::SeqCst)
    }
}

/// `frame` with the number of its buffers in its header, as the guest is to see it.
fn with_count(mut frame: Vec<u8>, buffers: u16) -> Vec<u8> {
    frame[10..12].copy_from_slice(&buffers.to_le_bytes());
    frame
}

#[test]
fn a_frame_lands_in_one_buffer() {
    let mut rig = Rig::mergeable(16);
    rig.add(&[1526, 1526]);
    // What was in the buffer must not show through in the header.
    rig.driver
        .memory
        .write_slice(&[0xee; 1526], GuestAddress(BUFFERS))
        .unwrap();
    rig.send(&frame(100, 1));
    assert!(rig.process().unwrap());
    assert_eq!(rig.used(), [100]);
    assert_eq!(
        read(&rig.driver.memory, BUFFERS, 100),
        with_count(frame(100, 1), 1)
    );
    assert_eq!(
        read(&rig.driver.memory, BUFFERS + 100, 1),
        [0xee],
        "nothing behind the frame"
    );
    assert_eq!(rig.interrupts(), 1);
    assert!(!rig.process().unwrap());
    assert_eq!(rig.interrupts(), 0, "nothing new");
    let counts = rig.counts();
    assert_eq!((counts.rx_frames, counts.rx_bytes), (1, 88));
}

#[test]
fn a_large_frame_takes_several_buffers() {
    let mut rig = Rig::mergeable(64);
    rig.add(&[1000; 12]);
    // The first comes unexpected and is copied from the spill, the second goes straight there.
    for (seed, at) in [(1, 0), (2, 4), (3, 8)] {
        rig.send(&frame(3500, seed));
        assert!(rig.process().unwrap());
        assert_eq!(rig.used(), [1000, 1000, 1000, 500]);
        let address = BUFFERS + at * 1000;
        let seen = read(&rig.driver.memory, address, 3500);
        assert!(seen == with_count(frame(3500, seed), 4), "frame {seed}");
    }
}

#[test]
fn a_frame_that_fits_exactly_takes_no_buffer_more() {
    let mut rig = Rig::mergeable(16);
    rig.add(&[1000; 5]);
    for (len, used) in [
        (2000, vec![1000, 1000]),
        (1000, vec![1000]),
        (1001, vec![1000, 1]),
    ] {
        rig.send(&frame(len, 0));
        rig.process().unwrap();
        assert_eq!(rig.used(), used);
    }
}

#[test]
fn frames_of_the_largest_size_pass() {
    let mut rig = Rig::mergeable(64);
    rig.add(&[4096; 34]);
    for seed in [1, 2] {
        rig.send(&frame(65562, seed));
        rig.process().unwrap();
        assert_eq!(rig.used().len(), 17);
        let address = BUFFERS + (u64::from(seed) - 1) * 17 * 4096;
        assert!(read(&rig.driver.memory, address, 65562) == with_count(frame(65562, seed), 17));
    }
}

#[test]
fn a_driver_with_few_buffers_gets_what_fits_and_loses_the_rest() {
    let mut rig = Rig::mergeable(16);
    rig.add(&[1000; 4]);
    rig.send(&frame(4001, 1));
    rig.send(&frame(4000, 2));
    assert!(rig.process().unwrap());
    assert_eq!(rig.used(), [1000; 4]);
    assert!(read(&rig.driver.memory, BUFFERS, 4000) == with_count(frame(4000, 2), 4));
    assert_eq!(rig.counts().rx_dropped, 1);
}

#[test]
fn a_frame_waits_for_buffers_that_the_driver_still_has() {
    let mut rig = Rig::mergeable(16);
    rig.add(&[1000; 4]);
    rig.send(&frame(1000, 1));
    rig.process().unwrap();
    assert_eq!(rig.used(), [1000]);
    // One buffer is at the driver, so this is no reason to drop.
    rig.send(&frame(3500, 2));
    assert!(!rig.process().unwrap());
    assert!(!rig.process().unwrap());
    assert!(rig.used().is_empty());
    rig.driver.add(&[writable(BUFFERS, 1000)]);
    assert!(rig.process().unwrap());
    assert_eq!(rig.used(), [1000, 1000, 1000, 500]);
    let mut seen = read(&rig.driver.memory, BUFFERS + 1000, 3000);
    seen.extend(read(&rig.driver.memory, BUFFERS, 500));
    assert!(seen == with_count(frame(3500, 2), 4));
    assert_eq!(rig.counts().rx_dropped, 0);
}

#[test]
fn without_buffers_frames_stay_on_the_wire() {
    let mut rig = Rig::mergeable(16);
    rig.send(&frame(100, 1));
    assert!(!rig.process().unwrap());
    assert!(!rig.rx.as_mut().unwrap().arm().unwrap());
    rig.add(&[1526]);
    assert!(
        rig.rx.as_mut().unwrap().arm().unwrap(),
        "a buffer came in between"
    );
    assert!(rig.process().unwrap());
    assert_eq!(rig.used(), [100]);
}

#[test]
fn kicks_are_wanted_only_without_buffers() {
    const SUPPRESSED: u16 = 1;
    let mut rig = Rig::mergeable(16);
    rig.rx.as_mut().unwrap().disarm().unwrap();
    assert_eq!(rig.driver.used_flags(), SUPPRESSED);
    rig.process().unwrap();
    rig.rx.as_mut().unwrap().arm().unwrap();
    assert_eq!(rig.driver.used_flags(), 0, "none: a kick has to wake us");
    rig.rx.as_mut().unwrap().disarm().unwrap();
    rig.add(&[1526]);
    rig.process().unwrap();
    rig.rx.as_mut().unwrap().arm().unwrap();
    assert_eq!(rig.driver.used_flags(), SUPPRESSED, "one: the TAP wakes us");
}

#[test]
fn without_mergeable_buffers_a_frame_gets_one_chain() {
    let mut rig = Rig::new(16, false, 0);
    rig.driver
        .add(&[writable(BUFFERS, 12), writable(BUFFERS + 0x1000, 1000)]);
    rig.driver.add(&[writable(BUFFERS + 0x2000, 1012)]);
    for (len, seed) in [(1013, 1), (1012, 2), (5000, 3), (500, 4)] {
        rig.send(&frame(len, seed));
    }
    rig.process().unwrap();
    assert_eq!(rig.used(), [1012, 500]);
    assert_eq!(rig.counts().rx_dropped, 2, "what does not fit is dropped");
    let mut seen = read(&rig.driver.memory, BUFFERS, 12);
    seen.extend(read(&rig.driver.memory, BUFFERS + 0x1000, 1000));
    assert!(seen == with_count(frame(1012, 2), 1));
    assert!(read(&rig.driver.memory, BUFFERS + 0x2000, 500) == with_count(frame(500, 4), 1));
}

#[test]
fn a_chain_of_a_thousand_bytes_apart_is_filled() {
    for mergeable in [true, false] {
        let mut rig = Rig::new(1024, mergeable, 0);
        let pieces: Vec<_> = (0..1000).map(|at| writable(BUFFERS + 16 * at, 1)).collect();
        rig.driver.add(&pieces);
        rig.send(&frame(900, 5));
        rig.process().unwrap();
        assert_eq!(rig.used(), [900]);
        let seen: Vec<_> = (0..900)
            .flat_map(|at| read(&rig.driver.memory, BUFFERS + 16 * at, 1))
            .collect();
        assert!(seen == with_count(frame(900, 5), 1));
        assert_eq!(read(&rig.driver.memory, BUFFERS + 16 * 900, 1), [0]);
    }
}

#[test]
fn an_indirect_chain_is_filled() {
    let mut rig = Rig::new(16, true, feature::INDIRECT_DESC);
    let table = BUFFERS + 0x10000;
    rig.driver
        .write_table(table, &[writable(BUFFERS, 12), writable(BUFFERS + 12, 500)]);
    rig.driver
        .set_descriptor(0, (table, 32, crate::testing::INDIRECT, 0));
    rig.driver.offer(0);
    rig.send(&frame(300, 1));
    rig.process().unwrap();
    assert_eq!(rig.used(), [300]);
    assert!(read(&rig.driver.memory, BUFFERS, 300) == with_count(frame(300, 1), 1));
}

/// Chains that no frame can be put in.
fn useless() -> [Vec<Piece>; 7] {
    [
        vec![readable(BUFFERS, 2000)],
        vec![writable(BUFFERS, 0)],
        vec![writable(BUFFERS, 11)],
        vec![writable(MEMORY_END, 2000)],
        vec![writable(MEMORY_END - 1000, 2000)],
        vec![writable(u64::MAX - 10, 2000)],
        vec![writable(BUFFERS, 100), writable(0x1000, u32::MAX)],
    ]
}

#[test]
fn useless_chains_go_back_empty_and_harm_nothing() {
    for mergeable in [true, false] {
        for pieces in useless() {
            let mut rig = Rig::new(16, mergeable, 0);
            rig.driver.add(&pieces);
            rig.driver.add(&[writable(BUFFERS, 1526)]);
            rig.driver.add(&pieces);
            rig.driver.add(&[writable(BUFFERS + 0x1000, 1526)]);
            rig.send(&frame(1000, 1));
            rig.send(&frame(1001, 2));
            while rig.process().unwrap() {}
            assert_eq!(rig.used(), [0, 1000, 0, 1001], "{pieces:x?}");
            assert_eq!(rig.counts().rx_bad_chains, 2);
            assert!(read(&rig.driver.memory, BUFFERS, 1000) == with_count(frame(1000, 1), 1));
        }
    }
}

#[test]
fn a_useless_chain_within_a_frame_counts_as_empty() {
    for pieces in useless() {
        let room: u32 = match &pieces[..] {
            [piece] if piece.write && piece.len < 12 => piece.len,
            _ => 0,
        };
        let mut rig = Rig::mergeable(16);
        // The first comes unexpected; the second has all its buffers when it is read.
        for seed in [1, 2] {
            rig.driver.add(&[writable(BUFFERS + 0x2000, 1000)]);
            assert!(!rig.process().unwrap());
            rig.driver.add(&pieces);
            rig.driver.add(&[writable(BUFFERS + 0x3000, 1000)]);
            rig.send(&frame(1500, seed));
            rig.process().unwrap();
            assert_eq!(rig.used(), [1000, room, 500 - room], "{pieces:x?}");
            let mut seen = read(&rig.driver.memory, BUFFERS + 0x2000, 1000);
            seen.extend(read(&rig.driver.memory, BUFFERS, room as usize));
            seen.extend(read(
                &rig.driver.memory,
                BUFFERS + 0x3000,
                500 - room as usize,
            ));
            assert!(seen == with_count(frame(1500, seed), 3), "{pieces:x?}");
        }
    }
}

#[test]
fn a_broken_ring_is_an_error() {
    let breaks: [fn(&mut Driver); 5] = [
        |driver| {
            driver.set_descriptor(0, (BUFFERS, 100, NEXT | WRITE, 1));
            driver.set_descriptor(1, (BUFFERS, 100, NEXT | WRITE, 0));
            driver.offer(0);
        },
        |driver| {
            driver.add(&[writable(BUFFERS, 100), readable(BUFFERS, 100)]);
        },
        |driver| driver.offer(16),
        |driver| driver.set_avail_index(17),
        |driver| {
            driver.set_descriptor(0, (BUFFERS, 100, NEXT | WRITE, 99));
            driver.offer(0);
        },
    ];
    for (number, break_it) in breaks.into_iter().enumerate() {
        let mut rig = Rig::mergeable(16);
        rig.send(&frame(100, 1));
        break_it(&mut rig.driver);
        assert!(rig.process().is_err(), "break {number}");
        // What was popped before goes back in order.
        rig.restart();
        assert!(rig.process().is_err(), "break {number}, once more");
    }
}

#[test]
fn chains_held_back_are_bounded_by_the_queue() {
    let mut rig = Rig::mergeable(4);
    rig.add(&[100]);
    rig.send(&frame(100, 1));
    rig.process().unwrap();
    // A frame is held, and a driver adds useless chains to it without end.
    rig.send(&frame(5000, 1));
    for _ in 0..4 {
        rig.driver.add(&[writable(BUFFERS, 0)]);
        rig.driver.add(&[writable(BUFFERS, 20)]);
        if rig.process().is_err() {
            return;
        }
    }
    assert!(rig.counts().rx_dropped > 0, "neither refused nor dropped");
}

#[test]
fn stopping_puts_waiting_chains_back() {
    let mut rig = Rig::mergeable(16);
    rig.add(&[1000; 6]);
    rig.send(&frame(2500, 1));
    rig.process().unwrap();
    // Expecting more of that kind, it holds chains for the next frame now.
    assert!(!rig.process().unwrap());
    rig.restart();
    assert_eq!(
        (rig.driver.state.next_avail, rig.driver.state.next_used),
        (3, 3)
    );
    rig.send(&frame(3000, 2));
    rig.process().unwrap();
    assert_eq!(rig.used(), [1000, 1000, 500, 1000, 1000, 1000]);
    assert!(read(&rig.driver.memory, BUFFERS + 3000, 3000) == with_count(frame(3000, 2), 3));
}

#[test]
fn stopping_with_a_frame_held_loses_that_frame_only() {
    let mut rig = Rig::mergeable(16);
    rig.add(&[1000; 3]);
    rig.send(&frame(1000, 1));
    rig.process().unwrap();
    rig.send(&frame(2500, 2));
    rig.send(&frame(1500, 3));
    assert!(!rig.process().unwrap());
    rig.restart();
    assert_eq!(rig.counts().rx_dropped, 1);
    rig.process().unwrap();
    assert_eq!(rig.used(), [1000, 1000, 500]);
    assert!(read(&rig.driver.memory, BUFFERS + 1000, 1500) == with_count(frame(1500, 3), 2));
}

#[test]
fn one_call_takes_a_batch_and_one_interrupt() {
    let mut rig = Rig::mergeable(256);
    rig.add(&[100; 200]);
    for _ in 0..BATCH + 10 {
        rig.send(&frame(60, 1));
    }
    assert!(rig.process().unwrap());
    assert_eq!(rig.used().len(), BATCH);
    assert_eq!(rig.interrupts(), 1);
    assert!(rig.process().unwrap());
    assert_eq!(rig.used().len(), 10);
    assert_eq!(rig.interrupts(), 1);
}

#[test]
fn with_event_idx_an_interrupt_comes_when_asked_for() {
    let mut rig = Rig::new(16, true, feature::EVENT_IDX);
    rig.add(&[100; 4]);
    rig.driver.set_used_event(2);
    for expected in [0, 0, 1, 0] {
        rig.send(&frame(60, 1));
        rig.process().unwrap();
        assert_eq!(rig.interrupts(), expected);
    }
}

#[test]
fn exactly_the_pages_written_are_dirty() {
    let mut rig = Rig::mergeable(16);
    let address = |page: u64| BUFFERS + page * 0x1000;
    // The tail goes by way of the spill in the first frame, and straight in the second.
    rig.driver.add(&[writable(address(0), 0x1000)]);
    rig.driver.add(&[writable(address(1), 0x2000)]);
    rig.driver.add(&[writable(address(4), 0x1000)]);
    rig.driver.add(&[writable(address(5), 0x2000)]);
    for _ in 0..2 {
        rig.send(&frame(0x1800, 1));
        rig.process().unwrap();
    }
    let region = rig.driver.memory.find_region(GuestAddress(0)).unwrap();
    let dirty: Vec<_> = (0..8)
        .filter(|&page| region.bitmap().dirty_at(address(page) as usize))
        .collect();
    assert_eq!(dirty, [0, 1, 4, 5]);
}

#[test]
fn a_wire_that_is_gone_is_no_work() {
    let mut rig = Rig::mergeable(16);
    rig.add(&[100]);
    drop(std::mem::replace(
        &mut rig.wire,
        UnixStream::pair().unwrap().0,
    ));
    assert!(!rig.process().unwrap());
    assert!(rig.used().is_empty());
}

#[derive(Clone, Debug)]
enum Step {
    Add(Vec<u16>),
    Send(u16),
    Process,
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let len = prop_oneof![4 => 12..2000u16, 1 => 0..12u16, 1 => 2000..20000u16];
    let step = prop_oneof![
        4 => prop::collection::vec(len, 1..4).prop_map(Step::Add),
        3 => (40..5000u16).prop_map(Step::Send),
        1 => (5000..65000u16).prop_map(Step::Send),
        3 => Just(Step::Process),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    /// Whatever the sizes and the order of things: frames arrive whole and in order, each in
    /// buffers of its own, and those that do not arrive were counted or are still on the wire.
    #[test]
    fn frames_arrive_whole_and_in_order(mergeable: bool, steps in steps()) {
        let mut rig = Rig::new(64, mergeable, 0);
        let mut chains = std::collections::VecDeque::new();
        let mut next_buffer = BUFFERS;
        let mut sent = Vec::new();
        let mut arrived = 0u64;
        let mut last = 0;
        for step in steps.into_iter().chain([Step::Process, Step::Process]) {
            match step {
                Step::Add(lens) => {
                    let in_flight: usize = chains.iter().map(|(_, p): &(u16, Vec<Piece>)| p.len()).sum();
                    if in_flight + lens.len() > 64 {
                        continue;
                    }
                    let pieces: Vec<_> = lens.iter().map(|&len| {
                        let address = next_buffer;
                        next_buffer += u64::from(len);
                        if next_buffer > MEMORY_END - 0x10000 {
                            next_buffer = BUFFERS;
                        }
                        writable(address, len.into())
                    }).collect();
                    chains.push_back((rig.driver.add(&pieces), pieces));
                }
                Step::Send(len) => {
                    // The socket holds only so much.
                    if sent.len() as u64 - arrived < 3 {
                        let seed = sent.len() as u8;
                        rig.send(&frame(len.into(), seed));
                        sent.push(frame(len.into(), seed));
                    }
                }
                Step::Process => { while rig.process().unwrap() {} }
                Step::Restart => rig.restart(),
            }
            let mut left = 0u16;
            let mut bytes = Vec::new();
            while let Some(used) = rig.driver.take_used() {
                let (head, pieces) = chains.pop_front().unwrap();
                prop_assert_eq!(used.head, u32::from(head));
                let mut part = used.len as usize;
                let start = bytes.len();
                for piece in &pieces {
                    let len = part.min(piece.len as usize);
                    bytes.extend(read(&rig.driver.memory, piece.address, len));
                    part -= len;
                }
                prop_assert_eq!(part, 0, "more was said to be used than there was");
                if left == 0 {
                    if used.len == 0 { continue; }
                    prop_assert!(bytes.len() - start >= HEADER);
                    left = u16::from_le_bytes([bytes[10], bytes[11]]);
                    prop_assert!(left == 1 || mergeable && left > 0);
                }
                left -= 1;
                if left == 0 {
                    bytes[10..12].fill(0);
                    let found = sent[last..].iter().position(|frame| *frame == bytes);
                    prop_assert!(found.is_some(), "a frame that was not sent, or out of order");
                    last += found.unwrap() + 1;
                    arrived += 1;
                    bytes.clear();
                }
            }
            prop_assert_eq!(left, 0, "a frame was published in parts");
        }
        let counts = rig.counts();
        prop_assert_eq!(counts.rx_frames, arrived);
        prop_assert!(arrived + counts.rx_dropped <= sent.len() as u64);
    }
}
