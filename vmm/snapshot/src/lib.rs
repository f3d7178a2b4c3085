// SPDX-License-Identifier: Apache-2.0
//! The files of a snapshot, and nothing of the machine that they are of.
//!
//! A snapshot is two files: the state ([`StateFile`]), small and checked to the last bit, and the
//! memory, which is raw and sparse ([`memory_file`]). Either is written under another name first
//! ([`NewFile`]), so that a crash leaves the old one or the new one.

mod error;
mod layout;
mod state;

pub use error::{StateError, UpgradeError};
pub use layout::{ARCHITECTURE, FORMAT_VERSION};
pub use state::{Saved, Section, StateFile, StateWriter};
