// SPDX-License-Identifier: Apache-2.0
//! What a vCPU counts of its exits.

use brume_devices::{Counter, Latency, LatencyCounter};

/// The running counters of a vCPU; its thread writes them.
#[derive(Debug, Default)]
pub(crate) struct VcpuCounters {
    pub(super) io_in: LatencyCounter,
    pub(super) io_out: LatencyCounter,
    pub(super) mmio_read: LatencyCounter,
    pub(super) mmio_write: LatencyCounter,
    pub(super) kicks: Counter,
    pub(super) failures: Counter,
}

/// The exits of a vCPU so far, those to us with the time that they took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct VcpuCounts {
    pub(crate) io_in: Latency,
    pub(crate) io_out: Latency,
    pub(crate) mmio_read: Latency,
    pub(crate) mmio_write: Latency,
    /// Those that a kick or a signal caused.
    pub(crate) kicks: u64,
    /// Those that ended it.
    pub(crate) failures: u64,
}

impl VcpuCounters {
    pub(crate) fn get(&self) -> VcpuCounts {
        VcpuCounts {
            io_in: self.io_in.get(),
            io_out: self.io_out.get(),
            mmio_read: self.mmio_read.get(),
            mmio_write: self.mmio_write.get(),
            kicks: self.kicks.get(),
            failures: self.failures.get(),
        }
    }
}
