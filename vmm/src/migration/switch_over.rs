// SPDX-License-Identifier: Apache-2.0
//! The hand-over as the source carries it out. Which side may run the guest is decided by
//! [`brume_migration::Source`]; here are its connection, its clock and its owner.

mod follow_up;

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use brume_api::{MigrationDowntime, MigrationPhase, with_causes};
use brume_migration::{
    Channel, ChannelError, Message, Received, Source, SourceAction, SourceEvent as Event,
    SourceState,
};
use brume_virtio::block::BlockControl;

use self::follow_up::GIVEN_UP;
use super::control::Control;
use super::disks::Disks;
use super::error::SourceError;
use super::lanes::{Lane, Lanes};
use super::passes::Passes;
use super::route::Route;
use super::serving::{Faults, Left};
use super::source::{HandOver, SourceEnd, SourceEvent, call_off};
use super::status::{Progress, micros};
use super::target::ends_mean_something;
use crate::cpu::Place;
use crate::event::{Event as OwnerEvent, EventSender};

/// How long nothing may move while the guest stands still.
const STILL_LIMIT: Duration = Duration::from_secs(5);
/// How long the target may take to say what is wrong with a connection meanwhile.
const WORD_LIMIT: Duration = Duration::from_millis(200);
/// How often it is looked whether a client has called it off.
const LOOK: Duration = Duration::from_millis(50);
/// How long to wait between two tries to find the target again.
const RETRY: Duration = Duration::from_millis(500);
/// How often it is tried to tell a lost target that it is not needed any more.
const LAST_WORDS: u32 = 20;

/// A hand-over.
pub(super) struct SwitchOver<'a> {
    pub(super) passes: &'a Passes,
    pub(super) lanes: &'a mut Lanes,
    pub(super) disks: &'a mut Disks,
    pub(super) control: &'a Control,
    pub(super) progress: &'a Progress,
    pub(super) sender: &'a EventSender,
    pub(super) route: &'a Route,
    pub(super) drives: &'a [BlockControl],
}

/// Memory that follows the guest.
struct Follows {
    left: Arc<Left>,
    /// What answers the target; none while it is lost.
    server: Option<Faults>,
}

/// When things happened.
#[derive(Default)]
struct Moments {
    stopped: Option<Instant>,
    held: Option<Instant>,
    pages_sent: Option<Instant>,
    state_sent: Option<Instant>,
    ready: Option<Instant>,
}

impl SwitchOver<'_> {
    /// Hands the machine over; an error says that it stays here.
    /// With `faults`, what is left of its memory follows it, on that connection if it is waited for.
    pub(super) fn run(
        mut self,
        number: u32,
        faults: Option<Lane>,
    ) -> Result<SourceEnd, SourceError> {
        // How a connection ends means something from here on.
        self.control.guard_connections();
        if self.control.is_cancelled() {
            let channel = &mut self.lanes.first.channel;
            return Err(call_off(channel, SourceError::Cancelled, WORD_LIMIT));
        }
        // It is for the time that the guest runs here.
        self.control.rate().set(0);
        self.progress.enter(MigrationPhase::SwitchOver);
        self.progress.update(|status| status.pass = number);
        let mut moments = Moments::default();
        let mut machine = Source::new();
        let follows = match self.send_rest((number, faults), &mut moments, &mut machine) {
            Ok(follows) => follows,
            Err(error) => {
                // `Sent` was not written whole, so the target will not run what it has, and the guest
                // need not wait until it is told so and all connections are closed.
                self.give_back();
                return Err(call_off(&mut self.lanes.first.channel, error, WORD_LIMIT));
            }
        };
        Talk {
            route: self.route.clone(),
            context: self,
            machine,
            moments,
            follows,
            channel: None,
            error: None,
            is_given_up: false,
        }
        .run()
    }

    /// Sends what vCPUs at `places` need first, tells the target what is left, and answers it on
    /// `faults` from now on: it may need a page to take on the state.
    fn begin_to_serve(&mut self, faults: Lane, places: &[Place]) -> Result<Follows, SourceError> {
        let rest = self.passes.all_but_first(places, self.lanes)?;
        let left = rest.count();
        self.progress.update(|status| status.remaining_pages = left);
        let memory = self.passes.memory();
        let ends = memory.regions.iter().map(|region| region.pages().end);
        let left = Arc::new(Left::new(rest, ends.collect()));
        self.lanes.first.channel.send_missing(&left.words())?;
        let server = Faults::serve(faults, &left, self.progress)?;
        Ok(Follows {
            left,
            server: Some(server),
        })
    }

    /// Another host that shares the disks has to see what the guest has written.
    fn show_disks(&self) -> Result<(), SourceError> {
        if self.lanes.first.channel.link().is_local() {
            return Ok(());
        }
        for drive in self.drives {
            let shown = drive.flush();
            shown.map_err(|error| SourceError::HandOver(with_causes(&error)))?;
        }
        Ok(())
    }

    /// Has the guest go on here.
    fn give_back(&self) {
        self.passes.end();
        let resume = OwnerEvent::Migration(SourceEvent::Resume);
        self.sender.send(resume);
    }

    /// Stops the machine and sends what is left of its memory, and its state; what follows it, if
    /// there is a connection for that.
    fn send_rest(
        &mut self,
        (number, faults): (u32, Option<Lane>),
        moments: &mut Moments,
        machine: &mut Source,
    ) -> Result<Option<Follows>, SourceError> {
        self.lanes.first.channel.set_limit(STILL_LIMIT)?;
        // What the guest writes until it stops is little then.
        self.show_disks()?;
        let (reply, answers) = channel();
        let follows = faults.is_some();
        let order = SourceEvent::HandOver { reply, follows };
        self.sender.send(OwnerEvent::Migration(order));
        let places = match answers.recv() {
            Ok(HandOver::Held { since, places }) => {
                moments.stopped = Some(since);
                places
            }
            Ok(HandOver::Failed(why)) => return Err(SourceError::HandOver(why)),
            _ => return Err(SourceError::Ended),
        };
        moments.held = Some(Instant::now());
        self.disks.last(self.lanes, self.progress)?;
        self.show_disks()?;
        let follows = match faults {
            Some(faults) => {
                // As far as KVM tells.
                let told = places.iter().filter_map(|place| place.recv().ok());
                let places: Vec<_> = told.flatten().collect();
                Some(self.begin_to_serve(faults, &places)?)
            }
            None => {
                self.passes.last(number, self.lanes)?;
                None
            }
        };
        moments.pages_sent = Some(Instant::now());
        let (state, clocks_read) = match answers.recv() {
            Ok(HandOver::State { state, clocks_read }) => (state, clocks_read),
            Ok(HandOver::Failed(why)) => return Err(SourceError::HandOver(why)),
            _ => return Err(SourceError::Ended),
        };
        let channel = &mut self.lanes.first.channel;
        channel.send_state(&state)?;
        machine.step(Event::AllSent {
            memory_follows: follows.is_some(),
        });
        channel.send(&Message::Sent {
            paused_us: micros(clocks_read.elapsed()),
            unix_ns: super::status::unix_nanos(),
        })?;
        moments.state_sent = Some(Instant::now());
        Ok(follows)
    }
}

/// The exchange after everything was sent.
struct Talk<'a> {
    context: SwitchOver<'a>,
    /// Where the target is looked for.
    route: Route,
    machine: Source,
    moments: Moments,
    follows: Option<Follows>,
    /// The connection after the first one.
    channel: Option<Channel>,
    error: Option<SourceError>,
    /// Whether it was decided that nothing more is done for the machine.
    is_given_up: bool,
}

impl Talk<'_> {
    fn run(mut self) -> Result<SourceEnd, SourceError> {
        loop {
            match self.machine.state() {
                SourceState::Gone if self.is_given_up => return Ok(self.lost(GIVEN_UP)),
                SourceState::Gone => {
                    self.arrived(MigrationPhase::Completed);
                    return Ok(SourceEnd::Moved);
                }
                SourceState::Serving => {
                    self.context.control.pass();
                    self.arrived(MigrationPhase::PostCopy);
                    let end = self.serve();
                    self.context.passes.end();
                    return Ok(end);
                }
                SourceState::Kept => {
                    return Err(self.error.take().unwrap_or(SourceError::Cancelled));
                }
                SourceState::InDoubt => self.seek(),
                _ => {
                    let event = self.hear();
                    self.step(event);
                }
            }
        }
    }

    fn channel(&mut self) -> &mut Channel {
        match &mut self.channel {
            Some(channel) => channel,
            None => &mut self.context.lanes.first.channel,
        }
    }

    /// The next event, of which there is always one in the end.
    fn hear(&mut self) -> Event {
        let end = Instant::now() + STILL_LIMIT;
        loop {
            if self.context.control.is_cancelled() && self.machine.state() == SourceState::Offered {
                self.error = Some(SourceError::Cancelled);
                return Event::CancelRequested;
            }
            match self.channel().wait(LOOK) {
                Ok(false) if Instant::now() < end => continue,
                Ok(false) => {
                    self.error = Some(SourceError::Silent);
                    return Event::TimedOut;
                }
                Ok(true) => {}
                Err(error) => return self.channel_event(error),
            }
            let message = match self.channel().receive() {
                Ok(Received::Message(message)) => message,
                Ok(_) => return self.channel_event(ChannelError::OutOfTurn("something else")),
                Err(error) => return self.channel_event(error),
            };
            self.note(&message);
            match Event::of(&message) {
                // A client was told that it stays.
                Some(Event::Ready) if self.context.control.is_cancelled() => {}
                Some(event) => return event,
                None => {}
            }
        }
    }

    fn note(&mut self, message: &Message) {
        match message {
            Message::Ready { .. } => self.moments.ready = Some(Instant::now()),
            Message::Failed { why } => self.error = Some(SourceError::Target(why.clone())),
            _ => {}
        }
    }

    fn channel_event(&mut self, error: ChannelError) -> Event {
        let event = match error {
            // On another connection than the first one, a relay may be what has ended.
            ChannelError::Closed
                if self.channel.is_none() && ends_mean_something(self.channel()) =>
            {
                Event::LinkClosed
            }
            ChannelError::Closed | ChannelError::Lost(_) => Event::LinkLost,
            ChannelError::TimedOut => Event::TimedOut,
            _ => Event::Unexpected,
        };
        self.error = Some(error.into());
        event
    }

    fn step(&mut self, event: Event) {
        let before = self.machine.state();
        for action in self.machine.step(event) {
            self.act(*action);
        }
        let after = self.machine.state();
        if before != after && after == SourceState::InDoubt {
            tracing::warn!(
                "the connection broke while the machine was handed over: neither side runs it \
                 until the target is found again"
            );
            self.context.progress.enter(MigrationPhase::InDoubt);
        }
    }

    fn act(&mut self, action: SourceAction) {
        match action {
            SourceAction::SendCommit => {
                // A connection that does not take it will tell so when it is read from.
                let _ = self.channel().send(&Message::Commit);
            }
            SourceAction::SendCancel => {
                let why = self.error.as_ref();
                let why = why.map_or_else(|| "it was called off".into(), ToString::to_string);
                // A connection that does not take all of it is reset when it is dropped.
                let _ = self.channel().send(&Message::Cancel { why });
            }
            SourceAction::ResumeGuest => {
                self.context.give_back();
            }
            SourceAction::StopGuest => {
                let stop = SourceEvent::Ended(SourceEnd::Moved);
                self.context.sender.send(OwnerEvent::Migration(stop));
            }
            SourceAction::Reconnect if self.machine.state() == SourceState::Kept => {
                self.say_good_bye();
            }
            // Done by `seek`.
            SourceAction::Reconnect => {}
            SourceAction::Refuse(refusal) => tracing::warn!("{refusal}"),
        }
    }

    /// Looks for the target again, or for somebody who decides.
    fn seek(&mut self) {
        let decision = self.context.control.decision(RETRY);
        self.take_directions();
        if let Some(decision) = decision {
            self.step(Event::Decision(decision));
            self.is_given_up = self.machine.state() == SourceState::Gone;
            return;
        }
        match self.route.come_back(STILL_LIMIT) {
            Ok(channel) => {
                self.channel = Some(channel);
                self.tell_where();
                self.step(Event::Returned);
            }
            Err(error) => {
                let address = &self.route.address;
                tracing::debug!(
                    "the target is not found at {address}: {}",
                    with_causes(&error)
                );
            }
        }
    }

    /// Looks from now on where people say that the target is; empty for where it was.
    fn take_directions(&mut self) {
        match self.context.control.resume() {
            Some(place) if place.is_empty() => self.route = self.context.route.clone(),
            // It was checked when it was said.
            Some(place) => {
                if let Ok(address) = place.parse() {
                    self.route.address = address;
                }
            }
            None => {}
        }
    }

    /// Tells where the target was found again.
    fn tell_where(&self) {
        let peer = self.route.address.to_string();
        let progress = self.context.progress;
        progress.update(|status| status.peer = Some(peer));
    }

    /// What was said before the target was lost means nothing any more.
    fn forget_directions(&self) {
        let _ = self.context.control.resume();
    }

    /// Tells a target that was lost that it is not needed any more, beside everything else.
    fn say_good_bye(&self) {
        let mut routes = vec![self.route.clone()];
        // Where people said that it is may be wrong.
        if self.route.address != self.context.route.address {
            routes.push(self.context.route.clone());
        }
        let tell = move || {
            for _ in 0..LAST_WORDS {
                std::thread::sleep(RETRY);
                if routes.iter().any(|route| dismiss(route).is_ok()) {
                    return;
                }
            }
        };
        // Without it the target waits for somebody to decide.
        let _ = std::thread::Builder::new()
            .name("last words".into())
            .spawn(tell);
    }

    /// The machine is the target's.
    fn arrived(&mut self, phase: MigrationPhase) {
        let committed = self.moments.ready.unwrap_or_else(Instant::now);
        let mut resume = committed.elapsed();
        // It says how long it took there; what is left is the way there and back, and that the guest
        // kept who tells this from running.
        let channel = self.channel();
        if channel.wait(Duration::from_secs(1)).unwrap_or(false)
            && let Ok(Message::Running {
                resume_us,
                since_us,
            }) = channel.receive_message()
        {
            let all = committed.elapsed();
            let there = Duration::from_micros(resume_us);
            let since = Duration::from_micros(since_us);
            resume = there + all.saturating_sub(there + since) / 2;
        }
        // So that the target need not wait for a source that comes back.
        let _ = channel.send(&Message::KeepAlive);
        let downtime = self.moments.downtime(resume);
        tracing::info!(
            "the machine has moved to {}; it stood still for {} us",
            self.route.address,
            downtime.total_us
        );
        self.context.progress.update(|status| {
            status.downtime = Some(downtime);
            if phase == MigrationPhase::Completed {
                status.remaining_pages = 0;
            }
            status.expected_downtime_us = None;
            status.time_left_ms = None;
        });
        self.context.progress.enter(phase);
    }
}

/// Tells a target that it is not needed any more.
fn dismiss(route: &Route) -> Result<(), SourceError> {
    let why = "the source goes on with the machine".to_owned();
    let mut channel = route.come_back(STILL_LIMIT)?;
    channel.send(&Message::Cancel { why })?;
    Ok(())
}

impl Moments {
    fn downtime(&self, resume: Duration) -> MigrationDowntime {
        let between = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => to.saturating_duration_since(from),
            _ => Duration::ZERO,
        };
        let parts = [
            between(self.stopped, self.held),
            between(self.held, self.pages_sent),
            between(self.pages_sent, self.state_sent),
            between(self.state_sent, self.ready),
            resume,
        ];
        let [pause_us, pages_us, state_us, load_us, resume_us] = parts.map(micros);
        MigrationDowntime {
            total_us: micros(parts.iter().sum()),
            pause_us,
            pages_us,
            state_us,
            load_us,
            resume_us,
        }
    }
}
