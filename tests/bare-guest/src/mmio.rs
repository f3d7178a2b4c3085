// SPDX-License-Identifier: Apache-2.0
//! Finds virtio-mmio devices, and the transport through which every driver here reaches them.

use crate::{cmdline, params};
use core::arch::asm;
use core::ptr::NonNull;
use virtio_drivers::transport::mmio::{MmioTransport, VirtIOHeader};
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{PhysAddr, Result};
use zerocopy::{FromBytes, Immutable, IntoBytes};

const MAGIC: u32 = 0x7472_6976;
const FIRST: u64 = 0xc000_1000;
const PAGE: u64 = 0x1000;
const MAX_DEVICES: usize = 32;

/// The boot timer's register.
pub const BOOT_TIMER: u64 = 0xc000_0000;

/// `VIRTIO_F_INDIRECT_DESC`.
pub const INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`.
pub const EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`.
pub const VERSION_1: u64 = 1 << 32;

/// Reads a 32-bit register.
pub fn read32(address: u64) -> u32 {
    // SAFETY: everything from 3 to 4 GiB is mapped, and no memory of this guest's lies there.
    unsafe { (address as *const u32).read_volatile() }
}

/// Writes a 32-bit register.
pub fn write32(address: u64, value: u32) {
    // SAFETY: as in `read32`.
    unsafe { (address as *mut u32).write_volatile(value) };
}

/// Reads 1, 2, 4 or 8 bytes at any address from 3 GiB on, aligned or not.
pub fn read(address: u64, width: u32) -> u64 {
    let value: u64;
    // SAFETY: as in `read32`; assembly, because a volatile read in Rust must be aligned.
    unsafe {
        match width {
            1 => asm!("movzx {v:e}, byte ptr [{a}]", v = out(reg) value, a = in(reg) address),
            2 => asm!("movzx {v:e}, word ptr [{a}]", v = out(reg) value, a = in(reg) address),
            4 => asm!("mov {v:e}, [{a}]", v = out(reg) value, a = in(reg) address),
            _ => asm!("mov {v}, [{a}]", v = out(reg) value, a = in(reg) address),
        }
    }
    value
}

/// Writes 1, 2, 4 or 8 bytes at any address from 3 GiB on, aligned or not.
pub fn write(address: u64, width: u32, value: u64) {
    // SAFETY: as in `read`.
    unsafe {
        match width {
            1 => asm!("mov [{a}], {v}", v = in(reg_byte) value as u8, a = in(reg) address),
            2 => asm!("mov [{a}], {v:x}", v = in(reg) value, a = in(reg) address),
            4 => asm!("mov [{a}], {v:e}", v = in(reg) value, a = in(reg) address),
            _ => asm!("mov [{a}], {v}", v = in(reg) value, a = in(reg) address),
        }
    }
}

fn is_device(base: u64) -> bool {
    read32(base) == MAGIC
}

/// Calls `visit` with each device's base address and virtio device id, in the order of the
/// command line's `virtio_mmio.device=` words, or by probing page after page when it has none.
pub fn each_device(mut visit: impl FnMut(u64, u32)) {
    let mut found = false;
    for base in cmdline::virtio_devices(params::line()).filter(|&b| is_device(b)) {
        found = true;
        visit(base, read32(base + 8));
    }
    if !found {
        (0..MAX_DEVICES as u64)
            .map(|page| FIRST + page * PAGE)
            .take_while(|&base| is_device(base))
            .for_each(|base| visit(base, read32(base + 8)));
    }
}

/// The base address of the `bare.dev`-th device (by default the first) of a kind.
pub fn find(kind: DeviceType) -> Option<u64> {
    find_id(kind as u32)
}

/// The same for a kind that virtio-drivers has no number for, or a wrong one.
pub fn find_id(wanted: u32) -> Option<u64> {
    let mut left = params::number("bare.dev", 0);
    let mut found = None;
    each_device(|base, id| {
        if id == wanted {
            if left == 0 && found.is_none() {
                found = Some(base);
            }
            left = left.saturating_sub(1);
        }
    });
    found
}

/// Where a queue's rings lie.
#[derive(Clone, Copy, Default)]
pub struct RingPlaces {
    /// The available ring.
    pub driver: PhysAddr,
    /// The used ring.
    pub device: PhysAddr,
}

/// virtio-mmio, with the features hidden that `bare.event_idx=0` and `bare.indirect=0` forbid, and
/// with the rings' places and the negotiated features kept for [`crate::ring::Ring`].
pub struct Mmio {
    inner: MmioTransport<'static>,
    /// Where the device lies.
    pub base: u64,
    hidden: u64,
    status: DeviceStatus,
    /// What [`Transport::write_driver_features`] wrote last.
    pub negotiated: u64,
    /// Each queue's rings, as set up last.
    pub rings: [RingPlaces; 5],
    /// Writes to the notify register.
    pub notifies: u64,
}

impl Mmio {
    /// The transport of the device at `base`.
    pub fn new(base: u64) -> Option<Self> {
        let header = NonNull::new(base as *mut VirtIOHeader)?;
        // SAFETY: the page is a device's (the magic is checked) and stays mapped for ever.
        let inner = unsafe { MmioTransport::new(header, PAGE as usize) }.ok()?;
        let mut hidden = 0;
        for (key, feature) in [
            ("bare.event_idx", EVENT_IDX),
            ("bare.indirect", INDIRECT_DESC),
        ] {
            if params::number(key, 1) == 0 {
                hidden |= feature;
            }
        }
        Some(Self {
            inner,
            base,
            hidden,
            status: DeviceStatus::empty(),
            negotiated: 0,
            rings: [RingPlaces::default(); 5],
            notifies: 0,
        })
    }

    /// Resets, and negotiates those of `wanted` that the device offers. Queues come next, then
    /// [`Transport::finish_init`].
    pub fn negotiate(&mut self, wanted: u64) -> u64 {
        self.set_status(DeviceStatus::empty());
        self.set_status(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER);
        let features = self.read_device_features() & (wanted | VERSION_1);
        self.write_driver_features(features);
        self.set_status(
            DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER | DeviceStatus::FEATURES_OK,
        );
        features
    }
}

impl Transport for Mmio {
    fn device_type(&self) -> DeviceType {
        self.inner.device_type()
    }

    fn read_device_features(&mut self) -> u64 {
        self.inner.read_device_features() & !self.hidden
    }

    fn write_driver_features(&mut self, features: u64) {
        self.negotiated = features;
        self.inner.write_driver_features(features);
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.inner.max_queue_size(queue)
    }

    fn notify(&mut self, queue: u16) {
        self.notifies += 1;
        self.inner.notify(queue);
    }

    fn get_status(&self) -> DeviceStatus {
        self.inner.get_status()
    }

    /// Sets the bits one after the other, in the order of virtio 1.2, 3.1.1: a strict device
    /// refuses two at once, which is how the crate does it.
    fn set_status(&mut self, status: DeviceStatus) {
        let steps = [
            DeviceStatus::ACKNOWLEDGE,
            DeviceStatus::DRIVER,
            DeviceStatus::FEATURES_OK,
            DeviceStatus::DRIVER_OK,
        ];
        let mut now = self.status & status;
        for step in steps {
            if status.contains(step) && !now.contains(step) {
                now |= step;
                self.inner.set_status(now);
            }
        }
        if now != status || status.is_empty() {
            self.inner.set_status(status);
        }
        self.status = status;
    }

    fn set_guest_page_size(&mut self, size: u32) {
        self.inner.set_guest_page_size(size);
    }

    fn requires_legacy_layout(&self) -> bool {
        self.inner.requires_legacy_layout()
    }

    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        desc: PhysAddr,
        driver: PhysAddr,
        device: PhysAddr,
    ) {
        if let Some(places) = self.rings.get_mut(usize::from(queue)) {
            *places = RingPlaces { driver, device };
        }
        self.inner.queue_set(queue, size, desc, driver, device);
    }

    /// Does nothing: a queue is taken from a running device by a reset alone, and the crate would
    /// wait for ever for a device that takes that to the letter.
    fn queue_unset(&mut self, _: u16) {}

    fn queue_used(&mut self, queue: u16) -> bool {
        self.inner.queue_used(queue)
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        self.inner.ack_interrupt()
    }

    fn read_config_generation(&self) -> u32 {
        self.inner.read_config_generation()
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T> {
        self.inner.read_config_space(offset)
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> Result<()> {
        self.inner.write_config_space(offset, value)
    }
}
