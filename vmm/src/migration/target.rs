// SPDX-License-Identifier: Apache-2.0
//! The target's side of a move: whoever comes is met here. What a machine that arrives goes through
//! is in the modules below.

mod arrival;
mod door;
mod errand;
mod follow;
mod hand_over;

use std::io;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use brume_api::{MigrationPhase, with_causes};
use brume_migration::{Channel, ChannelError};

use self::arrival::Arrival;
pub(crate) use self::door::Door;
use self::errand::Met;
use super::control::Control;
use super::incoming::IncomingEvent;
use super::status::Progress;
use crate::event::{Event, EventSender};

/// How often it is looked whether a client has called it off.
const LOOK: Duration = Duration::from_millis(100);

/// Waits for a machine.
pub(crate) struct Reception {
    pub(crate) door: Door,
    pub(crate) control: Control,
    pub(crate) progress: Progress,
    pub(crate) sender: EventSender,
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
                let (sender, progress) = (self.sender.clone(), self.progress.clone());
                let end = self.run();
                let broken = end.as_ref().and_then(|(phase, why)| {
                    (*phase == MigrationPhase::Failed).then(|| why.clone())
                });
                sender.send(Event::Incoming(IncomingEvent::Ended(broken)));
                // After that, so that whoever has heard of it finds a process that can wait again.
                if let Some((phase, why)) = end {
                    progress.fail(phase, why);
                }
            })
    }

    /// Waits until a machine has arrived; how the wait ended otherwise.
    fn run(self) -> Option<(MigrationPhase, String)> {
        let mut last = None;
        while !self.control.is_cancelled() {
            if let Some(met) = self.door.next(LOOK) {
                last = Some(self.receive(met)?);
                self.control.forget_connections();
            } else if let Some(closed) = self.door.closed() {
                let why = last.map_or(closed.clone(), |last| format!("{last}; {closed}"));
                return Some((MigrationPhase::Failed, why));
            }
        }
        Some((MigrationPhase::Cancelled, "it was called off".into()))
    }

    /// Receives a machine; why it has not arrived.
    fn receive(&self, met: Met) -> Option<String> {
        let Met {
            channel,
            hello,
            peer,
        } = met;
        tracing::info!("a machine comes from {peer}");
        self.door.begin(&hello.session);
        self.progress.restart(&peer);
        let Failure(why) = Arrival::new(self, channel).receive(&hello).err()?;
        self.door.drop_move();
        let sender = &self.sender;
        sender.send(Event::Incoming(IncomingEvent::Drop));
        tracing::warn!(
            "the machine from {peer} has not arrived, and another one is waited for: {why}"
        );
        self.progress.wait_again(why.clone());
        Some(why)
    }
}

/// Whether an end in order says that the peer's process has ended. Over plain TCP anybody between
/// the two sides may end a connection in order, a relay for one.
pub(super) fn ends_mean_something(channel: &Channel) -> bool {
    channel.link().is_local() || channel.link().is_secured()
}
