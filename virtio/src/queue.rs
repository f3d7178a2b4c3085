// SPDX-License-Identifier: Apache-2.0
//! Split virtqueues (virtio 1.3, section 2.7), from the device's side.
//!
//! The ring is walked here and not by `virtio-queue`, whose queue publishes each used element on
//! its own, does not know VIRTQ_AVAIL_F_NO_INTERRUPT, and ends a malformed chain as if it were
//! complete. Its descriptor layout is used, and its mock driver in the tests.
//!
//! The driver is hostile: every index, address and length comes from guest memory, can change
//! while it is looked at, and is therefore read once and checked after that. What cannot be made
//! sense of is a [`QueueError`], and the device that gets one asks for a reset.

mod chain;

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use crate::device::feature;
use crate::memory::GuestMemory;
#[cfg(test)]
use crate::testing::marks::{self, Site};

pub use chain::{Buffer, Buffers, Chain};

const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

const DESCRIPTOR_SIZE: u64 = 16;
const RING_HEADER: u64 = 4;
const INDEX_OFFSET: u64 = 2;
const AVAIL_ELEMENT: u64 = 2;
const USED_ELEMENT: u64 = 8;
const EVENT_SIZE: u64 = 2;

/// What is wrong with a queue.
#[derive(Debug, Error)]
pub enum QueueError {
    /// The size is zero, not a power of two, or larger than offered.
    #[error("a queue size of {size} descriptors is not a power of two up to {max}")]
    Size {
        /// What the driver chose.
        size: u16,
        /// What was offered.
        max: u16,
    },
    /// A ring is not aligned as section 2.7 asks.
    #[error("the {ring} at {address:#x} is not aligned")]
    Alignment {
        /// Which of the three.
        ring: &'static str,
        /// Guest-physical address.
        address: u64,
    },
    /// A ring is not in guest memory.
    #[error("the {ring} of {len} bytes at {address:#x} is not in guest memory")]
    Range {
        /// Which of the three.
        ring: &'static str,
        /// Guest-physical address.
        address: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// The available index went back, or further than the queue has descriptors.
    #[error("the available index {index} is not one that a driver can get to from {next}")]
    AvailIndex {
        /// The index that was read.
        index: u16,
        /// The index that is to be served next.
        next: u16,
    },
    /// A descriptor index is not below the size of its table.
    #[error("descriptor index {index} is outside its table of {size}")]
    DescriptorIndex {
        /// The index.
        index: u16,
        /// Size of the table in descriptors.
        size: u16,
    },
    /// A chain has more descriptors than any chain may have; most likely it is a loop.
    #[error("the descriptor chain from {head} is longer than {limit} or loops")]
    ChainLength {
        /// Head of the chain.
        head: u16,
        /// The most descriptors that were to be followed.
        limit: u16,
    },
    /// An indirect descriptor where none may be.
    #[error("descriptor chain {head} has an indirect descriptor where none may be")]
    Indirect {
        /// Head of the chain.
        head: u16,
    },
    /// An indirect table that is empty, too long or no multiple of a descriptor.
    #[error("descriptor chain {head} has an indirect table of {len} bytes")]
    IndirectLength {
        /// Head of the chain.
        head: u16,
        /// Length in bytes.
        len: u32,
    },
    /// A buffer for the device to read follows one for it to write.
    #[error("descriptor chain {head} has a readable buffer after a writable one")]
    Order {
        /// Head of the chain.
        head: u16,
    },
    /// A ring cannot be reached any more.
    #[error("guest memory of the queue cannot be reached")]
    Memory(#[from] GuestMemoryError),
}

/// Everything that defines a queue between two accesses to it: what the driver has configured and
/// how far the device has got.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    /// The largest size the device offers, in descriptors.
    pub max_size: u16,
    /// The size the driver chose.
    pub size: u16,
    /// Whether the driver has enabled the queue.
    pub ready: bool,
    /// Guest-physical address of the descriptor table.
    pub desc_table: u64,
    /// Guest-physical address of the available ring.
    pub avail_ring: u64,
    /// Guest-physical address of the used ring.
    pub used_ring: u64,
    /// The available index that is served next.
    pub next_avail: u16,
    /// The used index that is written next.
    pub next_used: u16,
}

impl QueueState {
    /// A queue that no driver has touched.
    pub fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            ..Self::default()
        }
    }

    /// Checks what the driver has configured.
    fn validate(&self, memory: &GuestMemory) -> Result<(), QueueError> {
        let Self {
            size,
            max_size: max,
            ..
        } = *self;
        if !size.is_power_of_two() || size > max {
            return Err(QueueError::Size { size, max });
        }
        let count = u64::from(size);
        let rings = [
            (
                "descriptor table",
                self.desc_table,
                16,
                DESCRIPTOR_SIZE * count,
            ),
            (
                "available ring",
                self.avail_ring,
                2,
                RING_HEADER + AVAIL_ELEMENT * count + EVENT_SIZE,
            ),
            (
                "used ring",
                self.used_ring,
                4,
                RING_HEADER + USED_ELEMENT * count + EVENT_SIZE,
            ),
        ];
        for (ring, address, align, len) in rings {
            if address % align != 0 {
                return Err(QueueError::Alignment { ring, address });
            }
            let inside = usize::try_from(len)
                .is_ok_and(|len| memory.check_range(GuestAddress(address), len))
                && address.checked_add(len).is_some();
            if !inside {
                return Err(QueueError::Range { ring, address, len });
            }
        }
        Ok(())
    }
}

/// A queue in use. Its geometry is what the driver had configured when it was made; what the
/// driver writes to the registers after that does not reach it.
#[derive(Debug)]
pub struct Queue {
    state: QueueState,
    memory: GuestMemory,
    event_idx: bool,
    indirect: bool,
    next_avail: Wrapping<u16>,
    /// The available index as it was last read; up to there entries may be taken.
    avail_end: Wrapping<u16>,
    next_used: Wrapping<u16>,
    /// The used index that the driver sees.
    published: Wrapping<u16>,
    /// The used index at the last decision over an interrupt.
    signalled: Wrapping<u16>,
}

impl Queue {
    /// Takes over a queue from its driver.
    ///
    /// # Errors
    ///
    /// The size, an alignment or an address is not what the standard allows.
    pub fn new(state: QueueState, memory: GuestMemory, features: u64) -> Result<Self, QueueError> {
        state.validate(&memory)?;
        Ok(Self {
            event_idx: features & feature::EVENT_IDX != 0,
            indirect: features & feature::INDIRECT_DESC != 0,
            next_avail: Wrapping(state.next_avail),
            avail_end: Wrapping(state.next_avail),
            next_used: Wrapping(state.next_used),
            published: Wrapping(state.next_used),
            signalled: Wrapping(state.next_used),
            state,
            memory,
        })
    }

    /// The state, with all that was pushed counted as used.
    pub fn state(&self) -> QueueState {
        QueueState {
            next_avail: self.next_avail.0,
            next_used: self.next_used.0,
            ..self.state
        }
    }

    /// The memory the queue lies in.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The number of descriptors.
    pub fn size(&self) -> u16 {
        self.state.size
    }

    /// How many chains the driver has made available, as far as that was looked at, that were not
    /// pushed as used yet.
    pub fn in_flight(&self) -> u16 {
        (self.avail_end - self.next_used).0
    }

    /// Takes the next available chain into `chain`; `false` if there is none.
    ///
    /// # Errors
    ///
    /// The driver broke a rule of the ring, and the queue cannot be used any more.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        if self.next_avail == self.avail_end && !self.look_for_avail()? {
            return Ok(false);
        }
        let slot = u64::from(self.next_avail.0 & (self.state.size - 1));
        let offset = RING_HEADER + AVAIL_ELEMENT * slot;
        let head: u16 = self.memory.load(
            GuestAddress(self.state.avail_ring + offset),
            Ordering::Relaxed,
        )?;
        chain.walk(
            &self.memory,
            self.state.desc_table,
            self.state.size,
            head,
            self.indirect,
        )?;
        self.next_avail += 1;
        Ok(true)
    }

    /// Puts the chain that was popped last back, to be popped again.
    ///
    /// It must not have been pushed as used, and it can be done once for each pop.
    pub fn undo_pop(&mut self) {
        self.next_avail -= 1;
    }

    /// Reads the available index; whether there is something to take.
    fn look_for_avail(&mut self) -> Result<bool, QueueError> {
        let address = GuestAddress(self.state.avail_ring + INDEX_OFFSET);
        // Acquire: the entries up to the index were written before it.
        let index = Wrapping(self.memory.load::<u16>(address, Ordering::Acquire)?);
        // What was taken and not used yet counts: a driver has no descriptors for more, and whoever
        // holds chains back must not be made to hold any number.
        let taken = (self.next_avail - self.next_used).0;
        let in_flight = (index - self.next_used).0;
        if in_flight < taken || in_flight > self.state.size {
            return Err(QueueError::AvailIndex {
                index: index.0,
                next: self.next_avail.0,
            });
        }
        self.avail_end = index;
        Ok(index != self.next_avail)
    }

    /// Writes one used element, of the chain that starts at `head` and in which the device wrote
    /// `len` bytes. The driver sees it after [`Queue::publish`].
    ///
    /// # Errors
    ///
    /// The used ring cannot be reached.
    pub fn push_used(&mut self, head: u16, len: u32) -> Result<(), QueueError> {
        let slot = u64::from(self.next_used.0 & (self.state.size - 1));
        let offset = RING_HEADER + USED_ELEMENT * slot;
        // struct virtq_used_elem: le32 id, le32 len.
        let element = u64::from(head) | u64::from(len) << 32;
        let address = GuestAddress(self.state.used_ring + offset);
        self.memory.write_obj(element.to_le(), address)?;
        #[cfg(test)]
        marks::made(Site::UsedElement, &self.memory, address, 8);
        self.next_used += 1;
        Ok(())
    }

    /// Shows the driver all used elements that were pushed.
    ///
    /// # Errors
    ///
    /// The used ring cannot be reached.
    pub fn publish(&mut self) -> Result<(), QueueError> {
        if self.published == self.next_used {
            return Ok(());
        }
        let address = GuestAddress(self.state.used_ring + INDEX_OFFSET);
        // Release: the elements have to be there before the index says so.
        self.memory
            .store(self.next_used.0, address, Ordering::Release)?;
        #[cfg(test)]
        marks::made(Site::UsedIndex, &self.memory, address, 2);
        self.published = self.next_used;
        Ok(())
    }

    /// Whether the driver wants an interrupt for what was published since the last call.
    ///
    /// # Errors
    ///
    /// The available ring cannot be reached.
    pub fn needs_interrupt(&mut self) -> Result<bool, QueueError> {
        let (old, new) = (self.signalled, self.published);
        if old == new {
            return Ok(false);
        }
        self.signalled = new;
        // The driver writes its wish and then looks at the used index; we have written the index
        // and now look at the wish. Without a full fence both could miss each other.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let offset = RING_HEADER + AVAIL_ELEMENT * u64::from(self.state.size);
            let address = GuestAddress(self.state.avail_ring + offset);
            let event = Wrapping(self.memory.load::<u16>(address, Ordering::Relaxed)?);
            return Ok(new - event - Wrapping(1) < new - old);
        }
        let flags: u16 = self
            .memory
            .load(GuestAddress(self.state.avail_ring), Ordering::Relaxed)?;
        Ok(flags & AVAIL_NO_INTERRUPT == 0)
    }

    /// Asks the driver not to notify: the queue is being looked at anyway.
    ///
    /// # Errors
    ///
    /// The used ring cannot be reached.
    pub fn suppress_kicks(&mut self) -> Result<(), QueueError> {
        if !self.event_idx {
            let address = GuestAddress(self.state.used_ring);
            self.memory
                .store(USED_NO_NOTIFY, address, Ordering::Relaxed)?;
            #[cfg(test)]
            marks::made(Site::UsedFlags, &self.memory, address, 2);
        }
        // With EVENT_IDX the driver notifies when it passes the event index, which stays behind.
        Ok(())
    }

    /// Asks the driver to notify about the next chain; `true` if one has come in meanwhile, for
    /// which there may be no notification.
    ///
    /// # Errors
    ///
    /// A ring cannot be reached or makes no sense.
    pub fn enable_kicks(&mut self) -> Result<bool, QueueError> {
        let used = self.state.used_ring;
        if self.event_idx {
            let offset = RING_HEADER + USED_ELEMENT * u64::from(self.state.size);
            let address = GuestAddress(used + offset);
            self.memory
                .store(self.next_avail.0, address, Ordering::Relaxed)?;
            #[cfg(test)]
            marks::made(Site::AvailEvent, &self.memory, address, 2);
        } else {
            let address = GuestAddress(used);
            self.memory.store(0u16, address, Ordering::Relaxed)?;
            #[cfg(test)]
            marks::made(Site::UsedFlags, &self.memory, address, 2);
        }
        // As in `needs_interrupt`, the other way round.
        fence(Ordering::SeqCst);
        self.look_for_avail()
    }
}

#[cfg(test)]
mod tests;
