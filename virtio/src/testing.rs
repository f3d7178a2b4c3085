// SPDX-License-Identifier: Apache-2.0
//! A driver's side of a virtqueue, for tests: well-behaved where it is asked to be, and able to
//! write whatever it likes where it is not.

// Sizes here are small by construction.
#![allow(clippy::cast_possible_truncation)]

pub(crate) mod machine;
pub(crate) mod marks;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use brume_devices::Interrupt;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::{StartContext, StartedQueue, feature};
use crate::memory::GuestMemory;
use crate::queue::{Queue, QueueState};
use crate::signals::DeviceSignals;

/// Descriptor flag: the chain goes on at `next`.
pub(crate) const NEXT: u16 = 1;
/// Descriptor flag: the device writes the buffer.
pub(crate) const WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
pub(crate) const INDIRECT: u16 = 4;

/// Where the rings are; buffers are free to lie above [`BUFFERS`].
const DESC_TABLE: u64 = 0x1000;
const AVAIL_RING: u64 = 0x8000;
const USED_RING: u64 = 0xa000;
/// Start of the memory that tests may use for what they like.
pub(crate) const BUFFERS: u64 = 0x10000;
/// End of guest memory, if made by [`memory`].
pub(crate) const MEMORY_END: u64 = 0x80_0000;

/// 8 MiB of guest memory.
pub(crate) fn memory() -> GuestMemory {
    memory_of(MEMORY_END)
}

/// `len` bytes of guest memory from address zero.
pub(crate) fn memory_of(len: u64) -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), usize::try_from(len).unwrap())]).unwrap()
}

/// A buffer for a chain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) write: bool,
}

/// A buffer that the device reads.
pub(crate) fn readable(address: u64, len: u32) -> Piece {
    Piece {
        address,
        len,
        write: false,
    }
}

/// A buffer that the device writes.
pub(crate) fn writable(address: u64, len: u32) -> Piece {
    Piece {
        address,
        len,
        write: true,
    }
}

/// One element of the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Used {
    pub(crate) head: u32,
    pub(crate) len: u32,
}

/// A driver of one queue.
pub(crate) struct Driver {
    pub(crate) memory: GuestMemory,
    pub(crate) state: QueueState,
    pub(crate) kick: Arc<EventFd>,
    next_descriptor: u16,
    /// The available index that was written last.
    pub(crate) avail: u16,
    /// The used index up to which elements were taken.
    pub(crate) used: u16,
}

impl Driver {
    pub(crate) fn new(memory: GuestMemory, size: u16) -> Self {
        assert!(size <= 1024, "the rings have no room for more");
        let state = QueueState {
            ready: true,
            desc_table: DESC_TABLE,
            avail_ring: AVAIL_RING,
            used_ring: USED_RING,
            ..QueueState::new(size)
        };
        let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        Self {
            memory,
            state,
            kick,
            next_descriptor: 0,
            avail: 0,
            used: 0,
        }
    }

    /// Both indices at `index`, as if that many chains had gone through.
    pub(crate) fn start_at(mut self, index: u16) -> Self {
        (self.avail, self.used) = (index, index);
        (self.state.next_avail, self.state.next_used) = (index, index);
        self.set_avail_index(index);
        self.put(self.state.used_ring + 2, index);
        self
    }

    /// The device's side.
    pub(crate) fn queue(&self, features: u64) -> Queue {
        Queue::new(self.state, self.memory.clone(), features).unwrap()
    }

    /// What a device with this one queue is started with; interrupts are counted in `interrupts`.
    pub(crate) fn context(&self, features: u64, interrupts: &Arc<AtomicU32>) -> StartContext {
        let count = interrupts.clone();
        let line = Interrupt::from_fn(move || {
            count.fetch_add(1, Ordering::SeqCst);
        });
        let features = features | feature::VERSION_1;
        StartContext {
            memory: self.memory.clone(),
            features,
            queues: vec![Some(StartedQueue {
                queue: self.queue(features),
                kick: self.kick.clone(),
            })],
            signals: DeviceSignals::new(line),
        }
    }

    fn put<T: vm_memory::ByteValued>(&self, address: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    fn get<T: vm_memory::ByteValued>(&self, address: u64) -> T {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }

    /// Writes one descriptor of the table at `table`.
    pub(crate) fn set_descriptor_at(&self, table: u64, index: u16, fields: (u64, u32, u16, u16)) {
        let (address, len, flags, next) = fields;
        let at = table + 16 * u64::from(index);
        self.put(at, address);
        self.put(at + 8, len);
        self.put(at + 12, flags);
        self.put(at + 14, next);
    }

    /// Writes one descriptor of the queue: address, length, flags, next.
    pub(crate) fn set_descriptor(&self, index: u16, fields: (u64, u32, u16, u16)) {
        self.set_descriptor_at(self.state.desc_table, index, fields);
    }

    /// Writes `pieces` as a chain from descriptor 0 of the table at `table`.
    pub(crate) fn write_table(&self, table: u64, pieces: &[Piece]) {
        for (index, piece) in (0..).zip(pieces) {
            let last = usize::from(index) + 1 == pieces.len();
            self.set_descriptor_at(
                table,
                index,
                (piece.address, piece.len, flags(piece, last), index + 1),
            );
        }
    }

    /// Makes a chain of `pieces` available; its head. Descriptors are taken round the table, so
    /// not more than it holds may be in flight.
    pub(crate) fn add(&mut self, pieces: &[Piece]) -> u16 {
        let size = self.state.size;
        let head = self.next_descriptor;
        let mut index = head;
        for (at, piece) in pieces.iter().enumerate() {
            let next = (index + 1) % size;
            let last = at + 1 == pieces.len();
            self.set_descriptor(index, (piece.address, piece.len, flags(piece, last), next));
            index = next;
        }
        self.next_descriptor = index;
        self.offer(head);
        head
    }

    /// Makes the chain that starts at `head` available, whatever it is.
    pub(crate) fn offer(&mut self, head: u16) {
        let slot = u64::from(self.avail % self.state.size);
        self.put(self.state.avail_ring + 4 + 2 * slot, head);
        self.set_avail_index(self.avail.wrapping_add(1));
    }

    /// Writes the available index.
    pub(crate) fn set_avail_index(&mut self, index: u16) {
        self.avail = index;
        let address = GuestAddress(self.state.avail_ring + 2);
        self.memory
            .store(index, address, Ordering::Release)
            .unwrap();
    }

    /// Writes the flags of the available ring.
    pub(crate) fn set_avail_flags(&self, flags: u16) {
        self.put(self.state.avail_ring, flags);
    }

    /// Writes the event index at the end of the available ring: an interrupt is wanted when the
    /// used index passes it.
    pub(crate) fn set_used_event(&self, index: u16) {
        self.put(
            self.state.avail_ring + 4 + 2 * u64::from(self.state.size),
            index,
        );
    }

    /// The flags of the used ring.
    pub(crate) fn used_flags(&self) -> u16 {
        self.get(self.state.used_ring)
    }

    /// The event index at the end of the used ring: a kick is wanted when the available index
    /// passes it.
    pub(crate) fn avail_event(&self) -> u16 {
        fence(Ordering::SeqCst);
        self.get(self.state.used_ring + 4 + 8 * u64::from(self.state.size))
    }

    /// The used index.
    pub(crate) fn used_index(&self) -> u16 {
        let address = GuestAddress(self.state.used_ring + 2);
        self.memory.load(address, Ordering::Acquire).unwrap()
    }

    /// Takes the next used element.
    pub(crate) fn take_used(&mut self) -> Option<Used> {
        if self.used_index() == self.used {
            return None;
        }
        let slot = u64::from(self.used % self.state.size);
        let at = self.state.used_ring + 4 + 8 * slot;
        self.used = self.used.wrapping_add(1);
        Some(Used {
            head: self.get(at),
            len: self.get(at + 4),
        })
    }

    /// Notifies the device, as a driver does that never leaves it out.
    pub(crate) fn kick(&self) {
        self.kick.write(1).unwrap();
    }
}

fn flags(piece: &Piece, last: bool) -> u16 {
    let next = if last { 0 } else { NEXT };
    next | if piece.write { WRITE } else { 0 }
}

/// What is written for the state in `text`, a file of the folder testdata, has to be `text` again:
/// the format does not change unless somebody wants it to. One that has to needs another version
/// of the state, and a way from this one.
#[track_caller]
pub(crate) fn golden<T: serde::Serialize + serde::de::DeserializeOwned>(text: &str) {
    let state: T = serde_json::from_str(text).unwrap();
    assert_eq!(serde_json::to_string_pretty(&state).unwrap() + "\n", text);
}
