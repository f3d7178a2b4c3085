// SPDX-License-Identifier: Apache-2.0
//! `brume clone`: many machines from one snapshot, each a process of this program that is told by
//! its API what to load.

mod fleet;
mod plan;

use std::io::{self, IsTerminal, Write};
use std::num::NonZero;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use brume_vmm::{Ending, StopReason};
use clap::Args;
use serde_json::json;

use self::fleet::{Fleet, Started};
use self::plan::{check_free, plans};
use crate::exit::{Failure, status_of};
use crate::load::LoadArgs;
use crate::pattern::Pattern;
use crate::signals::Signals;

const ERASE: &str = "\r\x1b[K";

/// Arguments of `brume clone`.
#[derive(Args)]
pub(crate) struct CloneArgs {
    #[command(flatten)]
    load: LoadArgs,
    /// How many machines to start
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    count: u32,
    /// Unix sockets of the APIs, which must not exist yet
    #[arg(long, value_name = "PATTERN", default_value = "vm{}.sock")]
    api_sock: Pattern,
    /// Files that take what the clones print: their consoles and their own messages
    #[arg(long, value_name = "PATTERN")]
    log: Option<Pattern>,
    /// Leave the clones alone as soon as they run; `brume ctl stop` ends one
    #[arg(long)]
    detach: bool,
    /// How many to start at a time [default: the number of CPUs]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    jobs: Option<u32>,
    /// Print what was started as JSON
    #[arg(long)]
    json: bool,
}

/// What happens to the clones.
enum Event {
    /// A signal has come.
    Signal(libc::c_int),
    /// A clone was started, or could not be.
    Start(Result<Started, Failure>),
    /// A thread that starts clones has nothing left to do.
    Idle,
}

/// Starts the clones and, unless they are to be left alone, stays until all have ended.
///
/// # Errors
///
/// One of them cannot be started: none is left then.
pub(crate) fn run(args: &CloneArgs) -> Result<ExitCode, Failure> {
    let plans = plans(args)?;
    check_free(&plans)?;
    let cpus = thread::available_parallelism().map_or(1, NonZero::get);
    let jobs = args
        .jobs
        .map_or(cpus, |jobs| usize::try_from(jobs).unwrap_or(cpus));
    // Before the first thread, so that all inherit it.
    let signals = Signals::block_with_children().map_err(Failure::Host)?;
    let (sender, events) = channel();
    watch_signals(signals, sender.clone())?;
    let fleet = Arc::new(Fleet::new(plans));
    let result = start(&fleet, jobs, &sender, &events).and_then(|outcome| match outcome {
        Ok(started) => show(started, args.json).map(|()| None),
        Err(signal) => Ok(Some(signal)),
    });
    let status = match result {
        Ok(None) if args.detach => return Ok(ExitCode::SUCCESS),
        Ok(None) => Ok(stay(&fleet, &events)),
        Ok(Some(signal)) => Ok(ended_by(signal)),
        Err(failure) => Err(failure),
    };
    fleet.end();
    status
}

fn watch_signals(mut signals: Signals, events: Sender<Event>) -> Result<(), Failure> {
    let watch = move || {
        while let Ok(signal) = signals.wait() {
            if events.send(Event::Signal(signal)).is_err() {
                return;
            }
        }
    };
    let thread = thread::Builder::new().name("signals".into()).spawn(watch);
    thread.map(drop).map_err(Failure::Host)
}

/// Starts all clones, `jobs` at a time; on the inner error side is a signal to end by.
fn start(
    fleet: &Arc<Fleet>,
    jobs: usize,
    sender: &Sender<Event>,
    events: &Receiver<Event>,
) -> Result<Result<Vec<Started>, libc::c_int>, Failure> {
    let jobs = jobs.min(fleet.len());
    let mut busy = 0;
    let mut failure = None;
    for job in 0..jobs {
        let (fleet, sender) = (fleet.clone(), sender.clone());
        let work = move || {
            while let Some(result) = fleet.start_next() {
                let _ = sender.send(Event::Start(result));
            }
            let _ = sender.send(Event::Idle);
        };
        match thread::Builder::new()
            .name(format!("start{job}"))
            .spawn(work)
        {
            Ok(_) => busy += 1,
            Err(error) if busy == 0 => return Err(Failure::Host(error)),
            // The others do it.
            Err(_) => break,
        }
    }
    let mut signal = None;
    let mut started = Vec::new();
    let progress = io::stderr().is_terminal();
    while busy > 0 {
        match events.recv() {
            Ok(Event::Start(Ok(clone))) => started.push(clone),
            Ok(Event::Start(Err(error))) => {
                fleet.stop();
                failure.get_or_insert(error);
            }
            Ok(Event::Idle) => busy -= 1,
            // One that ends too early is seen by who started it.
            Ok(Event::Signal(libc::SIGCHLD)) => continue,
            Ok(Event::Signal(number)) => {
                fleet.stop();
                signal.get_or_insert(number);
            }
            Err(_) => break,
        }
        if progress {
            let text = format!("{ERASE}brume: {} of {} clones", started.len(), fleet.len());
            let _ = io::stderr().write_all(text.as_bytes());
        }
    }
    if progress {
        let _ = io::stderr().write_all(ERASE.as_bytes());
    }
    match (signal, failure) {
        (Some(signal), _) => Ok(Err(signal)),
        (None, Some(failure)) => Err(failure),
        (None, None) => Ok(Ok(started)),
    }
}

/// Waits for the end of all clones, or for a signal.
fn stay(fleet: &Fleet, events: &Receiver<Event>) -> ExitCode {
    let mut worst = 0;
    loop {
        // Some may have ended before anybody looked.
        for (number, status) in fleet.reap() {
            if status.success() {
                continue;
            }
            let _ = writeln!(io::stderr(), "brume: clone {number} ended: {status}");
            let code = status.code().and_then(|code| u8::try_from(code).ok());
            worst = if worst == 0 { code.unwrap_or(1) } else { worst };
        }
        if fleet.is_empty() {
            return ExitCode::from(worst);
        }
        match events.recv() {
            Ok(Event::Signal(libc::SIGCHLD)) => {}
            Ok(Event::Signal(signal)) => return ended_by(signal),
            Ok(_) => {}
            // Nobody could tell any more.
            Err(_) => return ExitCode::FAILURE,
        }
    }
}

fn ended_by(signal: libc::c_int) -> ExitCode {
    status_of(Ending::Stopped(StopReason::Signal(signal)), false)
}

fn show(mut started: Vec<Started>, json: bool) -> Result<(), Failure> {
    started.sort_unstable_by_key(|clone| clone.number);
    let text = if json {
        let rows = started.iter().map(|clone| {
            json!({
                "number": clone.number,
                "pid": clone.pid,
                "api_sock": clone.socket,
                "state": clone.state,
            })
        });
        json!(rows.collect::<Vec<_>>()).to_string()
    } else {
        table(&started)
    };
    writeln!(io::stdout(), "{text}").map_err(Failure::Output)
}

fn table(started: &[Started]) -> String {
    let mut text = format!("{:>6}  {:>7}  {:8}  SOCKET", "NUMBER", "PID", "STATE");
    for clone in started {
        text.push_str(&format!(
            "\n{:>6}  {:>7}  {:8}  {}",
            clone.number,
            clone.pid,
            clone.state,
            clone.socket.display()
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_a_line_for_each_clone() {
        let started = [(0, "vm0.sock"), (11, "vm11.sock")].map(|(number, socket)| Started {
            number,
            pid: 4242,
            state: "Running".into(),
            socket: socket.into(),
        });
        let expected = "\
NUMBER      PID  STATE     SOCKET
     0     4242  Running   vm0.sock
    11     4242  Running   vm11.sock";
        assert_eq!(table(&started), expected);
    }
}
