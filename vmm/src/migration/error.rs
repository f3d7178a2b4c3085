// SPDX-License-Identifier: Apache-2.0
//! What can go wrong with a move.

use std::io;

use brume_migration::{ChannelError, LinkError, TlsError};
use thiserror::Error;

use super::lanes::LaneError;
use crate::kvm::KvmError;
use crate::memory::UffdError;

/// A machine that has not moved.
#[derive(Debug, Error)]
pub(crate) enum SourceError {
    /// The target is not there.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The target is not who it should be, or does not take us for who we are.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The connection does not do what it should.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The target does not want the machine.
    #[error("the machine cannot run at the target: {}", .0.join("; "))]
    Refused(Vec<String>),
    /// The target had trouble.
    #[error("the target cannot go on with it: {0}")]
    Target(String),
    /// It was called off.
    #[error("it was called off")]
    Cancelled,
    /// It took too long.
    #[error(
        "it did not come to an end in time: allow more of it, or more bandwidth; for a guest that \
         writes faster than the connection carries, a longer downtime or auto_converge, or let its \
         memory follow it"
    )]
    TooSlow,
    /// The target lives, and what it lacks has to be asked from it.
    #[error("a connection broke that carried memory which follows the guest")]
    FollowsAnew,
    /// The target does not answer.
    #[error("the target does not answer")]
    Silent,
    /// KVM does not tell what was written.
    #[error("the pages that the guest writes cannot be noted")]
    Log(#[from] KvmError),
    /// The memory does not come from the program that serves it.
    #[error("the guest's memory cannot be read")]
    Uffd(#[from] UffdError),
    /// The memory cannot be searched.
    #[error("the host does not tell which pages are in use")]
    Search(#[source] io::Error),
    /// A disk that is to move along cannot be read.
    #[error("drive \"{id}\" cannot be read")]
    Disk {
        /// The drive.
        id: String,
        /// What the host said.
        source: io::Error,
    },
    /// The host gives no thread.
    #[error("the host gives no thread")]
    Thread(#[source] io::Error),
    /// The machine could not be stopped, or its state not be taken.
    #[error("the machine cannot be handed over: {0}")]
    HandOver(String),
    /// The machine has ended meanwhile.
    #[error("the machine has ended")]
    Ended,
}

impl From<LaneError> for SourceError {
    fn from(error: LaneError) -> Self {
        match error {
            LaneError::Channel(error) => Self::Channel(error),
            LaneError::Memory(error) => Self::Search(error),
            LaneError::Cancelled => Self::Cancelled,
            LaneError::TooSlow => Self::TooSlow,
            LaneError::Ended => Self::Ended,
        }
    }
}
