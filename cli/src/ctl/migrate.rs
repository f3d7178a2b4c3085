// SPDX-License-Identifier: Apache-2.0
//! `brume ctl migrate`: moves the machine to another process, and sees to it until it is there.

mod follow;
mod report;
mod text;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use brume_api::{
    ClientError, MigrationCompression, MigrationDecision, MigrationMode, MigrationPatch,
    MigrationStatus, OnTimeout, SendMigration,
};
use clap::{ArgGroup, Args, ValueEnum};

use self::follow::watch_signals;
use self::report::Report;
use super::{Ctl, print};
use crate::amount::{parse_downtime, parse_rate, parse_timeout};
use crate::exit::Failure;
use crate::snapshot::absolute;
use crate::tls::TlsArgs;

/// The path of the endpoint.
const PATH: &str = "/migration";

pub(super) const EXAMPLES: &str = "\
Examples:
  brume ctl --api-sock a.sock migrate --to unix:move.sock      `brume receive` listens there
  brume ctl --api-sock a.sock migrate --to tcp:host2:4444 --max-downtime 50ms --connections 4
  brume ctl --api-sock a.sock migrate --to tcp:host2:4444 --timeout 60s --on-timeout post-copy
  brume ctl --api-sock a.sock migrate --to tcp:host2:4444 --report move.html
  brume ctl --api-sock a.sock migrate --change --bandwidth 200M --max-downtime 100ms
  brume ctl --api-sock a.sock migrate --cancel

Memory moves while the guest runs; what it writes meanwhile moves again, until the rest can be moved
within --max-downtime. A guest that writes faster than the connection carries never gets there: slow
it down with --auto-converge, have it moved at --timeout, or use --mode post-copy or hybrid.

Ctrl-C calls the move off while that can be done; a second one, or SIGTERM, leaves it alone. The
status is 0 when the guest and its memory are at the other side (with --detach, when the move has
begun), 1 if the move was called off or went wrong (the guest goes on here, or is lost: it is said
which), 8 if the machine refused or nobody answers, 130 or 143 if the move was left alone.

What ends the process that the machine is in: before the hand-over the move is called off with it;
while it is in doubt the other side waits for `--decide run`; while memory follows from here, the
first signal waits until all of it is there, and a second one loses the guest. A target that is
ended before it runs the guest leaves it here.

If the connection breaks at the hand-over, both sides wait for each other: the source looks for the
target by itself, and --resume names another address. If one of them is lost for good, say `--decide
run` to the other, and only then. Where memory was handed over without a copy that is refused while
the process of the other side is alive. If the connection breaks after the guest has moved but
before its memory has, the source looks for the target in the same way; `--decide abandon` ends a
source whose target is lost for good, and the guest with it.";

/// Arguments of `brume ctl migrate`.
#[derive(Args)]
#[command(group = ArgGroup::new("what").required(true))]
pub(super) struct MigrateArgs {
    /// Move the machine to the process that waits there: unix:PATH, tcp:HOST:PORT (an IPv6 address
    /// in brackets), or fd:N for a connected socket that the machine's process was started with,
    /// which is one connection, for pre-copy only
    #[arg(long, value_name = "ADDR", group = "what")]
    to: Option<String>,
    /// Show how far a move is
    #[arg(long, group = "what")]
    status: bool,
    /// Follow a move that was begun before; Ctrl-C calls it off here, too
    #[arg(long, group = "what")]
    follow: bool,
    /// Change the limits of a move, at its source: --max-downtime, --bandwidth, --timeout, --on-timeout and
    /// --auto-converge
    #[arg(long, group = "what")]
    change: bool,
    /// Call a move off: the guest stays here
    #[arg(long, group = "what")]
    cancel: bool,
    /// Go on with a move whose connection broke at the hand-over, or while memory followed: say so
    /// to its source, which looks at the same address or at another one
    #[arg(long, value_name = "ADDR", group = "what", num_args = 0..=1)]
    resume: Option<Option<String>>,
    /// Decide about a machine whose other side is lost since the hand-over: run it here, or
    /// abandon it
    #[arg(long, value_name = "WHAT", group = "what")]
    decide: Option<DecisionArg>,
    #[command(flatten)]
    limits: LimitArgs,
    #[command(flatten)]
    way: WayArgs,
    /// Begin the move and leave it alone
    #[arg(long, conflicts_with = "report")]
    detach: bool,
    /// Write a page with all numbers of the move, for a browser
    #[arg(long, value_name = "FILE", conflicts_with_all = ["change", "cancel", "resume", "decide"])]
    report: Option<PathBuf>,
}

/// What can be changed while the machine moves.
#[derive(Args)]
struct LimitArgs {
    /// How long the guest may stand still [default: 20ms]
    #[arg(long, value_name = "TIME", value_parser = parse_downtime)]
    max_downtime: Option<u32>,
    /// The most bytes per second while the guest runs here, such as 500M or 2G; 0 for no limit
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    bandwidth: Option<u64>,
    /// When to do what --on-timeout says, such as 60s or 5m from the begin on, while memory or disks
    /// move and the guest runs here; 0 for never [default: 0]
    #[arg(long, value_name = "TIME", value_parser = parse_timeout)]
    timeout: Option<u32>,
    /// What becomes of a guest that has not moved by then: it stays (cancel), moves however long it
    /// stands still (force), or moves and its memory follows (post-copy); the disks of --with-disks
    /// go over once before that, without a limit [default: cancel]
    #[arg(long, value_name = "WHAT")]
    on_timeout: Option<OnTimeoutArg>,
    /// Slow the guest down step by step if it writes faster than the connection carries
    #[arg(
        long,
        value_name = "BOOL",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true"
    )]
    auto_converge: Option<bool>,
}

/// How the machine moves, which stays as it is.
#[derive(Args)]
struct WayArgs {
    /// What moves first: memory (pre-copy), the machine (post-copy), or one pass over memory, then
    /// the machine, then the rest (hybrid); memory of 2M pages goes first [default: pre-copy]
    #[arg(long, value_name = "HOW")]
    mode: Option<ModeArg>,
    /// How many connections carry memory, 1 to 16 [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16))]
    connections: Option<u8>,
    /// How pages are made smaller on their way: as it is faster (auto), or as is said
    /// [default: auto]
    #[arg(long, value_name = "HOW")]
    compression: Option<CompressionArg>,
    /// Move the contents of the disks too, which are not on storage that both sides reach
    #[arg(long)]
    with_disks: bool,
    #[command(flatten)]
    tls: TlsArgs,
    /// The name in the certificate of the other side [default: the host of --to, or
    /// localhost]
    #[arg(long, value_name = "NAME", requires = "tls_ca")]
    tls_name: Option<String>,
}

#[derive(Clone, Copy, ValueEnum)]
enum OnTimeoutArg {
    Cancel,
    Force,
    PostCopy,
}

#[derive(Clone, Copy, ValueEnum)]
enum ModeArg {
    PreCopy,
    PostCopy,
    Hybrid,
}

#[derive(Clone, Copy, ValueEnum)]
enum CompressionArg {
    Auto,
    None,
    Lz4,
    Zstd,
}

#[derive(Clone, Copy, ValueEnum)]
enum DecisionArg {
    Run,
    Abandon,
}

impl From<OnTimeoutArg> for OnTimeout {
    fn from(arg: OnTimeoutArg) -> Self {
        match arg {
            OnTimeoutArg::Cancel => Self::Cancel,
            OnTimeoutArg::Force => Self::Force,
            OnTimeoutArg::PostCopy => Self::PostCopy,
        }
    }
}

impl From<ModeArg> for MigrationMode {
    fn from(arg: ModeArg) -> Self {
        match arg {
            ModeArg::PreCopy => Self::PreCopy,
            ModeArg::PostCopy => Self::PostCopy,
            ModeArg::Hybrid => Self::Hybrid,
        }
    }
}

impl From<CompressionArg> for MigrationCompression {
    fn from(arg: CompressionArg) -> Self {
        match arg {
            CompressionArg::Auto => Self::Auto,
            CompressionArg::None => Self::None,
            CompressionArg::Lz4 => Self::Lz4,
            CompressionArg::Zstd => Self::Zstd,
        }
    }
}

impl From<DecisionArg> for MigrationDecision {
    fn from(arg: DecisionArg) -> Self {
        match arg {
            DecisionArg::Run => Self::Run,
            DecisionArg::Abandon => Self::Abandon,
        }
    }
}

/// What is to be sent.
#[derive(Debug, PartialEq)]
enum Asked {
    Send(Box<SendMigration>),
    Patch(Box<MigrationPatch>),
    Status,
    Follow,
    Cancel,
}

impl MigrateArgs {
    fn asked(&self) -> Result<Asked, Failure> {
        let limits = &self.limits;
        let limit_given = limits.patch() != MigrationPatch::default();
        if limit_given && self.to.is_none() && !self.change {
            let text = "limits belong to --to, or to --change for a move that was begun before";
            return Err(Failure::Arguments(text.into()));
        }
        if self.to.is_none() && (self.way.given() || self.detach) {
            let text = "--mode, --connections, --compression, --with-disks, --tls-* and --detach \
                        belong to --to: a move keeps the way that it was begun in";
            return Err(Failure::Arguments(text.into()));
        }
        if let Some(to) = &self.to {
            return Ok(Asked::Send(Box::new(self.send(to)?)));
        }
        if let Some(resume) = &self.resume {
            let place = resume.as_deref().map(elsewhere).transpose()?;
            return Ok(Asked::Patch(Box::new(MigrationPatch {
                resume: Some(place.unwrap_or_default()),
                ..MigrationPatch::default()
            })));
        }
        if let Some(decision) = self.decide {
            return Ok(Asked::Patch(Box::new(MigrationPatch {
                decision: Some(decision.into()),
                ..MigrationPatch::default()
            })));
        }
        match (self.cancel, self.change) {
            (true, _) => Ok(Asked::Cancel),
            (_, true) if limit_given => Ok(Asked::Patch(Box::new(limits.patch()))),
            (_, true) => {
                let text = "change what? Give --max-downtime, --bandwidth, --timeout, \
                            --on-timeout or --auto-converge";
                Err(Failure::Arguments(text.into()))
            }
            _ if self.follow => Ok(Asked::Follow),
            _ => Ok(Asked::Status),
        }
    }

    fn send(&self, to: &str) -> Result<SendMigration, Failure> {
        let (limits, way) = (&self.limits, &self.way);
        Ok(SendMigration {
            destination: elsewhere(to)?,
            max_downtime_ms: limits.max_downtime.unwrap_or(20),
            timeout_s: limits.timeout.unwrap_or(0),
            on_timeout: limits.on_timeout.map(OnTimeout::from).unwrap_or_default(),
            bandwidth_limit: limits.bandwidth.unwrap_or(0),
            connections: way.connections.unwrap_or(1),
            compression: way
                .compression
                .map(MigrationCompression::from)
                .unwrap_or_default(),
            mode: way.mode.map(MigrationMode::from).unwrap_or_default(),
            auto_converge: limits.auto_converge.unwrap_or(false),
            with_disks: way.with_disks,
            tls: way.tls.tls(way.tls_name.clone())?,
        })
    }
}

impl LimitArgs {
    fn patch(&self) -> MigrationPatch {
        MigrationPatch {
            max_downtime_ms: self.max_downtime,
            timeout_s: self.timeout,
            on_timeout: self.on_timeout.map(OnTimeout::from),
            bandwidth_limit: self.bandwidth,
            auto_converge: self.auto_converge,
            resume: None,
            decision: None,
        }
    }
}

impl WayArgs {
    fn given(&self) -> bool {
        let tls = !matches!(self.tls.tls(None), Ok(None));
        let way = self.mode.is_some() || self.connections.is_some() || self.compression.is_some();
        way || self.with_disks || tls
    }
}

/// An address for a process in another folder.
fn elsewhere(address: &str) -> Result<String, Failure> {
    match address.strip_prefix("unix:") {
        Some(path) => Ok(format!("unix:{}", absolute(Path::new(path))?.display())),
        None => Ok(address.to_owned()),
    }
}

/// A status, and the text that it came as.
struct Seen {
    status: MigrationStatus,
    text: String,
}

impl Ctl {
    pub(super) fn migrate(&self, args: &MigrateArgs) -> Result<ExitCode, Failure> {
        let asked = args.asked()?;
        // A move of an hour is not to end in a page that cannot be written.
        let report = args.report.as_deref().map(Report::create).transpose()?;
        match asked {
            Asked::Send(send) if args.detach => {
                self.put_migration(&send)?;
                Ok(ExitCode::SUCCESS)
            }
            Asked::Send(send) => {
                // Whoever presses Ctrl-C now wants the machine to stay.
                let signals = watch_signals()?;
                self.put_migration(&send)?;
                self.follow(&signals, report)
            }
            Asked::Follow => self.follow(&watch_signals()?, report),
            Asked::Patch(patch) => {
                let body = serde_json::to_string(&patch).unwrap_or_default();
                self.client.send("PATCH", PATH, &body)?.success()?;
                Ok(ExitCode::SUCCESS)
            }
            Asked::Cancel => {
                self.client.send("DELETE", PATH, "")?.success()?;
                Ok(ExitCode::SUCCESS)
            }
            Asked::Status => {
                let seen = self.migration()?;
                self.show_migration(&seen)?;
                if let Some(report) = report {
                    report.finish(&seen.status)?;
                }
                Ok(ExitCode::SUCCESS)
            }
        }
    }

    fn put_migration(&self, send: &SendMigration) -> Result<(), Failure> {
        let body = serde_json::to_string(send).unwrap_or_default();
        self.client
            .send("PUT", "/migration/send", &body)?
            .success()?;
        Ok(())
    }

    fn migration(&self) -> Result<Seen, ClientError> {
        let reply = self.client.send("GET", PATH, "")?.success()?;
        let status = serde_json::from_str(&reply.body);
        Ok(Seen {
            status: status.map_err(|error| ClientError::Body(error.to_string()))?,
            text: reply.body,
        })
    }

    fn show_migration(&self, seen: &Seen) -> Result<(), Failure> {
        if self.json {
            return print(seen.text.trim_end());
        }
        print(&text::summary(&seen.status))
    }
}

#[cfg(test)]
mod tests;
