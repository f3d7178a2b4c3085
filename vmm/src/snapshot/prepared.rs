// SPDX-License-Identifier: Apache-2.0
//! A machine in two steps: all that takes time and can fail for reasons of this host is made first,
//! then it gets its state. Between both steps, a machine that is on its way here still runs
//! elsewhere.

use std::sync::PoisonError;

use brume_virtio::block::Locking;
use brume_virtio::transport::RunningQueues;
use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::{Cap, VcpuFd};

use super::error::LoadError;
use super::machine_state::MachineState;
use super::sections::VirtioSection;
use crate::assemble::{Assembly, Outside};
use crate::build::{BuildError, BuildOptions};
use crate::cpu::{Known, VcpuHandle, VcpuState};
use crate::event::EventSender;
use crate::generation;
use crate::instance::Description;
use crate::kvm::Vm;
use crate::machine::{MachineParts, Start};
use crate::memory::MachineMemory;

/// Whether the machine that goes on is the one that was paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Identity {
    /// It is: nobody else goes on with it.
    Same,
    /// It is another one, and has to be told so.
    Renewed,
}

/// How a machine goes on with its state.
pub(crate) struct GoOn {
    /// Whether KVM's clock goes on by the time that has passed since the state was taken.
    pub(crate) clock_realtime: bool,
    /// Which machine it is then.
    pub(crate) identity: Identity,
    /// Whether it runs at once.
    pub(crate) resume: bool,
}

/// A machine whose parts are there, with no state yet.
pub(crate) struct Prepared {
    // In the order in which they have to go: vCPUs before what they use.
    vcpus: Vec<VcpuFd>,
    assembly: Assembly,
    sender: EventSender,
}

impl Prepared {
    /// Makes what `description` describes around `memory`.
    ///
    /// # Errors
    ///
    /// It cannot be made here; all that was made for it is gone again then.
    pub(crate) fn new(
        description: &Description,
        memory: MachineMemory,
        options: BuildOptions,
        sender: &EventSender,
        locking: Locking,
    ) -> Result<Self, BuildError> {
        description.config.validate()?;
        let outside = Outside {
            console: options.console,
            clock: options.clock,
            locking,
        };
        let assembly = Assembly::new(description, memory, outside, sender)?;
        // All are there before the first gets its counter: KVM holds the counters of vCPUs together
        // that are set one after the other, but a new vCPU begins at 0, and ends that.
        let vcpus = (0..description.config.machine_config.vcpu_count)
            .map(|index| assembly.vm.create_vcpu(index))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            vcpus,
            assembly,
            sender: sender.clone(),
        })
    }

    /// The memory.
    pub(crate) fn memory(&self) -> &MachineMemory {
        &self.assembly.memory
    }

    /// What KVM offers a guest on this host.
    pub(crate) fn supported_cpuid(&self) -> &[kvm_cpuid_entry2] {
        self.assembly.vm.cpuid.as_slice()
    }

    /// The rate of this host's time stamp counter in kHz, if KVM tells.
    pub(crate) fn tsc_khz(&self) -> Option<u32> {
        self.vcpus.first()?.get_tsc_khz().ok()
    }

    /// Whether KVM can give guests a counter of another rate.
    pub(crate) fn can_scale_tsc(&self) -> bool {
        self.assembly.vm.has(Cap::TscControl)
    }

    /// Gives it its state.
    ///
    /// # Errors
    ///
    /// It cannot go on here; nothing of it has run.
    pub(crate) fn load(self, state: MachineState, go_on: &GoOn) -> Result<MachineParts, LoadError> {
        let Self {
            vcpus,
            assembly,
            sender,
        } = self;
        if go_on.identity == Identity::Renewed {
            generation::renew(&assembly.memory.guest).map_err(BuildError::from)?;
        }
        let MachineState {
            kvm,
            vcpus: states,
            chipset,
            virtio,
        } = state;
        if states.len() != vcpus.len() {
            return Err(LoadError::Contradiction(format!(
                "it has the state of {} vCPUs and is of a machine with {}",
                states.len(),
                vcpus.len()
            )));
        }
        let vcpus = restore_vcpus(&assembly.vm, vcpus, &states)?;
        kvm.restore(&assembly.vm, go_on.clock_realtime)?;
        if go_on.identity == Identity::Renewed {
            generation::notify(&assembly.vm).map_err(BuildError::from)?;
        }
        assembly.chipset.restore(chipset)?;
        let queues = restore_devices(&assembly, virtio)?;
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
                resume: go_on.resume,
                arrived: None,
            },
        })
    }
}

fn restore_vcpus(
    vm: &Vm,
    vcpus: Vec<VcpuFd>,
    states: &[VcpuState],
) -> Result<Vec<(VcpuFd, Known)>, LoadError> {
    let vcpus = (0..).zip(vcpus).zip(states);
    let restored = vcpus.map(|((index, vcpu), state)| {
        let restored = state.restore(&vcpu, &vm.cpuid);
        let cpuid = restored.map_err(|source| LoadError::Vcpu { index, source })?;
        let known = vm.known(&vcpu, cpuid);
        Ok((vcpu, known))
    });
    restored.collect()
}

fn restore_devices(
    assembly: &Assembly,
    virtio: Vec<VirtioSection>,
) -> Result<Vec<RunningQueues>, LoadError> {
    let transports = &assembly.transports;
    if virtio.len() != transports.len() {
        return Err(LoadError::Contradiction(format!(
            "it has the state of {} virtio devices and is of a machine with {}",
            virtio.len(),
            transports.len()
        )));
    }
    let mut queues = Vec::new();
    for (named, saved) in transports.iter().zip(virtio) {
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
