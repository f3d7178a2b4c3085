// SPDX-License-Identifier: Apache-2.0
//! A machine that arrives, up to its state: what is agreed on, its connections, its memory.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use brume_api::config::HugePages;
use brume_api::{MigrationPhase, with_causes};
use brume_migration::{
    Channel, ChannelError, Hello, Message, Purpose, Received, StateParts, Target, TargetEvent,
    TargetState,
};

use super::super::arrivals::{Arrivals, Rendezvous, count_zeros, take};
use super::super::disks_in::DisksIn;
use super::super::following::Handset;
use super::super::incoming::{IncomingEvent, Stopped};
use super::super::offer::{Acceptance, Offer};
use super::super::serving::words_of;
use super::super::warm_heap::WarmHeap;
use super::errand::send_away;
use super::{Failure, LOOK, Reception};
use crate::event::Event;
use crate::memory::{Backing, Filling, Following, MachineMemory};
use crate::page_set::PageSet;

/// How long a source may take to say what it sends.
const OFFER_LIMIT: Duration = Duration::from_secs(10);
/// How long the other connections of a move may take to come.
pub(super) const OTHERS_LIMIT: Duration = Duration::from_secs(10);
/// How long nothing may come while memory moves.
pub(super) const STALL_LIMIT: Duration = Duration::from_secs(30);
/// How much is forgotten before the source is told that it goes on, in words of 64 pages: 4 GiB.
const FORGOTTEN_WORDS: usize = 1 << 14;
/// How many bitmaps of the memory there are at once.
const BITMAPS: u64 = 5;
/// The most connections that carry memory.
const MOST_CONNECTIONS: u8 = 16;

/// A machine that arrives.
pub(super) struct Arrival<'a> {
    pub(super) reception: &'a Reception,
    pub(super) channel: Option<Channel>,
    /// Whether that is another one than the first.
    pub(super) has_returned: bool,
    /// Whether its memory is the source's.
    pub(super) shares_memory: bool,
    /// What is to follow.
    pub(super) missing: Option<PageSet>,
    pub(super) following: Option<Arc<Following>>,
    /// Where the thread gets its connection that asks for what the guest waits for.
    pub(super) handset: Handset,
    pub(super) machine: Target,
    pub(super) disks: DisksIn,
    /// What has gone wrong, as far as it was told.
    pub(super) trouble: Option<String>,
}

impl<'a> Arrival<'a> {
    /// One on `channel`, which is still to be welcomed.
    pub(super) fn new(reception: &'a Reception, channel: Channel) -> Self {
        Self {
            reception,
            channel: Some(channel),
            has_returned: false,
            shares_memory: false,
            missing: None,
            following: None,
            handset: Handset::default(),
            machine: Target::new(),
            disks: DisksIn::default(),
            trouble: None,
        }
    }

    /// Receives it to its end, whichever that is; an error says that it has not arrived.
    pub(super) fn receive(mut self, hello: &Hello) -> Result<(), Failure> {
        let result = self.go_through(hello);
        if self.machine.state() == TargetState::Running {
            return Ok(());
        }
        if let Some(following) = &self.following {
            following.abandon();
        }
        let why = result.err().map(|Failure(why)| why);
        Err(Failure(self.trouble.or(why).unwrap_or_default()))
    }

    fn go_through(&mut self, hello: &Hello) -> Result<(), Failure> {
        let Some(channel) = &mut self.channel else {
            return Ok(());
        };
        self.reception.control.watch(channel.closer()?);
        channel.welcome(hello)?;
        let (offer, handed) = hear_offer(channel, OFFER_LIMIT)?;
        self.shares_memory = handed.is_some();
        if self.shares_memory {
            self.reception.control.share_memory(channel.link());
        }
        let memory = self.prepare(&offer, handed)?;
        let small = offer.config.machine_config.huge_pages == HugePages::None;
        let filling = Arc::new(Filling::begin(memory, small && !self.shares_memory));
        let size = filling.memory().size;
        let heap = (!self.shares_memory).then(|| WarmHeap::begin(size, BITMAPS));
        let (connections, may_follow) = if self.shares_memory {
            (1, false)
        } else {
            (offer.connections, offer.may_follow)
        };
        let rendezvous = Arc::new(Rendezvous::new(usize::from(connections)));
        let others = self.accept_others(connections, may_follow)?;
        let progress = &self.reception.progress;
        let arrivals = Arrivals::start(others, &filling, &rendezvous, progress)?;
        let state = match self.memory_and_state(&filling, &rendezvous) {
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
        if let Err(Failure(why)) = self.begin_to_follow(&filling) {
            self.trouble = Some(why);
            self.step(TargetEvent::LoadFailed);
            return Ok(());
        }
        self.load(state);
        self.hand_over();
        drop(heap);
        if self.machine.state() == TargetState::Running {
            self.follow();
            self.see_off();
        }
        Ok(())
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
            let first = self.channel.as_ref().map(Channel::link);
            if first.is_none_or(|first| first.has_ended().unwrap_or(true)) {
                let why = "the source has gone before all of its connections were there";
                return Err(Failure(why.into()));
            }
            let Some((mut channel, hello)) = self.meet() else {
                continue;
            };
            match hello.purpose {
                Purpose::Faults if faults => {
                    let_in(&mut channel, &hello)?;
                    self.handset.give(channel);
                    faults = false;
                }
                Purpose::Pages { index } => {
                    let place = index.checked_sub(1);
                    match place.and_then(|place| others.get_mut(usize::from(place))) {
                        Some(place @ None) => {
                            let_in(&mut channel, &hello)?;
                            *place = Some(channel);
                        }
                        _ => send_away(&mut channel),
                    }
                }
                _ => send_away(&mut channel),
            }
        }
        Ok(others.into_iter().flatten().collect())
    }

    /// The next connection of this move, which is still to be welcomed; `None` if nobody has come
    /// for a while.
    pub(super) fn meet(&self) -> Option<(Channel, Hello)> {
        let met = self.reception.door.next(LOOK)?;
        Some((met.channel, met.hello))
    }

    /// Takes memory and state; `None` if the source has called it off.
    fn memory_and_state(
        &mut self,
        filling: &Filling,
        rendezvous: &Rendezvous,
    ) -> Result<Option<(Vec<u8>, Stopped)>, Failure> {
        let progress = &self.reception.progress;
        let Some(channel) = &mut self.channel else {
            return Ok(None);
        };
        let (mut parts, mut state) = (StateParts::new(), None);
        loop {
            match channel.receive()? {
                Received::Pages(pages) if !self.shares_memory => take(filling, pages, progress)?,
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
                Received::State {
                    offset,
                    last,
                    bytes,
                } if state.is_none() => state = parts.add(offset, last, bytes)?,
                Received::Missing { first_word, bytes } if !self.shares_memory => {
                    let empty = || PageSet::empty(filling.memory().size);
                    let missing = self.missing.get_or_insert_with(empty);
                    let first = usize::try_from(first_word).unwrap_or(usize::MAX);
                    missing.insert_words(first, &words_of(bytes));
                }
                Received::Message(Message::Stale) => {
                    let stale = self.missing.take().ok_or_else(out_of_turn)?;
                    forget(filling, &stale.into_words(), channel)?;
                }
                Received::Message(Message::PassEnded { pass, zeros, .. }) => {
                    count_zeros(zeros, progress);
                    rendezvous.wait(0, pass)?;
                    // From now on most of what comes is there already.
                    filling.settle();
                    channel.send(&Message::PassTaken { pass })?;
                    progress.update(|status| status.pass = pass);
                }
                Received::Message(Message::Sent { paused_us, unix_ns }) => {
                    let stopped = Stopped {
                        before: Duration::from_micros(paused_us),
                        sent_unix_ns: unix_ns,
                        arrived: Instant::now(),
                    };
                    let state = state.ok_or_else(out_of_turn)?;
                    return Ok(Some((state, stopped)));
                }
                Received::Message(Message::Cancel { why }) => {
                    let why = format!("the source keeps it: {why}");
                    let broken = rendezvous.broken();
                    if let Some(why) = broken.clone() {
                        // It does not know what was wrong with another connection.
                        self.send(&Message::Failed { why });
                    }
                    self.trouble = Some(broken.unwrap_or(why));
                    self.step(TargetEvent::Cancel);
                    return Ok(None);
                }
                Received::Message(Message::KeepAlive) => {}
                _ => return Err(out_of_turn()),
            }
        }
    }
}

/// Forgets what is old, and tells the source, also while it takes long.
fn forget(filling: &Filling, words: &[u64], channel: &mut Channel) -> Result<(), Failure> {
    for (part, words) in words.chunks(FORGOTTEN_WORDS).enumerate() {
        let forgotten = filling.forget(part * FORGOTTEN_WORDS, words);
        forgotten.map_err(|error| Failure(with_causes(&error)))?;
        channel.send(&Message::KeepAlive)?;
    }
    channel.send(&Message::Forgotten)?;
    Ok(())
}

/// Welcomes a connection that carries memory.
pub(super) fn let_in(channel: &mut Channel, hello: &Hello) -> Result<(), Failure> {
    channel.welcome(hello)?;
    channel.set_limit(STALL_LIMIT)?;
    Ok(())
}

pub(super) fn out_of_turn() -> Failure {
    Failure("the source has sent something out of turn".into())
}

/// What the source sends, and its memory, if it hands that over; all of it comes within `limit`:
/// whoever sends a byte now and then does not keep the place of a source.
fn hear_offer(channel: &mut Channel, limit: Duration) -> Result<(Offer, Option<OwnedFd>), Failure> {
    channel.set_deadline(Some(Instant::now() + limit))?;
    let heard = read_offer(channel);
    channel.set_deadline(None)?;
    heard
}

fn read_offer(channel: &mut Channel) -> Result<(Offer, Option<OwnedFd>), Failure> {
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

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::thread;

    use brume_migration::Link;

    use super::*;

    fn channel_of(stream: UnixStream) -> Channel {
        Channel::new(Link::from_unix(stream).unwrap())
    }

    #[test]
    fn an_offer_comes_in_time_or_not_at_all() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut frame = Vec::new();
        let offer = serde_json::json!({"text": "x".repeat(1000)});
        channel_of(ours).send(&Message::Offer(offer)).unwrap();
        (&theirs).read_to_end(&mut frame).unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut target = channel_of(ours);
        target.set_limit(Duration::from_secs(5)).unwrap();
        let dripper = thread::spawn(move || {
            for byte in frame {
                thread::sleep(Duration::from_millis(10));
                if theirs.write_all(&[byte]).is_err() {
                    return;
                }
            }
        });
        let begun = Instant::now();
        let Err(Failure(why)) = hear_offer(&mut target, Duration::from_millis(200)) else {
            panic!("it has come");
        };
        let time = begun.elapsed();
        assert!(time < Duration::from_secs(4), "{time:?}: {why}");
        assert_eq!(target.link().deadline(), None);
        drop(target);
        dripper.join().unwrap();
    }
}
