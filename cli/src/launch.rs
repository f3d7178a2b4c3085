// SPDX-License-Identifier: Apache-2.0
//! From a configuration to the exit status: what both ways to start a machine share.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, Instant};

use brume_api::config::Logger;
use brume_api::{Fault, LoadSnapshot, ReceiveMigration, Server};
use brume_vmm::{
    BuildOptions, Description, Ending, Instance, Machine, MakeOptions, Outcome, StopReason,
};
use event_manager::MutEventSubscriber;

use crate::args::DEFAULT_BODY_LIMIT;
use crate::clock;
use crate::console::ConsoleInput;
use crate::exit::{Failure, describe, status_of};
use crate::log::RunningLog;
use crate::progress::Progress;
use crate::receive::Arrival;
use crate::signals::Signals;
use crate::terminal::RawMode;

/// Tells the time since the start and the CPU time of this process.
pub(crate) type Clock = Box<dyn Fn() -> (Duration, Duration) + Send>;

/// Makes a clock for the boot timer, if there is to be one.
pub(crate) type MakeClock = Rc<dyn Fn() -> Option<Clock>>;

/// How a machine is run, beside what it is.
pub(crate) struct Launch {
    /// When this began.
    pub(crate) started: Instant,
    /// What to show on a terminal while the guest has not said anything; how it ended is said
    /// there too then.
    pub(crate) progress: Option<String>,
    /// The boot timer's.
    pub(crate) clock: MakeClock,
    /// Whether it is for a client of Firecracker: a triple fault is a way to end a guest then, and
    /// devices are always named on the kernel's command line.
    pub(crate) as_firecracker: bool,
}

/// What a machine is made from.
pub(crate) enum Origin {
    /// Its description.
    Description,
    /// The files of another.
    Snapshot(Box<LoadSnapshot>),
    /// What another process sends.
    Receive(Box<ReceiveMigration>),
}

type Subscribers = Vec<Box<dyn MutEventSubscriber>>;

/// What came of it.
enum Made {
    /// A machine, and what is to be served with it.
    Machine(Box<Machine>, Subscribers),
    /// It was asked to stop first.
    Stopped(StopReason),
}

/// A machine that others may describe and start, by the control API.
pub(crate) struct Remote {
    /// Its name, and what it is made from so far.
    pub(crate) description: Description,
    /// What it is made from at once, and not when a client says so.
    pub(crate) at_once: Option<Origin>,
    pub(crate) server: Server,
    /// The log, if clients may configure it.
    pub(crate) log: Option<RunningLog>,
}

impl Launch {
    /// Makes the machine at once and runs it to its end, with an API at `socket` if there is to be
    /// one.
    ///
    /// # Errors
    ///
    /// As for [`Launch::serve`].
    pub(crate) fn run_with_socket(
        self,
        description: Description,
        origin: Origin,
        socket: Option<&Path>,
    ) -> Result<ExitCode, Failure> {
        let Some(path) = socket else {
            return self.run(description, origin);
        };
        let server = Server::bind(path, DEFAULT_BODY_LIMIT)?;
        let ours = inode_of(path);
        let status = self.serve(Remote {
            description,
            at_once: Some(origin),
            server,
            log: None,
        });
        // A person would wonder what it is for. If it cannot be removed, that is no reason to end
        // otherwise; and it may have gone, and be another's.
        if ours.is_some() && inode_of(path) == ours {
            let _ = fs::remove_file(path);
        }
        status
    }

    /// Makes the machine, runs it to its end, and says how to exit.
    ///
    /// # Errors
    ///
    /// The machine cannot be made, or comes to a bad end. The terminal is as it was before.
    pub(crate) fn run(self, description: Description, origin: Origin) -> Result<ExitCode, Failure> {
        // Before the first thread, so that all inherit it.
        let signals = Signals::block().map_err(Failure::Host)?;
        let progress = Progress::show(self.progress.clone(), self.started);
        let options = self.make_options(progress.clone());
        let instance = Instance::new(description, options, Box::new(|_| Ok(())))?;
        let signals = signals.serve(instance.handle());
        match make(instance, Some(origin), vec![signals], &progress)? {
            Made::Machine(machine, subscribers) => {
                self.run_machine(*machine, subscribers, &progress)
            }
            Made::Stopped(reason) => Ok(end(Ending::Stopped(reason), self.as_firecracker)),
        }
    }

    /// Serves the API, builds the machine when it is told to, and runs it to its end.
    ///
    /// # Errors
    ///
    /// As for [`Launch::run`], or there is no server.
    pub(crate) fn serve(self, remote: Remote) -> Result<ExitCode, Failure> {
        let signals = Signals::block().map_err(Failure::Host)?;
        let progress = Progress::show(self.progress.clone(), self.started);
        let log = remote.log;
        let set_logger = move |logger: &Logger| {
            let result = log.as_ref().map_or(Ok(()), |log| log.set(logger));
            result.map_err(|failure| match &failure {
                // The words that Firecracker's clients look for.
                Failure::Log { path, source } => Fault::new(format!(
                    "Logger error: Failed to open target file: {source} ({path})"
                )),
                _ => Fault::new(failure.text()),
            })
        };
        let options = self.make_options(progress.clone());
        let mut instance = Instance::new(remote.description, options, Box::new(set_logger))?;
        // Until the last answer and the last events are out.
        let _serving = remote.server.spawn(
            Box::new(instance.controller()),
            instance.events(),
            instance.api_metrics(),
        )?;
        instance.started_up(self.started.elapsed(), clock::process_cpu());
        let signals = signals.serve(instance.handle());
        let made = make(instance, remote.at_once, vec![signals], &progress)?;
        let (machine, subscribers) = match made {
            Made::Machine(machine, subscribers) => (*machine, subscribers),
            Made::Stopped(reason) => {
                return Ok(end(Ending::Stopped(reason), self.as_firecracker));
            }
        };
        self.run_machine(machine, subscribers, &progress)
    }

    fn make_options(&self, progress: Progress) -> MakeOptions {
        let (clock, always_name_devices) = (self.clock.clone(), self.as_firecracker);
        Box::new(move || {
            Ok(BuildOptions {
                console: progress.output()?,
                clock: clock(),
                always_name_devices,
            })
        })
    }

    fn run_machine(
        &self,
        machine: Machine,
        mut subscribers: Subscribers,
        progress: &Progress,
    ) -> Result<ExitCode, Failure> {
        let announces = self.progress.is_some() && io::stderr().is_terminal();
        let mut raw = None;
        if let Some(console) = machine.console() {
            raw = RawMode::enter().map_err(Failure::Host)?;
            let input = ConsoleInput::new(console, machine.handle(), raw.is_some());
            subscribers.push(Box::new(input.map_err(Failure::Host)?));
        }
        if raw.is_some() {
            progress.in_console();
        }
        subscribers.extend(progress.ticker().map_err(Failure::Host)?);

        let ending = machine.run(subscribers);
        progress.end();
        drop(raw);
        let ending = ending?;
        let status = end(ending, self.as_firecracker);
        if announces {
            announce(&describe(ending));
        }
        Ok(status)
    }
}

/// Makes the machine of `origin`, or waits for one: that which comes from elsewhere, or which a
/// client of the API describes or loads.
fn make(
    mut instance: Instance,
    origin: Option<Origin>,
    mut subscribers: Subscribers,
    progress: &Progress,
) -> Result<Made, Failure> {
    let at_once = |machine, subscribers| Ok(Made::Machine(Box::new(machine), subscribers));
    match origin {
        Some(Origin::Description) => return at_once(instance.build()?, subscribers),
        Some(Origin::Snapshot(load)) => return at_once(instance.restore(&load)?, subscribers),
        Some(Origin::Receive(request)) => {
            instance.receive_only(&request).map_err(Failure::Receive)?;
            let controller = Box::new(instance.controller());
            let arrival = Arrival::watch(controller, progress.clone(), &request.listen);
            subscribers.push(Box::new(arrival.map_err(Failure::Host)?));
        }
        None => {}
    }
    let (outcome, subscribers) = instance.wait_for_start(subscribers)?;
    if !matches!(outcome, Outcome::Machine(_)) {
        progress.end();
    }
    match outcome {
        Outcome::Machine(machine) => Ok(Made::Machine(machine, subscribers)),
        Outcome::Stopped(reason) => Ok(Made::Stopped(reason)),
        Outcome::LoadFailed(error) => Err(error.into()),
        Outcome::NotReceived(why) => Err(Failure::Receive(Fault::new(why))),
    }
}

/// What the file at `path` is known by.
fn inode_of(path: &Path) -> Option<(u64, u64)> {
    let found = path.symlink_metadata().ok()?;
    Some((found.dev(), found.ino()))
}

/// Tells the log of an orderly end, and the process how to exit.
fn end(ending: Ending, as_firecracker: bool) -> ExitCode {
    tracing::info!("{}", describe(ending));
    status_of(ending, as_firecracker)
}

/// Tells the person at the terminal, who may have gone.
fn announce(text: &str) {
    let _ = writeln!(io::stderr(), "brume: {text}");
}
