// SPDX-License-Identifier: Apache-2.0
//! Bringing pages of the guest's memory in before they are touched.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use brume_virtio::GuestMemory;

use super::MachineMemory;
use super::advise::advise;
use super::handler::Handler;
use crate::page_set::{PageSet, Region};

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
