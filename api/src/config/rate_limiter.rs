// SPDX-License-Identifier: Apache-2.0
//! Limits on how much a device does in a time.

use serde::{Deserialize, Serialize};

/// Limits on the bytes and on the operations of a device; without a bucket there is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiterConfig {
    /// Tokens are bytes.
    #[serde(default)]
    pub bandwidth: Option<TokenBucket>,
    /// Tokens are operations.
    #[serde(default)]
    pub ops: Option<TokenBucket>,
}

/// A bucket of tokens, which fills up again at a steady pace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// How many tokens it holds; with none there is no limit.
    pub size: u64,
    /// Tokens on top at the start, which do not come again.
    #[serde(default)]
    pub one_time_burst: Option<u64>,
    /// How long an empty bucket takes to be full, in milliseconds; with zero there is no limit.
    pub refill_time: u64,
}
