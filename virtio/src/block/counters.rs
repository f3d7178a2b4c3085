// SPDX-License-Identifier: Apache-2.0
//! What a block device counts.

use std::time::Duration;

use brume_devices::{Counter, Latency, LatencyCounter};

use super::request::Request;

/// What a request is counted as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
    #[default]
    Other,
}

impl Kind {
    pub(super) fn of(request: &Request) -> Self {
        match request {
            Request::Read { .. } => Self::Read,
            Request::Write { .. } => Self::Write,
            Request::Flush => Self::Flush,
            Request::Discard { .. } => Self::Discard,
            Request::WriteZeroes { .. } => Self::WriteZeroes,
            Request::GetId => Self::Other,
        }
    }

    /// Whether it changes what the image holds.
    pub(super) fn is_change(self) -> bool {
        matches!(self, Self::Write | Self::Discard | Self::WriteZeroes)
    }

    /// Whether a rate limiter counts its bytes.
    pub(super) fn is_transfer(self) -> bool {
        matches!(self, Self::Read | Self::Write)
    }
}

#[derive(Debug, Default)]
struct KindCounters {
    count: Counter,
    bytes: Counter,
    latency: LatencyCounter,
}

impl KindCounters {
    fn get(&self) -> KindCounts {
        KindCounts {
            count: self.count.get(),
            bytes: self.bytes.get(),
            latency: self.latency.get(),
        }
    }
}

/// The running counters of a device.
#[derive(Debug, Default)]
pub(super) struct BlockCounters {
    reads: KindCounters,
    writes: KindCounters,
    flushes: KindCounters,
    discards: KindCounters,
    write_zeroes: KindCounters,
    pub(super) failed: Counter,
    pub(super) refused: Counter,
    pub(super) kicks: Counter,
}

impl BlockCounters {
    /// Counts a request that was carried out.
    pub(super) fn add(&self, kind: Kind, bytes: u64, took: Duration) {
        let counters = match kind {
            Kind::Read => &self.reads,
            Kind::Write => &self.writes,
            Kind::Flush => &self.flushes,
            Kind::Discard => &self.discards,
            Kind::WriteZeroes => &self.write_zeroes,
            Kind::Other => return,
        };
        counters.count.add(1);
        counters.bytes.add(bytes);
        counters.latency.add(took);
    }

    pub(super) fn get(&self) -> BlockCounts {
        BlockCounts {
            reads: self.reads.get(),
            writes: self.writes.get(),
            flushes: self.flushes.get(),
            discards: self.discards.get(),
            write_zeroes: self.write_zeroes.get(),
            failed: self.failed.get(),
            refused: self.refused.get(),
            kicks: self.kicks.get(),
            ..BlockCounts::default()
        }
    }
}

/// Requests of one kind that were carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KindCounts {
    /// How many.
    pub count: u64,
    /// Their bytes on the disk.
    pub bytes: u64,
    /// How long they took, from the queue to the answer.
    pub latency: Latency,
}

/// The values of the counters since the device was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockCounts {
    /// Reads.
    pub reads: KindCounts,
    /// Writes.
    pub writes: KindCounts,
    /// Flushes.
    pub flushes: KindCounts,
    /// Discards.
    pub discards: KindCounts,
    /// Requests to write zeroes.
    pub write_zeroes: KindCounts,
    /// Requests that the host failed.
    pub failed: u64,
    /// Requests that are none, or not for this disk.
    pub refused: u64,
    /// How often the worker slept and was woken.
    pub kicks: u64,
    /// How often the rate limiter made a request wait.
    pub throttled: u64,
    /// How often the image was changed.
    pub updates: u64,
    /// How often it could not be.
    pub update_fails: u64,
}
