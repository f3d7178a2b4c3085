// SPDX-License-Identifier: Apache-2.0
//! What is kept of a limiter when a machine is saved: its limits, and how full its buckets are.
//! The time that a machine lies on a disk fills no bucket.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{BucketLimits, TokenBucket};
use crate::device::StateError;

/// The state of a limiter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimiterState {
    /// The bucket whose tokens are bytes, if there is one.
    pub bandwidth: Option<BucketState>,
    /// The bucket whose tokens are requests, if there is one.
    pub ops: Option<BucketState>,
}

/// The state of a bucket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BucketState {
    /// The most tokens in it, which is also what flows in during `refill_time`.
    pub size: u64,
    /// The time in which an empty bucket gets full.
    pub refill_time: Duration,
    /// Tokens that could be used once.
    pub one_time_burst: u64,
    /// How many of them are left.
    pub burst_left: u64,
    /// Tokens in it.
    pub tokens: u64,
    /// Tokens that were taken out and were not in it; none if there are any in it.
    pub debt: u64,
    /// The time that has passed since tokens last flowed in, in nanoseconds.
    pub uncounted_ns: u64,
}

impl TokenBucket {
    /// The state at the time `now`.
    pub(super) fn save(&mut self, now: Instant) -> BucketState {
        self.refill(now);
        let passed = now.saturating_duration_since(self.filled);
        BucketState {
            size: self.limits.size,
            refill_time: self.limits.refill_time,
            one_time_burst: self.limits.one_time_burst,
            burst_left: self.burst,
            tokens: u64::try_from(self.tokens.max(0)).unwrap_or(u64::MAX),
            // A debt beyond this is not paid in anybody's life.
            debt: u64::try_from(self.tokens.min(0).unsigned_abs()).unwrap_or(u64::MAX),
            uncounted_ns: u64::try_from(passed.as_nanos()).unwrap_or(u64::MAX),
        }
    }

    /// The bucket that had `state`, at the time `now`.
    pub(super) fn restore(state: &BucketState, now: Instant) -> Result<Self, StateError> {
        let limits = BucketLimits {
            size: state.size,
            refill_time: state.refill_time,
            one_time_burst: state.one_time_burst,
        };
        let holds = state.tokens <= state.size
            && state.burst_left <= state.one_time_burst
            && (state.tokens == 0 || state.debt == 0);
        let fresh = Self::new(limits).filter(|_| holds);
        let bucket = fresh.ok_or(StateError::Value("a rate limiter cannot have this bucket"))?;
        let passed = Duration::from_nanos(state.uncounted_ns);
        Ok(Self {
            burst: state.burst_left,
            tokens: i128::from(state.tokens) - i128::from(state.debt),
            // A host that has not been up for as long counts from now on.
            filled: now.checked_sub(passed).unwrap_or(now),
            ..bucket
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(size: u64, refill_time: Duration, one_time_burst: u64) -> TokenBucket {
        let limits = BucketLimits {
            size,
            refill_time,
            one_time_burst,
        };
        TokenBucket::new(limits).unwrap()
    }

    fn carried(bucket: &mut TokenBucket, saved: Instant, restored: Instant) -> TokenBucket {
        let text = serde_json::to_string(&bucket.save(saved)).unwrap();
        TokenBucket::restore(&serde_json::from_str(&text).unwrap(), restored).unwrap()
    }

    #[test]
    fn a_bucket_goes_on_as_full_as_it_was_however_long_it_lay_there() {
        const SECOND: Duration = Duration::from_secs(1);
        // What was taken out at first, and how long it then takes until there is a token: one
        // token flows in each 100 ms, and 50 ms had passed when it was saved.
        for (taken, wait_ms) in [(7, 0), (12, 50), (13, 150), (32, 2050)] {
            let mut first = bucket(10, SECOND, 2);
            let start = first.filled;
            first.take(taken, start);
            let saved = start + Duration::from_millis(50);
            let restored = saved + 1000 * SECOND;
            let mut second = carried(&mut first, saved, restored);
            for bucket in [(&mut first, saved), (&mut second, restored)] {
                let wait = bucket.0.wait(bucket.1);
                let error = wait.abs_diff(Duration::from_millis(wait_ms));
                assert!(error < Duration::from_millis(1), "{taken}: {wait:?}");
            }
        }
    }

    #[test]
    fn bursts_are_only_had_once() {
        let mut first = bucket(10, Duration::from_secs(3600), 100);
        let now = first.filled;
        first.take(60, now);
        let mut second = carried(&mut first, now, now);
        assert_eq!((second.burst, second.tokens), (40, 10));
        second.take(50, now);
        assert!(!second.wait(now).is_zero());
    }

    #[test]
    fn extreme_buckets_can_be_saved() {
        for (size, refill_time) in [(u64::MAX, Duration::MAX), (1, Duration::MAX)] {
            let mut first = bucket(size, refill_time, u64::MAX);
            let now = first.filled;
            for _ in 0..5 {
                first.take(u64::MAX, now);
            }
            let later = now + Duration::from_secs(1 << 33);
            let state = carried(&mut first, later, now).save(now);
            assert_eq!((state.tokens, state.debt), (0, u64::MAX));
        }
        let mut state = bucket(5, Duration::from_secs(5), 0).save(Instant::now());
        state.uncounted_ns = u64::MAX;
        TokenBucket::restore(&state, Instant::now()).unwrap();
    }
}
