// SPDX-License-Identifier: Apache-2.0
//! From a configuration to the exit status: what both ways to start a machine share.

use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use brume_api::config::VmConfig;
use brume_vmm::{BuildOptions, Machine};
use event_manager::MutEventSubscriber;

use crate::console::ConsoleInput;
use crate::exit::{Failure, describe, status_of};
use crate::progress::Progress;
use crate::signals::Signals;
use crate::terminal::RawMode;

/// How a machine is run, beside what it is.
pub(crate) struct Launch {
    /// When this began.
    pub(crate) started: Instant,
    /// What to show on a terminal while the guest has not said anything; how it ended is said
    /// there too then.
    pub(crate) progress: Option<String>,
    /// Tells the time since the start for the boot timer, if there is to be one.
    pub(crate) clock: Option<Box<dyn Fn() -> (Duration, Duration) + Send>>,
    /// Whether it is for a client of Firecracker: a triple fault is a way to end a guest then, and
    /// devices are always named on the kernel's command line.
    pub(crate) as_firecracker: bool,
}

impl Launch {
    /// Builds the machine, runs it to its end, and says how to exit.
    ///
    /// # Errors
    ///
    /// The machine cannot be built, or comes to a bad end. The terminal is as it was before.
    pub(crate) fn run(self, config: &VmConfig) -> Result<ExitCode, Failure> {
        // Before the first thread, so that all inherit it.
        let signals = Signals::block().map_err(Failure::Host)?;
        let announces = self.progress.is_some() && io::stderr().is_terminal();
        let progress = Progress::show(self.progress, self.started);
        let options = BuildOptions {
            console: progress.output().map_err(Failure::Host)?,
            clock: self.clock,
            always_name_devices: self.as_firecracker,
        };
        let machine = Machine::build(config, options)?;
        let raw = RawMode::enter().map_err(Failure::Host)?;
        let input = ConsoleInput::new(machine.console(), machine.handle(), raw.is_some());
        let mut subscribers: Vec<Box<dyn MutEventSubscriber>> = vec![
            signals.serve(machine.handle()),
            Box::new(input.map_err(Failure::Host)?),
        ];
        subscribers.extend(progress.ticker().map_err(Failure::Host)?);

        let end = machine.run(subscribers);
        progress.end();
        drop(raw);
        let ending = end?;
        tracing::info!("{}", describe(ending));
        if announces {
            announce(&describe(ending));
        }
        Ok(status_of(ending, self.as_firecracker))
    }
}

#[expect(
    clippy::print_stderr,
    reason = "the person at the terminal wants to know"
)]
fn announce(text: &str) {
    eprintln!("brume: {text}");
}
