// SPDX-License-Identifier: Apache-2.0
//! The hand-over as the target carries it out. Which side may run the guest is decided by
//! [`brume_migration::Target`]; here are its connection and its owner.

use std::sync::mpsc::{Receiver, RecvError, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use brume_api::{MigrationPhase, with_causes};
use brume_migration::{
    Channel, ChannelError, Decision, Message, Purpose, Received, TargetAction, TargetEvent,
    TargetState,
};

use super::super::incoming::{IncomingEvent, Stopped};
use super::super::status::micros;
use super::arrival::{Arrival, STALL_LIMIT};
use super::ends_mean_something;
use super::errand::send_away;
use crate::event::Event;

/// How long the guest may take to go on before its memory is taken all the same.
const START_LIMIT: Duration = Duration::from_secs(1);
/// A source that has heard nothing for so long looks for another way here.
const SILENCE: Duration = Duration::from_secs(5);
/// How long to wait for a word on a connection that is silent, between two looks at who comes.
const LOOK: Duration = Duration::from_millis(50);
/// How long a source may take to come back for the word that the machine runs here.
const SEE_OFF_LIMIT: Duration = Duration::from_secs(600);

impl Arrival<'_> {
    /// Has the owner give the machine its state.
    pub(super) fn load(&mut self, (state, stopped): (Vec<u8>, Stopped)) {
        let begun = Instant::now();
        let (reply, loaded) = channel();
        let unlocked = self.disks.unlock();
        let channel = self.channel.as_ref();
        let other_host = channel.is_none_or(|channel| !channel.link().is_local());
        // What came along was written here.
        let other_host = other_host && self.disks.is_empty();
        let event = IncomingEvent::Load {
            state,
            stopped,
            other_host,
            following: self.following.clone(),
            reply,
        };
        self.reception.sender.send(Event::Incoming(event));
        let loaded = self.wait_loaded(&loaded);
        let loaded = loaded.map(|loaded| loaded.and(unlocked).and_then(|()| self.disks.synced()));
        let event = match loaded {
            Ok(Ok(())) => TargetEvent::StateLoaded {
                memory_follows: self.following.is_some(),
            },
            Ok(Err(why)) => {
                self.trouble = Some(why);
                TargetEvent::LoadFailed
            }
            Err(_) => TargetEvent::LoadFailed,
        };
        let load_us = micros(begun.elapsed());
        for action in self.machine.step(event) {
            match action {
                TargetAction::SendReady => self.send(&Message::Ready { load_us }),
                action => self.act(*action),
            }
        }
    }

    /// Waits for the owner. What it needs of the memory may never come: then it finds zeros, and
    /// what it makes of them is not used.
    fn wait_loaded(
        &mut self,
        loaded: &Receiver<Result<(), String>>,
    ) -> Result<Result<(), String>, RecvError> {
        let Some(following) = self.following.clone() else {
            return loaded.recv();
        };
        let end = Instant::now() + STALL_LIMIT;
        loop {
            match loaded.recv_timeout(LOOK) {
                Ok(loaded) => return Ok(loaded),
                Err(RecvTimeoutError::Disconnected) => return Err(RecvError),
                Err(RecvTimeoutError::Timeout) => {}
            }
            // All that the source could say now is that it keeps the machine.
            let channel = self.channel.as_mut();
            let is_over =
                channel.is_none_or(|channel| channel.wait(Duration::ZERO).unwrap_or(true));
            if is_over || Instant::now() >= end {
                following.abandon();
                let _ = loaded.recv();
                let why = "the source was lost before the machine had what it needs of its memory";
                return Ok(Err(why.into()));
            }
        }
    }

    /// Waits for the word of the source, or what takes its place.
    pub(super) fn hand_over(&mut self) {
        loop {
            match self.machine.state() {
                TargetState::Running | TargetState::Dropped | TargetState::Receiving => return,
                TargetState::InDoubt => self.seek(),
                TargetState::Loaded | TargetState::Asked => {
                    let event = self.hear();
                    let event = self.unless_it_ends(event);
                    self.step(event);
                }
            }
        }
    }

    /// `event`, unless the machine goes with the process: then the source is told that it cannot run
    /// here.
    fn unless_it_ends(&mut self, event: TargetEvent) -> TargetEvent {
        if !self.reception.control.ends() {
            return event;
        }
        self.trouble = Some("the target's process is about to end".into());
        TargetEvent::LoadFailed
    }

    fn hear(&mut self) -> TargetEvent {
        if self.come_again() {
            return TargetEvent::Returned;
        }
        if self.reception.control.ends() {
            return TargetEvent::LoadFailed;
        }
        let ends_with_source = self.ends_with_source();
        let Some(channel) = &mut self.channel else {
            return TargetEvent::LinkLost;
        };
        let received = loop {
            match channel.receive() {
                // It is still there.
                Ok(Received::Message(message)) if TargetEvent::of(&message).is_none() => {}
                received => break received,
            }
        };
        match received {
            Ok(Received::Message(message)) => match TargetEvent::of(&message) {
                Some(TargetEvent::Cancel) => {
                    self.trouble = Some("the source keeps it".into());
                    TargetEvent::Cancel
                }
                event => event.unwrap_or(TargetEvent::Unexpected),
            },
            Ok(_) => TargetEvent::Unexpected,
            Err(ChannelError::Closed) if ends_with_source => {
                if self.machine.state() == TargetState::Loaded {
                    tracing::warn!(
                        "the source has ended: the machine, which is whole, goes on here"
                    );
                }
                TargetEvent::LinkClosed
            }
            Err(ChannelError::Closed | ChannelError::Lost(_) | ChannelError::TimedOut) => {
                TargetEvent::LinkLost
            }
            Err(error) => {
                self.trouble = Some(with_causes(&error));
                TargetEvent::Unexpected
            }
        }
    }

    pub(super) fn step(&mut self, event: TargetEvent) {
        let before = self.machine.state();
        for action in self.machine.step(event) {
            self.act(*action);
        }
        let after = self.machine.state();
        if before != after && after == TargetState::InDoubt {
            self.channel = None;
            tracing::warn!(
                "the connection broke while the machine was handed over: it does not run here \
                 until the source is back or somebody decides"
            );
            self.reception.progress.enter(MigrationPhase::InDoubt);
        }
    }

    pub(super) fn send(&mut self, message: &Message) {
        if let Some(channel) = &mut self.channel {
            // What became of it is seen when it is read from.
            let _ = channel.send(message);
        }
    }

    fn act(&mut self, action: TargetAction) {
        match action {
            TargetAction::SendReady => self.send(&Message::Ready { load_us: 0 }),
            TargetAction::SendTakenOver => self.send(&Message::TakenOver),
            TargetAction::SendComplete => self.send(&Message::Complete),
            TargetAction::SendFailed => {
                let why = self.trouble.clone();
                let why = why.unwrap_or_else(|| "the source has said what makes no sense".into());
                self.send(&Message::Failed { why });
            }
            TargetAction::SendStanding(standing) => self.send(&Message::Standing(standing)),
            TargetAction::RunGuest => self.run_guest(),
            // Done when this ends.
            TargetAction::DropGuest => {}
            TargetAction::Refuse(refusal) => tracing::warn!("{refusal}"),
        }
    }

    fn run_guest(&mut self) {
        let begun = Instant::now();
        self.disks.keep();
        let (started, starts) = channel();
        let run = IncomingEvent::Run(started);
        self.reception.sender.send(Event::Incoming(run));
        // An end of the process says it too. What has to follow is taken by this thread.
        let started = if self.following.is_some() {
            starts.recv_timeout(START_LIMIT).ok()
        } else {
            starts.recv().ok()
        };
        let started = started.unwrap_or_else(Instant::now);
        self.send(&Message::Running {
            resume_us: micros(started.saturating_duration_since(begun)),
            since_us: micros(started.elapsed()),
        });
        let phase = if self.following.is_some() {
            MigrationPhase::PostCopy
        } else {
            MigrationPhase::Completed
        };
        self.reception.progress.enter(phase);
    }

    /// Stays for a source that may not have heard that the machine runs here.
    pub(super) fn see_off(&mut self) {
        let end = Instant::now() + SEE_OFF_LIMIT;
        while Instant::now() < end {
            if self.come_again() {
                self.step(TargetEvent::Returned);
            }
            let ends_with_source = self.ends_with_source();
            let Some(channel) = &mut self.channel else {
                self.seek();
                continue;
            };
            match channel.receive() {
                // It has heard it.
                Ok(Received::Message(Message::KeepAlive)) => return,
                Ok(Received::Message(message)) => {
                    if let Some(event) = TargetEvent::of(&message) {
                        self.step(event);
                    }
                }
                // It has ended.
                Err(ChannelError::Closed) if ends_with_source => return,
                Ok(_) | Err(_) => self.channel = None,
            }
        }
    }

    /// Whether the connection ends only if the source does. Another than the first one may also be
    /// closed by a source that has waited in vain and tries again, or by a relay.
    fn ends_with_source(&self) -> bool {
        let channel = self.channel.as_ref();
        !self.has_returned && channel.is_some_and(ends_mean_something)
    }

    /// Waits for the source to come back, or for somebody who decides.
    fn seek(&mut self) {
        if self.reception.control.ends() {
            let event = self.unless_it_ends(TargetEvent::LinkLost);
            return self.step(event);
        }
        if let Some(decision) = self.reception.control.decision(Duration::ZERO) {
            if decision == Decision::Abandon {
                self.trouble = Some("it was given up".into());
            }
            return self.step(TargetEvent::Decision(decision));
        }
        if let Some(channel) = self.returning() {
            self.channel = Some(channel);
            self.step(TargetEvent::Returned);
        }
    }

    /// Waits for a word on the connection. Whether the source has come on another one instead,
    /// because this one has been silent for so long: it may still be there, and carry nothing.
    fn come_again(&mut self) -> bool {
        let begun = Instant::now();
        while begun.elapsed() < STALL_LIMIT {
            let Some(channel) = &mut self.channel else {
                return false;
            };
            // An error is told by whoever reads.
            if channel.wait(LOOK).unwrap_or(true) || self.reception.control.ends() {
                return false;
            }
            if begun.elapsed() >= SILENCE
                && let Some(channel) = self.returning()
            {
                self.channel = Some(channel);
                return true;
            }
        }
        self.channel = None;
        false
    }

    /// The source, if it comes back now.
    fn returning(&mut self) -> Option<Channel> {
        match self.meet()? {
            (mut channel, hello) if hello.purpose == Purpose::Return => {
                channel.welcome(&hello).ok()?;
                self.has_returned = true;
                Some(channel)
            }
            (mut channel, _) => {
                send_away(&mut channel);
                None
            }
        }
    }
}
