// SPDX-License-Identifier: Apache-2.0
//! Counters. One thread writes; anybody may read at any time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A counter with one writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `amount`; for one thread at a time.
    pub fn add(&self, amount: u64) {
        // With one writer this loses nothing, and needs no locked instruction.
        let value = self.0.load(Ordering::Relaxed);
        self.0.store(value.wrapping_add(amount), Ordering::Relaxed);
    }

    /// The sum at this moment.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }
}

/// Upper bounds of the classes of a [`Latency`], in microseconds; there is one more class without.
pub const LATENCY_BOUNDS_US: [u64; 10] =
    [5, 10, 25, 50, 100, 500, 2_500, 10_000, 100_000, 1_000_000];

/// How long requests took, by classes.
#[derive(Debug, Default)]
pub struct LatencyCounter {
    classes: [Counter; LATENCY_BOUNDS_US.len() + 1],
    sum_ns: Counter,
    min_ns: Counter,
    max_ns: Counter,
    any: Counter,
}

impl LatencyCounter {
    /// Counts a request that took so long; for one thread at a time.
    pub fn add(&self, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let class = LATENCY_BOUNDS_US.partition_point(|&bound| bound * 1000 < ns);
        if let Some(count) = self.classes.get(class) {
            count.add(1);
        }
        self.sum_ns.add(ns);
        if ns > self.max_ns.get() {
            self.max_ns.set(ns);
        }
        if self.any.get() == 0 || ns < self.min_ns.get() {
            self.min_ns.set(ns);
        }
        self.any.set(1);
    }

    /// The values at this moment; they need not be of the same instant.
    pub fn get(&self) -> Latency {
        Latency {
            classes: std::array::from_fn(|class| self.classes.get(class).map_or(0, Counter::get)),
            sum: Duration::from_nanos(self.sum_ns.get()),
            min: Duration::from_nanos(self.min_ns.get()),
            max: Duration::from_nanos(self.max_ns.get()),
        }
    }
}

/// The values of a latency counter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Latency {
    /// How many requests took no longer than the bound of the same place in
    /// [`LATENCY_BOUNDS_US`], and longer than the one before; the last is for all others.
    pub classes: [u64; LATENCY_BOUNDS_US.len() + 1],
    /// What all of them took together.
    pub sum: Duration,
    /// The shortest; zero if there was none.
    pub min: Duration,
    /// The longest.
    pub max: Duration,
}

impl Latency {
    /// How many requests there were.
    pub fn count(&self) -> u64 {
        self.classes.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_put_into_their_classes() {
        let counter = LatencyCounter::default();
        for us in [5, 6, 7, 2_000_000] {
            counter.add(Duration::from_micros(us));
        }
        let latency = counter.get();
        assert_eq!(latency.classes, [1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(latency.min, Duration::from_micros(5));
        assert_eq!(latency.max, Duration::from_secs(2));
        assert_eq!(latency.sum, Duration::from_micros(2_000_018));
    }
}
