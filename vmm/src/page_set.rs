// SPDX-License-Identifier: Apache-2.0
//! Sets of pages of a guest's memory, and where those pages lie.
//!
//! Pages are numbered as they follow each other in a memory file: all regions in the order of their
//! guest addresses, without the hole between them.

use std::iter;
use std::ops::Range;

use brume_virtio::GuestMemory;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

/// The size of a page, in bytes.
pub(crate) const PAGE_SIZE: u64 = PAGE as u64;
/// The same for what is in the host's memory.
pub(crate) const PAGE: usize = 4096;
/// How many pages a word is for.
pub(crate) const WORD_PAGES: u64 = 64;

/// A region of a guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    /// KVM's number for it.
    pub(crate) slot: u32,
    /// Its first guest-physical address.
    pub(crate) guest_address: u64,
    /// Its first address in this process.
    pub(crate) host_address: usize,
    /// Its length in bytes, a multiple of 256 KiB.
    pub(crate) size: u64,
    /// Where it begins in a memory file, in bytes.
    pub(crate) offset: u64,
}

impl Region {
    /// Its pages.
    pub(crate) fn pages(&self) -> Range<u64> {
        self.offset / PAGE_SIZE..(self.offset + self.size) / PAGE_SIZE
    }

    /// Its words of a set.
    pub(crate) fn words(&self) -> Range<usize> {
        let Range { start, end } = self.pages();
        let word = |page: u64| usize::try_from(page / WORD_PAGES).unwrap_or(usize::MAX);
        word(start)..word(end)
    }
}

/// The regions of `memory`, in the order of a memory file.
pub(crate) fn regions(memory: &GuestMemory) -> Vec<Region> {
    let mut offset = 0;
    (0..)
        .zip(memory.iter())
        .map(|(slot, region)| {
            let host = region.get_host_address(MemoryRegionAddress(0));
            let region = Region {
                slot,
                guest_address: region.start_addr().raw_value(),
                host_address: host.map_or(0, |host| host as usize),
                size: region.len(),
                offset,
            };
            offset += region.size;
            region
        })
        .collect()
}

/// A set of pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PageSet {
    words: Vec<u64>,
}

impl PageSet {
    /// No page of a memory of `size` bytes.
    pub(crate) fn empty(size: u64) -> Self {
        let words = usize::try_from((size / PAGE_SIZE).div_ceil(WORD_PAGES)).unwrap_or(0);
        Self {
            words: vec![0; words],
        }
    }

    /// All pages of a memory of `size` bytes.
    pub(crate) fn full(size: u64) -> Self {
        let mut set = Self::empty(size);
        set.words.fill(u64::MAX);
        set
    }

    /// The pages that `words` say: bit `n` of word `m` is page `64 m + n`.
    pub(crate) fn from_words(words: Vec<u64>) -> Self {
        Self { words }
    }

    /// Its words: bit `n` of word `m` is page `64 m + n`.
    pub(crate) fn into_words(self) -> Vec<u64> {
        self.words
    }

    /// Whether it has that page.
    pub(crate) fn contains(&self, page: u64) -> bool {
        let word = usize::try_from(page / WORD_PAGES).ok();
        let word = word.and_then(|word| self.words.get(word));
        word.is_some_and(|word| word >> (page % WORD_PAGES) & 1 != 0)
    }

    /// Adds a page; one that the memory does not have is left out.
    pub(crate) fn insert(&mut self, page: u64) {
        let word = usize::try_from(page / WORD_PAGES).ok();
        if let Some(word) = word.and_then(|word| self.words.get_mut(word)) {
            *word |= 1 << (page % WORD_PAGES);
        }
    }

    /// Removes a page.
    pub(crate) fn remove(&mut self, page: u64) {
        let word = usize::try_from(page / WORD_PAGES).ok();
        if let Some(word) = word.and_then(|word| self.words.get_mut(word)) {
            *word &= !(1 << (page % WORD_PAGES));
        }
    }

    /// Adds pages; those that the memory does not have are left out.
    pub(crate) fn insert_range(&mut self, pages: Range<u64>) {
        let Range { mut start, end } = pages;
        while start < end && start % WORD_PAGES != 0 {
            self.insert(start);
            start += 1;
        }
        while end.saturating_sub(start) >= WORD_PAGES {
            let word = usize::try_from(start / WORD_PAGES).ok();
            if let Some(word) = word.and_then(|word| self.words.get_mut(word)) {
                *word = u64::MAX;
            }
            start += WORD_PAGES;
        }
        (start..end).for_each(|page| self.insert(page));
    }

    /// How many words it has.
    pub(crate) fn words_len(&self) -> usize {
        self.words.len()
    }

    /// The first range of pages from `page` on.
    pub(crate) fn first_from(&self, page: u64) -> Option<Range<u64>> {
        let mut ranges = self.ranges();
        ranges.next = page;
        ranges.next()
    }

    /// Adds the pages of `words`, the first of which is word `first`.
    pub(crate) fn insert_words(&mut self, first: usize, words: &[u64]) {
        let own = self.words.iter_mut().skip(first);
        own.zip(words).for_each(|(own, other)| *own |= other);
    }

    /// Some of its words; fewer if it has not got so many.
    pub(crate) fn words(&self, words: Range<usize>) -> &[u64] {
        let end = words.end.min(self.words.len());
        self.words.get(words.start..end).unwrap_or_default()
    }

    /// Removes the pages of those words, and returns the words.
    pub(crate) fn take_words(&mut self, words: Range<usize>) -> Vec<u64> {
        let end = words.end.min(self.words.len());
        let part = self.words.get_mut(words.start..end).unwrap_or_default();
        let taken = part.to_vec();
        part.fill(0);
        taken
    }

    /// Adds the pages of another set.
    pub(crate) fn insert_all(&mut self, other: &Self) {
        self.insert_words(0, &other.words);
    }

    /// Its pages that `other` has not.
    pub(crate) fn without(&self, other: &Self) -> Self {
        let others = other.words.iter().copied().chain(iter::repeat(0));
        let words = self.words.iter().zip(others);
        Self::from_words(words.map(|(own, other)| own & !other).collect())
    }

    /// How many pages there are.
    pub(crate) fn count(&self) -> u64 {
        self.count_in(0..self.words.len())
    }

    /// How many of the pages of those words there are.
    pub(crate) fn count_in(&self, words: Range<usize>) -> u64 {
        let words = self.words.get(words).unwrap_or_default();
        words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The pages, as ranges that do not touch each other, in order.
    pub(crate) fn ranges(&self) -> Ranges<'_> {
        self.ranges_in(0..self.words.len())
    }

    /// The same for the pages of those words.
    pub(crate) fn ranges_in(&self, words: Range<usize>) -> Ranges<'_> {
        let end = words.end.min(self.words.len());
        Ranges {
            words: self.words.get(..end).unwrap_or_default(),
            next: words.start as u64 * WORD_PAGES,
        }
    }
}

/// Goes over the ranges of a set.
pub(crate) struct Ranges<'a> {
    words: &'a [u64],
    /// The page to look at next.
    next: u64,
}

impl Ranges<'_> {
    /// The next page from `self.next` on that is in the set, or is not; the end of the set if there
    /// is none.
    fn find(&mut self, in_set: bool) -> u64 {
        let end = self.words.len() as u64 * WORD_PAGES;
        while self.next < end {
            let word = usize::try_from(self.next / WORD_PAGES).unwrap_or(usize::MAX);
            let word = self.words.get(word).copied().unwrap_or(0);
            let word = if in_set { word } else { !word };
            let rest = word >> (self.next % WORD_PAGES);
            if rest != 0 {
                self.next += u64::from(rest.trailing_zeros());
                return self.next;
            }
            self.next = (self.next / WORD_PAGES + 1) * WORD_PAGES;
        }
        end
    }
}

impl Iterator for Ranges<'_> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        let start = self.find(true);
        let end = self.find(false);
        (start < end).then_some(start..end)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 640;

    proptest! {
        #[test]
        fn a_set_is_what_was_put_into_it(
            ranges in proptest::collection::vec((0..PAGES + 70, 0_u64..200), 0..8),
        ) {
            let mut set = PageSet::empty(PAGES * PAGE_SIZE);
            let mut model = BTreeSet::new();
            for (start, len) in ranges {
                set.insert_range(start..start + len);
                model.extend((start..start + len).filter(|&page| page < PAGES));
            }
            let ranges: Vec<_> = set.ranges().collect();
            for (before, after) in ranges.iter().zip(ranges.iter().skip(1)) {
                prop_assert!(before.end < after.start);
            }
            let pages: BTreeSet<u64> = ranges.into_iter().flatten().collect();
            prop_assert_eq!(set.count(), model.len() as u64);
            prop_assert_eq!(pages, model);
        }

        #[test]
        fn a_set_without_another_has_the_rest(
            [own, other] in proptest::array::uniform2(0..PAGES),
            [own_len, other_len] in proptest::array::uniform2(0_u64..200),
            other_pages in 0..PAGES,
        ) {
            let (own, other) = (own..own + own_len, other..other + other_len);
            let mut set = PageSet::empty(PAGES * PAGE_SIZE);
            set.insert_range(own.clone());
            // It may be of a smaller memory.
            let mut less = PageSet::empty(other_pages * PAGE_SIZE);
            less.insert_range(other.clone());
            let rest: Vec<u64> = set.without(&less).ranges().flatten().collect();
            let kept = own.filter(|page| *page < PAGES && !less.contains(*page));
            prop_assert_eq!(rest, kept.collect::<Vec<_>>());
        }

        #[test]
        fn a_part_of_a_set_has_the_ranges_of_that_part(start in 0..PAGES, len in 0_u64..300) {
            let mut set = PageSet::empty(PAGES * PAGE_SIZE);
            set.insert_range(start..start + len);
            let part: Vec<u64> = set.ranges_in(2..5).flatten().collect();
            let wanted = (start..start + len).filter(|page| (128..320).contains(page));
            prop_assert_eq!(&part, &wanted.collect::<Vec<_>>());
            prop_assert_eq!(set.count_in(2..5), part.len() as u64);
        }
    }
}
