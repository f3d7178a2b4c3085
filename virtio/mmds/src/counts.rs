// SPDX-License-Identifier: Apache-2.0
//! What a metadata service counts.

/// Numbers since the start, of all interfaces together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MmdsCounts {
    /// Frames taken from guests.
    pub rx_frames: u64,
    /// Frames that were too large or made no sense.
    pub rx_bad: u64,
    /// Frames given to guests.
    pub tx_frames: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Requests that were answered.
    pub requests: u64,
    /// Requests without a token that needed one.
    pub no_token: u64,
    /// Requests with a token that is not valid.
    pub invalid_token: u64,
    /// Connections that a guest has opened.
    pub connections_opened: u64,
    /// Connections that have ended.
    pub connections_ended: u64,
}
