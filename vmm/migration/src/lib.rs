// SPDX-License-Identifier: Apache-2.0
//! What two processes say to each other when a machine moves between them: messages, frames,
//! connections, and the hand-over. Nothing here knows a machine: pages are numbers with bytes, a
//! state is a piece of text.
//!
//! ```text
//!  source                                                    target
//!    Hello, purpose Control   --------------------------------->
//!    <------------------------------------------------- Welcome
//!    Offer                    --------------------------------->  can it run here?
//!    (the file of its memory, on a unix socket; then no pages are sent)
//!    <------------------------------------ Accepted, or Refused
//!    (further connections: Hello, Welcome)
//!    (with disks: Disk ...; DisksEnded; DisksTaken, until little of them is left)
//!    Pages ...; PassEnded     ================================>
//!    <------------------------------------------------ PassTaken   and so on, pass by pass
//!    (memory follows: Missing ...; Stale)  -------------------->  what has come of it is forgotten
//!    <------------------------------------------------ Forgotten
//!    -- the guest is paused --
//!    (with disks: Disk ...; DisksEnded)
//!    Pages ...; (Missing ...;) State; Sent  ==================>  all of it is taken on
//!    <---------------------------------------------------- Ready
//!    Commit                   --------------------------------->  from here on it is the target's
//!    <------------------------------------------------- TakenOver  sent before the guest goes on
//!    <--------------------------------------------------- Running
//!    (memory follows: Pages ...; MemorySent; on a connection of its own, Need and Pages)
//!    <-------------------------------------------------- Complete
//! ```
//!
//! Until it has sent `Commit` the source may go on with the guest at any time, after it has said
//! `Cancel`. The target goes on with it only after `Commit`, or once it is ready and the source's
//! process has ended, or somebody has decided. What becomes of the machine when a connection is lost: [`SourceState`],
//! [`TargetState`].

mod address;
mod channel;
mod compress;
mod frame;
mod handover;
mod host;
mod link;
mod listener;
mod message;
mod options;
mod pages;
mod rate_limit;
mod socket;
mod state;
mod tls;

pub use address::{Address, AddressError};
pub use channel::{Channel, ChannelError, Received};
pub use compress::Choice;
pub use handover::{
    Decision, Refusal, Source, SourceAction, SourceEvent, SourceState, Target, TargetAction,
    TargetEvent, TargetState,
};
pub use link::{Closer, Link, LinkError};
pub use listener::{Listener, Stopper};
pub use message::{Hello, Message, Purpose, Session, Standing};
pub use pages::{MOST_PAGES, PAGE, PageBatch, PagesIn, Run, Zeros};
pub use rate_limit::RateLimit;
pub use state::{MOST_STATE, StateParts};
pub use tls::{Tls, TlsError, TlsFiles};

/// The newest version of what is said here.
pub const PROTOCOL: u32 = 3;
/// The oldest version that is understood.
pub const OLDEST_PROTOCOL: u32 = 3;
