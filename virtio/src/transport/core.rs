// SPDX-License-Identifier: Apache-2.0
//! The life of a device behind any transport: feature negotiation, queue set-up, device status
//! (virtio 1.3, sections 2.1, 2.2 and 3.1). A transport decodes its registers and calls this.
//!
//! ```text
//!  status: 0 -> ACKNOWLEDGE -> DRIVER -> FEATURES_OK -> DRIVER_OK        write 0: reset, from
//!               features may be set      queues may be set   running     anywhere
//! ```
//!
//! What the driver does out of turn is ignored, so that a running device never sees its queues
//! or features change.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::{StartContext, StartError, StartedQueue, VirtioDevice, feature};
use crate::memory::GuestMemory;
use crate::queue::{Queue, QueueState};
use crate::signals::DeviceSignals;

/// The driver has seen the device.
pub(super) const ACKNOWLEDGE: u8 = 1;
/// The driver knows how to drive it.
pub(super) const DRIVER: u8 = 2;
/// The driver is ready; the device runs.
pub(super) const DRIVER_OK: u8 = 4;
/// The features are agreed.
pub(super) const FEATURES_OK: u8 = 8;
/// The device cannot go on until it is reset.
const DEVICE_NEEDS_RESET: u8 = 64;
/// The driver has given up.
pub(super) const FAILED: u8 = 128;

/// The queues of a paused device, to go on with.
#[derive(Debug)]
pub struct RunningQueues(pub(super) Vec<Option<QueueState>>);

/// A device, its status and its queues.
pub struct TransportCore {
    pub(super) device: Box<dyn VirtioDevice>,
    pub(super) memory: GuestMemory,
    pub(super) signals: DeviceSignals,
    pub(super) status: u8,
    pub(super) driver_features: u64,
    pub(super) queues: Vec<QueueState>,
    kicks: Vec<Arc<EventFd>>,
}

impl TransportCore {
    /// Puts `device` behind a transport that tells the driver about events by `signals`.
    ///
    /// # Errors
    ///
    /// The host has no more file descriptors for us.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        signals: DeviceSignals,
    ) -> io::Result<Self> {
        let queues: Vec<_> = device
            .queue_sizes()
            .iter()
            .map(|&s| QueueState::new(s))
            .collect();
        let kicks = queues
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK).map(Arc::new))
            .collect::<io::Result<_>>()?;
        Ok(Self {
            device,
            memory,
            signals,
            status: 0,
            driver_features: 0,
            queues,
            kicks,
        })
    }

    /// The device.
    pub fn device(&self) -> &dyn VirtioDevice {
        self.device.as_ref()
    }

    /// Where the device reports.
    pub fn signals(&self) -> &DeviceSignals {
        &self.signals
    }

    /// The event of each queue, which a notification of it has to write.
    pub fn kicks(&self) -> &[Arc<EventFd>] {
        &self.kicks
    }

    /// Notifies queue `index`, for a transport whose notifications are not wired to the events.
    pub fn notify(&self, index: usize) {
        if let Some(kick) = self.kicks.get(index) {
            // A counter at its end means that the notification is pending already.
            let _ = kick.write(1);
        }
    }

    /// One of the two 32-bit halves of the offered features; zero beyond them.
    pub fn device_features(&self, half: u32) -> u32 {
        half_of(self.offered(), half)
    }

    /// Sets one half of the features that the driver accepts.
    pub fn set_driver_features(&mut self, half: u32, value: u32) {
        if self.status & DRIVER == 0 || self.status & (FEATURES_OK | DRIVER_OK) != 0 {
            return;
        }
        match half {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | u64::from(value),
            1 => {
                self.driver_features = self.driver_features & 0xffff_ffff | u64::from(value) << 32;
            }
            _ => {}
        }
    }

    /// The registers of queue `index`, to read.
    pub fn queue(&self, index: u32) -> Option<&QueueState> {
        self.queues.get(usize::try_from(index).ok()?)
    }

    /// The registers of queue `index`, to write; `None` while they are frozen: before the
    /// features are agreed, and from DRIVER_OK to the next reset. What is there besides
    /// `ready` may not be changed while the queue is enabled, which is the caller's to check.
    pub fn queue_mut(&mut self, index: u32) -> Option<&mut QueueState> {
        if self.status & FEATURES_OK == 0 || self.status & (DRIVER_OK | FAILED) != 0 {
            return None;
        }
        self.queues.get_mut(usize::try_from(index).ok()?)
    }

    /// The device status register.
    pub fn status(&self) -> u8 {
        let broken = if self.signals.is_reset_needed() {
            DEVICE_NEEDS_RESET
        } else {
            0
        };
        self.status | broken
    }

    /// Writes the device status register.
    pub fn set_status(&mut self, value: u8) {
        if value == 0 {
            self.reset();
            return;
        }
        // Bits are only ever added, and each only when the ones before it are there.
        let mut status = self.status | value & (ACKNOWLEDGE | DRIVER | FAILED);
        if value & FEATURES_OK != 0 && status & DRIVER != 0 && self.features_acceptable() {
            status |= FEATURES_OK;
        }
        let starts = value & DRIVER_OK != 0
            && status & FEATURES_OK != 0
            && status & (DRIVER_OK | FAILED) == 0;
        if starts {
            status |= DRIVER_OK;
        }
        self.status = status;
        if starts {
            let queues = self.queues.iter().map(|q| q.ready.then_some(*q)).collect();
            self.start(queues);
        }
    }

    /// Reads the device's configuration space.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.device.read_config(offset, data);
    }

    /// Writes the device's configuration space.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        if self.status & DRIVER != 0 {
            self.device.write_config(offset, data);
        }
    }

    /// Stops the device in the middle of its life; [`TransportCore::resume`] goes on from there.
    pub fn pause(&mut self) -> RunningQueues {
        RunningQueues(self.device.stop())
    }

    /// Lets a paused device go on.
    pub fn resume(&mut self, queues: RunningQueues) {
        if self.status & DRIVER_OK == 0 || self.signals.is_reset_needed() {
            self.signals.repeat();
            return;
        }
        self.start(queues.0);
        // Notifications and interrupts that fell between may be lost; one too many is harmless.
        for kick in &self.kicks {
            let _ = kick.write(1);
        }
        self.signals.used_buffers();
    }

    pub(super) fn offered(&self) -> u64 {
        self.device.features() | feature::COMMON
    }

    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.offered() == 0
            && self.driver_features & feature::VERSION_1 != 0
    }

    fn start(&mut self, queues: Vec<Option<QueueState>>) {
        if let Err(error) = self.try_start(queues) {
            let kind = self.device.device_type();
            self.signals.warn(format_args!(
                "virtio device of type {kind} cannot start: {error}"
            ));
            self.signals.needs_reset();
        }
    }

    fn try_start(&mut self, queues: Vec<Option<QueueState>>) -> Result<(), StartError> {
        let features = self.driver_features;
        let queues = queues
            .into_iter()
            .zip(&self.kicks)
            .map(|(state, kick)| {
                let Some(state) = state else { return Ok(None) };
                let queue = Queue::new(state, self.memory.clone(), features)?;
                Ok(Some(StartedQueue {
                    queue,
                    kick: kick.clone(),
                }))
            })
            .collect::<Result<_, StartError>>()?;
        let (memory, signals) = (self.memory.clone(), self.signals.clone());
        self.device.start(StartContext {
            memory,
            features,
            queues,
            signals,
        })
    }

    fn reset(&mut self) {
        self.device.stop();
        self.device.reset();
        self.status = 0;
        self.driver_features = 0;
        for queue in &mut self.queues {
            *queue = QueueState::new(queue.max_size);
        }
        for kick in &self.kicks {
            // Drains what was notified before; nothing pending is an error that says so.
            let _ = kick.read();
        }
        self.signals.clear();
    }
}

fn half_of(value: u64, half: u32) -> u32 {
    let [low, high] = [value & 0xffff_ffff, value >> 32];
    u32::try_from(match half {
        0 => low,
        1 => high,
        _ => 0,
    })
    .unwrap_or(0)
}
