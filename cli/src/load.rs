// SPDX-License-Identifier: Apache-2.0
//! Which snapshot a machine is made from, and what is to be otherwise than it was: the arguments
//! that `brume restore` and `brume clone` share.

use std::path::{Path, PathBuf};

use brume_api::{BackendType, LoadSnapshot, MemBackend, SnapshotHugePages};
use clap::Args;

use crate::exit::Failure;
use crate::overrides::{OverrideArgs, Overrides, Rename};

/// The file with the state in the folder of a snapshot.
pub(crate) const STATE_FILE: &str = "state";
/// The file with the memory in the folder of a snapshot.
pub(crate) const MEMORY_FILE: &str = "memory";

/// Where the parts of a machine come from.
#[derive(Args)]
pub(crate) struct LoadArgs {
    /// Folder that `brume snapshot --out` wrote
    #[arg(long, value_name = "DIR", conflicts_with = "state")]
    from: Option<PathBuf>,
    /// File with the state
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// File with the memory, which is mapped and never written
    #[arg(long, value_name = "FILE", conflicts_with = "from")]
    memory: Option<PathBuf>,
    /// Unix socket of a program that answers page faults, instead of a file with the memory
    #[arg(long, value_name = "PATH", conflicts_with = "memory")]
    uffd: Option<String>,
    #[command(flatten)]
    overrides: OverrideArgs,
    /// Read all of the memory first, so that the guest never waits for a page
    #[arg(long)]
    prefault: bool,
    /// Read the pages that this file names first, as `brume ctl memory working-set` wrote it
    #[arg(long, value_name = "FILE", conflicts_with = "prefault")]
    working_set: Option<PathBuf>,
    /// Note which pages are written, for `brume snapshot --diff`
    #[arg(long)]
    track_dirty_pages: bool,
    /// Let the guest's clock go on by the time that has passed since the snapshot
    #[arg(long)]
    clock_realtime: bool,
    /// Pages that the memory is of: snapshot (as it was), none (ordinary ones), transparent, or 2M
    #[arg(long, value_name = "KIND", default_value = "snapshot", value_parser = parse_huge_pages)]
    huge_pages: SnapshotHugePages,
    /// Leave the machine paused, for `brume ctl resume`
    #[arg(long)]
    paused: bool,
}

impl LoadArgs {
    /// What is to be loaded: names that must be others in each machine go through `own`, those
    /// that machines can share through `shared`.
    ///
    /// # Errors
    ///
    /// No snapshot is named, an id is there twice, or a name is refused.
    pub(crate) fn load(
        &self,
        own: Rename<'_>,
        shared: Rename<'_>,
    ) -> Result<LoadSnapshot, Failure> {
        let Overrides {
            network,
            vsock,
            drives,
        } = self.overrides.named(own, shared)?;
        Ok(LoadSnapshot {
            snapshot_path: self.state_file()?,
            mem_backend: self.mem_backend(shared)?,
            track_dirty_pages: self.track_dirty_pages,
            resume_vm: !self.paused,
            network_overrides: network,
            vsock_override: vsock,
            clock_realtime: self.clock_realtime,
            huge_pages: self.huge_pages,
            drive_overrides: drives,
            prefault: self.prefault,
            working_set_path: self.working_set.clone(),
        })
    }

    fn state_file(&self) -> Result<PathBuf, Failure> {
        let from = self.from.as_deref().map(|folder| folder.join(STATE_FILE));
        from.or_else(|| self.state.clone()).ok_or_else(which)
    }

    fn mem_backend(&self, name: Rename<'_>) -> Result<MemBackend, Failure> {
        if let Some(socket) = &self.uffd {
            return Ok(MemBackend {
                backend_path: name(socket)?.into(),
                backend_type: BackendType::Uffd,
            });
        }
        let beside = |folder: &Path| folder.join(MEMORY_FILE);
        let memory = self.from.as_deref().map(beside);
        Ok(MemBackend {
            backend_path: memory.or_else(|| self.memory.clone()).ok_or_else(which)?,
            backend_type: BackendType::File,
        })
    }
}

fn which() -> Failure {
    let text = "which snapshot? Give --from DIR, or --state FILE with --memory FILE or --uffd PATH";
    Failure::Arguments(text.into())
}

fn parse_huge_pages(name: &str) -> Result<SnapshotHugePages, String> {
    match name.to_ascii_lowercase().as_str() {
        "snapshot" => Ok(SnapshotHugePages::Snapshot),
        "none" => Ok(SnapshotHugePages::None),
        "transparent" => Ok(SnapshotHugePages::Transparent),
        "2m" => Ok(SnapshotHugePages::Size2M),
        _ => Err("use snapshot, none, transparent or 2M".into()),
    }
}

#[cfg(test)]
mod tests {
    use brume_api::{DriveOverride, NetworkOverride, VsockOverride};
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        load: LoadArgs,
    }

    fn same(text: &str) -> Result<String, Failure> {
        Ok(text.to_owned())
    }

    fn load(arguments: &str) -> Result<LoadSnapshot, String> {
        let arguments = arguments.split_whitespace();
        let cli = Cli::try_parse_from(["brume"].into_iter().chain(arguments));
        let cli = cli.map_err(|error| error.to_string())?;
        cli.load
            .load(&same, &same)
            .map_err(|failure| failure.text())
    }

    #[test]
    fn the_files_are_where_they_are_said_to_be() {
        for (arguments, state, backend, path) in [
            ("--from d", "d/state", BackendType::File, "d/memory"),
            ("--state s --memory m", "s", BackendType::File, "m"),
            ("--state s --uffd u", "s", BackendType::Uffd, "u"),
            ("--from d --uffd u", "d/state", BackendType::Uffd, "u"),
        ] {
            let load = load(arguments).unwrap();
            assert_eq!(load.snapshot_path, Path::new(state), "{arguments}");
            let expected = MemBackend {
                backend_path: path.into(),
                backend_type: backend,
            };
            assert_eq!(load.mem_backend, expected, "{arguments}");
            assert!(load.resume_vm);
        }
    }

    #[test]
    fn what_is_to_be_otherwise_is_said() {
        let load = load(
            "--from d --net eth0=tap1 --net eth1=tap2 --disk root=a=b --vsock v --clock-realtime \
             --track-dirty-pages --working-set w --huge-pages 2M --paused",
        )
        .unwrap();
        let expected = LoadSnapshot {
            snapshot_path: "d/state".into(),
            mem_backend: MemBackend {
                backend_path: "d/memory".into(),
                backend_type: BackendType::File,
            },
            track_dirty_pages: true,
            resume_vm: false,
            network_overrides: [("eth0", "tap1"), ("eth1", "tap2")]
                .map(|(id, tap)| NetworkOverride {
                    iface_id: id.into(),
                    host_dev_name: tap.into(),
                })
                .into(),
            vsock_override: Some(VsockOverride {
                uds_path: "v".into(),
            }),
            clock_realtime: true,
            huge_pages: SnapshotHugePages::Size2M,
            drive_overrides: vec![DriveOverride {
                drive_id: "root".into(),
                path_on_host: "a=b".into(),
            }],
            prefault: false,
            working_set_path: Some("w".into()),
        };
        assert_eq!(load, expected);
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        for arguments in [
            "",
            "--state s",
            "--memory m",
            "--uffd u",
            "--from d --state s",
            "--from d --memory m",
            "--state s --memory m --uffd u",
            "--from d --prefault --working-set w",
            "--from d --net eth0",
            "--from d --net =tap0",
            "--from d --disk root=",
            "--from d --huge-pages 1G",
        ] {
            assert!(load(arguments).is_err(), "{arguments}");
        }
        let text = load("--from d --net a=x --net b=y --net a=z").unwrap_err();
        assert_eq!(text, "--net names `a` twice");
    }
}
