// SPDX-License-Identifier: Apache-2.0
//! What a network device counts. The worker alone writes; anybody may read at any time.

use std::sync::atomic::{AtomicU64, Ordering};

/// A counter with one writer.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, amount: u64) {
        // With one writer this loses nothing, and needs no locked instruction.
        let value = self.0.load(Ordering::Relaxed);
        self.0.store(value.wrapping_add(amount), Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The running counters of a device.
#[derive(Debug, Default)]
pub struct NetCounters {
    pub(super) rx_frames: Counter,
    pub(super) rx_bytes: Counter,
    pub(super) rx_dropped: Counter,
    pub(super) rx_bad_chains: Counter,
    pub(super) rx_errors: Counter,
    pub(super) tx_frames: Counter,
    pub(super) tx_bytes: Counter,
    pub(super) tx_bad_chains: Counter,
    pub(super) tx_errors: Counter,
}

/// The values of the counters since the device was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetCounts {
    /// Frames given to the guest.
    pub rx_frames: u64,
    /// Their bytes, without virtio headers.
    pub rx_bytes: u64,
    /// Frames for which the guest had no room.
    pub rx_dropped: u64,
    /// Receive buffers that no frame could be put in.
    pub rx_bad_chains: u64,
    /// Reads that the TAP refused.
    pub rx_errors: u64,
    /// Frames taken from the guest to the TAP.
    pub tx_frames: u64,
    /// Their bytes, without virtio headers.
    pub tx_bytes: u64,
    /// Transmit buffers that cannot be a frame.
    pub tx_bad_chains: u64,
    /// Frames that the TAP refused.
    pub tx_errors: u64,
}

impl NetCounters {
    /// The values at this moment; they need not be of the same instant.
    pub fn get(&self) -> NetCounts {
        NetCounts {
            rx_frames: self.rx_frames.get(),
            rx_bytes: self.rx_bytes.get(),
            rx_dropped: self.rx_dropped.get(),
            rx_bad_chains: self.rx_bad_chains.get(),
            rx_errors: self.rx_errors.get(),
            tx_frames: self.tx_frames.get(),
            tx_bytes: self.tx_bytes.get(),
            tx_bad_chains: self.tx_bad_chains.get(),
            tx_errors: self.tx_errors.get(),
        }
    }
}
