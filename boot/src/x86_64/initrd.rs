// SPDX-License-Identifier: Apache-2.0
//! The initrd: as high in low RAM as the kernel can reach it, so that it is out of the way of a
//! kernel that decompresses itself or grows its page tables.

use std::fs::File;
use std::ops::Range;

use vm_memory::GuestMemoryBackend;

use crate::error::InitrdError;
use crate::guest;

const PAGE: u64 = 4096;

/// Reads `file` to the last whole pages between `kernel_end` and `end`.
pub(super) fn load<M: GuestMemoryBackend>(
    memory: &M,
    file: &File,
    kernel_end: u64,
    end: u64,
) -> Result<Range<u64>, InitrdError> {
    let size = file.metadata().map_err(InitrdError::Read)?.len();
    if size == 0 {
        return Err(InitrdError::Empty);
    }
    let first = kernel_end.next_multiple_of(PAGE);
    let last = end / PAGE * PAGE;
    let room = last.saturating_sub(first);
    if size > room {
        return Err(InitrdError::TooLarge { size, room });
    }
    let start = (last - size) / PAGE * PAGE;
    let read = guest::copy_file(memory, start, file, 0, size).map_err(InitrdError::Copy)?;
    if read < size {
        return Err(InitrdError::Truncated { read, size });
    }
    Ok(start..start + size)
}
