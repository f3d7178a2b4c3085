// SPDX-License-Identifier: Apache-2.0
//! What each clone is to be, before any is started.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use brume_api::LoadSnapshot;

use super::CloneArgs;
use crate::exit::Failure;
use crate::pattern::Pattern;

/// What one clone is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) number: u32,
    /// The socket of its API.
    pub(super) socket: PathBuf,
    /// What takes what it prints.
    pub(super) log: Option<PathBuf>,
    pub(super) load: LoadSnapshot,
}

impl Plan {
    /// The sockets that the clone makes.
    pub(super) fn sockets(&self) -> impl Iterator<Item = &Path> {
        let vsock = self.load.vsock_override.as_ref();
        let vsock = vsock.map(|vsock| vsock.uds_path.as_path());
        vsock.into_iter().chain([self.socket.as_path()])
    }
}

/// A plan for each clone.
///
/// # Errors
///
/// A name is not understood, or would be that of more than one clone.
pub(super) fn plans(args: &CloneArgs) -> Result<Vec<Plan>, Failure> {
    let many = args.count > 1;
    let own = |pattern: &Pattern, number: u32| {
        if many && !pattern.is_numbered() {
            let text = format!(
                "`{}` would be the same for all clones: write {{}} where the number goes",
                pattern.fill(number)
            );
            return Err(Failure::Arguments(text));
        }
        Ok(pattern.fill(number))
    };
    let parse = |text: &str| Pattern::from_str(text).map_err(Failure::Arguments);
    let plan = |number: u32| {
        let log = args.log.as_ref().map(|log| own(log, number)).transpose()?;
        Ok(Plan {
            number,
            socket: own(&args.api_sock, number)?.into(),
            log: log.map(PathBuf::from),
            load: args
                .load
                .load(&|text| own(&parse(text)?, number), &|text| {
                    Ok(parse(text)?.fill(number))
                })?,
        })
    };
    (0..args.count).map(plan).collect()
}

/// Sees to it that the sockets can be made, and that those that are there afterwards are ours.
///
/// # Errors
///
/// One of them is there already.
pub(super) fn check_free(plans: &[Plan]) -> Result<(), Failure> {
    for path in plans.iter().flat_map(Plan::sockets) {
        // What cannot be looked at cannot be made either, and the clone will say why.
        if path.symlink_metadata().is_ok() {
            return Err(Failure::Taken(path.into()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: CloneArgs,
    }

    fn made(arguments: &str) -> Result<Vec<Plan>, String> {
        let arguments = arguments.split_whitespace();
        let cli = Cli::try_parse_from(["brume", "--from", "d"].into_iter().chain(arguments));
        let args = cli.map_err(|error| error.to_string())?.args;
        plans(&args).map_err(|failure| failure.text())
    }

    #[test]
    fn each_clone_has_names_of_its_own() {
        let plans = made(
            "--count 12 --api-sock run/{:02} --net eth0=tap{} --net eth1=t{}b --vsock v{} \
             --disk root=base --disk data=d{} --log log{}",
        )
        .unwrap();
        assert_eq!(plans.len(), 12);
        let plan = &plans[11];
        assert_eq!((plan.number, &*plan.socket), (11, Path::new("run/11")));
        assert_eq!(plan.log.as_deref(), Some(Path::new("log11")));
        let taps = plan.load.network_overrides.iter();
        let taps: Vec<_> = taps
            .map(|net| (&*net.iface_id, &*net.host_dev_name))
            .collect();
        assert_eq!(taps, [("eth0", "tap11"), ("eth1", "t11b")]);
        let disks = plan.load.drive_overrides.iter();
        let disks: Vec<_> = disks
            .map(|disk| disk.path_on_host.to_str().unwrap())
            .collect();
        assert_eq!(disks, ["base", "d11"]);
        let sockets: Vec<_> = plan.sockets().collect();
        assert_eq!(sockets, [Path::new("v11"), Path::new("run/11")]);
        assert_eq!(plans[3].socket, Path::new("run/03"));
    }

    #[test]
    fn a_name_for_all_is_refused_where_each_needs_one() {
        for bad in [
            "--api-sock vm.sock",
            "--net eth0=tap0",
            "--vsock v.sock",
            "--log log",
        ] {
            let error = made(&format!("--count 2 {bad}")).unwrap_err();
            assert!(
                error.contains("would be the same for all clones"),
                "{error}"
            );
            made(&format!("--count 1 {bad}")).unwrap();
        }
        for bad in ["--count 0", "--count 10001", "", "--count 2 --vsock v{n}"] {
            assert!(made(bad).is_err(), "{bad}");
        }
        let plans = made("--count 2 --uffd handler.sock").unwrap();
        assert_eq!(
            plans[1].load.mem_backend.backend_path,
            Path::new("handler.sock")
        );
        assert_eq!(plans[1].socket, Path::new("vm1.sock"));
    }

    #[test]
    fn a_socket_that_is_there_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v1");
        std::fs::write(&path, "").unwrap();
        let dir = dir.path().display();
        let plans = made(&format!(
            "--count 2 --api-sock {dir}/a{{}} --vsock {dir}/v{{}}"
        ))
        .unwrap();
        let text = check_free(&plans).unwrap_err().text();
        assert!(text.contains("/v1 exists already"), "{text}");
        std::fs::remove_file(path).unwrap();
        check_free(&plans).unwrap();
    }
}
