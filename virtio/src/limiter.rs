// SPDX-License-Identifier: Apache-2.0
//! Token buckets that hold a device to a rate.
//!
//! A worker asks [`Limiter::admits`] before it takes a request and tells [`Limiter::charge`] what
//! it was. A request may take a bucket below zero; the next one then waits until the debt is paid.
//! So each request passes whole, however large it is, the first of them at once, and over time the
//! rate is exact. While nothing is limited, both calls are one look at an atomic.
//!
//! The worker sleeps while it is not admitted. The limiter's timer wakes it, and so does a change
//! of the limits.

mod state;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

pub use state::{BucketState, LimiterState};

use crate::device::StateError;
use crate::queue::{Chain, Queue, QueueError};

/// What a bucket holds and how fast it fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BucketLimits {
    /// The most tokens in it, which is also what flows in during `refill_time`.
    pub size: u64,
    /// The time in which an empty bucket gets full.
    pub refill_time: Duration,
    /// Tokens that can be used once, before those in the bucket.
    pub one_time_burst: u64,
}

/// What to do with a bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BucketUpdate {
    /// Leave it as it is.
    #[default]
    Keep,
    /// Have none: nothing is limited.
    Remove,
    /// Have this one, full.
    Set(BucketLimits),
}

/// What to do with the two buckets of a limiter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LimiterUpdate {
    /// The bucket whose tokens are bytes.
    pub bandwidth: BucketUpdate,
    /// The bucket whose tokens are requests.
    pub ops: BucketUpdate,
}

/// A bucket.
#[derive(Debug)]
pub struct TokenBucket {
    limits: BucketLimits,
    burst: u64,
    /// What is in it; less than nothing is a debt.
    tokens: i128,
    /// Until when what flowed in is counted.
    filled: Instant,
}

impl TokenBucket {
    /// A full bucket. `None` if nothing can be in it or flow into it, which is no limit.
    pub fn new(limits: BucketLimits) -> Option<Self> {
        (limits.size > 0 && !limits.refill_time.is_zero()).then(|| Self {
            limits,
            burst: limits.one_time_burst,
            tokens: limits.size.into(),
            filled: Instant::now(),
        })
    }

    fn refill(&mut self, now: Instant) {
        let full = self.limits.refill_time.as_nanos();
        let size = u128::from(self.limits.size);
        let passed = now.saturating_duration_since(self.filled).as_nanos();
        // At most 2^64 times 2^64 nanoseconds.
        let flowed = passed.min(u128::from(u64::MAX)) * size / full;
        if flowed == 0 {
            return;
        }
        // What is not a whole token yet stays to be counted.
        let counted = u64::try_from(flowed * full / size).unwrap_or(u64::MAX);
        self.filled += Duration::from_nanos(counted);
        let flowed = i128::try_from(flowed).unwrap_or(i128::MAX);
        self.tokens = (self.tokens.saturating_add(flowed)).min(self.limits.size.into());
    }

    /// How long nothing can be taken out; zero if something can.
    pub fn wait(&mut self, now: Instant) -> Duration {
        if self.burst > 0 || self.tokens > 0 {
            return Duration::ZERO;
        }
        self.refill(now);
        if self.tokens > 0 {
            return Duration::ZERO;
        }
        let missing = (1 - self.tokens).unsigned_abs();
        let full = self.limits.refill_time.as_nanos();
        let nanos = missing.saturating_mul(full) / u128::from(self.limits.size);
        let nanos = nanos.saturating_add(1);
        let passed = now.saturating_duration_since(self.filled);
        let wait = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        wait.saturating_sub(passed).max(Duration::from_micros(1))
    }

    /// Takes `tokens` out, more than there are if need be.
    pub fn take(&mut self, tokens: u64, now: Instant) {
        let once = self.burst.min(tokens);
        self.burst -= once;
        if tokens > once {
            self.refill(now);
            self.tokens = self.tokens.saturating_sub((tokens - once).into());
        }
    }
}

#[derive(Debug, Default)]
struct Buckets {
    bandwidth: Option<TokenBucket>,
    ops: Option<TokenBucket>,
    /// Until when nothing is admitted; the timer is set for that.
    closed_until: Option<Instant>,
}

impl Buckets {
    fn each(&mut self) -> impl Iterator<Item = &mut TokenBucket> {
        [&mut self.bandwidth, &mut self.ops].into_iter().flatten()
    }
}

/// The limits on one kind of traffic, shared between a worker and whoever changes them.
#[derive(Debug)]
pub struct Limiter {
    /// Whether there is any bucket.
    limits: AtomicBool,
    buckets: Mutex<Buckets>,
    timer: Mutex<TimerFd>,
    timer_fd: RawFd,
    throttled: AtomicU64,
}

impl Limiter {
    /// A limiter that limits what `update` sets.
    ///
    /// # Errors
    ///
    /// The host gives no timer.
    pub fn new(update: LimiterUpdate) -> io::Result<Self> {
        let timer = TimerFd::new()?;
        let limiter = Self {
            limits: AtomicBool::new(false),
            buckets: Mutex::default(),
            timer_fd: timer.as_raw_fd(),
            timer: Mutex::new(timer),
            throttled: AtomicU64::new(0),
        };
        limiter.update(update);
        Ok(limiter)
    }

    /// Changes the limits; a worker that waits looks again.
    pub fn update(&self, update: LimiterUpdate) {
        let set = |bucket: &mut Option<TokenBucket>, update| match update {
            BucketUpdate::Keep => {}
            BucketUpdate::Remove => *bucket = None,
            BucketUpdate::Set(limits) => *bucket = TokenBucket::new(limits),
        };
        let mut buckets = self.buckets();
        set(&mut buckets.bandwidth, update.bandwidth);
        set(&mut buckets.ops, update.ops);
        self.opened(buckets);
    }

    /// The limits, and how much of them is used up.
    pub(crate) fn save(&self) -> LimiterState {
        let now = Instant::now();
        let mut buckets = self.buckets();
        let save = |bucket: &mut Option<TokenBucket>| bucket.as_mut().map(|b| b.save(now));
        let Buckets { bandwidth, ops, .. } = &mut *buckets;
        LimiterState {
            bandwidth: save(bandwidth),
            ops: save(ops),
        }
    }

    /// Takes on a state, with its limits in the place of those that there are.
    pub(crate) fn restore(&self, state: &LimiterState) -> Result<(), StateError> {
        let now = Instant::now();
        let restore = |state: &Option<BucketState>| {
            let bucket = state.as_ref().map(|state| TokenBucket::restore(state, now));
            bucket.transpose()
        };
        let (bandwidth, ops) = (restore(&state.bandwidth)?, restore(&state.ops)?);
        let mut buckets = self.buckets();
        (buckets.bandwidth, buckets.ops) = (bandwidth, ops);
        self.opened(buckets);
        Ok(())
    }

    /// Has everybody look at the buckets again, which were changed.
    fn opened(&self, mut buckets: MutexGuard<'_, Buckets>) {
        buckets.closed_until = None;
        let any = buckets.each().next().is_some();
        self.limits.store(any, Ordering::SeqCst);
        drop(buckets);
        self.wake_after(Duration::from_nanos(1));
    }

    /// Whether a request can be taken now. If not, the timer is set for when it can.
    pub fn admits(&self) -> bool {
        if !self.limits.load(Ordering::Relaxed) {
            return true;
        }
        let now = Instant::now();
        let mut buckets = self.buckets();
        if buckets.closed_until.is_some_and(|until| now < until) {
            return false;
        }
        let wait = buckets.each().map(|bucket| bucket.wait(now)).max();
        let wait = wait.unwrap_or_default();
        buckets.closed_until = now.checked_add(wait).filter(|_| !wait.is_zero());
        drop(buckets);
        if wait.is_zero() {
            return true;
        }
        self.throttled.fetch_add(1, Ordering::Relaxed);
        self.wake_after(wait);
        false
    }

    /// Counts a request of `bytes` bytes that was admitted.
    pub fn charge(&self, bytes: u64) {
        if !self.limits.load(Ordering::Relaxed) {
            return;
        }
        let now = Instant::now();
        let mut buckets = self.buckets();
        if let Some(bandwidth) = &mut buckets.bandwidth {
            bandwidth.take(bytes, now);
        }
        if let Some(ops) = &mut buckets.ops {
            ops.take(1, now);
        }
    }

    /// How often a request had to wait.
    pub fn throttled(&self) -> u64 {
        self.throttled.load(Ordering::Relaxed)
    }

    fn wake_after(&self, wait: Duration) {
        let mut timer = self.timer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = timer.reset(wait, None) {
            // It fails for no time that can come from here.
            tracing::error!("the timer of a rate limiter cannot be set: {error}");
        }
    }

    fn buckets(&self) -> MutexGuard<'_, Buckets> {
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsRawFd for Limiter {
    /// The timer, which a worker has to wait for, edge-triggered.
    fn as_raw_fd(&self) -> RawFd {
        self.timer_fd
    }
}

/// The way from a queue to its worker, past a limiter.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    /// Whether a chain was left in the queue.
    closed: bool,
}

impl Gate {
    /// Takes the next chain, if there is one and the limiter admits it.
    pub(crate) fn pop(
        &mut self,
        limiter: &Limiter,
        queue: &mut Queue,
        chain: &mut Chain,
    ) -> Result<bool, QueueError> {
        self.closed = false;
        if !queue.pop(chain)? {
            return Ok(false);
        }
        if !limiter.admits() {
            queue.undo_pop();
            self.closed = true;
        }
        Ok(!self.closed)
    }

    /// Asks for notifications; whether there is a chain to take already. What was left in the
    /// queue is not: it is there to be taken when the limiter's timer wakes the worker.
    pub(crate) fn enable_kicks(&self, queue: &mut Queue) -> Result<bool, QueueError> {
        Ok(!self.closed && queue.enable_kicks()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(size: u64, ms: u64, one_time_burst: u64) -> BucketLimits {
        BucketLimits {
            size,
            refill_time: Duration::from_millis(ms),
            one_time_burst,
        }
    }

    /// Takes `tokens` at a time for as long as it takes, on a clock of its own; how many a second.
    fn rate(limits: BucketLimits, tokens: u64, seconds: u64) -> f64 {
        let mut bucket = TokenBucket::new(limits).unwrap();
        let start = bucket.filled;
        // The first filling is not the rate.
        bucket.take(limits.size, start);
        let (mut now, mut taken) = (start, 0.0);
        while now < start + Duration::from_secs(seconds) {
            match bucket.wait(now) {
                Duration::ZERO => {
                    bucket.take(tokens, now);
                    taken += tokens as f64;
                }
                wait => now += wait,
            }
        }
        taken / (now - start).as_secs_f64()
    }

    #[test]
    fn the_rate_is_held_for_requests_of_any_size() {
        for (limits, tokens) in [
            (limits(1000, 100, 0), 1),
            (limits(1000, 100, 0), 7),
            (limits(1000, 100, 0), 25_000),
            (limits(1 << 30, 1000, 0), 1 << 20),
            (limits(3, 7, 0), 1),
            (limits(u64::MAX / 4, 10, 0), 1 << 62),
        ] {
            let wanted = limits.size as f64 / limits.refill_time.as_secs_f64();
            let found = rate(limits, tokens, 200);
            let error = (found / wanted - 1.0).abs();
            assert!(error < 0.03, "{limits:?} {tokens}: {found} for {wanted}");
        }
    }

    #[test]
    fn a_full_bucket_and_its_burst_are_there_at_once() {
        let mut bucket = TokenBucket::new(limits(10, 1000, 5)).unwrap();
        let now = bucket.filled;
        for _ in 0..15 {
            assert!(bucket.wait(now).is_zero());
            bucket.take(1, now);
        }
        let wait = bucket.wait(now);
        assert!(wait > Duration::from_millis(99) && wait < Duration::from_millis(101));
        // A long rest fills the bucket and no more.
        let later = now + Duration::from_secs(1000);
        for _ in 0..10 {
            assert!(bucket.wait(later).is_zero());
            bucket.take(1, later);
        }
        assert!(!bucket.wait(later).is_zero());
    }

    #[test]
    fn extreme_limits_are_no_trouble() {
        assert!(TokenBucket::new(limits(0, 100, 0)).is_none());
        assert!(TokenBucket::new(limits(100, 0, 0)).is_none());
        let mut bucket = TokenBucket::new(limits(1, u64::MAX / 1000, 0)).unwrap();
        let now = bucket.filled;
        for _ in 0..3 {
            bucket.take(u64::MAX, now);
        }
        assert!(bucket.wait(now + Duration::from_secs(1 << 40)) > Duration::ZERO);
    }

    #[test]
    fn a_limiter_without_buckets_admits_everything() {
        let limiter = Limiter::new(LimiterUpdate::default()).unwrap();
        for _ in 0..100 {
            assert!(limiter.admits());
            limiter.charge(u64::MAX);
        }
    }

    #[test]
    fn limits_can_be_set_changed_and_removed_and_the_timer_says_so() {
        let limiter = Limiter::new(LimiterUpdate::default()).unwrap();
        let set = |size| BucketUpdate::Set(limits(size, 3_600_000, 0));
        limiter.update(LimiterUpdate {
            ops: set(1),
            bandwidth: set(1000),
        });
        assert!(limiter.admits());
        limiter.charge(10);
        assert!(!limiter.admits());
        // The bucket of bytes is kept, that of requests goes.
        limiter.update(LimiterUpdate {
            ops: BucketUpdate::Remove,
            bandwidth: BucketUpdate::Keep,
        });
        limiter.timer.lock().unwrap().wait().unwrap();
        assert!(limiter.admits());
        limiter.charge(990);
        assert!(!limiter.admits());
        assert_eq!(limiter.throttled(), 2);
        limiter.update(LimiterUpdate {
            ops: BucketUpdate::Keep,
            bandwidth: BucketUpdate::Remove,
        });
        assert!(limiter.admits());
    }
}
