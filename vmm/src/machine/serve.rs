// SPDX-License-Identifier: Apache-2.0
//! A process whose guest runs at the target already, and still needs memory from here: the end of
//! the one would be the end of the other. So a stop waits until the target has all memory, which
//! ends the process anyway, for as long as that gets on.

use std::time::{Duration, Instant};

use brume_api::Fault;

use super::{Ending, Machine};
use crate::event::{Event, StopReason};

/// How often it is looked whether the memory gets on.
const LOOK: Duration = Duration::from_secs(1);
/// For how long nothing may be sent until a stop waits no more.
const PATIENCE: Duration = Duration::from_secs(60);

/// A stop that waits.
pub(super) struct WaitingStop {
    reason: StopReason,
    /// What was sent so far.
    bytes: u64,
    /// Since when there is no more.
    since: Instant,
}

impl WaitingStop {
    fn new(reason: StopReason, bytes: u64) -> Self {
        Self {
            reason,
            bytes,
            since: Instant::now(),
        }
    }

    /// Whether it has to wait on, now that `bytes` were sent.
    fn waits(&mut self, bytes: u64) -> bool {
        if bytes != self.bytes {
            *self = Self::new(self.reason, bytes);
        }
        self.since.elapsed() < PATIENCE
    }

    /// Whether a stop for `reason` after this one is meant to be at once: who asks twice has been
    /// told what that does.
    fn is_overruled_by(&self, reason: StopReason) -> bool {
        self.reason != StopReason::Api && reason != StopReason::Api
    }
}

impl Machine {
    /// Whether the guest runs at the target and needs memory from here.
    pub(super) fn serves(&self) -> bool {
        self.moving.is_some() && self.telemetry.migration.follows()
    }

    /// Ends the machine because somebody outside wants it, when that does not end it elsewhere.
    pub(super) fn stop_for(&mut self, reason: StopReason) {
        self.call_off_move();
        if self.serves() && self.wait_to_stop(reason) {
            return;
        }
        self.stop(Ok(Ending::Stopped(reason)));
    }

    /// Has a stop wait; whether it does.
    fn wait_to_stop(&mut self, reason: StopReason) -> bool {
        let bytes = self.telemetry.migration.peek().bytes;
        let Some(moving) = &mut self.moving else {
            return false;
        };
        let stop = WaitingStop::new(reason, bytes);
        match moving.stop.replace(stop) {
            Some(before) if before.is_overruled_by(reason) => {
                tracing::error!(
                    "this process ends before the target has all memory: the guest cannot go on \
                     there"
                );
                return false;
            }
            Some(_) => {}
            None => self.sender.remind_after(LOOK, Event::StopDue),
        }
        tracing::warn!(
            "the guest runs at the target and still needs memory from here: this process ends by \
             itself when the target has all of it; a second signal ends it at once, and the guest \
             with it"
        );
        true
    }

    /// It is time to look whether a stop that waits still has to.
    pub(super) fn stop_due(&mut self) {
        let status = self.telemetry.migration.peek();
        let serves = self.serves();
        // If it does not any more, the end of the move is on its way.
        let Some(stop) = self.moving.as_mut().and_then(|moving| moving.stop.as_mut()) else {
            return;
        };
        if !serves {
            return;
        }
        let reason = stop.reason;
        if stop.waits(status.bytes) {
            return self.sender.remind_after(LOOK, Event::StopDue);
        }
        tracing::error!(
            "the target has taken no memory for {} s: this process ends, and the guest cannot go \
             on there",
            PATIENCE.as_secs()
        );
        self.stop(Ok(Ending::Stopped(reason)));
    }
}

/// The fault of a request to end the machine.
pub(super) fn still_needed() -> Fault {
    Fault::new(
        "The machine runs at the target already and still needs memory from here: this process \
         ends by itself when the target has all of it. SIGTERM, sent twice, ends it before, and the \
         guest with it.",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_waits_as_long_as_memory_is_sent() {
        let mut stop = WaitingStop::new(StopReason::Signal(libc::SIGTERM), 10);
        stop.since -= PATIENCE;
        assert!(stop.waits(11));
        assert!(stop.waits(11));
        stop.since -= PATIENCE;
        assert!(!stop.waits(11));
    }

    #[test]
    fn a_second_signal_ends_the_wait_and_a_first_does_not() {
        let signal = StopReason::Signal(libc::SIGTERM);
        let by = |first, second| WaitingStop::new(first, 0).is_overruled_by(second);
        assert!(by(signal, signal) && by(StopReason::Console, signal));
        assert!(!by(StopReason::Api, signal) && !by(signal, StopReason::Api));
    }
}
