// SPDX-License-Identifier: Apache-2.0
//! The CPUID leaves of a vCPU: what host and KVM support, with the guest's own topology.
//!
//! APIC ids are the vCPUs' indices. With `smt` two neighbours are the threads of a core.
//! Leaf numbers and fields are those of the Intel SDM, volume 2A, and the AMD APM, volume 3.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Where a vCPU is among the others.
#[derive(Clone, Copy, Debug)]
pub(super) struct Topology {
    /// Its index, which is its APIC id.
    pub(super) index: u8,
    /// How many vCPUs there are.
    pub(super) vcpus: u8,
    /// Whether two are the threads of one core.
    pub(super) smt: bool,
}

impl Topology {
    fn threads_per_core(self) -> u32 {
        if self.smt && self.vcpus > 1 { 2 } else { 1 }
    }

    fn cores(self) -> u32 {
        u32::from(self.vcpus).div_ceil(self.threads_per_core())
    }

    /// Bits of the APIC id that number the threads of a core.
    fn thread_bits(self) -> u32 {
        bits_for(self.threads_per_core())
    }

    /// Bits of the APIC id that number all threads of the package.
    fn package_bits(self) -> u32 {
        bits_for(u32::from(self.vcpus))
    }
}

fn bits_for(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

/// Leaf 1, ECX: the local APIC timer has a TSC deadline mode.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: there is a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: leaf 1 EBX says how many threads the package has.
const HTT: u32 = 1 << 28;
/// Leaf 6, ECX: energy bias, which needs an MSR that KVM does not have.
const ENERGY_BIAS: u32 = 1 << 3;

/// What a vCPU answers to CPUID.
pub(super) fn for_vcpu(
    supported: &CpuId,
    topology: Topology,
    tsc_deadline: bool,
) -> Result<CpuId, vmm_sys_util::fam::Error> {
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        // Written anew below: KVM's are the host's or empty.
        .filter(|entry| !matches!(entry.function, 0xb | 0x1f))
        .copied()
        .collect();
    for entry in &mut entries {
        adjust(entry, topology, tsc_deadline);
    }
    let deepest = entries
        .iter()
        .find(|e| e.function == 0)
        .map_or(0, |e| e.eax);
    for leaf in [0xb, 0x1f].into_iter().filter(|&leaf| leaf <= deepest) {
        entries.extend(extended_topology(leaf, topology));
    }
    CpuId::from_entries(&entries)
}

fn adjust(entry: &mut kvm_cpuid_entry2, topology: Topology, tsc_deadline: bool) {
    let vcpus = u32::from(topology.vcpus);
    let id = u32::from(topology.index);
    match entry.function {
        1 => {
            entry.ebx = (entry.ebx & 0xffff) | (vcpus.next_power_of_two() << 16) | (id << 24);
            entry.ecx |= HYPERVISOR;
            set(&mut entry.ecx, TSC_DEADLINE, tsc_deadline);
            set(&mut entry.edx, HTT, vcpus > 1);
        }
        // Each cache: bits 14 to 25 say how many threads share it, 26 to 31 (Intel) the cores.
        4 | 0x8000_001d => {
            let shared = match (entry.eax >> 5) & 7 {
                0 => return,
                1 | 2 => topology.threads_per_core(),
                _ => vcpus.next_power_of_two(),
            };
            entry.eax = (entry.eax & 0x3fff) | ((shared - 1) << 14);
            if entry.function == 4 {
                entry.eax |= (topology.cores().next_power_of_two() - 1) << 26;
            }
        }
        6 => entry.ecx &= !ENERGY_BIAS,
        // No performance counters: their MSRs are not saved with the guest.
        0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x8000_0008 => {
            entry.ecx = (entry.ecx & !0xf0ff) | (topology.package_bits() << 12) | (vcpus - 1);
        }
        0x8000_001e => {
            entry.eax = id;
            entry.ebx = ((topology.threads_per_core() - 1) << 8) | (id >> topology.thread_bits());
            entry.ecx = 0;
        }
        _ => {}
    }
}

/// Registers with features that a guest may use once it has seen them: leaf, subleaf, which of EAX
/// to EDX, and the bits that are not the processor's own (APIC, hypervisor, state of the guest).
const FEATURES: [(u32, u32, usize, u32); 11] = [
    // MONITOR, DTES64: not a guest's to use. X2APIC, deadline timer, hypervisor: KVM's. OSXSAVE.
    (
        1,
        0,
        2,
        1 << 3 | 1 << 2 | 1 << 21 | TSC_DEADLINE | 1 << 27 | HYPERVISOR,
    ),
    (1, 0, 3, HTT | 1 << 9),
    (7, 0, 1, 0),
    // OSPKE.
    (7, 0, 2, 1 << 4),
    (7, 0, 3, 0),
    (7, 1, 0, 0),
    // The components of extended state.
    (0xd, 0, 0, 0),
    (0xd, 1, 0, 0),
    (0x8000_0001, 0, 2, 0),
    // The copies of leaf 1 that AMD has.
    (0x8000_0001, 0, 3, 1 << 9),
    (0x8000_0008, 0, 1, 0),
];

/// What a guest with the leaves `guest` may use and a host with `host` has not, by leaf and bits.
pub(crate) fn missing_features(
    guest: &[kvm_cpuid_entry2],
    host: &[kvm_cpuid_entry2],
) -> Vec<String> {
    let register = |entries: &[kvm_cpuid_entry2],
                    (leaf, subleaf, which, _): (u32, u32, usize, u32)| {
        let found = |entry: &&kvm_cpuid_entry2| entry.function == leaf && entry.index == subleaf;
        let registers = entries
            .iter()
            .find(found)
            .map(|entry| [entry.eax, entry.ebx, entry.ecx, entry.edx]);
        registers
            .and_then(|all| all.get(which).copied())
            .unwrap_or(0)
    };
    let missing = FEATURES.iter().filter_map(|&feature| {
        let (leaf, subleaf, which, ignored) = feature;
        let bits = register(guest, feature) & !register(host, feature) & !ignored;
        let name = ["EAX", "EBX", "ECX", "EDX"].get(which)?;
        (bits != 0).then(|| format!("leaf {leaf:#x}.{subleaf} {name} bits {bits:#x}"))
    });
    missing.collect()
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = if on {
        *register | bit
    } else {
        *register & !bit
    };
}

/// The levels of an extended topology leaf: threads in a core, threads in the package, the end.
fn extended_topology(leaf: u32, topology: Topology) -> [kvm_cpuid_entry2; 3] {
    const INVALID: u32 = 0;
    const THREAD: u32 = 1;
    const CORE: u32 = 2;
    let levels = [
        (THREAD, topology.thread_bits(), topology.threads_per_core()),
        (CORE, topology.package_bits(), u32::from(topology.vcpus)),
        (INVALID, 0, 0),
    ];
    let mut index = 0;
    levels.map(|(level, shift, count)| {
        let entry = kvm_cpuid_entry2 {
            function: leaf,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: count,
            ecx: index | (level << 8),
            edx: u32::from(topology.index),
            ..Default::default()
        };
        index += 1;
        entry
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            eax,
            ..Default::default()
        }
    }

    fn answer(topology: Topology) -> Vec<kvm_cpuid_entry2> {
        let caches = [leaf(4, 1 << 5), leaf(4, 3 << 5), leaf(4, 0)];
        let others = [
            leaf(0, 0x1f),
            leaf(1, 0),
            leaf(0xa, 7),
            leaf(0xb, 9),
            leaf(0x8000_001e, 0),
        ];
        let supported = CpuId::from_entries(&[&others[..], &caches[..]].concat()).unwrap();
        for_vcpu(&supported, topology, true)
            .unwrap()
            .as_slice()
            .to_vec()
    }

    fn of(entries: &[kvm_cpuid_entry2], function: u32) -> Vec<kvm_cpuid_entry2> {
        entries
            .iter()
            .filter(|entry| entry.function == function)
            .copied()
            .collect()
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id_everywhere() {
        for index in [0, 1, 5] {
            let entries = answer(Topology {
                index,
                vcpus: 6,
                smt: false,
            });
            let id = u32::from(index);
            assert_eq!(of(&entries, 1)[0].ebx >> 24, id);
            assert!(
                of(&entries, 0xb)
                    .iter()
                    .chain(&of(&entries, 0x1f))
                    .all(|e| e.edx == id)
            );
            assert_eq!(of(&entries, 0x8000_001e)[0].eax, id);
        }
    }

    #[test]
    fn threads_pair_up_to_cores_with_smt() {
        let entries = answer(Topology {
            index: 3,
            vcpus: 6,
            smt: true,
        });
        let levels: Vec<_> = of(&entries, 0xb)
            .iter()
            .map(|e| (e.eax, e.ebx, e.ecx))
            .collect();
        assert_eq!(levels, [(1, 2, 0x100), (3, 6, 0x201), (0, 0, 2)]);
        assert_eq!(of(&entries, 0x8000_001e)[0].ebx, 0x101);
        let caches: Vec<_> = of(&entries, 4)
            .iter()
            .map(|e| (e.eax >> 14) & 0xfff)
            .collect();
        assert_eq!(caches, [1, 7, 0]);
    }

    #[test]
    fn without_smt_each_vcpu_is_a_core() {
        let entries = answer(Topology {
            index: 0,
            vcpus: 1,
            smt: true,
        });
        let levels: Vec<_> = of(&entries, 0xb).iter().map(|e| (e.eax, e.ebx)).collect();
        assert_eq!(levels, [(0, 1), (0, 1), (0, 0)]);
        assert_eq!(of(&entries, 1)[0].edx & HTT, 0);
        assert_eq!(of(&entries, 0xa)[0].eax, 0);
    }

    #[test]
    fn a_feature_that_the_host_lacks_is_named_and_what_kvm_makes_up_is_not() {
        let leaf = |function, ecx| kvm_cpuid_entry2 {
            function,
            ecx,
            ..Default::default()
        };
        let host = [leaf(1, 1 << 20)];
        let same = [leaf(1, 1 << 20 | HYPERVISOR | TSC_DEADLINE)];
        assert!(missing_features(&same, &host).is_empty());
        let more = [leaf(1, 1 << 20 | 1 << 28), leaf(7, 1 << 1)];
        assert_eq!(
            missing_features(&more, &host),
            ["leaf 0x1.0 ECX bits 0x10000000", "leaf 0x7.0 ECX bits 0x2"]
        );
    }
}
