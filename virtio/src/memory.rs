// SPDX-License-Identifier: Apache-2.0
//! Guest memory as devices see it, and the one way to its raw addresses.
//!
//! This is a module with unsafe code: host I/O calls need plain pointers into guest memory.

#![allow(unsafe_code)]

use libc::iovec;
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap};

#[cfg(test)]
use crate::testing::marks::{self, Site};

/// The guest's memory. The bitmap collects what the VMM itself writes, which KVM's dirty log does
/// not see; a second alias without it would lose pages silently, so this is the only one.
pub type GuestMemory = GuestMemoryMmap<AtomicBitmap>;

/// A list of places in guest memory in the form that `readv`, `writev` and io_uring take.
///
/// The pointers stay good as long as the [`GuestMemory`] that they were made from is mapped; the
/// list keeps a clone of it for that. The kernel writes through them behind the bitmap's back, so
/// whoever lets it do so calls [`IoBuffers::mark_written`] afterwards.
#[derive(Debug)]
pub struct IoBuffers {
    vectors: Vec<iovec>,
    /// Guest address of each vector, for marking.
    addresses: Vec<GuestAddress>,
    memory: GuestMemory,
    bytes: usize,
}

// SAFETY: the pointers lead into a shared mapping of guest memory that `memory` keeps alive; they
// belong to no thread, and access through them is volatile by nature.
unsafe impl Send for IoBuffers {}

impl IoBuffers {
    /// An empty list over `memory`.
    pub fn new(memory: GuestMemory) -> Self {
        Self {
            vectors: Vec::new(),
            addresses: Vec::new(),
            memory,
            bytes: 0,
        }
    }

    /// Empties the list and keeps its room.
    pub fn clear(&mut self) {
        self.vectors.clear();
        self.addresses.clear();
        self.bytes = 0;
    }

    /// Adds `len` bytes of guest memory at `address`.
    ///
    /// # Errors
    ///
    /// Part of the range is not guest memory; the list is unchanged then.
    pub fn push(&mut self, address: GuestAddress, len: usize) -> Result<(), GuestMemoryError> {
        let before = self.vectors.len();
        let mut at = address.0;
        for slice in self.memory.get_slices(address, len) {
            let slice = match slice {
                Ok(slice) => slice,
                Err(error) => {
                    self.vectors.truncate(before);
                    self.addresses.truncate(before);
                    return Err(error);
                }
            };
            let iov_base = slice.ptr_guard_mut().as_ptr().cast();
            self.vectors.push(iovec {
                iov_base,
                iov_len: slice.len(),
            });
            self.addresses.push(GuestAddress(at));
            // In range: the slice ends inside guest memory.
            at = at.wrapping_add(slice.len() as u64);
        }
        self.bytes += len;
        Ok(())
    }

    /// The vectors. They must not be used after the list is cleared or dropped.
    pub fn as_iovecs(&self) -> &[iovec] {
        &self.vectors
    }

    /// How many bytes the list covers.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether the list covers no byte.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Marks the first `count` bytes of the list as written by the VMM.
    pub fn mark_written(&self, count: usize) {
        let mut left = count;
        for (vector, &address) in self.vectors.iter().zip(&self.addresses) {
            let len = vector.iov_len.min(left);
            if len == 0 {
                break;
            }
            if let Ok(slice) = self.memory.get_slice(address, len) {
                slice.bitmap().mark_dirty(0, len);
                #[cfg(test)]
                marks::made(Site::HostIo, &self.memory, address, len);
            }
            left -= len;
        }
    }
}

#[cfg(test)]
mod marking;

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryRegion};

    use super::*;

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[
            (GuestAddress(0), 0x4000),
            (GuestAddress(0x4000), 0x4000),
            (GuestAddress(0x10000), 0x1000),
        ])
        .unwrap()
    }

    #[test]
    fn a_range_over_two_regions_becomes_two_vectors() {
        let mut buffers = IoBuffers::new(memory());
        buffers.push(GuestAddress(0x3ff0), 0x20).unwrap();
        let lens: Vec<_> = buffers.as_iovecs().iter().map(|v| v.iov_len).collect();
        assert_eq!(lens, [0x10, 0x10]);
        assert_eq!(buffers.len(), 0x20);
    }

    #[test]
    fn a_range_that_leaves_guest_memory_changes_nothing() {
        let mut buffers = IoBuffers::new(memory());
        buffers.push(GuestAddress(0x10), 8).unwrap();
        for (address, len) in [(0x7ff0, 0x20), (0x8000, 1), (u64::MAX, 2), (0xffff, 2)] {
            assert!(
                buffers.push(GuestAddress(address), len).is_err(),
                "{address:#x}"
            );
        }
        assert_eq!(buffers.as_iovecs().len(), 1);
        assert_eq!(buffers.len(), 8);
    }

    #[test]
    fn exactly_the_pages_written_are_marked() {
        let memory = memory();
        let mut buffers = IoBuffers::new(memory.clone());
        buffers.push(GuestAddress(0x1000), 0x1000).unwrap();
        buffers.push(GuestAddress(0x10000), 0x1000).unwrap();
        buffers.mark_written(0x1001);
        let dirty = |page: u64| {
            let region = memory.find_region(GuestAddress(page)).unwrap();
            let offset = page - region.start_addr().0;
            region.bitmap().dirty_at(usize::try_from(offset).unwrap())
        };
        assert_eq!(
            [0, 0x1000, 0x2000, 0x4000, 0x10000].map(dirty),
            [false, true, false, false, true]
        );
        memory.write_obj(1u8, GuestAddress(0x4000)).unwrap();
        assert!(dirty(0x4000));
    }
}
