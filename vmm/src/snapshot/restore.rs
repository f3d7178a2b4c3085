// SPDX-License-Identifier: Apache-2.0
//! From files to a machine. All of the state is read and checked before the first vCPU has a
//! thread; a machine that cannot be restored whole is not there at all.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use brume_api::config::{HugePages, VmConfig};
use brume_api::{BackendType, LoadSnapshot};
use brume_snapshot::memory_file::data_ranges;
use brume_snapshot::{StateError, StateFile, left_behind};
use brume_virtio::block::Locking;

use super::error::LoadError;
use super::machine_state::MachineState;
use super::prepared::{GoOn, Identity, Prepared};
use super::sections::{MachineSection, MemorySection};
use crate::build::BuildOptions;
use crate::event::EventSender;
use crate::instance::Description;
use crate::machine::MachineParts;
use crate::memory::{self, Backing, MachineMemory, Pages, uffd, working_set};
use crate::overrides::Overrides;
use crate::page_set::{PAGE_SIZE, PageSet};

impl MachineParts {
    /// Makes the machine that `request` names, paused; `description` becomes what it was made from,
    /// but for its id, its log and its metrics.
    pub(crate) fn restore(
        description: &mut Description,
        request: &LoadSnapshot,
        options: BuildOptions,
        sender: &EventSender,
    ) -> Result<Self, LoadError> {
        let (saved, memory) = Saved::with_memory(request)?;
        let working_set = request.working_set_path.as_deref();
        let working_set = working_set.map(|path| working_set::load(path, memory.size));
        let working_set = working_set.transpose()?;
        let handler = memory.handler.clone();
        let make = || {
            saved.check_memory(&memory, request)?;
            if let Some(pages) = working_set {
                working_set::prefetch(&memory, pages);
            }
            saved.assemble(memory, description, request, options, sender)
        };
        let parts = match handler {
            Some(handler) => handler.guard(make)?,
            None => make()?,
        };
        if request.prefault {
            prefault(&parts.assembly.memory)?;
        }
        Ok(parts)
    }
}

/// A state that was read, with what is to be changed of it.
struct Saved {
    /// How the machine was configured, with the overrides of the request.
    config: VmConfig,
    memory: MemorySection,
    state: MachineState,
}

impl Saved {
    /// Reads the state that `request` names, and maps the memory that was written with it.
    ///
    /// If they do not fit, the memory may have been replaced and the state not yet, by a process
    /// that was killed then or is about to do it: its state is under another name, or is in its
    /// place by now. Nothing is taken that has not the mark of the memory.
    ///
    /// # Errors
    ///
    /// As for [`Saved::read`] and [`Saved::map_memory`].
    fn with_memory(request: &LoadSnapshot) -> Result<(Self, MachineMemory), LoadError> {
        let path = &request.snapshot_path;
        if request.mem_backend.backend_type == BackendType::Uffd {
            // A look at the memory has to wait until somebody watches whoever serves it.
            let saved = Self::read(path, request)?;
            let memory = saved.map_memory(request)?;
            return Ok((saved, memory));
        }
        let pair = |state: &Path| {
            let saved = Self::read(state, request)?;
            let memory = saved.map_memory(request)?;
            saved.check_memory(&memory, request)?;
            Ok((saved, memory))
        };
        let refused = match pair(path) {
            Ok(found) => return Ok(found),
            Err(error) => error,
        };
        let others = left_behind(path);
        let mut others = others.iter().chain([path]);
        others.find_map(|state| pair(state).ok()).ok_or(refused)
    }

    /// Reads a state file for `request`.
    ///
    /// # Errors
    ///
    /// It is not whole, not for this version, or not for what the request wants to change.
    fn read(path: &Path, request: &LoadSnapshot) -> Result<Self, LoadError> {
        let saved = StateFile::read(path).and_then(Self::of);
        let saved = saved.map_err(|source| LoadError::State {
            path: path.into(),
            source,
        })?;
        saved.check()?;
        saved.with_overrides(request)
    }

    fn of(mut file: StateFile) -> Result<Self, StateError> {
        let machine: MachineSection = file.take(0)?;
        let saved = Self {
            config: machine.config,
            memory: file.take(0)?,
            state: MachineState::take(&mut file)?,
        };
        file.finish()?;
        Ok(saved)
    }

    fn check(&self) -> Result<(), LoadError> {
        let vcpus = self.config.machine_config.vcpu_count;
        if self.state.vcpus.len() != usize::from(vcpus) {
            return Err(LoadError::Contradiction(format!(
                "it has the state of {} vCPUs and is of a machine with {vcpus}",
                self.state.vcpus.len()
            )));
        }
        let size = self.config.machine_config.memory_bytes();
        if self.memory.size != size {
            return Err(LoadError::Contradiction(format!(
                "it has {} bytes of memory and is of a machine with {size}",
                self.memory.size
            )));
        }
        Ok(())
    }

    fn with_overrides(mut self, request: &LoadSnapshot) -> Result<Self, LoadError> {
        let config = &mut self.config;
        let overrides = Overrides {
            network: &request.network_overrides,
            vsock: request.vsock_override.as_ref(),
            drives: &request.drive_overrides,
        };
        if let Some(unknown) = overrides.apply(config).into_iter().next() {
            return Err(unknown.into());
        }
        let machine = &mut config.machine_config;
        machine.huge_pages = request.huge_pages.resolve(machine.huge_pages);
        machine.track_dirty_pages = request.track_dirty_pages;
        if request.mem_backend.backend_type == BackendType::Uffd {
            // Whoever serves the memory serves this process.
            machine.shared_memory = false;
        }
        Ok(self)
    }

    /// Maps the memory.
    ///
    /// # Errors
    ///
    /// It is missing, or nobody serves it.
    fn map_memory(&self, request: &LoadSnapshot) -> Result<MachineMemory, LoadError> {
        let path = &request.mem_backend.backend_path;
        let size = self.memory.size;
        let memory = match request.mem_backend.backend_type {
            BackendType::File => {
                let file = open(path)?;
                let machine = &self.config.machine_config;
                if machine.huge_pages == HugePages::None && !machine.shared_memory {
                    memory::map_file(size, file)?
                } else {
                    memory::read_file(machine, &file)?
                }
            }
            BackendType::Uffd => {
                let pages = self.config.machine_config.huge_pages;
                uffd::map_served(size, pages, path)?
            }
        };
        Ok(memory)
    }

    /// Sees to it that `memory` is the one that was written with the state.
    fn check_memory(
        &self,
        memory: &MachineMemory,
        request: &LoadSnapshot,
    ) -> Result<(), LoadError> {
        let path = || request.mem_backend.backend_path.clone();
        if !self.memory.mark.is_in(&memory.guest)? {
            return Err(LoadError::OtherMemory { path: path() });
        }
        match self.memory.witness {
            Some(witness) if !witness.is_in(memory) => Err(LoadError::Unmerged { path: path() }),
            _ => Ok(()),
        }
    }

    /// Puts a machine in that state around `memory`.
    fn assemble(
        self,
        memory: MachineMemory,
        description: &mut Description,
        request: &LoadSnapshot,
        options: BuildOptions,
        sender: &EventSender,
    ) -> Result<MachineParts, LoadError> {
        let own = &description.config;
        let config = VmConfig {
            logger: own.logger.clone(),
            metrics: own.metrics.clone(),
            serial: own.serial.clone(),
            ..self.config.clone()
        };
        description.config = config;
        let prepared = Prepared::new(description, memory, options, sender, Locking::Now)?;
        let go_on = GoOn {
            clock_realtime: request.clock_realtime,
            // From here on this is another machine than the one that was saved.
            identity: Identity::Renewed,
            resume: request.resume_vm,
        };
        prepared.load(self.state, &go_on)
    }
}

/// Reads all of the memory in, but what a file has no data for: there is nothing to wait for.
fn prefault(memory: &MachineMemory) -> Result<(), LoadError> {
    match &memory.backing {
        Backing::Uffd => Ok(memory.fetch(&PageSet::full(memory.size))?),
        Backing::File(file) => {
            let mut data = PageSet::empty(memory.size);
            let ranges = data_ranges(file, memory.size).map_err(LoadError::Prefault)?;
            for Range { start, end } in ranges {
                data.insert_range(start / PAGE_SIZE..end.div_ceil(PAGE_SIZE));
            }
            let pages = Pages::of(memory);
            pages.read_in(&data, || true).map_err(LoadError::Prefault)
        }
        // It has been read.
        Backing::Zeros | Backing::Shared(_) => Ok(()),
    }
}

/// Opens a memory file, and nothing that is not one.
fn open(path: &Path) -> Result<File, LoadError> {
    let open = || {
        if !path.metadata()?.is_file() {
            return Err(std::io::Error::new(
                std::io::ErrorKind::InvalidInput,
                "it is not a regular file",
            ));
        }
        File::open(path)
    };
    open().map_err(|source| LoadError::OpenMemory {
        path: path.into(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use brume_snapshot::{Saved as Section, StateWriter};
    use serde_json::{Value, json};

    use super::super::sections::VirtioSection;
    use super::*;
    use crate::chipset::ChipsetState;
    use crate::cpu::VcpuState;
    use crate::kvm::VmKvmState;

    /// The same machine, written by each version that there was.
    const GOLDEN: [&[u8]; 3] = [
        include_bytes!("../../testdata/state-1"),
        include_bytes!("../../testdata/state-2"),
        include_bytes!("../../testdata/state-3"),
    ];

    fn all<T: Section>(file: &mut StateFile, writer: &mut StateWriter) {
        let sections: Vec<T> = file.take_all().unwrap();
        for (id, section) in (0..).zip(&sections) {
            writer.push(id, section).unwrap();
        }
    }

    #[test]
    fn files_of_every_version_are_read() {
        for golden in GOLDEN {
            let saved = Saved::of(StateFile::parse(golden).unwrap()).unwrap();
            saved.check().unwrap();
            assert_eq!(saved.state.vcpus.len(), 2);
            let names: Vec<_> = saved
                .state
                .virtio
                .iter()
                .map(|device| &device.name)
                .collect();
            assert_eq!(names, ["disk", "balloon", "vsock", "entropy"]);
        }
    }

    #[test]
    fn the_present_form_is_written_as_it_was() {
        let [.., newest] = GOLDEN;
        let mut file = StateFile::parse(newest).unwrap();
        let mut writer = StateWriter::new();
        all::<MachineSection>(&mut file, &mut writer);
        all::<MemorySection>(&mut file, &mut writer);
        all::<VmKvmState>(&mut file, &mut writer);
        all::<VcpuState>(&mut file, &mut writer);
        all::<ChipsetState>(&mut file, &mut writer);
        all::<VirtioSection>(&mut file, &mut writer);
        file.finish().unwrap();
        assert!(
            writer.finish() == newest,
            "a section's form has changed: raise its version"
        );
    }

    #[test]
    fn registers_of_the_first_version_become_those_of_the_second() {
        let [first, ..] = GOLDEN;
        let of_first = |section: &&brume_snapshot::Section| section.kind() == "vcpu";
        let file = StateFile::parse(first).unwrap();
        let old = file.sections().find(of_first).unwrap().content().unwrap();
        let new = VcpuState::upgrade(1, old.clone()).unwrap();
        // `struct kvm_regs` begins with RAX and ends with RIP and RFLAGS.
        let regs = old["regs"].as_str().unwrap();
        let word = |at: usize| {
            let bytes = (0..8).map(|byte| {
                let digits = &regs[2 * (at + byte)..][..2];
                u64::from_str_radix(digits, 16).unwrap() << (8 * byte)
            });
            json!(format!("{:#x}", bytes.sum::<u64>()))
        };
        assert_eq!(new["registers"]["rax"], word(0));
        assert_eq!(new["registers"]["rip"], word(128));
        assert_eq!(new["registers"]["rflags"], word(136));
        let tsc = old["msrs"]["16"].as_u64().unwrap();
        assert_eq!(new["msrs"]["0x10"], json!(format!("{tsc:#x}")));
        assert!(VcpuState::upgrade(1, Value::Null).is_err());
        assert!(VcpuState::upgrade(0, old).is_err());
    }

    #[test]
    fn overrides_of_what_is_not_there_are_refused_by_name() {
        let request = |body: LoadSnapshot| {
            let [.., newest] = GOLDEN;
            let saved = Saved::of(StateFile::parse(newest).unwrap()).unwrap();
            saved.with_overrides(&body).err().unwrap().to_string()
        };
        let text = request(LoadSnapshot {
            network_overrides: vec![brume_api::NetworkOverride {
                iface_id: "eth7".into(),
                host_dev_name: "tap0".into(),
            }],
            ..LoadSnapshot::default()
        });
        assert!(text.contains("Unknown Network Device \"eth7\""), "{text}");
        let text = request(LoadSnapshot {
            drive_overrides: vec![brume_api::DriveOverride {
                drive_id: "other".into(),
                path_on_host: "/x".into(),
            }],
            ..LoadSnapshot::default()
        });
        assert!(text.contains("no drive \"other\""), "{text}");
    }
}
