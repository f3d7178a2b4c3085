// SPDX-License-Identifier: Apache-2.0
//! From method, path and body to a [`Request`]. The texts of refusals are part of the interface:
//! clients of Firecracker look for them.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use utoipa::ToSchema;

use crate::balloon::parse_balloon;
use crate::config::{
    Drive, DrivePatch, MachineConfigPatch, MmdsConfig, MmdsVersion, NetworkInterface,
    NetworkInterfacePatch,
};
use crate::fault::Fault;
use crate::memory::parse_memory;
use crate::migration::parse_migration;
use crate::request::{Request, Section};
use crate::snapshot::parse_snapshot;

/// Paths that Firecracker has and that stand for something which is not there yet.
const UNSUPPORTED: [&str; 2] = ["hotplug", "pmem"];

/// A request, and whether it uses what is deprecated.
#[derive(Debug, PartialEq)]
pub(crate) struct Parsed {
    pub(crate) request: Request,
    pub(crate) deprecated: bool,
}

impl From<Request> for Parsed {
    fn from(request: Request) -> Self {
        Self {
            request,
            deprecated: false,
        }
    }
}

/// The body of PUT /actions.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Action {
    action_type: ActionType,
}

#[derive(Deserialize, ToSchema)]
enum ActionType {
    FlushMetrics,
    InstanceStart,
    SendCtrlAltDel,
}

/// The body of PATCH /vm.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct VmPatch {
    state: VmPatchState,
}

#[derive(Deserialize, ToSchema)]
enum VmPatchState {
    Paused,
    Resumed,
    Stopped,
}

/// What a request with this path is counted as; one that is not ours counts as `other`.
pub(crate) fn resource_of(path: &str) -> &'static str {
    const RESOURCES: [&str; 27] = [
        "actions",
        "balloon",
        "boot-source",
        "cpu-config",
        "drives",
        "entropy",
        "hotplug",
        "logger",
        "machine-config",
        "memory",
        "metrics",
        "migration",
        "mmds",
        "network-interfaces",
        "openapi.json",
        "pmem",
        "serial",
        "snapshot",
        "version",
        "vm",
        "vsock",
        "migration/receive",
        "migration/send",
        "mmds/config",
        "snapshot/create",
        "snapshot/load",
        "vm/config",
    ];
    let path = path.trim_matches('/');
    let first = path.split('/').next().unwrap_or_default();
    let known = |name: &str| RESOURCES.into_iter().find(|&known| known == name);
    match path {
        "" => "instance",
        _ => known(path).or_else(|| known(first)).unwrap_or("other"),
    }
}

/// Understands a request. What follows a `?` in `target` means something for few paths only.
pub(crate) fn parse(method: &str, target: &str, body: &[u8]) -> Result<Parsed, Fault> {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let mut tokens = path.trim_start_matches('/').split_terminator('/');
    let first = tokens.next().unwrap_or_default();
    let second = tokens.next();
    let unknown = || {
        let text = format!("Invalid request method and/or path: {method} {first}.");
        Err(Fault::new(text))
    };
    match method {
        "GET" if !body.is_empty() => return Err(Fault::new("GET request cannot have a body.")),
        "GET" => {}
        "PUT" if body.is_empty() => return Err(Fault::new("Empty PUT request.")),
        // Some of these have no body, which is looked for there.
        "PATCH" if first == "balloon" => {}
        "PATCH" if body.is_empty() => return Err(Fault::new("Empty PATCH request.")),
        "PUT" | "PATCH" | "DELETE" => {}
        _ => return unknown(),
    }
    match (method, first) {
        ("GET" | "PUT" | "PATCH", "balloon") => {
            parse_balloon(method, second.into_iter().chain(tokens), body)
        }
        (_, "memory") => match parse_memory(method, second.into_iter().chain(tokens), query, body)?
        {
            Some(parsed) => Ok(parsed),
            None => unknown(),
        },
        (_, "migration") => {
            match parse_migration(method, second.into_iter().chain(tokens), body)? {
                Some(parsed) => Ok(parsed),
                None => unknown(),
            }
        }
        ("GET", "") => Ok(Request::GetInstance.into()),
        ("GET", "version") => Ok(Request::GetVersion.into()),
        ("GET", "machine-config") => Ok(Request::GetMachineConfig.into()),
        ("GET", "mmds") => Ok(Request::GetMmds.into()),
        ("GET", "vm") if second == Some("config") => Ok(Request::GetConfig.into()),
        ("GET", "metrics") => Ok(Request::GetMetrics.into()),
        ("GET", "openapi.json") => Ok(Request::GetOpenApi.into()),
        ("PUT", "actions") => parse_action(body),
        ("PUT", "boot-source") => Ok(configure(Section::BootSource(json(body)?))),
        ("PUT", "cpu-config") => Ok(configure(Section::Cpu(json(body)?))),
        ("PUT", "drives") => parse_drive(second, body),
        ("PUT", "entropy") => Ok(configure(Section::Entropy(json(body)?))),
        ("PUT", "logger") => Ok(configure(Section::Logger(json(body)?))),
        ("PUT", "machine-config") => parse_machine_config(body),
        ("PUT", "metrics") => Ok(configure(Section::Metrics(json(body)?))),
        ("PUT", "mmds") => parse_mmds(second, body),
        ("PUT", "network-interfaces") => parse_network_interface(second, body),
        ("PUT", "serial") => Ok(configure(Section::Serial(json(body)?))),
        ("PUT", "snapshot") => parse_snapshot(second, body),
        ("PUT", "vsock") => parse_vsock(body),
        ("PATCH", "machine-config") => parse_machine_config_patch(body),
        ("PATCH", "mmds") => Ok(Request::PatchMmds(any_json(body)?).into()),
        ("PATCH", "vm") => parse_vm_patch(body),
        ("PATCH", "drives") => parse_drive_patch(second, body),
        ("PATCH", "network-interfaces") => parse_network_interface_patch(second, body),
        ("DELETE", "drives" | "network-interfaces") => Err(unsupported(method, first)),
        (_, first) if UNSUPPORTED.contains(&first) => Err(unsupported(method, first)),
        _ => unknown(),
    }
}

fn unsupported(method: &str, path: &str) -> Fault {
    Fault::new(format!(
        "{method} /{path} is not supported by this version of brume."
    ))
}

pub(crate) fn configure(section: Section) -> Parsed {
    Request::Configure(Box::new(section)).into()
}

/// Reads a body that is an object. A list of the values of its fields would be understood too, but
/// is a mistake.
pub(crate) fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Fault> {
    if body.trim_ascii_start().starts_with(b"[") {
        return Err(Fault::new(
            "An error occurred when deserializing the json body of a request: invalid type: \
             sequence, expected an object.",
        ));
    }
    any_json(body)
}

/// Reads a body of any form.
fn any_json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Fault> {
    serde_json::from_slice(body).map_err(|error| {
        Fault::new(format!(
            "An error occurred when deserializing the json body of a request: {error}."
        ))
    })
}

fn parse_action(body: &[u8]) -> Result<Parsed, Fault> {
    let Action { action_type } = json(body)?;
    match action_type {
        ActionType::InstanceStart => Ok(Request::Start.into()),
        ActionType::FlushMetrics => Ok(Request::FlushMetrics.into()),
        ActionType::SendCtrlAltDel => Ok(Request::SendCtrlAltDel.into()),
    }
}

fn parse_vm_patch(body: &[u8]) -> Result<Parsed, Fault> {
    let VmPatch { state } = json(body)?;
    let request = match state {
        VmPatchState::Paused => Request::Pause,
        VmPatchState::Resumed => Request::Resume,
        VmPatchState::Stopped => Request::Stop,
    };
    Ok(request.into())
}

fn parse_machine_config(body: &[u8]) -> Result<Parsed, Fault> {
    let config: crate::config::MachineConfig = json(body)?;
    Ok(Parsed {
        deprecated: config.cpu_template.is_some(),
        ..configure(Section::MachineConfig(config))
    })
}

fn parse_machine_config_patch(body: &[u8]) -> Result<Parsed, Fault> {
    let patch: MachineConfigPatch = json(body)?;
    if patch == MachineConfigPatch::default() {
        return Err(Fault::new("Empty PATCH request."));
    }
    Ok(Parsed {
        deprecated: patch.cpu_template.is_some(),
        ..configure(Section::MachineConfigPatch(patch))
    })
}

/// Reads a body whose id, which `own_id` finds in it, has to be that of the path.
fn with_id<T: DeserializeOwned>(
    id: Option<&str>,
    body: &[u8],
    own_id: fn(&T) -> &String,
    same: fn(&str, &str) -> Result<(), Fault>,
) -> Result<T, Fault> {
    let id = checked_id(id)?;
    let part: T = json(body)?;
    same(id, own_id(&part))?;
    Ok(part)
}

fn parse_drive(id: Option<&str>, body: &[u8]) -> Result<Parsed, Fault> {
    let drive = with_id::<Drive>(id, body, |drive| &drive.drive_id, same_id)?;
    Ok(configure(Section::Drive(drive)))
}

fn parse_network_interface(id: Option<&str>, body: &[u8]) -> Result<Parsed, Fault> {
    let interface = with_id::<NetworkInterface>(id, body, |net| &net.iface_id, same_iface_id)?;
    Ok(configure(Section::NetworkInterface(interface)))
}

fn parse_drive_patch(id: Option<&str>, body: &[u8]) -> Result<Parsed, Fault> {
    let patch = with_id::<DrivePatch>(id, body, |patch| &patch.drive_id, same_id)?;
    Ok(Request::PatchDrive(patch).into())
}

fn parse_network_interface_patch(id: Option<&str>, body: &[u8]) -> Result<Parsed, Fault> {
    let patch = with_id::<NetworkInterfacePatch>(id, body, |net| &net.iface_id, same_iface_id)?;
    Ok(Request::PatchNetworkInterface(patch).into())
}

fn parse_vsock(body: &[u8]) -> Result<Parsed, Fault> {
    let vsock: crate::config::Vsock = json(body)?;
    Ok(Parsed {
        deprecated: vsock.vsock_id.is_some(),
        ..configure(Section::Vsock(vsock))
    })
}

fn parse_mmds(part: Option<&str>, body: &[u8]) -> Result<Parsed, Fault> {
    match part {
        None => Ok(Request::PutMmds(any_json(body)?).into()),
        Some("config") => {
            let config: MmdsConfig = json(body)?;
            Ok(Parsed {
                deprecated: config.version == MmdsVersion::V1,
                ..configure(Section::Mmds(config))
            })
        }
        Some(other) => Err(Fault::new(format!(
            "Unrecognized PUT request path `{other}`."
        ))),
    }
}

pub(crate) fn checked_id(id: Option<&str>) -> Result<&str, Fault> {
    let Some(id) = id.filter(|id| !id.is_empty()) else {
        return Err(Fault::new("The ID cannot be empty."));
    };
    if !id.chars().all(|c| c == '_' || c.is_ascii_alphanumeric()) {
        let text = "API Resource IDs can only contain alphanumeric characters and underscores.";
        return Err(Fault::new(text));
    }
    Ok(id)
}

fn same_id(path: &str, body: &str) -> Result<(), Fault> {
    if path == body {
        return Ok(());
    }
    Err(Fault::new(
        "The id from the path does not match the id from the body!",
    ))
}

/// Firecracker names both here, and only here.
fn same_iface_id(path: &str, body: &str) -> Result<(), Fault> {
    if path == body {
        return Ok(());
    }
    Err(Fault::new(format!(
        "The id from the path [{path}] does not match the id from the body [{body}]!"
    )))
}

#[cfg(test)]
mod tests;
