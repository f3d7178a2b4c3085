// SPDX-License-Identifier: Apache-2.0
//! Transmitting, without a worker, so that each step is seen.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::{Bytes, GuestAddress};

use super::{ends, frame, signals};
use crate::device::feature;
use crate::memory::GuestMemory;
use crate::net::announce::Announcer;
use crate::net::counters::NetCounts;
use crate::net::tx::Tx;
use crate::net::{BATCH, MAX_FRAME, NetCounters, Tap};
use crate::queue::QueueError;
use crate::signals::DeviceSignals;
use crate::testing::{BUFFERS, Driver, MEMORY_END, NEXT, Piece, memory, readable, writable};

struct Rig {
    tx: Tx,
    driver: Driver,
    wire: UnixStream,
    signals: DeviceSignals,
    interrupts: Arc<AtomicU32>,
    counters: Arc<NetCounters>,
}

impl Rig {
    fn new(size: u16, features: u64) -> Self {
        Self::over(memory(), size, features)
    }

    fn over(memory: GuestMemory, size: u16, features: u64) -> Self {
        let (tap, wire) = Tap::mock();
        let (signals, interrupts) = signals();
        let driver = Driver::new(memory, size);
        let counters = Arc::<NetCounters>::default();
        Self {
            tx: Tx::new(
                driver.queue(features),
                &driver.memory,
                ends(&Arc::new(tap), &counters),
                Arc::new(Announcer::new(None).unwrap()),
            ),
            driver,
            wire,
            signals,
            interrupts,
            counters,
        }
    }

    fn process(&mut self) -> Result<bool, QueueError> {
        self.tx.process(&self.signals, None)
    }

    fn put(&self, address: u64, data: &[u8]) {
        self.driver
            .memory
            .write_slice(data, GuestAddress(address))
            .unwrap();
    }

    /// Makes `frame` available, in one buffer at the start of those there are.
    fn add(&mut self, frame: &[u8]) {
        self.put(BUFFERS, frame);
        self.driver.add(&[readable(BUFFERS, frame.len() as u32)]);
    }

    /// The next frame on the wire.
    fn sent(&mut self) -> Vec<u8> {
        let mut data = vec![0; 2 * MAX_FRAME];
        let len = self.wire.read(&mut data).unwrap();
        data.truncate(len);
        data
    }

    fn is_wire_empty(&mut self) -> bool {
        self.wire.set_nonblocking(true).unwrap();
        let empty = self.wire.read(&mut [0; 1]).is_err();
        self.wire.set_nonblocking(false).unwrap();
        empty
    }

    fn used(&mut self) -> Vec<u32> {
        std::iter::from_fn(|| self.driver.take_used().map(|used| used.len)).collect()
    }

    fn interrupts(&self) -> u32 {
        self.interrupts.swap(0, Ordering::SeqCst)
    }

    fn counts(&self) -> NetCounts {
        self.counters.get()
    }
}

#[test]
fn a_frame_is_put_together_from_its_buffers() {
    let mut rig = Rig::new(16, 0);
    let whole = frame(1000, 3);
    let cuts = [0..5, 5..12, 12..13, 13..13, 13..900, 900..1000];
    let mut pieces = Vec::new();
    for (place, cut) in (0..).zip(cuts) {
        let address = BUFFERS + 0x1000 * (6 - place);
        rig.put(address, &whole[cut.clone()]);
        pieces.push(readable(address, cut.len() as u32));
    }
    rig.driver.add(&pieces);
    assert!(rig.process().unwrap());
    assert!(rig.sent() == whole);
    assert_eq!(rig.used(), [0]);
    assert_eq!(rig.interrupts(), 1);
    assert!(!rig.process().unwrap());
    assert_eq!(rig.interrupts(), 0);
    let counts = rig.counts();
    assert_eq!((counts.tx_frames, counts.tx_bytes), (1, 988));
}

#[test]
fn what_cannot_be_a_frame_is_dropped_and_the_next_one_sent() {
    let max = MAX_FRAME as u32;
    let bad: [Vec<Piece>; 9] = [
        vec![readable(BUFFERS, 0)],
        vec![readable(BUFFERS, 12)],
        vec![readable(BUFFERS, max + 1)],
        vec![readable(BUFFERS, u32::MAX), readable(BUFFERS, 14)],
        vec![readable(BUFFERS, 12), readable(BUFFERS, u32::MAX)],
        vec![readable(MEMORY_END, 100)],
        vec![readable(BUFFERS, 12), readable(MEMORY_END - 99, 100)],
        vec![readable(u64::MAX, 100)],
        vec![writable(BUFFERS, 100)],
    ];
    for pieces in bad {
        let mut rig = Rig::new(16, 0);
        rig.driver.add(&pieces);
        rig.add(&frame(100, 1));
        rig.process().unwrap();
        assert_eq!(rig.used(), [0, 0]);
        assert!(rig.sent() == frame(100, 1), "after {pieces:x?}");
        assert!(rig.is_wire_empty());
        assert_eq!(rig.counts().tx_bad_chains, 1);
        assert_eq!(rig.counts().tx_frames, 1);
    }
}

#[test]
fn the_device_writes_nothing() {
    let mut rig = Rig::new(16, 0);
    rig.put(BUFFERS + 0x1000, &[0x55; 100]);
    rig.put(BUFFERS, &frame(100, 1));
    rig.driver
        .add(&[readable(BUFFERS, 100), writable(BUFFERS + 0x1000, 100)]);
    rig.process().unwrap();
    assert!(rig.sent() == frame(100, 1));
    assert_eq!(rig.used(), [0]);
    assert_eq!(
        super::read(&rig.driver.memory, BUFFERS + 0x1000, 100),
        [0x55; 100]
    );
}

#[test]
fn frames_of_the_largest_size_are_sent() {
    let mut rig = Rig::new(16, 0);
    rig.add(&frame(MAX_FRAME, 9));
    rig.process().unwrap();
    assert!(rig.sent() == frame(MAX_FRAME, 9));
}

#[test]
fn a_frame_in_a_thousand_pieces_is_sent() {
    let mut rig = Rig::new(1024, 0);
    let whole = frame(1000, 1);
    let mut pieces = Vec::new();
    for (address, byte) in (BUFFERS..).step_by(16).zip(&whole) {
        rig.put(address, &[*byte]);
        pieces.push(readable(address, 1));
    }
    rig.driver.add(&pieces);
    rig.process().unwrap();
    assert!(rig.sent() == whole);
}

#[test]
fn more_pieces_than_the_host_takes_are_dropped() {
    // The last piece lies over a border of two mappings, which makes one more of it.
    let border = 0x40_0000;
    let memory =
        GuestMemory::from_ranges(&[(GuestAddress(0), 0x40_0000), (GuestAddress(border), 0x1000)]);
    let mut rig = Rig::over(memory.unwrap(), 1024, 0);
    let mut pieces = vec![readable(BUFFERS, 1); 1023];
    pieces.push(readable(border - 1, 2));
    rig.driver.add(&pieces);
    rig.process().unwrap();
    assert_eq!(rig.used(), [0]);
    assert!(rig.is_wire_empty());
    assert_eq!(rig.counts().tx_errors, 1);
}

#[test]
fn a_full_wire_drops_and_does_not_wait() {
    let mut rig = Rig::new(16, 0);
    let mut sent = 0;
    while rig.counts().tx_errors == 0 {
        rig.add(&frame(60000, sent));
        assert!(rig.process().unwrap());
        assert_eq!(rig.used(), [0]);
        sent += 1;
        assert!(sent < 250, "the wire never fills");
    }
    for seed in 0..sent - 1 {
        assert!(rig.sent() == frame(60000, seed));
    }
}

#[test]
fn a_broken_ring_is_an_error() {
    let breaks: [fn(&mut Driver); 4] = [
        |driver| {
            driver.set_descriptor(0, (BUFFERS, 100, NEXT, 0));
            driver.offer(0);
        },
        |driver| {
            driver.add(&[writable(BUFFERS, 100), readable(BUFFERS, 100)]);
        },
        |driver| driver.offer(16),
        |driver| driver.set_avail_index(0x8000),
    ];
    for (number, break_it) in breaks.into_iter().enumerate() {
        let mut rig = Rig::new(16, 0);
        break_it(&mut rig.driver);
        assert!(rig.process().is_err(), "break {number}");
        assert!(rig.is_wire_empty());
    }
}

#[test]
fn one_call_sends_a_batch_and_one_interrupt() {
    let mut rig = Rig::new(256, 0);
    for _ in 0..BATCH + 10 {
        rig.add(&frame(60, 1));
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
    let mut rig = Rig::new(16, feature::EVENT_IDX);
    rig.driver.set_used_event(2);
    for expected in [0, 0, 1, 0] {
        rig.add(&frame(60, 1));
        rig.process().unwrap();
        assert_eq!(rig.interrupts(), expected);
        rig.sent();
    }
}
