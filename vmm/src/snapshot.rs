// SPDX-License-Identifier: Apache-2.0
//! A machine written to files, and made from them again.
//!
//! ```text
//!   paused machine --create--> state file:  machine, memory, kvm, vcpu 0..n, virtio 0..n, ...
//!                              memory file: all regions, one after the other, sparse
//!   both files --restore--> paused machine, whose memory is mapped from the file as it is touched
//! ```
//!
//! The two files belong together: each snapshot writes a mark of its own into a page of the guest's
//! memory that is the firmware's, and into the state file; see `mark.rs`.

mod create;
mod error;
mod hex;
mod machine_state;
mod mark;
mod memory_file;
mod prepared;
mod raw;
mod restore;
mod sections;

pub(crate) use create::{Writer, pages_in_use};
pub use error::{CreateError, LoadError};
pub(crate) use hex::{Hex, by_number};
pub(crate) use machine_state::{MachineState, Paused};
pub(crate) use prepared::{GoOn, Identity, Prepared};
pub(crate) use raw::Raw;
pub(crate) use sections::VirtioSection;
