// SPDX-License-Identifier: Apache-2.0
//! New memory that is filled with pages from elsewhere, by several threads, before a guest runs.
//!
//! A page that is written to for the first time costs a fault, and the kernel fills it with zeros
//! that are overwritten at once: together more than all else that is done to it. So the memory is
//! registered with a userfaultfd, which takes pages by the hundred as they are. Nobody waits for a
//! page, and where the host does not allow it they are written as usual.

use std::io;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

use brume_api::with_causes;
use vm_memory::bitmap::Bitmap;

use super::MachineMemory;
use super::uffd::Uffd;
use crate::page_set::PAGE;

/// Memory that is filled. Nobody reads it before [`Filling::settle`] was called.
pub(crate) struct Filling {
    memory: Arc<MachineMemory>,
    /// Closing it ends the registration.
    uffd: RwLock<Option<Uffd>>,
}

impl Filling {
    /// Fills `memory`. `by_page` is whether all of it is to come, and it is not to be made of large
    /// pages: the host would make one of the first small one that is written to.
    pub(crate) fn begin(memory: Arc<MachineMemory>, by_page: bool) -> Self {
        let register = || {
            Uffd::over(&memory.regions)
                .inspect_err(|error| tracing::debug!("{}", with_causes(error)))
                .ok()
        };
        let uffd = by_page.then(register).flatten();
        Self {
            memory,
            uffd: RwLock::new(uffd),
        }
    }

    /// The memory.
    pub(crate) fn memory(&self) -> &Arc<MachineMemory> {
        &self.memory
    }

    /// Gives pages their bytes.
    ///
    /// # Errors
    ///
    /// The memory has no such pages, or the host has none left.
    pub(crate) fn write(&self, pages: Range<u64>, bytes: &[u8]) -> io::Result<()> {
        let slice = self.memory.slice(pages)?;
        let uffd = self.uffd.read().unwrap_or_else(PoisonError::into_inner);
        let Some(uffd) = &*uffd else {
            slice.copy_from(bytes);
            return Ok(());
        };
        let len = bytes.len().min(slice.len());
        let bytes = bytes.get(..len).unwrap_or_default();
        let address = slice.ptr_guard_mut().as_ptr() as u64;
        uffd.copy(address, bytes, |there| {
            let page = bytes.get(there.clone()).unwrap_or_default();
            let place = slice.subslice(there.start, page.len());
            place.map_err(io::Error::other)?.copy_from(page);
            Ok(())
        })?;
        slice.bitmap().mark_dirty(0, len);
        Ok(())
    }

    /// Makes pages ones of zeros. One that was never written to is not made by it.
    ///
    /// # Errors
    ///
    /// The memory has no such pages.
    pub(crate) fn zero(&self, mut pages: Range<u64>) -> io::Result<()> {
        // A page of them that is not there could not be looked at.
        self.settle();
        pages.try_for_each(|page| {
            if !self.memory.is_zero(page)? {
                let slice = self.memory.slice(page..page + 1)?;
                slice.copy_from(&[0_u8; PAGE]);
            }
            Ok(())
        })
    }

    /// From now on the memory is as any other.
    pub(crate) fn settle(&self) {
        let uffd = &self.uffd;
        uffd.write().unwrap_or_else(PoisonError::into_inner).take();
    }
}

#[cfg(test)]
mod tests {
    use std::iter;
    use std::thread;

    use brume_api::config::MachineConfig;

    use super::*;

    const MIB: u64 = 4;
    const PAGES: u64 = MIB * 256;

    fn filling(shared_memory: bool, by_page: bool) -> Filling {
        let machine = MachineConfig {
            mem_size_mib: MIB,
            shared_memory,
            ..MachineConfig::default()
        };
        let memory = super::super::make(&machine).unwrap();
        Filling::begin(Arc::new(memory), by_page)
    }

    fn byte(filling: &Filling, page: u64) -> u8 {
        let slice = filling.memory().slice(page..page + 1).unwrap();
        let mut bytes = [0; PAGE];
        slice.copy_to(&mut bytes);
        assert_eq!(bytes, [bytes[0]; PAGE]);
        bytes[0]
    }

    #[test]
    fn pages_are_what_was_written_last() {
        for shared in [false, true] {
            for by_page in [true, false] {
                let filling = filling(shared, by_page);
                filling.write(3..5, &[1; 2 * PAGE]).unwrap();
                // Some of them are there, in the middle.
                filling.write(2..8, &[2; 6 * PAGE]).unwrap();
                filling.write(4..5, &[3; PAGE]).unwrap();
                filling.zero(5..6).unwrap();
                filling.zero(100..101).unwrap();
                filling.write(6..7, &[4; PAGE]).unwrap();
                filling.settle();
                // A look makes a page of a file.
                let looked = shared.then_some(100..101);
                let written = filling.memory().written_pages().unwrap();
                let expected: Vec<_> = iter::once(2..8).chain(looked).collect();
                assert_eq!(written.ranges().collect::<Vec<_>>(), expected);
                let all: Vec<u8> = (1..9).map(|page| byte(&filling, page)).collect();
                assert_eq!(all, [0, 2, 2, 3, 0, 4, 2, 0]);
                // A diff would have all of them.
                let noted = (1..9).filter(|&page| {
                    let slice = filling.memory().slice(page..page + 1).unwrap();
                    slice.bitmap().dirty_at(0)
                });
                assert_eq!(noted.collect::<Vec<_>>(), [2, 3, 4, 5, 6, 7]);
            }
        }
    }

    #[test]
    fn pages_that_the_memory_has_not_got_are_refused() {
        let filling = filling(false, true);
        for pages in [
            PAGES - 1..PAGES + 1,
            PAGES..PAGES + 1,
            u64::MAX - 1..u64::MAX,
        ] {
            assert!(filling.write(pages.clone(), &[1; 2 * PAGE]).is_err());
            assert!(filling.zero(pages).is_err());
        }
    }

    #[test]
    fn one_thread_may_settle_it_while_others_write() {
        let filling = filling(false, true);
        thread::scope(|scope| {
            for thread in 0..4_u8 {
                let filling = &filling;
                scope.spawn(move || {
                    for page in (u64::from(thread)..PAGES).step_by(4) {
                        if page == PAGES / 2 {
                            filling.settle();
                        }
                        filling.write(page..page + 1, &[thread + 1; PAGE]).unwrap();
                    }
                });
            }
        });
        for page in 0..PAGES {
            assert_eq!(u64::from(byte(&filling, page)), page % 4 + 1);
        }
    }
}
