// SPDX-License-Identifier: Apache-2.0
//! `brume restore`: a machine from a snapshot, with the terminal as its console.

use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Instant;

use brume_api::config::Level;
use brume_vmm::Description;
use clap::Args;

use crate::args::{DEFAULT_ID, parse_level};
use crate::exit::Failure;
use crate::launch::{Launch, Origin};
use crate::load::LoadArgs;
use crate::log::{Log, Style};

/// Arguments of `brume restore`.
#[derive(Args)]
pub(crate) struct RestoreArgs {
    #[command(flatten)]
    load: LoadArgs,
    /// Unix socket of a control API for the machine, which must not exist yet
    #[arg(long, value_name = "PATH")]
    api_sock: Option<PathBuf>,
    /// How much to log on stderr: off, error, warning, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "warning", value_parser = parse_level)]
    log_level: Level,
}

/// Makes the machine and runs it to its end.
///
/// # Errors
///
/// The snapshot cannot be loaded, or the machine came to a bad end.
pub(crate) fn run(args: &RestoreArgs, started: Instant) -> Result<ExitCode, Failure> {
    Log {
        style: Style::Plain,
        level: args.log_level,
        module: None,
    }
    .start_on_stderr();
    let same = |text: &str| Ok(text.to_owned());
    let load = args.load.load(&same, &same)?;
    if !load.resume_vm && args.api_sock.is_none() {
        let text = "a machine that is --paused needs --api-sock, for someone to let it go on";
        return Err(Failure::Arguments(text.into()));
    }
    let launch = Launch {
        started,
        progress: Some(format!("brume: restoring {}", load.snapshot_path.display())),
        clock: Rc::new(|| None),
        as_firecracker: false,
    };
    let description = Description {
        id: DEFAULT_ID.into(),
        ..Description::default()
    };
    let origin = Origin::Snapshot(Box::new(load));
    launch.run_with_socket(description, origin, args.api_sock.as_deref())
}
