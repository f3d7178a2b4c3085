// SPDX-License-Identifier: Apache-2.0
//! Descriptor chains (virtio 1.3, section 2.7.5): following one, and reaching its buffers.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::{DESCRIPTOR_SIZE, QueueError};
use crate::memory::{GuestMemory, IoBuffers};
#[cfg(test)]
use crate::testing::marks::{self, Site};

/// The most descriptors a chain may have, with those of its indirect table. The standard's limit
/// is the queue size; drivers go past it with indirect tables, up to what the host's vectored
/// I/O takes.
const MAX_CHAIN: u16 = 1024;

/// A piece of guest memory that a descriptor names. It is checked when it is accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical address.
    pub address: GuestAddress,
    /// Length in bytes; can be zero.
    pub len: u32,
}

/// The buffers of a chain in one direction, as one run of bytes.
#[derive(Debug, Default)]
pub struct Buffers {
    list: Vec<Buffer>,
    len: u64,
}

impl Buffers {
    fn clear(&mut self) {
        self.list.clear();
        self.len = 0;
    }

    fn push(&mut self, buffer: Buffer) {
        self.len += u64::from(buffer.len);
        self.list.push(buffer);
    }

    /// How many bytes there are.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The single buffers, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Buffer> {
        self.list.iter()
    }

    /// The address of the last byte; it is checked when it is accessed.
    pub fn last_byte(&self) -> Option<GuestAddress> {
        let last = self.list.iter().rev().find(|buffer| buffer.len > 0)?;
        let offset = u64::from(last.len) - 1;
        // An address past the end of the address space is refused by guest memory.
        Some(GuestAddress(last.address.0.saturating_add(offset)))
    }

    /// The parts of buffers that make up `len` bytes from `offset`, as far as there are any.
    fn parts(&self, offset: u64, len: u64) -> impl Iterator<Item = (GuestAddress, usize)> {
        let (mut skip, mut left) = (offset, len);
        self.list.iter().filter_map(move |buffer| {
            let start = skip.min(u64::from(buffer.len));
            let take = (u64::from(buffer.len) - start).min(left);
            skip -= start;
            left -= take;
            // An address past the end of the address space is refused by guest memory.
            let address = GuestAddress(buffer.address.0.saturating_add(start));
            (take > 0).then_some((address, usize::try_from(take).ok()?))
        })
    }

    /// Copies bytes from `offset` on to `data`; how many there were.
    ///
    /// # Errors
    ///
    /// A buffer is not in guest memory.
    pub fn read_at(
        &self,
        memory: &GuestMemory,
        offset: u64,
        data: &mut [u8],
    ) -> Result<usize, GuestMemoryError> {
        let mut done = 0;
        for (address, len) in self.parts(offset, data.len() as u64) {
            if let Some(part) = data.get_mut(done..done + len) {
                memory.read_slice(part, address)?;
            }
            done += len;
        }
        Ok(done)
    }

    /// Copies `data` to the bytes from `offset` on; how many there was room for.
    ///
    /// # Errors
    ///
    /// A buffer is not in guest memory.
    pub fn write_at(
        &self,
        memory: &GuestMemory,
        offset: u64,
        data: &[u8],
    ) -> Result<usize, GuestMemoryError> {
        let mut done = 0;
        for (address, len) in self.parts(offset, data.len() as u64) {
            if let Some(part) = data.get(done..done + len) {
                memory.write_slice(part, address)?;
                #[cfg(test)]
                marks::made(Site::Copy, memory, address, len);
            }
            done += len;
        }
        Ok(done)
    }

    /// Adds `len` bytes from `offset` on to `target`, for host I/O.
    ///
    /// # Errors
    ///
    /// A buffer is not in guest memory; some may have been added then.
    pub fn add_to(
        &self,
        target: &mut IoBuffers,
        offset: u64,
        len: u64,
    ) -> Result<(), GuestMemoryError> {
        self.parts(offset, len)
            .try_for_each(|(address, len)| target.push(address, len))
    }
}

/// A chain that was popped from a queue. It is meant to be used again for the next one, so that
/// no memory is allocated per request.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    readable: Buffers,
    writable: Buffers,
}

impl Chain {
    /// An empty chain, to pop into.
    pub fn new() -> Self {
        Self::default()
    }

    /// The index of the first descriptor, which names the chain in the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the device reads.
    pub fn readable(&self) -> &Buffers {
        &self.readable
    }

    /// What the device writes.
    pub fn writable(&self) -> &Buffers {
        &self.writable
    }

    /// Follows the chain that starts at `head`.
    pub(super) fn walk(
        &mut self,
        memory: &GuestMemory,
        table: u64,
        size: u16,
        head: u16,
        indirect: bool,
    ) -> Result<(), QueueError> {
        self.head = head;
        self.readable.clear();
        self.writable.clear();
        let Some(descriptor) = self.walk_table(memory, table, size, head, indirect)? else {
            return Ok(());
        };
        let (len, table) = (descriptor.len(), descriptor.addr().0);
        let bytes = u64::from(len);
        let count = u16::try_from(bytes / DESCRIPTOR_SIZE).ok().filter(|count| {
            bytes.is_multiple_of(DESCRIPTOR_SIZE) && (1..=MAX_CHAIN).contains(count)
        });
        let size = count.ok_or(QueueError::IndirectLength { head, len })?;
        match self.walk_table(memory, table, size, 0, false)? {
            None => Ok(()),
            Some(_) => Err(QueueError::Indirect { head }),
        }
    }

    /// Follows descriptors in one table, until the chain ends or goes on in an indirect table,
    /// whose descriptor is then returned.
    fn walk_table(
        &mut self,
        memory: &GuestMemory,
        table: u64,
        size: u16,
        first: u16,
        indirect: bool,
    ) -> Result<Option<Descriptor>, QueueError> {
        let head = self.head;
        let limit = size.min(MAX_CHAIN);
        let mut index = first;
        for _ in 0..limit {
            if index >= size {
                return Err(QueueError::DescriptorIndex { index, size });
            }
            let offset = DESCRIPTOR_SIZE * u64::from(index);
            let address = GuestAddress(table.saturating_add(offset));
            let descriptor: Descriptor = memory.read_obj(address)?;
            if descriptor.refers_to_indirect_table() {
                // Section 2.7.5.3.1: negotiated, not in a table itself, and the chain ends with it.
                if !indirect || descriptor.has_next() {
                    return Err(QueueError::Indirect { head });
                }
                return Ok(Some(descriptor));
            }
            self.add(&descriptor)?;
            if !descriptor.has_next() {
                return Ok(None);
            }
            index = descriptor.next();
        }
        Err(QueueError::ChainLength { head, limit })
    }

    fn add(&mut self, descriptor: &Descriptor) -> Result<(), QueueError> {
        let buffer = Buffer {
            address: descriptor.addr(),
            len: descriptor.len(),
        };
        if descriptor.is_write_only() {
            self.writable.push(buffer);
        } else if self.writable.list.is_empty() {
            self.readable.push(buffer);
        } else {
            return Err(QueueError::Order { head: self.head });
        }
        Ok(())
    }
}
