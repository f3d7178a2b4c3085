// SPDX-License-Identifier: Apache-2.0
//! Memory whose content is known: each page holds what its number and its version say.
//!
//! The versions are in a table of their own. So a page that is older or younger than the table
//! shows, and so does one that lies in another's place.

use crate::boot_info::{MemoryMap, RAM};
use crate::memory;
use crate::params;
use crate::pattern::mix;
use virtio_drivers::PAGE_SIZE;

const WORDS: u64 = PAGE_SIZE as u64 / 8;
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
/// Multiplier and start of FNV-1a, over words instead of bytes.
const FNV_PRIME: u64 = 0x100_0000_01b3;
const FNV_START: u64 = 0xcbf2_9ce4_8422_2325;
/// This bit of a version says that the page is all zeroes; the others count its writings.
const ZERO: u32 = 1 << 31;
const MAX_RANGES: usize = 8;

/// The pages and their versions.
pub struct Area {
    seed: u64,
    /// How many words in a row are the same, a power of two: more of them can be compressed better.
    alike: u64,
    /// First address and number of pages of each piece, in the order of the page numbers.
    ranges: [(u64, u64); MAX_RANGES],
    versions: &'static mut [u32],
}

impl Area {
    /// Takes so many pages of all free memory, above 4 GiB too; they are zero, and stay untouched.
    ///
    /// # Panics
    ///
    /// There are not so many.
    pub fn new(map: &MemoryMap, pages: u64, seed: u64) -> Self {
        let table = memory::take(pages as usize * size_of::<u32>(), PAGE_SIZE);
        // SAFETY: the bytes are aligned to a page, any bits are a number, and they are given up.
        let versions = unsafe {
            core::slice::from_raw_parts_mut(table.as_mut_ptr().cast::<u32>(), pages as usize)
        };
        versions.fill(ZERO);
        let ram = || map.regions().iter().filter(|r| r.kind == RAM);
        ram().for_each(|region| memory::map_high(region.start, region.len));
        let (start, end) = memory::free();
        let mut area = Self {
            seed,
            alike: params::number("bare.alike", 1).max(1),
            ranges: [(0, 0); MAX_RANGES],
            versions,
        };
        let mut left = pages;
        let high = ram()
            .filter(|r| r.start > start)
            .map(|r| (r.start, r.start + r.len));
        let all = core::iter::once((start, end)).chain(high);
        for ((first, end), range) in all.zip(&mut area.ranges) {
            let first = first.next_multiple_of(PAGE_SIZE as u64);
            let count = (end.saturating_sub(first) / PAGE_SIZE as u64).min(left);
            *range = (first, count);
            left -= count;
        }
        assert!(left == 0, "no memory for {left} of {pages} pages");
        area
    }

    /// How many pages there are.
    pub fn pages(&self) -> u64 {
        self.versions.len() as u64
    }

    fn page(&self, number: u64) -> *mut u64 {
        let mut rest = number;
        for &(start, count) in &self.ranges {
            if rest < count {
                return (start + rest * PAGE_SIZE as u64) as *mut u64;
            }
            rest -= count;
        }
        unreachable!("page {number}")
    }

    /// The first word of a page in that version, without its [`Self::step`].
    fn first_word(&self, number: u64, version: u32) -> u64 {
        mix(self.seed ^ mix(number ^ mix(version.into())))
    }

    /// What the word number `at` of a page is more than the one before.
    fn step(&self, at: u64) -> u64 {
        if at & (self.alike - 1) == 0 { STEP } else { 0 }
    }

    /// Writes a page's next version.
    pub fn write(&mut self, number: u64) {
        let version = (self.versions[number as usize] & !ZERO) + 1;
        self.versions[number as usize] = version;
        let mut word = self.first_word(number, version);
        self.fill(number, |at| {
            word = word.wrapping_add(self.step(at));
            word
        });
    }

    /// Fills a page with zeroes, which is a version too.
    pub fn zero(&mut self, number: u64) {
        let version = &mut self.versions[number as usize];
        *version = ((*version & !ZERO) + 1) | ZERO;
        self.fill(number, |_| 0);
    }

    fn fill(&self, number: u64, mut word: impl FnMut(u64) -> u64) {
        let page = self.page(number);
        for at in 0..WORDS {
            // SAFETY: `new` took the page from free memory; all of it is mapped.
            unsafe { page.add(at as usize).write_volatile(word(at)) };
        }
    }

    /// The hash of all pages, and the first that is not what its version says.
    pub fn hash(&self) -> (u64, Option<u64>) {
        let (mut hash, mut bad) = (FNV_START, None);
        for (number, &version) in (0..).zip(&*self.versions) {
            let page = self.page(number);
            let zero = version & ZERO != 0;
            let mut expected = if zero {
                0
            } else {
                self.first_word(number, version)
            };
            let mut wrong = 0;
            for at in 0..WORDS {
                let step = if zero { 0 } else { self.step(at) };
                expected = expected.wrapping_add(step);
                // SAFETY: as in `fill`.
                let word = unsafe { page.add(at as usize).read_volatile() };
                wrong |= word ^ expected;
                hash = (hash ^ word).wrapping_mul(FNV_PRIME);
            }
            if wrong != 0 && bad.is_none() {
                bad = Some(number);
            }
        }
        (hash, bad)
    }
}
