// SPDX-License-Identifier: Apache-2.0
//! What can go wrong with a snapshot. Where Firecracker has words for it that its clients look for,
//! they are these.

use std::io;
use std::path::PathBuf;

use brume_devices::StateError as ChipsetStateError;
use brume_snapshot::{NewFileError, StateError};
use brume_virtio::transport::RestoreError;
use thiserror::Error;
use vm_memory::GuestMemoryError;

use crate::build::BuildError;
use crate::cpu::VcpuRestoreError;
use crate::kvm::{KvmError, VmRestoreError};
use crate::machine::PauseError;
use crate::memory::{MemoryError, UffdError, WorkingSetError};
use crate::overrides::Unknown;

/// A snapshot that cannot be made.
#[derive(Debug, Error)]
pub enum CreateError {
    /// The machine runs.
    #[error(
        "Cannot save the microVM state: Operation not allowed: save/restore unavailable while \
         running"
    )]
    Running,
    /// One is being made already.
    #[error("another snapshot is being made; ask again when that is done")]
    Busy,
    /// A file cannot be made.
    #[error(transparent)]
    File(#[from] NewFileError),
    /// KVM does not show a part of the state.
    #[error("Cannot save the microVM state")]
    Kvm(#[from] KvmError),
    /// A vCPU has ended meanwhile.
    #[error("Cannot save the microVM state: a vCPU has ended")]
    VcpuEnded,
    /// The state has no form in a file.
    #[error("Cannot serialize the microVM state")]
    State(#[from] StateError),
    /// The memory cannot be written.
    #[error("Cannot write memory file {}", path.display())]
    Memory {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The state cannot be written.
    #[error("Cannot perform write on the snapshot backing file {}", path.display())]
    WriteState {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The memory does not come from the program that serves it.
    #[error("Cannot dump memory")]
    Uffd(#[from] UffdError),
    /// The mark cannot be written.
    #[error("the snapshot cannot be marked")]
    Mark(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The host does not tell which pages are in use.
    #[error("Cannot get dirty bitmap: the host does not tell which pages are in use")]
    Pagemap(#[source] io::Error),
    /// The machine has ended meanwhile.
    #[error("the machine has ended before its snapshot was written")]
    Ended,
    /// The machine does not stand still.
    #[error("Cannot save the microVM state")]
    Pause(#[from] PauseError),
}

/// A machine that cannot be made from a snapshot.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The state file is not good.
    #[error(
        "Failed to get snapshot state from file: Failed to load snapshot state from file: \
         {source} ({})",
        path.display()
    )]
    State {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: StateError,
    },
    /// An override for a network interface that is not there.
    #[error(
        "Failed to get snapshot state from file: Unknown Network Device \"{0}\": the snapshot has \
         no such interface"
    )]
    UnknownInterface(String),
    /// An override for the socket device, which is not there.
    #[error("Failed to get snapshot state from file: Unknown Vsock Device")]
    NoVsock,
    /// An override for a drive that is not there.
    #[error("the snapshot has no drive \"{0}\"")]
    UnknownDrive(String),
    /// The memory file cannot be opened.
    #[error(
        "Failed to load guest memory: Error creating guest memory from file: Failed to load guest \
         memory: {source} ({})",
        path.display()
    )]
    OpenMemory {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The memory cannot be mapped.
    #[error("Failed to load guest memory")]
    Memory(#[from] MemoryError),
    /// The memory does not come from the program that is to serve it.
    #[error("Failed to load guest memory: Error creating guest memory from uffd")]
    Uffd(#[from] UffdError),
    /// The pages that are to be read first are not known.
    #[error("Failed to load guest memory")]
    WorkingSet(#[from] WorkingSetError),
    /// The pages that are to be read first cannot be read.
    #[error("Failed to load guest memory: not all of it can be read in")]
    Prefault(#[source] io::Error),
    /// The memory is that of another snapshot.
    #[error(
        "the memory in {} is not the one that was written with this state file, or a diff was not \
         merged into it with `brume rebase BASE DIFF`",
        path.display()
    )]
    OtherMemory {
        /// The file, or the socket of whoever serves it.
        path: PathBuf,
    },
    /// The memory is a diff.
    #[error(
        "the memory in {} is a diff without its base: merge them with `brume rebase BASE DIFF`, and \
         load the base",
        path.display()
    )]
    Unmerged {
        /// The file.
        path: PathBuf,
    },
    /// Two sections that cannot both be so.
    #[error("the state file contradicts itself: {0}")]
    Contradiction(String),
    /// A place in memory that must be there.
    #[error("the guest's memory cannot be read")]
    GuestMemory(#[from] GuestMemoryError),
    /// The machine cannot be built.
    #[error(transparent)]
    Build(Box<BuildError>),
    /// KVM does not take the state of a vCPU.
    #[error("vCPU {index} cannot go on here")]
    Vcpu {
        /// Which.
        index: u8,
        /// Why.
        source: VcpuRestoreError,
    },
    /// KVM does not take the state of the rest.
    #[error("the machine's interrupt controllers and timers cannot go on here")]
    Vm(#[from] VmRestoreError),
    /// A virtio device does not take its state.
    #[error("device \"{name}\" cannot go on here")]
    Device {
        /// Its id, or what it is.
        name: String,
        /// Why.
        source: RestoreError,
    },
    /// The serial port or the keyboard does not take its state.
    #[error("the serial port or the keyboard controller cannot go on")]
    Chipset(#[from] ChipsetStateError),
}

impl From<Unknown> for LoadError {
    fn from(unknown: Unknown) -> Self {
        match unknown {
            Unknown::Interface(id) => Self::UnknownInterface(id),
            Unknown::Vsock => Self::NoVsock,
            Unknown::Drive(id) => Self::UnknownDrive(id),
        }
    }
}

impl From<BuildError> for LoadError {
    fn from(error: BuildError) -> Self {
        Self::Build(Box::new(error))
    }
}
