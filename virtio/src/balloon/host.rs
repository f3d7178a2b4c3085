// SPDX-License-Identifier: Apache-2.0
//! Giving pages of guest memory back to the host.
//!
//! This is a module with unsafe code: the kernel is told about memory by address.

#![allow(unsafe_code)]

use std::io;

use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::memory::GuestMemory;
#[cfg(test)]
use crate::testing::marks::{self, Site};
#[cfg(test)]
use vm_memory::GuestAddress;

/// The unit in which memory is given back, in bytes: the smallest page of the host, or the reserved
/// huge page that the memory is of.
const PAGE: u64 = 4096;
const HUGE_PAGE: u64 = 2 << 20;

/// Gives the whole pages between the guest addresses `start` and `end` back, as far as they are
/// guest memory; how many bytes that were. The guest finds other bytes there from then on, most
/// often zeroes.
///
/// # Errors
///
/// The host does not take some of them; those that come before it may be gone.
pub(super) fn give_back(memory: &GuestMemory, start: u64, end: u64) -> io::Result<u64> {
    let mut given = 0;
    for region in memory.iter() {
        let page = if region.flags() & libc::MAP_HUGETLB == 0 {
            PAGE
        } else {
            HUGE_PAGE
        };
        let start = start.checked_next_multiple_of(page).unwrap_or(u64::MAX);
        let end = end - end % page;
        let base = region.start_addr().raw_value();
        let first = start.max(base);
        let last = end.min(base.saturating_add(region.len()));
        if first >= last {
            continue;
        }
        let bytes = last - first;
        let len = usize::try_from(bytes).map_err(io::Error::other)?;
        let slice = region
            .get_slice(MemoryRegionAddress(first - base), len)
            .map_err(io::Error::other)?;
        // In a private mapping our copies go, be they of zeroes or of a file; in a shared one only
        // a hole in what it maps frees anything.
        let advice = if region.flags() & libc::MAP_SHARED == 0 {
            libc::MADV_DONTNEED
        } else {
            libc::MADV_REMOVE
        };
        // SAFETY: the slice is a part of a mapping of guest memory, which `memory` keeps alive.
        // Nothing but the guest's bytes is lost: they are only ever accessed as volatile, and no
        // value of ours is among them.
        let result = unsafe { libc::madvise(slice.ptr_guard_mut().as_ptr().cast(), len, advice) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        // What the guest reads there has changed, and KVM does not know.
        slice.bitmap().mark_dirty(0, len);
        #[cfg(test)]
        marks::made(Site::GivenBack, memory, GuestAddress(first), len);
        given += bytes;
    }
    Ok(given)
}

#[cfg(test)]
pub(super) mod tests;
