// SPDX-License-Identifier: Apache-2.0
//! The microVM metadata service (MMDS), as Firecracker has it: a JSON document that the host sets
//! by the control API and that the guest reads over HTTP at a link-local address.
//!
//! ```text
//!   control API --PUT, PATCH, GET--> Mmds (data, tokens) <--lock-- http <-- Stack <--> frames
//! ```
//!
//! Nothing of it touches the host's network. A network device gives the frames that are for the
//! service to its [`Stack`] and puts the stack's frames into the guest's receive queue. There are
//! no threads and no file descriptors here: whoever owns a stack calls it when a frame has arrived
//! and when [`Stack::due`] says so. The one lock, around the [`Mmds`], is held for one request at
//! a time, and no other is taken under it.

#![forbid(unsafe_code)]

mod connection;
mod counts;
mod http;
mod port;
mod respond;
mod stack;
mod store;
mod token;

use std::sync::{Arc, Mutex};

pub use counts::MmdsCounts;
pub use stack::{MAX_FRAME, Stack, StackConfig, StackError};
pub use store::{Mmds, MmdsError};

/// The data and the tokens, between the control API and the stacks of all interfaces.
pub type SharedMmds = Arc<Mutex<Mmds>>;
