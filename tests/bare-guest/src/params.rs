// SPDX-License-Identifier: Apache-2.0
//! The parameters that the command line gave, for every step to ask.

use crate::cmdline;
use core::cell::UnsafeCell;

struct Line(UnsafeCell<&'static str>);

// SAFETY: there is one thread.
unsafe impl Sync for Line {}

static LINE: Line = Line(UnsafeCell::new(""));

/// Keeps the command line. Called once, before anything asks.
pub fn set(line: &'static str) {
    // SAFETY: one thread, and no borrow lives on: `line` hands out copies of the reference.
    unsafe { *LINE.0.get() = line };
}

/// The whole command line.
pub fn line() -> &'static str {
    // SAFETY: as in `set`.
    unsafe { *LINE.0.get() }
}

/// The text of a parameter, if it was given.
pub fn text(key: &str) -> Option<&'static str> {
    cmdline::value(line(), key)
}

/// The number of a parameter, or `default` when it was not given.
///
/// # Panics
///
/// When it is not a number: a benchmark with a mistyped parameter must not run.
pub fn number(key: &str, default: u64) -> u64 {
    match text(key) {
        None => default,
        Some(text) => match cmdline::number(text) {
            Some(value) => value,
            None => panic!("{key}={text} is not a number"),
        },
    }
}
