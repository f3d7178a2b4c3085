// SPDX-License-Identifier: Apache-2.0
//! CPU templates: what a configuration changes of the guest's CPUs.
//!
//! They come first: what a machine needs itself (its topology, the registers that a boot begins
//! with) is written over them.

use std::collections::BTreeMap;

use brume_api::config::{CpuidModifier, CpuidRegister, KvmCapability, MsrModifier};
use kvm_bindings::{CpuId, KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use thiserror::Error;

use crate::kvm::{KvmError, failed};

/// A vCPU that cannot be made as it is to be.
#[derive(Debug, Error)]
pub enum CpuError {
    /// KVM does not do it.
    #[error("the virtual machine cannot be made")]
    Kvm(#[from] KvmError),
    /// KVM lacks what the template asks for.
    #[error("Missing KVM capabilities: {0:#x}")]
    Capability(u32),
    /// A CPUID leaf that KVM does not have.
    #[error(
        "Template changes a CPUID entry not supported by KVM: Leaf: {leaf:x}, Subleaf: {subleaf:x}"
    )]
    Leaf {
        /// The leaf.
        leaf: u32,
        /// Its part.
        subleaf: u32,
    },
    /// A register that KVM does not have, or a value that it does not take.
    #[error("Template changes an MSR entry not supported by KVM: Register Address: {0:x}")]
    Msr(u32),
}

/// Checks that KVM `has` all capabilities that are asked for. What one entry adds, a later one may
/// take back.
pub(crate) fn check_capabilities(
    capabilities: &[KvmCapability],
    has: impl Fn(u32) -> bool,
) -> Result<(), CpuError> {
    let missing = capabilities.iter().enumerate().find(|&(index, entry)| {
        let taken_back = |number| {
            let later = capabilities.iter().skip(index);
            later
                .copied()
                .any(|other| other == KvmCapability::Remove(number))
        };
        matches!(*entry, KvmCapability::Add(number) if !has(number) && !taken_back(number))
    });
    match missing {
        Some((_, &KvmCapability::Add(number))) => Err(CpuError::Capability(number)),
        _ => Ok(()),
    }
}

/// Changes what the guest finds by CPUID.
pub(crate) fn change_cpuid(cpuid: &mut CpuId, modifiers: &[CpuidModifier]) -> Result<(), CpuError> {
    for &CpuidModifier {
        leaf,
        subleaf,
        flags,
        ref modifiers,
    } in modifiers
    {
        let mut entries = cpuid.as_mut_slice().iter_mut();
        let entry = entries.find(|entry| (entry.function, entry.index) == (leaf, subleaf));
        let entry = entry.ok_or(CpuError::Leaf { leaf, subleaf })?;
        entry.flags = flags;
        for modifier in modifiers {
            let register = match modifier.register {
                CpuidRegister::Eax => &mut entry.eax,
                CpuidRegister::Ebx => &mut entry.ebx,
                CpuidRegister::Ecx => &mut entry.ecx,
                CpuidRegister::Edx => &mut entry.edx,
            };
            *register = modifier.bitmap.apply(*register);
        }
    }
    Ok(())
}

/// Changes model-specific registers of a vCPU.
pub(super) fn change_msrs(vcpu: &VcpuFd, modifiers: &[MsrModifier]) -> Result<(), CpuError> {
    // A register that is named twice is changed twice.
    let mut values: BTreeMap<u32, u64> = modifiers.iter().map(|msr| (msr.addr, 0)).collect();
    each_chunk(&mut values, "show model-specific registers", |msrs| {
        vcpu.get_msrs(msrs)
    })?;
    for msr in modifiers {
        if let Some(value) = values.get_mut(&msr.addr) {
            *value = msr.bitmap.apply(*value);
        }
    }
    each_chunk(&mut values, "take model-specific registers", |msrs| {
        vcpu.set_msrs(msrs)
    })
}

/// Hands the registers to `call`, as many at a time as KVM takes, and takes their values from it.
fn each_chunk(
    values: &mut BTreeMap<u32, u64>,
    action: &'static str,
    call: impl Fn(&mut Msrs) -> Result<usize, kvm_ioctls::Error>,
) -> Result<(), CpuError> {
    let entry = |(&index, &data): (&u32, &u64)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let entries: Vec<_> = values.iter().map(entry).collect();
    for chunk in entries.chunks(KVM_MAX_MSR_ENTRIES) {
        let mut msrs = Msrs::from_entries(chunk)
            .map_err(|_| failed(action)(kvm_ioctls::Error::new(libc::E2BIG)))?;
        let done = call(&mut msrs).map_err(failed(action))?;
        // KVM stops at the first that it does not have.
        if let Some(refused) = chunk.get(done) {
            return Err(CpuError::Msr(refused.index));
        }
        values.extend(msrs.as_slice().iter().map(|msr| (msr.index, msr.data)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use brume_api::config::CpuConfig;
    use kvm_bindings::kvm_cpuid_entry2;

    use super::*;

    fn template(json: &serde_json::Value) -> CpuConfig {
        serde_json::from_value(json.clone()).unwrap()
    }

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            flags: 1,
            eax: 0b1010,
            ebx: 0b1010,
            ..Default::default()
        }
    }

    #[test]
    fn capabilities_are_asked_for_unless_taken_back() {
        let check = |list: &[&str]| {
            let config = template(&serde_json::json!({ "kvm_capabilities": list }));
            check_capabilities(&config.kvm_capabilities, |number| number < 100)
        };
        for good in [&[][..], &["1", "99"], &["!100"], &["100", "!100"]] {
            check(good).unwrap();
        }
        for (bad, text) in [
            (&["1", "100"][..], "Missing KVM capabilities: 0x64"),
            (&["!255", "255"], "Missing KVM capabilities: 0xff"),
        ] {
            assert_eq!(check(bad).unwrap_err().to_string(), text);
        }
    }

    #[test]
    fn the_named_bits_of_the_named_leaf_change() {
        let mut cpuid = CpuId::from_entries(&[leaf(4, 0), leaf(4, 1), leaf(7, 1)]).unwrap();
        let config = template(&serde_json::json!({"cpuid_modifiers": [
            {"leaf": "0x4", "subleaf": "0x1", "flags": 0, "modifiers": [
                {"register": "eax", "bitmap": "0b01x"},
                {"register": "ebx", "bitmap": "0b1"}
            ]}
        ]}));
        change_cpuid(&mut cpuid, &config.cpuid_modifiers).unwrap();
        let [first, changed, last] = cpuid.as_slice() else {
            panic!("{cpuid:?}");
        };
        assert_eq!((*first, *last), (leaf(4, 0), leaf(7, 1)));
        let kvm_cpuid_entry2 {
            flags, eax, ebx, ..
        } = *changed;
        assert_eq!((flags, eax, ebx), (0, 0b1010, 0b1011));
    }

    #[test]
    fn a_leaf_that_is_not_there_is_refused() {
        let mut cpuid = CpuId::from_entries(&[leaf(0x1f, 0)]).unwrap();
        let config = template(&serde_json::json!({"cpuid_modifiers": [
            {"leaf": "0x1f", "subleaf": "0xa", "flags": 0, "modifiers": []}
        ]}));
        let error = change_cpuid(&mut cpuid, &config.cpuid_modifiers).unwrap_err();
        let text = "Template changes a CPUID entry not supported by KVM: Leaf: 1f, Subleaf: a";
        assert_eq!(error.to_string(), text);
    }

    #[test]
    fn registers_go_in_chunks_and_the_first_refused_is_named() {
        let mut values: BTreeMap<_, _> = (0..300).map(|index| (index, 0)).collect();
        let calls = RefCell::new(Vec::new());
        let call = |msrs: &mut Msrs| {
            calls.borrow_mut().push(msrs.as_slice().len());
            msrs.as_mut_slice()
                .iter_mut()
                .for_each(|msr| msr.data = u64::from(msr.index) * 2);
            Ok(msrs.as_slice().len())
        };
        each_chunk(&mut values, "show", call).unwrap();
        assert_eq!(*calls.borrow(), [256, 44]);
        assert!(
            values
                .iter()
                .all(|(&index, &data)| data == u64::from(index) * 2)
        );
        let error = each_chunk(&mut values, "show", |_| Ok(7)).unwrap_err();
        let text = "Template changes an MSR entry not supported by KVM: Register Address: 7";
        assert_eq!(error.to_string(), text);
    }
}
