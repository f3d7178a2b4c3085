// SPDX-License-Identifier: Apache-2.0
//! The zero page: `struct boot_params` of the Linux boot protocol
//! (Documentation/arch/x86/zero-page.rst).

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::{Handover, layout};
use crate::error::BootError;

/// `type_of_loader`: a loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
/// Version of the protocol that an ELF kernel is told.
const VERSION: u16 = 0x020f;
/// Alignment that an ELF kernel is told: that of x86-64 Linux by default.
const KERNEL_ALIGNMENT: u32 = 0x100_0000;

/// Writes the zero page, with the setup header of a bzImage or one made up for an ELF kernel.
pub(super) fn write_zero_page<M: GuestMemoryBackend>(
    memory: &M,
    setup_header: Option<setup_header>,
    handover: &Handover,
) -> Result<(), BootError> {
    let mut params = boot_params {
        acpi_rsdp_addr: layout::ACPI_START,
        hdr: setup_header.unwrap_or_else(elf_setup_header),
        ..boot_params::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = low_address(layout::CMDLINE_START);
    if setup_header.is_none() {
        params.hdr.cmdline_size = u32::try_from(handover.cmdline_size).unwrap_or(u32::MAX);
    }
    if let Some(initrd) = &handover.initrd {
        params.hdr.ramdisk_image = low_address(initrd.start);
        params.hdr.ramdisk_size = low_address(initrd.end - initrd.start);
    }

    let mut e820_table = params.e820_table;
    for (slot, entry) in e820_table.iter_mut().zip(&handover.memory_map) {
        let size = entry.range.end - entry.range.start;
        *slot = boot_e820_entry {
            addr: entry.range.start,
            size,
            r#type: entry.kind as u32,
        };
        params.e820_entries += 1;
    }
    params.e820_table = e820_table;
    memory
        .write_obj(params, GuestAddress(layout::ZERO_PAGE))
        .map_err(|source| BootError::Write {
            what: "zero page",
            source,
        })
}

fn elf_setup_header() -> setup_header {
    setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        version: VERSION,
        kernel_alignment: KERNEL_ALIGNMENT,
        ..setup_header::default()
    }
}

/// An address or size in low RAM, which ends below 4 GiB.
fn low_address(address: u64) -> u32 {
    u32::try_from(address).unwrap_or(u32::MAX)
}
