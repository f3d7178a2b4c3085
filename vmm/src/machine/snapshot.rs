// SPDX-License-Identifier: Apache-2.0
//! Snapshots as the owner of a machine makes them.

use std::time::{Duration, Instant};

use brume_api::{CreateSnapshot, Fault, MachineEvent, SnapshotType};

use super::Machine;
use crate::dirty::Reader;
use crate::lifecycle::VmState;
use crate::page_set::PageSet;
use crate::snapshot::{CreateError, Paused, Writer, pages_in_use};

impl Machine {
    /// Writes the paused machine to files.
    pub(super) fn create_snapshot(&mut self, request: &CreateSnapshot) -> Result<(), Fault> {
        let begun = Instant::now();
        self.try_create(request)
            .map_err(|error| create_fault(&error))?;
        self.snapshot_is_made(request, begun.elapsed());
        Ok(())
    }

    /// Tells of a snapshot that took so long.
    pub(super) fn snapshot_is_made(&mut self, request: &CreateSnapshot, time: Duration) {
        let times = &mut self.telemetry.times;
        times.took_snapshot(request.snapshot_type, time);
        self.tell(MachineEvent::SnapshotCreated {
            snapshot_path: request.snapshot_path.clone(),
            mem_file_path: request.mem_file_path.clone(),
            snapshot_type: request.snapshot_type,
        });
    }

    fn try_create(&mut self, request: &CreateSnapshot) -> Result<(), CreateError> {
        if self.saving {
            return Err(CreateError::Busy);
        }
        if self.state != VmState::Paused {
            return Err(CreateError::Running);
        }
        let writer = Writer::new(request, &self.memory)?;
        writer.mark(&self.memory)?;
        // Without a file for the memory, what was written is still to be saved.
        let journal = match &request.mem_file_path {
            Some(_) => self.tracker().take(Reader::Snapshot)?,
            None => None,
        };
        let written = self.write_paused(request, writer, journal.as_ref());
        if let (Err(_), Some(journal)) = (&written, &journal) {
            // The next diff is since the last snapshot, and this was none.
            self.tracker().put_back(Reader::Snapshot, journal);
        }
        written
    }

    fn write_paused(
        &self,
        request: &CreateSnapshot,
        mut writer: Writer,
        journal: Option<&PageSet>,
    ) -> Result<(), CreateError> {
        match journal.filter(|_| request.snapshot_type == SnapshotType::Diff) {
            Some(journal) => writer.write(&self.memory, journal)?,
            None => {
                let pages = pages_in_use(&self.memory, request.snapshot_type)?;
                writer.write(&self.memory, &pages)?
            }
        };
        let state = writer.state_of(&self.paused_view())?;
        writer.commit(&state)
    }

    /// The machine as a state is taken from it.
    pub(super) fn paused_view(&self) -> Paused<'_> {
        Paused {
            config: &self.description.config,
            memory: &self.memory,
            vm: &self.vm,
            vcpus: &self.vcpus,
            transports: &self.transports,
            queues: &self.paused,
            chipset: &self.chipset,
        }
    }
}

pub(super) fn create_fault(error: &CreateError) -> Fault {
    let fault = Fault::from_error(error);
    Fault::new(format!("Create snapshot error: {}", fault.message))
}
