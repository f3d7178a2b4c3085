// SPDX-License-Identifier: Apache-2.0
//! What a balloon counts. Its worker alone writes; anybody may read at any time.

use brume_devices::Counter;

/// The running counters of a device.
#[derive(Debug, Default)]
pub(super) struct BalloonCounters {
    pub(super) inflates: Counter,
    pub(super) deflates: Counter,
    pub(super) statistics: Counter,
    pub(super) statistics_fails: Counter,
    pub(super) inflate: GivenBackCounters,
    pub(super) hint: GivenBackCounters,
    pub(super) report: GivenBackCounters,
}

/// The running counters of one way to give memory back.
#[derive(Debug, Default)]
pub(super) struct GivenBackCounters {
    pub(super) ranges: Counter,
    pub(super) bytes: Counter,
    pub(super) fails: Counter,
}

impl GivenBackCounters {
    fn get(&self) -> GivenBack {
        GivenBack {
            ranges: self.ranges.get(),
            bytes: self.bytes.get(),
            fails: self.fails.get(),
        }
    }
}

/// Memory that was given back to the host in one way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GivenBack {
    /// Ranges of addresses.
    pub ranges: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Ranges that the host did not take.
    pub fails: u64,
}

/// The values of the counters since the device was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonCounts {
    /// Requests of the guest to put pages into the balloon.
    pub inflates: u64,
    /// Requests of the guest to take pages out.
    pub deflates: u64,
    /// Statistics that the guest has sent.
    pub statistics: u64,
    /// Those of them that cannot be read.
    pub statistics_fails: u64,
    /// Pages in the balloon.
    pub inflate: GivenBack,
    /// Free pages that the guest has hinted.
    pub hint: GivenBack,
    /// Free pages that the guest has reported.
    pub report: GivenBack,
}

impl BalloonCounters {
    pub(super) fn get(&self) -> BalloonCounts {
        BalloonCounts {
            inflates: self.inflates.get(),
            deflates: self.deflates.get(),
            statistics: self.statistics.get(),
            statistics_fails: self.statistics_fails.get(),
            inflate: self.inflate.get(),
            hint: self.hint.get(),
            report: self.report.get(),
        }
    }
}
