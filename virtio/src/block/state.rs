// SPDX-License-Identifier: Apache-2.0
//! What is kept of a block device when a machine is saved. Its image is not: whoever restores the
//! machine brings one that has what the guest has written.

use serde::{Deserialize, Serialize};

use super::disk::Disk;
use crate::limiter::LimiterState;

/// The state of a block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BlockState {
    /// What the guest knows of the image.
    pub(super) geometry: Geometry,
    /// The limits on its traffic.
    pub(super) limiter: LimiterState,
}

/// What a guest sees of an image in the configuration space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Geometry {
    /// Size in sectors of 512 bytes.
    pub(super) sectors: u64,
    /// The smallest unit that can be addressed, in bytes.
    pub(super) logical_block: u32,
    /// The smallest unit that is written without reading first, in bytes.
    pub(super) physical_block: u32,
}

impl Geometry {
    pub(super) fn of(disk: &Disk) -> Self {
        Self {
            sectors: disk.sectors,
            logical_block: disk.logical_block,
            physical_block: disk.physical_block,
        }
    }
}
