// SPDX-License-Identifier: Apache-2.0
//! Firecracker's way to start: its flags, its configuration file and its API.

use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, Instant};

use brume_api::Server;
use brume_api::config::{Level, Logger, MetricsConfig, VmConfig};
use brume_mmds::SharedMmds;
use brume_vmm::Description;

use crate::args::FirecrackerArgs;
use crate::clock;
use crate::exit::Failure;
use crate::launch::{Clock, Launch, Origin, Remote};
use crate::log::{Log, RunningLog, Style};
use crate::metadata;
use crate::snapshot_files;

const MAX_ID: usize = 64;

/// Runs the machine of the configuration file, or serves the API for one to come.
///
/// # Errors
///
/// There is no such machine, or it came to a bad end.
pub(crate) fn run(args: FirecrackerArgs, started: Instant) -> Result<ExitCode, Failure> {
    if args.snapshot_version {
        return snapshot_files::print_version();
    }
    if let Some(path) = &args.describe_snapshot {
        return snapshot_files::describe(path);
    }
    if let Some(flag) = args.unsupported() {
        let text = format!("{flag} is not supported by this version of brume; leave it out");
        return Err(Failure::Arguments(text));
    }
    if !args.no_api && args.api_sock.is_none() {
        let text = "nothing to do: use `brume run`, --api-sock PATH, or --no-api with \
                    --config-file FILE; --help says more";
        return Err(Failure::Arguments(text.into()));
    }
    check_id(&args.id)?;
    let config = args.config_file.as_deref().map(VmConfig::from_file);
    let config = config.transpose()?;
    let logger = config.as_ref().and_then(|config| config.logger.clone());
    let log = start_log(&args, logger.unwrap_or_default())?;
    let limit = args
        .mmds_size_limit
        .unwrap_or(args.http_api_max_payload_size);
    let mmds = metadata::load(args.metadata.as_deref(), limit)?;
    let unknown = config.iter().flat_map(|config| &config.unknown_keys);
    for key in unknown {
        tracing::warn!("`{key}` in the configuration file means nothing and is ignored");
    }
    if args.seccomp_filter.is_some() {
        tracing::warn!("--seccomp-filter does nothing: this version filters no system calls");
    }
    tracing::info!("Running brume v{}", env!("CARGO_PKG_VERSION"));
    // Whoever reads the log need not see stderr.
    launch(args, config, (log, mmds), started)
        .inspect_err(|failure| tracing::error!("{}", failure.text()))
}

fn launch(
    args: FirecrackerArgs,
    config: Option<VmConfig>,
    (log, mmds): (RunningLog, SharedMmds),
    started: Instant,
) -> Result<ExitCode, Failure> {
    let (socket, limit) = (args.api_sock.clone(), args.http_api_max_payload_size);
    let (id, metrics_path) = (args.id.clone(), args.metrics_path.clone());
    let launch = Launch {
        started,
        progress: None,
        clock: Rc::new(move || args.boot_timer.then(|| start_clock(&args, started))),
        as_firecracker: true,
    };
    let at_once = config.as_ref().map(|_| Origin::Description);
    let mut config = config.unwrap_or_default();
    if let Some(metrics_path) = metrics_path {
        config.metrics = Some(MetricsConfig {
            metrics_path,
            ..MetricsConfig::default()
        });
    }
    let description = Description { id, config, mmds };
    match socket {
        None => launch.run(description, Origin::Description),
        Some(path) => launch.serve(Remote {
            description,
            at_once,
            server: Server::bind(&path, limit)?,
            log: Some(log),
        }),
    }
}

fn check_id(id: &str) -> Result<(), Failure> {
    let good = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if !(1..=MAX_ID).contains(&id.len()) || !id.chars().all(good) {
        let text = format!("the id \"{id}\" is not one: use 1 to {MAX_ID} letters, digits and `-`");
        return Err(Failure::Arguments(text));
    }
    Ok(())
}

/// Flags go before what the configuration file says.
fn start_log(args: &FirecrackerArgs, file: Logger) -> Result<RunningLog, Failure> {
    let log = Log {
        style: Style::Firecracker {
            id: args.id.clone(),
            level: args.show_level || file.show_level.unwrap_or(false),
            origin: args.show_log_origin || file.show_log_origin.unwrap_or(false),
        },
        level: args.level.or(file.level).unwrap_or(Level::Info),
        module: args.module.clone().or(file.module),
    };
    log.start(args.log_path.as_deref().or(file.log_path.as_deref()))
}

/// Time since `started`, and CPU time of this process.
pub(crate) fn process_clock(started: Instant) -> Clock {
    Box::new(move || (started.elapsed(), clock::process_cpu()))
}

/// As [`process_clock`], from the start that the jailer tells of if there was one.
fn start_clock(args: &FirecrackerArgs, started: Instant) -> Clock {
    let micros = |value: Option<u64>| Duration::from_micros(value.unwrap_or(0));
    let start_wall = args.start_time_us.map(Duration::from_micros);
    let start_cpu = micros(args.start_time_cpu_us);
    let parent_cpu = micros(args.parent_cpu_time_us);
    Box::new(move || {
        let wall = start_wall.map_or_else(
            || started.elapsed(),
            |start| clock::monotonic().saturating_sub(start),
        );
        (
            wall,
            clock::process_cpu().saturating_sub(start_cpu) + parent_cpu,
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_firecrackers() {
        check_id("my-vm-1").unwrap();
        for id in ["", "a_b", "a/b", &"a".repeat(65)] {
            assert!(check_id(id).is_err(), "{id}");
        }
    }
}
