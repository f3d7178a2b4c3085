// SPDX-License-Identifier: Apache-2.0
//! What the API counts of itself.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

/// Upper bounds of the latency classes, in microseconds; there is one more without a bound.
pub const LATENCY_BOUNDS_US: [u64; 10] = [
    50, 100, 250, 500, 1_000, 5_000, 25_000, 100_000, 1_000_000, 10_000_000,
];

/// The requests with one method on one kind of resource.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestCount {
    /// The method.
    pub method: String,
    /// The first part of the path; `mmds/config` and `vm/config` are resources of their own.
    pub resource: String,
    /// How many came.
    pub count: u64,
    /// How many of them failed.
    pub fails: u64,
}

/// What was counted since the start.
#[derive(Clone, Debug, Default)]
pub struct ApiCounts {
    /// Requests by method and resource. What is no resource of ours is counted as one, `other`.
    pub requests: Vec<RequestCount>,
    /// Requests that used what is deprecated.
    pub deprecated: u64,
    /// Requests by how long they took: one count for each of [`LATENCY_BOUNDS_US`], one for more.
    pub latency: [u64; LATENCY_BOUNDS_US.len() + 1],
    /// The sum of what they took, in microseconds.
    pub latency_sum_us: u64,
}

/// Counts the requests of one server.
#[derive(Debug, Default)]
pub struct ApiMetrics(Mutex<ApiCounts>);

impl ApiMetrics {
    /// What was counted so far.
    pub fn get(&self) -> ApiCounts {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Counts a request.
    pub(crate) fn add(&self, request: Finished<'_>) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let us = u64::try_from(request.took.as_micros()).unwrap_or(u64::MAX);
        let class = LATENCY_BOUNDS_US.partition_point(|&bound| bound < us);
        if let Some(count) = counts.latency.get_mut(class) {
            *count += 1;
        }
        counts.latency_sum_us = counts.latency_sum_us.saturating_add(us);
        counts.deprecated += u64::from(request.deprecated);
        let fails = u64::from(request.failed);
        let known = counts
            .requests
            .iter_mut()
            .find(|known| known.method == request.method && known.resource == request.resource);
        match known {
            Some(known) => {
                known.count += 1;
                known.fails += fails;
            }
            None => counts.requests.push(RequestCount {
                method: request.method.into(),
                resource: request.resource.into(),
                count: 1,
                fails,
            }),
        }
    }
}

/// A request that was answered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Finished<'a> {
    pub(crate) method: &'a str,
    pub(crate) resource: &'a str,
    pub(crate) took: Duration,
    pub(crate) failed: bool,
    pub(crate) deprecated: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_by_kind_and_time() {
        let metrics = ApiMetrics::default();
        let one = Finished {
            method: "PUT",
            resource: "drives",
            took: Duration::from_micros(100),
            failed: false,
            deprecated: false,
        };
        metrics.add(one);
        metrics.add(Finished {
            failed: true,
            took: Duration::from_secs(20),
            ..one
        });
        let counts = metrics.get();
        assert_eq!((counts.requests[0].count, counts.requests[0].fails), (2, 1));
        assert_eq!((counts.latency[1], counts.latency[10]), (1, 1));
        assert_eq!(counts.latency_sum_us, 20_000_100);
    }
}
