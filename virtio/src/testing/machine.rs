// SPDX-License-Identifier: Apache-2.0
//! A device behind its transport, with a driver that has set it up by the registers; and the same
//! device again, made from what was saved of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use brume_devices::{BusDevice, Interrupt};
use vm_memory::{Bytes, GuestAddress};

use super::{BUFFERS, Driver, MEMORY_END, memory};
use crate::device::{VirtioDevice, feature};
use crate::memory::GuestMemory;
use crate::signals::DeviceSignals;
use crate::transport::{MmioTransport, RunningQueues, TransportCore, TransportState};

/// Descriptors of each queue.
const SIZE: u16 = 256;
/// Each queue's rings have as much, from [`BUFFERS`] on.
const RINGS: u64 = 0x10000;
/// Start of the memory that is neither rings nor anything else, for up to five queues.
pub(crate) const FREE: u64 = BUFFERS + 5 * RINGS;

pub(crate) struct Machine {
    pub(crate) transport: MmioTransport,
    pub(crate) drivers: Vec<Driver>,
    pub(crate) memory: GuestMemory,
    pub(crate) interrupts: Arc<AtomicU32>,
}

/// `device` behind a transport that no driver has touched.
pub(crate) fn transport(
    device: Box<dyn VirtioDevice>,
    memory: &GuestMemory,
) -> (MmioTransport, Arc<AtomicU32>) {
    let interrupts = Arc::new(AtomicU32::new(0));
    let count = interrupts.clone();
    let line = Interrupt::from_fn(move || {
        count.fetch_add(1, Ordering::SeqCst);
    });
    let core = TransportCore::new(device, memory.clone(), DeviceSignals::new(line)).unwrap();
    (MmioTransport::new(core), interrupts)
}

impl Machine {
    /// A device that runs, with a driver that accepts what it offers of `accepted`.
    pub(crate) fn new(device: Box<dyn VirtioDevice>, accepted: u64) -> Self {
        let memory = memory();
        let queues = device.queue_sizes().len();
        let (transport, interrupts) = transport(device, &memory);
        let mut machine = Self {
            transport,
            drivers: Vec::new(),
            memory,
            interrupts,
        };
        for status in [1, 3] {
            machine.write(0x70, status);
        }
        for half in [0, 1] {
            machine.write(0x14, half);
            let offered = machine.read(0x10);
            machine.write(0x24, half);
            let accepted = (accepted | feature::VERSION_1) >> (32 * half);
            machine.write(0x20, offered & (accepted & 0xffff_ffff) as u32);
        }
        machine.write(0x70, 11);
        for index in 0..queues {
            machine.set_up_queue(index);
        }
        machine.write(0x70, 15);
        assert_eq!(machine.read(0x70), 15, "the driver is content");
        machine
    }

    fn set_up_queue(&mut self, index: usize) {
        let mut driver = Driver::new(self.memory.clone(), SIZE);
        let base = BUFFERS + RINGS * index as u64;
        driver.state.desc_table = base;
        driver.state.avail_ring = base + 0x8000;
        driver.state.used_ring = base + 0xa000;
        driver.kick = self.transport.core().kicks()[index].clone();
        self.write(0x30, index as u32);
        self.write(0x38, SIZE.into());
        for (register, address) in [
            (0x80, base),
            (0x90, driver.state.avail_ring),
            (0xa0, driver.state.used_ring),
        ] {
            self.write(register, address as u32);
        }
        self.write(0x44, 1);
        self.drivers.push(driver);
    }

    pub(crate) fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    /// Pauses the device; its state, and what it takes to go on here.
    pub(crate) fn save(&mut self) -> (TransportState, RunningQueues) {
        let running = self.transport.core().pause();
        (self.transport.save(&running), running)
    }

    /// Pauses the device, writes its state down, forgets it, and goes on with the one that `make`
    /// makes, in memory of its own that has the same bytes.
    pub(crate) fn reborn(mut self, make: impl FnOnce() -> Box<dyn VirtioDevice>) -> Self {
        let text = serde_json::to_string(&self.save().0).unwrap();
        let memory = memory();
        let mut bytes = vec![0; usize::try_from(MEMORY_END).unwrap()];
        self.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        memory.write_slice(&bytes, GuestAddress(0)).unwrap();
        let Self { mut drivers, .. } = self;
        drop(self.transport);
        let (mut transport, interrupts) = transport(make(), &memory);
        let running = transport.restore(serde_json::from_str(&text).unwrap());
        for (driver, kick) in drivers.iter_mut().zip(transport.core().kicks()) {
            driver.memory = memory.clone();
            driver.kick = kick.clone();
        }
        transport.core().resume(running.unwrap());
        Self {
            transport,
            drivers,
            memory,
            interrupts,
        }
    }

    pub(crate) fn put(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    pub(crate) fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    /// Waits until queue `index` has at least `count` used elements in all.
    #[track_caller]
    pub(crate) fn wait_used(&self, index: usize, count: u16) {
        let driver = &self.drivers[index];
        eventually("buffers are used", || driver.used_index() >= count);
    }

    /// Sees to it that queue `index` has `count` used elements in all, and stays so for a while.
    #[track_caller]
    pub(crate) fn stays_used(&self, index: usize, count: u16) {
        self.wait_used(index, count);
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(self.drivers[index].used_index(), count);
    }

    /// The heads of all used elements of queue `index` that were not taken yet.
    pub(crate) fn heads(&mut self, index: usize) -> Vec<u32> {
        let driver = &mut self.drivers[index];
        std::iter::from_fn(|| driver.take_used().map(|used| used.head)).collect()
    }
}

/// Waits until `condition` holds, and fails if it does not within a while.
#[track_caller]
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(20), "not so: {what}");
        std::thread::yield_now();
    }
}
