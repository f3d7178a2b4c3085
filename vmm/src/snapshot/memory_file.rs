// SPDX-License-Identifier: Apache-2.0
//! The guest's memory on its way to a file.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;

use brume_virtio::GuestMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice, WriteVolatile};

use crate::page_set::{PAGE_SIZE, PageSet, Region};

/// The same as [`PAGE_SIZE`].
const PAGE: usize = 4096;

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
    memory: &GuestMemory,
    regions: &[Region],
    pages: &PageSet,
    file: &File,
    zeros: Zeros,
) -> io::Result<u64> {
    let mut written = 0;
    for region in regions {
        for range in pages.ranges_in(region.words()) {
            let out = Out {
                memory,
                region,
                file,
            };
            written += match zeros {
                Zeros::Written => out.put(range)?,
                Zeros::Skipped => out.put_data(range)?,
            };
        }
    }
    Ok(written)
}

struct Out<'a> {
    memory: &'a GuestMemory,
    region: &'a Region,
    file: &'a File,
}

impl Out<'_> {
    /// Writes those of `pages` that have something in them.
    fn put_data(&self, pages: Range<u64>) -> io::Result<u64> {
        let mut written = 0;
        let mut start = pages.start;
        for page in pages.clone() {
            if self.is_zero(page)? {
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
        let slice = self.slice(pages.start, len)?;
        let mut file = self.file;
        file.seek(SeekFrom::Start(pages.start * PAGE_SIZE))?;
        file.write_all_volatile(&slice)
            .map_err(|error| match error {
                vm_memory::VolatileMemoryError::IOError(error) => error,
                error => io::Error::other(error),
            })?;
        Ok(len)
    }

    fn is_zero(&self, page: u64) -> io::Result<bool> {
        let slice = self.slice(page, PAGE_SIZE)?;
        // Most pages with something in them have it at their beginning.
        if slice.read_obj::<u64>(0).is_ok_and(|word| word != 0) {
            return Ok(false);
        }
        let mut copy = [0; PAGE];
        slice.copy_to(&mut copy);
        Ok(copy == [0; PAGE])
    }

    fn slice(
        &self,
        page: u64,
        len: u64,
    ) -> io::Result<VolatileSlice<'_, impl vm_memory::bitmap::BitmapSlice>> {
        let address = self.region.guest_address + (page * PAGE_SIZE - self.region.offset);
        let len = usize::try_from(len).map_err(io::Error::other)?;
        self.memory
            .get_slice(GuestAddress(address), len)
            .map_err(io::Error::other)
    }
}
