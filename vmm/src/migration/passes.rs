// SPDX-License-Identifier: Apache-2.0
//! Passes over the memory of a machine that runs.
//!
//! A pass goes over the memory in windows. What KVM's log has of a window is cleared one window
//! ahead of what is being sent, so pages are protected as late as can be; and what the guest has
//! written between both is left for the next pass, because it would have to be sent again anyway:
//!
//! ```text
//!   log, cleared:   |--- window n+1 ---|
//!   sent:                                |--- window n, without what the log has of it again ---|
//! ```
//!
//! A page is cleared in the log before it is looked at, so a write that is missed by the look is in
//! the log.

use std::iter;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use brume_migration::Zeros;

use super::error::SourceError;
use super::in_use::InUse;
use super::lanes::{Amount, BATCH_PAGES, Batch, Lanes};
use super::status::Progress;
use crate::cpu::Place;
use crate::dirty::{DirtyTracker, Reader};
use crate::memory::MachineMemory;
use crate::page_set::{PAGE_SIZE, PageSet, Region};

/// The least size of a window in words of 64 pages: 16 MiB.
const WINDOW: usize = 64;
/// Into how many windows a region is parted at most. For each of them all of the region's log is read.
const MOST_WINDOWS: usize = 1024;

/// How many pages are sent before a guest goes on whose memory follows: 256 KiB, which take about
/// as long as it would wait for one.
const FIRST_PAGES: u64 = 64;
const _: () = assert!(FIRST_PAGES <= BATCH_PAGES);
/// How many pages there are likely to be needed together.
const AHEAD: u64 = 4;

/// What a pass has done.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PassDone {
    /// Pages that were to be sent.
    pub(super) pages: u64,
    /// Those that had been written again.
    pub(super) skipped: u64,
    /// Those that it did not come to, because the machine has to move now.
    pub(super) put_off: u64,
    pub(super) sent: Amount,
}

/// The memory of a machine that is sent.
pub(super) struct Passes {
    memory: Arc<MachineMemory>,
    tracker: Arc<Mutex<DirtyTracker>>,
    in_use: InUse,
    progress: Progress,
    /// Whether the target has mapped the memory: then there is nothing to send.
    is_shared: bool,
}

/// A piece of the memory.
struct Window {
    region: Region,
    words: Range<usize>,
}

impl Passes {
    /// Begins to note what is to be sent, which is everything.
    ///
    /// # Errors
    ///
    /// KVM keeps no log, or the memory cannot be searched.
    pub(super) fn begin(
        memory: Arc<MachineMemory>,
        tracker: Arc<Mutex<DirtyTracker>>,
        progress: Progress,
    ) -> Result<Self, SourceError> {
        let passes = Self::new(memory, tracker, progress)?;
        passes.tracker().start_full(Reader::Transfer)?;
        Ok(passes)
    }

    /// No passes: the target has mapped the memory too. Nothing is noted.
    ///
    /// # Errors
    ///
    /// The host does not hold its file any longer.
    pub(super) fn none(
        memory: Arc<MachineMemory>,
        tracker: Arc<Mutex<DirtyTracker>>,
        progress: Progress,
    ) -> Result<Self, SourceError> {
        let mut passes = Self::new(memory, tracker, progress)?;
        passes.is_shared = true;
        Ok(passes)
    }

    fn new(
        memory: Arc<MachineMemory>,
        tracker: Arc<Mutex<DirtyTracker>>,
        progress: Progress,
    ) -> Result<Self, SourceError> {
        let in_use = InUse::of(&memory).map_err(SourceError::Search)?;
        Ok(Self {
            memory,
            tracker,
            in_use,
            progress,
            is_shared: false,
        })
    }

    /// Ends it: nothing is noted any more.
    pub(super) fn end(&self) {
        if let Err(error) = self.tracker().stop(Reader::Transfer) {
            tracing::warn!("written pages go on being noted, which slows the guest: {error}");
        }
    }

    /// How many pages are to be sent now.
    ///
    /// # Errors
    ///
    /// KVM does not show its log.
    pub(super) fn left(&self) -> Result<PageSet, SourceError> {
        let mut tracker = self.tracker();
        let written = tracker.scan()?;
        Ok(with_journal(&tracker, written))
    }

    /// Sends what the guest needs first when it goes on, with the guest paused; what is left then.
    ///
    /// # Errors
    ///
    /// It cannot be sent.
    pub(super) fn all_but_first(
        &self,
        places: &[Place],
        lanes: &mut Lanes,
    ) -> Result<PageSet, SourceError> {
        let mut tracker = self.tracker();
        let written = tracker.scan()?;
        let mut left = with_journal(&tracker, written.clone());
        drop(tracker);
        let mut first = PageSet::empty(self.memory.size);
        let near = self.near(places);
        let mut room = FIRST_PAGES;
        for page in near.into_iter().chain(written.ranges().flatten()) {
            if room == 0 {
                break;
            }
            if left.contains(page) {
                left.remove(page);
                first.insert(page);
                room -= 1;
            }
        }
        if self.memory.handler.is_some() {
            self.memory.fetch(&first)?;
        }
        for region in &self.memory.regions {
            // Pages of two regions would be one run, though there may be a hole between them.
            let batch: Batch = first.ranges_in(region.words()).collect();
            if !batch.is_empty() {
                // On the connection that the state goes over: the others may be behind it.
                let amount = lanes.first.send_at_once(&batch)?;
                self.progress.sent(amount);
            }
        }
        Ok(left)
    }

    /// The pages that vCPUs at `places` touch next.
    fn near(&self, places: &[Place]) -> Vec<u64> {
        if self.memory.handler.is_some() {
            // A look might have to wait.
            return Vec::new();
        }
        let read = |address| {
            let page = self.memory.page_at(address)?;
            let within = address % PAGE_SIZE;
            self.memory.word(page * PAGE_SIZE + within).ok()
        };
        let addresses = places.iter().flat_map(|place| place.addresses(read));
        let pages = addresses.filter_map(|address| self.memory.page_at(address));
        pages.flat_map(|page| page..page + AHEAD).collect()
    }

    /// Sends what was written, while the guest goes on writing. The first pass sends all that is in
    /// use.
    ///
    /// # Errors
    ///
    /// It cannot be sent.
    pub(super) fn pass(&self, number: u32, lanes: &mut Lanes) -> Result<PassDone, SourceError> {
        let mut done = PassDone::default();
        let mut seen = self.tracker().scan()?;
        let windows = self.windows(&seen);
        let mut windows = windows.iter().peekable();
        if let Some(first) = windows.peek() {
            self.tracker()
                .clear(&first.region, first.words.clone(), &seen)?;
        }
        while let Some(window) = windows.next() {
            // Held throughout: what the log has of the window has to stay there, or another reader
            // would take it to where the pages are that are taken here.
            let mut tracker = self.tracker();
            // What was written since the window was cleared, and what is to be cleared next.
            let now = tracker.scan_region(&window.region)?;
            let first = window.region.words().start;
            let mine = window.words.start - first..window.words.end - first;
            let again = now.get(mine).unwrap_or_default();
            if let Some(next) = windows.peek() {
                seen.insert_words(first, &now);
                tracker.clear(&next.region, next.words.clone(), &seen)?;
            }
            let taken = tracker.take_words(Reader::Transfer, window.words.clone());
            drop(tracker);
            self.send_window(number, window, (taken, again), lanes, &mut done)?;
            if lanes.first.is_forced() {
                done.put_off += if number == 1 {
                    self.put_off(windows, &seen)?
                } else {
                    let waiting = with_journal(&self.tracker(), seen);
                    windows
                        .map(|window| waiting.count_in(window.words.clone()))
                        .sum()
                };
                break;
            }
        }
        self.sent(&mut done, lanes.end_pass(number)?);
        Ok(done)
    }

    /// Finds what is in use of `windows`, which a first pass does not come to: the rest, of which
    /// the target has zeros, is not to be sent. How many pages they are.
    fn put_off<'a>(
        &self,
        windows: impl Iterator<Item = &'a Window>,
        seen: &PageSet,
    ) -> Result<u64, SourceError> {
        let mut used = PageSet::empty(self.memory.size);
        for Window { region, words } in windows {
            let mut tracker = self.tracker();
            tracker.clear(region, words.clone(), seen)?;
            let mut taken = tracker.take_words(Reader::Transfer, words.clone());
            drop(tracker);
            let kept = self.in_use.filter(region, words.start, &mut taken);
            kept.map_err(SourceError::Search)?;
            used.insert_words(words.start, &taken);
        }
        self.tracker().put_back(Reader::Transfer, &used);
        Ok(used.count())
    }

    /// Sends what is left, with the guest paused.
    ///
    /// # Errors
    ///
    /// It cannot be sent.
    pub(super) fn last(&self, number: u32, lanes: &mut Lanes) -> Result<PassDone, SourceError> {
        if self.is_shared {
            return Ok(PassDone::default());
        }
        let left = self.left()?;
        let mut done = PassDone {
            pages: left.count(),
            ..PassDone::default()
        };
        // A first pass is a last one if there was none before.
        let zeros = zeros(number);
        for region in &self.memory.regions {
            let Range { start, end } = region.words();
            let mut words = left.words(start..end).to_vec();
            if number == 1 {
                let kept = self.in_use.filter(region, start, &mut words);
                kept.map_err(SourceError::Search)?;
            }
            self.send_words(start, words, zeros, lanes, &mut done)?;
        }
        self.sent(&mut done, lanes.end_pass(number)?);
        Ok(done)
    }

    /// Finds what is in use, for a guest that goes before its memory: so there is little left to be
    /// looked for when it stands still.
    ///
    /// # Errors
    ///
    /// The host does not tell.
    pub(super) fn note_all(&self) -> Result<(), SourceError> {
        let mut tracker = self.tracker();
        // From now on what is written is noted; what was before is seen.
        tracker.start(Reader::Transfer)?;
        let used = self.in_use.pages(&self.memory);
        tracker.put_back(Reader::Transfer, &used.map_err(SourceError::Search)?);
        Ok(())
    }

    /// The memory.
    pub(super) fn memory(&self) -> &Arc<MachineMemory> {
        &self.memory
    }

    /// The windows in which there is something to do.
    fn windows(&self, seen: &PageSet) -> Vec<Window> {
        let tracker = self.tracker();
        let journal = tracker.journaled(Reader::Transfer);
        let mut windows = Vec::new();
        for region in &self.memory.regions {
            let mut start = region.words().start;
            let window = WINDOW.max(region.words().len().div_ceil(MOST_WINDOWS));
            while start < region.words().end {
                let words = start..region.words().end.min(start + window);
                start = words.end;
                let is_used = |pages: &PageSet| pages.words(words.clone()).iter().any(|&w| w != 0);
                if is_used(seen) || journal.is_some_and(is_used) {
                    windows.push(Window {
                        region: *region,
                        words,
                    });
                }
            }
        }
        windows
    }

    fn send_window(
        &self,
        number: u32,
        window: &Window,
        (mut words, again): (Vec<u64>, &[u64]),
        lanes: &mut Lanes,
        done: &mut PassDone,
    ) -> Result<(), SourceError> {
        let start = window.words.start;
        if number == 1 {
            let kept = self.in_use.filter(&window.region, start, &mut words);
            kept.map_err(SourceError::Search)?;
        }
        // They are in the log, so they are not forgotten.
        for (word, again) in words.iter_mut().zip(again) {
            done.pages += u64::from(word.count_ones());
            done.skipped += u64::from((*word & again).count_ones());
            *word &= !again;
        }
        self.send_words(start, words, zeros(number), lanes, done)
    }

    /// Sends pages, all of them unless the machine has to move now.
    fn send_words(
        &self,
        start: usize,
        words: Vec<u64>,
        zeros: Zeros,
        lanes: &mut Lanes,
        done: &mut PassDone,
    ) -> Result<(), SourceError> {
        let first = start as u64 * 64;
        if self.memory.handler.is_some() {
            let mut wanted = PageSet::empty(self.memory.size);
            wanted.insert_words(start, &words);
            self.memory.fetch(&wanted)?;
        }
        let part = PageSet::from_words(words);
        let mut batch = Batch::new();
        let mut room = BATCH_PAGES;
        let mut ranges = part
            .ranges()
            .map(|range| first + range.start..first + range.end);
        while let Some(Range { start, end }) = ranges.next() {
            let mut next = start;
            while next < end {
                let taken = next..end.min(next + room);
                room -= taken.end - taken.start;
                next = taken.end;
                batch.push(taken);
                if room == 0 {
                    self.sent(done, lanes.send(std::mem::take(&mut batch), zeros)?);
                    room = BATCH_PAGES;
                    if lanes.first.is_forced() {
                        let put_off = self.put_back(iter::once(next..end).chain(ranges));
                        done.pages -= put_off;
                        done.put_off += put_off;
                        return Ok(());
                    }
                }
            }
        }
        if !batch.is_empty() {
            self.sent(done, lanes.send(batch, zeros)?);
        }
        Ok(())
    }

    /// Has pages sent later, as if they had been written again; how many they are.
    fn put_back(&self, ranges: impl Iterator<Item = Range<u64>>) -> u64 {
        let mut pages = PageSet::empty(self.memory.size);
        ranges.for_each(|range| pages.insert_range(range));
        self.tracker().put_back(Reader::Transfer, &pages);
        pages.count()
    }

    fn sent(&self, done: &mut PassDone, amount: Amount) {
        done.sent.add(amount);
        self.progress.sent(amount);
    }

    fn tracker(&self) -> MutexGuard<'_, DirtyTracker> {
        self.tracker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is to be sent: what was `written` by now, and what was noted before.
fn with_journal(tracker: &DirtyTracker, mut written: PageSet) -> PageSet {
    if let Some(journal) = tracker.journaled(Reader::Transfer) {
        written.insert_all(journal);
    }
    written
}

/// In the first pass the target has zeros already.
fn zeros(number: u32) -> Zeros {
    if number == 1 {
        Zeros::Absent
    } else {
        Zeros::Told
    }
}
