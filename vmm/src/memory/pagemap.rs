// SPDX-License-Identifier: Apache-2.0
//! Which pages of the guest's memory the host holds, by what its kernel tells of this process.
//!
//! Linux 6.7 has a call that goes over the page tables and skips what is empty (PAGEMAP_SCAN);
//! before it, the same is read page by page from /proc/self/pagemap.
//!
//! This is a module with unsafe code: one call that no library has.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;

use crate::page_set::{PAGE_SIZE, PageSet, Region};

const PAGEMAP: &str = "/proc/self/pagemap";

/// `struct page_region` of linux/fs.h
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Found {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg` of linux/fs.h
#[repr(C)]
#[derive(Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = assert!(size_of::<Found>() == 24);
const _: () = assert!(size_of::<Scan>() == 96);

ioctl_iowr_nr!(PAGEMAP_SCAN, b'f' as u32, 16, Scan);

const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;

/// Bits of an entry of /proc/self/pagemap.
const ENTRY_PRESENT: u64 = 1 << 63;
const ENTRY_SWAPPED: u64 = 1 << 62;
const ENTRY_FILE: u64 = 1 << 61;

/// How many ranges are taken at once.
const BATCH: usize = 512;

/// Which pages are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// Those that belong to this process alone: all that were written since the memory was mapped.
    Own,
    /// Those that can be accessed without a fault.
    Mapped,
}

/// The pages of `regions` that are `wanted`; pages are numbered as in a memory file of `size` bytes.
///
/// # Errors
///
/// The kernel does not tell.
pub(crate) fn find(regions: &[Region], size: u64, wanted: Wanted) -> io::Result<PageSet> {
    let pagemap = File::open(PAGEMAP)?;
    let mut pages = PageSet::empty(size);
    for region in regions {
        match scan(&pagemap, region, wanted, &mut pages) {
            // A kernel before 6.7.
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
                read(&pagemap, region, wanted, &mut pages)?;
            }
            result => result?,
        }
    }
    Ok(pages)
}

/// The pages of one region that are `wanted`, numbered from 0.
///
/// # Errors
///
/// The kernel does not tell.
pub(crate) fn find_in(region: &Region, wanted: Wanted) -> io::Result<PageSet> {
    let region = Region {
        offset: 0,
        ..*region
    };
    find(&[region], region.size, wanted)
}

fn scan(pagemap: &File, region: &Region, wanted: Wanted, pages: &mut PageSet) -> io::Result<()> {
    let first = region.host_address as u64;
    let mut found = [Found::default(); BATCH];
    let mut scan = Scan {
        size: size_of::<Scan>() as u64,
        start: first,
        end: first + region.size,
        vec: found.as_mut_ptr() as u64,
        vec_len: BATCH as u64,
        ..Default::default()
    };
    match wanted {
        Wanted::Own => {
            scan.category_inverted = PAGE_IS_FILE | PAGE_IS_PFNZERO;
            scan.category_mask = PAGE_IS_FILE | PAGE_IS_PFNZERO;
            scan.category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED;
        }
        Wanted::Mapped => scan.category_mask = PAGE_IS_PRESENT,
    }
    while scan.start < scan.end {
        // SAFETY: the structure has the size that it says; the kernel writes to `vec`, which is
        // `found`, at most `vec_len` elements, and reads no memory but the page tables.
        let count = unsafe { ioctl_with_mut_ref(pagemap, PAGEMAP_SCAN(), &mut scan) };
        if count < 0 {
            return Err(io::Error::last_os_error());
        }
        for range in found.iter().take(usize::try_from(count).unwrap_or(0)) {
            let page = |address: u64| (region.offset + (address - first)) / PAGE_SIZE;
            pages.insert_range(page(range.start)..page(range.end));
        }
        // The walk stops early if there is no room for more.
        if scan.walk_end <= scan.start {
            break;
        }
        scan.start = scan.walk_end;
    }
    Ok(())
}

fn read(pagemap: &File, region: &Region, wanted: Wanted, pages: &mut PageSet) -> io::Result<()> {
    let first = region.host_address as u64 / PAGE_SIZE;
    let Range { start, end } = region.pages();
    let mut buffer = vec![0; 8 * 8192];
    let mut page = start;
    while page < end {
        let left = usize::try_from((end - page) * 8).unwrap_or(usize::MAX);
        let part = buffer.len().min(left);
        let part = buffer.get_mut(..part).unwrap_or_default();
        pagemap.read_exact_at(part, (first + (page - start)) * 8)?;
        for entry in part.chunks_exact(8) {
            let entry = entry.try_into().map_or(0, u64::from_le_bytes);
            let here = match wanted {
                Wanted::Own => {
                    entry & (ENTRY_PRESENT | ENTRY_SWAPPED) != 0 && entry & ENTRY_FILE == 0
                }
                Wanted::Mapped => entry & ENTRY_PRESENT != 0,
            };
            if here {
                pages.insert(page);
            }
            page += 1;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use brume_api::config::HugePages;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory;
    use crate::page_set::regions;

    const SIZE: u64 = 4 << 20;

    /// By both ways, which have to agree.
    fn both(memory: &brume_virtio::GuestMemory, wanted: Wanted) -> Vec<u64> {
        let regions = regions(memory);
        let scanned: Vec<u64> = find(&regions, SIZE, wanted)
            .unwrap()
            .ranges()
            .flatten()
            .collect();
        let pagemap = File::open(PAGEMAP).unwrap();
        let mut pages = PageSet::empty(SIZE);
        for region in &regions {
            read(&pagemap, region, wanted, &mut pages).unwrap();
        }
        assert_eq!(scanned, pages.ranges().flatten().collect::<Vec<_>>());
        scanned
    }

    #[test]
    fn pages_that_were_written_are_our_own() {
        let memory = memory::map(SIZE, HugePages::None).unwrap();
        assert!(both(&memory, Wanted::Own).is_empty());
        for page in [3, 4, 700, 1023] {
            memory
                .write_obj(1_u8, GuestAddress(page * PAGE_SIZE))
                .unwrap();
        }
        assert_eq!(both(&memory, Wanted::Own), [3, 4, 700, 1023]);
    }

    #[test]
    fn pages_of_a_file_are_our_own_once_they_are_written() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; usize::try_from(SIZE).unwrap()])
            .unwrap();
        let memory = memory::map_file(SIZE, file).unwrap().guest;
        assert_eq!(
            memory.read_obj::<u8>(GuestAddress(5 * PAGE_SIZE)).unwrap(),
            7
        );
        assert!(both(&memory, Wanted::Own).is_empty());
        assert!(both(&memory, Wanted::Mapped).contains(&5));
        memory.write_obj(1_u8, GuestAddress(9 * PAGE_SIZE)).unwrap();
        assert_eq!(both(&memory, Wanted::Own), [9]);
    }
}
