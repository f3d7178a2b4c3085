// SPDX-License-Identifier: Apache-2.0
//! The target's side of the hand-over: when it may run the guest.

use super::{Decision, Refusal};
use crate::{Message, Standing};

/// Where the target stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TargetState {
    /// Memory and state are on their way.
    Receiving,
    /// `Ready` was sent. Waits for `Commit`, on the first connection.
    Loaded,
    /// Everything is here, and the connection is lost. The guest may not run.
    InDoubt,
    /// As [`Self::InDoubt`], with a new connection. Waits for the source's word.
    Asked,
    /// The guest is the target's.
    Running,
    /// What came was given up; the guest did not run here and never will.
    Dropped,
}

/// What happens to the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TargetEvent {
    /// The guest could run.
    StateLoaded {
        /// Whether memory is left at the source (post-copy).
        memory_follows: bool,
    },
    /// The guest cannot run here.
    LoadFailed,
    /// All memory is here, after the guest had gone on (post-copy).
    MemoryComplete,
    /// [`Message::Commit`].
    Commit,
    /// [`Message::Cancel`].
    Cancel,
    /// A message that a source never sends, or one that cannot be read.
    Unexpected,
    /// The connection came to its end in order.
    LinkClosed,
    /// The connection failed in any other way.
    LinkLost,
    /// The source has made a new connection.
    Returned,
    /// A person decided.
    Decision(Decision),
}

impl TargetEvent {
    /// What a message from the source means here; `None` for those of other parts of the protocol.
    #[must_use]
    pub const fn of(message: &Message) -> Option<Self> {
        match message {
            Message::Commit => Some(Self::Commit),
            Message::Cancel { .. } => Some(Self::Cancel),
            Message::Ready { .. }
            | Message::TakenOver
            | Message::Running { .. }
            | Message::Complete
            | Message::Failed { .. }
            | Message::Standing(_)
            | Message::Welcome { .. }
            | Message::Refused { .. }
            | Message::Accepted(_)
            | Message::PassTaken { .. }
            | Message::Forgotten
            | Message::DisksTaken => Some(Self::Unexpected),
            Message::Hello(_)
            | Message::Offer(_)
            | Message::PassEnded { .. }
            | Message::Stale
            | Message::DisksEnded { .. }
            | Message::Sent { .. }
            | Message::MemorySent
            | Message::KeepAlive => None,
        }
    }
}

/// What the target is to do. What cannot be written because there is no connection is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TargetAction {
    /// Write [`Message::Ready`].
    SendReady,
    /// Write [`Message::TakenOver`], to its end, before anything else.
    SendTakenOver,
    /// Write [`Message::Complete`].
    SendComplete,
    /// Write [`Message::Failed`].
    SendFailed,
    /// Write [`Message::Standing`].
    SendStanding(Standing),
    /// Let the guest run.
    RunGuest,
    /// Give up what came.
    DropGuest,
    /// Tell who asked that it is not done.
    Refuse(Refusal),
}

/// The target's side of the hand-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    pub(super) state: TargetState,
    memory_missing: bool,
}

impl Default for Target {
    fn default() -> Self {
        Self::new()
    }
}

impl Target {
    /// A target that has accepted an offer.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            state: TargetState::Receiving,
            memory_missing: true,
        }
    }

    /// Where it stands.
    #[must_use]
    pub const fn state(&self) -> TargetState {
        self.state
    }

    /// Whether it still needs the source, for memory.
    #[must_use]
    pub const fn memory_missing(&self) -> bool {
        self.memory_missing
    }

    /// Takes an event; the actions are carried out in their order, before the next event.
    pub const fn step(&mut self, event: TargetEvent) -> &'static [TargetAction] {
        match self.state {
            TargetState::Receiving => self.receiving(event),
            TargetState::Loaded => self.loaded(event),
            TargetState::InDoubt | TargetState::Asked => self.in_doubt(event),
            TargetState::Running => self.running(event),
            TargetState::Dropped => Self::dropped(event),
        }
    }

    const fn to(
        &mut self,
        state: TargetState,
        actions: &'static [TargetAction],
    ) -> &'static [TargetAction] {
        self.state = state;
        actions
    }

    const fn receiving(&mut self, event: TargetEvent) -> &'static [TargetAction] {
        use TargetAction::{DropGuest, Refuse, SendFailed, SendReady, SendStanding};
        match event {
            TargetEvent::StateLoaded { memory_follows } => {
                self.memory_missing = memory_follows;
                self.to(TargetState::Loaded, &[SendReady])
            }
            TargetEvent::LoadFailed | TargetEvent::Commit | TargetEvent::Unexpected => {
                self.to(TargetState::Dropped, &[SendFailed, DropGuest])
            }
            TargetEvent::Cancel | TargetEvent::LinkClosed | TargetEvent::LinkLost => {
                self.to(TargetState::Dropped, &[DropGuest])
            }
            TargetEvent::Returned => self.to(
                TargetState::Dropped,
                &[SendStanding(Standing::HasDropped), DropGuest],
            ),
            TargetEvent::Decision(_) => &[Refuse(Refusal::Connected)],
            TargetEvent::MemoryComplete => &[],
        }
    }

    const fn loaded(&mut self, event: TargetEvent) -> &'static [TargetAction] {
        use TargetAction::{DropGuest, Refuse, RunGuest, SendFailed, SendStanding, SendTakenOver};
        match event {
            TargetEvent::Commit => self.to(TargetState::Running, &[SendTakenOver, RunGuest]),
            // Without the rest of its memory the guest has ended with the source.
            TargetEvent::LinkClosed if self.memory_missing => {
                self.to(TargetState::Dropped, &[DropGuest])
            }
            TargetEvent::LinkClosed => self.to(TargetState::Running, &[RunGuest]),
            TargetEvent::LinkLost => self.to(TargetState::InDoubt, &[]),
            TargetEvent::Returned => self.to(
                TargetState::Asked,
                &[SendStanding(Standing::WaitsForCommit)],
            ),
            TargetEvent::Cancel => self.to(TargetState::Dropped, &[DropGuest]),
            TargetEvent::LoadFailed | TargetEvent::Unexpected => {
                self.to(TargetState::Dropped, &[SendFailed, DropGuest])
            }
            TargetEvent::Decision(_) => &[Refuse(Refusal::Connected)],
            TargetEvent::StateLoaded { .. } | TargetEvent::MemoryComplete => &[],
        }
    }

    const fn in_doubt(&mut self, event: TargetEvent) -> &'static [TargetAction] {
        use TargetAction::{DropGuest, Refuse, RunGuest, SendFailed, SendStanding, SendTakenOver};
        match event {
            TargetEvent::Commit => self.to(TargetState::Running, &[SendTakenOver, RunGuest]),
            TargetEvent::Cancel => self.to(TargetState::Dropped, &[DropGuest]),
            TargetEvent::LoadFailed | TargetEvent::Unexpected => {
                self.to(TargetState::Dropped, &[SendFailed, DropGuest])
            }
            TargetEvent::Returned => self.to(
                TargetState::Asked,
                &[SendStanding(Standing::WaitsForCommit)],
            ),
            // The source may have resumed while it was away: its end says nothing now.
            TargetEvent::LinkClosed | TargetEvent::LinkLost => self.to(TargetState::InDoubt, &[]),
            TargetEvent::Decision(_) if matches!(self.state, TargetState::Asked) => {
                &[Refuse(Refusal::Connected)]
            }
            TargetEvent::Decision(Decision::Run) if self.memory_missing => {
                &[Refuse(Refusal::MemoryMissing)]
            }
            TargetEvent::Decision(Decision::Run) => self.to(TargetState::Running, &[RunGuest]),
            TargetEvent::Decision(Decision::Abandon) => self.to(TargetState::Dropped, &[DropGuest]),
            TargetEvent::StateLoaded { .. } | TargetEvent::MemoryComplete => &[],
        }
    }

    const fn running(&mut self, event: TargetEvent) -> &'static [TargetAction] {
        use TargetAction::{Refuse, SendComplete, SendStanding, SendTakenOver};
        match event {
            // A source that says otherwise has not heard it.
            TargetEvent::Commit | TargetEvent::Cancel => &[SendTakenOver],
            TargetEvent::MemoryComplete => {
                self.memory_missing = false;
                &[SendComplete]
            }
            TargetEvent::Returned if self.memory_missing => &[SendStanding(Standing::HasTakenOver)],
            TargetEvent::Returned => &[SendStanding(Standing::HasTakenOver), SendComplete],
            TargetEvent::Decision(_) => &[Refuse(Refusal::Settled)],
            TargetEvent::StateLoaded { .. }
            | TargetEvent::LoadFailed
            | TargetEvent::Unexpected
            | TargetEvent::LinkClosed
            | TargetEvent::LinkLost => &[],
        }
    }

    const fn dropped(event: TargetEvent) -> &'static [TargetAction] {
        use TargetAction::{Refuse, SendFailed, SendStanding};
        match event {
            TargetEvent::Commit => &[SendFailed],
            TargetEvent::Returned => &[SendStanding(Standing::HasDropped)],
            TargetEvent::Decision(_) => &[Refuse(Refusal::Settled)],
            _ => &[],
        }
    }
}
