// SPDX-License-Identifier: Apache-2.0
//! What a machine counts, collected at one moment, and the two forms in which it is told.

mod firecracker;
mod host;
mod migration;
mod prometheus;

use std::sync::Arc;
use std::time::Duration;

use brume_api::{ApiCounts, MigrationStatus};
use brume_devices::{I8042Counters, SerialCounters};
use brume_mmds::MmdsCounts;
use brume_virtio::balloon::BalloonCounts;
use brume_virtio::block::BlockCounts;
use brume_virtio::net::NetCounts;
use brume_virtio::rng::RngCounts;
use brume_virtio::vsock::VsockCounts;

use crate::cpu::VcpuCounts;
use crate::lifecycle::VmState;
use crate::telemetry::Times;

pub(crate) use firecracker::{Sheet, json_line};
pub(crate) use host::{HostUse, host_use};
pub(crate) use prometheus::text;

/// Everything that was counted so far.
pub(crate) struct Counts {
    pub(crate) state: VmState,
    pub(crate) api: ApiCounts,
    pub(crate) times: Times,
    pub(crate) memory_bytes: u64,
    pub(crate) vcpus: Vec<VcpuCounts>,
    pub(crate) drives: Vec<(String, BlockCounts)>,
    pub(crate) interfaces: Vec<(String, NetCounts)>,
    pub(crate) balloon: Option<Ballooned>,
    pub(crate) vsock: Option<VsockCounts>,
    pub(crate) entropy: Option<RngCounts>,
    pub(crate) mmds: MmdsCounts,
    pub(crate) serial: Arc<SerialCounters>,
    pub(crate) keyboard: Arc<I8042Counters>,
    pub(crate) host: HostUse,
    pub(crate) migration: MigrationStatus,
}

/// A balloon and its size.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ballooned {
    pub(crate) counts: BalloonCounts,
    /// The size that it is to have.
    pub(crate) target_bytes: u64,
    /// The size that it has, as the guest says.
    pub(crate) actual_bytes: u64,
}

/// A time in whole microseconds.
fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use brume_devices::LatencyCounter;

    use super::*;

    /// A machine with a drive that was read once and an interface.
    pub(super) fn counts() -> Counts {
        let latency = LatencyCounter::default();
        latency.add(Duration::from_micros(40));
        let mut drive = BlockCounts::default();
        drive.reads.count = 1;
        drive.reads.bytes = 512;
        drive.reads.latency = latency.get();
        let interface = NetCounts {
            rx_frames: 3,
            ..NetCounts::default()
        };
        Counts {
            state: VmState::Running,
            api: ApiCounts::default(),
            times: Times {
                pause: Duration::from_micros(5),
                ..Times::default()
            },
            memory_bytes: 1 << 27,
            vcpus: vec![VcpuCounts::default(); 2],
            drives: vec![("root".into(), drive)],
            interfaces: vec![("eth0".into(), interface)],
            balloon: Some(Ballooned::default()),
            vsock: Some(VsockCounts::default()),
            entropy: Some(RngCounts {
                bytes: 7,
                ..RngCounts::default()
            }),
            mmds: MmdsCounts::default(),
            serial: Arc::default(),
            keyboard: Arc::default(),
            host: HostUse::default(),
            migration: MigrationStatus {
                role: brume_api::MigrationRole::Source,
                disk_bytes: 4096,
                time_left_ms: Some(1500),
                downtime: Some(brume_api::MigrationDowntime::default()),
                ..MigrationStatus::default()
            },
        }
    }
}
