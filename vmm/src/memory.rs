// SPDX-License-Identifier: Apache-2.0
//! The guest's memory: anonymous mappings, of the pages that the configuration asks for, a private
//! mapping of a file, or memory that another process can be given ([`shared`]).
//!
//! This is a module with unsafe code: the kernel is told about memory by address.

#![allow(unsafe_code)]

mod advise;
mod filling;
mod following;
mod handler;
pub(crate) mod pagemap;
pub(crate) mod peer;
mod populate;
pub(crate) mod shared;
pub(crate) mod uffd;
pub(crate) mod working_set;

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use brume_api::config::{HugePages, MachineConfig};
use brume_boot::layout::{self, MemorySizeError};
use brume_snapshot::memory_file::data_ranges;
use brume_virtio::GuestMemory;
use thiserror::Error;
use vm_memory::bitmap::{AtomicBitmap, BS, Bitmap, NewBitmap};
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestRegionMmap, VolatileSlice,
};

use self::pagemap::Wanted;
use crate::page_set::{self, PAGE, PAGE_SIZE, PageSet};

pub(crate) use filling::Filling;
pub(crate) use following::Following;
pub(crate) use handler::Handler;
pub(crate) use populate::Pages;
pub use uffd::UffdError;
pub use working_set::WorkingSetError;

/// The size of a reserved huge page, in bytes.
const HUGE_PAGE: u64 = 2 << 20;

/// Where Linux tells how many reserved huge pages of that size nobody uses.
const FREE_HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

/// There is no such memory.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// A memory size that no machine has.
    #[error("Invalid Memory Configuration")]
    Size(#[from] MemorySizeError),
    /// The host has not got the memory.
    #[error("Invalid Memory Configuration: Cannot create mmap region: {0}")]
    Map(String),
    /// A memory file that cannot be read.
    #[error("the memory file cannot be read")]
    Read(#[source] io::Error),
    /// A memory file of another machine.
    #[error(
        "the memory file has {found} bytes and the machine {size}; is it the one that was written \
         with this state file, and whole?"
    )]
    FileSize {
        /// What it has, in bytes.
        found: u64,
        /// What it must have.
        size: u64,
    },
    /// The host has not got the memory in reserved huge pages.
    #[error(
        "Invalid Memory Configuration: Cannot create mmap region: {error}; {needed} huge pages of \
         2 MiB are needed and {free} are free: reserve them with `sysctl vm.nr_hugepages=N`"
    )]
    NoHugePages {
        /// What the host said.
        error: String,
        /// How many there must be.
        needed: u64,
        /// How many there are.
        free: u64,
    },
}

/// Maps `size` bytes of memory for a guest.
///
/// # Errors
///
/// No machine has that size, or the host has not got the memory.
pub(crate) fn map(size: u64, pages: HugePages) -> Result<GuestMemory, MemoryError> {
    let regions = layout::memory_regions(size)?
        .into_iter()
        .map(|(start, size)| map_region(start, size, pages))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| match pages {
            HugePages::Size2M => MemoryError::NoHugePages {
                error,
                needed: size.div_ceil(HUGE_PAGE),
                free: free_huge_pages(),
            },
            _ => MemoryError::Map(error),
        })?;
    GuestMemory::from_regions(regions).map_err(|error| MemoryError::Map(error.to_string()))
}

/// Makes memory of zeros for `machine`.
///
/// # Errors
///
/// No machine has that size, or the host has not got the memory.
pub(crate) fn make(machine: &MachineConfig) -> Result<MachineMemory, MemoryError> {
    if machine.shared_memory {
        return shared::create(machine);
    }
    let guest = map(machine.memory_bytes(), machine.huge_pages)?;
    Ok(MachineMemory::new(guest, Backing::Zeros))
}

/// A machine's memory, and what is behind it.
pub(crate) struct MachineMemory {
    pub(crate) guest: GuestMemory,
    pub(crate) regions: Vec<page_set::Region>,
    /// In bytes.
    pub(crate) size: u64,
    pub(crate) backing: Backing,
    /// Who serves it, for [`Backing::Uffd`].
    pub(crate) handler: Option<Arc<Handler>>,
    /// What is still elsewhere, if the machine has come before its memory.
    pub(crate) following: OnceLock<Arc<Following>>,
}

/// What a page is that was not written yet.
pub(crate) enum Backing {
    /// Zeros.
    Zeros,
    /// What the file has there.
    File(File),
    /// Zeros; this file, which is all of the memory, has the others.
    Shared(File),
    /// What a process gives that was asked for it.
    Uffd,
}

impl MachineMemory {
    pub(crate) fn new(guest: GuestMemory, backing: Backing) -> Self {
        let regions = page_set::regions(&guest);
        Self {
            size: regions.iter().map(|region| region.size).sum(),
            guest,
            regions,
            backing,
            handler: None,
            following: OnceLock::new(),
        }
    }

    /// The file that is all of the memory, if another process can be given it.
    pub(crate) fn shared(&self) -> Option<&File> {
        match &self.backing {
            Backing::Shared(file) => Some(file),
            Backing::Zeros | Backing::File(_) | Backing::Uffd => None,
        }
    }

    /// All pages that were written since the memory was made or its file was mapped.
    ///
    /// # Errors
    ///
    /// The host does not tell.
    pub(crate) fn written_pages(&self) -> io::Result<PageSet> {
        match self.shared() {
            Some(file) => shared::written_pages(file, 0..self.size),
            None => pagemap::find(&self.regions, self.size, Wanted::Own),
        }
    }

    /// Marks all written pages as written by us, now.
    ///
    /// # Errors
    ///
    /// The host does not tell which they are.
    pub(crate) fn mark_written(&self) -> io::Result<()> {
        let pages = self.written_pages()?;
        for region in &self.regions {
            for range in pages.ranges_in(region.words()) {
                let slice = self.slice(range)?;
                slice.bitmap().mark_dirty(0, slice.len());
            }
        }
        Ok(())
    }

    /// Whether who touches a page may have to wait for another process, and for ever.
    pub(crate) fn may_wait(&self) -> bool {
        let follows = self.following.get();
        self.handler.is_some() || follows.is_some_and(|following| !following.is_complete())
    }

    /// The bytes of `pages`, which lie in one region.
    ///
    /// # Errors
    ///
    /// They do not, or the memory has no such pages.
    pub(crate) fn slice(&self, pages: Range<u64>) -> io::Result<Slice<'_>> {
        let offset = pages.start.saturating_mul(PAGE_SIZE);
        let mut regions = self.regions.iter();
        let region = regions.find(|region| region.pages().contains(&pages.start));
        let region = region.ok_or(io::ErrorKind::InvalidInput)?;
        let address = GuestAddress(region.guest_address + (offset - region.offset));
        let len = pages.end.saturating_sub(pages.start) * PAGE_SIZE;
        let len = usize::try_from(len).map_err(io::Error::other)?;
        self.guest.get_slice(address, len).map_err(io::Error::other)
    }

    /// The eight bytes at `offset` of a memory file, a multiple of 8, as a little-endian number.
    ///
    /// # Errors
    ///
    /// The memory has no such bytes.
    pub(crate) fn word(&self, offset: u64) -> io::Result<u64> {
        let page = offset / PAGE_SIZE;
        let slice = self.slice(page..page.saturating_add(1))?;
        let place = usize::try_from(offset % PAGE_SIZE).map_err(io::Error::other)?;
        let word: u64 = slice.read_obj(place).map_err(io::Error::other)?;
        Ok(u64::from_le(word))
    }

    /// The page that has a guest-physical address.
    pub(crate) fn page_at(&self, address: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let within = address.checked_sub(region.guest_address)?;
            (within < region.size).then_some((region.offset + within) / PAGE_SIZE)
        })
    }

    /// Whether there is nothing in a page.
    ///
    /// # Errors
    ///
    /// The memory has no such page.
    pub(crate) fn is_zero(&self, page: u64) -> io::Result<bool> {
        let slice = self.slice(page..page + 1)?;
        // Most pages with something in them have it at their beginning.
        if slice.read_obj::<u64>(0).is_ok_and(|word| word != 0) {
            return Ok(false);
        }
        let mut copy = [0; PAGE];
        slice.copy_to(&mut copy);
        Ok(copy == [0; PAGE])
    }
}

/// A piece of the guest's memory.
pub(crate) type Slice<'a> = VolatileSlice<'a, BS<'a, AtomicBitmap>>;

/// Maps a memory file of `size` bytes. The guest's writes do not reach it, and what is not touched
/// is not read.
///
/// # Errors
///
/// No machine has that size, or the file has another one.
pub(crate) fn map_file(size: u64, file: File) -> Result<MachineMemory, MemoryError> {
    check_size(&file, size)?;
    let own = file
        .try_clone()
        .map_err(|error| MemoryError::Map(error.to_string()))?;
    let guest = map_whole(size, file, libc::MAP_PRIVATE, HugePages::None)?;
    Ok(MachineMemory::new(guest, Backing::File(own)))
}

/// Maps all of `file` for a guest with `size` bytes of memory; `kind` is whether its writes reach
/// the file.
fn map_whole(
    size: u64,
    file: File,
    kind: libc::c_int,
    pages: HugePages,
) -> Result<GuestMemory, MemoryError> {
    let file = Arc::new(file);
    let mut offset = 0;
    let mut mapped = Vec::new();
    for (start, size) in layout::memory_regions(size)? {
        let part = FileOffset::from_arc(file.clone(), offset);
        let region = map_part(start, size, part, kind, pages);
        mapped.push(region.map_err(MemoryError::Map)?);
        offset += size as u64;
    }
    let guest = GuestMemory::from_regions(mapped);
    guest.map_err(|error| MemoryError::Map(error.to_string()))
}

/// Makes the memory of `machine` and reads it from a memory file, for memory that a file cannot be
/// mapped as.
///
/// # Errors
///
/// As for [`make`] and [`map_file`], or the file cannot be read.
pub(crate) fn read_file(
    machine: &MachineConfig,
    file: &File,
) -> Result<MachineMemory, MemoryError> {
    let size = machine.memory_bytes();
    check_size(file, size)?;
    let memory = make(machine)?;
    let mut file = file;
    for range in data_ranges(file, size).map_err(MemoryError::Read)? {
        for region in &memory.regions {
            let start = range.start.max(region.offset);
            let end = range.end.min(region.offset + region.size);
            let Ok(len @ 1..) = usize::try_from(end.saturating_sub(start)) else {
                continue;
            };
            let address = GuestAddress(region.guest_address + (start - region.offset));
            file.seek(SeekFrom::Start(start))
                .map_err(MemoryError::Read)?;
            let read = memory
                .guest
                .read_exact_volatile_from(address, &mut file, len);
            read.map_err(|error| MemoryError::Read(io::Error::other(error)))?;
        }
    }
    Ok(memory)
}

fn check_size(file: &File, size: u64) -> Result<(), MemoryError> {
    let found = file.metadata().map_err(MemoryError::Read)?.len();
    if found == size {
        return Ok(());
    }
    Err(MemoryError::FileSize { found, size })
}

fn map_part(
    start: GuestAddress,
    size: usize,
    part: FileOffset,
    kind: libc::c_int,
    pages: HugePages,
) -> Result<Region, String> {
    let mapping = MmapRegionBuilder::new_with_bitmap(size, AtomicBitmap::with_len(size))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(kind | libc::MAP_NORESERVE)
        .with_file_offset(part)
        .build()
        .map_err(|error| error.to_string())?;
    if pages == HugePages::Transparent {
        ask_for_huge_pages(&mapping);
    }
    place(mapping, start)
}

type Region = GuestRegionMmap<AtomicBitmap>;

fn map_region(start: GuestAddress, size: usize, pages: HugePages) -> Result<Region, String> {
    let text = |error: MmapRegionError| error.to_string();
    let kind = match pages {
        // Guests may have more memory than the host, as long as they do not use it all.
        HugePages::None | HugePages::Transparent => libc::MAP_NORESERVE,
        // Without a reservation the guest would be killed at the page that is not there.
        HugePages::Size2M => libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
    };
    let mapping = MmapRegionBuilder::new_with_bitmap(size, AtomicBitmap::with_len(size))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | kind)
        .with_hugetlbfs(pages == HugePages::Size2M)
        .build()
        .map_err(text)?;
    if pages == HugePages::Transparent {
        ask_for_huge_pages(&mapping);
    }
    place(mapping, start)
}

fn ask_for_huge_pages(mapping: &MmapRegion<AtomicBitmap>) {
    let (start, size) = (mapping.as_ptr().cast(), mapping.size());
    // SAFETY: the range is the mapping, which lives. The advice changes no byte of it.
    let result = unsafe { libc::madvise(start, size, libc::MADV_HUGEPAGE) };
    if result != 0 {
        // A kernel without them: the guest has ordinary pages then, and is none the worse.
        let error = io::Error::last_os_error();
        tracing::warn!("the host has no transparent huge pages: {error}");
    }
}

fn place(mapping: MmapRegion<AtomicBitmap>, start: GuestAddress) -> Result<Region, String> {
    GuestRegionMmap::new(mapping, start).ok_or_else(|| "it ends beyond all addresses".to_owned())
}

fn free_huge_pages() -> u64 {
    let text = fs::read_to_string(FREE_HUGE_PAGES).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use vm_memory::bitmap::Bitmap;
    use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

    use super::*;

    const SIZE: u64 = 16 << 20;

    /// The flags that the kernel has for the mapping that `memory` begins with.
    fn flags(memory: &GuestMemory) -> Vec<String> {
        let host = memory.get_host_address(GuestAddress(0)).unwrap() as usize;
        let maps = fs::read_to_string("/proc/self/smaps").unwrap();
        let mut lines = maps.lines().skip_while(|line| {
            let range = line.split(' ').next().unwrap_or_default();
            let bound = |text| usize::from_str_radix(text, 16).ok();
            let range = range.split_once('-');
            let range = range.and_then(|(from, to)| Some((bound(from)?, bound(to)?)));
            !range.is_some_and(|(from, to)| (from..to).contains(&host))
        });
        let flags = lines.find_map(|line| line.strip_prefix("VmFlags:"));
        flags
            .unwrap()
            .split_whitespace()
            .map(str::to_owned)
            .collect()
    }

    #[test]
    fn what_is_written_here_is_noted() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(SIZE).unwrap();
        for guest in [
            map(SIZE, HugePages::None).unwrap(),
            map_file(SIZE, file).unwrap().guest,
        ] {
            guest.write_obj(1_u8, GuestAddress(0x80_0000)).unwrap();
            let noted = |at| {
                let region: &MmapRegion<AtomicBitmap> = guest.iter().next().unwrap();
                region.bitmap().dirty_at(at)
            };
            assert!(noted(0x80_0000) && !noted(0));
        }
    }

    #[test]
    fn memory_has_the_pages_that_were_asked_for() {
        for (pages, huge) in [(HugePages::None, false), (HugePages::Transparent, true)] {
            let memory = map(SIZE, pages).unwrap();
            memory.write_obj(1_u64, GuestAddress(SIZE - 8)).unwrap();
            assert_eq!(memory.num_regions(), 1);
            assert_eq!(memory.iter().next().unwrap().len(), SIZE);
            let flags = flags(&memory);
            assert_eq!(flags.contains(&"hg".into()), huge, "{flags:?}");
        }
    }

    #[test]
    fn reserved_pages_are_used_or_missed_by_name() {
        let free = free_huge_pages();
        match map(SIZE, HugePages::Size2M) {
            Ok(memory) => {
                assert!(free >= SIZE / HUGE_PAGE);
                memory.write_obj(1_u64, GuestAddress(SIZE - 8)).unwrap();
                let flags = flags(&memory);
                assert!(flags.contains(&"ht".into()), "{flags:?}");
            }
            Err(error) => {
                let text = error.to_string();
                assert!(free < SIZE / HUGE_PAGE, "{text}");
                assert!(
                    text.contains("(os error 12); 8 huge pages of 2 MiB"),
                    "{text}"
                );
                assert!(text.contains("vm.nr_hugepages"), "{text}");
            }
        }
    }

    #[test]
    fn what_we_write_ourselves_is_marked() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(SIZE).unwrap();
        for memory in [
            map(SIZE, HugePages::None).unwrap(),
            map_file(SIZE, file).unwrap().guest,
        ] {
            memory.write_obj(1_u64, GuestAddress(SIZE - 8)).unwrap();
            let region = memory.iter().next().unwrap();
            let words = (**region).bitmap().get_and_reset();
            assert_eq!(words.len() as u64, SIZE / PAGE_SIZE / 64);
            assert_eq!(words.last(), Some(&(1 << 63)));
        }
    }

    #[test]
    fn no_machine_has_no_memory() {
        assert!(matches!(map(0, HugePages::None), Err(MemoryError::Size(_))));
    }
}
