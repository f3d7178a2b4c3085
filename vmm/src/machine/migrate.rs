// SPDX-License-Identifier: Apache-2.0
//! A machine that moves away, as its owner sees it.

use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use brume_api::config::HugePages;
use brume_api::{
    Answer, BalloonRequest, Fault, MigrationDecision, MigrationMode, MigrationPatch,
    MigrationPhase, MigrationRequest, MigrationRole, MigrationStatus, OnTimeout,
    Request as ApiRequest, SendMigration, with_causes,
};
use brume_migration::Address;
use brume_snapshot::StateWriter;
use brume_virtio::block::BlockControl;

use super::serve::{WaitingStop, still_needed};
use super::{Ending, Machine, PauseError};
use crate::cpu::VcpuHandle;
use crate::lifecycle::{VmEvent, VmState};
use crate::migration::{
    Control, Departure, Disks, HandOver, MetadataSection, Offer, Route, SourceEnd, SourceEvent,
};
use crate::snapshot::CreateError;

/// How long a client has to see how a move has ended before its source is gone.
const LAST_LOOK: Duration = Duration::from_secs(5);
/// How long a machine that is stopped waits until its move is called off.
const CALL_OFF: Duration = Duration::from_secs(2);

/// A move that is under way.
pub(super) struct Moving {
    control: Control,
    /// Whether the guest ran when it was stopped for the hand-over.
    ran: bool,
    /// Whether memory may follow it: the target was told so or not, when it began.
    may_follow: bool,
    /// Whether it is called off because the machine is to end.
    called_off: bool,
    /// A stop that waits until the target has all memory.
    pub(super) stop: Option<WaitingStop>,
}

impl Machine {
    /// Carries out a request about a move.
    pub(super) fn migration_call(&mut self, request: MigrationRequest) -> Result<Answer, Fault> {
        match request {
            MigrationRequest::Send(request) => self.begin_move(*request)?,
            MigrationRequest::Receive(_) => {
                return Err(Fault::new(
                    "This process has a machine already: a machine is received by a process \
                     without one.",
                ));
            }
            MigrationRequest::Get => return Answer::json(&self.telemetry.migration.get()),
            MigrationRequest::Patch(patch) => self.patch_move(&patch)?,
            MigrationRequest::Cancel => self.cancel_move()?,
        }
        Ok(Answer::done())
    }

    /// Refuses what would change a machine that is being moved.
    pub(super) fn refuse_while_moving(&self, request: &ApiRequest) -> Result<(), Fault> {
        let changes = matches!(
            request,
            ApiRequest::Pause
                | ApiRequest::Resume
                | ApiRequest::CreateSnapshot(_)
                | ApiRequest::PatchDrive(_)
                | ApiRequest::PatchNetworkInterface(_)
                | ApiRequest::Balloon(
                    BalloonRequest::SetAmount(_) | BalloonRequest::SetStatistics(_)
                )
                | ApiRequest::PutMmds(_)
                | ApiRequest::PatchMmds(_)
        );
        let saves = matches!(request, ApiRequest::CreateSnapshot(_));
        if saves && self.is_followed() {
            return Err(memory_follows());
        }
        if *request == ApiRequest::Stop && self.serves() {
            return Err(still_needed());
        }
        if changes && self.moving.is_some() {
            return Err(Fault::new(
                "The machine is being moved: call that off with DELETE /migration first.",
            ));
        }
        Ok(())
    }

    /// Whether a part of the memory is still where the machine came from.
    pub(super) fn is_followed(&self) -> bool {
        let following = self.memory.following.get();
        following.is_some_and(|following| !following.is_complete())
    }

    fn begin_move(&mut self, request: SendMigration) -> Result<(), Fault> {
        if self.state == VmState::Stopped {
            return Err(Fault::new("The machine is not here any more."));
        }
        // It is told only after that how the last move ended.
        let is_told = self.telemetry.migration.is_over();
        if self.moving.is_some() || !is_told && !self.is_followed() {
            return Err(Fault::new("The machine is being moved already."));
        }
        if self.saving {
            return Err(Fault::new(
                "A snapshot is being made: ask again when that is done.",
            ));
        }
        if self.is_followed() {
            return Err(memory_follows());
        }
        let huge = self.description.config.machine_config.huge_pages == HugePages::Size2M;
        if huge && may_follow(&request) {
            return Err(Fault::new(
                "Memory of 2 MiB pages cannot follow its machine: use mode PreCopy, and another \
                 on_timeout than PostCopy.",
            ));
        }
        let route = Route::of(&request)?;
        let is_passed = matches!(route.address, Address::Fd(_));
        if is_passed && (request.connections > 1 || may_follow(&request)) {
            return Err(Fault::new(
                "A socket that was passed is one connection: use 1 for `connections`, mode \
                 PreCopy, and another on_timeout than PostCopy.",
            ));
        }
        let disks = self.disks_to_move(&request)?;
        let control = Control::sending(&request);
        let progress = self.telemetry.migration.clone();
        progress.begin(MigrationStatus {
            role: MigrationRole::Source,
            phase: MigrationPhase::Connecting,
            mode: request.mode,
            peer: Some(request.destination.clone()),
            memory_bytes: self.memory.size,
            bandwidth_limit: request.bandwidth_limit,
            max_downtime_us: u64::from(request.max_downtime_ms) * 1000,
            ..MigrationStatus::default()
        });
        let (with_disks, may_follow) = (request.with_disks, may_follow(&request));
        let departure = Departure {
            offer: self.offer(&request, &disks),
            disks,
            request,
            route,
            drives: if with_disks {
                Vec::new()
            } else {
                self.drives_to_show()
            },
            memory: self.memory.clone(),
            tracker: self.tracker.clone(),
            control: control.clone(),
            progress: progress.clone(),
            sender: self.sender.clone(),
        };
        if let Err(error) = departure.spawn() {
            progress.fail(MigrationPhase::Failed, error.to_string());
            return Err(Fault::from_error(&error));
        }
        self.moving = Some(Moving {
            control,
            ran: false,
            may_follow,
            called_off: false,
            stop: None,
        });
        Ok(())
    }

    /// What the machine is, for the target.
    fn offer(&self, request: &SendMigration, disks: &Disks) -> Offer {
        let known = self.vcpus.first().map(VcpuHandle::known);
        let mut offer = Offer::of(&self.description.config, &self.memory, known);
        offer.mode = request.mode;
        offer.may_follow = may_follow(request);
        offer.connections = request.connections;
        offer.with_disks = request.with_disks;
        offer.set_sizes(disks.sizes());
        offer.paused = self.state == VmState::Paused;
        offer
    }

    /// The disks that move along, in the order of the configuration.
    fn disks_to_move(&self, request: &SendMigration) -> Result<Disks, Fault> {
        if !request.with_disks {
            return Ok(Disks::default());
        }
        let drives = self.description.config.drives.iter();
        let handles = drives.filter_map(|drive| {
            let mut handles = self.controls.drives.iter();
            handles.find(|(id, _)| *id == drive.drive_id).cloned()
        });
        Disks::of(handles).map_err(|error| Fault::from_error(&error))
    }

    fn patch_move(&self, patch: &MigrationPatch) -> Result<(), Fault> {
        let Some(moving) = &self.moving else {
            return Err(nothing_moves());
        };
        let phase = self.telemetry.migration.peek().phase;
        if let Some(decision) = patch.decision {
            may_decide(decision, phase)?;
            moving.control.check(decision)?;
        }
        let is_lost = matches!(
            phase,
            MigrationPhase::PostCopyInterrupted | MigrationPhase::InDoubt
        );
        if let Some(place) = patch.resume.as_deref().filter(|place| !place.is_empty()) {
            let address: Result<Address, _> = place.parse();
            address.map_err(|error| Fault::from_error(&error))?;
        }
        if patch.resume.is_some() && !is_lost {
            return Err(Fault::new(
                "There is nothing to resume: that is for a machine that was handed over, when its \
                 connection has broken.",
            ));
        }
        if has_limits(patch) && has_gone(phase) {
            return Err(Fault::new(
                "The machine was handed over: limits are for the time before that.",
            ));
        }
        if patch.on_timeout == Some(OnTimeout::PostCopy) && !moving.may_follow {
            return Err(Fault::new(
                "The memory of a machine can follow it only if that was said when its move began, by \
                 its mode or its on_timeout.",
            ));
        }
        moving.control.patch(patch);
        self.telemetry.migration.update(|status| {
            if let Some(limit) = patch.bandwidth_limit {
                status.bandwidth_limit = limit;
            }
            if let Some(downtime) = patch.max_downtime_ms {
                status.max_downtime_us = u64::from(downtime) * 1000;
            }
        });
        Ok(())
    }

    fn cancel_move(&self) -> Result<(), Fault> {
        let Some(moving) = &self.moving else {
            return Err(nothing_moves());
        };
        match self.telemetry.migration.get().phase {
            MigrationPhase::InDoubt => Err(Fault::new(
                "The machine was handed over, and it is not known whether it has arrived: wait \
                 until the target is found again, or decide with PATCH /migration.",
            )),
            MigrationPhase::PostCopy | MigrationPhase::PostCopyInterrupted => Err(Fault::new(
                "The machine runs at the target already: it cannot be called back.",
            )),
            _ => {
                moving.control.cancel();
                Ok(())
            }
        }
    }

    /// What the thread that sends wants.
    pub(crate) fn departure(&mut self, event: SourceEvent) {
        match event {
            SourceEvent::HandOver { reply, follows } => self.hand_over(&reply, follows),
            SourceEvent::Throttle(percent) => self.throttle(percent),
            SourceEvent::Resume => {
                self.take_back();
                self.throttle(0);
            }
            SourceEvent::Ended(SourceEnd::Moved) => self.gone(Ending::Moved),
            SourceEvent::Ended(SourceEnd::Lost) => self.gone(Ending::Lost),
            SourceEvent::Ended(SourceEnd::Kept) => {
                self.take_back();
                self.throttle(0);
                self.moving = None;
            }
        }
    }

    /// Ends, as a machine that is not here any more.
    fn gone(&mut self, ending: Ending) {
        self.moving = None;
        self.stop(Ok(ending));
        self.telemetry.migration.wait_seen(LAST_LOOK);
    }

    /// Stops the machine, and gives its state away.
    fn hand_over(&mut self, reply: &Sender<HandOver>, follows: bool) {
        let since = Instant::now();
        let ran = self.state == VmState::Running;
        let stopped = self.stop_for_move(ran);
        // Whoever asked may have ended.
        let _ = match stopped {
            Err(why) => reply.send(HandOver::Failed(why)),
            Ok(()) => {
                let vcpus = if follows { &self.vcpus[..] } else { &[] };
                let places = vcpus.iter().map(VcpuHandle::locate).collect();
                let _ = reply.send(HandOver::Held { since, places });
                match self.state_to_move() {
                    Ok((state, clocks_read)) => reply.send(HandOver::State { state, clocks_read }),
                    Err(error) => reply.send(HandOver::Failed(with_causes(&error))),
                }
            }
        };
    }

    fn stop_for_move(&mut self, ran: bool) -> Result<(), String> {
        let Some(moving) = &mut self.moving else {
            return Err("it does not move".into());
        };
        moving.ran = ran;
        if ran {
            self.pause().map_err(|error| with_causes(&error))?;
        }
        let departed = self.depart();
        if departed.is_err() {
            // Nobody else takes it back: it has not departed.
            self.take_locks();
            if ran {
                // It was paused by us, so it can go on.
                let _ = self.resume();
            }
        }
        departed
    }

    /// Lets the machine, which is paused, be the target's.
    fn depart(&mut self) -> Result<(), String> {
        let next = self.state.next(VmEvent::Depart);
        let next = next.map_err(|error| error.to_string())?;
        self.release_locks()?;
        self.enter(next);
        Ok(())
    }

    /// The state, and when the guest's clocks were read for it.
    fn state_to_move(&self) -> Result<(Vec<u8>, Instant), CreateError> {
        let mut state = StateWriter::new();
        state.push(0, &MetadataSection::of(&self.description.mmds))?;
        let clocks_read = self.paused_view().write(&mut state)?;
        Ok((state.finish_unsealed(), clocks_read))
    }

    /// The guest stays: it goes on, if it was stopped for the move.
    fn take_back(&mut self) {
        let Ok(next) = self.state.next(VmEvent::Return) else {
            return;
        };
        self.take_locks();
        self.enter(next);
        if self.moving.as_ref().is_some_and(|moving| moving.ran) {
            // It was paused by us, so it can go on.
            let _ = self.resume();
        }
    }

    /// The drives that the guest may have written to.
    fn drives_to_show(&self) -> Vec<BlockControl> {
        let read_only = |id: &String| {
            let drives = &self.description.config.drives;
            let drive = drives.iter().find(|drive| drive.drive_id == *id);
            drive.is_some_and(|drive| drive.is_read_only)
        };
        let drives = self.controls.drives.iter();
        let written = drives.filter(|(id, _)| !read_only(id));
        written.map(|(_, control)| control.clone()).collect()
    }

    /// A machine that is stopped while it moves must not go on at the target, unless it does already.
    pub(super) fn call_off_move(&mut self) {
        if self.serves() {
            return;
        }
        if let Some(moving) = &mut self.moving
            && !moving.called_off
        {
            moving.called_off = true;
            moving.control.cancel();
            self.telemetry.migration.wait_settled(CALL_OFF);
        }
    }
}

/// Whether there is something to decide at the source.
fn may_decide(decision: MigrationDecision, phase: MigrationPhase) -> Result<(), Fault> {
    match (phase, decision) {
        (MigrationPhase::InDoubt, _)
        | (MigrationPhase::PostCopyInterrupted, MigrationDecision::Abandon) => Ok(()),
        (MigrationPhase::PostCopyInterrupted, MigrationDecision::Run) => Err(Fault::new(
            "The machine runs at the target: here it can only be abandoned.",
        )),
        _ => Err(Fault::new(
            "There is nothing to decide: the two sides have not lost each other.",
        )),
    }
}

/// Whether a change is one of how a machine moves that runs here.
const fn has_limits(patch: &MigrationPatch) -> bool {
    patch.bandwidth_limit.is_some()
        || patch.max_downtime_ms.is_some()
        || patch.timeout_s.is_some()
        || patch.on_timeout.is_some()
        || patch.auto_converge.is_some()
}

/// Whether the machine may run at the target.
const fn has_gone(phase: MigrationPhase) -> bool {
    matches!(
        phase,
        MigrationPhase::InDoubt | MigrationPhase::PostCopy | MigrationPhase::PostCopyInterrupted
    )
}

/// Whether memory may have to follow the machine.
fn may_follow(request: &SendMigration) -> bool {
    request.mode != MigrationMode::PreCopy || request.on_timeout == OnTimeout::PostCopy
}

fn memory_follows() -> Fault {
    Fault::from_error(&PauseError::Follows)
}

fn nothing_moves() -> Fault {
    Fault::new("The machine is not being moved.")
}
