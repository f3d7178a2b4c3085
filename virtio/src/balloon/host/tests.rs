// SPDX-License-Identifier: Apache-2.0
//! Whether memory that is given back is really gone, and no other.

use std::fs::File;

use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestRegionMmap};

use super::*;

/// How many pages of the `len` bytes at `address` are there.
pub(crate) fn resident(memory: &GuestMemory, address: u64, len: usize) -> usize {
    let slice = memory.get_slice(GuestAddress(address), len).unwrap();
    let mut pages = vec![0; len / 4096];
    // SAFETY: the range is mapped, and there is a byte for each of its pages.
    let result = unsafe {
        libc::mincore(
            slice.ptr_guard_mut().as_ptr().cast(),
            len,
            pages.as_mut_ptr(),
        )
    };
    assert_eq!(result, 0);
    pages.iter().filter(|&page| page & 1 != 0).count()
}

fn fill(memory: &GuestMemory, address: u64, len: usize) {
    memory
        .write_slice(&vec![0xa5; len], GuestAddress(address))
        .unwrap();
}

fn byte(memory: &GuestMemory, address: u64) -> u8 {
    memory.read_obj(GuestAddress(address)).unwrap()
}

/// Two regions with a hole between them: 0 to 64 KiB, 128 to 192 KiB.
fn memory() -> GuestMemory {
    let memory =
        GuestMemory::from_ranges(&[(GuestAddress(0), 0x10000), (GuestAddress(0x20000), 0x10000)])
            .unwrap();
    fill(&memory, 0, 0x10000);
    fill(&memory, 0x20000, 0x10000);
    memory
}

#[test]
fn pages_are_gone_and_their_neighbours_are_not() {
    let memory = memory();
    assert_eq!(resident(&memory, 0, 0x10000), 16);
    assert_eq!(give_back(&memory, 0x2000, 0x5000).unwrap(), 0x3000);
    assert_eq!(resident(&memory, 0x2000, 0x3000), 0);
    assert_eq!(resident(&memory, 0, 0x10000), 13);
    for (address, expected) in [(0x1fff, 0xa5), (0x2000, 0), (0x4fff, 0), (0x5000, 0xa5)] {
        assert_eq!(byte(&memory, address), expected, "{address:#x}");
    }
}

#[test]
fn only_whole_pages_go() {
    let memory = memory();
    assert_eq!(give_back(&memory, 0x1001, 0x3fff).unwrap(), 0x1000);
    assert_eq!(resident(&memory, 0, 0x10000), 15);
    assert_eq!(give_back(&memory, 0x5001, 0x5fff).unwrap(), 0);
    assert_eq!(give_back(&memory, 0x6000, 0x6000).unwrap(), 0);
    assert_eq!(resident(&memory, 0, 0x10000), 15);
}

#[test]
fn what_is_not_guest_memory_is_left_out() {
    let memory = memory();
    assert_eq!(give_back(&memory, 0x10000, 0x20000).unwrap(), 0);
    assert_eq!(give_back(&memory, 0x30000, u64::MAX).unwrap(), 0);
    assert_eq!(give_back(&memory, u64::MAX - 1, u64::MAX).unwrap(), 0);
    assert_eq!(give_back(&memory, 0xf000, 0x21000).unwrap(), 0x2000);
    assert_eq!(resident(&memory, 0, 0x10000), 15);
    assert_eq!(resident(&memory, 0x20000, 0x10000), 15);
    assert_eq!(give_back(&memory, 0, u64::MAX).unwrap(), 0x20000);
}

#[test]
fn a_file_behind_memory_that_is_shared_gets_a_hole() {
    let file: File = tempfile::tempfile().unwrap();
    file.set_len(0x10000).unwrap();
    let behind = FileOffset::new(file.try_clone().unwrap(), 0);
    let range = (GuestAddress(0), 0x10000, Some(behind));
    let memory = GuestMemory::from_ranges_with_files([range]).unwrap();
    fill(&memory, 0, 0x10000);
    file.sync_all().unwrap();
    let blocks = || std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
    let before = blocks();
    assert_eq!(give_back(&memory, 0x4000, 0x8000).unwrap(), 0x4000);
    assert_eq!(before - blocks(), 0x4000 / 512);
    assert_eq!(
        [0x3fff, 0x4000, 0x7fff, 0x8000].map(|at| byte(&memory, at)),
        [0xa5, 0, 0, 0xa5]
    );
}

#[test]
fn what_is_given_back_counts_as_written() {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
    give_back(&memory, 0x3000, 0x5000).unwrap();
    let region = memory.iter().next().unwrap();
    let dirty = [0x2000, 0x3000, 0x4000, 0x5000].map(|at| region.bitmap().dirty_at(at));
    assert_eq!(dirty, [false, true, true, false]);
}

#[test]
fn of_reserved_huge_pages_only_whole_ones_go() {
    const SIZE: usize = 8 << 20;
    let real = MmapRegion::<()>::new(SIZE).unwrap();
    let builder = MmapRegionBuilder::new(SIZE)
        .with_mmap_prot(real.prot())
        .with_mmap_flags(real.flags() | libc::MAP_HUGETLB);
    // SAFETY: the mapping has that size, and is there until the end.
    let builder = unsafe { builder.with_raw_mmap_pointer(real.as_ptr()) };
    let region = GuestRegionMmap::new(builder.build().unwrap(), GuestAddress(0)).unwrap();
    let memory = GuestMemory::from_regions(vec![region]).unwrap();
    fill(&memory, 0, SIZE);
    assert_eq!(give_back(&memory, 0x1000, 0x50_0000).unwrap(), 0x20_0000);
    for (address, expected) in [(0x1f_ffff, 0xa5), (0x20_0000, 0), (0x40_0000, 0xa5)] {
        assert_eq!(byte(&memory, address), expected, "{address:#x}");
    }
    assert_eq!(give_back(&memory, 0x1000, 0x2000).unwrap(), 0);
    drop(memory);
}
