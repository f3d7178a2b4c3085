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

/// Writes a machine to files, that is paused or, with `pre_copy`, runs.
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
    /// brume only: a file that names pages to read without a wait for the guest to touch them, as
    /// PUT /memory/working-set wrote it. They are read while the machine goes on.
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
    /// brume only: a file that names pages to read without a wait for the guest to touch them, as
    /// PUT /memory/working-set wrote it. They are read while the machine goes on.
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::route::parse;

    const JSON: &str = "An error occurred when deserializing the json body of a request: ";

    fn put(operation: &str, body: &str) -> Result<Parsed, String> {
        let parsed = parse("PUT", &format!("/snapshot/{operation}"), body.as_bytes());
        parsed.map_err(|fault| {
            assert_eq!(fault.status, 400);
            fault.message
        })
    }

    fn loaded(body: &str) -> (LoadSnapshot, bool) {
        let Parsed {
            request,
            deprecated,
        } = put("load", body).unwrap();
        match request {
            Request::LoadSnapshot(load) => (*load, deprecated),
            other => panic!("{other:?}"),
        }
    }

    fn plain(backend_type: BackendType) -> LoadSnapshot {
        LoadSnapshot {
            snapshot_path: "s".into(),
            mem_backend: MemBackend {
                backend_path: "m".into(),
                backend_type,
            },
            ..LoadSnapshot::default()
        }
    }

    #[test]
    fn what_is_to_be_written_is_understood() {
        let full = CreateSnapshot {
            snapshot_path: "s".into(),
            mem_file_path: Some("m".into()),
            ..CreateSnapshot::default()
        };
        let with = |change: fn(&mut CreateSnapshot)| {
            let mut create = full.clone();
            change(&mut create);
            create
        };
        for (body, expected) in [
            (
                r#"{"snapshot_path": "s", "mem_file_path": "m"}"#,
                full.clone(),
            ),
            (
                r#"{"snapshot_path": "s", "mem_file_path": "m", "snapshot_type": "Diff"}"#,
                with(|create| create.snapshot_type = SnapshotType::Diff),
            ),
            (
                r#"{"snapshot_path": "s"}"#,
                with(|create| create.mem_file_path = None),
            ),
            (
                r#"{"snapshot_path": "s", "mem_file_path": "m", "pre_copy": true}"#,
                with(|create| create.pre_copy = true),
            ),
        ] {
            let parsed = put("create", body).unwrap();
            assert_eq!(parsed, Request::CreateSnapshot(expected).into(), "{body}");
        }
    }

    #[test]
    fn the_memory_comes_from_one_place() {
        let file = plain(BackendType::File);
        for (body, expected) in [
            (
                r#"{"snapshot_path": "s", "mem_backend": {"backend_type": "File", "backend_path": "m"}}"#,
                (file.clone(), false),
            ),
            (
                r#"{"snapshot_path": "s", "mem_backend": {"backend_type": "Uffd", "backend_path": "m"}}"#,
                (plain(BackendType::Uffd), false),
            ),
            (
                r#"{"snapshot_path": "s", "mem_file_path": "m"}"#,
                (file.clone(), true),
            ),
        ] {
            assert_eq!(loaded(body), expected, "{body}");
        }
        let both = r#"{"snapshot_path": "s", "mem_file_path": "m", "mem_backend":
            {"backend_type": "File", "backend_path": "m"}}"#;
        for (body, text) in [
            (
                both,
                "too many fields: either `mem_backend` or `mem_file_path` exclusively is required.",
            ),
            (
                r#"{"snapshot_path": "s"}"#,
                "missing field: either `mem_backend` or `mem_file_path` is required.",
            ),
        ] {
            assert_eq!(put("load", body).unwrap_err(), format!("{JSON}{text}"));
        }
    }

    #[test]
    fn the_old_name_of_tracking_means_the_same_and_is_deprecated() {
        let body = |tracking: &str| {
            format!(
                r#"{{"snapshot_path": "s", {tracking}, "mem_backend":
                {{"backend_type": "File", "backend_path": "m"}}}}"#
            )
        };
        for (tracking, expected) in [
            (r#""enable_diff_snapshots": true"#, (true, true)),
            (r#""enable_diff_snapshots": false"#, (false, false)),
            (r#""track_dirty_pages": true"#, (true, false)),
            (
                r#""track_dirty_pages": true, "enable_diff_snapshots": false"#,
                (true, false),
            ),
        ] {
            let (load, deprecated) = loaded(&body(tracking));
            assert_eq!((load.track_dirty_pages, deprecated), expected, "{tracking}");
        }
    }

    /// A client that is made from the same types says what the server understands.
    #[test]
    fn a_load_that_is_written_is_read_again() {
        let load = LoadSnapshot {
            track_dirty_pages: true,
            resume_vm: true,
            network_overrides: vec![NetworkOverride {
                iface_id: "eth0".into(),
                host_dev_name: "tap1".into(),
            }],
            vsock_override: Some(VsockOverride {
                uds_path: "v".into(),
            }),
            clock_realtime: true,
            huge_pages: SnapshotHugePages::Size2M,
            drive_overrides: vec![DriveOverride {
                drive_id: "root".into(),
                path_on_host: "d".into(),
            }],
            prefault: true,
            working_set_path: Some("w".into()),
            ..plain(BackendType::Uffd)
        };
        let body = serde_json::to_string(&load).unwrap();
        assert_eq!(loaded(&body), (load, false));
        let shown = serde_json::to_value(plain(BackendType::File)).unwrap();
        let expected = json!({
            "snapshot_path": "s", "mem_backend": {"backend_type": "File", "backend_path": "m"},
            "track_dirty_pages": false, "resume_vm": false, "network_overrides": [],
            "clock_realtime": false, "huge_pages": "Snapshot",
        });
        assert_eq!(shown, expected);
    }

    #[test]
    fn the_kind_of_pages_is_that_of_before_unless_another_is_named() {
        for (asked, expected) in [
            (SnapshotHugePages::Snapshot, HugePages::Transparent),
            (SnapshotHugePages::None, HugePages::None),
            (SnapshotHugePages::Size2M, HugePages::Size2M),
        ] {
            assert_eq!(asked.resolve(HugePages::Transparent), expected);
        }
    }

    #[test]
    fn refusals_have_firecrackers_texts() {
        for (method, path, body, text) in [
            ("PUT", "/snapshot", "{}", "Missing snapshot operation type."),
            ("PUT", "/snapshot", "", "Empty PUT request."),
            (
                "PUT",
                "/snapshot/other",
                "{}",
                "Invalid request method and/or path: PUT /snapshot/other.",
            ),
            (
                "PATCH",
                "/snapshot/load",
                "{}",
                "Invalid request method and/or path: PATCH snapshot.",
            ),
            (
                "GET",
                "/snapshot",
                "",
                "Invalid request method and/or path: GET snapshot.",
            ),
        ] {
            let fault = parse(method, path, body.as_bytes()).unwrap_err();
            assert_eq!(
                (fault.status, &*fault.message),
                (400, text),
                "{method} {path}"
            );
        }
    }

    #[test]
    fn fields_are_refused_where_firecracker_refuses_them() {
        let backend = r#""snapshot_path": "s", "mem_file_path": "m""#;
        for (operation, body, text) in [
            (
                "create",
                r#"{"mem_file_path": "m"}"#,
                "missing field `snapshot_path`",
            ),
            (
                "create",
                r#"{"snapshot_path": "s", "x": 1}"#,
                "unknown field `x`",
            ),
            (
                "create",
                r#"{"snapshot_path": "s", "snapshot_type": "Foo"}"#,
                "unknown variant `Foo`, expected `Diff` or `Full`",
            ),
            ("create", r#"["s"]"#, "invalid type: sequence"),
            (
                "load",
                r#"{"snapshot_path": "s", "x": 1}"#,
                "unknown field `x`",
            ),
            (
                "load",
                r#"{"mem_file_path": "m"}"#,
                "missing field `snapshot_path`",
            ),
            (
                "load",
                r#"{"snapshot_path": "s", "mem_backend": {"backend_path": "m"}}"#,
                "missing field `backend_type`",
            ),
            (
                "load",
                r#"{"snapshot_path": "s", "mem_backend": {"backend_type": "Tape", "backend_path": "m"}}"#,
                "unknown variant `Tape`, expected `File` or `Uffd`",
            ),
            (
                "load",
                r#"{"snapshot_path": "s", "mem_backend": {"backend_type": "File", "backend_path": "m", "x": 1}}"#,
                "unknown field `x`",
            ),
            (
                "load",
                r#"{"snapshot_path": "s", "mem_backend": ["m", "File"]}"#,
                "invalid type: sequence",
            ),
            (
                "load",
                &format!(r#"{{{backend}, "network_overrides": [["eth0", "tap0"]]}}"#),
                "invalid type: sequence",
            ),
            (
                "load",
                &format!(r#"{{{backend}, "network_overrides": [null]}}"#),
                "invalid type: null",
            ),
            (
                "load",
                &format!(
                    r#"{{{backend}, "drive_overrides": [{{"drive_id": "d", "path_on_host": "p", "x": 1}}]}}"#
                ),
                "unknown field `x`",
            ),
            (
                "load",
                &format!(r#"{{{backend}, "huge_pages": "1G"}}"#),
                "unknown variant `1G`, expected one of `Snapshot`, `None`, `Transparent`, `2M`",
            ),
        ] {
            let error = put(operation, body).unwrap_err();
            assert!(
                error.starts_with(JSON) && error.contains(text),
                "{body}: {error}"
            );
        }
        // As Firecracker has it, these two take what means nothing.
        let body = format!(
            r#"{{{backend}, "vsock_override": {{"uds_path": "v", "x": 1}},
            "network_overrides": [{{"iface_id": "e", "host_dev_name": "t", "x": 1}}]}}"#
        );
        assert_eq!(loaded(&body).0.network_overrides.len(), 1);
    }
}
