// SPDX-License-Identifier: Apache-2.0
//! Ill-behaved drivers: rings and registers set up by hand, wrongly on purpose.
//!
//! After each case the device is reset and must do one good request (`alive=1`). What a case could
//! check beside that is in `ok`.

use crate::console::say;
use crate::mmio::{self, Mmio};
use crate::{clock, hostile_blk, hostile_net, hostile_queue, hostile_regs, memory};
use alloc::vec::Vec;
use virtio_drivers::transport::DeviceType;

/// Registers of virtio-mmio (virtio 1.2, 4.2.2).
pub mod reg {
    /// DeviceFeatures.
    pub const DEVICE_FEATURES: u64 = 0x10;
    /// DeviceFeaturesSel.
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    /// DriverFeatures.
    pub const DRIVER_FEATURES: u64 = 0x20;
    /// DriverFeaturesSel.
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    /// QueueSel.
    pub const QUEUE_SEL: u64 = 0x30;
    /// QueueNumMax.
    pub const QUEUE_NUM_MAX: u64 = 0x34;
    /// QueueNum.
    pub const QUEUE_NUM: u64 = 0x38;
    /// QueueReady.
    pub const QUEUE_READY: u64 = 0x44;
    /// QueueNotify.
    pub const QUEUE_NOTIFY: u64 = 0x50;
    /// Status.
    pub const STATUS: u64 = 0x70;
    /// QueueDescLow; High follows.
    pub const QUEUE_DESC: u64 = 0x80;
    /// QueueDriverLow; High follows.
    pub const QUEUE_DRIVER: u64 = 0x90;
    /// QueueDeviceLow; High follows.
    pub const QUEUE_DEVICE: u64 = 0xa0;
}

/// Status bits.
pub mod state {
    /// ACKNOWLEDGE and DRIVER.
    pub const FOUND: u32 = 3;
    /// Those and FEATURES_OK.
    pub const FEATURES: u32 = 11;
    /// Those and DRIVER_OK.
    pub const RUNNING: u32 = 15;
    /// FEATURES_OK.
    pub const FEATURES_OK: u32 = 8;
    /// DEVICE_NEEDS_RESET.
    pub const NEEDS_RESET: u32 = 64;
}

/// Descriptor flags.
pub mod flag {
    /// Another descriptor follows.
    pub const NEXT: u16 = 1;
    /// The device writes.
    pub const WRITE: u16 = 2;
    /// A table of descriptors.
    pub const INDIRECT: u16 = 4;
}

/// Descriptors in a queue.
pub const SIZE: u16 = 16;
/// Bytes in each case's data page.
pub const DATA: usize = 4096;
const CANARY: u8 = 0xc3;

/// One piece of a request: address, length, flags without [`flag::NEXT`].
pub type Piece = (u64, u32, u16);

/// One case: a driver that does one thing wrong.
pub struct Case {
    /// The device's registers.
    pub base: u64,
    /// The queue under attack.
    pub queue: u32,
    /// Features that are negotiated, VERSION_1 beside them.
    pub features: u64,
    /// A page for requests' headers and statuses.
    pub control: u64,
    /// A page for data.
    pub data: u64,
    /// A spare page.
    pub spare: u64,
    /// Descriptor table, available ring and used ring of `queue`.
    pub rings: [u64; 3],
    /// What the case itself found; true unless it has something to check.
    pub ok: bool,
    request: fn(&mut Case) -> Vec<Piece>,
    queues: u32,
    avail_idx: u16,
}

impl Case {
    /// Reads a register.
    pub fn get(&self, register: u64) -> u32 {
        mmio::read32(self.base + register)
    }

    /// Writes a register.
    pub fn set(&self, register: u64, value: u32) {
        mmio::write32(self.base + register, value);
    }

    /// Writes a register pair, low half first.
    pub fn set_pair(&self, register: u64, value: u64) {
        self.set(register, value as u32);
        self.set(register + 4, (value >> 32) as u32);
    }

    /// Sets status bits one after the other, up to `to`.
    pub fn set_status(&self, to: u32) {
        let mut now = 0;
        for bit in [1, 2, 8, 4] {
            if to & bit != 0 {
                now |= bit;
                self.set(reg::STATUS, now);
            }
        }
    }

    /// Resets, and negotiates the case's features.
    pub fn begin(&self) {
        self.set(reg::STATUS, 0);
        clock::wait(clock::LONG_MS, || self.get(reg::STATUS) == 0);
        self.set_status(state::FOUND);
        for word in [0, 1] {
            self.set(reg::DEVICE_FEATURES_SEL, word);
            let offered = self.get(reg::DEVICE_FEATURES);
            let wanted = ((self.features | mmio::VERSION_1) >> (32 * word)) as u32;
            self.set(reg::DRIVER_FEATURES_SEL, word);
            self.set(reg::DRIVER_FEATURES, offered & wanted);
        }
        self.set_status(state::FEATURES);
    }

    /// Gives one queue its rings and size, without making it ready.
    pub fn place(&self, queue: u32, rings: [u64; 3], size: u32) {
        self.set(reg::QUEUE_SEL, queue);
        self.set(reg::QUEUE_NUM, size);
        self.set_pair(reg::QUEUE_DESC, rings[0]);
        self.set_pair(reg::QUEUE_DRIVER, rings[1]);
        self.set_pair(reg::QUEUE_DEVICE, rings[2]);
    }

    /// Gives every queue but the one under attack good rings.
    pub fn place_others(&self) {
        for queue in (0..self.queues).filter(|&queue| queue != self.queue) {
            self.place(queue, take_rings(), SIZE.into());
            self.set(reg::QUEUE_READY, 1);
        }
    }

    /// Does all that a good driver does up to DRIVER_OK.
    pub fn start(&self) {
        self.begin();
        self.place_others();
        self.place(self.queue, self.rings, SIZE.into());
        self.set(reg::QUEUE_READY, 1);
        self.set_status(state::RUNNING);
    }

    /// Starts over with empty rings.
    pub fn restart(&mut self) {
        self.set(reg::STATUS, 0);
        for ring in self.rings {
            // SAFETY: the rings are pages that the case took, and the device is reset.
            unsafe { core::ptr::write_bytes(ring as *mut u8, 0, 4096) };
        }
        self.avail_idx = 0;
        self.fill();
        self.start();
    }

    /// Fills the data page with what no device writes.
    pub fn fill(&self) {
        // SAFETY: the page was taken for the case.
        unsafe { core::ptr::write_bytes(self.data as *mut u8, CANARY, DATA) };
    }

    /// The pieces of a good request.
    pub fn good(&mut self) -> Vec<Piece> {
        (self.request)(self)
    }

    /// Writes one descriptor into a table.
    pub fn describe(&self, table: u64, index: u16, piece: Piece, next: u16) {
        let at = table + 16 * u64::from(index);
        // SAFETY: the tables are pages that the case took, and the index is within the page.
        unsafe {
            (at as *mut u64).write_volatile(piece.0);
            ((at + 8) as *mut u32).write_volatile(piece.1);
            ((at + 12) as *mut u16).write_volatile(piece.2);
            ((at + 14) as *mut u16).write_volatile(next);
        }
    }

    /// Writes a chain from descriptor 0 on.
    pub fn chain(&self, table: u64, pieces: &[Piece]) {
        for (i, &(address, len, flags)) in pieces.iter().enumerate() {
            let last = i + 1 == pieces.len();
            let more = if last { 0 } else { flag::NEXT };
            let next = if last { 0 } else { i as u16 + 1 };
            self.describe(table, i as u16, (address, len, flags | more), next);
        }
    }

    /// Puts a head into the next slot of the available ring, and moves the index by `step`.
    pub fn offer(&mut self, head: u16, step: u16) {
        let slot = self.rings[1] + 4 + 2 * u64::from(self.avail_idx % SIZE);
        self.avail_idx = self.avail_idx.wrapping_add(step);
        // SAFETY: the ring is a page that the case took.
        unsafe {
            (slot as *mut u16).write_volatile(head);
            core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
            ((self.rings[1] + 2) as *mut u16).write_volatile(self.avail_idx);
        }
    }

    /// Tells the device.
    pub fn notify(&self) {
        self.set(reg::QUEUE_NOTIFY, self.queue);
    }

    /// Writes a chain, offers it once and tells the device.
    pub fn send(&mut self, pieces: &[Piece]) {
        self.chain(self.rings[0], pieces);
        self.offer(0, 1);
        self.notify();
    }

    /// How many requests the device has used.
    pub fn used(&self) -> u16 {
        // SAFETY: the ring is a page that the case took.
        unsafe { ((self.rings[2] + 2) as *const u16).read_volatile() }
    }

    /// Whether every byte of the data page is as the case found it.
    pub fn untouched(&self) -> bool {
        // SAFETY: the page was taken for the case.
        let page = unsafe { core::slice::from_raw_parts(self.data as *const u8, DATA) };
        core::hint::black_box(page)
            .iter()
            .all(|&byte| byte == CANARY)
    }
}

/// Room for the three parts of a queue.
fn take_rings() -> [u64; 3] {
    [(); 3].map(|()| memory::take(4096, 4096).as_mut_ptr() as u64)
}

/// A kind of device, as the cases need to know it.
pub struct Target {
    step: &'static str,
    base: u64,
    queue: u32,
    queues: u32,
    request: fn(&mut Case) -> Vec<Piece>,
    alive: fn(u64) -> bool,
}

/// A case's name and what it does.
pub type Entry = (&'static str, fn(&mut Case));

/// `hostile-blk`.
pub fn run_blk() {
    let target = Target {
        step: "hostile-blk",
        base: mmio::find(DeviceType::Block).expect("no block device"),
        queue: 0,
        queues: 1,
        request: hostile_blk::request,
        alive: hostile_blk::alive,
    };
    run(
        &target,
        &[
            hostile_queue::CASES,
            hostile_regs::CASES,
            hostile_blk::CASES,
        ],
    );
}

/// `hostile-net`: the transmit queue, then the receive queue.
pub fn run_net() {
    for (step, queue, request) in [
        (
            "hostile-net-tx",
            1,
            hostile_net::transmit as fn(&mut Case) -> Vec<Piece>,
        ),
        ("hostile-net-rx", 0, hostile_net::receive),
    ] {
        let target = Target {
            step,
            base: mmio::find(DeviceType::Network).expect("no network device"),
            queue,
            queues: 2,
            request,
            alive: hostile_net::alive,
        };
        let own = if queue == 1 {
            hostile_net::TX_CASES
        } else {
            hostile_net::RX_CASES
        };
        run(&target, &[hostile_queue::CASES, hostile_regs::CASES, own]);
    }
}

fn run(target: &Target, groups: &[&[Entry]]) {
    let only = crate::params::text("bare.case");
    let (mut cases, mut dead, mut wrong) = (0, 0, 0);
    for &(name, attack) in groups.iter().copied().flatten() {
        if only.is_some_and(|only| only != name) {
            continue;
        }
        let (ok, alive) = run_case(target, name, attack);
        cases += 1;
        dead += u32::from(!alive);
        wrong += u32::from(!ok);
        if dead >= 3 {
            break;
        }
    }
    say!("{} cases={cases} dead={dead} wrong={wrong}", target.step);
}

fn run_case(target: &Target, name: &str, attack: fn(&mut Case)) -> (bool, bool) {
    let mark = memory::mark();
    let page = || memory::take(DATA, 4096).as_mut_ptr() as u64;
    let mut case = Case {
        base: target.base,
        queue: target.queue,
        features: 0,
        control: page(),
        data: page(),
        spare: page(),
        rings: take_rings(),
        ok: true,
        request: target.request,
        queues: target.queues,
        avail_idx: 0,
    };
    case.fill();
    attack(&mut case);
    // Whatever the device makes of it, it makes it soon.
    clock::wait(5, || case.get(reg::STATUS) & state::NEEDS_RESET != 0);
    let (status, used) = (case.get(reg::STATUS), case.used());
    case.set(reg::STATUS, 0);
    let reset = clock::wait(clock::LONG_MS, || case.get(reg::STATUS) == 0);
    let alive = reset && Mmio::new(target.base).is_some() && (target.alive)(target.base);
    let ok = case.ok;
    say!(
        "{} case={name} status={status:#x} used={used} ok={} alive={}",
        target.step,
        u8::from(ok),
        u8::from(alive)
    );
    if alive {
        case.set(reg::STATUS, 0);
        // SAFETY: the device was reset, and nothing here keeps what the case took.
        unsafe { memory::release(mark) };
    }
    (ok, alive)
}

/// The end of the guest's low memory, where the next byte is none.
pub fn end_of_memory() -> u64 {
    memory::free().1
}
