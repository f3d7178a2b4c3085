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
