// SPDX-License-Identifier: Apache-2.0
//! What is kept of a transport and its device when a machine is saved, and the way back.
//!
//! A state comes from a file and is not trusted: all of it is checked before anything starts, so
//! that no machine ever runs with some of its devices only.

use std::fmt::Write;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

use super::core::{
    ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, RunningQueues, TransportCore,
};
use crate::device::{RestoreContext, StateError, feature};
use crate::queue::{Queue, QueueError, QueueState};
use crate::signals::INTERRUPT_BITS;

/// The state of a transport, of its queues and of the device behind it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransportState {
    /// The device ID (virtio 1.3, section 5).
    pub device_type: u32,
    /// The device status, without DEVICE_NEEDS_RESET.
    pub status: u8,
    /// The feature bits that the device offered.
    pub device_features: u64,
    /// The feature bits that the driver has written; agreed on if the status says so.
    pub driver_features: u64,
    /// Bits of the interrupt status that the driver has not acknowledged.
    pub interrupt_status: u32,
    /// How often the configuration space has changed; it wraps.
    pub config_generation: u32,
    /// Whether the device has to be reset before it goes on.
    pub needs_reset: bool,
    /// The registers of each queue.
    pub queues: Vec<QueueState>,
    /// How far a running device has got with each queue, `None` for one that is not in use. Empty
    /// if the device does not run.
    pub running: Vec<Option<QueueState>>,
    /// Register DeviceFeaturesSel: which half of the offered features is read.
    pub device_features_sel: u32,
    /// Register DriverFeaturesSel: which half of the accepted features is written.
    pub driver_features_sel: u32,
    /// Register QueueSel: whose registers are accessed.
    pub queue_sel: u32,
    /// What the device keeps for itself.
    pub device: Value,
}

/// Why a transport does not take on a state.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// The state is that of another device.
    #[error(
        "the state is of a virtio device of type {saved}, and the device here is of type {here}"
    )]
    DeviceType {
        /// Of the state.
        saved: u32,
        /// Of the device.
        here: u32,
    },
    /// The driver uses what the device does not offer here.
    #[error(
        "the driver uses feature bits {} of the virtio device of type {device_type}, which it does \
         not offer on this host; for a network device, give it a TAP with the offloads that the \
         first one had",
        list(*.missing)
    )]
    Features {
        /// The device ID.
        device_type: u32,
        /// The bits that are not offered.
        missing: u64,
    },
    /// The number of queues is another.
    #[error("the state has {saved} queues, and the virtio device of type {device_type} has {here}")]
    QueueCount {
        /// The device ID.
        device_type: u32,
        /// Of the state.
        saved: usize,
        /// Of the device.
        here: usize,
    },
    /// The largest size of a queue is another.
    #[error("queue {index} was offered with up to {saved} descriptors, and is with {here} here")]
    QueueMaxSize {
        /// Which queue.
        index: usize,
        /// Of the state.
        saved: u16,
        /// Of the device.
        here: u16,
    },
    /// A queue in use that cannot be used.
    #[error("queue {index} of the virtio device of type {device_type} cannot be used")]
    Queue {
        /// The device ID.
        device_type: u32,
        /// Which queue.
        index: usize,
        /// Why.
        source: QueueError,
    },
    /// Two parts of the state that cannot both be so, or a value that no device can have.
    #[error("the state of the virtio device of type {device_type} contradicts itself: {what}")]
    Contradiction {
        /// The device ID.
        device_type: u32,
        /// What is wrong.
        what: &'static str,
    },
    /// The device does not take on what it kept for itself.
    #[error("the virtio device of type {device_type} cannot go on from its state")]
    Device {
        /// The device ID.
        device_type: u32,
        /// Why.
        source: StateError,
    },
}

/// The numbers of the bits that are set.
fn list(bits: u64) -> String {
    let mut text = String::new();
    for bit in (0..u64::BITS).filter(|bit| bits >> bit & 1 != 0) {
        let comma = if text.is_empty() { "" } else { ", " };
        // A string takes what it is given.
        let _ = write!(text, "{comma}{bit}");
    }
    text
}

impl TransportCore {
    /// The state, with selectors of zero.
    pub(super) fn save(&self, running: &RunningQueues) -> TransportState {
        TransportState {
            device_type: self.device.device_type(),
            status: self.status,
            device_features: self.offered(),
            driver_features: self.driver_features,
            interrupt_status: self.signals.interrupt_status(),
            config_generation: self.signals.config_generation(),
            needs_reset: self.signals.is_reset_needed(),
            queues: self.queues.clone(),
            running: running.0.clone(),
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
            device: self.device.save(),
        }
    }

    /// Takes on a state, without starting the device.
    pub(super) fn restore(&mut self, state: TransportState) -> Result<RunningQueues, RestoreError> {
        self.device.limit_features(state.device_features);
        self.queues.truncate(self.device.queue_sizes().len());
        self.check_device(&state)?;
        self.check_status(&state)?;
        self.check_queues(&state)?;
        let device_type = state.device_type;
        // Before the device, which may have something to tell.
        self.signals.restore(
            state.interrupt_status,
            state.config_generation,
            state.needs_reset,
        );
        let context = RestoreContext {
            memory: self.memory.clone(),
            signals: self.signals.clone(),
            running: state.status & DRIVER_OK != 0,
        };
        let restored = self.device.restore(state.device, context);
        restored.map_err(|source| RestoreError::Device {
            device_type,
            source,
        })?;
        self.status = state.status;
        self.driver_features = state.driver_features;
        self.queues = state.queues;
        Ok(RunningQueues(state.running))
    }

    /// Whether it is a state of this device, with features that it has here too.
    fn check_device(&self, state: &TransportState) -> Result<(), RestoreError> {
        let (device_type, here) = (state.device_type, self.device.device_type());
        if device_type != here {
            return Err(RestoreError::DeviceType {
                saved: device_type,
                here,
            });
        }
        // Until they are agreed on, the driver may have written anything.
        let missing = state.driver_features & !self.offered();
        if state.status & FEATURES_OK != 0 && missing != 0 {
            return Err(RestoreError::Features {
                device_type,
                missing,
            });
        }
        Ok(())
    }

    /// Whether the status is one that a driver can get to.
    fn check_status(&self, state: &TransportState) -> Result<(), RestoreError> {
        let has = |bit| state.status & bit != 0;
        let known = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED;
        let agreed = state.driver_features & feature::VERSION_1 != 0
            && state.driver_features & !state.device_features == 0;
        let rules = [
            (state.status & !known == 0, "a status bit that is none"),
            (
                has(DRIVER) || !has(FEATURES_OK) && state.driver_features == 0,
                "features without a driver",
            ),
            (
                has(FEATURES_OK) || !has(DRIVER_OK),
                "a driver that is ready before its features are agreed",
            ),
            (
                agreed || !has(FEATURES_OK),
                "features that were agreed and are not acceptable",
            ),
            (
                has(DRIVER_OK) || state.running.is_empty(),
                "queues that run without a driver",
            ),
            (
                state.interrupt_status & !INTERRUPT_BITS == 0,
                "a bit of the interrupt status that is none",
            ),
        ];
        match rules.into_iter().find(|(holds, _)| !holds) {
            None => Ok(()),
            Some((_, what)) => Err(contradiction(state, what)),
        }
    }

    /// Whether the queues are those of the device, and each that is in use lies in guest memory.
    fn check_queues(&self, state: &TransportState) -> Result<(), RestoreError> {
        let here = self.queues.len();
        let device_type = state.device_type;
        let counts = [
            Some(state.queues.len()),
            Some(state.running.len()).filter(|&n| n > 0),
        ];
        if let Some(saved) = counts.into_iter().flatten().find(|&count| count != here) {
            return Err(RestoreError::QueueCount {
                device_type,
                saved,
                here,
            });
        }
        let pairs = state.queues.iter().zip(&self.queues);
        for (index, (saved, here)) in pairs.enumerate() {
            let (saved, here) = (saved.max_size, here.max_size);
            if saved != here {
                return Err(RestoreError::QueueMaxSize { index, saved, here });
            }
        }
        for (index, registers) in state.queues.iter().enumerate() {
            let running = state.running.get(index).copied().flatten();
            let runs = state.status & DRIVER_OK != 0 && registers.ready;
            if running.is_some() != runs && !state.needs_reset {
                let what = "a queue runs that the driver has not set up, or the other way round";
                return Err(contradiction(state, what));
            }
            if let Some(running) = running {
                self.check_running(state, index, running, registers)?;
            }
        }
        Ok(())
    }

    /// Whether a queue in use is the one that the driver has set up, and can be used.
    fn check_running(
        &self,
        state: &TransportState,
        index: usize,
        running: QueueState,
        registers: &QueueState,
    ) -> Result<(), RestoreError> {
        let as_set_up = QueueState {
            next_avail: registers.next_avail,
            next_used: registers.next_used,
            ..running
        };
        if as_set_up != *registers {
            let what = "a queue that runs is not the one that the driver has set up";
            return Err(contradiction(state, what));
        }
        // A paused device has nothing in flight, and a state could not say what that is.
        if running.next_avail != running.next_used && !state.needs_reset {
            return Err(contradiction(state, "a queue has requests in flight"));
        }
        let queue = Queue::new(running, self.memory.clone(), state.driver_features);
        queue.map(drop).map_err(|source| RestoreError::Queue {
            device_type: state.device_type,
            index,
            source,
        })
    }
}

fn contradiction(state: &TransportState, what: &'static str) -> RestoreError {
    RestoreError::Contradiction {
        device_type: state.device_type,
        what,
    }
}

#[cfg(test)]
mod tests;
