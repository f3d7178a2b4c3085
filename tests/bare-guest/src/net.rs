// SPDX-License-Identifier: Apache-2.0
//! A virtio-net device with one pair of queues, polled.
//!
//! Not virtio-drivers' `VirtIONet`, which knows neither mergeable buffers nor offloads; but the
//! queues and the transport are that crate's. It negotiates MAC, MTU, STATUS, MRG_RXBUF (unless
//! `bare.mrg=0`), EVENT_IDX and INDIRECT_DESC, and with `bare.offload=1` checksum and segmentation
//! offloads both ways.

use crate::memory;
use crate::mmio::{self, EVENT_IDX, INDIRECT_DESC, Mmio};
use crate::params;
use crate::ring::{MAX_PIECES, Ring};
use alloc::vec::Vec;
use virtio_drivers::transport::{DeviceType, Transport};

const QUEUE: usize = 256;
/// `struct virtio_net_hdr_v1`, which goes before every frame.
pub const HEADER: usize = 12;
const NUM_BUFFERS: usize = 10;

const MTU: u64 = 1 << 3;
const MAC: u64 = 1 << 5;
const STATUS: u64 = 1 << 16;
/// `VIRTIO_NET_F_MRG_RXBUF`.
pub const MRG_RXBUF: u64 = 1 << 15;
/// `VIRTIO_NET_F_GUEST_TSO4`.
pub const GUEST_TSO4: u64 = 1 << 7;
/// `VIRTIO_NET_F_HOST_TSO4`.
pub const HOST_TSO4: u64 = 1 << 11;
/// CSUM, GUEST_CSUM, and for both directions TSO4, TSO6 and UFO.
pub const OFFLOADS: u64 =
    1 | 1 << 1 | GUEST_TSO4 | 1 << 8 | 1 << 10 | HOST_TSO4 | 1 << 12 | 1 << 14;

/// A frame with segmentation offload, at most.
const BIG: usize = 65535 + 14;

/// A network device, set up, with all receive buffers handed over.
pub struct Net {
    /// Its registers.
    pub transport: Mmio,
    /// The receive queue.
    pub rx: Rx,
    /// The transmit queue.
    pub tx: Tx,
    /// What was negotiated.
    pub features: u64,
    /// The address that the device gave, or a local one.
    pub mac: [u8; 6],
    /// The MTU that the device gave, or 1500.
    pub mtu: u16,
}

impl Net {
    /// Sets up the network device that `bare.dev` names, for frames of up to `max` bytes.
    ///
    /// # Panics
    ///
    /// When there is none, or it cannot be set up.
    pub fn open(max: usize) -> Self {
        let base = mmio::find(DeviceType::Network).expect("no network device");
        Self::open_at(base, max).expect("the network device cannot be set up")
    }

    /// As [`Self::open`], for the device at `base`; `None` when it cannot be set up.
    pub fn open_at(base: u64, max: usize) -> Option<Self> {
        let offloads = if params::number("bare.offload", 0) != 0 {
            OFFLOADS
        } else {
            0
        };
        let merge = if params::number("bare.mrg", 1) != 0 {
            MRG_RXBUF
        } else {
            0
        };
        let mut transport = Mmio::new(base)?;
        let wanted = MTU | MAC | STATUS | EVENT_IDX | INDIRECT_DESC | offloads | merge;
        let features = transport.negotiate(wanted);
        let rx_ring = Ring::new(&mut transport, 0).ok()?;
        let tx_ring = Ring::new(&mut transport, 1).ok()?;
        transport.finish_init();
        let max = if features & OFFLOADS != 0 { BIG } else { max };
        let merged = features & MRG_RXBUF != 0;
        let rx_size = if merged {
            params::number("bare.rxbuf", 2048) as usize
        } else {
            HEADER + max
        };
        let mut mac = [2, 0, 0, 0, 0, 1];
        if features & MAC != 0 {
            for (at, byte) in (base + 0x100..).zip(&mut mac) {
                *byte = mmio::read(at, 1) as u8;
            }
        }
        let mut net = Self {
            rx: Rx::new(rx_ring, rx_size, HEADER + max, merged),
            tx: Tx::new(tx_ring, HEADER + max),
            mtu: if features & MTU != 0 {
                (mmio::read32(base + 0x108) >> 16) as u16
            } else {
                1500
            },
            transport,
            features,
            mac,
        };
        net.rx.ring.kick(&mut net.transport);
        Some(net)
    }

    /// Notifies the device of what was added to either queue.
    pub fn kick(&mut self) {
        self.rx.ring.kick(&mut self.transport);
        self.tx.ring.kick(&mut self.transport);
    }
}

/// The receive queue and its buffers, one descriptor each.
pub struct Rx {
    ring: Ring<QUEUE>,
    buffers: Vec<&'static mut [u8]>,
    /// The buffer of each token.
    owners: [u8; QUEUE],
    merged: bool,
    /// Where a frame that came in several buffers is put together.
    whole: &'static mut [u8],
    /// Frames with a length or a buffer count that cannot be.
    pub broken: u64,
}

impl Rx {
    fn new(ring: Ring<QUEUE>, size: usize, whole: usize, merged: bool) -> Self {
        let mut rx = Self {
            ring,
            buffers: (0..QUEUE).map(|_| memory::take(size, 64)).collect(),
            owners: [0; QUEUE],
            merged,
            whole: memory::take(whole, 64),
            broken: 0,
        };
        for buffer in 0..QUEUE {
            rx.add(buffer);
        }
        rx
    }

    fn add(&mut self, buffer: usize) {
        // SAFETY: the buffer is static, and read again only after its token came back.
        let token = unsafe { self.ring.add(&[], &mut [self.buffers[buffer]]) };
        self.owners[usize::from(token.expect("the receive queue holds all buffers"))] =
            buffer as u8;
    }

    /// Takes the next used buffer, if any: its number and how much of it was written.
    fn next(&mut self) -> Option<(usize, usize)> {
        let token = self.ring.peek()?;
        let len = self.ring.pop(token, 1).unwrap_or(0) as usize;
        let buffer = usize::from(self.owners[usize::from(token)]);
        Some((buffer, len.min(self.buffers[buffer].len())))
    }

    /// Hands every frame that has come to `visit`, header first, and its buffers back to the
    /// device; [`Net::kick`] tells it so. Returns the number of frames.
    pub fn poll(&mut self, mut visit: impl FnMut(&[u8], &mut [u8])) -> u64 {
        let mut frames = 0;
        while let Some((buffer, len)) = self.next() {
            if len < HEADER {
                self.broken += 1;
                self.add(buffer);
                continue;
            }
            let (header, data) =
                core::hint::black_box(&mut self.buffers[buffer]).split_at_mut(HEADER);
            let data = &mut data[..len - HEADER];
            let count = u16::from_le_bytes([header[NUM_BUFFERS], header[NUM_BUFFERS + 1]]);
            if !self.merged || count == 1 {
                visit(header, data);
                self.add(buffer);
            } else {
                self.whole[..len].copy_from_slice(&self.buffers[buffer][..len]);
                self.add(buffer);
                let len = self.gather(len, count);
                let (header, data) = self.whole[..len].split_at_mut(HEADER);
                visit(header, data);
            }
            frames += 1;
        }
        frames
    }

    /// Appends the rest of a frame of `count` buffers to the `len` bytes that are there. Returns
    /// the whole length.
    fn gather(&mut self, mut len: usize, count: u16) -> usize {
        if count == 0 {
            self.broken += 1;
        }
        for _ in 1..count {
            // All buffers of a frame become used at once (virtio 1.2, 5.1.6.4).
            let Some((buffer, more)) = self.next() else {
                self.broken += 1;
                break;
            };
            let more = more.min(self.whole.len() - len);
            self.whole[len..len + more].copy_from_slice(&self.buffers[buffer][..more]);
            len += more;
            self.add(buffer);
        }
        len
    }
}

/// The transmit queue and its buffers: header and frame in one piece.
pub struct Tx {
    ring: Ring<QUEUE>,
    slots: Vec<TxSlot>,
    /// The slot of each token.
    owners: [u8; QUEUE],
    idle: Vec<u8>,
}

struct TxSlot {
    memory: &'static mut [u8],
    pieces: usize,
}

impl Tx {
    fn new(ring: Ring<QUEUE>, size: usize) -> Self {
        let slots = (0..QUEUE).map(|_| TxSlot {
            memory: memory::take(size, 64),
            pieces: 0,
        });
        Self {
            ring,
            slots: slots.collect(),
            owners: [0; QUEUE],
            idle: (0..QUEUE).rev().map(|slot| slot as u8).collect(),
        }
    }

    /// Takes a buffer that is not in flight. It holds what was last written to it.
    pub fn take(&mut self) -> Option<usize> {
        self.idle.pop().map(usize::from)
    }

    /// The buffer of a slot: [`HEADER`] bytes, then room for the frame.
    pub fn buffer(&mut self, slot: usize) -> &mut [u8] {
        self.slots[slot].memory
    }

    /// Makes a frame of `len` bytes available, in one piece, or cut into more. [`Net::kick`] tells
    /// the device. Returns false, with the slot given back, when the queue has no room.
    pub fn submit(&mut self, slot: usize, len: usize, pieces: usize) -> bool {
        let bytes: &[u8] = &self.slots[slot].memory[..HEADER + len];
        let mut parts: [&[u8]; MAX_PIECES] = [&[]; MAX_PIECES];
        let size = bytes.len().div_ceil(pieces.clamp(1, MAX_PIECES));
        let mut count = 0;
        for (part, chunk) in parts.iter_mut().zip(bytes.chunks(size)) {
            *part = chunk;
            count += 1;
        }
        // SAFETY: the buffer is static, and written again only after its token came back.
        let Ok(token) = (unsafe { self.ring.add(&parts[..count], &mut []) }) else {
            self.idle.push(slot as u8);
            return false;
        };
        self.slots[slot].pieces = count;
        self.owners[usize::from(token)] = slot as u8;
        true
    }

    /// Takes back the buffers of the frames that were sent. Returns how many.
    pub fn reap(&mut self) -> u64 {
        let mut frames = 0;
        while let Some(token) = self.ring.peek() {
            let slot = self.owners[usize::from(token)];
            let popped = self.ring.pop(token, self.slots[usize::from(slot)].pieces);
            popped.expect("the device returned a frame that it does not have");
            self.idle.push(slot);
            frames += 1;
        }
        frames
    }

    /// Notifies the device of what was submitted.
    pub fn kick(&mut self, transport: &mut Mmio) {
        self.ring.kick(transport);
    }

    /// Whether every buffer is in flight.
    pub fn is_full(&self) -> bool {
        self.idle.is_empty()
    }

    /// Whether no frame is in flight.
    pub fn is_idle(&self) -> bool {
        self.idle.len() == QUEUE
    }
}
