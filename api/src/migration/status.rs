// SPDX-License-Identifier: Apache-2.0
//! What is told of a move while it goes on, and afterwards.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::MigrationMode;

/// Which side of a move this is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum MigrationRole {
    /// Neither.
    #[default]
    None,
    /// Where the machine comes from.
    Source,
    /// Where it goes to.
    Target,
}

/// How far a move is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum MigrationPhase {
    /// There was none.
    #[default]
    None,
    /// The target waits for a source.
    Listening,
    /// The source looks for the target.
    Connecting,
    /// Both agree on what moves.
    Negotiating,
    /// Memory, and disks before it, move while the guest runs at the source.
    PreCopy,
    /// It is handed over; the guest stands still for most of that.
    SwitchOver,
    /// The guest runs at the target, and memory follows.
    PostCopy,
    /// The connection broke while memory followed; the guest runs until it touches what is missing.
    PostCopyInterrupted,
    /// The connection broke while the machine was handed over: neither side runs it, until they
    /// have found each other or somebody decides.
    InDoubt,
    /// The machine is at the target.
    Completed,
    /// It was called off; the machine, if there is one, is at the source.
    Cancelled,
    /// It went wrong, or took too long; the machine, if there is one, is at the source.
    Failed,
    /// The machine was lost with the target before all of its memory had followed, or the source was
    /// told to give it up: it is not at the source any more.
    Lost,
}

impl MigrationPhase {
    /// Whether nothing more will come of it.
    pub fn is_over(self) -> bool {
        matches!(
            self,
            Self::None | Self::Completed | Self::Cancelled | Self::Failed | Self::Lost
        )
    }
}

/// One pass over the memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MigrationPass {
    /// Its number, from 1.
    pub pass: u32,
    /// Pages that were to be sent.
    pub pages: u64,
    /// Pages that had something in them.
    pub sent_pages: u64,
    /// Pages that were left for the next pass because they had been written again.
    pub skipped_pages: u64,
    /// Bytes on the wire.
    pub bytes: u64,
    /// How long it took, in microseconds.
    pub duration_us: u64,
    /// Bytes per second.
    pub bandwidth: u64,
    /// Pages that were written meanwhile.
    pub dirtied_pages: u64,
    /// By how many percent vCPUs were slowed.
    pub throttle_percent: u8,
}

/// What the guest stood still for, in microseconds. The parts follow each other.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MigrationDowntime {
    /// From the order to stop at the source until the guest goes on at the target.
    pub total_us: u64,
    /// Holding vCPUs and stopping devices.
    pub pause_us: u64,
    /// Sending the last pages.
    pub pages_us: u64,
    /// Taking and sending the state of vCPUs and devices, beyond the pages.
    pub state_us: u64,
    /// Until the target had taken everything.
    pub load_us: u64,
    /// Handing over, until vCPUs ran.
    pub resume_us: u64,
}

/// The answer to GET /migration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MigrationStatus {
    /// Which side this is.
    pub role: MigrationRole,
    /// How far it is.
    pub phase: MigrationPhase,
    /// In which order memory and machine move.
    pub mode: MigrationMode,
    /// Where the other side is; at a target that waits, where that is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// The number of the present pass, from 1; at the target, of the last one that is over.
    pub pass: u32,
    /// The size of the memory, in bytes.
    pub memory_bytes: u64,
    /// Bytes that have left or arrived.
    pub bytes: u64,
    /// Pages with something in them that have left or arrived.
    pub pages: u64,
    /// Pages of zeros that did not have to.
    pub zero_pages: u64,
    /// Bytes of disks that have left or arrived, without zeros.
    #[serde(default)]
    pub disk_bytes: u64,
    /// Pages that are left, as far as is known.
    pub remaining_pages: u64,
    /// Bytes that the guest dirties per second, counted in whole pages.
    pub dirty_rate: u64,
    /// Bytes per second, on the wire at the source and unpacked at the target.
    pub bandwidth: u64,
    /// The limit, in bytes per second; 0 for none.
    pub bandwidth_limit: u64,
    /// How long the guest may stand still, in microseconds.
    pub max_downtime_us: u64,
    /// How long it would stand still now, in microseconds, as far as is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_downtime_us: Option<u64>,
    /// How long it may still take, in milliseconds, as far as is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_left_ms: Option<u64>,
    /// How long it has taken, in milliseconds.
    pub elapsed_ms: u64,
    /// By how many percent vCPUs are slowed.
    pub throttle_percent: u8,
    /// Bytes of pages before they were compressed, over those that were.
    pub compression_ratio_percent: u32,
    /// Page faults that were served, after the guest had moved.
    pub faults: u64,
    /// What the guest stood still for; told by the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<MigrationDowntime>,
    /// Why it went wrong; at a target that waits, the last move, and while memory follows, what broke.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Passes that are over, told by the source; the oldest are left out if there were very many.
    pub passes: Vec<MigrationPass>,
}
