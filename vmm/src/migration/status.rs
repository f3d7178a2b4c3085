// SPDX-License-Identifier: Apache-2.0
//! What is told of a move: to whoever asks, as events, and as metrics.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use brume_api::{EventHub, MachineEvent, MigrationPass, MigrationPhase, MigrationStatus};

use super::lanes::Amount;
use crate::page_set::PAGE_SIZE;

/// What the rate of a move without passes is told of.
const WINDOW: Duration = Duration::from_secs(1);
/// The shortest time that a rate is told of, if there is no other yet.
const SHORT_WINDOW: Duration = Duration::from_millis(100);
/// After how long without a byte the rate is none. A slow connection counts what it carries in large
/// pieces.
const SILENCE: Duration = Duration::from_secs(10);
/// How many passes are told of.
const PASSES: usize = 256;
/// How long others have to see how it ended, after one has.
const OTHERS_LOOK: Duration = Duration::from_millis(250);

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
    /// Bytes that the pages have become that were sent.
    packed: u64,
    events: EventHub,
    begun: Option<Instant>,
    ended: Option<Instant>,
    /// Since when bytes are counted for the rate, if a whole window was before that, and how many
    /// there were then.
    window: Option<(Instant, bool, u64)>,
    /// Whether somebody has asked since it was over.
    end_was_seen: bool,
}

impl State {
    /// Tells how fast it is where no pass does: at the target, before the first one is over, and when
    /// memory follows the guest.
    fn measure(&mut self, now: Instant) {
        let status = &mut self.status;
        let is_measured = match status.phase {
            MigrationPhase::PreCopy => status.passes.is_empty(),
            MigrationPhase::PostCopy | MigrationPhase::PostCopyInterrupted => true,
            _ => false,
        };
        let Some((since, has_rate, bytes)) = self.window.filter(|_| is_measured) else {
            return;
        };
        let time = now.saturating_duration_since(since);
        if status.bytes == bytes && time < SILENCE {
            return;
        }
        if time >= WINDOW {
            self.window = Some((now, true, status.bytes));
        } else if has_rate || time < SHORT_WINDOW {
            return;
        }
        status.bandwidth = per_second(status.bytes.saturating_sub(bytes), time);
        // Pages may be smaller on their way.
        let ratio = u64::from(status.compression_ratio_percent.max(100));
        let speed = status.bandwidth.saturating_mul(ratio) / 100;
        let left = status.remaining_pages.saturating_mul(PAGE_SIZE);
        let time = left.saturating_mul(1000).checked_div(speed);
        status.time_left_ms = time.filter(|_| left > 0);
    }
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
            state.packed = 0;
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
        let mut state = self.lock();
        state.packed += amount.packed;
        let packed = state.packed;
        let status = &mut state.status;
        status.bytes += amount.bytes;
        status.pages += amount.pages;
        status.zero_pages += amount.zeros;
        let sent = amount.pages + amount.zeros;
        status.remaining_pages = status.remaining_pages.saturating_sub(sent);
        let percent = (status.pages * PAGE_SIZE * 100).checked_div(packed);
        let percent = u32::try_from(percent.unwrap_or(0));
        status.compression_ratio_percent = percent.unwrap_or(u32::MAX);
    }

    /// It is in another phase.
    pub(crate) fn enter(&self, phase: MigrationPhase) {
        let mut state = self.lock();
        state.measure(Instant::now());
        state.status.phase = phase;
        state.window = Some((Instant::now(), false, state.status.bytes));
        if phase.is_over() {
            state.status.time_left_ms = None;
            state.ended = Some(Instant::now());
        }
        self.0.changed.notify_all();
        let event = MachineEvent::Migration {
            role: state.status.role,
            phase,
            downtime_us: state.status.downtime.as_ref().map(|time| time.total_us),
            error: state.status.error.clone(),
        };
        let is_seen = state.events.publish(event);
        state.end_was_seen |= is_seen && phase.is_over();
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
        state.measure(Instant::now());
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

    /// The same for metrics, which do not count as somebody who has asked, without how long it took.
    pub(crate) fn peek(&self) -> MigrationStatus {
        let mut state = self.lock();
        state.measure(Instant::now());
        state.status.clone()
    }

    /// Whether nothing more will come of the last move, or there was none.
    pub(crate) fn is_over(&self) -> bool {
        self.lock().status.phase.is_over()
    }

    /// Waits until somebody has seen how it ended.
    pub(crate) fn wait_seen(&self, limit: Duration) {
        let state = self.lock();
        let waited = self
            .0
            .changed
            .wait_timeout_while(state, limit, |state| !state.end_was_seen);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let was_seen = state.end_was_seen;
        drop(state);
        if was_seen {
            // Others may look at it from time to time, too.
            std::thread::sleep(OTHERS_LOOK);
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The rate of a move in `phase`, each time so many milliseconds after it began and with so many
    /// bytes.
    fn rates<const N: usize>(
        phase: MigrationPhase,
        passes: usize,
        looks: [(u64, u64); N],
    ) -> [u64; N] {
        let begun = Instant::now();
        let mut state = State {
            window: Some((begun, false, 0)),
            ..State::default()
        };
        state.status.phase = phase;
        state.status.passes = vec![MigrationPass::default(); passes];
        state.status.bandwidth = 7;
        looks.map(|(millis, bytes)| {
            state.status.bytes = bytes;
            state.measure(begun + Duration::from_millis(millis));
            state.status.bandwidth
        })
    }

    #[test]
    fn what_is_left_takes_as_long_as_pages_have_taken() {
        let begun = Instant::now();
        let mut state = State {
            window: Some((begun, false, 0)),
            ..State::default()
        };
        state.status.phase = MigrationPhase::PostCopy;
        state.status.bytes = 100 * PAGE_SIZE;
        state.status.remaining_pages = 1000;
        state.measure(begun + Duration::from_millis(500));
        assert_eq!(state.status.time_left_ms, Some(5000));
        // Four times as many pages went as there were bytes.
        state.status.compression_ratio_percent = 400;
        state.measure(begun + Duration::from_millis(500));
        assert_eq!(state.status.time_left_ms, Some(1250));
        let progress = Progress::default();
        *progress.lock() = state;
        progress.enter(MigrationPhase::Completed);
        assert_eq!(progress.get().time_left_ms, None);
    }

    #[test]
    fn the_rate_is_that_of_the_last_seconds() {
        let looks = [
            (10, 500),
            (500, 1000),
            (600, 9000),
            (1000, 3000),
            (1500, 9000),
            (3000, 9000),
            (9000, 9000),
            (11_000, 17_000),
            (20_000, 17_000),
            (21_000, 17_000),
        ];
        // Nothing is told of too little time, and something soon.
        let expected = [7, 2000, 15_000, 3000, 3000, 3000, 3000, 1000, 1000, 0];
        assert_eq!(rates(MigrationPhase::PreCopy, 0, looks), expected);
        assert_eq!(rates(MigrationPhase::PostCopy, 2, looks), expected);
        // Passes tell it.
        assert_eq!(rates(MigrationPhase::PreCopy, 1, looks), [7; 10]);
        // What was told last stays.
        assert_eq!(rates(MigrationPhase::Completed, 0, looks), [7; 10]);
    }
}
