// SPDX-License-Identifier: Apache-2.0
//! A machine that moves to another process while its guest runs.
//!
//! What the two sides say to each other, and who may run the guest when, is the `brume-migration`
//! crate's. Here is what carries it out:
//!
//! ```text
//!   source                                          target
//!   owner         migration                         migration                    owner
//!    |--- begins --->| connects, offers --------------->|--- Prepare ------------->| opens, makes
//!    |               | passes over the memory =========>| writes it                |
//!    |<- HandOver ---|                                  |                          |
//!    | pauses        |                                  |                          |
//!    |--- Held ----->| the last pages =================>|                          |
//!    |--- State ---->| state, Sent -------------------->|--- Load ---------------->| takes it on
//!    |               |<------------------------- Ready -|                          |
//!    |               | Commit ------------------------->|                          |
//!    |               |<--------------------- TakenOver -|--- Run ----------------->| guest goes on
//!    |<--- Ended ----|                                  |                          |
//! ```
//!
//! On each side one thread, called `migration`, owns the connection and drives the move; the owner
//! of the machine does what only it can do, when it is asked to by an event. They share memory, the
//! journal of written pages ([`crate::dirty`], behind a lock that is taken for a piece at a time),
//! what a client may change ([`Control`]) and what is told ([`Progress`]).

mod arrivals;
mod control;
mod disks;
mod disks_in;
mod error;
mod following;
mod host_memory;
mod in_use;
mod incoming;
mod lanes;
mod offer;
mod pace;
mod passes;
mod route;
mod sections;
mod serving;
mod source;
mod status;
mod switch_over;
mod target;
mod warm_heap;

pub(crate) use control::Control;
pub(crate) use disks::Disks;
pub(crate) use incoming::{Incoming, IncomingEvent, awaiting};
pub(crate) use offer::Offer;
pub(crate) use route::{Route, load as load_tls};
pub(crate) use sections::MetadataSection;
pub(crate) use source::{Departure, HandOver, SourceEnd, SourceEvent};
pub(crate) use status::Progress;
pub(crate) use target::{Door, Reception};
