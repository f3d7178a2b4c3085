// SPDX-License-Identifier: Apache-2.0
//! What is told of a move: to whoever asks, as events, and as metrics.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use brume_api::{EventHub, MachineEvent, MigrationPass, MigrationPhase, MigrationStatus};

use super::lanes::Amount;

/// How many passes are told of.
const PASSES: usize = 256;

/// How far a move is. Clones are of the same machine.
#[derive(Clone, Default)]
pub(crate) struct Progress(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    status: MigrationStatus,
    events: EventHub,
    begun: Option<Instant>,
    ended: Option<Instant>,
    /// Whether somebody has asked since it was over.
    end_was_seen: bool,
}

impl Progress {
    /// Progress that tells its events there.
    pub(crate) fn telling(events: EventHub) -> Self {
        let progress = Self::default();
        progress.lock().events = events;
        progress
    }

    /// Begins anew.
    pub(crate) fn begin(&self, status: MigrationStatus) {
        let phase = status.phase;
        {
            let mut state = self.lock();
            state.status = status;
            state.begun = Some(Instant::now());
            state.ended = None;
            state.end_was_seen = false;
        }
        self.enter(phase);
    }

    /// Changes what is told.
    pub(crate) fn update(&self, change: impl FnOnce(&mut MigrationStatus)) {
        change(&mut self.lock().status);
    }

    /// Memory was sent.
    pub(super) fn sent(&self, amount: Amount) {
        self.update(|status| {
            status.bytes += amount.bytes;
            status.pages += amount.pages;
            status.zero_pages += amount.zeros;
        });
    }

    /// It is in another phase.
    pub(crate) fn enter(&self, phase: MigrationPhase) {
        let mut state = self.lock();
        state.status.phase = phase;
        if phase.is_over() {
            state.ended = Some(Instant::now());
        }
        self.0.changed.notify_all();
        let event = MachineEvent::Migration {
            role: state.status.role,
            phase,
            downtime_us: state.status.downtime.as_ref().map(|time| time.total_us),
            error: state.status.error.clone(),
        };
        state.events.publish(event);
    }

    /// It went wrong, or was called off.
    pub(crate) fn fail(&self, phase: MigrationPhase, error: String) {
        self.update(|status| {
            status.error = Some(error);
            status.throttle_percent = 0;
            status.expected_downtime_us = None;
            status.time_left_ms = None;
        });
        self.enter(phase);
    }

    /// A pass is over.
    pub(crate) fn passed(&self, pass: MigrationPass) {
        let mut state = self.lock();
        if state.status.passes.len() >= PASSES {
            state.status.passes.remove(0);
        }
        state.status.passes.push(pass.clone());
        state.events.publish(MachineEvent::MigrationPassed(pass));
    }

    /// What is to be told now.
    pub(crate) fn get(&self) -> MigrationStatus {
        let mut state = self.lock();
        let mut status = state.status.clone();
        if let Some(begun) = state.begun {
            let end = state.ended.unwrap_or_else(Instant::now);
            status.elapsed_ms = millis(end - begun);
        }
        if status.phase.is_over() {
            state.end_was_seen = true;
            self.0.changed.notify_all();
        }
        status
    }

    /// What was told last, without a look at the clock, for metrics.
    pub(crate) fn peek(&self) -> MigrationStatus {
        self.lock().status.clone()
    }

    /// Waits until somebody has seen how it ended.
    pub(crate) fn wait_seen(&self, limit: Duration) {
        let state = self.lock();
        let waited = self
            .0
            .changed
            .wait_timeout_while(state, limit, |state| !state.end_was_seen);
        drop(waited);
    }

    /// A machine comes from `peer`: what was told of one before is over.
    pub(super) fn restart(&self, peer: &str) {
        let mut state = self.lock();
        state.begun = Some(Instant::now());
        state.status = MigrationStatus {
            role: state.status.role,
            phase: MigrationPhase::Negotiating,
            peer: Some(peer.to_owned()),
            ..MigrationStatus::default()
        };
    }

    /// It has come to nothing, and the next one is waited for.
    pub(super) fn wait_again(&self, error: String) {
        self.update(|status| status.error = Some(error));
        self.enter(MigrationPhase::Listening);
    }

    /// Waits until it is over, or the guest runs at the target.
    pub(crate) fn wait_settled(&self, limit: Duration) {
        let state = self.lock();
        let open = |state: &mut State| {
            let phase = state.status.phase;
            !phase.is_over() && !runs_at_target(phase)
        };
        drop(self.0.changed.wait_timeout_while(state, limit, open));
    }

    /// Whether the guest runs at the target, and memory follows it.
    pub(crate) fn follows(&self) -> bool {
        runs_at_target(self.lock().status.phase)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn runs_at_target(phase: MigrationPhase) -> bool {
    matches!(
        phase,
        MigrationPhase::PostCopy | MigrationPhase::PostCopyInterrupted
    )
}

/// In whole microseconds.
pub(super) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// In whole milliseconds.
pub(super) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// How much that is in a second.
pub(super) fn per_second(amount: u64, time: Duration) -> u64 {
    let nanos = time.as_nanos().max(1);
    u64::try_from(u128::from(amount) * 1_000_000_000 / nanos).unwrap_or(u64::MAX)
}

/// The time of day in nanoseconds since 1970.
pub(super) fn unix_nanos() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(0))
}
