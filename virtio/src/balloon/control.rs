// SPDX-License-Identifier: Apache-2.0
//! What the machine's owner can ask a balloon for at any time, and what device, worker and owner
//! share for that.
//!
//! Plain values are atomics, so that the driver's accesses to the configuration space wait for
//! nobody. Locks are held for a few instructions, but for the one around hinting, which is held
//! while a bounded piece of hinted memory is given back: see [`Shared::while_hinting`]. No two
//! locks are held at a time.

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::counters::{BalloonCounters, BalloonCounts};
use super::state::BalloonState;
use super::statistics::Statistics;
use super::{BalloonConfig, PAGES_PER_MIB};
use crate::device::StateError;
use crate::signals::DeviceSignals;

/// Hint command: none has been started, or the driver is through (section 5.5.6.6).
const HINT_STOP: u32 = 0;
/// Hint command: the driver may use what it has hinted.
const HINT_DONE: u32 = 1;

/// Why a balloon does not do what it is asked for.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BalloonError {
    /// No driver has set the device up.
    #[error("Device not activated yet.")]
    NotActive,
    /// The device was made without hinting.
    #[error("Attempting to use hinting when not enabled")]
    NoHinting,
    /// The device was made without statistics.
    #[error("Received stats query when stats are disabled.")]
    NoStatistics,
    /// Statistics are there from the start or never.
    #[error("Statistics cannot be enabled/disabled after activation.")]
    StatisticsSwitch,
    /// A target above the size of the guest's memory; the value in MiB.
    #[error("Requested memory should be less than {0}MiB")]
    TooLarge(u32),
}

/// How far hinting is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HintingStatus {
    /// The command that the driver was given last: 0 none yet, 1 done, others a run.
    pub host_cmd: u32,
    /// The command that the driver has confirmed last: 0 is the end of a run.
    pub guest_cmd: Option<u32>,
}

#[derive(Debug, Default)]
struct Hinting {
    status: HintingStatus,
    last_run: u32,
    acknowledge: bool,
}

#[derive(Clone, Debug)]
struct Active {
    signals: DeviceSignals,
    memory_mib: u64,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) config: BalloonConfig,
    /// Configuration space `num_pages`, of 4 KiB.
    target: AtomicU32,
    /// Configuration space `actual`, in pages of 4 KiB, as the driver writes it.
    actual: AtomicU32,
    /// Configuration space `free_page_hint_cmd_id`; written under the lock of `hinting` only.
    hint_cmd: AtomicU32,
    hinting: Mutex<Hinting>,
    statistics: Mutex<Statistics>,
    /// In seconds.
    interval: AtomicU16,
    /// New statistics are wanted now, and the interval may have changed.
    refresh: AtomicBool,
    /// Wakes the worker for that.
    pub(super) wake: EventFd,
    active: Mutex<Option<Active>>,
    pub(super) counters: BalloonCounters,
}

impl Shared {
    pub(super) fn new(config: BalloonConfig) -> Result<Self, super::BalloonNewError> {
        let target = pages(config.amount_mib).ok_or(super::BalloonNewError::Amount)?;
        Ok(Self {
            target: AtomicU32::new(target),
            actual: AtomicU32::default(),
            hint_cmd: AtomicU32::new(HINT_STOP),
            hinting: Mutex::default(),
            statistics: Mutex::default(),
            interval: AtomicU16::new(config.statistics_interval_s),
            refresh: AtomicBool::default(),
            wake: EventFd::new(EFD_NONBLOCK)?,
            active: Mutex::default(),
            counters: BalloonCounters::default(),
            config,
        })
    }

    /// `struct virtio_balloon_config` (section 5.5.4), without the poison value, which goes with a
    /// feature that is not offered.
    pub(super) fn config_space(&self) -> [u8; 12] {
        let [target, actual, cmd] = [&self.target, &self.actual, &self.hint_cmd]
            .map(|field| field.load(Ordering::SeqCst).to_le_bytes());
        let mut space = [0; 12];
        for (to, from) in space.iter_mut().zip([target, actual, cmd].as_flattened()) {
            *to = *from;
        }
        space
    }

    /// Takes a write of the driver; `actual` is all that it may write.
    pub(super) fn write_config(&self, offset: u64, data: &[u8]) {
        let mut bytes = self.actual.load(Ordering::SeqCst).to_le_bytes();
        for (at, byte) in (offset..=u64::MAX).zip(data) {
            let slot = at.checked_sub(4).and_then(|at| usize::try_from(at).ok());
            if let Some(slot) = slot.and_then(|at| bytes.get_mut(at)) {
                *slot = *byte;
            }
        }
        self.actual
            .store(u32::from_le_bytes(bytes), Ordering::SeqCst);
    }

    /// A driver has set the device up.
    pub(super) fn activate(&self, signals: DeviceSignals, memory_bytes: u64) {
        let memory_mib = memory_bytes >> 20;
        *lock(&self.active) = Some(Active {
            signals,
            memory_mib,
        });
    }

    /// The driver is gone, and so is what it has told and was asked.
    pub(super) fn reset(&self) {
        *lock(&self.active) = None;
        *lock(&self.statistics) = Statistics::default();
        self.actual.store(0, Ordering::SeqCst);
        let mut hinting = lock(&self.hinting);
        *hinting = Hinting::default();
        self.hint_cmd.store(HINT_STOP, Ordering::SeqCst);
    }

    pub(super) fn save(&self) -> BalloonState {
        let (status, last_hint_run) = {
            let hinting = lock(&self.hinting);
            (hinting.status, hinting.last_run)
        };
        BalloonState {
            target_pages: self.target.load(Ordering::SeqCst),
            actual_pages: self.actual.load(Ordering::SeqCst),
            statistics_interval_s: self.interval(),
            refresh: self.refresh.load(Ordering::SeqCst),
            statistics: lock(&self.statistics).values,
            hint_cmd: status.host_cmd,
            confirmed_hint_cmd: status.guest_cmd,
            last_hint_run,
        }
    }

    /// Takes on a state. A run of hints that was under way is over, which the driver is told.
    pub(super) fn restore(
        &self,
        state: &BalloonState,
        signals: &DeviceSignals,
    ) -> Result<(), StateError> {
        let interval = state.statistics_interval_s;
        if (interval == 0) != (self.config.statistics_interval_s == 0) {
            let what = "a balloon has statistics from its start or never";
            return Err(StateError::Value(what));
        }
        if !self.config.free_page_hinting && state.hint_cmd != HINT_STOP {
            return Err(StateError::Value("hints of a balloon without hinting"));
        }
        self.target.store(state.target_pages, Ordering::SeqCst);
        self.actual.store(state.actual_pages, Ordering::SeqCst);
        self.interval.store(interval, Ordering::SeqCst);
        self.refresh.store(state.refresh, Ordering::SeqCst);
        lock(&self.statistics).values = state.statistics;
        let interrupted = is_run(state.hint_cmd);
        let host_cmd = if interrupted {
            HINT_DONE
        } else {
            state.hint_cmd
        };
        let mut hinting = lock(&self.hinting);
        *hinting = Hinting {
            status: HintingStatus {
                host_cmd,
                guest_cmd: state.confirmed_hint_cmd,
            },
            last_run: state.last_hint_run,
            acknowledge: false,
        };
        self.hint_cmd.store(host_cmd, Ordering::SeqCst);
        drop(hinting);
        if interrupted {
            signals.config_changed();
        }
        Ok(())
    }

    pub(super) fn update_statistics(&self, buffer: &[u8]) {
        lock(&self.statistics).update(buffer);
    }

    pub(super) fn interval(&self) -> u16 {
        self.interval.load(Ordering::SeqCst)
    }

    /// Whether new statistics were asked for since the last call.
    pub(super) fn take_refresh(&self) -> bool {
        // A look costs less than a write, and there are many looks.
        self.refresh.load(Ordering::SeqCst) && self.refresh.swap(false, Ordering::SeqCst)
    }

    /// Calls `give_back` if what the driver hints now may be given back.
    ///
    /// The driver uses its pages again once it reads that a run is over, so the end of a run has
    /// to wait for what is being given back, or the guest would lose what it writes then. What
    /// `give_back` does has to be short for that.
    pub(super) fn while_hinting<T>(&self, give_back: impl FnOnce() -> T) -> Option<T> {
        let hinting = lock(&self.hinting);
        let HintingStatus {
            host_cmd,
            guest_cmd,
        } = hinting.status;
        (is_run(host_cmd) && guest_cmd == Some(host_cmd)).then(give_back)
    }

    /// Takes a command that the driver confirms. At the end of the run that is wanted it is told
    /// that it may go on, if that was asked for.
    pub(super) fn confirm_hint(&self, command: u32, signals: &DeviceSignals) {
        let mut hinting = lock(&self.hinting);
        let before = hinting.status.guest_cmd.replace(command);
        // A driver that ends an old run is not through with one that was started meanwhile.
        let ended = !is_run(command) && before == Some(hinting.status.host_cmd);
        if ended && is_run(hinting.status.host_cmd) && hinting.acknowledge {
            hinting.status.host_cmd = HINT_DONE;
            self.hint_cmd.store(HINT_DONE, Ordering::SeqCst);
            drop(hinting);
            signals.config_changed();
        }
    }

    /// As if that many runs had been.
    #[cfg(test)]
    pub(super) fn set_last_run(&self, run: u32) {
        lock(&self.hinting).last_run = run;
    }

    fn active(&self) -> Result<Active, BalloonError> {
        lock(&self.active).clone().ok_or(BalloonError::NotActive)
    }
}

/// A handle on a balloon, for its machine's owner. Clones are the same balloon.
#[derive(Clone, Debug)]
pub struct BalloonControl(pub(super) Arc<Shared>);

impl BalloonControl {
    /// The size that the balloon is to have, in MiB.
    pub fn target_mib(&self) -> u32 {
        self.target_pages() / PAGES_PER_MIB
    }

    /// The size that the balloon is to have, in pages of 4 KiB.
    pub fn target_pages(&self) -> u32 {
        self.0.target.load(Ordering::SeqCst)
    }

    /// The size that the balloon has, in pages of 4 KiB, as the guest says.
    pub fn actual_pages(&self) -> u32 {
        self.0.actual.load(Ordering::SeqCst)
    }

    /// Tells the guest what size the balloon is to have, in MiB.
    ///
    /// # Errors
    ///
    /// There is no driver, or less memory than that.
    pub fn set_target(&self, amount_mib: u32) -> Result<(), BalloonError> {
        let Active {
            signals,
            memory_mib,
        } = self.0.active()?;
        let target = pages(amount_mib).filter(|_| u64::from(amount_mib) <= memory_mib);
        let target = target.ok_or(BalloonError::TooLarge(amount_mib))?;
        self.0.target.store(target, Ordering::SeqCst);
        signals.config_changed();
        Ok(())
    }

    /// How often the guest is asked for its statistics, in seconds; zero is never.
    pub fn statistics_interval_s(&self) -> u16 {
        self.0.interval()
    }

    /// Changes how often the guest is asked for its statistics, and asks at once.
    ///
    /// # Errors
    ///
    /// It would switch statistics on or off, which goes before the start only.
    pub fn set_statistics_interval_s(&self, interval_s: u16) -> Result<(), BalloonError> {
        let now = self.0.interval();
        if now == interval_s {
            return Ok(());
        }
        if now == 0 || interval_s == 0 {
            return Err(BalloonError::StatisticsSwitch);
        }
        self.0.interval.store(interval_s, Ordering::SeqCst);
        self.0.refresh.store(true, Ordering::SeqCst);
        // A counter at its end means that the worker is being woken already.
        let _ = self.0.wake.write(1);
        Ok(())
    }

    /// What the guest has told last.
    ///
    /// # Errors
    ///
    /// The device was made without statistics.
    pub fn statistics(&self) -> Result<Statistics, BalloonError> {
        if self.0.config.statistics_interval_s == 0 {
            return Err(BalloonError::NoStatistics);
        }
        Ok(*lock(&self.0.statistics))
    }

    /// Has the guest hint all its free pages; with `acknowledge` it may use them again as soon as
    /// it is through, without [`BalloonControl::stop_hinting`].
    ///
    /// # Errors
    ///
    /// The device was made without hinting, or there is no driver.
    pub fn start_hinting(&self, acknowledge: bool) -> Result<(), BalloonError> {
        self.command_hinting(|hinting| {
            let next = hinting.last_run.wrapping_add(1);
            // Below are the commands that are no runs.
            hinting.last_run = next.max(HINT_DONE + 1);
            hinting.acknowledge = acknowledge;
            hinting.last_run
        })
    }

    /// Ends a run of hints; the guest may use all its pages again.
    ///
    /// # Errors
    ///
    /// The device was made without hinting, or there is no driver.
    pub fn stop_hinting(&self) -> Result<(), BalloonError> {
        self.command_hinting(|_| HINT_DONE)
    }

    /// How far hinting is.
    ///
    /// # Errors
    ///
    /// The device was made without hinting.
    pub fn hinting_status(&self) -> Result<HintingStatus, BalloonError> {
        self.check_hinting()?;
        Ok(lock(&self.0.hinting).status)
    }

    /// What the device has counted so far.
    pub fn counts(&self) -> BalloonCounts {
        self.0.counters.get()
    }

    fn check_hinting(&self) -> Result<(), BalloonError> {
        let enabled = self.0.config.free_page_hinting;
        enabled.then_some(()).ok_or(BalloonError::NoHinting)
    }

    /// Gives the driver the command that `choose` makes up.
    fn command_hinting(
        &self,
        choose: impl FnOnce(&mut Hinting) -> u32,
    ) -> Result<(), BalloonError> {
        self.check_hinting()?;
        let Active { signals, .. } = self.0.active()?;
        let mut hinting = lock(&self.0.hinting);
        let command = choose(&mut hinting);
        hinting.status.host_cmd = command;
        self.0.hint_cmd.store(command, Ordering::SeqCst);
        drop(hinting);
        signals.config_changed();
        Ok(())
    }
}

fn is_run(command: u32) -> bool {
    command > HINT_DONE
}

/// `None` if there are more than a balloon can have.
fn pages(mib: u32) -> Option<u32> {
    mib.checked_mul(PAGES_PER_MIB)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind these locks is whole after each statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
