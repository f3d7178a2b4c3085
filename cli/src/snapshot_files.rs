// SPDX-License-Identifier: Apache-2.0
//! What can be done with the files of a snapshot while no machine is concerned.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use brume_snapshot::{FORMAT_VERSION, Inspection, StateError, StateFile};
use clap::Args;

use crate::ctl::print;
use crate::exit::Failure;

/// Arguments of `brume inspect`.
#[derive(Args)]
pub(crate) struct InspectArgs {
    /// The state file
    file: PathBuf,
    /// Print all of it as JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `brume rebase`.
#[derive(Args)]
pub(crate) struct RebaseArgs {
    /// Memory file of the snapshot before the diff; changed in place without --output. No machine
    /// that was restored from it may run
    base: PathBuf,
    /// Memory file of the diff snapshot
    diff: PathBuf,
    /// Write the merged memory to this file, and leave both others as they are
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// `brume inspect`.
///
/// # Errors
///
/// The file is not a whole state file. What there is of it has been printed then.
pub(crate) fn inspect(args: &InspectArgs) -> Result<ExitCode, Failure> {
    let inspection = Inspection::read(&args.file).map_err(|error| bad_state(&args.file, error))?;
    if args.json {
        print(&format!("{:#}", inspection.to_json()))?;
    } else {
        print(inspection.to_text().trim_end())?;
    }
    match inspection.into_damage() {
        Some(damage) => Err(bad_state(&args.file, damage)),
        None => Ok(ExitCode::SUCCESS),
    }
}

/// `brume rebase`.
///
/// # Errors
///
/// The files cannot be merged.
pub(crate) fn rebase(args: &RebaseArgs) -> Result<ExitCode, Failure> {
    let (base, diff) = (&args.base, &args.diff);
    let (to, summary) = match &args.output {
        Some(output) => (output, brume_snapshot::rebase_to(base, diff, output)?),
        None => (base, brume_snapshot::rebase(base, diff)?),
    };
    print(&format!(
        "merged {} KiB of {} KiB into {}",
        summary.bytes.div_ceil(1024),
        summary.length.div_ceil(1024),
        to.display()
    ))?;
    Ok(ExitCode::SUCCESS)
}

/// `--snapshot-version`.
///
/// # Errors
///
/// It cannot be printed.
pub(crate) fn print_version() -> Result<ExitCode, Failure> {
    print(&format!("v{FORMAT_VERSION}.0.0"))?;
    Ok(ExitCode::SUCCESS)
}

/// `--describe-snapshot`.
///
/// # Errors
///
/// The file is not a state file that this program could load.
pub(crate) fn describe(path: &Path) -> Result<ExitCode, Failure> {
    // There is one version, and a file of any other is refused.
    StateFile::read(path).map_err(|error| bad_state(path, error))?;
    print_version()
}

fn bad_state(path: &Path, source: StateError) -> Failure {
    let path = path.to_owned();
    Failure::State { path, source }
}
