// SPDX-License-Identifier: Apache-2.0
//! `hvm_start_info` of the PVH protocol (Xen project, "x86/HVM direct boot ABI" and
//! `public/arch-x86/hvm/start_info.h`).

use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend};

use super::{Handover, layout};
use crate::error::BootError;

/// Version 1 has the memory map.
const VERSION: u32 = 1;

/// Writes the start info with its module list and memory map.
pub(super) fn write_start_info<M: GuestMemoryBackend>(
    memory: &M,
    handover: &Handover,
) -> Result<(), BootError> {
    let modules: Vec<_> = handover
        .initrd
        .iter()
        .map(|initrd| hvm_modlist_entry {
            paddr: initrd.start,
            size: initrd.end - initrd.start,
            ..hvm_modlist_entry::default()
        })
        .collect();
    let memory_map: Vec<_> = handover
        .memory_map
        .iter()
        .map(|entry| hvm_memmap_table_entry {
            addr: entry.range.start,
            size: entry.range.end - entry.range.start,
            type_: entry.kind as u32,
            reserved: 0,
        })
        .collect();
    let start_info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: VERSION,
        nr_modules: count(&modules),
        modlist_paddr: if modules.is_empty() {
            0
        } else {
            layout::PVH_MODULES
        },
        cmdline_paddr: layout::CMDLINE_START,
        rsdp_paddr: layout::ACPI_START,
        memmap_paddr: layout::PVH_MEMORY_MAP,
        memmap_entries: count(&memory_map),
        ..hvm_start_info::default()
    };
    write_all(memory, &[start_info], layout::PVH_START_INFO)?;
    write_all(memory, &modules, layout::PVH_MODULES)?;
    write_all(memory, &memory_map, layout::PVH_MEMORY_MAP)
}

fn count<T>(items: &[T]) -> u32 {
    u32::try_from(items.len()).unwrap_or(u32::MAX)
}

fn write_all<M: GuestMemoryBackend, T: ByteValued>(
    memory: &M,
    items: &[T],
    address: u64,
) -> Result<(), BootError> {
    let bytes: Vec<u8> = items
        .iter()
        .flat_map(|item| item.as_slice().iter().copied())
        .collect();
    memory
        .write_slice(&bytes, GuestAddress(address))
        .map_err(|source| BootError::Write {
            what: "PVH start info",
            source,
        })
}
