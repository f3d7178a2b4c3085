// SPDX-License-Identifier: Apache-2.0
//! Clocks that the standard library does not show.
//!
//! This is a module with unsafe code: clock_gettime takes a pointer.

#![allow(unsafe_code)]

use std::time::Duration;

/// The monotonic clock, as other processes see it.
pub(crate) fn monotonic() -> Duration {
    now(libc::CLOCK_MONOTONIC)
}

/// CPU time of this process.
pub(crate) fn process_cpu() -> Duration {
    now(libc::CLOCK_PROCESS_CPUTIME_ID)
}

fn now(clock: libc::clockid_t) -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a `timespec`; both clocks always exist.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}
