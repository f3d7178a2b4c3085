// SPDX-License-Identifier: Apache-2.0
//! The sections of a state file that the machine itself writes.

use brume_api::config::VmConfig;
use brume_snapshot::{Saved, UpgradeError};
use brume_virtio::transport::TransportState;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::hex::Hex;
use super::mark::Mark;
use crate::chipset::ChipsetState;
use crate::kvm::VmKvmState;
use crate::memory::MachineMemory;
use crate::page_set::PAGE_SIZE;

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
    /// For a diff, something that its base has and it has not.
    #[serde(default)]
    pub(super) witness: Option<Witness>,
}

/// Eight bytes of the memory that are not zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Witness {
    /// Where they are in the memory file.
    offset: u64,
    /// What they are, as a little-endian number.
    word: Hex,
}

impl Witness {
    /// One on that page; `None` if there is nothing on it.
    pub(super) fn on(memory: &MachineMemory, page: u64) -> Option<Self> {
        let words = page * PAGE_SIZE..(page + 1) * PAGE_SIZE;
        words.step_by(8).find_map(|offset| {
            let word = memory.word(offset).ok()?;
            let word = Hex(word);
            (word.0 != 0).then_some(Self { offset, word })
        })
    }

    /// Whether `memory` has it.
    pub(super) fn is_in(&self, memory: &MachineMemory) -> bool {
        memory
            .word(self.offset)
            .is_ok_and(|word| word == self.word.0)
    }
}

impl Saved for MemorySection {
    const KIND: &'static str = "memory";
    const VERSION: u32 = 2;

    /// Version 1 had no witness.
    fn upgrade(version: u32, value: Value) -> Result<Value, UpgradeError> {
        if version == 1 {
            Ok(value)
        } else {
            Err(UpgradeError::TooOld)
        }
    }
}

impl Saved for VmKvmState {
    const KIND: &'static str = "kvm";
    const VERSION: u32 = 1;
}

/// A virtio device and its transport, in the order of their places.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct VirtioSection {
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
