// SPDX-License-Identifier: Apache-2.0
//! What makes a virtio device, as its transport sees it.

use std::error::Error;
use std::sync::Arc;

use serde::Serialize;
use serde_json::Value;
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestMemory;
use crate::queue::{Queue, QueueState};
use crate::signals::DeviceSignals;

/// Feature bits that belong to the ring and the transport (virtio 1.3, section 6).
pub mod feature {
    /// A descriptor may point to a table of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Both sides say how far the other may go before it has to notify.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// The device follows version 1 of the standard.
    pub const VERSION_1: u64 = 1 << 32;

    /// What every device here offers.
    pub const COMMON: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1;
}

/// Why a device did not start; the chain of sources is for the log.
pub type StartError = Box<dyn Error + Send + Sync>;

/// Why a device does not take on a state.
#[derive(Debug, Error)]
pub enum StateError {
    /// It is not what the device writes.
    #[error("the state of the device cannot be read; it is damaged or of another version")]
    Parse(#[from] serde_json::Error),
    /// There is one, and the device has none.
    #[error("there is a state for a device that has none of its own")]
    Unexpected,
    /// A value that no device can have.
    #[error("the state of the device is damaged: {0}")]
    Value(&'static str),
}

/// What a device gets beside its state when it takes that on.
#[derive(Clone, Debug)]
pub struct RestoreContext {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The way to the driver; what it is told before the machine goes on is told again then.
    pub signals: DeviceSignals,
    /// Whether the driver had started the device.
    pub running: bool,
}

/// A queue the driver has set up, and the event that its notifications arrive on.
#[derive(Debug)]
pub struct StartedQueue {
    /// The queue, checked and frozen.
    pub queue: Queue,
    /// Written for each notification by the driver.
    pub kick: Arc<EventFd>,
}

/// What a device gets when its driver is ready.
#[derive(Debug)]
pub struct StartContext {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The feature bits that both sides agreed on.
    pub features: u64,
    /// One entry for each queue size that the device names, in that order; `None` where the
    /// driver left the queue unused.
    pub queues: Vec<Option<StartedQueue>>,
    /// The way back to the driver.
    pub signals: DeviceSignals,
}

/// A virtio device.
///
/// ```text
///   created --start--> running --stop--> stopped --start--> running ...
/// ```
///
/// The transport calls `start` when the driver sets DRIVER_OK (or when a paused machine goes on)
/// and `stop` for a reset, a pause or the end of the machine. Between the two the device's worker
/// owns the queues; the other methods may be called at any time.
pub trait VirtioDevice: Send {
    /// The device ID (virtio 1.3, section 5).
    fn device_type(&self) -> u32;

    /// The feature bits that the device offers beside [`feature::COMMON`].
    fn features(&self) -> u64;

    /// The largest size of each queue, in descriptors: powers of two up to 32768.
    fn queue_sizes(&self) -> &[u16];

    /// Fills `data` from the configuration space; bytes outside it read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Takes a write to the configuration space; what cannot be written is ignored.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Starts to serve the queues.
    ///
    /// # Errors
    ///
    /// The device cannot work; the transport then sets DEVICE_NEEDS_RESET.
    fn start(&mut self, context: StartContext) -> Result<(), StartError>;

    /// Finishes what is in flight and returns the state of each queue, in the order of
    /// `queue_sizes`; `None` for a queue that was not in use. Empty if the device does not run.
    fn stop(&mut self) -> Vec<Option<QueueState>>;

    /// Forgets what belongs to the driver; called after `stop` when the driver resets the device,
    /// and not for a pause.
    fn reset(&mut self) {}

    /// What is to be known of the device besides its configuration and its queues, to go on
    /// elsewhere; null if there is nothing. Called while the device is stopped.
    fn save(&self) -> Value {
        Value::Null
    }

    /// Leaves out the features that are not in `offered`, and the queues that go with them, if the
    /// device can do without. Called before [`VirtioDevice::restore`] with what the device that was
    /// saved had offered, so that one that has learnt more since then goes on as it was.
    fn limit_features(&mut self, _offered: u64) {}

    /// Takes on what [`VirtioDevice::save`] of a device with the same configuration has returned.
    /// Called before the device is started for the first time. The state is not trusted.
    ///
    /// # Errors
    ///
    /// It makes no sense; the device must not be started then.
    fn restore(&mut self, state: Value, _context: RestoreContext) -> Result<(), StateError> {
        match state {
            Value::Null => Ok(()),
            _ => Err(StateError::Unexpected),
        }
    }
}

/// A device's state as JSON.
pub(crate) fn saved(state: &impl Serialize) -> Value {
    // It fails for maps with keys that are no strings, which no state has.
    serde_json::to_value(state).unwrap_or_default()
}

/// Copies what `config` holds at `offset` to `data`, and zeroes where it ends.
pub(crate) fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let tail = usize::try_from(offset)
        .ok()
        .and_then(|offset| config.get(offset..));
    for (to, from) in data.iter_mut().zip(tail.unwrap_or_default()) {
        *to = *from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_bytes_end_in_zeroes() {
        let config = [1, 2, 3, 4];
        for (offset, expected) in [
            (0, [1, 2, 3]),
            (2, [3, 4, 0]),
            (4, [0; 3]),
            (100, [0; 3]),
            (u64::MAX, [0; 3]),
        ] {
            let mut data = [9; 3];
            read_config_bytes(&config, offset, &mut data);
            assert_eq!(data, expected, "at {offset}");
        }
    }
}
