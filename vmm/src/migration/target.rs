// SPDX-License-Identifier: Apache-2.0
//! The target's side of a move. Which side may run the guest is decided by
//! [`brume_migration::Target`]; here are its connections and its owner.

use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use brume_api::{MigrationDecision, MigrationPhase, with_causes};
use brume_migration::{
    Channel, ChannelError, Decision, Hello, LinkError, Listener, Message, Purpose, Received,
    Session, Standing, Target, TargetAction, TargetEvent, TargetState, Tls,
};

use super::arrivals::{Arrivals, Rendezvous, take};
use super::control::Control;
use super::disks_in::DisksIn;
use super::following::Handset;
use super::incoming::{IncomingEvent, Stopped};
use super::offer::{Acceptance, Offer};
use super::serving::words_of;
use super::status::{Progress, micros};
use crate::event::{Event, EventSender};
use crate::memory::{Backing, Following, MachineMemory, UffdError};
use crate::page_set::PageSet;

/// How often it is looked whether a client has called it off.
const LOOK: Duration = Duration::from_millis(100);
/// How long a stranger may take to say who it is.
const GREETING_LIMIT: Duration = Duration::from_secs(5);
/// How long the other connections of a move may take to come.
const OTHERS_LIMIT: Duration = Duration::from_secs(10);
/// How long nothing may come while memory moves.
const STALL_LIMIT: Duration = Duration::from_secs(30);
/// How long a source may take to come back for the word that the machine runs here.
const SEE_OFF_LIMIT: Duration = Duration::from_secs(600);
/// The most connections that carry memory.
const MOST_CONNECTIONS: u8 = 16;
/// The largest state of a machine, in bytes.
const MOST_STATE: usize = 64 << 20;

/// Waits for a machine.
pub(crate) struct Reception {
    pub(crate) listener: Listener,
    pub(crate) tls: Option<Tls>,
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
                let sender = self.sender.clone();
                self.run();
                sender.send(Event::Incoming(IncomingEvent::Ended));
            })
    }

    fn run(self) {
        let mut dropped = HashSet::new();
        while !self.control.is_cancelled() {
            let (mut channel, peer) = match self.accept() {
                Ok(Some(met)) => met,
                Ok(None) => continue,
                Err(error) => {
                    return self
                        .progress
                        .fail(MigrationPhase::Failed, with_causes(&error));
                }
            };
            match channel.meet() {
                Ok(hello) if hello.purpose == Purpose::Control => {
                    if self.receive(channel, &hello, &peer) {
                        return;
                    }
                    dropped.insert(hello.session);
                    self.control.forget_connections();
                }
                Ok(hello) => answer_late(&mut channel, &hello, &dropped),
                Err(error) => tracing::warn!("{peer}: {}", with_causes(&error)),
            }
        }
        self.progress
            .fail(MigrationPhase::Cancelled, "it was called off".into());
    }

    /// The next connection, with who it is from.
    fn accept(&self) -> Result<Option<(Channel, String)>, LinkError> {
        let Some(mut link) = self.listener.accept(LOOK)? else {
            return Ok(None);
        };
        let peer = link.peer().to_owned();
        link.set_limit(GREETING_LIMIT)?;
        if let Some(tls) = &self.tls {
            link = match link.secured_as_server(tls) {
                Ok(link) => link,
                // It is none of ours.
                Err(error) => {
                    tracing::warn!("{peer}: {}", with_causes(&error));
                    return Ok(None);
                }
            };
        }
        Ok(Some((Channel::new(link), peer)))
    }

    /// Receives a machine; whether it has arrived.
    fn receive(&self, channel: Channel, hello: &Hello, peer: &str) -> bool {
        tracing::info!("a machine comes from {peer}");
        self.progress.restart(peer);
        let mut arrival = Arrival {
            reception: self,
            session: &hello.session,
            channel: Some(channel),
            shares_memory: false,
            missing: None,
            following: None,
            handset: Handset::default(),
            machine: Target::new(),
            disks: DisksIn::default(),
            trouble: None,
        };
        let result = arrival.receive(hello);
        let arrived = arrival.machine.state() == TargetState::Running;
        if arrived {
            return true;
        }
        let sender = &self.sender;
        sender.send(Event::Incoming(IncomingEvent::Drop));
        let why = match result {
            Err(Failure(why)) => arrival.trouble.take().unwrap_or(why),
            Ok(()) => arrival.trouble.take().unwrap_or_default(),
        };
        tracing::warn!("the machine from {peer} has not arrived: {why}");
        self.progress.wait_again(why);
        false
    }
}

/// Tells who comes back to a move that is over.
fn answer_late(channel: &mut Channel, hello: &Hello, dropped: &HashSet<Session>) {
    if hello.purpose == Purpose::Return && dropped.contains(&hello.session) {
        let told = channel
            .welcome(hello)
            .and_then(|()| channel.send(&Message::Standing(Standing::HasDropped)));
        if told.is_ok() {
            // It may have something to say, and reads what was sent first.
            let _ = channel.receive();
        }
        return;
    }
    channel.refuse(vec![
        "the target knows nothing of this move: it was begun with another process".into(),
    ]);
}

/// A machine that arrives.
struct Arrival<'a> {
    reception: &'a Reception,
    session: &'a Session,
    channel: Option<Channel>,
    /// Whether its memory is the source's.
    shares_memory: bool,
    /// What is to follow.
    missing: Option<PageSet>,
    following: Option<Arc<Following>>,
    /// Where the thread gets its connection that asks for what the guest waits for.
    handset: Handset,
    machine: Target,
    disks: DisksIn,
    /// What has gone wrong, as far as it was told.
    trouble: Option<String>,
}

impl Arrival<'_> {
    /// Receives it to its end, whichever that is.
    fn receive(&mut self, hello: &Hello) -> Result<(), Failure> {
        let Some(channel) = &mut self.channel else {
            return Ok(());
        };
        self.reception.control.watch(channel.closer()?);
        channel.welcome(hello)?;
        let (offer, handed) = hear_offer(channel)?;
        self.shares_memory = handed.is_some();
        let memory = self.prepare(&offer, handed)?;
        let (connections, may_follow) = if self.shares_memory {
            (1, false)
        } else {
            (offer.connections, offer.may_follow)
        };
        let rendezvous = Arc::new(Rendezvous::new(usize::from(connections)));
        let others = self.accept_others(connections, may_follow)?;
        let progress = &self.reception.progress;
        let arrivals = Arrivals::start(others, &memory, &rendezvous, progress)?;
        let state = match self.memory_and_state(&memory, &rendezvous) {
            Ok(Some(state)) => state,
            Ok(None) => return Ok(()),
            Err(Failure(why)) => {
                let why = rendezvous.broken().unwrap_or(why);
                rendezvous.break_up(why.clone());
                self.trouble = Some(why.clone());
                self.step(TargetEvent::LoadFailed);
                return Err(Failure(why));
            }
        };
        // All of them have come to the end of the last pass.
        drop(arrivals);
        self.reception.control.guard_connections();
        progress.enter(MigrationPhase::SwitchOver);
        if let Err(error) = self.begin_to_follow(&memory) {
            self.trouble = Some(with_causes(&error));
            self.step(TargetEvent::LoadFailed);
            return Ok(());
        }
        self.load(state);
        self.hand_over();
        if self.machine.state() == TargetState::Running {
            let followed = self.following.is_some();
            self.follow();
            if !followed {
                self.see_off();
            }
        }
        Ok(())
    }

    /// Stays for a source that may not have heard that the machine runs here.
    fn see_off(&mut self) {
        let end = Instant::now() + SEE_OFF_LIMIT;
        while Instant::now() < end {
            let Some(channel) = &mut self.channel else {
                self.seek();
                continue;
            };
            let ends_mean_something = ends_mean_something(channel);
            match channel.receive() {
                // It has heard it.
                Ok(Received::Message(Message::KeepAlive)) => return,
                Ok(Received::Message(message)) => {
                    if let Some(event) = TargetEvent::of(&message) {
                        self.step(event);
                    }
                }
                // It has ended.
                Err(ChannelError::Closed) if ends_mean_something => return,
                Ok(_) | Err(_) => self.channel = None,
            }
        }
    }

    /// Has the owner make what the machine needs, and tells the source.
    fn prepare(
        &mut self,
        offer: &Offer,
        handed: Option<OwnedFd>,
    ) -> Result<Arc<MachineMemory>, Failure> {
        let progress = &self.reception.progress;
        progress.enter(MigrationPhase::Negotiating);
        let (reply, prepared) = channel();
        let event = IncomingEvent::Prepare {
            offer: Box::new(offer.clone()),
            handed,
            reply,
        };
        self.reception.sender.send(Event::Incoming(event));
        let prepared = prepared.recv();
        let Some(channel) = &mut self.channel else {
            return Err(Failure("there is no connection".into()));
        };
        match prepared {
            Ok(Ok((guest, disks))) => {
                self.disks = disks;
                let accepted = Acceptance {
                    shares_memory: self.shares_memory,
                };
                let accepted = serde_json::to_value(accepted).map_err(ChannelError::Message)?;
                channel.send(&Message::Accepted(accepted))?;
                channel.set_limit(STALL_LIMIT)?;
                let memory = MachineMemory::new(guest, Backing::Zeros);
                progress.update(|status| {
                    status.memory_bytes = memory.size;
                    status.mode = offer.mode;
                });
                if !self.shares_memory {
                    progress.enter(MigrationPhase::PreCopy);
                }
                Ok(Arc::new(memory))
            }
            Ok(Err(reasons)) => Err(channel.refuse(reasons).into()),
            Err(_) => Err(Failure("the process is about to end".into())),
        }
    }

    /// Waits for the other connections of the move.
    fn accept_others(&self, connections: u8, may_follow: bool) -> Result<Vec<Channel>, Failure> {
        let mut faults = may_follow;
        let mut others: Vec<Option<Channel>> = (1..connections).map(|_| None).collect();
        let end = Instant::now() + OTHERS_LIMIT;
        while faults || others.iter().any(Option::is_none) {
            if Instant::now() >= end || self.reception.control.is_cancelled() {
                let why = "not all connections that the source has announced have come";
                return Err(Failure(why.into()));
            }
            let Some(mut channel) = self.accept()? else {
                continue;
            };
            let Ok(hello) = channel.meet() else {
                continue;
            };
            if hello.purpose == Purpose::Faults && faults && hello.session == *self.session {
                channel.welcome(&hello)?;
                channel.set_limit(STALL_LIMIT)?;
                self.handset.give(channel);
                faults = false;
                continue;
            }
            let place = match hello.purpose {
                Purpose::Pages { index } if hello.session == *self.session => index
                    .checked_sub(1)
                    .and_then(|index| others.get_mut(usize::from(index))),
                _ => None,
            };
            match place {
                Some(place @ None) => {
                    channel.welcome(&hello)?;
                    channel.set_limit(STALL_LIMIT)?;
                    *place = Some(channel);
                }
                _ => drop(channel.refuse(vec!["the target receives another machine".into()])),
            }
        }
        Ok(others.into_iter().flatten().collect())
    }

    fn accept(&self) -> Result<Option<Channel>, Failure> {
        match self.reception.accept() {
            Ok(accepted) => Ok(accepted.map(|(channel, _)| channel)),
            Err(error) => Err(Failure(with_causes(&error))),
        }
    }

    /// Takes memory and state; `None` if the source has called it off.
    fn memory_and_state(
        &mut self,
        memory: &MachineMemory,
        rendezvous: &Rendezvous,
    ) -> Result<Option<(Vec<u8>, Stopped)>, Failure> {
        let progress = &self.reception.progress;
        let Some(channel) = &mut self.channel else {
            return Ok(None);
        };
        let mut state = Vec::new();
        loop {
            match channel.receive()? {
                Received::Pages(pages) if !self.shares_memory => take(memory, pages, progress)?,
                Received::Disk {
                    drive,
                    offset,
                    bytes,
                } => self.disks.write((drive, offset), bytes, progress)?,
                Received::DiskZeros {
                    drive,
                    offset,
                    length,
                } => self.disks.zero(drive, offset, length)?,
                Received::Message(Message::DisksEnded { last }) => {
                    self.disks.pass_ended(last, channel)?;
                }
                Received::State { offset, bytes, .. } => {
                    if offset != state.len() as u64 || state.len() + bytes.len() > MOST_STATE {
                        let why = "the source has sent a state that does not fit together";
                        return Err(Failure(why.into()));
                    }
                    state.extend_from_slice(bytes);
                }
                Received::Missing { first_word, bytes } if !self.shares_memory => {
                    let empty = || PageSet::empty(memory.size);
                    let missing = self.missing.get_or_insert_with(empty);
                    let first = usize::try_from(first_word).unwrap_or(usize::MAX);
                    missing.insert_words(first, &words_of(bytes));
                }
                Received::Message(Message::PassEnded { pass, .. }) => {
                    rendezvous.wait(0, pass)?;
                    channel.send(&Message::PassTaken { pass })?;
                    progress.update(|status| status.pass = pass);
                }
                Received::Message(Message::Sent { paused_us, unix_ns }) => {
                    let stopped = Stopped {
                        before: Duration::from_micros(paused_us),
                        sent_unix_ns: unix_ns,
                        arrived: Instant::now(),
                    };
                    return Ok(Some((state, stopped)));
                }
                Received::Message(Message::Cancel { why }) => {
                    let why = format!("the source keeps it: {why}");
                    // It may not know what it was that was wrong.
                    self.trouble = Some(rendezvous.broken().unwrap_or(why));
                    self.step(TargetEvent::Cancel);
                    return Ok(None);
                }
                Received::Message(Message::KeepAlive) => {}
                _ => {
                    let why = "the source has sent something out of turn";
                    return Err(Failure(why.into()));
                }
            }
        }
    }

    /// Lets the guest wait for what is to follow, if something is.
    fn begin_to_follow(&mut self, memory: &MachineMemory) -> Result<(), UffdError> {
        let Some(missing) = self.missing.take() else {
            return Ok(());
        };
        let following = Arc::new(Following::begin(&memory.guest, missing)?);
        let progress = self.reception.progress.clone();
        super::following::start(following.clone(), self.handset.clone(), progress)
            .map_err(UffdError::Thread)?;
        self.following = Some(following);
        Ok(())
    }

    /// Takes what follows, as often as that takes.
    fn follow(&mut self) {
        let Some(following) = self.following.clone() else {
            return;
        };
        let progress = &self.reception.progress;
        while let Err(Failure(why)) = self.take_rest(&following) {
            tracing::warn!("the rest of the memory is held up: {why}");
            progress.update(|status| status.error = Some(why));
            progress.enter(MigrationPhase::PostCopyInterrupted);
            self.channel = None;
            while self.channel.is_none() {
                if let Err(Failure(why)) = self.let_return(&following) {
                    tracing::warn!("the source is not found again: {why}");
                    self.channel = None;
                }
            }
            progress.update(|status| status.error = None);
            progress.enter(MigrationPhase::PostCopy);
        }
        progress.enter(MigrationPhase::Completed);
    }

    fn take_rest(&mut self, following: &Following) -> Result<(), Failure> {
        let progress = &self.reception.progress;
        let Some(channel) = &mut self.channel else {
            return Err(Failure("there is no connection".into()));
        };
        loop {
            match channel.receive()? {
                Received::Pages(pages) => super::following::give(following, pages, progress)
                    .map_err(|error| Failure(error.to_string()))?,
                Received::Message(Message::MemorySent) => break,
                Received::Message(Message::KeepAlive | Message::Commit) => {}
                _ => {
                    let why = "the source has sent something out of turn";
                    return Err(Failure(why.into()));
                }
            }
        }
        if !following.wait_complete(STALL_LIMIT) {
            return Err(Failure("the source has not sent all pages".into()));
        }
        following
            .end()
            .map_err(|error| Failure(error.to_string()))?;
        self.step(TargetEvent::MemoryComplete);
        Ok(())
    }

    /// Waits for the source to come back, and tells it what is missing.
    fn let_return(&mut self, following: &Following) -> Result<(), Failure> {
        let Some(mut channel) = self.accept()? else {
            return Ok(());
        };
        let hello = channel.meet()?;
        if hello.session != *self.session {
            return Err(channel
                .refuse(vec!["the target waits for another source".into()])
                .into());
        }
        channel.welcome(&hello)?;
        channel.set_limit(STALL_LIMIT)?;
        self.channel = Some(channel);
        self.step(TargetEvent::Returned);
        let Some(channel) = &mut self.channel else {
            return Ok(());
        };
        channel.send_missing(&following.words())?;
        let end = Instant::now() + OTHERS_LIMIT;
        while Instant::now() < end {
            let Some(mut faults) = self.accept()? else {
                continue;
            };
            let hello = faults.meet()?;
            if hello.purpose == Purpose::Faults && hello.session == *self.session {
                faults.welcome(&hello)?;
                faults.set_limit(STALL_LIMIT)?;
                self.handset.give(faults);
                return Ok(());
            }
        }
        Err(Failure("not all connections have come back".into()))
    }

    /// Has the owner give the machine its state.
    fn load(&mut self, (state, stopped): (Vec<u8>, Stopped)) {
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
        let loaded = loaded.recv();
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

    /// Waits for the word of the source, or what takes its place.
    fn hand_over(&mut self) {
        loop {
            match self.machine.state() {
                TargetState::Running | TargetState::Dropped | TargetState::Receiving => return,
                TargetState::InDoubt => self.seek(),
                TargetState::Loaded | TargetState::Asked => {
                    let event = self.hear();
                    self.step(event);
                }
            }
        }
    }

    fn hear(&mut self) -> TargetEvent {
        let Some(channel) = &mut self.channel else {
            return TargetEvent::LinkLost;
        };
        let ends_mean_something = ends_mean_something(channel);
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
            Err(ChannelError::Closed) if ends_mean_something => {
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

    fn step(&mut self, event: TargetEvent) {
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

    fn send(&mut self, message: &Message) {
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
        // An end of the process says it too.
        let _ = starts.recv();
        let resume_us = micros(begun.elapsed());
        self.send(&Message::Running { resume_us });
        let phase = if self.following.is_some() {
            MigrationPhase::PostCopy
        } else {
            MigrationPhase::Completed
        };
        self.reception.progress.enter(phase);
    }

    /// Waits for the source to come back, or for somebody who decides.
    fn seek(&mut self) {
        let decision = match self.reception.control.decision(Duration::ZERO) {
            Some(MigrationDecision::Run) => Some(Decision::Run),
            Some(MigrationDecision::Abandon) => Some(Decision::Abandon),
            None => None,
        };
        if let Some(decision) = decision {
            self.trouble = Some("it was given up".into());
            return self.step(TargetEvent::Decision(decision));
        }
        let Ok(Some(mut channel)) = self.accept() else {
            return;
        };
        match channel.meet() {
            Ok(hello) if hello.purpose == Purpose::Return && hello.session == *self.session => {
                if channel.welcome(&hello).is_ok() {
                    self.channel = Some(channel);
                    self.step(TargetEvent::Returned);
                }
            }
            Ok(_) => drop(channel.refuse(vec!["the target waits for another source".into()])),
            Err(error) => tracing::warn!("{}", with_causes(&error)),
        }
    }
}

/// Whether an end in order says that the peer's process has ended. Over plain TCP anybody between
/// the two sides may end a connection in order, a relay for one.
pub(super) fn ends_mean_something(channel: &Channel) -> bool {
    channel.link().is_local() || channel.link().is_secured()
}

/// What the source sends, and its memory, if it hands that over.
fn hear_offer(channel: &mut Channel) -> Result<(Offer, Option<OwnedFd>), Failure> {
    let Message::Offer(offer) = channel.receive_message()? else {
        return Err(Failure("the source has not said what it sends".into()));
    };
    let offer: Offer = match serde_json::from_value(offer) {
        Ok(offer) => offer,
        Err(error) => {
            let why = format!("the target does not understand what the machine is: {error}");
            return Err(channel.refuse(vec![why]).into());
        }
    };
    if !(1..=MOST_CONNECTIONS).contains(&offer.connections) {
        let why = format!("a machine comes over 1 to {MOST_CONNECTIONS} connections");
        return Err(channel.refuse(vec![why]).into());
    }
    let handed = offer.shares_memory.then(|| channel.receive_fd());
    Ok((offer, handed.transpose()?))
}
