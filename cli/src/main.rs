// SPDX-License-Identifier: Apache-2.0
//! The `brume` program: `brume run` for people, Firecracker's flags for programs.

mod amount;
mod args;
mod clock;
mod clone;
mod console;
mod ctl;
mod exit;
mod firecracker;
mod launch;
mod load;
mod log;
mod metadata;
mod overrides;
mod pattern;
mod progress;
mod receive;
mod restore;
mod run;
mod signals;
mod size;
mod snapshot;
mod snapshot_files;
mod spec;
mod terminal;
mod tls;

use std::process::ExitCode;
use std::time::Instant;

use args::Invocation;

fn main() -> ExitCode {
    let started = Instant::now();
    let result = match args::parse() {
        Ok(Invocation::Run(args)) => run::run(*args, started),
        Ok(Invocation::Clone(args)) => clone::run(&args),
        Ok(Invocation::Ctl(args)) => ctl::run(*args),
        Ok(Invocation::Inspect(args)) => snapshot_files::inspect(&args),
        Ok(Invocation::Rebase(args)) => snapshot_files::rebase(&args),
        Ok(Invocation::Receive(args)) => receive::run(&args, started),
        Ok(Invocation::Restore(args)) => restore::run(&args, started),
        Ok(Invocation::Snapshot(args)) => snapshot::run(&args),
        Ok(Invocation::Firecracker(args)) => firecracker::run(*args, started),
        Err(code) => return code,
    };
    result.unwrap_or_else(|failure| failure.report())
}
