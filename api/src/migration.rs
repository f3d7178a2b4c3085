// SPDX-License-Identifier: Apache-2.0
//! Moving a running machine to another process: requests to send, to receive, to steer and to call
//! off, and what is told of it meanwhile. brume only.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::snapshot::{DriveOverride, NetworkOverride, VsockOverride};

/// In which order memory and machine move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum MigrationMode {
    /// Memory first, while the machine runs here; then the machine.
    #[default]
    PreCopy,
    /// The machine first; memory follows, what the guest touches before the rest.
    PostCopy,
    /// One pass over memory, then the machine, then what was written meanwhile.
    Hybrid,
}

/// What becomes of a machine that has not moved in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum OnTimeout {
    /// It stays here.
    #[default]
    Cancel,
    /// It moves at once, with a longer downtime than was asked for.
    Force,
    /// It moves at once, and what is missing of its memory follows.
    PostCopy,
}

/// How pages are made smaller on their way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum MigrationCompression {
    /// As it is faster, which is measured now and then.
    #[default]
    Auto,
    /// Not at all.
    None,
    /// LZ4.
    Lz4,
    /// Zstandard.
    Zstd,
}

/// The certificates of one side. Both sides prove who they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrationTls {
    /// Certificates of those whom the other side's certificate may be signed by, in PEM form.
    #[schema(value_type = String)]
    pub ca: PathBuf,
    /// Our own certificate, and what leads from it to one of `ca`, in PEM form.
    #[schema(value_type = String)]
    pub certificate: PathBuf,
    /// The key of `certificate`, in PEM form.
    #[schema(value_type = String)]
    pub key: PathBuf,
    /// The name in the certificate of the receiver; the host of `destination` unless told
    /// otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_name: Option<String>,
}

/// Moves the machine away.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SendMigration {
    /// Where to: `unix:PATH`, `tcp:HOST:PORT`, or `fd:N` for a connected socket that this process
    /// was started with.
    pub destination: String,
    /// How long the guest may stand still, in milliseconds, by what is measured of the connection.
    #[serde(default = "default_max_downtime_ms")]
    pub max_downtime_ms: u32,
    /// After how many seconds `on_timeout` is done; 0 for never.
    #[serde(default)]
    pub timeout_s: u32,
    /// What becomes of a machine that has not moved by then.
    #[serde(default)]
    pub on_timeout: OnTimeout,
    /// The most bytes per second while the machine runs here; 0 for no limit.
    #[serde(default)]
    pub bandwidth_limit: u64,
    /// How many connections carry memory, from 1 to 16.
    #[serde(default = "default_connections")]
    #[schema(minimum = 1, maximum = 16)]
    pub connections: u8,
    /// How pages are made smaller on their way.
    #[serde(default)]
    pub compression: MigrationCompression,
    /// In which order memory and machine move.
    #[serde(default)]
    pub mode: MigrationMode,
    /// Whether to slow the guest down step by step if it writes faster than the connection carries.
    #[serde(default)]
    pub auto_converge: bool,
    /// Whether the disks' contents move too, because they are not on shared storage.
    #[serde(default)]
    pub with_disks: bool,
    /// For a connection that nobody can read or change on its way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<MigrationTls>,
}

fn default_max_downtime_ms() -> u32 {
    20
}

fn default_connections() -> u8 {
    1
}

/// Waits for a machine to come.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReceiveMigration {
    /// Where to wait: `unix:PATH`, `tcp:HOST:PORT`, or `fd:N` for a connected socket that this
    /// process was started with.
    pub listen: String,
    /// Other TAPs, by network interface.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub network_overrides: Vec<NetworkOverride>,
    /// Another socket for the socket device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_override: Option<VsockOverride>,
    /// Other files, by drive.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drive_overrides: Vec<DriveOverride>,
    /// Whether the machine goes on at once; it stays paused if it was paused when it was sent.
    #[serde(default = "default_resume_vm")]
    pub resume_vm: bool,
    /// Whether to note which pages are written from then on, for diff snapshots.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// For a connection that nobody can read or change on its way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<MigrationTls>,
}

fn default_resume_vm() -> bool {
    true
}

/// What a person decides about a machine whose two sides have lost each other while it was handed
/// over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum MigrationDecision {
    /// It runs here. To be said to one side only, and after the other side was ended.
    Run,
    /// It does not run here any more.
    Abandon,
}

/// Changes limits while a machine moves, or helps one that does not get on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrationPatch {
    /// How long the guest may stand still, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_downtime_ms: Option<u32>,
    /// After how many seconds since its begin `on_timeout` is done; 0 for never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<u32>,
    /// What becomes of a machine that has not moved by then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_timeout: Option<OnTimeout>,
    /// The most bytes per second; 0 for no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_limit: Option<u64>,
    /// Whether to slow the guest down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_converge: Option<bool>,
    /// Where to go on with a machine whose memory was still following when the connection broke:
    /// empty for where it was sent to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume: Option<String>,
    /// What becomes of a machine whose other side is lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decision: Option<MigrationDecision>,
}

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
    /// Memory moves while the guest runs at the source.
    PreCopy,
    /// The guest stands still.
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
    /// It was called off; the machine is at the source.
    Cancelled,
    /// It went wrong; the machine is at the source.
    Failed,
}

impl MigrationPhase {
    /// Whether nothing more will come of it.
    pub fn is_over(self) -> bool {
        matches!(
            self,
            Self::None | Self::Completed | Self::Cancelled | Self::Failed
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
    /// Where the other side is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// The number of the present pass, from 1.
    pub pass: u32,
    /// The size of the memory, in bytes.
    pub memory_bytes: u64,
    /// Bytes that have left or arrived.
    pub bytes: u64,
    /// Pages with something in them that have left or arrived.
    pub pages: u64,
    /// Pages of zeros that did not have to.
    pub zero_pages: u64,
    /// Pages that are left, as far as is known.
    pub remaining_pages: u64,
    /// Bytes that the guest dirties per second, counted in whole pages.
    pub dirty_rate: u64,
    /// Bytes per second on the wire.
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
    /// What the guest stood still for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<MigrationDowntime>,
    /// Why it went wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Passes that are over; the oldest are left out if there were very many.
    pub passes: Vec<MigrationPass>,
}

/// A request about a move.
#[derive(Clone, Debug, PartialEq)]
pub enum MigrationRequest {
    /// PUT /migration/send
    Send(Box<SendMigration>),
    /// PUT /migration/receive
    Receive(Box<ReceiveMigration>),
    /// GET /migration
    Get,
    /// PATCH /migration
    Patch(Box<MigrationPatch>),
    /// DELETE /migration
    Cancel,
}
