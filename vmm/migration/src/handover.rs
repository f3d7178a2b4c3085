// SPDX-License-Identifier: Apache-2.0
//! The hand-over: who may run the guest, at every moment and after every failure. Two state machines
//! without I/O and without a clock; the threads that own the connections feed them events, and carry
//! out the actions that they return, in order and before the next event.
//!
//! ```text
//!  Source                                        (any failure, cancel or timeout before Commit)
//!    Sending --AllSent--> Offered --Ready: Commit--> Committed ------TakenOver----> Gone
//!       |                    |                        |  |  ^              \
//!       +--------------------+--: Cancel, resume      |  |  |               +-----> Serving
//!                            v                        |  |  |    (memory follows)      | Complete
//!                          Kept <--Closed, Failed-----+  |  |                          v
//!                            ^                           |  | WaitsForCommit:         Gone
//!                            |           Lost, TimedOut  |  | Commit
//!                            |                           v  |
//!                            +--Decision(Run)-- InDoubt --Returned--> Asking --HasTakenOver--> Gone
//!                            +--------------------HasDropped------------+
//!
//!  Target
//!    Receiving --StateLoaded: Ready--> Loaded --Commit: TakenOver, run--> Running
//!        |                              | |  \                              ^  ^
//!        | any end, Cancel,             | |   +--Closed: run----------------+  |
//!        | LoadFailed                   | |                                    |
//!        v                              | +--Lost--> InDoubt --Decision(Run)---+
//!     Dropped <--Cancel, LoadFailed-----+            |     ^                   |
//!        ^                                  Returned |     | Lost, Closed      |
//!        |                                           v     |                   |
//!        +--Cancel, LoadFailed---------------------- Asked --Commit: TakenOver-+
//! ```
//!
//! What a person gives up, and what a peer says that it never should, are left out.
//!
//! # Why two never run
//!
//! The source resumes the guest only if no `Commit` was sent, or if it knows that the target did
//! not and will not take it over. The target writes `TakenOver` before its guest runs, so a
//! connection that came to its end in order without it says that the guest never ran there. A
//! connection that was lost says nothing: then neither side runs a guest that the other may have,
//! until they have found each other again, or a person has decided.
//!
//! A source that lives never closes its connection to a target that may be [`TargetState::Loaded`]
//! without a `Cancel` before. So an end in order without one tells the target that the source's
//! process has ended with the guest paused, and the target, which has everything, goes on with it.
//! That holds only for the first connection: a source that comes back may have resumed in between.
//!
//! # What is asked of who drives them
//!
//! - *Closed* is an end after which everything that the peer had written has been read, in whole
//!   messages, and that only the peer can have made: end of file on a Unix socket, or a reset once
//!   all is read, for it only says that the peer left something unread; `close_notify` under TLS.
//!   Whatever else ends a connection is *Lost*. So is end of file on plain TCP: a relay between
//!   both sides that is ended says it to both of them, while both live.
//!   After an error in writing, what the peer had written is read first.
//! - A connection is reset, not closed, if `Cancel` could not be written to it in full.
//! - [`SourceEvent::AllSent`] comes when the guest is paused and before `Sent` is written.
//! - The target reads nothing between `Sent` and [`TargetEvent::StateLoaded`]. What can still fail
//!   before its guest runs (locks of disks) is done when `Commit`, or the end of the connection, is
//!   read; if it fails, [`TargetEvent::LoadFailed`] takes the event's place.
//! - `TakenOver` is written before the guest runs. If the connection has failed by then the guest
//!   runs all the same: a failed connection does not come to an end in order for the source.
//! - Once a new connection has come, nothing is read from the ones before it.

#[cfg(test)]
mod model;
mod source;
mod target;

pub use source::{Source, SourceAction, SourceEvent, SourceState};
pub use target::{Target, TargetAction, TargetEvent, TargetState};

/// What a person says who knows what became of the other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Decision {
    /// The guest shall run on this side: it does not run on the other one.
    Run,
    /// The guest shall not run on this side.
    Abandon,
}

/// Why something that was asked for is not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    /// The target may have the guest.
    #[error("the machine has been committed to the target and cannot be called back")]
    Committed,
    /// The target has the guest.
    #[error("the machine is the target's")]
    HandedOver,
    /// The other side is connected, and its answer decides.
    #[error("there is nothing to decide: the other side is connected and its word is awaited")]
    Connected,
    /// It is settled already.
    #[error("there is nothing to decide: it is known which side has the machine")]
    Settled,
    /// Part of the guest's memory never came.
    #[error("the machine cannot run here: part of its memory is still at the source")]
    MemoryMissing,
}
