// SPDX-License-Identifier: Apache-2.0
//! Limits on a device's traffic.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A bucket of tokens, which flow in at a steady rate and are taken out by traffic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TokenBucket {
    /// The most tokens in the bucket; 0 is no limit.
    #[schema(maximum = 18_446_744_073_709_551_615u64)]
    pub size: u64,
    /// Tokens that can be used once, at the start.
    #[serde(default)]
    #[schema(maximum = 18_446_744_073_709_551_615u64)]
    pub one_time_burst: Option<u64>,
    /// The time in which the bucket is filled, in milliseconds; 0 is no limit.
    #[schema(maximum = 18_446_744_073_709_551_615u64)]
    pub refill_time: u64,
}

/// The limits on one kind of traffic. Without a bucket there is none; in a PATCH, a bucket that is
/// left out stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    /// Tokens are bytes.
    #[serde(default, deserialize_with = "super::object::object")]
    pub bandwidth: Option<TokenBucket>,
    /// Tokens are requests, or frames.
    #[serde(default, deserialize_with = "super::object::object")]
    pub ops: Option<TokenBucket>,
}

impl RateLimiter {
    /// What the limits are after a PATCH with `patch`.
    pub fn patched(current: Option<Self>, patch: Self) -> Option<Self> {
        let old = current.unwrap_or_default();
        let limits = |bucket: &TokenBucket| bucket.size > 0 && bucket.refill_time > 0;
        let next = Self {
            bandwidth: patch.bandwidth.or(old.bandwidth).filter(limits),
            ops: patch.ops.or(old.ops).filter(limits),
        };
        (next != Self::default()).then_some(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_keeps_what_it_leaves_out_and_zero_removes() {
        let bucket = |size| {
            Some(TokenBucket {
                size,
                one_time_burst: None,
                refill_time: 100,
            })
        };
        let limiter = |bandwidth, ops| RateLimiter { bandwidth, ops };
        let both = limiter(bucket(1), bucket(2));
        for (patch, expected) in [
            (limiter(None, None), Some(both)),
            (
                limiter(bucket(5), None),
                Some(limiter(bucket(5), bucket(2))),
            ),
            (limiter(None, bucket(0)), Some(limiter(bucket(1), None))),
            (limiter(bucket(0), bucket(0)), None),
        ] {
            assert_eq!(RateLimiter::patched(Some(both), patch), expected);
        }
    }
}
