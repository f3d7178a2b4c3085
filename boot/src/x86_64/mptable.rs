// SPDX-License-Identifier: Apache-2.0
//! The MP table, for guests that do not use ACPI (Intel MultiProcessor Specification 1.4, chapter
//! 4): processors, one ISA bus, the I/O APIC and how its pins are wired.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::layout;
use crate::error::BootError;

/// Specification 1.4.
const SPEC_REVISION: u8 = 4;
/// Version register of the local and I/O APICs.
const APIC_VERSION: u8 = 0x14;
const POINTER_SIZE: usize = 16;
const HEADER_SIZE: usize = 44;

// Entry types (4.3), in the order in which they have to come.
const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_IO_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

const CPU_ENABLED: u8 = 1 << 0;
const CPU_BOOTSTRAP: u8 = 1 << 1;
/// A sixth-generation processor, stepping 0; guests read CPUID for the truth.
const CPU_SIGNATURE: u32 = 0x600;
/// Feature flags: FPU and local APIC.
const CPU_FEATURES: u32 = 1 << 0 | 1 << 9;
const IOAPIC_USABLE: u8 = 1;
const ISA_BUS: u8 = 0;

/// Interrupt types (table 4-11).
const TYPE_INT: u8 = 0;
const TYPE_NMI: u8 = 1;
const TYPE_EXTINT: u8 = 3;
/// Polarity and trigger mode of the bus: ISA is active high and edge-triggered.
const CONFORMS_TO_BUS: u16 = 0;
const ALL_LOCAL_APICS: u8 = 0xff;

const _: () = assert!(
    POINTER_SIZE
        + HEADER_SIZE
        + layout::MAX_VCPUS as usize * 20
        + (2 + layout::IOAPIC_PINS as usize + 2) * 8
        <= layout::MP_TABLE_SIZE
);

/// Writes the floating pointer and the table for `vcpus` processors.
pub(super) fn write<M: GuestMemoryBackend>(memory: &M, vcpus: u8) -> Result<(), BootError> {
    let [pointer, table] = [pointer(), table(vcpus)];
    memory
        .write_slice(
            &[pointer, table].concat(),
            GuestAddress(layout::MP_TABLE_START),
        )
        .map_err(|source| BootError::Write {
            what: "MP table",
            source,
        })
}

/// The floating pointer structure (4.1).
fn pointer() -> Vec<u8> {
    let table = low(layout::MP_TABLE_START + 16);
    let mut bytes = Vec::with_capacity(POINTER_SIZE);
    bytes.extend(b"_MP_");
    bytes.extend(table.to_le_bytes());
    // Length in paragraphs, revision, checksum; then five feature bytes: a table is there, and the
    // machine starts in virtual wire mode.
    bytes.extend([1, SPEC_REVISION, 0, 0, 0, 0, 0, 0]);
    set_checksum(&mut bytes, 10);
    bytes
}

/// The configuration table (4.2) with its entries.
fn table(vcpus: u8) -> Vec<u8> {
    let (entries, count) = entries(vcpus);
    let length = u16::try_from(HEADER_SIZE + entries.len()).unwrap_or(u16::MAX);
    let mut bytes = Vec::with_capacity(HEADER_SIZE + entries.len());
    bytes.extend(b"PCMP");
    bytes.extend(length.to_le_bytes());
    bytes.extend([SPEC_REVISION, 0]);
    bytes.extend(b"BRUME   ");
    bytes.extend(b"BRUMEVM     ");
    // No OEM table: address and size.
    bytes.extend([0; 6]);
    bytes.extend(count.to_le_bytes());
    bytes.extend(low(layout::LAPIC_ADDRESS).to_le_bytes());
    // No extended entries: length, checksum, reserved.
    bytes.extend([0; 4]);
    bytes.extend(entries);
    set_checksum(&mut bytes, 7);
    bytes
}

/// All entries, and how many they are.
fn entries(vcpus: u8) -> (Vec<u8>, u16) {
    // The specification wants ids that are unique among all APICs; local ones are 0 to vcpus - 1.
    let ioapic_id = vcpus;
    let mut bytes = Vec::new();
    let mut count = 0;
    let mut add = |parts: &[&[u8]]| {
        bytes.extend(parts.concat());
        count += 1;
    };
    for id in 0..vcpus {
        let flags = if id == 0 {
            CPU_ENABLED | CPU_BOOTSTRAP
        } else {
            CPU_ENABLED
        };
        let (signature, features) = (CPU_SIGNATURE.to_le_bytes(), CPU_FEATURES.to_le_bytes());
        add(&[
            &[ENTRY_PROCESSOR, id, APIC_VERSION, flags],
            &signature,
            &features,
            &[0; 8],
        ]);
    }
    add(&[&[ENTRY_BUS, ISA_BUS], b"ISA   "]);
    add(&[
        &[ENTRY_IOAPIC, ioapic_id, APIC_VERSION, IOAPIC_USABLE],
        &low(layout::IOAPIC_ADDRESS).to_le_bytes(),
    ]);
    let flags = CONFORMS_TO_BUS.to_le_bytes();
    // KVM wires each interrupt to the pin of the same number.
    for pin in 0..layout::IOAPIC_PINS {
        add(&[
            &[ENTRY_IO_INTERRUPT, TYPE_INT],
            &flags,
            &[ISA_BUS, pin, ioapic_id, pin],
        ]);
    }
    // The 8259 is wired to LINT0 of the first processor, NMI to LINT1 of all.
    add(&[
        &[ENTRY_LOCAL_INTERRUPT, TYPE_EXTINT],
        &flags,
        &[ISA_BUS, 0, 0, 0],
    ]);
    add(&[
        &[ENTRY_LOCAL_INTERRUPT, TYPE_NMI],
        &flags,
        &[ISA_BUS, 0, ALL_LOCAL_APICS, 1],
    ]);
    (bytes, count)
}

/// Sets the byte at `position`, so far zero, so that all bytes add up to zero.
fn set_checksum(bytes: &mut [u8], position: usize) {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(checksum) = bytes.get_mut(position) {
        *checksum = sum.wrapping_neg();
    }
}

fn low(address: u64) -> u32 {
    u32::try_from(address).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::super::testing::{bytes_at, memory, sum, u16_at, u32_at};
    use super::*;

    /// The entries of the table in guest memory, after the checks that a guest makes.
    fn read_table(vcpus: u8) -> Vec<Vec<u8>> {
        let memory = memory(2);
        write(&memory, vcpus).unwrap();
        let pointer = bytes_at(&memory, layout::MP_TABLE_START, 16);
        assert_eq!(&pointer[..4], b"_MP_");
        assert_eq!(usize::from(pointer[8]) * 16, pointer.len());
        assert_eq!(sum(&pointer), 0);

        let address = u64::from(u32_at(&pointer, 4));
        let length = u16_at(&bytes_at(&memory, address, HEADER_SIZE), 4);
        let table = bytes_at(&memory, address, length.into());
        assert!(address + u64::from(length) <= layout::BASE_MEMORY_END);
        assert_eq!(&table[..4], b"PCMP");
        assert_eq!(sum(&table), 0);
        assert_eq!(u32_at(&table, 36), 0xfee0_0000);

        let mut entries = Vec::new();
        let mut rest = &table[HEADER_SIZE..];
        while !rest.is_empty() {
            let (entry, after) = rest.split_at(if rest[0] == ENTRY_PROCESSOR { 20 } else { 8 });
            entries.push(entry.to_vec());
            rest = after;
        }
        assert_eq!(usize::from(u16_at(&table, 34)), entries.len());
        entries
    }

    #[test]
    fn every_processor_is_there_and_the_first_one_starts() {
        for vcpus in 1..=layout::MAX_VCPUS {
            let entries = read_table(vcpus);
            let processors: Vec<_> = entries
                .iter()
                .filter(|entry| entry[0] == ENTRY_PROCESSOR)
                .collect();
            assert_eq!(processors.len(), usize::from(vcpus));
            for (id, entry) in processors.iter().enumerate() {
                assert_eq!(usize::from(entry[1]), id);
                assert_eq!(entry[3], if id == 0 { 3 } else { 1 });
            }
        }
    }

    #[test]
    fn every_pin_is_wired_to_the_isa_interrupt_of_its_number() {
        let entries = read_table(4);
        let ioapic = entries
            .iter()
            .find(|entry| entry[0] == ENTRY_IOAPIC)
            .unwrap();
        assert_eq!(
            (ioapic[1], ioapic[3], u32_at(ioapic, 4)),
            (4, 1, 0xfec0_0000)
        );
        let pins: HashSet<_> = entries
            .iter()
            .filter(|entry| entry[0] == ENTRY_IO_INTERRUPT)
            .map(|entry| {
                assert_eq!(
                    (entry[1], entry[4], entry[6]),
                    (TYPE_INT, ISA_BUS, ioapic[1])
                );
                assert_eq!(entry[5], entry[7]);
                entry[7]
            })
            .collect();
        assert_eq!(pins.len(), usize::from(layout::IOAPIC_PINS));
    }

    #[test]
    fn entries_come_in_the_order_of_their_types() {
        let types: Vec<_> = read_table(32).iter().map(|entry| entry[0]).collect();
        assert!(types.is_sorted());
        assert_eq!(
            types
                .iter()
                .filter(|kind| **kind == ENTRY_LOCAL_INTERRUPT)
                .count(),
            2
        );
    }
}
