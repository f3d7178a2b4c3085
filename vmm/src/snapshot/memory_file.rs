// SPDX-License-Identifier: Apache-2.0
//! The guest's memory on its way to a file.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;

use vm_memory::{VolatileMemoryError, WriteVolatile};

use crate::memory::MachineMemory;
use crate::page_set::{PAGE_SIZE, PageSet};

/// What becomes of pages of zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Zeros {
    /// Nothing: where the file is to have them, it has a hole.
    Skipped,
    /// They are written, over what the file has there.
    Written,
}

/// Writes `pages` of `memory` to their places in `file`; how many bytes that were.
///
/// # Errors
///
/// The file does not take them.
pub(super) fn write(
    memory: &MachineMemory,
    pages: &PageSet,
    file: &File,
    zeros: Zeros,
) -> io::Result<u64> {
    let out = Out { memory, file };
    let mut written = 0;
    for region in &memory.regions {
        for range in pages.ranges_in(region.words()) {
            written += match zeros {
                Zeros::Written => out.put(range)?,
                Zeros::Skipped => out.put_data(range)?,
            };
        }
    }
    Ok(written)
}

struct Out<'a> {
    memory: &'a MachineMemory,
    file: &'a File,
}

impl Out<'_> {
    /// Writes those of `pages` that have something in them.
    fn put_data(&self, pages: Range<u64>) -> io::Result<u64> {
        let mut written = 0;
        let mut start = pages.start;
        for page in pages.clone() {
            if self.memory.is_zero(page)? {
                written += self.put(start..page)?;
                start = page + 1;
            }
        }
        Ok(written + self.put(start..pages.end)?)
    }

    fn put(&self, pages: Range<u64>) -> io::Result<u64> {
        if pages.is_empty() {
            return Ok(0);
        }
        let len = (pages.end - pages.start) * PAGE_SIZE;
        let mut file = self.file;
        file.seek(SeekFrom::Start(pages.start * PAGE_SIZE))?;
        let slice = self.memory.slice(pages)?;
        file.write_all_volatile(&slice)
            .map_err(|error| match error {
                VolatileMemoryError::IOError(error) => error,
                error => io::Error::other(error),
            })?;
        Ok(len)
    }
}
