// SPDX-License-Identifier: Apache-2.0
//! Firecracker's way to start: its flags and its configuration file.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use brume_api::config::{Level, Logger, VmConfig};

use crate::args::FirecrackerArgs;
use crate::clock;
use crate::exit::Failure;
use crate::launch::Launch;
use crate::log::{Log, Style};

const MAX_ID: usize = 64;

/// Runs the machine of the configuration file.
///
/// # Errors
///
/// There is no such machine, or it came to a bad end.
pub(crate) fn run(args: &FirecrackerArgs, started: Instant) -> Result<ExitCode, Failure> {
    let Some(path) = args.config_file.as_ref().filter(|_| args.no_api) else {
        let text = "nothing to do: use `brume run`, or --no-api with --config-file FILE \
                    (this version has no API server yet); --help says more";
        return Err(Failure::Arguments(text.into()));
    };
    check_id(&args.id)?;
    let config = VmConfig::from_file(path)?;
    start_log(args, config.logger.clone().unwrap_or_default())?;
    for key in &config.unknown_keys {
        tracing::warn!("`{key}` in the configuration file means nothing and is ignored");
    }
    tracing::info!("Running brume v{}", env!("CARGO_PKG_VERSION"));
    let clock = args.boot_timer.then(|| start_clock(args, started));
    let launch = Launch {
        started,
        progress: None,
        clock,
        as_firecracker: true,
    };
    // Whoever reads the log need not see stderr.
    launch
        .run(&config)
        .inspect_err(|failure| tracing::error!("{}", failure.text()))
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
fn start_log(args: &FirecrackerArgs, file: Logger) -> Result<(), Failure> {
    let log = Log {
        style: Style::Firecracker {
            id: args.id.clone(),
            level: args.show_level || file.show_level.unwrap_or(false),
            origin: args.show_log_origin || file.show_log_origin.unwrap_or(false),
        },
        level: args.level.or(file.level).unwrap_or(Level::Info),
        module: args.module.clone().or(file.module),
    };
    match args.log_path.as_ref().or(file.log_path.as_ref()) {
        Some(path) => log.start_on_file(path),
        None => {
            log.start_on_stdout();
            Ok(())
        }
    }
}

type Clock = Box<dyn Fn() -> (Duration, Duration) + Send>;

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
