// SPDX-License-Identifier: Apache-2.0
//! How the program ends: statuses, and the one place where an error is printed.
//!
//! Where Firecracker has a status for it, it is Firecracker's.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use brume_api::config::{ConfigError, ConfigFileError};
use brume_api::{ClientError, Fault, ServerError, with_causes};
use brume_snapshot::{RebaseError, StateError};
use brume_vmm::{BuildError, Ending, KvmError, LoadError, RunError, StopReason, VcpuFailure};
use thiserror::Error;

/// What is told about exit statuses in the help.
pub(crate) const STATUS_HELP: &str = "\
Exit status:
    0  the guest powered off or restarted, a client of the API ended it, or it has moved to
       another process
    1  the host failed: no memory, threads or file descriptors, KVM refused a call, or the
       socket of the API cannot be made; or a file of a snapshot is bad or cannot be written;
       or a machine could not be moved, or was lost with the process that it had moved to
    3  /dev/kvm is not there or cannot be used
    4  the guest shut down by a triple fault (0 with Firecracker's flags, as it has it)
    5  KVM failed inside, most often at an instruction it cannot emulate
    6  the processor refused to enter the guest
    7  a vCPU failed in another way
    8  brume ctl, snapshot and clone: the machine refused, or none answers at the socket
  130  ended from the keyboard (Ctrl-A x) or by SIGINT
  143  ended by SIGTERM
  152  the configuration is bad: a value, a kernel, a disk or a network interface
  153  the command line is bad
  156  ended by SIGHUP";

const HOST_FAILURE: u8 = 1;
const NO_KVM: u8 = 3;
const TRIPLE_FAULT: u8 = 4;
const KVM_INTERNAL: u8 = 5;
const FAILED_ENTRY: u8 = 6;
const VCPU_FAILURE: u8 = 7;
const INTERRUPTED: u8 = 130;
const TERMINATED: u8 = 143;
const BAD_CONFIGURATION: u8 = 152;
/// The command line is bad.
pub(crate) const BAD_ARGUMENTS: u8 = 153;
const NO_ANSWER: u8 = 8;
const HUNG_UP: u8 = 156;

/// Why there was no machine, or why it came to a bad end.
#[derive(Debug, Error)]
pub(crate) enum Failure {
    #[error(transparent)]
    ConfigFile(#[from] ConfigFileError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("{0}")]
    Arguments(String),
    #[error("the path {} cannot be used", path.display())]
    Folder { path: PathBuf, source: io::Error },
    #[error("{} exists already: remove it if no machine uses it", .0.display())]
    Taken(PathBuf),
    #[error("clone {number}")]
    Clone { number: u32, source: Box<Failure> },
    #[error("it ended {how}")]
    Ended { how: String },
    #[error("the log cannot be written to {path}")]
    Log { path: String, source: io::Error },
    #[error("the terminal and signals cannot be set up")]
    Host(#[source] io::Error),
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("the answer cannot be printed")]
    Output(#[source] io::Error),
    #[error("the state file {} cannot be used", path.display())]
    State { path: PathBuf, source: StateError },
    #[error(transparent)]
    Rebase(#[from] RebaseError),
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error("the snapshot cannot be loaded")]
    Load(#[from] LoadError),
    #[error("no machine can be received")]
    Receive(#[source] Fault),
    #[error("{0}")]
    NotMoved(String),
    #[error(transparent)]
    Run(#[from] RunError),
}

impl Failure {
    fn status(&self) -> u8 {
        match self {
            Self::Folder { .. } | Self::Taken(_) | Self::Ended { .. } => HOST_FAILURE,
            Self::Clone { source, .. } => source.status(),
            Self::ConfigFile(_) | Self::Config(_) | Self::Log { .. } => BAD_CONFIGURATION,
            Self::Arguments(_) => BAD_ARGUMENTS,
            Self::Build(error) if is_kvm_missing(error) => NO_KVM,
            Self::Build(error) if error.is_host_failure() => HOST_FAILURE,
            Self::Build(_) => BAD_CONFIGURATION,
            Self::Run(RunError::Vcpu(VcpuFailure::Internal { .. })) => KVM_INTERNAL,
            Self::Run(RunError::Vcpu(VcpuFailure::Entry { .. })) => FAILED_ENTRY,
            Self::Run(RunError::Vcpu(_)) => VCPU_FAILURE,
            Self::Client(_) => NO_ANSWER,
            Self::Load(LoadError::Build(error)) if is_kvm_missing(error) => NO_KVM,
            Self::Output(_)
            | Self::Host(_)
            | Self::Server(_)
            | Self::Load(_)
            | Self::Receive(_)
            | Self::NotMoved(_)
            | Self::Run(_)
            | Self::State { .. }
            | Self::Rebase(_) => HOST_FAILURE,
        }
    }

    /// The error with all its causes, on one line unless it has a report.
    pub(crate) fn text(&self) -> String {
        let text = with_causes(self);
        match self {
            Self::Run(_) => text,
            // What is in a file that was named cannot make lines of its own.
            _ => text.replace('\n', "\\n"),
        }
    }

    /// Prints the error and says how to exit.
    pub(crate) fn report(&self) -> ExitCode {
        // The status tells it too, if nobody reads this any more.
        let _ = writeln!(io::stderr(), "brume: {}", self.text());
        ExitCode::from(self.status())
    }
}

fn is_kvm_missing(error: &BuildError) -> bool {
    matches!(
        error,
        BuildError::Kvm(KvmError::Open { .. } | KvmError::Version(_))
    )
}

/// The exit status for a machine that came to an orderly end.
pub(crate) fn status_of(ending: Ending, triple_fault_is_orderly: bool) -> ExitCode {
    ExitCode::from(match ending {
        Ending::PowerOff | Ending::Reset | Ending::Moved | Ending::Stopped(StopReason::Api) => 0,
        Ending::Shutdown if triple_fault_is_orderly => 0,
        Ending::Lost => HOST_FAILURE,
        Ending::Shutdown => TRIPLE_FAULT,
        Ending::Stopped(StopReason::Console | StopReason::Signal(libc::SIGINT)) => INTERRUPTED,
        Ending::Stopped(StopReason::Signal(libc::SIGHUP)) => HUNG_UP,
        Ending::Stopped(StopReason::Signal(_)) => TERMINATED,
    })
}

/// What is said about an orderly end.
pub(crate) fn describe(ending: Ending) -> String {
    match ending {
        Ending::PowerOff => "the guest powered off".into(),
        Ending::Reset => "the guest restarted".into(),
        Ending::Moved => "the guest runs in another process now".into(),
        Ending::Lost => {
            "the guest is lost: it was given up, or the process that it had moved to has ended"
                .into()
        }
        Ending::Shutdown => "the guest shut down by a triple fault".into(),
        Ending::Stopped(StopReason::Console) => "ended from the keyboard".into(),
        Ending::Stopped(StopReason::Api) => "ended by the API".into(),
        Ending::Stopped(StopReason::Signal(number)) => format!("ended by signal {number}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_help_lists_every_status() {
        for status in [
            0,
            HOST_FAILURE,
            NO_KVM,
            TRIPLE_FAULT,
            KVM_INTERNAL,
            FAILED_ENTRY,
            VCPU_FAILURE,
            INTERRUPTED,
            TERMINATED,
            BAD_CONFIGURATION,
            BAD_ARGUMENTS,
            HUNG_UP,
        ] {
            assert!(
                STATUS_HELP
                    .lines()
                    .any(|line| line.starts_with(&format!("{status:>5}  ")))
            );
        }
    }
}
