// SPDX-License-Identifier: Apache-2.0
//! The files of a snapshot, and nothing of the machine that they are of.
//!
//! A snapshot is two files: the state ([`StateFile`]), small and checked to the last bit, and the
//! memory, which is raw and sparse ([`memory_file`]). Either is written under another name first
//! ([`NewFile`]), so that a crash leaves the old one or the new one.

mod error;
mod host;
mod inspect;
mod layout;
pub mod memory_file;
mod new_file;
mod rebase;
mod state;

pub use error::{StateError, UpgradeError};
pub use inspect::Inspection;
pub use layout::{ARCHITECTURE, FORMAT_VERSION};
pub use new_file::{NewFile, NewFileError, commit_pair, left_behind};
pub use rebase::{MARK_PAGE, RebaseError, RebaseSummary, rebase, rebase_to};
pub use state::{Saved, Section, StateFile, StateWriter};
