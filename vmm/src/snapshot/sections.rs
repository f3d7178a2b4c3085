// SPDX-License-Identifier: Apache-2.0
//! The sections of a state file that the machine itself writes.

use brume_api::config::VmConfig;
use brume_snapshot::Saved;
use brume_virtio::transport::TransportState;
use serde::{Deserialize, Serialize};

use super::mark::Mark;
use crate::chipset::ChipsetState;
use crate::kvm::VmKvmState;

/// What the machine is made of.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MachineSection {
    /// The version of brume that wrote it.
    pub(super) brume: String,
    /// When it was written, in milliseconds since 1970.
    pub(super) written_unix_ms: u64,
    /// How the machine was configured. Where its log and its metrics went is left out.
    pub(super) config: VmConfig,
}

impl Saved for MachineSection {
    const KIND: &'static str = "machine";
    const VERSION: u32 = 1;
}

/// What the memory file has to be.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MemorySection {
    /// Its length in bytes.
    pub(super) size: u64,
    /// What it is known by.
    pub(super) mark: Mark,
}

impl Saved for MemorySection {
    const KIND: &'static str = "memory";
    const VERSION: u32 = 1;
}

impl Saved for VmKvmState {
    const KIND: &'static str = "kvm";
    const VERSION: u32 = 1;
}

/// A virtio device and its transport, in the order of their places.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct VirtioSection {
    /// The id of the device, or what it is.
    pub(super) name: String,
    /// Its state.
    pub(super) transport: TransportState,
}

impl Saved for VirtioSection {
    const KIND: &'static str = "virtio";
    const VERSION: u32 = 1;
}

impl Saved for ChipsetState {
    const KIND: &'static str = "chipset";
    const VERSION: u32 = 1;
}
