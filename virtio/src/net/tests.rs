// SPDX-License-Identifier: Apache-2.0
//! Tests of the network device: each direction by itself, the whole device with its worker, and
//! TAPs of the host.

// Sizes and seeds here are small by construction.
#![allow(clippy::cast_possible_truncation)]

mod announce;
mod device;
mod host;
mod metadata;
mod restore;
mod rx;
mod tx;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use brume_devices::Interrupt;
use vm_memory::{Bytes, GuestAddress};

use super::{Ends, NetCounters, Tap};
use crate::limiter::{Limiter, LimiterUpdate};
use crate::memory::GuestMemory;
use crate::signals::DeviceSignals;
use crate::testing::{BUFFERS, Driver};

/// Length of the header.
const HEADER: usize = 12;

/// A frame of `len` bytes with its header, as the TAP has it; `seed` makes it differ from others.
fn frame(len: usize, seed: u8) -> Vec<u8> {
    let body = (0..len - HEADER).map(|at| (at * 7 + at / 256) as u8 ^ seed);
    [0; HEADER].into_iter().chain(body).collect()
}

/// Signals whose interrupts are counted.
fn signals() -> (DeviceSignals, Arc<AtomicU32>) {
    let count = Arc::new(AtomicU32::new(0));
    let counter = count.clone();
    let line = Interrupt::from_fn(move || {
        counter.fetch_add(1, Ordering::SeqCst);
    });
    (DeviceSignals::new(line), count)
}

/// A driver whose rings are out of the way of another's.
fn second_driver(memory: GuestMemory, size: u16) -> Driver {
    let mut driver = Driver::new(memory, size);
    driver.state.desc_table = BUFFERS;
    driver.state.avail_ring = BUFFERS + 0x8000;
    driver.state.used_ring = BUFFERS + 0xa000;
    driver
}

fn read(memory: &GuestMemory, address: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    memory.read_slice(&mut data, GuestAddress(address)).unwrap();
    data
}

/// What a direction works with, unlimited.
fn ends(tap: &Arc<Tap>, counters: &Arc<NetCounters>) -> Ends {
    Ends {
        tap: tap.clone(),
        counters: counters.clone(),
        limiter: Arc::new(Limiter::new(LimiterUpdate::default()).unwrap()),
    }
}

/// Waits until `condition` holds, and fails if it does not within a while.
fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(10), "not so: {what}");
        std::thread::yield_now();
    }
}
