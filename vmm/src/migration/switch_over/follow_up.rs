// SPDX-License-Identifier: Apache-2.0
//! What the source does for a guest that has gone before its memory: it sends the rest, and finds the
//! target again if that was lost.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use brume_api::{MigrationPhase, with_causes};
use brume_migration::{
    Channel, ChannelError, Message, Received, SourceEvent as Event, SourceState, Standing,
};

use super::super::error::SourceError;
use super::super::lanes::Lane;
use super::super::route::Route;
use super::super::serving::{Faults, Lacks, Left, hear_missing, stream};
use super::super::source::SourceEnd;
use super::super::target::ends_mean_something;
use super::{RETRY, STILL_LIMIT, Talk};

/// How long it is listened to how a connection ends.
const LAST_WORD: Duration = Duration::from_millis(200);
/// Why a machine is lost for which a person has decided that nothing more is done.
pub(super) const GIVEN_UP: &str = "it was given up";

impl Talk<'_> {
    /// Sends what is left of the memory, as often as that takes.
    pub(super) fn serve(&mut self) -> SourceEnd {
        // A connection that is not the first has none beside it for what the guest waits for.
        let mut broken = self.channel.take().map(|_| {
            let reset = ErrorKind::ConnectionReset;
            SourceError::Channel(ChannelError::Lost(reset.into()))
        });
        while let Some(follows) = &mut self.follows {
            let lane = &mut self.context.lanes.first;
            let sent = match broken.take() {
                Some(error) => Err(error),
                None => stream(lane, &follows.left, self.context.progress),
            };
            let Err(error) = sent else {
                // So that the target need not wait for a source that comes back.
                let _ = lane.channel.send(&Message::KeepAlive);
                return self.served();
            };
            follows.server = None;
            let lives = matches!(error, SourceError::FollowsAnew);
            if !lives && has_ended(&mut lane.channel) {
                self.machine.step(Event::LinkClosed);
                return self.lost("the target has ended, and the guest with it");
            }
            // So that the target does not wait for what comes on it.
            if let Ok(closer) = lane.channel.closer() {
                closer.close();
            }
            self.machine.step(Event::LinkLost);
            let why = with_causes(&error);
            tracing::warn!("the rest of the memory is held up: {why}");
            self.context
                .progress
                .update(|status| status.error = Some(why));
            self.forget_directions();
            self.context
                .progress
                .enter(MigrationPhase::PostCopyInterrupted);
            match self.find_target() {
                Found::Lacking => {
                    self.machine.step(Event::Returned);
                    self.tell_where();
                    self.context.progress.update(|status| status.error = None);
                    self.context.progress.enter(MigrationPhase::PostCopy);
                }
                Found::Complete => {
                    self.tell_where();
                    return self.served();
                }
                Found::GivenUp => return self.lost(GIVEN_UP),
            }
        }
        SourceEnd::Moved
    }

    /// Looks for a target that was lost, until it is found or given up.
    fn find_target(&mut self) -> Found {
        loop {
            if let Some(decision) = self.context.control.decision(RETRY) {
                self.step(Event::Decision(decision));
                if self.machine.state() == SourceState::Gone {
                    return Found::GivenUp;
                }
            }
            self.take_directions();
            let Some(follows) = &mut self.follows else {
                return Found::GivenUp;
            };
            let (left, lane) = (&follows.left, &mut self.context.lanes.first);
            match find_again(&self.route, lane, left) {
                Ok(Lacks::Nothing) => return Found::Complete,
                Ok(Lacks::Pages) => {}
                Err(error) => {
                    tracing::debug!("the target is not found again: {error}");
                    continue;
                }
            }
            let (memory, progress) = (self.context.passes.memory(), self.context.progress);
            let server = Faults::connect(&self.route).and_then(|channel| {
                let lane = Lane::new(channel, memory.clone(), self.context.control.clone());
                Faults::serve(lane, left, progress)
            });
            if let Ok(server) = server {
                follows.server = Some(server);
                return Found::Lacking;
            }
        }
    }

    /// The guest is no more, as far as can be known here.
    pub(super) fn lost(&self, why: &str) -> SourceEnd {
        tracing::error!("the machine is lost: {why}");
        let progress = self.context.progress;
        progress.fail(MigrationPhase::Lost, why.to_owned());
        SourceEnd::Lost
    }

    fn served(&mut self) -> SourceEnd {
        self.machine.step(Event::Complete);
        self.context.progress.update(|status| {
            status.remaining_pages = 0;
            status.error = None;
        });
        self.context.progress.enter(MigrationPhase::Completed);
        SourceEnd::Moved
    }
}

/// How a target that was lost was found.
enum Found {
    /// It lacks pages.
    Lacking,
    /// It has everything.
    Complete,
    /// Nobody looks for it any more.
    GivenUp,
}

/// Whether the target's process has ended. A connection that is not written to any more still tells
/// how it ended.
fn has_ended(channel: &mut Channel) -> bool {
    if !ends_mean_something(channel) || channel.set_limit(LAST_WORD).is_err() {
        return false;
    }
    let end = Instant::now() + LAST_WORD;
    while Instant::now() < end {
        match channel.receive() {
            // It lives, and wants another connection.
            Ok(Received::Message(Message::Standing(_))) => return false,
            Ok(_) => {}
            Err(error) => return matches!(error, ChannelError::Closed),
        }
    }
    false
}

/// Comes back to a target that has taken over, and hears what it lacks.
fn find_again(route: &Route, lane: &mut Lane, left: &Left) -> Result<Lacks, SourceError> {
    let mut channel = route.come_back(STILL_LIMIT)?;
    match channel.receive_message()? {
        Message::Standing(Standing::HasTakenOver) => {}
        _ => return Err(super::super::source::out_of_turn()),
    }
    let lacks = hear_missing(&mut channel, left, lane.memory())?;
    lane.channel = channel;
    Ok(lacks)
}
