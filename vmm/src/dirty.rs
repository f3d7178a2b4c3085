// SPDX-License-Identifier: Apache-2.0
//! Which pages of the guest's memory were written, for several who want to know it since different
//! moments.
//!
//! ```text
//!   guest's writes ---- KVM's log --+
//!                                   +-- collect --> a journal for each reader
//!   our writes -- memory's bitmap --+
//! ```
//!
//! What is collected leaves both sources and enters the journal of each reader, so no reader misses
//! what another one took. A page that was written while it was being collected is in this
//! collection or in the next, and may be in both, which says no more than that it was written
//! twice.
//!
//! KVM's log is on as long as there is a reader: it makes the first write to each page slower and
//! large pages small.

use std::ops::Range;
use std::sync::Arc;

use brume_virtio::GuestMemory;
use vm_memory::GuestMemoryBackend;

use crate::kvm::{KvmError, LogMode, Vm};
use crate::page_set::{PageSet, Region, regions};

/// The most words that are cleared in KVM's log at once: vCPUs cannot enter pages meanwhile.
const CLEAR_WORDS: usize = 1024;

/// Who wants to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reader {
    /// The next diff snapshot: since the last snapshot.
    Snapshot,
    /// A client of the API: since the last reset.
    ReadOut,
    /// Whoever measures the rate.
    Rate,
    /// A snapshot that is being written while the machine runs: since the last pass.
    PreCopy,
    /// A machine on its way to another process: what is still to be sent.
    Transfer,
}

const READERS: usize = 5;

/// The journals of one machine.
pub(crate) struct DirtyTracker {
    vm: Arc<Vm>,
    memory: GuestMemory,
    regions: Vec<Region>,
    size: u64,
    /// One for each [`Reader`] that is there.
    journals: [Option<PageSet>; READERS],
}

impl DirtyTracker {
    /// A tracker without readers.
    pub(crate) fn new(vm: Arc<Vm>, memory: GuestMemory) -> Self {
        let regions = regions(&memory);
        let size = regions.iter().map(|region| region.size).sum();
        Self {
            vm,
            memory,
            regions,
            size,
            journals: Default::default(),
        }
    }

    /// Begins a journal for `reader`, or begins it anew: with nothing in it.
    ///
    /// # Errors
    ///
    /// KVM does not keep a log.
    pub(crate) fn start(&mut self, reader: Reader) -> Result<(), KvmError> {
        if self.is_logging() {
            self.collect()?;
        } else {
            // Has all pages in it, or what was written before it was switched off; there is nobody
            // yet to record it.
            let begun = self.vm.set_memory(true).and_then(|()| self.collect());
            if let Err(error) = begun {
                // Nobody would switch it off later.
                let _ = self.vm.set_memory(false);
                return Err(error);
            }
        }
        let empty = PageSet::empty(self.size);
        *self.journal(reader) = Some(empty);
        Ok(())
    }

    /// Ends the journal of `reader`.
    ///
    /// # Errors
    ///
    /// KVM does not let go of its log.
    pub(crate) fn stop(&mut self, reader: Reader) -> Result<(), KvmError> {
        let was = self.journal(reader).take();
        if was.is_some() && !self.is_logging() {
            self.vm.set_memory(false)?;
        }
        Ok(())
    }

    /// Whether there is a journal for `reader`.
    pub(crate) fn is_on(&self, reader: Reader) -> bool {
        let journal = self.journals.get(reader as usize);
        journal.is_some_and(Option::is_some)
    }

    /// What `reader`'s journal has, which goes on with nothing in it; `None` without one.
    ///
    /// # Errors
    ///
    /// KVM does not show its log.
    pub(crate) fn take(&mut self, reader: Reader) -> Result<Option<PageSet>, KvmError> {
        if !self.is_on(reader) {
            return Ok(None);
        }
        self.collect()?;
        let empty = PageSet::empty(self.size);
        Ok(self.journal(reader).replace(empty))
    }

    /// Puts pages back into `reader`'s journal, because what they were taken for failed.
    pub(crate) fn put_back(&mut self, reader: Reader, pages: &PageSet) {
        if let Some(journal) = self.journal(reader) {
            journal.insert_all(pages);
        }
    }

    /// What `reader`'s journal has; `None` without one. Nothing changes by it, and where KVM can
    /// do so, no page's next write gets slower.
    ///
    /// # Errors
    ///
    /// KVM does not show its log.
    pub(crate) fn peek(&mut self, reader: Reader) -> Result<Option<PageSet>, KvmError> {
        if !self.is_on(reader) {
            return Ok(None);
        }
        if self.vm.log_mode == LogMode::ClearedByRead {
            self.collect()?;
            return Ok(self.journal(reader).clone());
        }
        let ours = self.take_ours();
        self.record(&ours);
        let mut pages = self.journal(reader).clone();
        if let Some(pages) = &mut pages {
            pages.insert_all(&self.read_log()?);
        }
        Ok(pages)
    }

    /// Begins a journal for `reader` with all pages in it. They are taken out of it piece by piece
    /// with [`DirtyTracker::clear`] and [`DirtyTracker::take_words`], so nothing is done to all of
    /// them at once.
    ///
    /// # Errors
    ///
    /// KVM does not keep a log.
    pub(crate) fn start_full(&mut self, reader: Reader) -> Result<(), KvmError> {
        if !self.is_logging()
            && let Err(error) = self.vm.set_memory(true)
        {
            let _ = self.vm.set_memory(false);
            return Err(error);
        }
        let full = PageSet::full(self.size);
        *self.journal(reader) = Some(full);
        Ok(())
    }

    /// What KVM's log has, which stays in it. What we wrote ourselves enters the journals.
    ///
    /// # Errors
    ///
    /// KVM does not show its log.
    pub(crate) fn scan(&mut self) -> Result<PageSet, KvmError> {
        if self.vm.log_mode == LogMode::ClearedByRead {
            self.collect()?;
            return Ok(PageSet::empty(self.size));
        }
        let ours = self.take_ours();
        self.record(&ours);
        self.read_log()
    }

    /// What KVM's log has of one region now, word by word.
    ///
    /// # Errors
    ///
    /// KVM does not show its log.
    pub(crate) fn scan_region(&self, region: &Region) -> Result<Vec<u64>, KvmError> {
        match self.vm.log_mode {
            LogMode::ClearedByHand => self.read_region(region),
            LogMode::ClearedByRead => Ok(vec![0; region.words().len()]),
        }
    }

    /// Moves pages of `words`, a part of `region`'s, from KVM's log to the journals: those of
    /// `seen`, which [`DirtyTracker::scan`] told. Their next write enters them into the log again.
    ///
    /// # Errors
    ///
    /// KVM does not clear them.
    pub(crate) fn clear(
        &mut self,
        region: &Region,
        words: Range<usize>,
        seen: &PageSet,
    ) -> Result<(), KvmError> {
        let part = seen.words(words.clone());
        if part.iter().all(|&word| word == 0) {
            return Ok(());
        }
        for journal in self.journals.iter_mut().flatten() {
            journal.insert_words(words.start, part);
        }
        let first = (words.start - region.words().start) as u64 * 64;
        let pages = u32::try_from(part.len() * 64).unwrap_or(0);
        self.vm.clear_dirty_log(region.slot, first, pages, part)
    }

    /// What `reader`'s journal has, without what the sources have.
    pub(crate) fn journaled(&self, reader: Reader) -> Option<&PageSet> {
        self.journals.get(reader as usize)?.as_ref()
    }

    /// Takes the pages of `words` out of `reader`'s journal.
    pub(crate) fn take_words(&mut self, reader: Reader, words: Range<usize>) -> Vec<u64> {
        let journal = self.journal(reader).as_mut();
        journal.map_or_else(Vec::new, |journal| journal.take_words(words))
    }

    fn is_logging(&self) -> bool {
        self.journals.iter().any(Option::is_some)
    }

    fn journal(&mut self, reader: Reader) -> &mut Option<PageSet> {
        let [snapshot, read_out, rate, pre_copy, transfer] = &mut self.journals;
        match reader {
            Reader::Snapshot => snapshot,
            Reader::ReadOut => read_out,
            Reader::Rate => rate,
            Reader::PreCopy => pre_copy,
            Reader::Transfer => transfer,
        }
    }

    /// Moves what was written into all journals.
    fn collect(&mut self) -> Result<(), KvmError> {
        // What leaves a source is in the journals before the next step can fail.
        for region in self.regions.clone() {
            // A page that is written after this is in the next collection.
            let words = self.read_region(&region)?;
            let first = region.words().start;
            let journals = self.journals.iter_mut().flatten();
            journals.for_each(|journal| journal.insert_words(first, &words));
            if self.vm.log_mode == LogMode::ClearedByHand {
                self.clear_region(&region, &words)?;
            }
        }
        let ours = self.take_ours();
        self.record(&ours);
        Ok(())
    }

    fn record(&mut self, pages: &PageSet) {
        let journals = self.journals.iter_mut().flatten();
        journals.for_each(|journal| journal.insert_all(pages));
    }

    fn read_log(&self) -> Result<PageSet, KvmError> {
        let mut pages = PageSet::empty(self.size);
        for region in &self.regions {
            pages.insert_words(region.words().start, &self.read_region(region)?);
        }
        Ok(pages)
    }

    fn read_region(&self, region: &Region) -> Result<Vec<u64>, KvmError> {
        let size = usize::try_from(region.size).unwrap_or(usize::MAX);
        self.vm.dirty_log(region.slot, size)
    }

    fn clear_region(&self, region: &Region, words: &[u64]) -> Result<(), KvmError> {
        for (index, chunk) in words.chunks(CLEAR_WORDS).enumerate() {
            let used = chunk.iter().rposition(|&word| word != 0);
            let Some(chunk) = used.and_then(|last| chunk.get(..=last)) else {
                continue;
            };
            let first = (index * CLEAR_WORDS) as u64 * 64;
            let pages = u32::try_from(chunk.len() * 64).unwrap_or(0);
            self.vm.clear_dirty_log(region.slot, first, pages, chunk)?;
        }
        Ok(())
    }

    fn take_ours(&self) -> PageSet {
        let mut pages = PageSet::empty(self.size);
        for (region, memory) in self.regions.iter().zip(self.memory.iter()) {
            let words = (**memory).bitmap().get_and_reset();
            pages.insert_words(region.words().start, &words);
        }
        pages
    }
}
