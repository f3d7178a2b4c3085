// SPDX-License-Identifier: Apache-2.0
//! Metrics of a move to or from another process, for Prometheus.

use brume_api::{MigrationPhase, MigrationRole, MigrationStatus};

use super::prometheus::Text;

const PHASES: [(&str, MigrationPhase); 12] = [
    ("listening", MigrationPhase::Listening),
    ("connecting", MigrationPhase::Connecting),
    ("negotiating", MigrationPhase::Negotiating),
    ("pre_copy", MigrationPhase::PreCopy),
    ("switch_over", MigrationPhase::SwitchOver),
    ("post_copy", MigrationPhase::PostCopy),
    ("post_copy_interrupted", MigrationPhase::PostCopyInterrupted),
    ("in_doubt", MigrationPhase::InDoubt),
    ("completed", MigrationPhase::Completed),
    ("cancelled", MigrationPhase::Cancelled),
    ("failed", MigrationPhase::Failed),
    ("lost", MigrationPhase::Lost),
];

/// Adds them, if there was a move.
pub(super) fn add(text: &mut Text, status: &MigrationStatus) {
    if status.role == MigrationRole::None {
        return;
    }
    let name = "brume_migration_phase";
    text.metric(name, "gauge", "1 for the phase that the last move is in.");
    for (phase, value) in PHASES {
        let is = u64::from(value == status.phase);
        text.count(name, &[("phase", phase)], is);
    }
    for (name, help, value) in [
        (
            "brume_migration_bytes",
            "Bytes that have left or arrived by the last move.",
            status.bytes,
        ),
        (
            "brume_migration_pages",
            "Pages with something in them that have left or arrived by the last move.",
            status.pages,
        ),
        (
            "brume_migration_zero_pages",
            "Pages of zeros that the last move has left out.",
            status.zero_pages,
        ),
        (
            "brume_migration_disk_bytes",
            "Bytes of disks that have left or arrived by the last move, without zeros.",
            status.disk_bytes,
        ),
        (
            "brume_migration_remaining_pages",
            "Pages that are left, as far as is known.",
            status.remaining_pages,
        ),
        (
            "brume_migration_pass",
            "The pass over the memory that the last move is in.",
            status.pass.into(),
        ),
        (
            "brume_migration_faults",
            "Page faults that were served after the guest had moved.",
            status.faults,
        ),
        (
            "brume_migration_bandwidth_bytes_per_second",
            "Bytes per second in the last pass, or of late where there is none.",
            status.bandwidth,
        ),
        (
            "brume_migration_dirty_bytes_per_second",
            "Bytes that the guest dirtied per second in the last pass, in whole pages.",
            status.dirty_rate,
        ),
        (
            "brume_migration_throttle_percent",
            "By how many percent vCPUs are slowed.",
            status.throttle_percent.into(),
        ),
    ] {
        text.metric(name, "gauge", help);
        text.count(name, &[], value);
    }
    let downtime = status.downtime.as_ref().map(|time| time.total_us);
    for (name, help, us) in [
        (
            "brume_migration_downtime_seconds",
            "How long the guest stood still, in seconds.",
            downtime,
        ),
        (
            "brume_migration_expected_downtime_seconds",
            "How long the guest would stand still now, in seconds, as far as is known.",
            status.expected_downtime_us,
        ),
        (
            "brume_migration_left_seconds",
            "How long the last move may still take, in seconds, as far as is known.",
            status.time_left_ms.map(|time| time.saturating_mul(1000)),
        ),
    ] {
        if let Some(us) = us {
            text.metric(name, "gauge", help);
            text.value(name, &[], us as f64 / 1e6);
        }
    }
}
