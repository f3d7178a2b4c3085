// SPDX-License-Identifier: Apache-2.0
//! What is kept of a balloon when a machine is saved.
//!
//! A run of hints is not: pages that the driver has hinted and that were not given back yet are
//! the guest's again, as at the end of any run.

use serde::{Deserialize, Serialize};

use super::statistics::STATISTICS;

/// The state of a balloon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BalloonState {
    /// The size that it is to have, in pages of 4 KiB.
    pub(super) target_pages: u32,
    /// The size that it has, in pages of 4 KiB, as the guest says.
    pub(super) actual_pages: u32,
    /// How often the guest is asked for statistics, in seconds; zero is never.
    pub(super) statistics_interval_s: u16,
    /// Whether it was to be asked at once.
    pub(super) refresh: bool,
    /// What the guest has told last, by tag.
    pub(super) statistics: [Option<u64>; STATISTICS],
    /// The hint command that the driver was given last.
    pub(super) hint_cmd: u32,
    /// The hint command that the driver has confirmed last.
    pub(super) confirmed_hint_cmd: Option<u32>,
    /// The number of the last run of hints; the next one has to have another.
    pub(super) last_hint_run: u32,
}
