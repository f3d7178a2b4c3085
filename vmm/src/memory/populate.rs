// SPDX-License-Identifier: Apache-2.0
//! Bringing pages of the guest's memory in before they are touched.
//!
//! This is a module with unsafe code: the kernel is told about memory by address.

#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::sync::Arc;

use brume_virtio::GuestMemory;

use super::MachineMemory;
use super::handler::Handler;
use crate::page_set::{PAGE_SIZE, PageSet, Region};

/// How many pages are brought in between two looks at whether that is still wanted: 1 MiB.
const STEP: u64 = 256;

/// A guest's pages, for a thread that may outlive the machine.
pub(crate) struct Pages {
    regions: Vec<Region>,
    /// Keeps the mapping.
    _guest: GuestMemory,
    /// Keeps the registration: without it the pages would become zeros.
    _handler: Option<Arc<Handler>>,
}

impl Pages {
    pub(crate) fn of(memory: &MachineMemory) -> Self {
        Self {
            regions: memory.regions.clone(),
            _guest: memory.guest.clone(),
            _handler: memory.handler.clone(),
        }
    }

    /// Brings `pages` in and waits for them; `go_on` is asked now and then.
    ///
    /// # Errors
    ///
    /// The host has no such call (before Linux 5.14), or no memory, or the file does not give them.
    pub(crate) fn read_in(
        &self,
        pages: &PageSet,
        mut go_on: impl FnMut() -> bool,
    ) -> io::Result<()> {
        for region in &self.regions {
            for Range { mut start, end } in pages.ranges_in(region.words()) {
                while start < end {
                    if !go_on() {
                        return Ok(());
                    }
                    let part = start..end.min(start + STEP);
                    start = part.end;
                    advise(region, part, libc::MADV_POPULATE_READ)?;
                }
            }
        }
        Ok(())
    }

    /// Lets the host begin to read `pages` of a file, without a wait for them.
    pub(crate) fn read_ahead(&self, pages: &PageSet) {
        for region in &self.regions {
            for range in pages.ranges_in(region.words()) {
                // It is a hint: the pages come later if it is not taken.
                let _ = advise(region, range, libc::MADV_WILLNEED);
            }
        }
    }
}

fn advise(region: &Region, pages: Range<u64>, advice: libc::c_int) -> io::Result<()> {
    let within = region.pages();
    let (start, end) = (pages.start.max(within.start), pages.end.min(within.end));
    let bytes = |pages: u64| usize::try_from(pages * PAGE_SIZE).map_err(io::Error::other);
    let len = bytes(end.saturating_sub(start))?;
    let address = region.host_address + bytes(start - within.start)?;
    loop {
        // SAFETY: the range is within a mapping of guest memory, which outlives the call. Neither
        // advice changes what is read there.
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
