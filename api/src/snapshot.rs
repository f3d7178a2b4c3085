// SPDX-License-Identifier: Apache-2.0
//! Requests to write a machine to files and to make one from them.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::config::{HugePages, object, objects};
use crate::fault::Fault;
use crate::request::Request;
use crate::route::{Parsed, json};

/// What the file of the memory is to hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum SnapshotType {
    /// The pages that were written since the last snapshot; the rest are holes.
    Diff,
    /// All pages.
    #[default]
    Full,
}

/// Writes a machine that is paused to files.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    /// What the file of the memory is to hold.
    #[serde(default)]
    pub snapshot_type: SnapshotType,
    /// Where the state goes: all but the memory.
    #[schema(value_type = String)]
    pub snapshot_path: PathBuf,
    /// Where the memory goes. Without it only the state is written, for a client that takes the
    /// memory out of the process itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub mem_file_path: Option<PathBuf>,
    /// brume only: writes most of the memory while the machine still runs, so that it is paused
    /// for the rest only. The machine has to be running then, and goes on afterwards.
    #[serde(default, skip_serializing_if = "is_default")]
    pub pre_copy: bool,
}

/// Where the memory comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum BackendType {
    /// A file with all of it, which is mapped and never written.
    #[default]
    File,
    /// A program that listens at a unix socket and answers page faults (userfaultfd).
    Uffd,
}

/// Where the memory comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MemBackend {
    /// The file, or the socket.
    #[schema(value_type = String)]
    pub backend_path: PathBuf,
    /// Which of both it is.
    pub backend_type: BackendType,
}

/// Another TAP for a network interface than the one it had.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetworkOverride {
    /// The interface.
    pub iface_id: String,
    /// The TAP.
    pub host_dev_name: String,
}

/// Another unix socket for the socket device than the one it had.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VsockOverride {
    /// The socket; nothing may be there yet.
    #[schema(value_type = String)]
    pub uds_path: PathBuf,
}

/// Another file for a drive than the one it had.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DriveOverride {
    /// The drive.
    #[schema(pattern = "^[A-Za-z0-9_]+$")]
    pub drive_id: String,
    /// The file, which holds what the drive's file held at the snapshot.
    #[schema(value_type = String)]
    pub path_on_host: PathBuf,
}

/// Pages that the memory of a restored machine is of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum SnapshotHugePages {
    /// Those that the machine had.
    #[default]
    Snapshot,
    /// Ordinary pages.
    None,
    /// Huge pages where the host finds some.
    Transparent,
    /// Reserved pages of 2 MiB.
    #[serde(rename = "2M")]
    Size2M,
}

impl SnapshotHugePages {
    /// The kind of pages for a machine that had `before`.
    pub fn resolve(self, before: HugePages) -> HugePages {
        match self {
            Self::Snapshot => before,
            Self::None => HugePages::None,
            Self::Transparent => HugePages::Transparent,
            Self::Size2M => HugePages::Size2M,
        }
    }
}

/// Makes a machine from the files of another. Its JSON form is a body of PUT /snapshot/load, in
/// which brume's own fields are left out unless they say something.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LoadSnapshot {
    /// The file with the state.
    pub snapshot_path: PathBuf,
    /// Where the memory comes from.
    pub mem_backend: MemBackend,
    /// Whether to note which pages are written, for snapshots that hold only those.
    pub track_dirty_pages: bool,
    /// Whether the machine goes on at once.
    pub resume_vm: bool,
    /// Other TAPs, by network interface.
    pub network_overrides: Vec<NetworkOverride>,
    /// Another socket for the socket device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock_override: Option<VsockOverride>,
    /// Whether the guest's clock goes on by the time that has passed since the snapshot.
    pub clock_realtime: bool,
    /// Pages that the memory is of.
    pub huge_pages: SnapshotHugePages,
    /// brume only: other files, by drive.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub drive_overrides: Vec<DriveOverride>,
    /// brume only: whether to read all of the memory before the machine goes on.
    #[serde(skip_serializing_if = "is_default")]
    pub prefault: bool,
    /// brume only: a file that names the pages to read before the machine goes on, as
    /// PUT /memory/working-set wrote it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub working_set_path: Option<PathBuf>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// The body of PUT /snapshot/load.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = LoadSnapshot)]
pub(crate) struct LoadSnapshotBody {
    /// The file with the state.
    #[schema(value_type = String)]
    snapshot_path: PathBuf,
    /// Deprecated: the file with the memory. Either this or `mem_backend` is needed.
    #[serde(default)]
    #[schema(value_type = Option<String>, deprecated)]
    mem_file_path: Option<PathBuf>,
    /// Where the memory comes from.
    #[serde(default, deserialize_with = "object")]
    mem_backend: Option<MemBackend>,
    /// Deprecated: the same as `track_dirty_pages`.
    #[serde(default)]
    #[schema(deprecated)]
    enable_diff_snapshots: bool,
    /// Whether to note which pages are written, for snapshots that hold only those.
    #[serde(default)]
    track_dirty_pages: bool,
    /// Whether the machine goes on at once.
    #[serde(default)]
    resume_vm: bool,
    /// Other TAPs, by network interface.
    #[serde(default, deserialize_with = "objects")]
    network_overrides: Vec<NetworkOverride>,
    /// Another socket for the socket device.
    #[serde(default, deserialize_with = "object")]
    vsock_override: Option<VsockOverride>,
    /// Whether the guest's clock goes on by the time that has passed since the snapshot.
    #[serde(default)]
    clock_realtime: bool,
    /// Pages that the memory is of.
    #[serde(default)]
    huge_pages: SnapshotHugePages,
    /// brume only: other files, by drive.
    #[serde(default, deserialize_with = "objects")]
    drive_overrides: Vec<DriveOverride>,
    /// brume only: whether to read all of the memory before the machine goes on.
    #[serde(default)]
    prefault: bool,
    /// brume only: a file that names the pages to read before the machine goes on, as
    /// PUT /memory/working-set wrote it.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    working_set_path: Option<PathBuf>,
}

impl LoadSnapshotBody {
    fn understood(self) -> Result<Parsed, Fault> {
        let deprecated = self.mem_file_path.is_some() || self.enable_diff_snapshots;
        let mem_backend = match (self.mem_backend, self.mem_file_path) {
            (Some(backend), None) => backend,
            (None, Some(backend_path)) => MemBackend {
                backend_path,
                backend_type: BackendType::File,
            },
            (Some(_), Some(_)) => return Err(bad_fields("too many fields", "exclusively ")),
            (None, None) => return Err(bad_fields("missing field", "")),
        };
        let load = LoadSnapshot {
            snapshot_path: self.snapshot_path,
            mem_backend,
            track_dirty_pages: self.track_dirty_pages || self.enable_diff_snapshots,
            resume_vm: self.resume_vm,
            network_overrides: self.network_overrides,
            vsock_override: self.vsock_override,
            clock_realtime: self.clock_realtime,
            huge_pages: self.huge_pages,
            drive_overrides: self.drive_overrides,
            prefault: self.prefault,
            working_set_path: self.working_set_path,
        };
        Ok(Parsed {
            request: Request::LoadSnapshot(Box::new(load)),
            deprecated,
        })
    }
}

fn bad_fields(what: &str, how: &str) -> Fault {
    Fault::new(format!(
        "An error occurred when deserializing the json body of a request: {what}: either \
         `mem_backend` or `mem_file_path` {how}is required."
    ))
}

/// Understands PUT /snapshot/`operation`.
pub(crate) fn parse_snapshot(operation: Option<&str>, body: &[u8]) -> Result<Parsed, Fault> {
    match operation {
        Some("create") => Ok(Request::CreateSnapshot(json(body)?).into()),
        Some("load") => json::<LoadSnapshotBody>(body)?.understood(),
        Some(other) => Err(Fault::new(format!(
            "Invalid request method and/or path: PUT /snapshot/{other}."
        ))),
        None => Err(Fault::new("Missing snapshot operation type.")),
    }
}
