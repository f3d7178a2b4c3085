// SPDX-License-Identifier: Apache-2.0
//! A virtio-blk device driven request by request, for what virtio-drivers' `VirtIOBlk` cannot do.

use crate::clock;
use crate::memory;
use crate::mmio::{self, EVENT_IDX, INDIRECT_DESC, Mmio};
use crate::ring::{MAX_PIECES, Ring};
use virtio_drivers::transport::{DeviceType, Transport};

/// Bytes in a sector.
pub const SECTOR: usize = crate::pattern::SECTOR;

/// Descriptors in the queue: 32 requests of three, and room.
pub const QUEUE: usize = 256;

/// `VIRTIO_BLK_F_SEG_MAX`.
pub const SEG_MAX: u64 = 1 << 2;
/// `VIRTIO_BLK_F_RO`.
pub const RO: u64 = 1 << 5;
/// `VIRTIO_BLK_F_BLK_SIZE`.
pub const BLK_SIZE: u64 = 1 << 6;
/// `VIRTIO_BLK_F_FLUSH`.
pub const FLUSH: u64 = 1 << 9;
/// `VIRTIO_BLK_F_DISCARD`.
pub const DISCARD: u64 = 1 << 13;
/// `VIRTIO_BLK_F_WRITE_ZEROES`.
pub const WRITE_ZEROES: u64 = 1 << 14;
const WANTED: u64 =
    SEG_MAX | RO | BLK_SIZE | FLUSH | DISCARD | WRITE_ZEROES | EVENT_IDX | INDIRECT_DESC;

/// Request types (virtio 1.2, 5.2.6).
pub mod kind {
    /// Read.
    pub const IN: u32 = 0;
    /// Write.
    pub const OUT: u32 = 1;
    /// Write the cache out.
    pub const FLUSH: u32 = 4;
    /// The 20 bytes of the serial id.
    pub const GET_ID: u32 = 8;
    /// Discard ranges.
    pub const DISCARD: u32 = 11;
    /// Zero ranges.
    pub const WRITE_ZEROES: u32 = 13;
}

/// Request statuses; `NONE` is what the byte holds before the device wrote it.
pub mod status {
    /// Done.
    pub const OK: u8 = 0;
    /// Failed.
    pub const IO_ERROR: u8 = 1;
    /// Not offered by the device.
    pub const UNSUPPORTED: u8 = 2;
    /// No answer came in time.
    pub const TIMEOUT: u8 = 0xfe;
    /// Not written.
    pub const NONE: u8 = 0xff;
}

/// A request's header as the device reads it.
pub fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// A block device, set up and running.
pub struct Blk {
    /// Its registers.
    pub transport: Mmio,
    /// Its one request queue.
    pub ring: Ring<QUEUE>,
    /// What was negotiated.
    pub features: u64,
    /// Sectors.
    pub capacity: u64,
    /// Whether [`Self::request`] gives the header in two pieces.
    pub split_header: bool,
}

impl Blk {
    /// Sets up the block device that `bare.dev` names.
    ///
    /// # Panics
    ///
    /// When there is none, or it cannot be set up.
    pub fn open() -> Self {
        let base = mmio::find(DeviceType::Block).expect("no block device");
        Self::open_at(base).expect("the block device cannot be set up")
    }

    /// Sets up the block device at `base`; `None` when it cannot be.
    pub fn open_at(base: u64) -> Option<Self> {
        let mut transport = Mmio::new(base)?;
        let features = transport.negotiate(WANTED);
        let ring = Ring::new(&mut transport, 0).ok()?;
        transport.finish_init();
        let mut blk = Self {
            transport,
            ring,
            features,
            capacity: 0,
            split_header: false,
        };
        blk.capacity = u64::from(blk.config(0)) | u64::from(blk.config(4)) << 32;
        Some(blk)
    }

    /// A 32-bit field of the configuration space.
    pub fn config(&self, offset: u64) -> u32 {
        mmio::read32(self.transport.base + 0x100 + offset)
    }

    /// Sends one request with data for the device and room for its answer, both possibly empty or
    /// in many pieces, and waits. Returns the status and the length that the device reported.
    pub fn request(
        &mut self,
        kind: u32,
        sector: u64,
        data: &[&[u8]],
        room: &mut [&mut [u8]],
    ) -> (u8, u32) {
        let header = header(kind, sector);
        let mut status = [status::NONE];
        let mut inputs: [&[u8]; MAX_PIECES] = [&[]; MAX_PIECES];
        let (first, second) = header.split_at(if self.split_header { 8 } else { 16 });
        let heads = if second.is_empty() { 1 } else { 2 };
        inputs[0] = first;
        inputs[1] = second;
        inputs[heads..][..data.len()].copy_from_slice(data);
        let ins = heads + data.len();
        let mut outputs: [&mut [u8]; MAX_PIECES] = core::array::from_fn(|_| &mut [][..]);
        let rooms = room.len();
        for (to, from) in outputs.iter_mut().zip(room) {
            *to = from;
        }
        outputs[rooms] = &mut status;
        // SAFETY: the buffers outlive the wait below; after a timeout the caller's step ends.
        let token = unsafe { self.ring.add(&inputs[..ins], &mut outputs[..=rooms]) };
        let token = token.expect("the queue is full");
        self.ring.kick(&mut self.transport);
        if !clock::wait(clock::LONG_MS, || self.ring.peek() == Some(token)) {
            return (status::TIMEOUT, 0);
        }
        let len = self.ring.pop(token, ins + rooms + 1).unwrap_or(0);
        // The device wrote it, unseen by the compiler.
        (core::hint::black_box(&status)[0], len)
    }

    /// Reads whole sectors. Returns the status.
    pub fn read(&mut self, sector: u64, to: &mut [u8]) -> u8 {
        self.request(kind::IN, sector, &[], &mut [to]).0
    }

    /// Writes whole sectors. Returns the status.
    pub fn write(&mut self, sector: u64, from: &[u8]) -> u8 {
        self.request(kind::OUT, sector, &[from], &mut []).0
    }
}

/// A buffer for data, aligned to a page.
pub fn buffer(len: usize) -> &'static mut [u8] {
    memory::take(len, 4096)
}
