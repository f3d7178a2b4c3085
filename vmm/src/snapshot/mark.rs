// SPDX-License-Identifier: Apache-2.0
//! The mark by which a state file and a memory file know that they belong together.
//!
//! A memory file has the form that Firecracker's has, in which there is no place for a name. But a
//! page of it is the firmware's, and most of that page is free: each snapshot writes 16 random bytes
//! there and into its state file. The page is written with each snapshot, so a diff has it too, and
//! a base has the mark of the diff that was merged into it last.

use brume_boot::layout;
use brume_virtio::GuestMemory;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::page_set::{PAGE_SIZE, PageSet};

/// Where the mark is in the page.
const OFFSET: u64 = 2048;
/// What begins it in memory.
const MAGIC: [u8; 8] = *b"BRUMEMRK";

// Merging a diff leaves the mark for the end.
const _: () = assert!(brume_snapshot::MARK_PAGE.start == layout::VMGENID_PAGE);

/// A mark.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Mark(String);

fn place() -> GuestAddress {
    GuestAddress(layout::VMGENID_PAGE + OFFSET)
}

impl Mark {
    /// The page that has it, in a memory of `size` bytes.
    pub(super) fn page(size: u64) -> PageSet {
        let mut pages = PageSet::empty(size);
        // It is in the first region, which a memory file begins with.
        pages.insert(layout::VMGENID_PAGE / PAGE_SIZE);
        pages
    }

    /// A mark that no other snapshot has.
    ///
    /// # Errors
    ///
    /// The host gives no random bytes.
    pub(super) fn new() -> Result<Self, getrandom::Error> {
        Ok(Self(format!(
            "{:016x}{:016x}",
            getrandom::u64()?,
            getrandom::u64()?
        )))
    }

    /// Writes it to the memory of a guest.
    ///
    /// # Errors
    ///
    /// The guest has less memory than any.
    pub(super) fn write(&self, memory: &GuestMemory) -> Result<(), GuestMemoryError> {
        let bytes = [&MAGIC, self.0.as_bytes()].concat();
        memory.write_slice(&bytes, place())
    }

    /// Whether `memory` has this mark.
    ///
    /// # Errors
    ///
    /// The guest has less memory than any.
    pub(super) fn is_in(&self, memory: &GuestMemory) -> Result<bool, GuestMemoryError> {
        let wanted = [&MAGIC, self.0.as_bytes()].concat();
        let mut found = vec![0; wanted.len().min(64)];
        memory.read_slice(&mut found, place())?;
        Ok(found == wanted)
    }
}
