// SPDX-License-Identifier: Apache-2.0
//! From files to a machine. All of the state is read and checked before the first vCPU has a
//! thread; a machine that cannot be restored whole is not there at all.

use std::fs::File;
use std::path::Path;
use std::sync::PoisonError;

use brume_api::config::{HugePages, VmConfig};
use brume_api::{BackendType, LoadSnapshot};
use brume_snapshot::{StateFile, left_behind};
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
use crate::memory::{self, MachineMemory};

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
        let own = &description.config;
        let config = VmConfig {
            logger: own.logger.clone(),
            metrics: own.metrics.clone(),
            serial: own.serial.clone(),
            ..saved.config.clone()
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
        let vcpus = saved.restore_vcpus(&assembly.vm)?;
        let queues = saved.restore_rest(&assembly, request.clock_realtime)?;
        let vcpus = (0..)
            .zip(vcpus)
            .map(|(index, vcpu)| {
                let (vcpu, known) = vcpu;
                VcpuHandle::spawn(index, vcpu, known, assembly.buses.clone(), sender.clone())
            })
            .collect::<Result<_, _>>()
            .map_err(BuildError::from)?;
        Ok(Self {
            vcpus,
            assembly,
            start: Start::Restored {
                queues,
                resume: request.resume_vm,
            },
        })
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
        let pair = |state: &Path| {
            let saved = Self::read(state, request)?;
            let memory = saved.map_memory(request)?;
            Ok((saved, memory))
        };
        let refused = match pair(path) {
            Ok(found) => return Ok(found),
            Err(error) => error,
        };
        if request.mem_backend.backend_type != BackendType::File {
            return Err(refused);
        }
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
        let mut file = StateFile::read(path)?;
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
    /// It is missing, or not the one that was written with the state.
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
            BackendType::Uffd => return Err(LoadError::Contradiction("uffd".into())),
        };
        if !self.memory.mark.is_in(&memory.guest)? {
            return Err(LoadError::OtherMemory { path: path.clone() });
        }
        Ok(memory)
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
