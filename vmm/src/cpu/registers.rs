// SPDX-License-Identifier: Apache-2.0
//! General-purpose registers by their names.

use kvm_bindings::kvm_regs;
use serde::{Deserialize, Serialize};

use crate::snapshot::Hex;

/// The registers of `struct kvm_regs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SavedRegisters {
    rip: Hex,
    rflags: Hex,
    rax: Hex,
    rbx: Hex,
    rcx: Hex,
    rdx: Hex,
    rsi: Hex,
    rdi: Hex,
    rsp: Hex,
    rbp: Hex,
    r8: Hex,
    r9: Hex,
    r10: Hex,
    r11: Hex,
    r12: Hex,
    r13: Hex,
    r14: Hex,
    r15: Hex,
}

macro_rules! same_fields {
    ($($name:ident),*) => {
        impl From<&kvm_regs> for SavedRegisters {
            fn from(regs: &kvm_regs) -> Self {
                Self { $($name: Hex(regs.$name)),* }
            }
        }

        impl From<&SavedRegisters> for kvm_regs {
            fn from(saved: &SavedRegisters) -> Self {
                Self { $($name: saved.$name.0),* }
            }
        }
    };
}

same_fields!(
    rip, rflags, rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15
);
