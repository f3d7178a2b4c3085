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

#[cfg(test)]
mod tests {
    use super::super::testing::{bytes_at, file, memory};
    use super::*;

    #[test]
    fn it_ends_in_the_last_page_that_the_kernel_reaches() {
        let memory = memory(4);
        let range = load(&memory, &file(b"initrd"), 0x10_0001, 0x30_0800).unwrap();
        assert_eq!(range, 0x2f_f000..0x2f_f006);
        assert_eq!(bytes_at(&memory, range.start, 6), b"initrd");
    }

    #[test]
    fn it_may_fill_the_room_to_the_last_page_but_no_more() {
        let memory = memory(4);
        let contents = vec![1; 0x2000];
        let range = load(&memory, &file(&contents), 0x30_0000, 0x30_2000).unwrap();
        assert_eq!(range, 0x30_0000..0x30_2000);
        let error = load(&memory, &file(&contents), 0x30_0001, 0x30_2000).unwrap_err();
        assert!(matches!(
            error,
            InitrdError::TooLarge {
                size: 0x2000,
                room: 0x1000
            }
        ));
        let error = load(&memory, &file(&contents), 0x40_0000, 0x30_0000).unwrap_err();
        assert!(matches!(error, InitrdError::TooLarge { room: 0, .. }));
    }

    #[test]
    fn an_empty_file_is_not_an_initrd() {
        let error = load(&memory(4), &file(b""), 0x10_0000, 0x20_0000).unwrap_err();
        assert!(matches!(error, InitrdError::Empty));
    }
}
