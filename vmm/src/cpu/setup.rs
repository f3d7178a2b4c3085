// SPDX-License-Identifier: Apache-2.0
//! The state in which a vCPU starts: what firmware would have left, and for the first one what
//! the boot protocol asks for.

use brume_api::config::MsrModifier;
use brume_boot::{DescriptorTable, Registers, Segment};
use kvm_bindings::{
    CpuId, Msrs, kvm_dtable, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment,
};
use kvm_ioctls::VcpuFd;

use super::cpuid::{self, Topology};
use super::template::{CpuError, change_msrs};
use crate::kvm::{KvmError, failed};

/// IA32_MISC_ENABLE; bit 0 says that string instructions are fast.
const MISC_ENABLE: (u32, u64) = (0x1a0, 1);
/// IA32_MTRR_DEF_TYPE: enabled, write-back, which is all there is of MTRRs.
const MTRR_DEF_TYPE: (u32, u64) = (0x2ff, 1 << 11 | 6);

/// Local APIC: offsets of the two local interrupt pins, and delivery modes.
const APIC_LVT0: usize = 0x350;
const APIC_LVT1: usize = 0x360;
const DELIVER_NMI: u32 = 4 << 8;
const DELIVER_EXTINT: u32 = 7 << 8;

/// What all vCPUs of a machine have in common.
pub(crate) struct CpuPlan<'a> {
    /// The CPUID that host and KVM support, with the template's changes.
    pub(crate) supported: &'a CpuId,
    /// How many vCPUs there are.
    pub(crate) vcpus: u8,
    /// Whether two are the threads of one core.
    pub(crate) smt: bool,
    /// Whether KVM's local APIC has the TSC deadline mode.
    pub(crate) tsc_deadline: bool,
    /// The template's changes to model-specific registers.
    pub(crate) msrs: &'a [MsrModifier],
}

/// Gives vCPU `index` its first state; `registers` is for the one that starts the kernel. What it
/// answers to CPUID is returned.
pub(crate) fn set_up(
    vcpu: &VcpuFd,
    index: u8,
    plan: &CpuPlan<'_>,
    registers: Option<&Registers>,
) -> Result<CpuId, CpuError> {
    let topology = Topology {
        index,
        vcpus: plan.vcpus,
        smt: plan.smt,
    };
    let out_of_memory = |_| failed("take the CPU features")(kvm_ioctls::Error::new(libc::E2BIG));
    let cpuid =
        cpuid::for_vcpu(plan.supported, topology, plan.tsc_deadline).map_err(out_of_memory)?;
    vcpu.set_cpuid2(&cpuid)
        .map_err(failed("take the CPU features"))?;
    change_msrs(vcpu, plan.msrs)?;
    set_msrs(vcpu)?;
    set_local_pins(vcpu)?;
    if let Some(registers) = registers {
        set_registers(vcpu, registers)?;
    }
    Ok(cpuid)
}

fn set_msrs(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let entries = [MISC_ENABLE, MTRR_DEF_TYPE].map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    });
    let too_many = |_| failed("take model-specific registers")(kvm_ioctls::Error::new(libc::E2BIG));
    let msrs = Msrs::from_entries(&entries).map_err(too_many)?;
    // KVM stops at one that it does not have; none of these is needed for a guest to start.
    vcpu.set_msrs(&msrs)
        .map(drop)
        .map_err(failed("take model-specific registers"))
}

/// Wires the legacy interrupt controller and the NMI line to the local APIC, as the MP table says.
fn set_local_pins(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let mut apic = vcpu.get_lapic().map_err(failed("show the local APIC"))?;
    set_delivery(&mut apic, APIC_LVT0, DELIVER_EXTINT);
    set_delivery(&mut apic, APIC_LVT1, DELIVER_NMI);
    vcpu.set_lapic(&apic).map_err(failed("take the local APIC"))
}

fn set_delivery(apic: &mut kvm_lapic_state, offset: usize, mode: u32) {
    // The register page is an array of C characters.
    let Some(register) = apic.regs.get_mut(offset..offset + 4) else {
        return;
    };
    let mut bytes = [0u8; 4];
    for (byte, raw) in bytes.iter_mut().zip(&*register) {
        *byte = raw.cast_unsigned();
    }
    let value = u32::from_le_bytes(bytes) & !0x700 | mode;
    for (raw, byte) in register.iter_mut().zip(value.to_le_bytes()) {
        *raw = byte.cast_signed();
    }
}

fn set_registers(vcpu: &VcpuFd, wanted: &Registers) -> Result<(), KvmError> {
    let mut sregs = vcpu.get_sregs().map_err(failed("show control registers"))?;
    sregs.cs = segment(&wanted.cs);
    sregs.ds = segment(&wanted.ds);
    sregs.es = segment(&wanted.es);
    sregs.fs = segment(&wanted.fs);
    sregs.gs = segment(&wanted.gs);
    sregs.ss = segment(&wanted.ss);
    sregs.tr = segment(&wanted.tr);
    sregs.gdt = table(wanted.gdt);
    sregs.idt = table(wanted.idt);
    sregs.cr0 = wanted.cr0;
    sregs.cr3 = wanted.cr3;
    sregs.cr4 = wanted.cr4;
    sregs.efer = wanted.efer;
    vcpu.set_sregs(&sregs)
        .map_err(failed("take control registers"))?;

    let regs = kvm_regs {
        rip: wanted.rip,
        rsp: wanted.rsp,
        rsi: wanted.rsi,
        rbx: wanted.rbx,
        rflags: wanted.rflags,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(failed("take registers"))?;

    // The state after FNINIT and the reset value of MXCSR.
    let fpu = kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    };
    vcpu.set_fpu(&fpu)
        .map_err(failed("take floating-point registers"))
}

fn segment(segment: &Segment) -> kvm_segment {
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: segment.type_,
        present: u8::from(segment.present),
        dpl: segment.dpl,
        db: u8::from(segment.db),
        s: u8::from(segment.s),
        l: u8::from(segment.l),
        g: u8::from(segment.g),
        ..Default::default()
    }
}

fn table(table: DescriptorTable) -> kvm_dtable {
    kvm_dtable {
        base: table.base,
        limit: table.limit,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delivery_mode_leaves_the_other_bits() {
        let mut apic = kvm_lapic_state { regs: [-1; 1024] };
        set_delivery(&mut apic, APIC_LVT1, DELIVER_NMI);
        assert_eq!(
            apic.regs[APIC_LVT1..APIC_LVT1 + 4],
            [-1, 0xfc_u8.cast_signed(), -1, -1]
        );
        assert_eq!(apic.regs[APIC_LVT1 - 1], -1);
    }
}
