// SPDX-License-Identifier: Apache-2.0
//! Moving a running machine to another process: requests to send, to receive, to steer and to call
//! off, and what is told of it meanwhile. brume only.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::config::{object, objects};
use crate::fault::Fault;
use crate::request::Request;
use crate::route::{Parsed, checked_id, json};
use crate::snapshot::{DriveOverride, NetworkOverride, VsockOverride};

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
    #[schema(minimum = 1)]
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
mod tests {
    use super::*;
    use crate::route::parse;

    fn understood(method: &str, path: &str, body: &str) -> MigrationRequest {
        match parse(method, path, body.as_bytes()).unwrap().request {
            Request::Migration(request) => request,
            other => panic!("{method} {path}: {other:?}"),
        }
    }

    fn refusal(method: &str, path: &str, body: &str) -> String {
        let fault = parse(method, path, body.as_bytes())
            .expect_err(&format!("{method} {path} {body} is taken"));
        assert_eq!(fault.status, 400, "{method} {path}");
        fault.message
    }

    fn plain(destination: &str) -> SendMigration {
        SendMigration {
            destination: destination.into(),
            max_downtime_ms: 20,
            timeout_s: 0,
            on_timeout: OnTimeout::Cancel,
            bandwidth_limit: 0,
            connections: 1,
            compression: MigrationCompression::Auto,
            mode: MigrationMode::PreCopy,
            auto_converge: false,
            with_disks: false,
            tls: None,
        }
    }

    fn tls() -> MigrationTls {
        MigrationTls {
            ca: "ca".into(),
            certificate: "cert".into(),
            key: "key".into(),
            server_name: Some("host".into()),
        }
    }

    #[test]
    fn a_move_needs_no_more_than_a_place_to_go_to() {
        for destination in ["unix:a", "tcp:host:1", "tcp:[::1]:65535", "fd:3"] {
            let body = format!(r#"{{"destination": "{destination}"}}"#);
            assert_eq!(
                understood("PUT", "/migration/send", &body),
                MigrationRequest::Send(Box::new(plain(destination))),
            );
        }
        let expected = ReceiveMigration {
            listen: "unix:a".into(),
            network_overrides: Vec::new(),
            vsock_override: None,
            drive_overrides: Vec::new(),
            resume_vm: true,
            track_dirty_pages: false,
            tls: None,
        };
        assert_eq!(
            understood("PUT", "/migration/receive", r#"{"listen": "unix:a"}"#),
            MigrationRequest::Receive(Box::new(expected)),
        );
    }

    /// A client that is made from the same types says what the server understands.
    #[test]
    fn what_is_written_is_read_again() {
        let send = SendMigration {
            max_downtime_ms: 1,
            timeout_s: 60,
            on_timeout: OnTimeout::PostCopy,
            bandwidth_limit: 1 << 40,
            connections: MAX_CONNECTIONS,
            compression: MigrationCompression::Zstd,
            mode: MigrationMode::Hybrid,
            auto_converge: true,
            with_disks: true,
            tls: Some(tls()),
            ..plain("tcp:host:1")
        };
        let body = serde_json::to_string(&send).unwrap();
        assert_eq!(
            understood("PUT", "/migration/send", &body),
            MigrationRequest::Send(Box::new(send)),
        );
        let receive = ReceiveMigration {
            listen: "tcp:0.0.0.0:1".into(),
            network_overrides: vec![NetworkOverride {
                iface_id: "eth0".into(),
                host_dev_name: "tap1".into(),
            }],
            vsock_override: Some(VsockOverride {
                uds_path: "v".into(),
            }),
            drive_overrides: vec![DriveOverride {
                drive_id: "root".into(),
                path_on_host: "d".into(),
            }],
            resume_vm: false,
            track_dirty_pages: true,
            tls: Some(tls()),
        };
        let body = serde_json::to_string(&receive).unwrap();
        assert_eq!(
            understood("PUT", "/migration/receive", &body),
            MigrationRequest::Receive(Box::new(receive)),
        );
        let patch = MigrationPatch {
            max_downtime_ms: Some(5),
            timeout_s: Some(0),
            on_timeout: Some(OnTimeout::Force),
            bandwidth_limit: Some(0),
            auto_converge: Some(false),
            resume: Some(String::new()),
            decision: None,
        };
        let body = serde_json::to_string(&patch).unwrap();
        assert_eq!(
            understood("PATCH", "/migration", &body),
            MigrationRequest::Patch(Box::new(patch)),
        );
    }

    #[test]
    fn a_move_is_shown_and_called_off() {
        assert_eq!(understood("GET", "/migration", ""), MigrationRequest::Get);
        let cancel = understood("DELETE", "/migration", "");
        assert_eq!(cancel, MigrationRequest::Cancel);
        let decision = understood("PATCH", "/migration", r#"{"decision": "Abandon"}"#);
        let expected = MigrationPatch {
            decision: Some(MigrationDecision::Abandon),
            ..MigrationPatch::default()
        };
        assert_eq!(decision, MigrationRequest::Patch(Box::new(expected)));
    }

    #[test]
    fn values_that_cannot_be_are_refused_by_name() {
        let send = "/migration/send";
        let receive = "/migration/receive";
        for (method, path, body, text) in [
            (
                "PUT",
                send,
                r#"{"destination": "unix:a", "connections": 0}"#,
                "`connections` is 0: 1 to 16 are possible.",
            ),
            (
                "PUT",
                send,
                r#"{"destination": "unix:a", "connections": 17}"#,
                "`connections` is 17: 1 to 16 are possible.",
            ),
            (
                "PUT",
                send,
                r#"{"destination": "unix:a", "max_downtime_ms": 0}"#,
                "`max_downtime_ms` is 0: a guest stands still for 1 millisecond at least.",
            ),
            (
                "PUT",
                send,
                r#"{"destination": "unix:a", "tls": {"ca": "a", "certificate": "", "key": "k"}}"#,
                "`certificate` of `tls` names no file.",
            ),
            (
                "PUT",
                receive,
                r#"{"listen": "unix:a", "drive_overrides":
                    [{"drive_id": "a/b", "path_on_host": "d"}]}"#,
                "API Resource IDs can only contain alphanumeric characters and underscores.",
            ),
            (
                "PUT",
                receive,
                r#"{"listen": "unix:a", "network_overrides":
                    [{"iface_id": "", "host_dev_name": "t"}]}"#,
                "The ID cannot be empty.",
            ),
            (
                "PUT",
                receive,
                r#"{"listen": "unix:a", "drive_overrides":
                    [{"drive_id": "a", "path_on_host": "d"}, {"drive_id": "a", "path_on_host": "e"}]}"#,
                "`a` is in `drive_overrides` twice.",
            ),
            (
                "PATCH",
                "/migration",
                "{}",
                "The request changes nothing: give a limit, `resume` or `decision`.",
            ),
            (
                "PATCH",
                "/migration",
                r#"{"decision": "Run", "timeout_s": 1}"#,
                "`decision` stands alone: a machine whose other side is lost has no limits.",
            ),
            (
                "PATCH",
                "/migration",
                r#"{"max_downtime_ms": 0}"#,
                "`max_downtime_ms` is 0: a guest stands still for 1 millisecond at least.",
            ),
            (
                "PATCH",
                "/migration",
                r#"{"resume": "there"}"#,
                "`resume` is `there`: `unix:PATH`, `tcp:HOST:PORT` or `fd:N` is possible.",
            ),
            (
                "DELETE",
                "/migration",
                "{}",
                "DELETE request cannot have a body.",
            ),
        ] {
            assert_eq!(refusal(method, path, body), text, "{method} {path} {body}");
        }
    }

    #[test]
    fn an_address_has_one_of_three_forms() {
        for address in [
            "",
            "here",
            "unix:",
            "tcp:host",
            "tcp::1",
            "tcp:host:65536",
            "tcp:host:",
            "fd:",
            "fd:-1",
            "fd:99999",
            "http:host:1",
        ] {
            let body = serde_json::json!({ "destination": address }).to_string();
            let text = refusal("PUT", "/migration/send", &body);
            assert!(
                text.starts_with(&format!("`destination` is `{address}`: ")),
                "{text}"
            );
            let body = serde_json::json!({ "listen": address }).to_string();
            let text = refusal("PUT", "/migration/receive", &body);
            assert!(text.starts_with("`listen` is "), "{text}");
        }
    }

    #[test]
    fn bodies_of_another_form_are_refused() {
        for (path, body) in [
            ("/migration/send", "{}"),
            ("/migration/send", r#"["unix:a"]"#),
            (
                "/migration/send",
                r#"{"destination": "unix:a", "tls": ["a", "b", "c"]}"#,
            ),
            (
                "/migration/send",
                r#"{"destination": "unix:a", "mode": "precopy"}"#,
            ),
            (
                "/migration/send",
                r#"{"destination": "unix:a", "other": 1}"#,
            ),
            ("/migration/receive", "{}"),
            (
                "/migration/receive",
                r#"{"listen": "unix:a", "drive_overrides": [["a", "b"]]}"#,
            ),
        ] {
            let text = refusal("PUT", path, body);
            assert!(text.contains("deserializing the json body"), "{text}");
        }
    }

    #[test]
    fn no_other_path_is_there() {
        for (method, path) in [
            ("PUT", "/migration"),
            ("PUT", "/migration/other"),
            ("PUT", "/migration/send/more"),
            ("GET", "/migration/send"),
            ("PATCH", "/migration/send"),
            ("DELETE", "/migration/receive"),
        ] {
            let body = if method == "PUT" || method == "PATCH" {
                "{}"
            } else {
                ""
            };
            assert_eq!(
                refusal(method, path, body),
                format!("Invalid request method and/or path: {method} migration.")
            );
        }
    }

    #[test]
    fn a_move_is_over_when_nothing_more_comes_of_it() {
        use MigrationPhase as P;
        for (phase, over) in [
            (P::None, true),
            (P::Listening, false),
            (P::InDoubt, false),
            (P::PostCopyInterrupted, false),
            (P::Completed, true),
            (P::Cancelled, true),
            (P::Failed, true),
        ] {
            assert_eq!(phase.is_over(), over, "{phase:?}");
        }
    }
}
