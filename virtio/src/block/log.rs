// SPDX-License-Identifier: Apache-2.0
//! Which parts of an image the guest has written, for who copies the image meanwhile.
//!
//! A block is marked when a request that changes it has ended and before the driver sees that. So
//! who takes the log and then reads the blocks in it misses nothing: what a read saw of a request
//! only in part is marked again by the end of that request, for the next time.

use std::iter;
use std::mem;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bits of a word.
const BITS: u64 = 64;

/// Blocks that were written: a bit for each, from the start of the image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Written {
    words: Vec<u64>,
    /// Length of the image in bytes.
    len: u64,
}

impl Written {
    fn new(len: u64) -> Self {
        let words = len.div_ceil(BlockLog::BLOCK).div_ceil(BITS);
        Self {
            words: vec![0; usize::try_from(words).unwrap_or(0)],
            len,
        }
    }

    /// Marks the blocks with the bytes from `first` to `last`, as far as there are any.
    fn mark(&mut self, first: u64, last: u64) {
        if first >= self.len {
            return;
        }
        let last = last.min(self.len - 1);
        let (first, last) = (first / BlockLog::BLOCK, last / BlockLog::BLOCK);
        let from = usize::try_from(first / BITS).unwrap_or(usize::MAX);
        let words = self.words.iter_mut().enumerate().skip(from);
        for (index, word) in words {
            let start = index as u64 * BITS;
            if start > last {
                break;
            }
            let low = first.saturating_sub(start);
            let high = (last - start).min(BITS - 1);
            *word |= u64::MAX << low & u64::MAX >> (BITS - 1 - high);
        }
    }

    fn is_marked(&self, block: u64) -> bool {
        let word = usize::try_from(block / BITS).ok();
        let word = word.and_then(|word| self.words.get(word));
        word.is_some_and(|word| word >> (block % BITS) & 1 != 0)
    }

    /// The first block from `from` on that is marked, or is not.
    fn find(&self, from: u64, marked: bool) -> Option<u64> {
        let flip = if marked { 0 } else { u64::MAX };
        let mut skip = from % BITS;
        let start = usize::try_from(from / BITS).ok()?;
        for (index, word) in self.words.iter().enumerate().skip(start) {
            let word = (word ^ flip) >> skip << skip;
            skip = 0;
            if word != 0 {
                return Some(index as u64 * BITS + u64::from(word.trailing_zeros()));
            }
        }
        None
    }

    /// Runs of written blocks, as bytes of the image, in order and apart from each other.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> {
        let mut at = 0;
        iter::from_fn(move || {
            let first = self.find(at, true)?;
            let end = self.find(first, false);
            at = end.unwrap_or(self.words.len() as u64 * BITS);
            let end = at.saturating_mul(BlockLog::BLOCK).min(self.len);
            Some(first * BlockLog::BLOCK..end)
        })
    }

    /// How many bytes of the image the blocks have.
    pub fn bytes(&self) -> u64 {
        self.ranges().map(|range| range.end - range.start).sum()
    }

    /// Whether no block was written.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Whether the block with the byte at `offset` was written.
    pub fn contains(&self, offset: u64) -> bool {
        self.is_marked(offset / BlockLog::BLOCK)
    }
}

#[derive(Debug)]
struct State {
    /// Length of the image in bytes.
    len: u64,
    /// While it is on.
    written: Option<Written>,
}

/// Notes which blocks of an image are written, while it is on.
#[derive(Debug)]
pub struct BlockLog {
    /// As in `state`, to be seen without a lock.
    on: AtomicBool,
    state: Mutex<State>,
}

impl BlockLog {
    /// Bytes of a block; the last one of an image may have fewer.
    pub const BLOCK: u64 = 64 << 10;

    pub(super) fn new(len: u64) -> Self {
        Self {
            on: AtomicBool::new(false),
            state: Mutex::new(State { len, written: None }),
        }
    }

    /// Starts it, with nothing written. All requests that end from now on are noted.
    pub fn start(&self) {
        let mut state = self.state();
        state.written = Some(Written::new(state.len));
        self.on.store(true, Ordering::SeqCst);
    }

    /// What was written since it was started or last taken; `None` if it is off.
    pub fn take(&self) -> Option<Written> {
        let mut state = self.state();
        let next = Written::new(state.len);
        Some(mem::replace(state.written.as_mut()?, next))
    }

    /// Ends it, and forgets what was written.
    pub fn stop(&self) {
        self.on.store(false, Ordering::SeqCst);
        self.state().written = None;
    }

    /// Notes that `len` bytes from `offset` on may have changed.
    pub(super) fn mark(&self, offset: u64, len: u64) {
        if len == 0 || !self.on.load(Ordering::SeqCst) {
            return;
        }
        if let Some(written) = &mut self.state().written {
            written.mark(offset, offset.saturating_add(len - 1));
        }
    }

    /// The image is another one, with `len` bytes, or what was written to it is not known.
    pub(super) fn all_changed(&self, len: u64) {
        let mut state = self.state();
        state.len = len;
        if let Some(written) = &mut state.written {
            *written = Written::new(len);
            if let Some(last) = len.checked_sub(1) {
                written.mark(0, last);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
