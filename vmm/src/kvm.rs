// SPDX-License-Identifier: Apache-2.0
//! The virtual machine as KVM has it: memory slots, interrupt controllers, event wiring.
//!
//! This is a module with unsafe code: KVM is told about memory by address.

#![allow(unsafe_code)]

mod dirty_log;
mod state;

use std::io;
use std::sync::Arc;

use brume_boot::layout;
use brume_virtio::GuestMemory;
use kvm_bindings::{
    CpuId, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES,
    KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY, kvm_irqchip, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::cpu::Known;

pub(crate) use dirty_log::LogMode;
pub(crate) use state::VmKvmState;
pub use state::VmRestoreError;

/// The one version of the KVM interface that there is.
const API_VERSION: i32 = 12;

/// KVM does not do what a machine needs.
#[derive(Debug, Error)]
pub enum KvmError {
    /// The device cannot be opened.
    #[error("/dev/kvm cannot be used; {}", hint_for(source))]
    Open {
        /// Why.
        source: kvm_ioctls::Error,
    },
    /// A KVM of another age.
    #[error("/dev/kvm speaks version {0} of KVM's interface, not {API_VERSION}; is it KVM's?")]
    Version(i32),
    /// A call failed.
    #[error("KVM does not {action}")]
    Call {
        /// What it was to do.
        action: &'static str,
        /// Why it did not.
        source: kvm_ioctls::Error,
    },
}

/// Says what to do about a /dev/kvm that cannot be opened.
fn hint_for(error: &kvm_ioctls::Error) -> &'static str {
    match io::Error::from_raw_os_error(error.errno()).kind() {
        io::ErrorKind::NotFound => "is the kvm_intel or kvm_amd module loaded?",
        io::ErrorKind::PermissionDenied => "is the user in its group, usually `kvm`?",
        _ => "does this host have virtualisation?",
    }
}

/// Names the call that failed.
pub(crate) fn failed(action: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError::Call { action, source }
}

/// A virtual machine without vCPUs.
pub(crate) struct Vm {
    fd: VmFd,
    /// The CPUID that host and KVM support.
    pub(crate) cpuid: CpuId,
    /// The model-specific registers that KVM knows.
    msrs: Arc<[u32]>,
    /// How pages leave the log of those that were written.
    pub(crate) log_mode: LogMode,
    // After the VM, which has the memory mapped.
    memory: GuestMemory,
}

impl Vm {
    /// Makes a machine with `memory` and interrupt controllers.
    pub(crate) fn new(memory: &GuestMemory, track_dirty_pages: bool) -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(|source| KvmError::Open { source })?;
        if kvm.get_api_version() != API_VERSION {
            return Err(KvmError::Version(kvm.get_api_version()));
        }
        let fd = kvm
            .create_vm()
            .map_err(failed("create a virtual machine"))?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("say which CPU features it supports"))?;
        let msrs = kvm
            .get_msr_index_list()
            .map_err(failed("say which model-specific registers it has"))?;
        let mut vm = Self {
            fd,
            cpuid,
            msrs: msrs.as_slice().into(),
            log_mode: LogMode::ClearedByRead,
            memory: memory.clone(),
        };
        vm.log_mode = vm.choose_log_mode();
        // Memory comes first: changing the slots waits until no one reads the old ones any more,
        // and once the interrupt controllers have put themselves on KVM's I/O buses that wait is
        // for their clean-up as well, which takes milliseconds: most of the start of a guest.
        vm.set_memory(track_dirty_pages)?;
        vm.add_interrupt_controllers()?;
        Ok(vm)
    }

    fn add_interrupt_controllers(&self) -> Result<(), KvmError> {
        let tss = usize::try_from(layout::KVM_TSS_ADDRESS).unwrap_or(usize::MAX);
        self.fd
            .set_identity_map_address(layout::KVM_IDENTITY_MAP_ADDRESS)
            .map_err(failed("take the address of its identity map"))?;
        self.fd
            .set_tss_address(tss)
            .map_err(failed("take the address of its task state"))?;
        self.fd
            .create_irq_chip()
            .map_err(failed("create interrupt controllers"))?;
        self.mask_legacy_interrupts()?;
        // The speaker port would end in an exit each time a guest calibrates its timers with it.
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        self.fd
            .create_pit2(pit)
            .map_err(failed("create an interval timer"))
    }

    /// Masks all inputs of both 8259s, as firmware does. A kernel that finds a hardware-reduced
    /// platform never looks at them; an interrupt in its early boot would come through them with a
    /// vector that is an exception's.
    fn mask_legacy_interrupts(&self) -> Result<(), KvmError> {
        for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE] {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            self.fd
                .get_irqchip(&mut chip)
                .map_err(failed("show an interrupt controller"))?;
            chip.chip.pic.imr = 0xff;
            self.fd
                .set_irqchip(&chip)
                .map_err(failed("mask an interrupt controller"))?;
        }
        Ok(())
    }

    /// Gives the guest its memory, or switches the log of written pages on or off, which vCPUs may
    /// run for.
    pub(crate) fn set_memory(&self, track_dirty: bool) -> Result<(), KvmError> {
        for (slot, region) in (0..).zip(self.memory.iter()) {
            let host = region
                .get_host_address(MemoryRegionAddress(0))
                .unwrap_or(std::ptr::null_mut());
            let region = kvm_userspace_memory_region {
                slot,
                flags: if track_dirty {
                    KVM_MEM_LOG_DIRTY_PAGES
                } else {
                    0
                },
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: host as u64,
            };
            // SAFETY: the range is a mapping of guest memory, which `self` keeps alive for as long
            // as the virtual machine.
            unsafe { self.fd.set_user_memory_region(region) }
                .map_err(failed("map the guest's memory"))?;
        }
        Ok(())
    }

    /// What is to be known to save a vCPU that answers `cpuid`.
    pub(crate) fn known(&self, vcpu: &VcpuFd, cpuid: CpuId) -> Known {
        Known {
            msrs: self.msrs.clone(),
            cpuid,
            tsc_khz: vcpu.get_tsc_khz().ok(),
        }
    }

    /// Makes a vCPU.
    pub(crate) fn create_vcpu(&self, index: u8) -> Result<VcpuFd, KvmError> {
        self.fd
            .create_vcpu(u64::from(index))
            .map_err(failed("create a vCPU"))
    }

    /// Lets `event` raise the interrupt `gsi`.
    pub(crate) fn wire_interrupt(&self, event: &EventFd, gsi: u32) -> Result<(), KvmError> {
        self.fd
            .register_irqfd(event, gsi)
            .map_err(failed("wire an interrupt"))
    }

    /// Raises the edge-triggered interrupt `gsi` once.
    pub(crate) fn pulse_interrupt(&self, gsi: u32) -> Result<(), KvmError> {
        for level in [true, false] {
            self.fd
                .set_irq_line(gsi, level)
                .map_err(failed("raise an interrupt"))?;
        }
        Ok(())
    }

    /// Lets a 32-bit write of `value` to `address` write `event`, without an exit.
    pub(crate) fn wire_write(
        &self,
        event: &EventFd,
        address: u64,
        value: u32,
    ) -> Result<(), KvmError> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), value)
            .map_err(failed("wire a queue notification"))
    }

    /// Whether the host's KVM has the capability of that number.
    pub(crate) fn has_number(&self, capability: u32) -> bool {
        self.fd.check_extension_raw(capability.into()) > 0
    }

    /// Whether the host's KVM has the capability.
    pub(crate) fn has(&self, capability: kvm_ioctls::Cap) -> bool {
        self.fd.check_extension(capability)
    }
}
