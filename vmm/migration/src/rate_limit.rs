// SPDX-License-Identifier: Apache-2.0
//! A limit on bytes per second, shared by all connections of a move.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How much of unused time may be used later.
const BURST: Duration = Duration::from_millis(10);

/// A limit on bytes per second. Clones are the same limit.
#[derive(Clone, Debug)]
pub struct RateLimit(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    /// In bytes per second; 0 for none.
    rate: u64,
    /// Until when what was sent is paid for.
    paid_until: Instant,
    /// What is not paid for by whole nanoseconds: in bytes times a billion, less than `rate`.
    rest: u64,
}

impl RateLimit {
    /// A limit of `rate` bytes per second; 0 for none.
    pub fn new(rate: u64) -> Self {
        Self(Arc::new(Mutex::new(State {
            rate,
            paid_until: Instant::now(),
            rest: 0,
        })))
    }

    /// Changes the limit. What was not paid for is forgiven: who was told to wait by the limit before
    /// need not wait any longer, and is not told so.
    pub fn set(&self, rate: u64) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.rate = rate;
        state.paid_until = Instant::now();
        state.rest = 0;
    }

    /// The limit in bytes per second; 0 for none.
    pub fn get(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).rate
    }

    /// Counts `bytes` that are about to be sent; how long to wait before that.
    pub fn take(&self, bytes: u64) -> Duration {
        self.take_at(bytes, Instant::now())
    }

    fn take_at(&self, bytes: u64, now: Instant) -> Duration {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.rate == 0 {
            return Duration::ZERO;
        }
        let (price, rate) = (
            u128::from(bytes) * 1_000_000_000 + u128::from(state.rest),
            u128::from(state.rate),
        );
        let nanos = price / rate;
        state.rest = u64::try_from(price % rate).unwrap_or(0);
        let costs = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let from = state.paid_until.max(earliest);
        state.paid_until = from.checked_add(costs).unwrap_or(from);
        from.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_sent_at_the_rate_and_not_faster() {
        let limit = RateLimit::new(1_000_000);
        let begun = Instant::now();
        let mut now = begun;
        for _ in 0..1000 {
            now += limit.take_at(10_000, now);
        }
        let time = now - begun;
        // 10 MB at 1 MB/s; the first pieces go at once.
        assert!(time <= Duration::from_secs(10), "{time:?}");
        assert!(time >= Duration::from_millis(9_970), "{time:?}");
        // A pause is not saved up for later.
        now += Duration::from_secs(60);
        let after: Duration = (0..100).map(|_| limit.take_at(10_000, now)).max().unwrap();
        assert!(after >= Duration::from_millis(970), "{after:?}");
    }

    #[test]
    fn small_pieces_cost_what_large_ones_do() {
        // 100 bytes take 33 and a third nanoseconds, which no clock has.
        let limit = RateLimit::new(3_000_000_000);
        let now = Instant::now() + BURST;
        for _ in 0..600_000 {
            limit.take_at(100, now);
        }
        // 60 MB take 20 ms, and the burst was free.
        assert_eq!(limit.take_at(0, now), Duration::from_millis(10));
    }

    #[test]
    fn many_who_share_it_are_as_fast_as_one() {
        let limit = RateLimit::new(1_000_000);
        let now = Instant::now();
        let mut longest = Duration::ZERO;
        for who in [limit.clone(), limit.clone(), limit] {
            longest = longest.max(who.take_at(1_000_000, now));
        }
        assert!(longest >= Duration::from_millis(1_990), "{longest:?}");
        assert!(longest <= Duration::from_secs(2), "{longest:?}");
    }

    #[test]
    fn without_a_limit_nobody_waits() {
        let limit = RateLimit::new(1);
        limit.take(1 << 40);
        limit.set(0);
        assert_eq!(limit.take(1 << 40), Duration::ZERO);
        assert_eq!(limit.get(), 0);
    }
}
