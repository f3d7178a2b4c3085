// SPDX-License-Identifier: Apache-2.0
//! Which pages of a machine's memory have something in them at all.

use std::fs::File;
use std::io;
use std::ops::Range;

use brume_snapshot::memory_file::data_ranges;

use crate::memory::pagemap::{self, Wanted};
use crate::memory::{Backing, MachineMemory, shared};
use crate::page_set::{PAGE_SIZE, PageSet, Region};

/// Looks for pages in use.
pub(super) struct InUse {
    /// What is in use whatever the host's page tables say.
    always: Always,
}

enum Always {
    /// Nothing.
    None,
    /// Those that the memory's file has data for.
    These(PageSet),
    /// Nothing; the host's page tables say nothing either, but this file, which is the memory.
    Shared(File),
    /// All of them: what was not touched yet is not known here.
    All,
}

impl InUse {
    /// Finds out what `memory` is made of.
    ///
    /// # Errors
    ///
    /// The file that it came from cannot be searched.
    pub(super) fn of(memory: &MachineMemory) -> io::Result<Self> {
        let always = match &memory.backing {
            Backing::Zeros => Always::None,
            Backing::File(file) => Always::These(data_pages(file, memory.size)?),
            Backing::Shared(file) => Always::Shared(file.try_clone()?),
            Backing::Uffd => Always::All,
        };
        Ok(Self { always })
    }

    /// Keeps those pages of `words` that are in use; the first of them is word `first` of the
    /// memory, and all of them lie in `region`.
    ///
    /// # Errors
    ///
    /// The host does not tell.
    pub(super) fn filter(
        &self,
        region: &Region,
        first: usize,
        words: &mut [u64],
    ) -> io::Result<()> {
        let own = match &self.always {
            Always::All => return Ok(()),
            Always::Shared(file) => {
                let bytes = |words: usize| words as u64 * 64 * PAGE_SIZE;
                shared::written_pages(file, bytes(first)..bytes(first + words.len()))?
            }
            Always::None | Always::These(_) => {
                let part = part_of(region, first, words.len());
                pagemap::find_in(&part, Wanted::Own)?
            }
        };
        let own = own.words(0..words.len());
        let always = match &self.always {
            Always::These(pages) => pages.words(first..first + words.len()),
            _ => &[],
        };
        let always = always.iter().copied().chain(std::iter::repeat(0));
        for ((word, own), always) in words.iter_mut().zip(own).zip(always) {
            *word &= own | always;
        }
        Ok(())
    }

    /// All pages that are in use.
    ///
    /// # Errors
    ///
    /// The host does not tell.
    pub(super) fn pages(&self, memory: &MachineMemory) -> io::Result<PageSet> {
        let mut pages = memory.written_pages()?;
        match &self.always {
            Always::None | Always::Shared(_) => {}
            Always::These(always) => pages.insert_all(always),
            Always::All => pages = PageSet::full(memory.size),
        }
        Ok(pages)
    }
}

/// The part of `region` that `len` words from word `first` on are for, as a memory of its own.
fn part_of(region: &Region, first: usize, len: usize) -> Region {
    let bytes = |words: usize| words as u64 * 64 * PAGE_SIZE;
    let skipped = bytes(first.saturating_sub(region.words().start));
    Region {
        guest_address: region.guest_address + skipped,
        host_address: region.host_address + usize::try_from(skipped).unwrap_or(0),
        size: bytes(len),
        offset: 0,
        ..*region
    }
}

fn data_pages(file: &File, size: u64) -> io::Result<PageSet> {
    let mut pages = PageSet::empty(size);
    for Range { start, end } in data_ranges(file, size)? {
        pages.insert_range(start / PAGE_SIZE..end.div_ceil(PAGE_SIZE));
    }
    Ok(pages)
}
