// SPDX-License-Identifier: Apache-2.0
//! Room that is there already when a guest stands still.
//!
//! The bitmaps of a large machine are too large for the C library's heap: each is got from the
//! kernel anew, page by page as it is written to, and given back. That takes longer than all that is
//! done to them.
//!
//! This is a module with unsafe code: the C library is told what to do with memory that is freed.

#![allow(unsafe_code)]

use std::hint::black_box;
use std::sync::{Mutex, PoisonError};

use crate::page_set::PAGE_SIZE;

/// Larger ones are got from the kernel each for itself; the most that the C library takes.
const LARGE: libc::c_int = 32 << 20;
/// What the C library begins with, for both.
const USUAL: libc::c_int = 128 << 10;
/// The most room that is made. A thread's heap takes no more in one piece, and a host may have
/// little left.
const MOST: u64 = 24 << 20;

/// How many there are: threads may move a machine on while others still see it in.
static HEAPS: Mutex<u32> = Mutex::new(0);

/// While there is one, what the process frees stays with it, to be used again.
pub(super) struct WarmHeap(());

impl WarmHeap {
    /// Begins it, with room for so many bitmaps at once of a memory of `size` bytes, for this thread;
    /// for fewer if they are large.
    pub(super) fn begin(size: u64, bitmaps: u64) -> Self {
        let mut heaps = HEAPS.lock().unwrap_or_else(PoisonError::into_inner);
        *heaps += 1;
        set_thresholds(LARGE);
        let bytes = MOST.min(size / PAGE_SIZE / 8 * bitmaps);
        // Ones, so that all of it is written to.
        drop(black_box(vec![1_u8; usize::try_from(bytes).unwrap_or(0)]));
        Self(())
    }
}

impl Drop for WarmHeap {
    fn drop(&mut self) {
        let mut heaps = HEAPS.lock().unwrap_or_else(PoisonError::into_inner);
        *heaps -= 1;
        if *heaps == 0 {
            set_thresholds(USUAL);
            // SAFETY: it gives memory to the kernel that nobody uses.
            unsafe { libc::malloc_trim(0) };
        }
    }
}

fn set_thresholds(bytes: libc::c_int) {
    for parameter in [libc::M_MMAP_THRESHOLD, libc::M_TRIM_THRESHOLD] {
        // SAFETY: it changes what is done with memory that is got or freed from now on, and nothing
        // that is in use. What it does not take stays as it was, which is only slower.
        unsafe { libc::mallopt(parameter, bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many pages this thread has had to wait for.
    fn faults() -> i64 {
        // SAFETY: all of it is numbers, which may be zero.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel fills the structure, and knows its size.
        let result = unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
        assert_eq!(result, 0);
        usage.ru_minflt
    }

    fn faults_of_a_bitmap() -> i64 {
        let before = faults();
        let mut bitmap = vec![0_u64; 256 << 7];
        bitmap.fill(black_box(1));
        black_box(&bitmap);
        faults() - before
    }

    #[test]
    fn bitmaps_need_no_new_pages_while_it_is_there() {
        let begin = || {
            let _heap = WarmHeap::begin(8 << 30, 4);
            let faults = [(); 3].map(|()| faults_of_a_bitmap());
            // Each has 64 pages.
            assert!(faults.iter().sum::<i64>() < 32, "{faults:?}");
        };
        // A thread of its own has a heap of its own.
        std::thread::spawn(begin).join().unwrap();
    }
}
