// SPDX-License-Identifier: Apache-2.0
//! What a client can learn of the guest's memory: which pages were written and how fast, which the
//! host holds, and where they are.

use std::time::{Duration, Instant};

use brume_api::config::HugePages;
use brume_api::{
    Answer, DirtyForm, DirtyPages, DirtyRate, DirtyRegion, Fault, Mapping, Mappings, MemoryRequest,
    ResidentPages, Tracking,
};

use super::Machine;
use crate::dirty::Reader;
use crate::event::Event;
use crate::instance::ApiCall;
use crate::kvm::KvmError;
use crate::memory::pagemap::{self, Wanted};
use crate::memory::working_set;
use crate::page_set::{PAGE_SIZE, PageSet};

/// A rate that is being measured.
pub(super) struct RateWindow {
    call: ApiCall,
    since: Instant,
}

impl Machine {
    /// Answers what can be answered at once.
    pub(super) fn memory_call(&mut self, request: &MemoryRequest) -> Result<Answer, Fault> {
        match request {
            MemoryRequest::GetDirty { form } => {
                let pages = self.dirty_pages(*form)?;
                return Answer::json(&pages);
            }
            MemoryRequest::SetTracking(tracking) => self.set_tracking(*tracking)?,
            MemoryRequest::GetMappings => return Answer::json(&self.mappings()),
            MemoryRequest::GetMemory => return Answer::json(&self.resident_pages()?),
            MemoryRequest::GetDirtyRate { .. } => {
                return Err(Fault::new("The dirty rate cannot be told at once."));
            }
            MemoryRequest::SaveWorkingSet { path } => {
                let pages = working_set::save(&self.memory, path);
                let pages = pages.map_err(|error| Fault::from_error(&error))?;
                tracing::info!("working set: {pages} pages in {}", path.display());
            }
        }
        Ok(Answer::done())
    }

    fn dirty_pages(&mut self, form: DirtyForm) -> Result<DirtyPages, Fault> {
        let mut tracker = self.tracker();
        let noted = match tracker.peek(Reader::ReadOut) {
            Ok(None) => tracker.peek(Reader::Snapshot),
            noted => noted,
        };
        drop(tracker);
        let noted = noted.map_err(|error| log_fault(&error))?;
        let tracking = noted.is_some();
        let pages = match noted {
            Some(pages) => pages,
            None => self.find_pages(Wanted::Own)?,
        };
        let regions = self.memory.regions.iter().map(|region| {
            let first = region.pages().start;
            let runs = || {
                let runs = pages.ranges_in(region.words());
                runs.map(|run| [run.start - first, run.end - run.start])
            };
            DirtyRegion {
                guest_address: region.guest_address,
                size: region.size,
                offset: region.offset,
                dirty_pages: pages.count_in(region.words()),
                ranges: (form == DirtyForm::Ranges).then(|| runs().collect()),
            }
        });
        Ok(DirtyPages {
            tracking,
            page_size: PAGE_SIZE,
            dirty_pages: pages.count(),
            regions: regions.collect(),
            bitmap: (form == DirtyForm::Bitmap).then(|| pages.into_words()),
        })
    }

    fn set_tracking(&mut self, tracking: Tracking) -> Result<(), Fault> {
        let mut tracker = self.tracker();
        let on = tracker.is_on(Reader::ReadOut);
        match tracking {
            Tracking::On if on => Ok(()),
            Tracking::On => tracker.start(Reader::ReadOut),
            Tracking::Off => tracker.stop(Reader::ReadOut),
            Tracking::Reset if on => tracker.start(Reader::ReadOut),
            Tracking::Reset => {
                return Err(Fault::new(
                    "Written pages are not being noted, so there is nothing to reset: set \
                     `tracking` to `On` first.",
                ));
            }
        }
        .map_err(|error| log_fault(&error))
    }

    fn mappings(&self) -> Mappings {
        let huge = self.description.config.machine_config.huge_pages == HugePages::Size2M;
        let page_size = if huge { 2 << 20 } else { PAGE_SIZE };
        let regions = self.memory.regions.iter();
        let mappings = regions.map(|region| Mapping {
            base_host_virt_addr: region.host_address as u64,
            size: region.size,
            offset: region.offset,
            page_size,
        });
        Mappings {
            mappings: mappings.collect(),
        }
    }

    fn resident_pages(&self) -> Result<ResidentPages, Fault> {
        let resident = self.find_pages(Wanted::Mapped)?;
        let mut empty = PageSet::empty(self.memory.size);
        for page in resident.ranges().flatten() {
            let zero = self.memory.is_zero(page);
            if zero.map_err(|error| Fault::from_error(&error))? {
                empty.insert(page);
            }
        }
        Ok(ResidentPages {
            resident: resident.into_words(),
            empty: empty.into_words(),
        })
    }

    fn find_pages(&self, wanted: Wanted) -> Result<PageSet, Fault> {
        let found = match self.memory.shared() {
            // The page tables of one process say little of memory that others have written.
            Some(_) => self.memory.written_pages(),
            None => pagemap::find(&self.memory.regions, self.memory.size, wanted),
        };
        found.map_err(|error| {
            Fault::new(format!(
                "The host does not tell which pages of the guest's memory it holds: {error}"
            ))
        })
    }

    /// Measures the rate and answers when the window has passed.
    pub(super) fn begin_rate(&mut self, call: ApiCall, window: Duration) {
        if self.rate.is_some() {
            let text = "The rate is being measured for another client; ask again when it has its \
                        answer.";
            return call.answer(|_| Err(Fault::new(text)));
        }
        if let Err(error) = self.tracker().start(Reader::Rate) {
            return call.answer(|_| Err(log_fault(&error)));
        }
        if let Err(error) = self.sender.send_after(window, Event::RateDue) {
            // It was just begun.
            let _ = self.tracker().stop(Reader::Rate);
            return call.answer(|_| Err(Fault::from_error(&error)));
        }
        let since = Instant::now();
        self.rate = Some(RateWindow { call, since });
    }

    /// The window has passed.
    pub(super) fn end_rate(&mut self) {
        let Some(RateWindow { call, since }) = self.rate.take() else {
            return;
        };
        let written = self.tracker().peek(Reader::Rate);
        let window = since.elapsed();
        let stopped = self.tracker().stop(Reader::Rate);
        call.answer(|_| {
            let pages = written
                .map_err(|error| log_fault(&error))?
                .map_or(0, |pages| pages.count());
            stopped.map_err(|error| log_fault(&error))?;
            Answer::json(&rate(pages, window))
        });
    }
}

fn rate(pages: u64, window: Duration) -> DirtyRate {
    let nanos = window.as_nanos().max(1);
    let per_second = u128::from(pages) * 1_000_000_000 / nanos;
    let per_second = u64::try_from(per_second).unwrap_or(u64::MAX);
    DirtyRate {
        window_ms: u64::try_from(window.as_millis()).unwrap_or(u64::MAX),
        pages_per_second: per_second,
        bytes_per_second: per_second.saturating_mul(PAGE_SIZE),
        // KVM's log does not say whose writes it has.
        vcpus: None,
    }
}

fn log_fault(error: &KvmError) -> Fault {
    Fault::from_error(error)
}
