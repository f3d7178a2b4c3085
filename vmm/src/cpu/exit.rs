// SPDX-License-Identifier: Apache-2.0
//! Parts of the run page that kvm-ioctls does not show: the width of a port access, and what KVM
//! tells about an internal error.
//!
//! This is a module with unsafe code: the run page is a C union with offsets in it.

#![allow(unsafe_code)]

use kvm_bindings::{KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_IO, KVM_EXIT_IO_IN};
use kvm_ioctls::VcpuFd;

/// The exit was for an emulation that KVM cannot do (`KVM_INTERNAL_ERROR_EMULATION`).
pub(super) const EMULATION_FAILURE: u32 = 1;
/// The failure carries the instruction's bytes.
const HAS_INSTRUCTION: u64 = 1;

/// A port access, which a string instruction may repeat.
pub(super) struct PortAccess<'a> {
    pub(super) port: u16,
    pub(super) input: bool,
    /// Width of one access in bytes: 1, 2 or 4.
    pub(super) width: usize,
    /// All accesses, one after the other.
    pub(super) data: &'a mut [u8],
}

/// The port access that the vCPU has just exited for.
pub(super) fn port_access(vcpu: &mut VcpuFd) -> Option<PortAccess<'_>> {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_IO {
        return None;
    }
    // SAFETY: the exit reason says which member of the union KVM has filled.
    let io = unsafe { run.__bindgen_anon_1.io };
    let width = usize::from(io.size);
    let len = width.checked_mul(usize::try_from(io.count).ok()?)?;
    let start = std::ptr::from_mut(run).cast::<u8>();
    let offset = usize::try_from(io.data_offset).ok()?;
    // SAFETY: KVM places the data of `count` accesses of `size` bytes at that offset of the run
    // mapping, of which `run` is the beginning, and leaves it alone until the next KVM_RUN, for
    // which the vCPU has to be borrowed again.
    let data = unsafe { std::slice::from_raw_parts_mut(start.wrapping_add(offset), len) };
    Some(PortAccess {
        port: io.port,
        input: u32::from(io.direction) == KVM_EXIT_IO_IN,
        width,
        data,
    })
}

/// What KVM tells about an internal error.
pub(super) struct InternalError {
    pub(super) suberror: u32,
    pub(super) data: Vec<u64>,
    /// The bytes at the instruction pointer, if KVM hands them over.
    pub(super) instruction: Vec<u8>,
}

/// The internal error that the vCPU has just exited for.
pub(super) fn internal_error(vcpu: &mut VcpuFd) -> Option<InternalError> {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_INTERNAL_ERROR {
        return None;
    }
    // SAFETY: the exit reason says which member of the union KVM has filled.
    let raw = unsafe { run.__bindgen_anon_1.internal };
    let count = usize::try_from(raw.ndata)
        .unwrap_or(usize::MAX)
        .min(raw.data.len());
    let data: Vec<u64> = raw.data.iter().take(count).copied().collect();
    let mut instruction = Vec::new();
    if raw.suberror == EMULATION_FAILURE
        && let [flags, rest @ ..] = &data[..]
        && flags & HAS_INSTRUCTION != 0
    {
        // One byte of length, then up to fifteen of the instruction.
        let bytes: Vec<u8> = rest.iter().flat_map(|word| word.to_le_bytes()).collect();
        if let [len, bytes @ ..] = &bytes[..] {
            instruction.extend(bytes.iter().take(usize::from(*len).min(15)));
        }
    }
    Some(InternalError {
        suberror: raw.suberror,
        data,
        instruction,
    })
}
