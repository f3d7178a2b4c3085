// SPDX-License-Identifier: Apache-2.0
//! Reading files into guest memory, and what guest memory looks like.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};
use vm_memory::{GuestMemoryRegion, GuestUsize};

/// Reads from `offset` on until `buffer` is full or the file ends; returns how much was read.
pub(crate) fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        let position = offset.saturating_add(u64::try_from(filled).unwrap_or(u64::MAX));
        match file.read_at(rest, position) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// The `T` at `offset` of `bytes`, or `None` if it does not lie inside.
pub(crate) fn parse<T: ByteValued + Default>(bytes: &[u8], offset: usize) -> Option<T> {
    let mut value = T::default();
    let end = offset.checked_add(size_of::<T>())?;
    value
        .as_mut_slice()
        .copy_from_slice(bytes.get(offset..end)?);
    Some(value)
}

/// Copies `size` bytes of `file` from `offset` on to `address`, straight from the page cache.
/// Returns how many bytes were copied: fewer than `size` if the file ends before.
pub(crate) fn copy_file<M: GuestMemoryBackend>(
    memory: &M,
    address: u64,
    mut file: &File,
    offset: u64,
    size: u64,
) -> Result<u64, GuestMemoryError> {
    file.seek(SeekFrom::Start(offset))
        .map_err(GuestMemoryError::IOError)?;
    let mut copied = 0;
    // One read moves at most 2 GiB, and may move less.
    while copied < size {
        let rest = usize::try_from(size - copied).unwrap_or(usize::MAX);
        let target = address
            .checked_add(copied)
            .ok_or(GuestMemoryError::GuestAddressOverflow)?;
        match memory.read_volatile_from(GuestAddress(target), &mut file, rest)? {
            0 => break,
            read => copied += u64::try_from(read).unwrap_or(0),
        }
    }
    Ok(copied)
}

/// Where RAM is: ranges of guest-physical addresses, in order, adjacent regions joined.
pub(crate) fn ram<M: GuestMemoryBackend>(memory: &M) -> Vec<Range<GuestUsize>> {
    let mut ranges: Vec<Range<GuestUsize>> = Vec::with_capacity(memory.num_regions());
    for region in memory.iter() {
        let start = region.start_addr().0;
        let end = start.saturating_add(region.len());
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => ranges.push(start..end),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::GuestMemoryMmap;

    use super::*;

    fn file(contents: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(contents).unwrap();
        file
    }

    #[test]
    fn a_file_is_copied_across_regions_from_its_offset() {
        let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), 0x1000),
            (GuestAddress(0x1000), 0x1000),
        ])
        .unwrap();
        assert_eq!(
            copy_file(&memory, 0xffe, &file(b"abcdef"), 1, 4).unwrap(),
            4
        );
        let mut read = [0; 6];
        memory.read_slice(&mut read, GuestAddress(0xffd)).unwrap();
        assert_eq!(&read, b"\0bcde\0");
    }

    #[test]
    fn a_short_file_is_copied_as_far_as_it_goes() {
        let memory: GuestMemoryMmap =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        assert_eq!(copy_file(&memory, 0, &file(b"abc"), 1, 100).unwrap(), 2);
    }

    #[test]
    fn nothing_is_copied_outside_memory() {
        let memory: GuestMemoryMmap =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        assert!(copy_file(&memory, 0xfff, &file(b"abc"), 0, 3).is_err());
        assert!(copy_file(&memory, u64::MAX, &file(b"abc"), 0, 3).is_err());
    }

    #[test]
    fn adjacent_regions_are_one_range_of_ram() {
        let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), 0x1000),
            (GuestAddress(0x1000), 0x1000),
            (GuestAddress(0x4000), 0x1000),
        ])
        .unwrap();
        assert_eq!(ram(&memory), [0..0x2000, 0x4000..0x5000]);
    }
}
