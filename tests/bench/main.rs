// SPDX-License-Identifier: Apache-2.0
//! `make bench`: one table of what brume does, beside a peer if one is given.
//!
//! Every figure comes from the bare guest, which drives the devices at native speed, or from
//! outside the process. The programs take turns, and a row is the median of several rounds, since
//! one machine's speed changes from second to second. `FIRECRACKER` names the peer's binary; it
//! gets the same guest, the same configuration file and the same disk and TAP.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "a program that prints figures, and whose input is its own"
)]

mod api;
mod block;
mod net;
mod program;
mod start;
mod table;
mod vsock;

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use program::Programs;
use table::Table;

/// Measures brume, and Firecracker beside it if FIRECRACKER names its binary.
#[derive(Parser)]
struct Options {
    /// How often each figure is taken; the median counts
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How long each device is driven in each round, in milliseconds
    #[arg(long, default_value_t = 500)]
    ms: u32,
    /// Only rows whose name contains this
    #[arg(long, default_value = "")]
    only: String,
    /// Where the table goes as JSON
    #[arg(long, default_value = "target/bench.json")]
    json: PathBuf,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> io::Result<()> {
    let programs = Programs::find()?;
    let mut table = Table::new(options.rounds, &options.only);
    start::measure(&programs, &mut table)?;
    block::measure(&programs, &mut table, options.ms)?;
    net::measure(&programs, &mut table, options.ms)?;
    vsock::measure(&programs, &mut table, options.ms)?;
    api::measure(&programs, &mut table)?;
    table.print();
    table.write_json(&options.json)?;
    eprintln!("bench: the table is in {}", options.json.display());
    Ok(())
}
