// SPDX-License-Identifier: Apache-2.0
//! Moving a running machine to another process: requests to send, to receive, to steer and to call
//! off, and what is told of it meanwhile. brume only.

mod status;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::config::{object, objects};
use crate::fault::Fault;
use crate::request::Request;
use crate::route::{Parsed, checked_id, json};
use crate::snapshot::{DriveOverride, NetworkOverride, VsockOverride};

pub use status::{
    MigrationDowntime, MigrationPass, MigrationPhase, MigrationRole, MigrationStatus,
};

/// The most connections that carry memory.
const MAX_CONNECTIONS: u8 = 16;

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
    /// The name in the certificate of the receiver; the host of `destination`, or
    /// `localhost`, unless told otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_name: Option<String>,
}

/// Moves the machine away. When it has gone, with all of its memory, this process ends with status 0;
/// it stays for five seconds at most, until somebody has seen with GET /migration or in the events how
/// it went. While it moves, nothing of the machine can be paused, saved or changed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SendMigration {
    /// Where to: `unix:PATH`, `tcp:HOST:PORT` (an IPv6 address in brackets), or `fd:N` for a connected
    /// socket that this process was started with: one connection, over which memory cannot follow.
    pub destination: String,
    /// How long the guest may stand still, in milliseconds, by what is measured of the connection.
    #[serde(default = "default_max_downtime_ms")]
    #[schema(minimum = 1)]
    pub max_downtime_ms: u32,
    /// After how many seconds from the request on `on_timeout` is done, while memory or disks move
    /// and the machine runs here; 0 for never.
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
    /// In which order memory and machine move. Memory of 2 MiB pages cannot follow.
    #[serde(default)]
    pub mode: MigrationMode,
    /// Whether to slow the guest down step by step if it writes faster than the connection carries.
    #[serde(default)]
    pub auto_converge: bool,
    /// Whether the disks' contents move too, because they are not on shared storage.
    #[serde(default)]
    pub with_disks: bool,
    /// For a connection that nobody can read or change on its way.
    #[serde(
        default,
        deserialize_with = "object",
        skip_serializing_if = "Option::is_none"
    )]
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
    #[serde(
        default,
        deserialize_with = "objects",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub network_overrides: Vec<NetworkOverride>,
    /// Another socket for the socket device.
    #[serde(
        default,
        deserialize_with = "object",
        skip_serializing_if = "Option::is_none"
    )]
    pub vsock_override: Option<VsockOverride>,
    /// Other files, by drive.
    #[serde(
        default,
        deserialize_with = "objects",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub drive_overrides: Vec<DriveOverride>,
    /// Whether the machine goes on at once; it stays paused if it was paused when it was sent.
    #[serde(default = "default_resume_vm")]
    pub resume_vm: bool,
    /// Whether to note which pages are written from then on, for diff snapshots.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// For a connection that nobody can read or change on its way.
    #[serde(
        default,
        deserialize_with = "object",
        skip_serializing_if = "Option::is_none"
    )]
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
    /// It does not run here any more. Also for a source whose target was lost while memory followed
    /// the guest.
    Abandon,
}

/// Changes limits while a machine moves, or helps one that does not get on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrationPatch {
    /// How long the guest may stand still, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
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
    /// Where to look for the target of a machine whose connection broke at the hand-over, or when its
    /// memory was still following: empty for where it was sent to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume: Option<String>,
    /// What becomes of a machine whose other side is lost. Where both sides have the same memory,
    /// because it was handed over on one host, two guests would run in it if both ran: `Run` is
    /// refused there while the other side's process is alive. If that process cannot be seen (the
    /// connection was passed as a descriptor, or it is of another PID namespace), end it first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decision: Option<MigrationDecision>,
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

impl SendMigration {
    fn check(&self) -> Result<(), Fault> {
        check_address("destination", &self.destination)?;
        check_max_downtime(self.max_downtime_ms)?;
        if !(1..=MAX_CONNECTIONS).contains(&self.connections) {
            return Err(Fault::new(format!(
                "`connections` is {}: 1 to {MAX_CONNECTIONS} are possible.",
                self.connections
            )));
        }
        check_tls(self.tls.as_ref())
    }
}

impl ReceiveMigration {
    /// Checks what can be checked before anybody listens.
    ///
    /// # Errors
    ///
    /// A value cannot be, and which.
    pub fn validate(&self) -> Result<(), Fault> {
        check_address("listen", &self.listen)?;
        let interfaces = self.network_overrides.iter();
        check_ids("network_overrides", interfaces.map(|net| &net.iface_id))?;
        let drives = self.drive_overrides.iter();
        check_ids("drive_overrides", drives.map(|drive| &drive.drive_id))?;
        check_tls(self.tls.as_ref())
    }
}

impl MigrationPatch {
    fn check(&self) -> Result<(), Fault> {
        if *self == Self::default() {
            return Err(Fault::new(
                "The request changes nothing: give a limit, `resume` or `decision`.",
            ));
        }
        let others = Self {
            decision: None,
            ..self.clone()
        };
        if self.decision.is_some() && others != Self::default() {
            return Err(Fault::new(
                "`decision` stands alone: a machine whose other side is lost has no limits.",
            ));
        }
        self.max_downtime_ms.map_or(Ok(()), check_max_downtime)?;
        match &self.resume {
            Some(address) if !address.is_empty() => check_address("resume", address),
            _ => Ok(()),
        }
    }
}

/// Checks the form of an address, not whether anybody is there.
fn check_address(field: &str, address: &str) -> Result<(), Fault> {
    let good = match address.split_once(':') {
        Some(("unix", path)) => !path.is_empty() && !path.contains('\0'),
        Some(("tcp", place)) => place
            .rsplit_once(':')
            .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok()),
        Some(("fd", number)) => number.parse::<u16>().is_ok(),
        _ => false,
    };
    if good {
        return Ok(());
    }
    Err(Fault::new(format!(
        "`{field}` is `{}`: `unix:PATH`, `tcp:HOST:PORT` or `fd:N` is possible.",
        address.escape_debug()
    )))
}

fn check_max_downtime(ms: u32) -> Result<(), Fault> {
    if ms > 0 {
        return Ok(());
    }
    Err(Fault::new(
        "`max_downtime_ms` is 0: a guest stands still for 1 millisecond at least.",
    ))
}

/// Each of `ids` is one, and there only once.
fn check_ids<'a>(field: &str, ids: impl Iterator<Item = &'a String>) -> Result<(), Fault> {
    let mut seen: Vec<&str> = Vec::new();
    for id in ids {
        checked_id(Some(id))?;
        if seen.contains(&id.as_str()) {
            return Err(Fault::new(format!("`{id}` is in `{field}` twice.")));
        }
        seen.push(id);
    }
    Ok(())
}

fn check_tls(tls: Option<&MigrationTls>) -> Result<(), Fault> {
    let Some(tls) = tls else { return Ok(()) };
    let files = [
        ("ca", &tls.ca),
        ("certificate", &tls.certificate),
        ("key", &tls.key),
    ];
    match files.iter().find(|(_, file)| file.as_os_str().is_empty()) {
        Some((field, _)) => Err(Fault::new(format!("`{field}` of `tls` names no file."))),
        None => Ok(()),
    }
}

/// Understands a request to a path of the move; `rest` is what follows `/migration`. `None` if
/// there is no such path.
pub(crate) fn parse_migration<'a>(
    method: &str,
    rest: impl Iterator<Item = &'a str>,
    body: &[u8],
) -> Result<Option<Parsed>, Fault> {
    let rest: Vec<_> = rest.collect();
    let request = match (method, rest.as_slice()) {
        ("PUT", ["send"]) => {
            let send: SendMigration = json(body)?;
            send.check()?;
            MigrationRequest::Send(Box::new(send))
        }
        ("PUT", ["receive"]) => {
            let receive: ReceiveMigration = json(body)?;
            receive.validate()?;
            MigrationRequest::Receive(Box::new(receive))
        }
        ("GET", []) => MigrationRequest::Get,
        ("PATCH", []) => {
            let patch: MigrationPatch = json(body)?;
            patch.check()?;
            MigrationRequest::Patch(Box::new(patch))
        }
        ("DELETE", []) if !body.is_empty() => {
            return Err(Fault::new("DELETE request cannot have a body."));
        }
        ("DELETE", []) => MigrationRequest::Cancel,
        _ => return Ok(None),
    };
    Ok(Some(Request::Migration(request).into()))
}

#[cfg(test)]
mod tests;
