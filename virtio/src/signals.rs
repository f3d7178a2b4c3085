// SPDX-License-Identifier: Apache-2.0
//! What a device tells its driver out of turn: used buffers, a changed configuration, a failure.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use brume_devices::Interrupt;

use crate::log_limit::LogLimit;

/// Interrupt status bit: a queue has used buffers (virtio 1.3, section 4.2.2).
const USED_BUFFER: u32 = 1;
/// Interrupt status bit: the configuration space has changed.
const CONFIG_CHANGE: u32 = 2;
/// All bits that the interrupt status can have.
pub(crate) const INTERRUPT_BITS: u32 = USED_BUFFER | CONFIG_CHANGE;

#[derive(Debug, Default)]
struct Shared {
    interrupt_status: AtomicU32,
    config_generation: AtomicU32,
    needs_reset: AtomicBool,
    log: Mutex<LogLimit>,
}

/// The line from a device's worker to its transport. Clones are the same line.
#[derive(Clone, Debug)]
pub struct DeviceSignals {
    shared: Arc<Shared>,
    line: Interrupt,
    /// Raised when the device cannot go on.
    failure: Option<Interrupt>,
}

impl DeviceSignals {
    /// Signals that end in `line`.
    pub fn new(line: Interrupt) -> Self {
        Self {
            shared: Arc::default(),
            line,
            failure: None,
        }
    }

    /// The same signals, with `failure` raised each time that the device cannot go on.
    #[must_use]
    pub fn with_failure(self, failure: Interrupt) -> Self {
        Self {
            failure: Some(failure),
            ..self
        }
    }

    /// Tells the driver that buffers were used.
    pub fn used_buffers(&self) {
        self.shared
            .interrupt_status
            .fetch_or(USED_BUFFER, Ordering::SeqCst);
        self.line.raise();
    }

    /// Tells the driver that the configuration space has changed.
    pub fn config_changed(&self) {
        self.shared.config_generation.fetch_add(1, Ordering::SeqCst);
        self.shared
            .interrupt_status
            .fetch_or(CONFIG_CHANGE, Ordering::SeqCst);
        self.line.raise();
    }

    /// Puts the device into DEVICE_NEEDS_RESET and tells the driver (section 2.1.2).
    pub fn needs_reset(&self) {
        self.shared.needs_reset.store(true, Ordering::SeqCst);
        if let Some(failure) = &self.failure {
            failure.raise();
        }
        self.config_changed();
    }

    /// Whether [`DeviceSignals::needs_reset`] was called since the last [`DeviceSignals::clear`].
    pub fn is_reset_needed(&self) -> bool {
        self.shared.needs_reset.load(Ordering::SeqCst)
    }

    /// Logs a warning about what the guest does, but not each time it does it.
    pub(crate) fn warn(&self, message: fmt::Arguments<'_>) {
        let mut log = self
            .shared
            .log
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match log.admit(Instant::now()) {
            None => {}
            Some(0) => tracing::warn!("{message}"),
            Some(held_back) => tracing::warn!("{message} (and {held_back} more like it)"),
        }
    }

    /// The interrupt status register.
    pub fn interrupt_status(&self) -> u32 {
        self.shared.interrupt_status.load(Ordering::SeqCst)
    }

    /// Clears the interrupt status bits that are set in `bits`.
    pub fn acknowledge(&self, bits: u32) {
        self.shared
            .interrupt_status
            .fetch_and(!bits, Ordering::SeqCst);
    }

    /// Counts the changes of the configuration space.
    pub fn config_generation(&self) -> u32 {
        self.shared.config_generation.load(Ordering::SeqCst)
    }

    /// Raises the line again if the driver has not acknowledged all that it was told.
    pub(crate) fn repeat(&self) {
        if self.interrupt_status() != 0 {
            self.line.raise();
        }
    }

    /// Takes on what was read from other signals. The line is not raised.
    pub(crate) fn restore(&self, interrupt_status: u32, config_generation: u32, needs_reset: bool) {
        let Shared {
            interrupt_status: status,
            config_generation: generation,
            needs_reset: broken,
            ..
        } = &*self.shared;
        status.store(interrupt_status, Ordering::SeqCst);
        generation.store(config_generation, Ordering::SeqCst);
        broken.store(needs_reset, Ordering::SeqCst);
    }

    /// Back to the state of a device that was just reset.
    pub fn clear(&self) {
        self.shared.needs_reset.store(false, Ordering::SeqCst);
        self.shared.interrupt_status.store(0, Ordering::SeqCst);
    }
}
