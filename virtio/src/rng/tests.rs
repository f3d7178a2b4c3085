// SPDX-License-Identifier: Apache-2.0
//! An entropy device and its driver.

mod restore;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::Rng;
use crate::device::{VirtioDevice, feature};
use crate::limiter::LimiterUpdate;
use crate::testing::{BUFFERS, Driver, MEMORY_END, NEXT, Used, memory, readable, writable};

struct Rig {
    rng: Rng,
    driver: Driver,
    interrupts: Arc<AtomicU32>,
}

impl Rig {
    /// A device that runs.
    fn new() -> Self {
        let mut rig = Self {
            rng: Rng::new(LimiterUpdate::default()).unwrap(),
            driver: Driver::new(memory(), 16),
            interrupts: Arc::default(),
        };
        let context = rig.driver.context(feature::COMMON, &rig.interrupts);
        rig.rng.start(context).unwrap();
        rig
    }

    /// Waits for the next used element.
    fn used(&mut self) -> Used {
        self.driver.kick();
        let start = Instant::now();
        loop {
            if let Some(used) = self.driver.take_used() {
                return used;
            }
            assert!(start.elapsed() < Duration::from_secs(10), "nothing is used");
            std::thread::yield_now();
        }
    }

    fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        let at = GuestAddress(address);
        self.driver.memory.read_slice(&mut data, at).unwrap();
        data
    }
}

#[test]
fn the_device_is_an_entropy_source_with_one_queue() {
    let rng = Rng::new(LimiterUpdate::default()).unwrap();
    assert_eq!((rng.device_type(), rng.queue_sizes().len()), (4, 1));
    assert_eq!(rng.features(), 0);
    let mut data = [9; 8];
    rng.read_config(0, &mut data);
    assert_eq!(data, [0; 8]);
}

#[test]
fn a_request_gets_random_bytes_in_all_its_buffers_and_nowhere_else() {
    let mut rig = Rig::new();
    let head = rig.driver.add(&[
        readable(BUFFERS, 64),
        writable(BUFFERS + 0x1000, 6000),
        writable(BUFFERS + 0x4000, 1000),
    ]);
    let used = rig.used();
    assert_eq!((used.head, used.len), (head.into(), 7000));
    assert_eq!(rig.bytes(BUFFERS, 64), [0; 64], "what is not for us");
    for (address, len) in [(0x1000, 6000), (0x4000, 1000)] {
        let zeroes = |bytes: &[u8]| bytes.iter().filter(|&&b| b == 0).count();
        let bytes = rig.bytes(BUFFERS + address, len);
        // One in 256 is zero; far more would be bytes that were left out.
        assert!(zeroes(&bytes) < len / 50, "{} of {len}", zeroes(&bytes));
        assert_eq!(rig.bytes(BUFFERS + address + len as u64, 16), [0; 16]);
    }
    assert!(rig.interrupts.load(Ordering::SeqCst) > 0);
}

#[test]
fn two_requests_get_different_bytes() {
    let mut rig = Rig::new();
    rig.driver.add(&[writable(BUFFERS, 32)]);
    rig.driver.add(&[writable(BUFFERS + 32, 32)]);
    rig.used();
    rig.used();
    assert_ne!(rig.bytes(BUFFERS, 32), rig.bytes(BUFFERS + 32, 32));
}

#[test]
fn a_request_gets_no_more_than_the_limit_however_long_it_is() {
    let mut rig = Rig::new();
    // The same pages again and again.
    let len = u32::try_from(MEMORY_END - BUFFERS).unwrap();
    let head = rig.driver.add(&[writable(BUFFERS, len); 8]);
    let used = rig.used();
    assert_eq!((used.head, used.len), (head.into(), 64 * 1024));
    assert_eq!(rig.bytes(BUFFERS + 64 * 1024, 4096), vec![0; 4096]);
}

#[test]
fn a_request_without_room_gets_nothing_and_the_next_is_served() {
    let mut rig = Rig::new();
    for pieces in [
        [readable(BUFFERS, 64)],
        [writable(BUFFERS, 0)],
        [writable(MEMORY_END, 64)],
        [writable(u64::MAX - 8, u32::MAX)],
    ] {
        rig.driver.add(&pieces);
        assert_eq!(rig.used().len, 0, "{pieces:?}");
    }
    rig.driver.add(&[writable(BUFFERS, 64)]);
    assert_eq!(rig.used().len, 64);
    assert_eq!(rig.rng.stop().len(), 1);
}

#[test]
fn a_loop_in_the_ring_stops_the_device_and_nothing_else() {
    let mut rig = Rig::new();
    rig.rng.stop();
    let context = rig.driver.context(0, &rig.interrupts);
    let signals = context.signals.clone();
    rig.rng.start(context).unwrap();
    rig.driver.set_descriptor(0, (BUFFERS, 16, NEXT | 2, 0));
    rig.driver.offer(0);
    rig.driver.kick();
    let start = Instant::now();
    while !signals.is_reset_needed() {
        assert!(start.elapsed() < Duration::from_secs(10));
        std::thread::yield_now();
    }
    assert_eq!(rig.driver.take_used(), None);
    assert_eq!(rig.rng.stop().len(), 1);
}

#[test]
fn a_stopped_device_goes_on_where_it_was() {
    let mut rig = Rig::new();
    rig.driver.add(&[writable(BUFFERS, 64)]);
    rig.used();
    let states = rig.rng.stop();
    rig.driver.state = states[0].unwrap();
    rig.driver.add(&[writable(BUFFERS, 32)]);
    let context = rig.driver.context(feature::COMMON, &rig.interrupts);
    rig.rng.start(context).unwrap();
    assert_eq!(rig.used().len, 32);
}
