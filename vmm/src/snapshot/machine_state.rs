// SPDX-License-Identifier: Apache-2.0
//! What a paused machine is besides its memory: the sections that a snapshot and a machine on its
//! way to another process have in common.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use brume_api::config::VmConfig;
use brume_snapshot::{StateError, StateFile, StateWriter};
use brume_virtio::transport::RunningQueues;

use super::error::CreateError;
use super::sections::VirtioSection;
use crate::attach::NamedTransport;
use crate::chipset::{Chipset, ChipsetState};
use crate::cpu::{VcpuHandle, VcpuState};
use crate::kvm::{Vm, VmKvmState};
use crate::memory::MachineMemory;

/// What a state is taken from: a paused machine.
pub(crate) struct Paused<'a> {
    pub(crate) config: &'a VmConfig,
    pub(crate) memory: &'a MachineMemory,
    pub(crate) vm: &'a Vm,
    pub(crate) vcpus: &'a [VcpuHandle],
    pub(crate) transports: &'a [NamedTransport],
    /// What each of the transports has handed over.
    pub(crate) queues: &'a [RunningQueues],
    pub(crate) chipset: &'a Chipset,
}

impl Paused<'_> {
    /// Adds its state to a file; when its clocks were read, which run while it is paused.
    ///
    /// # Errors
    ///
    /// KVM does not show it.
    pub(crate) fn write(&self, state: &mut StateWriter) -> Result<Instant, CreateError> {
        // All at once, so that none waits for another.
        let vcpus: Vec<_> = self.vcpus.iter().map(VcpuHandle::save).collect();
        let vm = VmKvmState::save(self.vm)?;
        // Its clock is what was read last of it.
        let clocks_read = Instant::now();
        state.push(0, &vm)?;
        for (id, vcpu) in (0..).zip(vcpus) {
            let saved = vcpu.recv().map_err(|_| CreateError::VcpuEnded)?;
            state.push(id, &saved?)?;
        }
        state.push(0, &self.chipset.save())?;
        for (id, (named, queues)) in (0..).zip(self.transports.iter().zip(self.queues)) {
            let section = VirtioSection {
                name: named.name.clone(),
                transport: named
                    .transport
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .save(queues),
            };
            state.push(id, &section)?;
        }
        Ok(clocks_read)
    }
}

/// A state that was read.
pub(crate) struct MachineState {
    pub(super) kvm: VmKvmState,
    pub(super) vcpus: Vec<VcpuState>,
    pub(super) chipset: ChipsetState,
    pub(super) virtio: Vec<VirtioSection>,
}

impl MachineState {
    /// Takes it out of a file.
    ///
    /// # Errors
    ///
    /// A section is missing or makes no sense.
    pub(crate) fn take(file: &mut StateFile) -> Result<Self, StateError> {
        Ok(Self {
            kvm: file.take(0)?,
            vcpus: file.take_all()?,
            chipset: file.take(0)?,
            virtio: file.take_all()?,
        })
    }

    /// Lets the guest's clocks go on by `time`, in which it has stood still.
    pub(crate) fn advance(&mut self, time: Duration) {
        self.kvm.advance(time);
        self.vcpus.iter_mut().for_each(|vcpu| vcpu.advance(time));
    }
}
