// SPDX-License-Identifier: Apache-2.0
//! A balloon and its driver.

#![allow(clippy::cast_possible_truncation)]

mod control;
mod hostile;
mod queues;
mod restore;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use brume_devices::Interrupt;
use vm_memory::{Bytes, GuestAddress};

use super::host::tests::resident;
use super::{Balloon, BalloonConfig, BalloonControl, bit};
use crate::device::{StartContext, StartedQueue, VirtioDevice, feature};
use crate::memory::GuestMemory;
use crate::signals::DeviceSignals;
use crate::testing::{BUFFERS, Driver, Used, memory, readable};

/// Pages that tests let go of; the queues' rings are far below.
const PAGES: u64 = 0x40_0000;
/// Where drivers put page numbers, commands and statistics.
const SCRATCH: u64 = 0x20_0000;

/// All features that a balloon has.
fn all() -> BalloonConfig {
    BalloonConfig {
        amount_mib: 1,
        deflate_on_oom: true,
        statistics_interval_s: 3600,
        free_page_hinting: true,
        free_page_reporting: true,
    }
}

struct Rig {
    balloon: Balloon,
    control: BalloonControl,
    memory: GuestMemory,
    /// One for each queue, in order.
    drivers: Vec<Driver>,
    signals: DeviceSignals,
    interrupts: Arc<AtomicU32>,
    features: u64,
}

impl Rig {
    /// A device that runs, with a driver that has accepted all it offers.
    fn new(config: BalloonConfig) -> Self {
        Self::with_features(config, u64::MAX)
    }

    /// The same with a driver that accepts no more than `accepted`.
    fn with_features(config: BalloonConfig, accepted: u64) -> Self {
        let memory = memory();
        let balloon = Balloon::new(config).unwrap();
        let interrupts = Arc::new(AtomicU32::new(0));
        let count = interrupts.clone();
        let line = Interrupt::from_fn(move || {
            count.fetch_add(1, Ordering::SeqCst);
        });
        let drivers = (0..balloon.queue_sizes().len()).map(|index| {
            let mut driver = Driver::new(memory.clone(), 64);
            let offset = BUFFERS + 0x10000 * index as u64;
            driver.state.desc_table = offset;
            driver.state.avail_ring = offset + 0x8000;
            driver.state.used_ring = offset + 0xa000;
            driver
        });
        let mut rig = Self {
            control: balloon.control(),
            features: balloon.features() & accepted | feature::COMMON,
            balloon,
            drivers: drivers.collect(),
            memory,
            signals: DeviceSignals::new(line),
            interrupts,
        };
        rig.start();
        rig
    }

    fn start(&mut self) {
        let queue = |driver: &Driver| {
            Some(StartedQueue {
                queue: driver.queue(self.features),
                kick: driver.kick.clone(),
            })
        };
        let context = StartContext {
            memory: self.memory.clone(),
            features: self.features,
            queues: self.drivers.iter().map(queue).collect(),
            signals: self.signals.clone(),
        };
        self.balloon.start(context).unwrap();
    }

    /// Stops the device, and keeps its queues to start from.
    fn stop(&mut self) {
        let states = self.balloon.stop();
        assert_eq!(states.len(), self.drivers.len());
        for (driver, state) in self.drivers.iter_mut().zip(states) {
            driver.state = state.unwrap();
        }
    }

    /// Fills `len` bytes of the pages that are to be let go of.
    fn touch(&self, len: usize) {
        let data = vec![0xa5; len];
        self.memory.write_slice(&data, GuestAddress(PAGES)).unwrap();
        assert_eq!(resident(&self.memory, PAGES, len), len / 4096);
    }

    fn write(&self, data: &[u8]) {
        self.memory
            .write_slice(data, GuestAddress(SCRATCH))
            .unwrap();
    }

    /// Sends `data` over queue `index`; the chain's head.
    fn send(&mut self, index: usize, data: &[u8]) -> u32 {
        self.write(data);
        let head = self.drivers[index].add(&[readable(SCRATCH, data.len() as u32)]);
        self.drivers[index].kick();
        head.into()
    }

    /// Sends the numbers of `pages`, and waits until they are taken.
    fn inflate(&mut self, pages: impl IntoIterator<Item = u32>) {
        let numbers: Vec<u8> = pages.into_iter().flat_map(u32::to_le_bytes).collect();
        let head = self.send(0, &numbers);
        assert_eq!(self.used(0).head, head);
    }

    /// Waits for the next used element of queue `index`.
    fn used(&mut self, index: usize) -> Used {
        let driver = &mut self.drivers[index];
        let mut used = None;
        eventually("a buffer is used", || {
            used = driver.take_used();
            used.is_some()
        });
        used.unwrap()
    }

    /// Field `index` of the configuration space.
    fn config(&self, index: u64) -> u32 {
        let mut data = [0; 4];
        self.balloon.read_config(4 * index, &mut data);
        u32::from_le_bytes(data)
    }

    fn resident(&self, len: usize) -> usize {
        resident(&self.memory, PAGES, len)
    }
}

fn page(address: u64) -> u32 {
    u32::try_from(address >> 12).unwrap()
}

/// Waits until `condition` holds, and fails if it does not within a while.
fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(10), "not so: {what}");
        std::thread::yield_now();
    }
}

#[test]
fn features_and_queues_are_those_that_were_wanted() {
    let none = BalloonConfig {
        amount_mib: 3,
        ..BalloonConfig::default()
    };
    let balloon = Balloon::new(none).unwrap();
    assert_eq!((balloon.device_type(), balloon.features()), (5, 0));
    assert_eq!(balloon.queue_sizes().len(), 2);
    let mut space = [9; 16];
    balloon.read_config(0, &mut space);
    let mut expected = [0; 16];
    expected[..4].copy_from_slice(&768_u32.to_le_bytes());
    assert_eq!(space, expected);

    let balloon = Balloon::new(all()).unwrap();
    assert_eq!(balloon.features(), 0b10_1110);
    assert_eq!(balloon.queue_sizes().len(), 5);

    let reporting = BalloonConfig {
        free_page_reporting: true,
        ..BalloonConfig::default()
    };
    let balloon = Balloon::new(reporting).unwrap();
    assert_eq!(balloon.features(), bit::PAGE_REPORTING);
    assert_eq!(balloon.queue_sizes().len(), 3);
    assert!(
        Balloon::new(BalloonConfig {
            amount_mib: 1 << 24,
            ..BalloonConfig::default()
        })
        .is_err()
    );
}

#[test]
fn a_driver_can_write_the_actual_size_and_nothing_else() {
    let mut balloon = Balloon::new(all()).unwrap();
    let control = balloon.control();
    balloon.write_config(4, &0x1234_5678_u32.to_le_bytes());
    assert_eq!(control.actual_pages(), 0x1234_5678);
    balloon.write_config(5, &[0xff]);
    assert_eq!(control.actual_pages(), 0x1234_ff78);
    for offset in [0, 8, 12, u64::MAX - 1, u64::MAX] {
        balloon.write_config(offset, &[0xee; 4]);
    }
    let mut space = [0; 12];
    balloon.read_config(0, &mut space);
    assert_eq!(space, [0, 1, 0, 0, 0x78, 0xff, 0x34, 0x12, 0, 0, 0, 0]);
    balloon.write_config(2, &[0; 8]);
    assert_eq!((control.actual_pages(), control.target_pages()), (0, 256));
}
