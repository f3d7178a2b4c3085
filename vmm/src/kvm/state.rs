// SPDX-License-Identifier: Apache-2.0
//! The state of what a virtual machine has in KVM beside its vCPUs: interrupt controllers, interval
//! timer, clock.

use std::time::Duration;

use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    kvm_clock_data, kvm_irqchip, kvm_pit_state2,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{KvmError, Vm, failed};
use crate::snapshot::Raw;

const CHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

/// What KVM knows of a machine beside its vCPUs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct VmKvmState {
    /// `struct kvm_irqchip`: both PICs, then the I/O APIC.
    chips: [Raw<kvm_irqchip>; 3],
    /// `struct kvm_pit_state2`
    pit: Raw<kvm_pit_state2>,
    /// `struct kvm_clock_data`
    clock: Raw<kvm_clock_data>,
}

/// A machine's KVM state that cannot be restored here.
#[derive(Debug, Error)]
pub enum VmRestoreError {
    /// A call failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The state has no real time.
    #[error(
        "clock_realtime cannot be used: the snapshot does not say at which time it was made, \
         because its host's KVM did not tell"
    )]
    NoRealTime,
}

impl VmKvmState {
    /// Takes the state of a machine whose vCPUs are held.
    pub(crate) fn save(vm: &Vm) -> Result<Self, KvmError> {
        let chip = |chip_id| {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            vm.fd
                .get_irqchip(&mut chip)
                .map_err(failed("show an interrupt controller"))?;
            Ok::<_, KvmError>(Raw(chip))
        };
        let [first, second, io_apic] = CHIPS.map(chip);
        let pit = vm
            .fd
            .get_pit2()
            .map_err(failed("show its interval timer"))?;
        let clock = vm.fd.get_clock().map_err(failed("show its clock"))?;
        Ok(Self {
            chips: [first?, second?, io_apic?],
            pit: Raw(pit),
            clock: Raw(clock),
        })
    }

    /// Lets the clock go on by `time`.
    pub(crate) fn advance(&mut self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(0);
        self.clock.0.clock = self.clock.0.clock.saturating_add(nanos);
    }

    /// Gives the state to a machine whose vCPUs have theirs. With `realtime` the clock goes on as
    /// if the machine had never stopped, else from where it was.
    pub(crate) fn restore(&self, vm: &Vm, realtime: bool) -> Result<(), VmRestoreError> {
        vm.fd
            .set_pit2(&self.pit.0)
            .map_err(failed("take its interval timer"))?;
        let mut clock = self.clock.0;
        if realtime && clock.flags & KVM_CLOCK_REALTIME == 0 {
            return Err(VmRestoreError::NoRealTime);
        }
        clock.flags = if realtime { KVM_CLOCK_REALTIME } else { 0 };
        vm.fd.set_clock(&clock).map_err(failed("take its clock"))?;
        for (chip, chip_id) in self.chips.iter().zip(CHIPS) {
            // The file is not to say which of them this is.
            let chip = kvm_irqchip { chip_id, ..chip.0 };
            vm.fd
                .set_irqchip(&chip)
                .map_err(failed("take an interrupt controller"))?;
        }
        Ok(())
    }
}
