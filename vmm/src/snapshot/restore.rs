// SPDX-License-Identifier: Apache-2.0
//! From files to a machine. All of the state is read and checked before the first vCPU has a
//! thread; a machine that cannot be restored whole is not there at all.

use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::PoisonError;

use brume_api::config::{HugePages, VmConfig};
use brume_api::{BackendType, LoadSnapshot};
use brume_snapshot::StateFile;
use brume_snapshot::memory_file::data_ranges;
use brume_virtio::transport::RunningQueues;
use kvm_ioctls::VcpuFd;

use super::error::LoadError;
use super::sections::{MachineSection, MemorySection, VirtioSection};
use crate::assemble::{Assembly, Outside};
use crate::build::{BuildError, BuildOptions};
use crate::chipset::ChipsetState;
use crate::cpu::{Known, VcpuHandle, VcpuState};
use crate::event::EventSender;
use crate::generation;
use crate::instance::Description;
use crate::kvm::{Vm, VmKvmState};
use crate::machine::{MachineParts, Start};
use crate::memory::{self, Backing, MachineMemory, Pages, uffd, working_set};
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
        let saved = Saved::read(request)?;
        let size = saved.memory.size;
        let working_set = request.working_set_path.as_deref();
        let working_set = working_set.map(|path| working_set::load(path, size));
        let working_set = working_set.transpose()?;
        let memory = saved.map_memory(request)?;
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
    kvm: VmKvmState,
    vcpus: Vec<VcpuState>,
    chipset: ChipsetState,
    virtio: Vec<VirtioSection>,
}

impl Saved {
    /// Reads the state file of `request`.
    ///
    /// # Errors
    ///
    /// It is not whole, not for this version, or not for what the request wants to change.
    fn read(request: &LoadSnapshot) -> Result<Self, LoadError> {
        let mut file = StateFile::read(&request.snapshot_path)?;
        let machine: MachineSection = file.take(0)?;
        let saved = Self {
            config: machine.config,
            memory: file.take(0)?,
            kvm: file.take(0)?,
            vcpus: file.take_all()?,
            chipset: file.take(0)?,
            virtio: file.take_all()?,
        };
        file.finish()?;
        saved.check()?;
        saved.with_overrides(request)
    }

    fn check(&self) -> Result<(), LoadError> {
        let vcpus = self.config.machine_config.vcpu_count;
        if self.vcpus.len() != usize::from(vcpus) {
            return Err(LoadError::Contradiction(format!(
                "it has the state of {} vCPUs and is of a machine with {vcpus}",
                self.vcpus.len()
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
        for change in &request.network_overrides {
            let mut interfaces = config.network_interfaces.iter_mut();
            let interface = interfaces.find(|interface| interface.iface_id == change.iface_id);
            let interface =
                interface.ok_or_else(|| LoadError::UnknownInterface(change.iface_id.clone()))?;
            interface.host_dev_name = Some(change.host_dev_name.clone());
        }
        if let Some(change) = &request.vsock_override {
            let vsock = config.vsock.as_mut().ok_or(LoadError::NoVsock)?;
            vsock.uds_path.clone_from(&change.uds_path);
        }
        for change in &request.drive_overrides {
            let mut drives = config.drives.iter_mut();
            let drive = drives.find(|drive| drive.drive_id == change.drive_id);
            let drive = drive.ok_or_else(|| LoadError::UnknownDrive(change.drive_id.clone()))?;
            drive.path_on_host = Some(change.path_on_host.clone());
        }
        let machine = &mut config.machine_config;
        machine.huge_pages = request.huge_pages.resolve(machine.huge_pages);
        machine.track_dirty_pages = request.track_dirty_pages;
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
                match self.config.machine_config.huge_pages {
                    HugePages::None => memory::map_file(size, file)?,
                    pages => memory::read_file(size, &file, pages)?,
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
        if self.memory.mark.is_in(&memory.guest)? {
            return Ok(());
        }
        let path = request.mem_backend.backend_path.clone();
        Err(LoadError::OtherMemory { path })
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
        config.validate().map_err(BuildError::from)?;
        description.config = config;
        let outside = Outside {
            console: options.console,
            clock: options.clock,
        };
        let assembly = Assembly::new(description, memory, outside, sender)?;
        // From here on this is another machine than the one that was saved.
        generation::renew(&assembly.memory.guest).map_err(BuildError::from)?;
        let vcpus = self.restore_vcpus(&assembly.vm)?;
        let queues = self.restore_rest(&assembly, request.clock_realtime)?;
        let vcpus = (0..)
            .zip(vcpus)
            .map(|(index, vcpu)| {
                let (vcpu, known) = vcpu;
                VcpuHandle::spawn(index, vcpu, known, assembly.buses.clone(), sender.clone())
            })
            .collect::<Result<_, _>>()
            .map_err(BuildError::from)?;
        Ok(MachineParts {
            vcpus,
            assembly,
            start: Start::Restored {
                queues,
                resume: request.resume_vm,
            },
        })
    }

    /// Makes the vCPUs, each in its state.
    fn restore_vcpus(&self, vm: &Vm) -> Result<Vec<(VcpuFd, Known)>, LoadError> {
        let made = (0..).zip(&self.vcpus).map(|(index, state)| {
            let vcpu = vm.create_vcpu(index).map_err(BuildError::from)?;
            let restored = state.restore(&vcpu, &vm.cpuid);
            let cpuid = restored.map_err(|source| LoadError::Vcpu { index, source })?;
            Ok((vcpu, vm.known(cpuid)))
        });
        made.collect()
    }

    /// Gives KVM and the devices their state, after the vCPUs.
    fn restore_rest(
        self,
        assembly: &Assembly,
        clock_realtime: bool,
    ) -> Result<Vec<RunningQueues>, LoadError> {
        let transports = &assembly.transports;
        self.kvm.restore(&assembly.vm, clock_realtime)?;
        generation::notify(&assembly.vm).map_err(BuildError::from)?;
        assembly.chipset.restore(self.chipset)?;
        if self.virtio.len() != transports.len() {
            return Err(LoadError::Contradiction(format!(
                "it has the state of {} virtio devices and is of a machine with {}",
                self.virtio.len(),
                transports.len()
            )));
        }
        let mut queues = Vec::new();
        for (named, saved) in transports.iter().zip(self.virtio) {
            let name = saved.name;
            if name != named.name {
                return Err(LoadError::Contradiction(format!(
                    "it has the state of device \"{name}\" in the place of \"{}\"",
                    named.name
                )));
            }
            let mut transport = named
                .transport
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let running = transport
                .restore(saved.transport)
                .map_err(|source| LoadError::Device { name, source })?;
            queues.push(running);
        }
        Ok(queues)
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
        Backing::Zeros => Ok(()),
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
