// SPDX-License-Identifier: Apache-2.0
//! Whether to do another pass, to stop the guest for the last one, or to slow it down. Pure: it
//! knows numbers only.

use std::time::Duration;

use crate::page_set::PAGE_SIZE;

/// What standing still costs beside the last pages, before it was ever measured.
const FIXED_COST: Duration = Duration::from_millis(3);
/// Below this, what is left is not worth a pass of its own.
const FEW_PAGES: u64 = 64;
/// How many passes are done for a shorter downtime although what is left would fit.
const POLISH: u32 = 4;
/// How long such a pass may take.
const POLISH_LIMIT: Duration = Duration::from_millis(200);
/// The least data that a bandwidth is measured by, in bytes.
const MEASURABLE: u64 = 1 << 20;
/// By how many percent vCPUs are slowed first, and by how many more each time.
const THROTTLE_FIRST: u8 = 20;
const THROTTLE_STEP: u8 = 10;
const THROTTLE_MOST: u8 = 99;

/// What to do after a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Another pass.
    Pass,
    /// Another pass, with the vCPUs slowed by so many percent.
    Throttle(u8),
    /// Stop the guest and send the rest.
    Stop,
}

/// A pass as the pace is set by it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Passed {
    /// Its number, from 1.
    pub(super) number: u32,
    /// Bytes of pages that it has carried.
    pub(super) bytes: u64,
    /// How long it took.
    pub(super) time: Duration,
    /// How many pages are left now.
    pub(super) left: u64,
}

/// What is known of the connection and the guest.
#[derive(Debug)]
pub(super) struct Pace {
    /// Bytes of pages per second, once it was measured.
    bandwidth: Option<u64>,
    throttle: u8,
    polished: u32,
    /// Pages that were left after the pass before.
    before: u64,
    /// How many passes in a row have left no less than there was before.
    stuck: u32,
}

impl Pace {
    pub(super) fn new() -> Self {
        Self {
            bandwidth: None,
            throttle: 0,
            polished: 0,
            before: u64::MAX,
            stuck: 0,
        }
    }

    /// Bytes of pages per second, as far as is known.
    pub(super) fn bandwidth(&self) -> Option<u64> {
        self.bandwidth
    }

    /// By how many percent vCPUs are slowed.
    pub(super) fn throttle(&self) -> u8 {
        self.throttle
    }

    /// How long the guest would stand still if so many pages were left.
    pub(super) fn downtime(&self, left: u64) -> Option<Duration> {
        let bandwidth = u128::from(self.bandwidth?.max(1));
        let nanos = u128::from(left * PAGE_SIZE) * 1_000_000_000 / bandwidth;
        let nanos = u64::try_from(nanos).unwrap_or(u64::MAX);
        FIXED_COST.checked_add(Duration::from_nanos(nanos))
    }

    /// What to do after a pass.
    pub(super) fn after(&mut self, passed: Passed, wanted: Duration, converge: bool) -> Next {
        self.measure(passed.bytes, passed.time);
        let shrinks = passed.left <= self.before / 4 * 3;
        self.before = passed.left;
        self.stuck = if shrinks { 0 } else { self.stuck + 1 };
        if passed.left <= FEW_PAGES {
            return Next::Stop;
        }
        // A connection that was never measured has carried next to nothing.
        let fits = self.downtime(passed.left).is_none_or(|time| time <= wanted);
        if fits {
            let cheap = passed.number == 1 || passed.time <= POLISH_LIMIT;
            if shrinks && cheap && self.polished < POLISH {
                self.polished += 1;
                return Next::Pass;
            }
            return Next::Stop;
        }
        if !converge && self.throttle > 0 {
            self.throttle = 0;
            return Next::Throttle(0);
        }
        // One pass may have been disturbed.
        if converge && self.stuck >= 2 && self.throttle < THROTTLE_MOST {
            self.stuck = 0;
            self.throttle = match self.throttle {
                0 => THROTTLE_FIRST,
                throttle => (throttle + THROTTLE_STEP).min(THROTTLE_MOST),
            };
            return Next::Throttle(self.throttle);
        }
        Next::Pass
    }

    fn measure(&mut self, bytes: u64, time: Duration) {
        if bytes < MEASURABLE {
            return;
        }
        let now = super::status::per_second(bytes, time);
        // Recent passes count more.
        self.bandwidth = Some(self.bandwidth.map_or(now, |before| before / 2 + now / 2));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const MIB: u64 = 1 << 20;

    fn passed(number: u32, mib: u64, ms: u32, left: u64) -> Passed {
        Passed {
            number,
            bytes: mib * MIB,
            time: MS * ms,
            left,
        }
    }

    #[test]
    fn an_idle_guest_is_stopped_at_once() {
        let mut pace = Pace::new();
        assert_eq!(
            pace.after(passed(1, 128, 50, 10), 20 * MS, false),
            Next::Stop
        );
    }

    #[test]
    fn what_fits_is_made_less_while_that_is_cheap() {
        let mut pace = Pace::new();
        // 2.5 GB/s: 1000 pages take 1.6 ms.
        assert_eq!(
            pace.after(passed(1, 128, 50, 1000), 20 * MS, false),
            Next::Pass
        );
        assert_eq!(pace.after(passed(2, 4, 2, 100), 20 * MS, false), Next::Pass);
        assert_eq!(pace.after(passed(3, 0, 1, 90), 20 * MS, false), Next::Stop);
    }

    #[test]
    fn what_does_not_fit_is_not_stopped_for() {
        let mut pace = Pace::new();
        for number in 1..50 {
            let next = pace.after(passed(number, 128, 100, 30_000), 20 * MS, false);
            assert_eq!(next, Next::Pass);
        }
        assert!(pace.downtime(30_000).unwrap() > 80 * MS);
        // A client that allows more gets its way.
        let next = pace.after(passed(50, 128, 100, 30_000), 200 * MS, false);
        assert_eq!(next, Next::Stop);
    }

    #[test]
    fn a_guest_that_writes_too_fast_is_slowed_step_by_step() {
        let mut pace = Pace::new();
        let mut steps = Vec::new();
        for number in 1..40 {
            if let Next::Throttle(percent) =
                pace.after(passed(number, 128, 100, 30_000), 20 * MS, true)
            {
                steps.push(percent);
            }
        }
        assert_eq!(steps, [20, 30, 40, 50, 60, 70, 80, 90, 99]);
        assert_eq!(pace.throttle(), 99);
        // And goes at full speed when that is not wanted any more.
        let next = pace.after(passed(40, 128, 100, 30_000), 20 * MS, false);
        assert_eq!((next, pace.throttle()), (Next::Throttle(0), 0));
        let next = pace.after(passed(41, 128, 100, 30_000), 20 * MS, false);
        assert_eq!(next, Next::Pass);
    }
}
