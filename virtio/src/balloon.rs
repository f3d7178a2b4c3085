// SPDX-License-Identifier: Apache-2.0
//! The memory balloon (virtio 1.3, section 5.5): memory that the guest lends to the host.
//!
//! ```text
//!   BalloonControl --target, hint command--> configuration space --> driver
//!   driver --> inflate    numbers of pages that it does without until it takes them back
//!              deflate    numbers of pages that it takes back
//!              statistics what it tells about its memory, every few seconds
//!              hinting    free pages, as a whole and on request
//!              reporting  free pages, as they become free
//! ```
//!
//! Pages that come by the inflate, hinting and reporting queues go back to the host; the guest
//! gets new ones when it touches them. All that a driver can gain by lies is to lose its own
//! memory: what is outside guest memory is left out, and what it names twice counts once.
//!
//! A queue exists if the feature that it goes with does, and the ones behind it move up. That is
//! not what the standard says, but what drivers do, as for Linux with virtio-mmio.

mod backend;
mod control;
mod counters;
mod host;
mod ranges;
mod state;
mod statistics;

use std::io;
use std::sync::Arc;

use serde_json::Value;
use thiserror::Error;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::device::{
    RestoreContext, StartContext, StartError, StateError, VirtioDevice, read_config_bytes, saved,
};
use crate::memory::GuestMemory;
use crate::queue::QueueState;
use crate::worker::Worker;

pub use control::{BalloonControl, BalloonError, HintingStatus};
pub use counters::{BalloonCounts, GivenBack};
pub use statistics::{STATISTICS, Statistics};

use backend::{BalloonBackend, Role};
use control::Shared;

/// The device ID of a balloon of the kind that everybody has.
const DEVICE_TYPE: u32 = 5;
/// As many as there are with all features.
const QUEUE_SIZES: [u16; 5] = [256; 5];
/// Pages of the balloon have 4 KiB.
const PAGES_PER_MIB: u32 = 256;

/// Feature bits (section 5.5.3).
mod bit {
    pub(super) const STATS_VQ: u64 = 1 << 1;
    pub(super) const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub(super) const FREE_PAGE_HINT: u64 = 1 << 3;
    pub(super) const PAGE_REPORTING: u64 = 1 << 5;
}

/// What a person decides about a balloon.
#[derive(Clone, Debug, Default)]
pub struct BalloonConfig {
    /// The size that it is to have at first, in MiB.
    pub amount_mib: u32,
    /// Whether the guest may take memory back by itself when it has none left.
    pub deflate_on_oom: bool,
    /// How often the guest is asked for statistics, in seconds; zero is never.
    pub statistics_interval_s: u16,
    /// Whether there is a queue for hints.
    pub free_page_hinting: bool,
    /// Whether there is a queue for reports.
    pub free_page_reporting: bool,
}

/// A balloon that cannot be made.
#[derive(Debug, Error)]
pub enum BalloonNewError {
    /// A size beyond all limits.
    #[error("a balloon cannot have 16 TiB or more")]
    Amount,
    /// No more file descriptors.
    #[error("the host gives no event file descriptor for the balloon")]
    Event(#[from] io::Error),
}

/// A memory balloon.
pub struct Balloon {
    shared: Arc<Shared>,
    worker: Option<Worker<BalloonBackend>>,
}

impl Balloon {
    /// A balloon without air.
    ///
    /// # Errors
    ///
    /// The size is none, or the host gives no file descriptor.
    pub fn new(config: BalloonConfig) -> Result<Self, BalloonNewError> {
        Ok(Self {
            shared: Arc::new(Shared::new(config)?),
            worker: None,
        })
    }

    /// The way to ask it for something while the machine runs.
    pub fn control(&self) -> BalloonControl {
        BalloonControl(self.shared.clone())
    }
}

/// What the queues of a device with `features` are for, in their order.
fn roles(features: u64) -> Vec<Role> {
    let optional = [
        (bit::STATS_VQ, Role::Statistics),
        (bit::FREE_PAGE_HINT, Role::Hinting),
        (bit::PAGE_REPORTING, Role::Reporting),
    ];
    let optional = optional
        .into_iter()
        .filter_map(|(bit, role)| (features & bit != 0).then_some(role));
    [Role::Inflate, Role::Deflate]
        .into_iter()
        .chain(optional)
        .collect()
}

/// How many bytes of memory the guest has.
fn size_of(memory: &GuestMemory) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum()
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        let config = &self.shared.config;
        [
            (config.statistics_interval_s > 0, bit::STATS_VQ),
            (config.deflate_on_oom, bit::DEFLATE_ON_OOM),
            (config.free_page_hinting, bit::FREE_PAGE_HINT),
            (config.free_page_reporting, bit::PAGE_REPORTING),
        ]
        .into_iter()
        .filter_map(|(wanted, bit)| wanted.then_some(bit))
        .fold(0, |features, bit| features | bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        let count = roles(self.features()).len();
        QUEUE_SIZES.get(..count).unwrap_or(&QUEUE_SIZES)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.shared.config_space(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.shared.write_config(offset, data);
    }

    fn start(&mut self, context: StartContext) -> Result<(), StartError> {
        let StartContext {
            memory,
            features,
            queues,
            signals,
        } = context;
        self.shared.activate(signals.clone(), size_of(&memory));
        let backend = BalloonBackend::new(
            queues,
            &roles(features),
            memory,
            self.shared.clone(),
            signals.clone(),
        )?;
        self.worker = Some(Worker::spawn("balloon", backend, signals)?);
        Ok(())
    }

    fn stop(&mut self) -> Vec<Option<QueueState>> {
        let state = self.worker.take().and_then(Worker::stop);
        state.unwrap_or_default()
    }

    fn reset(&mut self) {
        self.shared.reset();
    }

    fn save(&self) -> Value {
        saved(&self.shared.save())
    }

    fn restore(&mut self, state: Value, context: RestoreContext) -> Result<(), StateError> {
        let state = serde_json::from_value(state)?;
        self.shared.restore(&state, &context.signals)?;
        if context.running {
            let bytes = size_of(&context.memory);
            self.shared.activate(context.signals, bytes);
        }
        Ok(())
    }
}

impl Drop for Balloon {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests;
