// SPDX-License-Identifier: Apache-2.0
//! The source's side of a move, up to the hand-over.

use std::io;
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use brume_api::{MigrationMode, MigrationPass, MigrationPhase, OnTimeout, SendMigration};
use brume_migration::{Channel, ChannelError, Message, Purpose};
use brume_virtio::block::BlockControl;

use super::control::Control;
use super::disks::Disks;
use super::error::SourceError;
use super::lanes::{Lane, Lanes};
use super::offer::{Acceptance, Offer};
use super::pace::{Next, Pace, Passed};
use super::passes::{PassDone, Passes};
use super::route::Route;
use super::serving::Faults;
use super::status::{Progress, micros, per_second};
use super::switch_over::SwitchOver;
use super::warm_heap::WarmHeap;
use crate::cpu::Place;
use crate::dirty::DirtyTracker;
use crate::event::{Event, EventSender};
use crate::kvm::KvmError;
use crate::memory::MachineMemory;
use crate::page_set::PAGE_SIZE;

/// How long the target may take to answer a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// How long it may take to make everything that the machine needs.
const OFFER_LIMIT: Duration = Duration::from_secs(60);
/// How long nothing may move while the guest runs here.
const STALL_LIMIT: Duration = Duration::from_secs(10);
/// How long the target may take to say what is wrong with a connection, while the guest runs here.
const WORD_LIMIT: Duration = Duration::from_secs(3);

/// How often the target is told at most, before the guest stops, what is to follow it.
const STALE_ROUNDS: u32 = 4;
/// How many pages it need not be told of: they are forgotten while the guest stands still, within
/// half a millisecond.
const FEW_STALE: u64 = 512;
/// How many bitmaps of the memory there are at once.
const BITMAPS: u64 = 10;

/// What the owner of the machine is asked for, or told.
pub(crate) enum SourceEvent {
    /// Stop the machine, and give its state away.
    HandOver {
        reply: Sender<HandOver>,
        /// Whether memory follows the guest, so that it matters what it needs first.
        follows: bool,
    },
    /// Slow the vCPUs by so many percent.
    Throttle(u8),
    /// The guest stays: it goes on, if it was stopped for this.
    Resume,
    /// It is over.
    Ended(SourceEnd),
}

/// The answers to [`SourceEvent::HandOver`], one after the other.
pub(crate) enum HandOver {
    /// vCPUs and devices stand still.
    Held {
        /// When the order to stop was given to them.
        since: Instant,
        /// They tell where they are; only if memory follows.
        places: Vec<Receiver<Result<Place, KvmError>>>,
    },
    /// The state of the machine.
    State {
        state: Vec<u8>,
        /// When the guest's clocks were read: until then they have run.
        clocks_read: Instant,
    },
    /// It does not stop, or has no state.
    Failed(String),
}

/// How it ended for the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SourceEnd {
    /// The machine is the target's.
    Moved,
    /// The machine is not here any more, and nobody knows of it elsewhere.
    Lost,
    /// The machine stays.
    Kept,
}

/// Whether memory follows the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Follow {
    No,
    Yes,
}

/// A machine that is about to move.
pub(crate) struct Departure {
    pub(crate) request: SendMigration,
    pub(crate) route: Route,
    /// The drives, whose contents another host is to see.
    pub(crate) drives: Vec<BlockControl>,
    pub(crate) offer: Offer,
    /// Those that move along.
    pub(crate) disks: Disks,
    pub(crate) memory: Arc<MachineMemory>,
    pub(crate) tracker: Arc<Mutex<DirtyTracker>>,
    pub(crate) control: Control,
    pub(crate) progress: Progress,
    pub(crate) sender: EventSender,
}

impl Departure {
    /// Moves it, beside its owner.
    ///
    /// # Errors
    ///
    /// The host gives no thread.
    pub(crate) fn spawn(self) -> io::Result<()> {
        thread::Builder::new()
            .name("migration".into())
            .spawn(move || {
                let sender = self.sender.clone();
                let (control, progress) = (self.control.clone(), self.progress.clone());
                let result = self.run();
                let end = result.as_ref().map_or(SourceEnd::Kept, SourceEnd::clone);
                sender.send(Event::Migration(SourceEvent::Ended(end)));
                // After that, so that whoever has heard of it finds a machine that can move.
                if let Err(error) = result {
                    tell_failure(&control, &progress, &error);
                }
            })
            .map(drop)
    }

    fn run(mut self) -> Result<SourceEnd, SourceError> {
        let mut passes = None;
        let result = self.send(&mut passes);
        if result.is_err() {
            if let Some(passes) = passes {
                passes.end();
            }
            self.sender.send(Event::Migration(SourceEvent::Resume));
        }
        result
    }

    /// Sends the machine. An error says that it stays here, and that nothing of it was handed over.
    fn send(&mut self, begun: &mut Option<Arc<Passes>>) -> Result<SourceEnd, SourceError> {
        let mut channel = self.connect()?;
        channel.greet(&self.route.session, Purpose::Control)?;
        self.progress.enter(MigrationPhase::Negotiating);
        self.offer.shares_memory = channel.link().is_local() && self.memory.shared().is_some();
        let accepted = match self.offer(&mut channel) {
            Ok(accepted) => accepted,
            Err(error) => return Err(call_off(&mut channel, error, WORD_LIMIT)),
        };
        if accepted.shares_memory {
            return self.send_shared(channel, begun);
        }
        let (others, faults) = match self.open_others() {
            Ok(others) => others,
            Err(error) => return Err(call_off(&mut channel, error, WORD_LIMIT)),
        };
        let _heap = WarmHeap::begin(self.memory.size, BITMAPS);
        let others = others.into_iter().map(|channel| self.lane(channel));
        let mut lanes =
            Lanes::new(self.lane(channel), others.collect()).map_err(SourceError::Thread)?;
        self.copy_disks(&mut lanes)?;
        let passes = Passes::begin(
            self.memory.clone(),
            self.tracker.clone(),
            self.progress.clone(),
        )?;
        let passes = begun.insert(Arc::new(passes)).clone();
        let (number, follow) = match self.pre_copy(&passes, &mut lanes) {
            Ok(done) => done,
            Err(error) => return Err(call_off(&mut lanes.first.channel, error, WORD_LIMIT)),
        };
        let faults = faults.filter(|_| follow == Follow::Yes);
        let faults = faults.map(|channel| self.lane(channel));
        self.switch_over(&passes, &mut lanes).run(number, faults)
    }

    /// Sends a machine whose memory the target has mapped.
    fn send_shared(
        &mut self,
        channel: Channel,
        begun: &mut Option<Arc<Passes>>,
    ) -> Result<SourceEnd, SourceError> {
        self.control.share_memory(channel.link());
        let (memory, tracker) = (self.memory.clone(), self.tracker.clone());
        let passes = Passes::none(memory, tracker, self.progress.clone())?;
        let passes = begun.insert(Arc::new(passes)).clone();
        let mut lanes = Lanes::new(self.lane(channel), Vec::new()).map_err(SourceError::Thread)?;
        self.copy_disks(&mut lanes)?;
        self.switch_over(&passes, &mut lanes).run(0, None)
    }

    /// Copies the disks, if they move too, while the guest runs.
    fn copy_disks(&mut self, lanes: &mut Lanes) -> Result<(), SourceError> {
        let (control, progress) = (&self.control, &self.progress);
        let copied = self.disks.copy(lanes, control, progress);
        copied.map_err(|error| call_off(&mut lanes.first.channel, error, WORD_LIMIT))
    }

    fn switch_over<'a>(&'a mut self, passes: &'a Passes, lanes: &'a mut Lanes) -> SwitchOver<'a> {
        SwitchOver {
            passes,
            lanes,
            disks: &mut self.disks,
            control: &self.control,
            progress: &self.progress,
            sender: &self.sender,
            route: &self.route,
            drives: &self.drives,
        }
    }

    fn lane(&self, channel: Channel) -> Lane {
        Lane::new(channel, self.memory.clone(), self.control.clone())
    }

    fn connect(&self) -> Result<Channel, SourceError> {
        if self.control.is_cancelled() {
            return Err(SourceError::Cancelled);
        }
        let mut channel = self.route.open(CONNECT_LIMIT)?;
        self.control.watch(channel.closer()?);
        channel.set_limit(STALL_LIMIT)?;
        Ok(channel)
    }

    /// Agrees with the target on what moves. Memory that can be shared is handed over with it:
    /// before it accepts, the target makes all that the machine needs, and its memory first.
    fn offer(&self, channel: &mut Channel) -> Result<Acceptance, SourceError> {
        let offer = serde_json::to_value(&self.offer).map_err(ChannelError::Message)?;
        channel.send(&Message::Offer(offer))?;
        if let Some(file) = self.memory.shared().filter(|_| self.offer.shares_memory) {
            channel.send_fd(file.as_fd())?;
        }
        channel.set_limit(OFFER_LIMIT)?;
        let accepted = match channel.receive_message()? {
            Message::Accepted(accepted) => accepted,
            Message::Refused { reasons } => return Err(SourceError::Refused(reasons)),
            Message::Failed { why } => return Err(SourceError::Target(why)),
            _ => return Err(out_of_turn()),
        };
        channel.set_limit(STALL_LIMIT)?;
        let accepted: Option<Acceptance> =
            serde_json::from_value(accepted).map_err(ChannelError::Message)?;
        let accepted = accepted.unwrap_or_default();
        if accepted.shares_memory && !self.offer.shares_memory {
            return Err(out_of_turn());
        }
        Ok(accepted)
    }

    /// The connections that carry memory besides, and the one for what the guest waits for, if
    /// memory may follow it.
    fn open_others(&self) -> Result<(Vec<Channel>, Option<Channel>), SourceError> {
        let open = |index| {
            let mut channel = self.connect()?;
            channel.greet(&self.route.session, Purpose::Pages { index })?;
            Ok(channel)
        };
        let others = (1..self.request.connections).map(open);
        let others = others.collect::<Result<_, SourceError>>()?;
        let faults = self.offer.may_follow.then(|| Faults::connect(&self.route));
        Ok((others, faults.transpose()?))
    }

    /// Passes until the guest can be stopped; the number of the last pass, and whether what is left
    /// follows the guest.
    fn pre_copy(
        &mut self,
        passes: &Passes,
        lanes: &mut Lanes,
    ) -> Result<(u32, Follow), SourceError> {
        if self.request.mode == MigrationMode::PostCopy {
            passes.note_all()?;
            return Ok((1, Follow::Yes));
        }
        if self.disks.is_empty() {
            self.progress.enter(MigrationPhase::PreCopy);
        }
        let mut pace = Pace::new();
        let in_use = self.offer.memory_in_use / PAGE_SIZE;
        self.progress
            .update(|status| status.remaining_pages = in_use);
        for number in 1.. {
            let begun = Instant::now();
            self.progress.update(|status| status.pass = number);
            self.disks.pass(lanes, &self.progress)?;
            let done = passes.pass(number, lanes)?;
            await_answer(lanes, &Message::PassTaken { pass: number })?;
            let time = begun.elapsed();
            let left = passes.left()?.count();
            let throttle = pace.throttle();
            let (next, follow) = self.decide(&mut pace, (number, done, time, left))?;
            self.tell_pass((&pace, throttle), (number, done, time, left));
            match next {
                Next::Stop if follow == Follow::Yes => {
                    self.tell_stale(passes, lanes)?;
                    return Ok((number + 1, follow));
                }
                Next::Stop => return Ok((number + 1, follow)),
                Next::Throttle(percent) => {
                    let throttle = SourceEvent::Throttle(percent);
                    self.sender.send(Event::Migration(throttle));
                }
                Next::Pass => {}
            }
        }
        Err(SourceError::TooSlow)
    }

    /// Has the target forget what is to follow, as far as it can be known while the guest runs: the
    /// more there is of it, the longer that takes.
    fn tell_stale(&self, passes: &Passes, lanes: &mut Lanes) -> Result<(), SourceError> {
        let mut told = 0;
        for _ in 0..STALE_ROUNDS {
            let stale = passes.left()?;
            let count = stale.count();
            if count <= told + FEW_STALE {
                break;
            }
            told = count;
            lanes.first.channel.send_missing(&stale.into_words())?;
            lanes.first.channel.send(&Message::Stale)?;
            await_answer(lanes, &Message::Forgotten)?;
        }
        Ok(())
    }

    fn decide(
        &self,
        pace: &mut Pace,
        (number, done, time, left): (u32, PassDone, Duration, u64),
    ) -> Result<(Next, Follow), SourceError> {
        if self.control.is_cancelled() {
            return Err(SourceError::Cancelled);
        }
        let limits = self.control.limits();
        let passed = Passed {
            number,
            bytes: done.sent.pages * PAGE_SIZE + self.disks.sent(),
            time,
            left: left + self.disks.left_pages(),
        };
        let next = pace.after(passed, limits.max_downtime, limits.auto_converge);
        let late = limits
            .deadline
            .is_some_and(|deadline| Instant::now() >= deadline);
        if next == Next::Stop {
            return Ok((next, Follow::No));
        }
        if self.request.mode == MigrationMode::Hybrid {
            return Ok((Next::Stop, Follow::Yes));
        }
        if !late {
            return Ok((next, Follow::No));
        }
        match limits.on_timeout {
            OnTimeout::Cancel => Err(SourceError::TooSlow),
            OnTimeout::PostCopy if self.offer.may_follow => Ok((Next::Stop, Follow::Yes)),
            OnTimeout::Force | OnTimeout::PostCopy => Ok((Next::Stop, Follow::No)),
        }
    }

    /// Tells of a pass, during which vCPUs were slowed by `throttle` percent.
    fn tell_pass(
        &self,
        (pace, throttle): (&Pace, u8),
        (number, done, time, left): (u32, PassDone, Duration, u64),
    ) {
        let bytes = done.sent.bytes + self.disks.sent();
        let bandwidth = per_second(bytes, time);
        let dirtied = left.saturating_sub(done.put_off);
        let dirty_rate = per_second(dirtied * PAGE_SIZE, time);
        let pass = MigrationPass {
            pass: number,
            pages: done.pages,
            sent_pages: done.sent.pages,
            skipped_pages: done.skipped,
            bytes,
            duration_us: micros(time),
            bandwidth,
            dirtied_pages: dirtied,
            throttle_percent: throttle,
        };
        tracing::debug!(
            "migration: pass {number}: {} pages in {} us, {left} left",
            done.sent.pages,
            micros(time)
        );
        self.progress.update(|status| {
            status.bandwidth = bandwidth;
            status.dirty_rate = dirty_rate;
            status.remaining_pages = left;
            status.throttle_percent = pace.throttle();
            status.expected_downtime_us = pace.downtime(left + self.disks.left_pages()).map(micros);
            status.bandwidth_limit = self.control.rate().get();
            status.max_downtime_us = micros(self.control.limits().max_downtime);
            // Only if it gets less: else nobody knows.
            status.time_left_ms = pace
                .bandwidth()
                .filter(|&bandwidth| bandwidth > dirty_rate)
                .map(|bandwidth| left * PAGE_SIZE * 1000 / (bandwidth - dirty_rate));
        });
        self.progress.passed(pass);
    }
}

fn tell_failure(control: &Control, progress: &Progress, error: &SourceError) {
    if control.is_cancelled() {
        tracing::info!("the machine stays: its move was called off");
        let why = "it was called off".to_owned();
        return progress.fail(MigrationPhase::Cancelled, why);
    }
    let why = brume_api::with_causes(error);
    tracing::error!("the machine stays, because it cannot be moved: {why}");
    progress.fail(MigrationPhase::Failed, why);
}

/// Waits until the target has said `answer`: that it has all of a pass.
pub(super) fn await_answer(lanes: &mut Lanes, answer: &Message) -> Result<(), SourceError> {
    loop {
        match lanes.first.channel.receive_message()? {
            message if message == *answer => return Ok(()),
            // It takes long.
            Message::KeepAlive => lanes.first.check()?,
            Message::Failed { why } => return Err(SourceError::Target(why)),
            _ => return Err(out_of_turn()),
        }
    }
}

pub(super) fn out_of_turn() -> SourceError {
    SourceError::Channel(ChannelError::OutOfTurn("another message than expected"))
}

/// Tells the target that the machine does not come, if it can be told; the error, or what the
/// target says of it within `limit`. Of what is wrong with a connection, the target may know more.
pub(super) fn call_off(channel: &mut Channel, error: SourceError, limit: Duration) -> SourceError {
    let _ = channel.set_limit(limit);
    let why = error.to_string();
    let _ = channel.send(&Message::Cancel { why });
    if !matches!(error, SourceError::Channel(_)) {
        return error;
    }
    let end = Instant::now() + limit;
    let _ = channel.set_deadline(Some(end));
    loop {
        match channel.receive_message() {
            Ok(Message::Failed { why }) => return SourceError::Target(why),
            // It was said before.
            Ok(_) if Instant::now() < end => {}
            _ => return error,
        }
    }
}
