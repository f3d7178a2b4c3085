// SPDX-License-Identifier: Apache-2.0
//! What can be changed on a block device while it is used.
//!
//! The image is exchanged by the worker, between two looks at the queue and with nothing in
//! flight, so whoever asks for it waits for neither the guest nor the old disk.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::counters::{BlockCounters, BlockCounts};
use super::disk::{BlockError, Disk};
use super::log::BlockLog;
use crate::limiter::{Limiter, LimiterUpdate};
use crate::signals::DeviceSignals;

/// What the device, its worker and its controls have in common.
#[derive(Debug)]
pub(super) struct Shared {
    disk: Mutex<Arc<Disk>>,
    /// Whether the disk is locked, and one that it is exchanged for has to be.
    locked: Mutex<bool>,
    /// Counts the exchanges of `disk`.
    generation: AtomicU64,
    failed_updates: AtomicU64,
    /// Written when there is another disk.
    pub(super) exchanged: EventFd,
    pub(super) limiter: Limiter,
    pub(super) counters: BlockCounters,
    pub(super) log: BlockLog,
    /// The way to the driver, since there is one.
    signals: Mutex<Option<DeviceSignals>>,
}

impl Shared {
    pub(super) fn new(disk: Disk, locked: bool, limits: LimiterUpdate) -> io::Result<Self> {
        Ok(Self {
            log: BlockLog::new(disk.bytes()),
            disk: Mutex::new(Arc::new(disk)),
            locked: Mutex::new(locked),
            generation: AtomicU64::new(0),
            failed_updates: AtomicU64::new(0),
            exchanged: EventFd::new(EFD_NONBLOCK)?,
            limiter: Limiter::new(limits)?,
            counters: BlockCounters::default(),
            signals: Mutex::new(None),
        })
    }

    pub(super) fn disk(&self) -> Arc<Disk> {
        lock(&self.disk).clone()
    }

    /// Grows with each exchange of the disk.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn connect(&self, signals: DeviceSignals) {
        *lock(&self.signals) = Some(signals);
    }

    fn exchange(&self, disk: Disk) {
        self.log.all_changed(disk.bytes());
        *lock(&self.disk) = Arc::new(disk);
        // Before the driver hears of it: what it asks for then is for the new disk.
        self.generation.fetch_add(1, Ordering::Release);
        // A counter at its end means that the worker is about to wake up.
        let _ = self.exchanged.write(1);
        if let Some(signals) = &*lock(&self.signals) {
            signals.config_changed();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Changes a block device that is in use. Clones are for the same device.
#[derive(Clone, Debug)]
pub struct BlockControl {
    pub(super) shared: Arc<Shared>,
    pub(super) read_only: bool,
    /// Whether the image is ever to be locked.
    pub(super) locks: bool,
}

impl BlockControl {
    /// Gives the device the image at `path`, which may be the one that it has, with another size.
    /// The driver is told of the change. What is in flight ends on the old image.
    ///
    /// # Errors
    ///
    /// The image cannot be used; the device keeps the one that it has.
    pub fn set_image(&self, path: &Path) -> Result<(), BlockError> {
        let locked = lock(&self.shared.locked);
        let old = self.shared.disk();
        let opened = match old.reopened(path) {
            Some(same) => same,
            None => Disk::open(path, self.read_only, *locked),
        };
        let disk = opened.inspect_err(|_| {
            self.shared.failed_updates.fetch_add(1, Ordering::Relaxed);
        })?;
        self.shared.exchange(disk);
        Ok(())
    }

    /// Gives the image's lock up, for another process that goes on with the machine. The device must
    /// not run until [`Self::take_lock`] has succeeded.
    ///
    /// # Errors
    ///
    /// The host refuses it.
    pub fn release_lock(&self) -> Result<(), BlockError> {
        let mut locked = lock(&self.shared.locked);
        if *locked {
            self.shared.disk().unlock()?;
            *locked = false;
        }
        Ok(())
    }

    /// Takes the image's lock, unless the device has it or was made to do without. The lock of a
    /// process that has ended is free only some time after that; it is worth to try again.
    ///
    /// # Errors
    ///
    /// Another machine has it, or the host refuses it.
    pub fn take_lock(&self) -> Result<(), BlockError> {
        let mut locked = lock(&self.shared.locked);
        if self.locks && !*locked {
            self.shared.disk().lock()?;
            *locked = true;
        }
        Ok(())
    }

    /// Makes what the guest has written durable, so that another host that shares the image reads
    /// it. The device is stopped meanwhile, or what it writes may be left out.
    ///
    /// # Errors
    ///
    /// The host cannot write it.
    pub fn flush(&self) -> Result<(), BlockError> {
        self.shared.disk().flush()
    }

    /// Lets this host forget what it has read of the image, because another one has written to it
    /// since.
    ///
    /// # Errors
    ///
    /// The host refuses it.
    pub fn drop_cache(&self) -> Result<(), BlockError> {
        self.shared.disk().drop_cache()
    }

    /// What tells which blocks the guest writes.
    pub fn log(&self) -> &BlockLog {
        &self.shared.log
    }

    /// Changes the limits on its traffic.
    pub fn limit(&self, update: LimiterUpdate) {
        self.shared.limiter.update(update);
    }

    /// What it has counted so far.
    pub fn counts(&self) -> BlockCounts {
        BlockCounts {
            throttled: self.shared.limiter.throttled(),
            updates: self.shared.generation(),
            update_fails: self.shared.failed_updates.load(Ordering::Relaxed),
            ..self.shared.counters.get()
        }
    }
}
