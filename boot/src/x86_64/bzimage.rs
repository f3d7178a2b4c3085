// SPDX-License-Identifier: Apache-2.0
//! bzImage kernels: a compressed kernel with its own decompressor, entered at the 64-bit entry
//! ("The Linux/x86 Boot Protocol", Documentation/arch/x86/boot.rst).
//!
//! The image goes to the address that it prefers. A lower one would not save memory, since the
//! decompressor moves itself up to that address, and room is needed for `init_size` bytes from
//! there: the compressed kernel, the decompressed one, and the decompressor that runs meanwhile.

use std::ops::Range;

use linux_loader::loader::bootparam::setup_header;
use vm_memory::{ByteValued, GuestMemoryBackend};

use super::kernel::{self, Head, Kernel};
use crate::error::KernelError;
use crate::protocol::KernelProtocol;

/// Offset of the setup header in the file, and in `boot_params`.
const SETUP_HEADER_OFFSET: usize = 0x1f1;
/// Offset of the byte that says how far the setup header reaches, counted from the byte after it.
const SETUP_HEADER_LENGTH: usize = 0x201;
const BOOT_FLAG: u16 = 0xaa55;
/// "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
/// Protocol 2.12 brought `xloadflags`.
const MIN_VERSION: u16 = 0x020c;
/// `loadflags`: the protected-mode part belongs above 1 MiB.
const LOADED_HIGH: u8 = 1 << 0;
/// `xloadflags`: there is a 64-bit entry.
const XLF_KERNEL_64: u16 = 1 << 0;
/// Offset of the 64-bit entry from the load address.
const ENTRY_64: u64 = 0x200;
const SECTOR: u64 = 512;

/// If the file starts like a Linux boot sector with a setup header.
pub(super) fn is_bzimage(head: &Head<'_>) -> bool {
    let header = read_setup_header(head.bytes);
    header.is_some_and(|header| header.header == HEADER_MAGIC && header.boot_flag == BOOT_FLAG)
}

/// Loads the protected-mode part of the image into `ram`.
pub(super) fn load<M: GuestMemoryBackend>(
    memory: &M,
    head: &Head<'_>,
    ram: &Range<u64>,
) -> Result<Kernel, KernelError> {
    let header = read_setup_header(head.bytes).ok_or(KernelError::BzImageCorrupt(
        "its setup header has an impossible length",
    ))?;
    check_kind(&header)?;

    // 0 stands for 4, for the sake of images older than the field.
    let setup_sectors = if header.setup_sects == 0 {
        4
    } else {
        u64::from(header.setup_sects)
    };
    let offset = (setup_sectors + 1) * SECTOR;
    let size = u64::from(header.syssize) * 16;
    let file_end = offset + size;
    if file_end > head.file_size {
        let what = "protected-mode code";
        return Err(KernelError::Truncated {
            what,
            end: file_end,
            size: head.file_size,
        });
    }
    if size <= ENTRY_64 {
        return Err(KernelError::BzImageCorrupt(
            "it ends before its 64-bit entry point",
        ));
    }

    let start = header.pref_address;
    let alignment = u64::from(header.kernel_alignment);
    if !alignment.is_power_of_two() || !start.is_multiple_of(alignment) {
        return Err(KernelError::BzImageCorrupt(
            "its preferred address is not aligned",
        ));
    }
    let needed = u64::from(header.init_size).max(size);
    let end = start
        .checked_add(needed)
        .ok_or(KernelError::BzImageCorrupt(
            "its preferred address is impossible",
        ))?;
    kernel::check_room(start, end, ram)?;
    kernel::copy(memory, head, offset, size, start)?;
    Ok(Kernel {
        protocol: KernelProtocol::BzImage,
        entry: start + ENTRY_64,
        range: start..end,
        initrd_end: u64::from(header.initrd_addr_max) + 1,
        cmdline_limit: usize::try_from(header.cmdline_size).unwrap_or(usize::MAX),
        setup_header: Some(header),
    })
}

/// The setup header, as far as the image says that it has one; fields that are newer than the
/// image are zero.
fn read_setup_header(bytes: &[u8]) -> Option<setup_header> {
    let mut header = setup_header::default();
    let length = usize::from(*bytes.get(SETUP_HEADER_LENGTH)?);
    let end = SETUP_HEADER_LENGTH + 1 + length;
    let source = bytes.get(SETUP_HEADER_OFFSET..end)?;
    let target = header.as_mut_slice();
    let known = source.len().min(target.len());
    target
        .get_mut(..known)?
        .copy_from_slice(source.get(..known)?);
    Some(header)
}

fn check_kind(header: &setup_header) -> Result<(), KernelError> {
    if header.version < MIN_VERSION {
        return Err(KernelError::BzImageKind(
            "its boot protocol is older than 2.12",
        ));
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(KernelError::BzImageKind(
            "it is a zImage, made to be loaded below 1 MiB",
        ));
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(KernelError::BzImageKind("it has no 64-bit entry point"));
    }
    Ok(())
}
