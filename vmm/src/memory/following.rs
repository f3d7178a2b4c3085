// SPDX-License-Identifier: Apache-2.0
//! Memory that follows its machine: the guest runs, and what it touches that is not here yet has to
//! be brought.
//!
//! All of the memory is registered with a userfaultfd. A page that was never written at the source
//! is zeros, and given when it is touched; those that are missing are given as they come. When all
//! are here, the registration ends.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vm_memory::bitmap::Bitmap;

use super::uffd::{Uffd, UffdError};
use super::{Filling, MachineMemory};
use crate::page_set::{PAGE_SIZE, PageSet, Region};

/// Memory of which a part is still elsewhere.
pub(crate) struct Following {
    uffd: Uffd,
    memory: Arc<MachineMemory>,
    /// What is not here yet.
    missing: Mutex<Missing>,
    changed: Condvar,
    /// Whether all of it is here.
    complete: AtomicBool,
}

struct Missing {
    pages: PageSet,
    /// How many they are.
    left: u64,
}

impl Following {
    /// Lets who touches a page of `missing` wait until it is brought; what those pages hold now is
    /// lost. Ends `filling`. Nobody else may use the memory yet.
    ///
    /// # Errors
    ///
    /// The host does not allow it.
    pub(crate) fn begin(filling: &Filling, mut missing: PageSet) -> Result<Self, UffdError> {
        let memory = filling.memory().clone();
        let (uffd, forgotten) = filling.hand_on();
        // First, so that the kernel does not make a large page with zeros of what is dropped.
        let uffd = match uffd {
            Some(uffd) => uffd,
            None => Uffd::over(&memory.regions)?,
        };
        let stale = missing.without(&forgotten);
        let discarded = memory.discard(0, stale.into_words());
        discarded.map_err(UffdError::Register)?;
        // They are not there, whatever the source says.
        missing.insert_all(&forgotten);
        Ok(Self {
            uffd,
            memory,
            missing: Mutex::new(Missing {
                left: missing.count(),
                pages: missing,
            }),
            changed: Condvar::new(),
            complete: AtomicBool::new(false),
        })
    }

    /// Whether somebody may still have to wait for a page.
    pub(crate) fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    /// How many pages are missing.
    pub(crate) fn left(&self) -> u64 {
        self.lock().left
    }

    /// What is missing, as words of a bitmap.
    pub(crate) fn words(&self) -> Vec<u64> {
        self.lock().pages.clone().into_words()
    }

    /// The next page that somebody waits for and that has to be brought; `None` if nobody does now.
    ///
    /// # Errors
    ///
    /// The host does not tell.
    pub(crate) fn wanted(&self) -> io::Result<Option<u64>> {
        while let Some(address) = self.uffd.fault()? {
            let Some((region, page)) = self.page_at(address) else {
                continue;
            };
            // Held, so that the page does not come between the look and the zeros.
            let missing = self.lock();
            if missing.pages.contains(page) {
                return Ok(Some(page));
            }
            self.zero(region, page)?;
        }
        Ok(None)
    }

    /// Gives pages that have come: their bytes, or `None` for zeros; how many of them were missing.
    ///
    /// # Errors
    ///
    /// The memory has no such pages, or the host does not take them.
    pub(crate) fn give(&self, pages: Range<u64>, bytes: Option<&[u8]>) -> io::Result<u64> {
        let last = self
            .memory
            .regions
            .last()
            .map_or(0, |region| region.pages().end);
        if pages.end > last {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut given = 0;
        let mut missing = self.lock();
        let mut next = pages.start;
        while next < pages.end {
            // What came before is newer by now: the guest may have written to it.
            if !missing.pages.contains(next) {
                next += 1;
                continue;
            }
            let region = self
                .memory
                .regions
                .iter()
                .find(|r| r.pages().contains(&next));
            let region = region.ok_or(io::ErrorKind::InvalidInput)?;
            let most = pages.end.min(region.pages().end);
            let end = (next..most).find(|&page| !missing.pages.contains(page));
            let run = next..end.unwrap_or(most);
            let offset = (run.start - pages.start) * PAGE_SIZE;
            let bytes = bytes.map(|bytes| part(bytes, offset, &run)).transpose()?;
            self.put(region, &run, bytes)?;
            run.clone().for_each(|page| missing.pages.remove(page));
            let count = run.end - run.start;
            missing.left -= count;
            given += count;
            next = run.end;
        }
        if missing.left == 0 {
            self.changed.notify_all();
        }
        Ok(given)
    }

    /// Waits until nothing is missing; whether that is so within `limit`.
    pub(crate) fn wait_complete(&self, limit: Duration) -> bool {
        let missing = self.lock();
        let waited = self
            .changed
            .wait_timeout_while(missing, limit, |missing| missing.left > 0);
        let (missing, _) = waited.unwrap_or_else(PoisonError::into_inner);
        missing.left == 0
    }

    /// Ends it, when nothing is missing any more: from now on the memory is as any other.
    ///
    /// # Errors
    ///
    /// The host does not let go of it.
    pub(crate) fn end(&self) -> io::Result<()> {
        for region in &self.memory.regions {
            self.uffd.unregister(region)?;
        }
        self.complete.store(true, Ordering::Release);
        Ok(())
    }

    /// Gives it up: what is missing is zeros from now on, so that nobody waits for it. The guest
    /// must not run any more, or yet.
    pub(crate) fn abandon(&self) {
        for region in &self.memory.regions {
            if let Err(error) = self.uffd.unregister(region) {
                tracing::warn!("the memory of a machine that does not come is not let go: {error}");
            }
        }
        self.complete.store(true, Ordering::Release);
    }

    /// Gives pages of one region that are missing, all of them.
    fn put(&self, region: &Region, pages: &Range<u64>, bytes: Option<&[u8]>) -> io::Result<()> {
        let address = host_address(region, pages.start);
        match bytes {
            Some(bytes) => {
                self.uffd.copy(address, bytes, |there| {
                    let len = (there.end - there.start) as u64;
                    self.uffd.wake(address + there.start as u64, len)
                })?;
                // A diff is of all that was written since the machine was started.
                let slice = self.memory.slice(pages.clone())?;
                slice.bitmap().mark_dirty(0, slice.len());
                Ok(())
            }
            None => pages.clone().try_for_each(|page| self.zero(region, page)),
        }
    }

    /// Gives a page zeros, unless it is there.
    fn zero(&self, region: &Region, page: u64) -> io::Result<()> {
        let address = host_address(region, page);
        self.uffd
            .zero(address, || self.uffd.wake(address, PAGE_SIZE))
    }

    fn page_at(&self, address: u64) -> Option<(&Region, u64)> {
        self.memory.regions.iter().find_map(|region| {
            let offset = address.checked_sub(region.host_address as u64)?;
            (offset < region.size).then(|| (region, (region.offset + offset) / PAGE_SIZE))
        })
    }

    fn lock(&self) -> MutexGuard<'_, Missing> {
        self.missing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsRawFd for Following {
    fn as_raw_fd(&self) -> RawFd {
        self.uffd.as_raw_fd()
    }
}

fn host_address(region: &Region, page: u64) -> u64 {
    region.host_address as u64 + (page * PAGE_SIZE - region.offset)
}

/// The bytes of `pages`, which begin at `offset`.
fn part<'a>(bytes: &'a [u8], offset: u64, pages: &Range<u64>) -> io::Result<&'a [u8]> {
    let end = offset + (pages.end - pages.start) * PAGE_SIZE;
    let place = |at: u64| usize::try_from(at).map_err(io::Error::other);
    let part = bytes.get(place(offset)?..place(end)?);
    part.ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

#[cfg(test)]
mod tests {
    use std::thread;

    use brume_api::config::MachineConfig;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    const SIZE: u64 = 4 << 20;

    #[test]
    fn who_touches_a_page_waits_until_it_comes() {
        let mut machine = MachineConfig {
            mem_size_mib: SIZE >> 20,
            ..MachineConfig::default()
        };
        page_comes_when_it_is_touched(&machine);
        machine.shared_memory = true;
        page_comes_when_it_is_touched(&machine);
    }

    fn page_comes_when_it_is_touched(machine: &MachineConfig) {
        let memory = Arc::new(super::super::make(machine).unwrap());
        let guest = memory.guest.clone();
        let at = |page: u64| GuestAddress(page * PAGE_SIZE);
        for page in [3, 4, 5] {
            guest.write_obj(1_u8, at(page)).unwrap();
        }
        let mut missing = PageSet::empty(SIZE);
        missing.insert_range(4..6);
        let filling = Filling::begin(memory, false);
        let following = Arc::new(Following::begin(&filling, missing).unwrap());
        // What is here is here.
        assert_eq!(guest.read_obj::<u8>(at(3)).unwrap(), 1);
        let touching = guest.clone();
        let touch = thread::spawn(move || {
            let zero = touching.read_obj::<u8>(at(9)).unwrap();
            (zero, touching.read_obj::<u8>(at(4)).unwrap())
        });
        let wanted = loop {
            if let Some(page) = following.wanted().unwrap() {
                break page;
            }
            thread::yield_now();
        };
        assert_eq!(wanted, 4);
        let bytes = vec![7; 2 * 4096];
        assert_eq!(following.give(4..6, Some(&bytes)).unwrap(), 2);
        assert_eq!(touch.join().unwrap(), (0, 7));
        // What comes again is too late: the guest may have written to it.
        guest.write_obj(8_u8, at(5)).unwrap();
        assert_eq!(following.give(4..6, Some(&bytes)).unwrap(), 0);
        assert_eq!(guest.read_obj::<u8>(at(5)).unwrap(), 8);
        assert!(following.wait_complete(Duration::ZERO));
        assert_eq!(following.left(), 0);
        following.end().unwrap();
        assert!(following.is_complete());
        assert_eq!(guest.read_obj::<u8>(at(700)).unwrap(), 0);
    }
}
