// SPDX-License-Identifier: Apache-2.0
//! New memory that is filled with pages from elsewhere, by several threads, before a guest runs.
//!
//! A page that is written to for the first time costs a fault, and the kernel fills it with zeros
//! that are overwritten at once: together more than all else that is done to it. So the memory is
//! registered with a userfaultfd, which takes pages by the hundred as they are. Nobody waits for a
//! page, and where the host does not allow it they are written as usual.
//!
//! Pages that have come may be forgotten again, because they are old and what takes their places
//! follows the guest. Then the registration stays until [`Following`](super::Following) takes it
//! over: without it, the kernel might put a large page where a small one is missing.

use std::io;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use brume_api::with_causes;
use vm_memory::bitmap::Bitmap;

use super::MachineMemory;
use super::uffd::{Uffd, UffdError};
use crate::page_set::{PAGE, PageSet};

/// Memory that is filled. Nobody reads it before [`Filling::settle`] was called, or before
/// [`Following`](super::Following) has taken it over.
pub(crate) struct Filling {
    memory: Arc<MachineMemory>,
    state: RwLock<State>,
}

struct State {
    /// Closing it ends the registration.
    uffd: Option<Uffd>,
    /// Pages that have come, were forgotten, and have not come again.
    forgotten: Option<PageSet>,
}

impl State {
    fn is_whole(&self) -> bool {
        let forgotten = self.forgotten.as_ref();
        forgotten.is_none_or(|pages| pages.first_from(0).is_none())
    }
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
        let forgotten = None;
        Self {
            memory,
            state: RwLock::new(State { uffd, forgotten }),
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
        let slice = self.memory.slice(pages.clone())?;
        let state = self.come(&pages);
        let Some(uffd) = &state.uffd else {
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
    /// The memory has no such pages, or the host has none left.
    pub(crate) fn zero(&self, mut pages: Range<u64>) -> io::Result<()> {
        pages.try_for_each(|page| {
            let slice = self.memory.slice(page..page + 1)?;
            let state = self.come(&(page..page + 1));
            let clear = || {
                if !self.memory.is_zero(page)? {
                    slice.copy_from(&[0_u8; PAGE]);
                }
                Ok(())
            };
            match &state.uffd {
                // One that is not there could not be looked at.
                Some(uffd) => uffd.zero(slice.ptr_guard_mut().as_ptr() as u64, clear),
                None => clear(),
            }
        })
    }

    /// Forgets the pages of `words`, the first of which is word `first`; they may have come.
    ///
    /// # Errors
    ///
    /// The host does not allow it.
    pub(crate) fn forget(&self, first: usize, words: &[u64]) -> Result<(), UffdError> {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        if state.uffd.is_none() {
            state.uffd = Some(Uffd::over(&self.memory.regions)?);
        }
        let none = || PageSet::empty(self.memory.size);
        let forgotten = state.forgotten.get_or_insert_with(none);
        let known = PageSet::from_words(forgotten.words(first..first + words.len()).to_vec());
        let stale = PageSet::from_words(words.to_vec()).without(&known);
        let discarded = self.memory.discard(first, stale.into_words());
        forgotten.insert_words(first, words);
        discarded.map_err(UffdError::Register)
    }

    /// Whether no page is missing because it was forgotten.
    pub(crate) fn is_whole(&self) -> bool {
        self.read().is_whole()
    }

    /// From now on the memory is as any other, if it is whole.
    pub(crate) fn settle(&self) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        if state.is_whole() {
            state.uffd.take();
        }
    }

    /// Ends it: the registration, if there is one, and what was forgotten.
    pub(super) fn hand_on(&self) -> (Option<Uffd>, PageSet) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let forgotten = state.forgotten.take();
        (state.uffd.take(), forgotten.unwrap_or_default())
    }

    /// Notes that `pages` come, before anybody can forget them again.
    fn come(&self, pages: &Range<u64>) -> RwLockReadGuard<'_, State> {
        loop {
            let state = self.read();
            let forgotten = state.forgotten.as_ref();
            if forgotten.is_none_or(|set| !pages.clone().any(|page| set.contains(page))) {
                return state;
            }
            drop(state);
            let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
            if let Some(forgotten) = &mut state.forgotten {
                pages.clone().for_each(|page| forgotten.remove(page));
            }
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::iter;
    use std::thread;

    use brume_api::config::MachineConfig;

    use super::*;
    use crate::memory::Following;

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

    fn set(pages: Range<u64>) -> PageSet {
        let mut set = PageSet::empty(PAGES << 12);
        set.insert_range(pages);
        set
    }

    fn forget(filling: &Filling, pages: Range<u64>) {
        filling.forget(0, &set(pages).into_words()).unwrap();
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
    fn what_is_forgotten_comes_again_or_is_missing() {
        for shared in [false, true] {
            let filling = filling(shared, true);
            filling.write(2..8, &[1; 6 * PAGE]).unwrap();
            filling.settle();
            assert!(filling.is_whole());
            forget(&filling, 3..6);
            filling.write(4..5, &[2; PAGE]).unwrap();
            forget(&filling, 6..7);
            filling.zero(5..6).unwrap();
            filling.write(7..8, &[3; PAGE]).unwrap();
            filling.settle();
            assert!(!filling.is_whole());
            let following = Following::begin(&filling, set(3..4)).unwrap();
            // Whether it was said or not.
            let missing = PageSet::from_words(following.words());
            assert_eq!(missing.ranges().collect::<Vec<_>>(), [3..4, 6..7]);
            assert_eq!(following.give(2..8, Some(&[4; 6 * PAGE])).unwrap(), 2);
            following.end().unwrap();
            let all: Vec<u8> = (2..8).map(|page| byte(&filling, page)).collect();
            assert_eq!(all, [1, 4, 2, 0, 4, 3]);
        }
    }

    #[test]
    fn a_part_is_forgotten_where_it_is() {
        let filling = filling(false, true);
        filling.write(198..204, &[1; 6 * PAGE]).unwrap();
        // Page 200.
        filling.forget(3, &[1 << 8]).unwrap();
        let following = Following::begin(&filling, set(200..202)).unwrap();
        assert_eq!(following.give(198..204, Some(&[4; 6 * PAGE])).unwrap(), 2);
        following.end().unwrap();
        let all: Vec<u8> = (198..204).map(|page| byte(&filling, page)).collect();
        assert_eq!(all, [1, 1, 4, 4, 1, 1]);
    }

    #[test]
    fn memory_is_whole_again_when_all_that_was_forgotten_has_come() {
        let filling = filling(false, true);
        forget(&filling, 3..5);
        filling.write(2..5, &[1; 3 * PAGE]).unwrap();
        assert!(filling.is_whole());
        filling.settle();
        assert_eq!([3, 9].map(|page| byte(&filling, page)), [1, 0]);
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
