// SPDX-License-Identifier: Apache-2.0
//! From a machine to its files.
//!
//! Everything goes to temporary files beside the ones that were asked for, which take their names
//! when all is written and on the disk. So whatever happens, the old snapshot is there or the new.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use brume_api::config::VmConfig;
use brume_api::{CreateSnapshot, SnapshotType};
use brume_snapshot::memory_file::clone_file;
use brume_snapshot::{NewFile, NewFileError, StateWriter, commit_pair};

use super::error::CreateError;
use super::machine_state::Paused;
use super::mark::Mark;
use super::memory_file::{self, Zeros};
use super::sections::{MachineSection, MemorySection, Witness};
use crate::memory::{Backing, MachineMemory};
use crate::page_set::PageSet;

/// Pages among which a diff looks for one that it does not have: the first 4 MiB.
const WITNESS_PAGES: Range<u64> = 0..1024;

/// The files of a snapshot that is being written.
pub(crate) struct Writer {
    state: NewFile,
    memory: Option<MemoryOut>,
    kind: SnapshotType,
    mark: Mark,
    /// What the memory file has got so far.
    written: PageSet,
}

struct MemoryOut {
    file: NewFile,
    path: PathBuf,
    /// What the file has where nothing was written to it.
    zeros: Zeros,
}

impl MemoryOut {
    fn create(
        request: &CreateSnapshot,
        memory: &MachineMemory,
    ) -> Result<Option<Self>, CreateError> {
        let Some(path) = request.mem_file_path.clone() else {
            return Ok(None);
        };
        let file = NewFile::create(&path)?;
        let fail = |source| CreateError::Memory {
            path: path.clone(),
            source,
        };
        file.file().set_len(memory.size).map_err(fail)?;
        let base = match (request.snapshot_type, &memory.backing) {
            (SnapshotType::Full, Backing::File(file)) => Some(file.try_clone().map_err(fail)?),
            (SnapshotType::Full, _) => None,
            // As at Firecracker, a diff goes into a file of the right size that is there already.
            (SnapshotType::Diff, _) => match File::open(&path) {
                Ok(file) => Some(file).filter(|file| {
                    let found = file.metadata();
                    found.is_ok_and(|found| found.len() == memory.size)
                }),
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(fail(error)),
            },
        };
        if let Some(base) = &base {
            clone_file(base, file.file(), memory.size).map_err(fail)?;
        }
        let empty = base.is_none() && request.snapshot_type == SnapshotType::Full;
        let zeros = if empty {
            Zeros::Skipped
        } else {
            Zeros::Written
        };
        Ok(Some(Self { file, path, zeros }))
    }
}

impl Writer {
    /// Makes the files. What a memory file is to have besides the pages that are written is in it
    /// then: for a full snapshot of a machine whose memory came from a file, that file.
    ///
    /// # Errors
    ///
    /// A file cannot be made.
    pub(crate) fn new(
        request: &CreateSnapshot,
        memory: &MachineMemory,
    ) -> Result<Self, CreateError> {
        let state = NewFile::create_keeping(&request.snapshot_path)?;
        let out = MemoryOut::create(request, memory)?;
        if let Some(out) = &out
            && out.file.target() == state.target()
        {
            return Err(NewFileError::SameTarget(state.target().into()).into());
        }
        Ok(Self {
            state,
            memory: out,
            kind: request.snapshot_type,
            written: PageSet::empty(memory.size),
            mark: Mark::new().map_err(|error| CreateError::Mark(Box::new(error)))?,
        })
    }

    /// Writes `pages`; how many bytes that were.
    ///
    /// # Errors
    ///
    /// The file does not take them, or nobody brings them.
    pub(crate) fn write(
        &mut self,
        memory: &MachineMemory,
        pages: &PageSet,
    ) -> Result<u64, CreateError> {
        let Some(out) = &self.memory else {
            return Ok(0);
        };
        memory.fetch(pages)?;
        self.written.insert_all(pages);
        memory_file::write(memory, pages, out.file.file(), out.zeros).map_err(|source| {
            CreateError::Memory {
                path: out.path.clone(),
                source,
            }
        })
    }

    /// From now on a page that has become zeros has to be written, because the file may have
    /// another content of it.
    pub(crate) fn overwrite(&mut self) {
        if let Some(out) = &mut self.memory {
            out.zeros = Zeros::Written;
        }
    }

    /// Gets what was written onto the disk, so that there is little left to do for it later.
    ///
    /// # Errors
    ///
    /// The disk does not take it.
    pub(crate) fn sync(&self) -> Result<(), CreateError> {
        let Some(out) = &self.memory else {
            return Ok(());
        };
        let synced = out.file.file().sync_data();
        synced.map_err(|source| CreateError::Memory {
            path: out.path.clone(),
            source,
        })
    }

    /// Marks the memory. To be called with the vCPUs held, before the last pages are written.
    ///
    /// # Errors
    ///
    /// The guest has less memory than any, or nobody brings the page.
    pub(crate) fn mark(&self, memory: &MachineMemory) -> Result<(), CreateError> {
        memory.fetch(&Mark::page(memory.size))?;
        self.mark
            .write(&memory.guest)
            .map_err(|error| CreateError::Mark(Box::new(error)))
    }

    /// Takes the state of the machine.
    ///
    /// # Errors
    ///
    /// KVM does not show it.
    pub(crate) fn state_of(&self, machine: &Paused<'_>) -> Result<Vec<u8>, CreateError> {
        let mut state = StateWriter::new();
        state.push(0, &machine_section(machine.config))?;
        state.push(
            0,
            &MemorySection {
                size: machine.memory.size,
                mark: self.mark.clone(),
                witness: self.witness(machine.memory),
            },
        )?;
        machine.write(&mut state)?;
        Ok(state.finish())
    }

    /// Something that the memory has and the pages that were written have not, by which a diff is
    /// known that was not merged into its base. Only the first pages are looked at, where the
    /// firmware's tables are: they hardly change.
    fn witness(&self, memory: &MachineMemory) -> Option<Witness> {
        let look = self.kind == SnapshotType::Diff && memory.handler.is_none();
        let pages = if look { WITNESS_PAGES } else { 0..0 };
        let pages = pages.filter(|&page| !self.written.contains(page));
        pages.into_iter().find_map(|page| Witness::on(memory, page))
    }

    /// Writes the state, gets everything onto the disk and gives the files their names.
    ///
    /// # Errors
    ///
    /// A file is not written; what was there before is there still.
    pub(crate) fn commit(self, state: &[u8]) -> Result<(), CreateError> {
        let mut file = self.state.file();
        file.write_all(state)
            .map_err(|source| CreateError::WriteState {
                path: self.state.target().into(),
                source,
            })?;
        match self.memory {
            Some(memory) => commit_pair(memory.file, self.state)?,
            None => self.state.commit()?,
        }
        Ok(())
    }
}

/// The pages that a memory file of `kind` needs, if nobody has kept a journal.
///
/// # Errors
///
/// The host does not tell which are in use.
pub(crate) fn pages_in_use(
    memory: &MachineMemory,
    kind: SnapshotType,
) -> Result<PageSet, CreateError> {
    if matches!(memory.backing, Backing::Uffd) && kind == SnapshotType::Full {
        // What was not touched yet is not known here, and comes when it is read.
        return Ok(PageSet::full(memory.size));
    }
    memory.written_pages().map_err(CreateError::Pagemap)
}

fn machine_section(config: &VmConfig) -> MachineSection {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    MachineSection {
        brume: env!("CARGO_PKG_VERSION").into(),
        written_unix_ms: now
            .ok()
            .and_then(|now| u64::try_from(now.as_millis()).ok())
            .unwrap_or(0),
        config: VmConfig {
            logger: None,
            metrics: None,
            ..config.clone()
        },
    }
}
