// SPDX-License-Identifier: Apache-2.0
//! The locks of the disks of a machine that moves: the target has to have them before it runs the
//! guest, and the source has them again if it keeps the guest.
//!
//! A target that was lost, or has not heard yet that the guest stays, still has them. So the source
//! tries again and again, beside the guest, which goes on meanwhile.

use std::time::Duration;

use brume_api::with_causes;
use brume_virtio::block::BlockError;

use super::Machine;
use crate::event::Event;

/// How long to wait between two tries.
const RETRY: Duration = Duration::from_millis(100);

/// What the machine has to do with its locks.
#[derive(Default)]
pub(super) struct Locks {
    /// Whether some are to be taken that could not be.
    missing: bool,
    /// Whether an event for the next try is on its way.
    due: bool,
}

impl Machine {
    /// Lets the target take the locks of the disks.
    pub(super) fn release_locks(&mut self) -> Result<(), String> {
        self.locks.missing = false;
        let mut drives = self.controls.drives.iter();
        let released = drives.try_for_each(|(_, drive)| drive.release_lock());
        released.map_err(|error| with_causes(&error))
    }

    /// Takes the locks of the disks back, now or later: the guest had the disks before, and stopping
    /// it would help nobody.
    pub(super) fn take_locks(&mut self) {
        match self.try_locks() {
            Ok(()) if self.locks.missing => {
                self.locks.missing = false;
                tracing::info!("the disks are locked again");
            }
            Ok(()) => {}
            Err((id, error)) => {
                if !self.locks.missing {
                    tracing::error!(
                        "drive \"{id}\" is not locked, while the guest goes on with it; it is tried \
                         again until it is: {}",
                        with_causes(&error)
                    );
                }
                self.locks.missing = true;
                if !self.locks.due {
                    self.locks.due = true;
                    self.sender.remind_after(RETRY, Event::LocksDue);
                }
            }
        }
    }

    /// It is time to try again.
    pub(super) fn locks_due(&mut self) {
        self.locks.due = false;
        if self.locks.missing {
            self.take_locks();
        }
    }

    /// Takes all that can be taken; the first drive whose lock cannot.
    fn try_locks(&self) -> Result<(), (String, BlockError)> {
        let mut result = Ok(());
        for (id, drive) in &self.controls.drives {
            if let Err(error) = drive.take_lock() {
                result = result.and(Err((id.clone(), error)));
            }
        }
        result
    }
}
