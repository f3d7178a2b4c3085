// SPDX-License-Identifier: Apache-2.0
//! What the kernel is told to do with pages of the guest's memory.
//!
//! This is a module with unsafe code: the kernel is told about memory by address.

#![allow(unsafe_code)]

use std::io;
use std::ops::Range;

use brume_snapshot::memory_file::{is_hole, punch_hole};
use vm_memory::{FileOffset, GuestMemoryBackend, GuestMemoryRegion};

use super::MachineMemory;
use crate::page_set::{PAGE_SIZE, PageSet, Region, WORD_PAGES};

impl MachineMemory {
    /// Makes the pages of `words`, the first of which is word `first`, ones that are not there; what
    /// they hold is lost. Nobody else may use them.
    ///
    /// # Errors
    ///
    /// The host does not do it.
    pub(super) fn discard(&self, first: usize, words: Vec<u64>) -> io::Result<()> {
        let pages = PageSet::from_words(words);
        let before = first as u64 * WORD_PAGES;
        for (region, guest) in self.regions.iter().zip(self.guest.iter()) {
            let is_shared = guest.flags() & libc::MAP_SHARED != 0;
            let file = guest.file_offset().filter(|_| is_shared);
            let Range { start, end } = region.words();
            let within = start.saturating_sub(first)..end.saturating_sub(first);
            for range in pages.ranges_in(within) {
                let range = before + range.start..before + range.end;
                match file {
                    // They are there as long as the file has them.
                    Some(file) => take_away(region, file, &range)?,
                    None => advise(region, range, libc::MADV_DONTNEED)?,
                }
            }
        }
        Ok(())
    }
}

/// Takes pages away from the file that they are of.
///
/// # Errors
///
/// They are still there: of a large page that it cannot part, the host makes a part zeros and keeps
/// it.
fn take_away(region: &Region, file: &FileOffset, pages: &Range<u64>) -> io::Result<()> {
    let place = |page: u64| file.start() + page * PAGE_SIZE - region.offset;
    let bytes = place(pages.start)..place(pages.end);
    punch_hole(file.file(), &bytes)?;
    if is_hole(file.file(), &bytes)? {
        return Ok(());
    }
    Err(io::Error::other(
        "the host cannot part a large page of shared memory",
    ))
}

/// Gives the kernel an advice of those of `pages` that are in `region`.
///
/// # Errors
///
/// It does not take it.
pub(super) fn advise(region: &Region, pages: Range<u64>, advice: libc::c_int) -> io::Result<()> {
    let within = region.pages();
    let (start, end) = (pages.start.max(within.start), pages.end.min(within.end));
    let bytes = |pages: u64| usize::try_from(pages * PAGE_SIZE).map_err(io::Error::other);
    let len = bytes(end.saturating_sub(start))?;
    let address = region.host_address + bytes(start - within.start)?;
    loop {
        // SAFETY: the range is within a mapping of guest memory, which outlives the call. It is only
        // ever accessed as volatile, and no value of ours is there, so no advice surprises us.
        let result = unsafe { libc::madvise(address as *mut libc::c_void, len, advice) };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
