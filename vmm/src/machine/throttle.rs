// SPDX-License-Identifier: Apache-2.0
//! vCPUs that are slowed, so that a guest writes less than a connection carries.
//!
//! While there is a throttle, each vCPU is taken out of the guest again and again for a part of the
//! time. A thread called `throttle` says when; it owns nothing, and ends with the throttle.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::Duration;

use super::Machine;
use crate::event::Event;
use crate::lifecycle::VmState;

/// How long a vCPU runs between two naps.
const SLICE: Duration = Duration::from_millis(10);

/// By how many percent vCPUs are slowed now; shared with the thread.
#[derive(Clone, Default)]
pub(super) struct Throttle(Arc<AtomicU8>);

impl Throttle {
    fn get(&self) -> u8 {
        self.0.load(Ordering::Relaxed)
    }

    /// How long a nap is.
    fn nap(percent: u8) -> Duration {
        let percent = u32::from(percent.min(99));
        SLICE * percent / (100 - percent)
    }
}

impl Machine {
    /// Slows the vCPUs by so many percent.
    pub(super) fn throttle(&mut self, percent: u8) {
        let before = self.throttle.0.swap(percent, Ordering::Relaxed);
        if percent == 0 || before != 0 {
            return;
        }
        let (throttle, sender) = (self.throttle.clone(), self.sender.clone());
        let tick = move || {
            while throttle.get() != 0 {
                thread::sleep(SLICE + Throttle::nap(throttle.get()));
                if !sender.send(Event::NapDue) {
                    return;
                }
            }
        };
        let started = thread::Builder::new()
            .name("throttle".into())
            .stack_size(64 * 1024)
            .spawn(tick);
        if let Err(error) = started {
            tracing::warn!("the guest cannot be slowed: {error}");
            self.throttle.0.store(0, Ordering::Relaxed);
        }
    }

    /// It is time for a nap.
    pub(super) fn nap(&self) {
        let percent = self.throttle.get();
        if percent > 0 && self.state == VmState::Running {
            let time = Throttle::nap(percent);
            self.vcpus.iter().for_each(|vcpu| vcpu.nap(time));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn naps_are_the_part_of_the_time_that_was_asked_for() {
        for (percent, millis) in [(0, 0), (20, 2), (50, 10), (90, 90), (99, 990), (100, 990)] {
            let nap = Throttle::nap(percent);
            let off = nap.as_millis().abs_diff(millis);
            assert!(off <= 1, "{percent} %: {nap:?}");
        }
    }
}
