// SPDX-License-Identifier: Apache-2.0
//! The source's side of the hand-over: when it may resume the guest, and when it never may again.

use super::{Decision, Refusal};
use crate::{Message, Standing};

/// Where the source stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceState {
    /// Memory is on its way; the guest may run.
    Sending,
    /// The guest is paused and everything was sent. Waits for `Ready`.
    Offered,
    /// `Commit` was sent. Waits for `TakenOver`.
    Committed,
    /// `Commit` was sent, and the connection is lost. The guest may not run.
    InDoubt,
    /// As [`Self::InDoubt`], with a new connection. Waits for the target's `Standing`.
    Asking,
    /// The guest is the target's, which still asks for its memory.
    Serving,
    /// The guest is the target's, or was given up. It never runs here again.
    Gone,
    /// The guest is the source's and runs (unless it had been paused by its user).
    Kept,
}

/// What happens to the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceEvent {
    /// The guest is paused, and what the target needs before it can run the guest was written.
    AllSent {
        /// Whether memory is left that the target gets when its guest runs (post-copy).
        memory_follows: bool,
    },
    /// [`Message::Ready`].
    Ready,
    /// [`Message::TakenOver`], or [`Message::Running`], which says no less.
    TakenOver,
    /// [`Message::Complete`].
    Complete,
    /// [`Message::Failed`].
    Failed,
    /// [`Message::Standing`].
    Standing(Standing),
    /// A message that a target never sends, or one that cannot be read.
    Unexpected,
    /// The connection came to its end in order.
    LinkClosed,
    /// The connection failed in any other way.
    LinkLost,
    /// What is awaited takes too long.
    TimedOut,
    /// The user wants the guest to stay.
    CancelRequested,
    /// A new connection was made, and nothing has been said on it but `Hello` and `Welcome`.
    Returned,
    /// A person decided.
    Decision(Decision),
}

impl SourceEvent {
    /// What a message from the target means here; `None` for those of other parts of the protocol.
    #[must_use]
    pub fn of(message: &Message) -> Option<Self> {
        match message {
            Message::Ready { .. } => Some(Self::Ready),
            Message::TakenOver | Message::Running { .. } => Some(Self::TakenOver),
            Message::Complete => Some(Self::Complete),
            Message::Failed { .. } => Some(Self::Failed),
            Message::Standing(standing) => Some(Self::Standing(*standing)),
            Message::Commit
            | Message::Cancel { .. }
            | Message::Sent { .. }
            | Message::MemorySent
            | Message::PassEnded { .. }
            | Message::Stale
            | Message::DisksEnded { .. }
            | Message::Offer(_)
            | Message::Hello(_) => Some(Self::Unexpected),
            Message::Welcome { .. }
            | Message::Refused { .. }
            | Message::Accepted(_)
            | Message::PassTaken { .. }
            | Message::Forgotten
            | Message::DisksTaken
            | Message::KeepAlive => None,
        }
    }
}

/// What the source is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceAction {
    /// Write [`Message::Commit`].
    SendCommit,
    /// Write [`Message::Cancel`], if there is a connection.
    SendCancel,
    /// Let the guest run again, if it ran before the move.
    ResumeGuest,
    /// Pause the guest, for good: the target runs it.
    StopGuest,
    /// Leave the connection there is, and make a new one (`Purpose::Return`). In
    /// [`SourceState::Kept`] it only serves to let the target forget, and may be given up soon.
    Reconnect,
    /// Tell who asked that it is not done.
    Refuse(Refusal),
}

/// The source's side of the hand-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    pub(super) state: SourceState,
    memory_follows: bool,
}

impl Default for Source {
    fn default() -> Self {
        Self::new()
    }
}

impl Source {
    /// A source that starts to send.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            state: SourceState::Sending,
            memory_follows: false,
        }
    }

    /// Where it stands.
    #[must_use]
    pub const fn state(&self) -> SourceState {
        self.state
    }

    /// Takes an event; the actions are carried out in their order, before the next event.
    pub fn step(&mut self, event: SourceEvent) -> &'static [SourceAction] {
        match self.state {
            SourceState::Sending => self.sending(event),
            SourceState::Offered => self.offered(event),
            SourceState::Committed => self.committed(event),
            SourceState::InDoubt | SourceState::Asking => self.in_doubt(event),
            SourceState::Serving => self.serving(event),
            SourceState::Gone => Self::gone(event),
            SourceState::Kept => self.kept(event),
        }
    }

    const fn to(
        &mut self,
        state: SourceState,
        actions: &'static [SourceAction],
    ) -> &'static [SourceAction] {
        self.state = state;
        actions
    }

    const fn taken_over(&mut self) -> &'static [SourceAction] {
        let state = if self.memory_follows {
            SourceState::Serving
        } else {
            SourceState::Gone
        };
        self.to(state, &[])
    }

    fn sending(&mut self, event: SourceEvent) -> &'static [SourceAction] {
        use SourceAction::{Refuse, ResumeGuest, SendCancel};
        match event {
            SourceEvent::AllSent { memory_follows } => {
                self.memory_follows = memory_follows;
                self.to(SourceState::Offered, &[])
            }
            SourceEvent::Returned => &[],
            SourceEvent::Decision(_) => &[Refuse(Refusal::Connected)],
            // The target has not got all: it drops what it has at the end of the connection, too.
            SourceEvent::LinkClosed | SourceEvent::LinkLost => {
                self.to(SourceState::Kept, &[ResumeGuest])
            }
            SourceEvent::Ready
            | SourceEvent::TakenOver
            | SourceEvent::Complete
            | SourceEvent::Failed
            | SourceEvent::Standing(_)
            | SourceEvent::Unexpected
            | SourceEvent::TimedOut
            | SourceEvent::CancelRequested => {
                self.to(SourceState::Kept, &[SendCancel, ResumeGuest])
            }
        }
    }

    fn offered(&mut self, event: SourceEvent) -> &'static [SourceAction] {
        use SourceAction::{Reconnect, Refuse, ResumeGuest, SendCancel, SendCommit};
        match event {
            SourceEvent::Ready => self.to(SourceState::Committed, &[SendCommit]),
            SourceEvent::LinkLost => self.to(SourceState::Kept, &[ResumeGuest, Reconnect]),
            SourceEvent::LinkClosed => self.to(SourceState::Kept, &[ResumeGuest]),
            // It was not asked to. But if it runs, the guest must not run here.
            SourceEvent::TakenOver | SourceEvent::Standing(Standing::HasTakenOver) => {
                self.taken_over()
            }
            SourceEvent::Complete => self.to(SourceState::Gone, &[]),
            SourceEvent::Failed
            | SourceEvent::Standing(Standing::WaitsForCommit | Standing::HasDropped)
            | SourceEvent::Unexpected
            | SourceEvent::CancelRequested => {
                self.to(SourceState::Kept, &[SendCancel, ResumeGuest])
            }
            // A target that does not answer may not hear either, and would wait for a word.
            SourceEvent::TimedOut => {
                self.to(SourceState::Kept, &[SendCancel, ResumeGuest, Reconnect])
            }
            SourceEvent::Decision(_) => &[Refuse(Refusal::Connected)],
            SourceEvent::AllSent { .. } | SourceEvent::Returned => &[],
        }
    }

    fn committed(&mut self, event: SourceEvent) -> &'static [SourceAction] {
        use SourceAction::{Reconnect, Refuse, ResumeGuest};
        match event {
            SourceEvent::TakenOver | SourceEvent::Standing(Standing::HasTakenOver) => {
                self.taken_over()
            }
            SourceEvent::Complete => self.to(SourceState::Gone, &[]),
            // It says, or its end does, that its guest did not and will not run.
            SourceEvent::Failed
            | SourceEvent::Standing(Standing::HasDropped)
            | SourceEvent::LinkClosed => self.to(SourceState::Kept, &[ResumeGuest]),
            SourceEvent::LinkLost | SourceEvent::TimedOut | SourceEvent::Unexpected => {
                self.to(SourceState::InDoubt, &[Reconnect])
            }
            SourceEvent::CancelRequested => &[Refuse(Refusal::Committed)],
            SourceEvent::Decision(_) => &[Refuse(Refusal::Connected)],
            SourceEvent::AllSent { .. }
            | SourceEvent::Ready
            | SourceEvent::Standing(Standing::WaitsForCommit)
            | SourceEvent::Returned => &[],
        }
    }

    fn in_doubt(&mut self, event: SourceEvent) -> &'static [SourceAction] {
        use SourceAction::{Reconnect, Refuse, ResumeGuest, SendCommit};
        match event {
            SourceEvent::Returned => self.to(SourceState::Asking, &[]),
            SourceEvent::Standing(Standing::WaitsForCommit) => {
                self.to(SourceState::Committed, &[SendCommit])
            }
            SourceEvent::TakenOver | SourceEvent::Standing(Standing::HasTakenOver) => {
                self.taken_over()
            }
            SourceEvent::Complete => self.to(SourceState::Gone, &[]),
            SourceEvent::Failed | SourceEvent::Standing(Standing::HasDropped) => {
                self.to(SourceState::Kept, &[ResumeGuest])
            }
            // Closed says nothing here: `TakenOver` may have been lost with a connection before.
            SourceEvent::LinkClosed
            | SourceEvent::LinkLost
            | SourceEvent::TimedOut
            | SourceEvent::Unexpected => self.to(SourceState::InDoubt, &[Reconnect]),
            SourceEvent::CancelRequested => &[Refuse(Refusal::Committed)],
            SourceEvent::Decision(_) if self.state == SourceState::Asking => {
                &[Refuse(Refusal::Connected)]
            }
            SourceEvent::Decision(Decision::Run) => {
                self.to(SourceState::Kept, &[ResumeGuest, Reconnect])
            }
            SourceEvent::Decision(Decision::Abandon) => self.to(SourceState::Gone, &[]),
            SourceEvent::AllSent { .. } | SourceEvent::Ready => &[],
        }
    }

    const fn serving(&mut self, event: SourceEvent) -> &'static [SourceAction] {
        use SourceAction::{Reconnect, Refuse};
        match event {
            // An end in order without `Complete` is the end of the target, and so of the guest.
            SourceEvent::Complete
            | SourceEvent::LinkClosed
            | SourceEvent::Failed
            | SourceEvent::Standing(Standing::HasDropped)
            | SourceEvent::Decision(Decision::Abandon) => self.to(SourceState::Gone, &[]),
            SourceEvent::LinkLost | SourceEvent::TimedOut | SourceEvent::Unexpected => &[Reconnect],
            SourceEvent::CancelRequested | SourceEvent::Decision(Decision::Run) => {
                &[Refuse(Refusal::HandedOver)]
            }
            SourceEvent::AllSent { .. }
            | SourceEvent::Ready
            | SourceEvent::TakenOver
            | SourceEvent::Standing(Standing::WaitsForCommit | Standing::HasTakenOver)
            | SourceEvent::Returned => &[],
        }
    }

    const fn gone(event: SourceEvent) -> &'static [SourceAction] {
        use SourceAction::{Refuse, SendCommit};
        match event {
            SourceEvent::Standing(Standing::WaitsForCommit) => &[SendCommit],
            SourceEvent::CancelRequested | SourceEvent::Decision(_) => {
                &[Refuse(Refusal::HandedOver)]
            }
            _ => &[],
        }
    }

    const fn kept(&mut self, event: SourceEvent) -> &'static [SourceAction] {
        use SourceAction::{Reconnect, Refuse, SendCancel, StopGuest};
        match event {
            // Only after a person has decided on one of the sides, and was mistaken.
            SourceEvent::TakenOver
            | SourceEvent::Complete
            | SourceEvent::Standing(Standing::HasTakenOver) => {
                self.to(SourceState::Gone, &[StopGuest])
            }
            SourceEvent::Returned | SourceEvent::Standing(Standing::WaitsForCommit) => {
                &[SendCancel]
            }
            SourceEvent::LinkLost => &[Reconnect],
            SourceEvent::Decision(_) => &[Refuse(Refusal::Settled)],
            _ => &[],
        }
    }
}
