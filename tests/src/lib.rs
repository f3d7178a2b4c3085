// SPDX-License-Identifier: Apache-2.0
//! What the end-to-end tests share: the artefacts, running brume, network namespaces.
//!
//! Whatever a test starts is a value here that ends it when it is dropped, so that a test that
//! fails leaves nothing behind either.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a harness of tests: what does not work is a failed test"
)]

pub mod api;
pub mod artefacts;
#[allow(
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "the files are the tests' own"
)]
pub mod forge;
// The bare guest's own files, so that both sides reckon alike.
#[allow(
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "lengths are the tests'"
)]
#[path = "../bare-guest/src/frame.rs"]
pub mod frame;
pub mod frames;
pub mod host;
pub mod lan;
pub mod live;
pub mod memory_files;
pub mod migration;
pub mod netns;
#[allow(clippy::indexing_slicing, reason = "lengths are the tests'")]
#[path = "../bare-guest/src/pattern.rs"]
pub mod pattern;
#[allow(clippy::indexing_slicing, reason = "frames are the tests' own")]
pub mod ping;
pub mod placed;
pub mod proxy;
pub mod pty;
pub mod runs;
pub mod vm;
pub mod witness;

use std::sync::{Condvar, Mutex, PoisonError};

/// How many vCPUs of Linux guests run at a time. Each keeps a CPU of the host busy.
const LINUX_VCPUS: usize = 2;

static FREE_VCPUS: Mutex<usize> = Mutex::new(LINUX_VCPUS);
static FREED: Condvar = Condvar::new();

/// The right to run a Linux guest, until it is dropped.
pub struct LinuxSlot(usize);

/// Waits for the right to run Linux guests with `vcpus` vCPUs in all.
pub fn linux_slot(vcpus: usize) -> LinuxSlot {
    let vcpus = vcpus.min(LINUX_VCPUS);
    let free = FREE_VCPUS.lock().unwrap_or_else(PoisonError::into_inner);
    let mut free = FREED
        .wait_while(free, |free| *free < vcpus)
        .unwrap_or_else(PoisonError::into_inner);
    *free -= vcpus;
    LinuxSlot(vcpus)
}

impl Drop for LinuxSlot {
    fn drop(&mut self) {
        *FREE_VCPUS.lock().unwrap_or_else(PoisonError::into_inner) += self.0;
        FREED.notify_all();
    }
}
