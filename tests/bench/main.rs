// SPDX-License-Identifier: Apache-2.0
//! `make bench`: one table of what brume does, beside a peer if one is given.
//!
//! Every figure comes from the bare guest, which drives the devices at native speed, or from
//! outside the process. The programs take turns, and a row is the median of several rounds, since
//! one machine's speed changes from second to second. `FIRECRACKER` names the peer's binary; it
//! gets the same guest, the same configuration file and the same disk and TAP. `CLOUD_HYPERVISOR`
//! and `QEMU` name peers that can move a machine.

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
mod create;
mod dirty;
mod guest;
mod migrate;
mod mover;
mod net;
mod plain_copy;
mod program;
mod qemu;
mod restore;
mod session;
mod start;
mod table;
mod vsock;

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use program::Programs;
use table::Table;

/// Memory of the machines that are written down; the last is large.
const SIZES_MIB: [u64; 3] = [128, 1024, 8192];

/// Measures brume, and others beside it.
///
/// FIRECRACKER names Firecracker's binary. `CLOUD_HYPERVISOR` and QEMU name those of
/// Cloud Hypervisor and of qemu-system-x86_64, for the rows that begin with `move`.
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
    /// Machines of 8 GiB for snapshots and moves, too: they need 16 GiB of disk and 20 GiB of
    /// memory, and time
    #[arg(long)]
    large: bool,
    /// How many clones of one machine are made at once
    #[arg(long, default_value_t = 20)]
    clones: usize,
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
    let sizes = if options.large {
        &SIZES_MIB[..]
    } else {
        &SIZES_MIB[..2]
    };
    create::measure(&programs, &mut table, sizes)?;
    restore::measure(&programs, &mut table, sizes, options.clones)?;
    dirty::measure(&programs, &mut table, sizes, options.ms)?;
    migrate::measure(&programs, &mut table, sizes)?;
    table.print();
    table.write_json(&options.json)?;
    eprintln!("bench: the table is in {}", options.json.display());
    Ok(())
}
