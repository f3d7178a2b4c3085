// SPDX-License-Identifier: Apache-2.0
//! The registers, driven in the right order and in every wrong one.

#![allow(
    clippy::cast_possible_truncation,
    reason = "the numbers of a test are known to fit"
)]

use std::sync::{Arc, Mutex};

use brume_devices::Interrupt;
use proptest::collection::vec;
use proptest::prelude::*;
use vm_memory::Bytes;
use vm_memory::GuestAddress;

use super::*;
use crate::device::{
    StartContext, StartError, StartedQueue, VirtioDevice, feature, read_config_bytes,
};
use crate::signals::DeviceSignals;
use crate::testing::{MEMORY_END, memory};

// Registers (virtio 1.3, section 4.2.2).
const DEVICE_FEATURES: u64 = 0x10;
const DEVICE_FEATURES_SEL: u64 = 0x14;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SEL: u64 = 0x24;
const QUEUE_SEL: u64 = 0x30;
const QUEUE_NUM_MAX: u64 = 0x34;
const QUEUE_NUM: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACK: u64 = 0x64;
const STATUS: u64 = 0x70;
const QUEUE_DESC_LOW: u64 = 0x80;
const QUEUE_DRIVER_LOW: u64 = 0x90;
const QUEUE_DEVICE_LOW: u64 = 0xa0;
const CONFIG_GENERATION: u64 = 0xfc;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;
const FAILED: u32 = 128;

const DEVICE_FEATURE: u64 = 1 << 5 | 1 << 40;
const SIZES: [u16; 3] = [256, 64, 1];
const CONFIG_SPACE: [u8; 10] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10];

/// What happened to a [`Fake`].
#[derive(Default)]
struct Log {
    starts: Vec<StartContext>,
    stops: u32,
    config_writes: Vec<(u64, Vec<u8>)>,
    refuses: bool,
}

/// A device that runs while it holds a context, and gives back the queues it was started with.
struct Fake(Arc<Mutex<Log>>, Option<Vec<Option<QueueState>>>);

impl VirtioDevice for Fake {
    fn device_type(&self) -> u32 {
        42
    }

    fn features(&self) -> u64 {
        DEVICE_FEATURE
    }

    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&CONFIG_SPACE, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut log = self.0.lock().unwrap();
        log.config_writes.push((offset, data.to_vec()));
    }

    fn start(&mut self, context: StartContext) -> Result<(), StartError> {
        assert!(self.1.is_none(), "started while it runs");
        let mut log = self.0.lock().unwrap();
        if log.refuses {
            return Err("it does not like to".into());
        }
        let state = |queue: &Option<StartedQueue>| queue.as_ref().map(|q| q.queue.state());
        self.1 = Some(context.queues.iter().map(state).collect());
        log.starts.push(context);
        Ok(())
    }

    fn stop(&mut self) -> Vec<Option<QueueState>> {
        let Some(queues) = self.1.take() else {
            return Vec::new();
        };
        self.0.lock().unwrap().stops += 1;
        queues
    }
}

struct Bench {
    mmio: MmioTransport,
    log: Arc<Mutex<Log>>,
    raised: Arc<Mutex<u32>>,
}

impl Bench {
    fn new() -> Self {
        let log = Arc::<Mutex<Log>>::default();
        let raised = Arc::<Mutex<u32>>::default();
        let count = raised.clone();
        let line = Interrupt::from_fn(move || *count.lock().unwrap() += 1);
        let device = Box::new(Fake(log.clone(), None));
        let core = TransportCore::new(device, memory(), DeviceSignals::new(line)).unwrap();
        Self {
            mmio: MmioTransport::new(core),
            log,
            raised,
        }
    }

    fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0xaa; 4];
        self.mmio.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.mmio.write(offset, &value.to_le_bytes());
    }

    fn status(&mut self) -> u32 {
        self.read(STATUS)
    }

    fn set_features(&mut self, features: u64) {
        for half in [0, 1] {
            self.write(DRIVER_FEATURES_SEL, half);
            self.write(DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
    }

    /// Up to FEATURES_OK, with all that is offered.
    fn negotiate(&mut self) {
        self.write(STATUS, ACKNOWLEDGE);
        self.write(STATUS, ACKNOWLEDGE | DRIVER);
        self.set_features(DEVICE_FEATURE | feature::COMMON);
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_eq!(self.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }

    fn set_queue(&mut self, index: u32, size: u32, base: u32) {
        self.write(QUEUE_SEL, index);
        self.write(QUEUE_NUM, size);
        self.write(QUEUE_DESC_LOW, base);
        self.write(QUEUE_DRIVER_LOW, base + 0x2000);
        self.write(QUEUE_DEVICE_LOW, base + 0x4000);
        self.write(QUEUE_READY, 1);
    }

    /// All the way, with queue 0 in use.
    fn run(&mut self) {
        self.negotiate();
        self.set_queue(0, 16, 0x1000);
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        assert_eq!(
            self.status(),
            ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
        );
    }

    fn starts(&self) -> usize {
        self.log.lock().unwrap().starts.len()
    }

    fn stops(&self) -> u32 {
        self.log.lock().unwrap().stops
    }

    /// The state of the queues at the last start.
    fn started(&self) -> Vec<Option<QueueState>> {
        let log = self.log.lock().unwrap();
        let context = log.starts.last().expect("started");
        let state = |queue: &Option<StartedQueue>| queue.as_ref().map(|q| q.queue.state());
        context.queues.iter().map(state).collect()
    }

    fn signals(&mut self) -> DeviceSignals {
        self.mmio.core().signals().clone()
    }
}

fn queue_state(max_size: u16, size: u16, base: u64) -> QueueState {
    QueueState {
        size,
        ready: true,
        desc_table: base,
        avail_ring: base + 0x2000,
        used_ring: base + 0x4000,
        ..QueueState::new(max_size)
    }
}

#[test]
fn the_first_registers_say_what_this_is() {
    let mut bench = Bench::new();
    assert_eq!(bench.read(0), u32::from_le_bytes(*b"virt"));
    assert_eq!(bench.read(4), 2);
    assert_eq!(bench.read(8), 42);
    assert_eq!(bench.status(), 0);
    for (half, expected) in [
        (0, 1 << 5 | 3 << 28),
        (1, 1 | 1 << 8),
        (2, 0),
        (u32::MAX, 0),
    ] {
        bench.write(DEVICE_FEATURES_SEL, half);
        assert_eq!(bench.read(DEVICE_FEATURES), expected, "half {half}");
    }
    for (index, size) in [(0, 256), (1, 64), (2, 1), (3, 0), (u32::MAX, 0)] {
        bench.write(QUEUE_SEL, index);
        assert_eq!(bench.read(QUEUE_NUM_MAX), size, "queue {index}");
        assert_eq!(bench.read(QUEUE_READY), 0);
    }
    // No shared memory region (section 4.2.2: length and base of all ones).
    for offset in [0xb0, 0xb4, 0xb8, 0xbc] {
        assert_eq!(bench.read(offset), u32::MAX);
    }
}

#[test]
fn a_driver_that_goes_by_the_book_starts_the_device_once() {
    let mut bench = Bench::new();
    bench.negotiate();
    bench.set_queue(0, 16, 0x1000);
    bench.set_queue(2, 1, 0x1_0000);
    assert_eq!(bench.read(QUEUE_READY), 1);
    assert_eq!(bench.starts(), 0);
    bench.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    bench.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    assert_eq!(bench.starts(), 1);
    let expected = [
        Some(queue_state(256, 16, 0x1000)),
        None,
        Some(queue_state(1, 1, 0x1_0000)),
    ];
    assert_eq!(bench.started(), expected);
    let log = bench.log.lock().unwrap();
    assert_eq!(log.starts[0].features, DEVICE_FEATURE | feature::COMMON);
}

#[test]
fn addresses_have_64_bits() {
    let mut bench = Bench::new();
    bench.negotiate();
    bench.write(QUEUE_SEL, 0);
    for register in [QUEUE_DESC_LOW, QUEUE_DRIVER_LOW, QUEUE_DEVICE_LOW] {
        bench.write(register + 4, 0x1234_5678);
        bench.write(register, 0x9abc_def0);
    }
    let queue = *bench.mmio.core().queue(0).unwrap();
    let address = 0x1234_5678_9abc_def0;
    assert_eq!(queue.desc_table, address);
    assert_eq!(queue.avail_ring, address);
    assert_eq!(queue.used_ring, address);
}

#[test]
fn features_without_version_1_or_that_were_not_offered_are_refused() {
    let good = DEVICE_FEATURE | feature::COMMON;
    let unoffered = (0..64)
        .map(|bit| 1_u64 << bit)
        .filter(|bit| bit & good == 0);
    let bad = unoffered
        .map(|bit| good | bit)
        .chain([0, good & !feature::VERSION_1, u64::MAX]);
    for features in bad {
        let mut bench = Bench::new();
        bench.write(STATUS, ACKNOWLEDGE | DRIVER);
        bench.set_features(features);
        bench.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_eq!(bench.status(), ACKNOWLEDGE | DRIVER, "{features:#x}");
        bench.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        assert_eq!((bench.status(), bench.starts()), (ACKNOWLEDGE | DRIVER, 0));
        // It may think again.
        bench.set_features(feature::VERSION_1);
        bench.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_eq!(bench.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }
}

#[test]
fn features_are_set_between_driver_and_features_ok() {
    let mut bench = Bench::new();
    bench.set_features(feature::VERSION_1);
    bench.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_eq!(bench.status(), ACKNOWLEDGE | DRIVER, "set too early");
    bench.set_features(feature::VERSION_1);
    bench.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    bench.set_features(feature::COMMON);
    bench.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    assert_eq!(
        bench.log.lock().unwrap().starts[0].features,
        feature::VERSION_1,
        "set too late"
    );
}

#[test]
fn no_step_can_be_left_out() {
    for jump in [
        FEATURES_OK,
        DRIVER_OK,
        FEATURES_OK | DRIVER_OK,
        DRIVER | DRIVER_OK,
    ] {
        let mut bench = Bench::new();
        bench.set_features(feature::VERSION_1);
        bench.write(STATUS, jump);
        assert_eq!(bench.status(), jump & DRIVER);
        assert_eq!(bench.starts(), 0);
    }
    let mut bench = Bench::new();
    bench.negotiate();
    bench.write(STATUS, FAILED);
    bench.write(STATUS, DRIVER_OK);
    assert_eq!(bench.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK | FAILED);
    assert_eq!(bench.starts(), 0);
}

#[test]
fn status_bits_stay_and_what_is_not_the_drivers_to_set_is_not_set() {
    let mut bench = Bench::new();
    bench.run();
    bench.write(STATUS, ACKNOWLEDGE);
    bench.write(STATUS, 0xffff_ff00 | NEEDS_RESET | 16 | 32);
    assert_eq!(
        bench.status(),
        ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    );
}

#[test]
fn queues_cannot_be_set_up_before_the_features_are_agreed() {
    let mut bench = Bench::new();
    let untouched = QueueState::new(256);
    bench.set_queue(0, 16, 0x1000);
    assert_eq!(bench.mmio.core().queue(0), Some(&untouched));
    bench.write(STATUS, ACKNOWLEDGE | DRIVER);
    bench.set_queue(0, 16, 0x1000);
    assert_eq!(bench.mmio.core().queue(0), Some(&untouched));
}

#[test]
fn a_queue_that_is_ready_cannot_be_changed() {
    let mut bench = Bench::new();
    bench.negotiate();
    bench.set_queue(0, 16, 0x1000);
    bench.set_queue(0, 32, 0x1_0000);
    assert_eq!(
        bench.mmio.core().queue(0),
        Some(&queue_state(256, 16, 0x1000))
    );
    bench.write(QUEUE_READY, 0);
    bench.set_queue(0, 32, 0x1_0000);
    assert_eq!(
        bench.mmio.core().queue(0),
        Some(&queue_state(256, 32, 0x1_0000))
    );
}

#[test]
fn a_ring_cannot_be_moved_or_grown_or_added_while_the_device_runs() {
    let mut bench = Bench::new();
    bench.run();
    bench.write(QUEUE_READY, 0);
    assert_eq!(bench.read(QUEUE_READY), 1);
    bench.set_queue(0, 256, 0x10_0000);
    bench.set_queue(1, 64, 0x10_0000);
    assert_eq!(
        bench.mmio.core().queue(0),
        Some(&queue_state(256, 16, 0x1000))
    );
    assert_eq!(bench.mmio.core().queue(1), Some(&QueueState::new(64)));
    assert_eq!((bench.starts(), bench.stops()), (1, 0));
    // Nor does a pause let it in.
    let queues = bench.mmio.core().pause();
    bench.set_queue(0, 256, 0x10_0000);
    bench.mmio.core().resume(queues);
    assert_eq!(
        bench.started(),
        [Some(queue_state(256, 16, 0x1000)), None, None]
    );
}

#[test]
fn a_queue_that_does_not_exist_takes_nothing() {
    let mut bench = Bench::new();
    bench.negotiate();
    for index in [3, 4, 0x8000, u32::MAX] {
        bench.set_queue(index, 16, 0x1000);
        assert_eq!((bench.read(QUEUE_NUM_MAX), bench.read(QUEUE_READY)), (0, 0));
    }
    for (index, size) in (0..).zip(SIZES) {
        assert_eq!(bench.mmio.core().queue(index), Some(&QueueState::new(size)));
    }
}

#[test]
fn a_queue_that_makes_no_sense_needs_a_reset() {
    for (size, base) in [
        (0, 0x1000),
        (3, 0x1000),
        (512, 0x1000),
        (0x1_0010, 0x1000),
        (u32::MAX, 0x1000),
        (16, 0x1008),
        (16, MEMORY_END as u32),
        (16, 0xffff_0000),
    ] {
        let mut bench = Bench::new();
        bench.negotiate();
        bench.set_queue(0, size, base);
        bench.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        assert_eq!(
            bench.status() & NEEDS_RESET,
            NEEDS_RESET,
            "{size} at {base:#x}"
        );
        assert_eq!(bench.starts(), 0);
        assert_eq!(bench.read(INTERRUPT_STATUS), 2, "the driver is told");
        assert_eq!(*bench.raised.lock().unwrap(), 1);
        bench.write(STATUS, 0);
        assert_eq!((bench.status(), bench.read(INTERRUPT_STATUS)), (0, 0));
        bench.run();
    }
}

#[test]
fn a_device_that_does_not_start_needs_a_reset() {
    let mut bench = Bench::new();
    bench.log.lock().unwrap().refuses = true;
    bench.negotiate();
    bench.write(STATUS, DRIVER_OK);
    assert_eq!(bench.status() & NEEDS_RESET, NEEDS_RESET);
    bench.log.lock().unwrap().refuses = false;
    bench.write(STATUS, 0);
    bench.run();
}

#[test]
fn a_reset_in_the_middle_of_life_forgets_everything() {
    let mut bench = Bench::new();
    bench.run();
    bench.signals().used_buffers();
    bench.write(QUEUE_NOTIFY, 0);
    bench.write(STATUS, 0);
    assert_eq!(bench.stops(), 1);
    assert_eq!((bench.status(), bench.read(INTERRUPT_STATUS)), (0, 0));
    assert_eq!(bench.mmio.core().queue(0), Some(&QueueState::new(256)));
    bench.mmio.core().kicks()[0]
        .read()
        .expect_err("a notification of before is gone");
    // The features are gone as well.
    bench.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_eq!(bench.status(), ACKNOWLEDGE | DRIVER);
    bench.write(STATUS, 0);
    bench.run();
    assert_eq!((bench.starts(), bench.stops()), (2, 1));
    // Again and again, with nothing running.
    for _ in 0..3 {
        bench.write(STATUS, 0);
    }
    assert_eq!(bench.stops(), 2);
}

#[test]
fn a_pause_goes_on_with_the_same_queues_and_wakes_both_sides() {
    let mut bench = Bench::new();
    bench.run();
    let before = bench.started();
    let queues = bench.mmio.core().pause();
    assert_eq!(bench.stops(), 1);
    assert_eq!(
        bench.status(),
        ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    );
    bench.mmio.core().resume(queues);
    assert_eq!((bench.starts(), bench.started()), (2, before));
    assert_eq!(bench.read(INTERRUPT_STATUS), 1);
    bench.mmio.core().kicks()[0]
        .read()
        .expect("the device looks at its queues");
}

#[test]
fn a_pause_of_a_device_that_does_not_run_changes_nothing() {
    let mut bench = Bench::new();
    let queues = bench.mmio.core().pause();
    bench.mmio.core().resume(queues);
    assert_eq!((bench.starts(), bench.stops()), (0, 0));
    bench.run();
    bench.signals().needs_reset();
    let queues = bench.mmio.core().pause();
    bench.mmio.core().resume(queues);
    assert_eq!(bench.starts(), 1, "a broken device stays stopped");
}

#[test]
fn a_notification_reaches_its_queue() {
    let mut bench = Bench::new();
    bench.run();
    for value in [3, 0x1_0000, u32::MAX] {
        bench.write(QUEUE_NOTIFY, value);
    }
    for kick in bench.mmio.core().kicks() {
        kick.read().expect_err("no queue was meant");
    }
    bench.write(QUEUE_NOTIFY, 1);
    let kicks = bench.mmio.core().kicks().to_vec();
    assert_eq!(kicks[1].read().unwrap(), 1);
    kicks[0].read().unwrap_err();
}

#[test]
fn interrupt_bits_stay_until_they_are_acknowledged() {
    let mut bench = Bench::new();
    bench.run();
    let signals = bench.signals();
    signals.used_buffers();
    assert_eq!(bench.read(INTERRUPT_STATUS), 1);
    signals.config_changed();
    assert_eq!(bench.read(INTERRUPT_STATUS), 3);
    assert_eq!(*bench.raised.lock().unwrap(), 2);
    bench.write(INTERRUPT_ACK, 0xffff_fffc);
    assert_eq!(bench.read(INTERRUPT_STATUS), 3);
    bench.write(INTERRUPT_ACK, 1);
    assert_eq!(bench.read(INTERRUPT_STATUS), 2);
    bench.write(INTERRUPT_ACK, u32::MAX);
    assert_eq!(bench.read(INTERRUPT_STATUS), 0);
}

#[test]
fn the_generation_counts_changes_of_the_configuration() {
    let mut bench = Bench::new();
    bench.run();
    let signals = bench.signals();
    let before = bench.read(CONFIG_GENERATION);
    signals.used_buffers();
    assert_eq!(bench.read(CONFIG_GENERATION), before);
    signals.config_changed();
    assert_ne!(bench.read(CONFIG_GENERATION), before);
}

#[test]
fn configuration_space_is_read_at_any_width_and_ends_in_zeroes() {
    let mut bench = Bench::new();
    for width in [1, 2, 4, 8] {
        for offset in 0..32_usize {
            let mut data = vec![0xaa; width];
            bench.mmio.read(0x100 + offset as u64, &mut data);
            for (n, byte) in data.iter().enumerate() {
                let expected = CONFIG_SPACE.get(offset + n).copied().unwrap_or(0);
                assert_eq!(*byte, expected, "{width} bytes at {offset}");
            }
        }
    }
}

#[test]
fn configuration_space_is_written_by_a_driver_only() {
    let mut bench = Bench::new();
    bench.mmio.write(0x102, &[1, 2]);
    assert!(bench.log.lock().unwrap().config_writes.is_empty());
    bench.negotiate();
    bench.mmio.write(0x102, &[1, 2]);
    assert_eq!(bench.log.lock().unwrap().config_writes, [(2, vec![1, 2])]);
}

#[test]
fn registers_are_accessed_whole() {
    let mut bench = Bench::new();
    bench.run();
    for (offset, width) in [
        (0, 1),
        (0, 2),
        (0, 8),
        (1, 4),
        (2, 4),
        (3, 4),
        (0x70, 1),
        (0x71, 4),
    ] {
        let mut data = vec![0xaa; width];
        bench.mmio.read(offset, &mut data);
        assert_eq!(data, vec![0; width], "{width} bytes at {offset:#x}");
    }
    // None of these is a reset.
    bench.mmio.write(STATUS, &[0]);
    bench.mmio.write(STATUS, &[0; 2]);
    bench.mmio.write(STATUS, &[0; 8]);
    bench.mmio.write(STATUS - 1, &[0; 4]);
    assert_eq!(bench.stops(), 0);
}

/// One access: offset, bytes, and whether it is a write.
fn any_access() -> impl Strategy<Value = (u64, Vec<u8>, bool)> {
    let offset = prop_oneof![
        4 => (0_u64..0x40).prop_map(|register| register * 4),
        2 => 0_u64..0x1100,
        1 => any::<u64>(),
    ];
    let value = prop_oneof![
        4 => (0_u32..0x10).prop_map(|v| v.to_le_bytes().to_vec()),
        2 => any::<u32>().prop_map(|v| v.to_le_bytes().to_vec()),
        2 => prop_oneof![Just(1_usize), Just(2), Just(4), Just(8)].prop_flat_map(|len| vec(any::<u8>(), len)),
    ];
    (offset, value, prop::bool::weighted(0.8))
}

proptest! {
    /// Whatever is accessed in whatever order: nothing panics, the device only runs with features
    /// and queues it was offered, and guest memory is not touched.
    #[test]
    fn no_access_leads_astray(accesses in vec(any_access(), 1..200), go in any::<bool>()) {
        let mut bench = Bench::new();
        if go {
            bench.run();
        }
        for (offset, mut data, write) in accesses {
            if write {
                bench.mmio.write(offset, &data);
            } else {
                bench.mmio.read(offset, &mut data);
            }
            let status = bench.status();
            prop_assert!(status & DRIVER_OK == 0 || status & FEATURES_OK != 0);
        }
        let log = bench.log.lock().unwrap();
        for start in &log.starts {
            prop_assert_eq!(start.features & !(DEVICE_FEATURE | feature::COMMON), 0);
            prop_assert!(start.features & feature::VERSION_1 != 0);
            prop_assert_eq!(start.queues.len(), SIZES.len());
            for (queue, max) in start.queues.iter().zip(SIZES) {
                prop_assert!(queue.as_ref().is_none_or(|q| q.queue.size() <= max));
            }
        }
        if let Some(start) = log.starts.first() {
            let mut bytes = vec![0; 0x2_0000];
            start.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
            prop_assert!(bytes.iter().all(|&byte| byte == 0));
        }
    }
}
