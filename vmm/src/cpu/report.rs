// SPDX-License-Identifier: Apache-2.0
//! What a person is shown when KVM cannot go on with a vCPU.

use std::fmt::{self, Write};

use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;
use thiserror::Error;

use super::exit::{EMULATION_FAILURE, InternalError};

/// How a vCPU failed.
#[derive(Debug, Error)]
pub enum VcpuFailure {
    /// KVM_EXIT_INTERNAL_ERROR.
    #[error("vCPU {index}: KVM failed inside (internal error {suberror}, {})\n{report}", name_of(*suberror))]
    Internal {
        /// The vCPU.
        index: u8,
        /// Which kind of internal error.
        suberror: u32,
        /// The state of the vCPU.
        report: Box<FailureReport>,
    },
    /// KVM_EXIT_FAIL_ENTRY.
    #[error(
        "vCPU {index}: the processor refused to enter the guest (hardware reason {reason:#x}, on CPU {cpu})\n{report}"
    )]
    Entry {
        /// The vCPU.
        index: u8,
        /// What the hardware said.
        reason: u64,
        /// The host's CPU.
        cpu: u32,
        /// The state of the vCPU.
        report: Box<FailureReport>,
    },
    /// An exit that nothing here asks for.
    #[error("vCPU {index}: KVM exited for a reason that is not handled: {exit}\n{report}")]
    Unexpected {
        /// The vCPU.
        index: u8,
        /// The exit.
        exit: String,
        /// The state of the vCPU.
        report: Box<FailureReport>,
    },
    /// KVM_RUN failed.
    #[error("vCPU {index}: KVM cannot run it")]
    Run {
        /// The vCPU.
        index: u8,
        /// Why.
        source: kvm_ioctls::Error,
    },
}

fn name_of(suberror: u32) -> &'static str {
    match suberror {
        EMULATION_FAILURE => "an instruction it cannot emulate",
        2 => "an exception while delivering another",
        3 => "an event it could not deliver",
        4 => "an unexpected exit of the processor",
        _ => "of unknown kind",
    }
}

/// The state of a vCPU that cannot go on.
#[derive(Debug, Default)]
pub struct FailureReport {
    registers: Option<(kvm_regs, kvm_sregs)>,
    instruction: Vec<u8>,
    data: Vec<u64>,
}

impl FailureReport {
    /// Reads the vCPU's registers.
    pub(super) fn of(vcpu: &VcpuFd) -> Box<Self> {
        let registers = vcpu.get_regs().ok().zip(vcpu.get_sregs().ok());
        Box::new(Self {
            registers,
            ..Self::default()
        })
    }

    /// Adds what KVM told about an internal error.
    pub(super) fn with(mut self: Box<Self>, error: InternalError) -> Box<Self> {
        self.instruction = error.instruction;
        self.data = error.data;
        self
    }

    fn hint(&self) -> Option<String> {
        let (name, feature) = identify(&self.instruction)?;
        let mut hint = format!("The instruction is `{name}`");
        match feature {
            Feature::Argument(argument) => {
                let _ = write!(
                    hint,
                    "; `{argument}` on the guest's command line keeps Linux from using it"
                );
            }
            Feature::Always => hint.push_str("; the guest's kernel has to do without it"),
        }
        Some(hint)
    }
}

impl fmt::Display for FailureReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((regs, sregs)) = &self.registers {
            write_registers(f, regs, sregs)?;
        }
        if !self.data.is_empty() {
            write!(f, "  KVM data:   ")?;
            self.data
                .iter()
                .try_for_each(|word| write!(f, " {word:016x}"))?;
            writeln!(f)?;
        }
        if self.instruction.is_empty() {
            return write!(f, "  instruction: KVM did not hand it over");
        }
        write!(f, "  instruction:")?;
        self.instruction
            .iter()
            .try_for_each(|byte| write!(f, " {byte:02x}"))?;
        if let Some(hint) = self.hint() {
            write!(f, "\n  {hint}.")?;
        }
        write!(
            f,
            "\n  A KVM that emulates guest kernel code (no VMX or SVM under it) lacks some \
             instructions;\n  `clearcpuid=` on the guest's command line turns CPU features off."
        )
    }
}

fn write_registers(f: &mut fmt::Formatter<'_>, r: &kvm_regs, s: &kvm_sregs) -> fmt::Result {
    let rows = [
        [("rip", r.rip), ("rsp", r.rsp), ("rflags", r.rflags)],
        [("rax", r.rax), ("rbx", r.rbx), ("rcx", r.rcx)],
        [("rdx", r.rdx), ("rsi", r.rsi), ("rdi", r.rdi)],
        [("rbp", r.rbp), ("r8", r.r8), ("r9", r.r9)],
        [("r10", r.r10), ("r11", r.r11), ("r12", r.r12)],
        [("r13", r.r13), ("r14", r.r14), ("r15", r.r15)],
        [("cr0", s.cr0), ("cr2", s.cr2), ("cr3", s.cr3)],
        [("cr4", s.cr4), ("efer", s.efer), ("apic", s.apic_base)],
    ];
    for row in rows {
        for (name, value) in row {
            write!(f, "  {name:>6} {value:016x}")?;
        }
        writeln!(f)?;
    }
    let mode = match (s.cr0 & 1, s.cs.l, s.cs.db) {
        (0, ..) => "real mode",
        (_, 1, _) => "64-bit",
        (_, _, 1) => "32-bit",
        _ => "16-bit",
    };
    writeln!(
        f,
        "  {mode}, privilege level {}; cs {:04x} ss {:04x}; gdt {:x} idt {:x}",
        s.ss.dpl, s.cs.selector, s.ss.selector, s.gdt.base, s.idt.base
    )
}

/// What keeps Linux from an instruction.
enum Feature {
    Argument(&'static str),
    Always,
}

/// Names the instructions that software KVMs are known to lack, by their first bytes without
/// operand-size and REX prefixes.
fn identify(bytes: &[u8]) -> Option<(&'static str, Feature)> {
    use Feature::{Always, Argument};
    let rex = |byte: &u8| (0x40..=0x4f).contains(byte);
    let (repeated, rest) = match bytes {
        [0xf3, rest @ ..] => (true, rest),
        rest => (false, rest),
    };
    let rest = match rest {
        [first, rest @ ..] if rex(first) => rest,
        rest => rest,
    };
    let register_field = |modrm: &u8| (modrm >> 3) & 7;
    Some(match (repeated, rest) {
        (false, [0xcc, ..]) => ("int3", Always),
        (false, [0x9b, ..]) => ("fwait", Always),
        (true, [0x0f, 0xb8, ..]) => ("popcnt", Argument("clearcpuid=popcnt")),
        (false, [0x0f, 0x01, 0xca, ..]) => ("clac", Argument("clearcpuid=smap")),
        (false, [0x0f, 0x01, 0xcb, ..]) => ("stac", Argument("clearcpuid=smap")),
        (false, [0x0f, 0x0b, ..]) => ("ud2", Always),
        (false, [0x0f, 0xae, m, ..]) if register_field(m) == 5 => ("xrstor", Argument("noxsave")),
        (false, [0x0f, 0xae, m, ..]) if register_field(m) == 4 => ("xsave", Argument("noxsave")),
        (false, [0x0f, 0xc7, m, ..]) if register_field(m) == 1 => {
            ("cmpxchg16b", Argument("clearcpuid=cx16"))
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(instruction: &[u8]) -> String {
        let registers = kvm_regs {
            rip: 0xffff_8100,
            ..Default::default()
        };
        FailureReport {
            registers: Some((registers, kvm_sregs::default())),
            instruction: instruction.to_vec(),
            data: vec![1],
        }
        .to_string()
    }

    #[test]
    fn the_report_has_registers_bytes_and_a_hint() {
        let text = report(&[0xf3, 0x48, 0x0f, 0xb8, 0xc7]);
        assert!(text.contains("rip 00000000ffff8100"), "{text}");
        assert!(text.contains("f3 48 0f b8 c7"), "{text}");
        assert!(text.contains("clearcpuid=popcnt"), "{text}");
    }

    #[test]
    fn known_instructions_are_named() {
        for (bytes, name) in [
            (&[0xcc][..], "int3"),
            (&[0x0f, 0x01, 0xca], "clac"),
            (&[0x48, 0x0f, 0xae, 0x2f], "xrstor"),
            (&[0x48, 0x0f, 0xc7, 0x0e], "cmpxchg16b"),
            (&[0x9b], "fwait"),
        ] {
            assert_eq!(identify(bytes).map(|(name, _)| name), Some(name));
        }
        assert!(identify(&[]).is_none());
        assert!(identify(&[0x90]).is_none());
        assert!(report(&[]).contains("did not hand it over"));
    }
}
