// SPDX-License-Identifier: Apache-2.0
//! The target's side of a move: whoever comes is met here. What a machine that arrives goes through
//! is in the modules below.

mod arrival;
mod door;
mod follow;
mod hand_over;

use std::collections::VecDeque;
use std::io;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use brume_api::{MigrationPhase, with_causes};
use brume_migration::{Channel, ChannelError, Hello, Message, Purpose, Session, Standing};

use self::arrival::Arrival;
pub(crate) use self::door::Door;
use self::door::Met;
use super::control::Control;
use super::incoming::IncomingEvent;
use super::status::Progress;
use crate::event::{Event, EventSender};

/// How often it is looked whether a client has called it off.
const LOOK: Duration = Duration::from_millis(100);
/// How many moves that came to nothing are remembered.
const MOST_DROPPED: usize = 64;
/// How long it is listened to who comes back to a move that is over.
const LATE_WORD: Duration = Duration::from_secs(1);

/// Waits for a machine.
pub(crate) struct Reception {
    pub(crate) door: Door,
    pub(crate) control: Control,
    pub(crate) progress: Progress,
    pub(crate) sender: EventSender,
}

/// Moves that came to nothing, the last [`MOST_DROPPED`] of them: anybody may begin one.
#[derive(Default)]
struct Dropped(VecDeque<Session>);

impl Dropped {
    fn note(&mut self, session: Session) {
        if self.0.contains(&session) {
            return;
        }
        if self.0.len() >= MOST_DROPPED {
            self.0.pop_front();
        }
        self.0.push_back(session);
    }
}

/// A move that came to nothing, in words for people.
struct Failure(String);

impl From<ChannelError> for Failure {
    fn from(error: ChannelError) -> Self {
        Self(with_causes(&error))
    }
}

impl From<String> for Failure {
    fn from(why: String) -> Self {
        Self(why)
    }
}

impl Reception {
    /// Waits beside the owner.
    ///
    /// # Errors
    ///
    /// The host gives no thread.
    pub(crate) fn spawn(self) -> io::Result<JoinHandle<()>> {
        thread::Builder::new()
            .name("migration".into())
            .spawn(move || {
                let sender = self.sender.clone();
                self.run();
                sender.send(Event::Incoming(IncomingEvent::Ended));
            })
    }

    fn run(self) {
        let mut dropped = Dropped::default();
        while !self.control.is_cancelled() {
            let Met {
                mut channel,
                hello,
                peer,
            } = match self.door.next(LOOK) {
                Ok(Some(met)) => met,
                Ok(None) => continue,
                Err(why) => return self.progress.fail(MigrationPhase::Failed, why),
            };
            if hello.purpose != Purpose::Control {
                answer_late(&mut channel, &hello, &dropped);
                continue;
            }
            if self.receive(channel, &hello, &peer) {
                return;
            }
            dropped.note(hello.session);
            self.control.forget_connections();
        }
        self.progress
            .fail(MigrationPhase::Cancelled, "it was called off".into());
    }

    /// Receives a machine; whether it has arrived.
    fn receive(&self, channel: Channel, hello: &Hello, peer: &str) -> bool {
        tracing::info!("a machine comes from {peer}");
        self.progress.restart(peer);
        let Err(Failure(why)) = Arrival::new(self, &hello.session, channel).receive(hello) else {
            return true;
        };
        let sender = &self.sender;
        sender.send(Event::Incoming(IncomingEvent::Drop));
        tracing::warn!("the machine from {peer} has not arrived: {why}");
        self.progress.wait_again(why);
        false
    }
}

/// Tells who comes back to a move that is over.
fn answer_late(channel: &mut Channel, hello: &Hello, dropped: &Dropped) {
    if hello.purpose == Purpose::Return && dropped.0.contains(&hello.session) {
        let told = channel
            .welcome(hello)
            .and_then(|()| channel.send(&Message::Standing(Standing::HasDropped)));
        if told.is_ok() {
            // It may have something to say, and reads what was sent first.
            let _ = channel.set_deadline(Some(Instant::now() + LATE_WORD));
            let _ = channel.receive();
        }
        return;
    }
    channel.refuse(vec![
        "the target knows nothing of this move: it was begun with another process".into(),
    ]);
}

/// Whether an end in order says that the peer's process has ended. Over plain TCP anybody between
/// the two sides may end a connection in order, a relay for one.
pub(super) fn ends_mean_something(channel: &Channel) -> bool {
    channel.link().is_local() || channel.link().is_secured()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_moves_that_came_to_nothing_are_remembered() {
        let mut dropped = Dropped::default();
        let sessions: Vec<_> = (0..100).map(|_| Session::new().unwrap()).collect();
        for session in &sessions {
            dropped.note(session.clone());
            dropped.note(session.clone());
        }
        assert!(dropped.0.iter().eq(&sessions[100 - MOST_DROPPED..]));
    }
}
