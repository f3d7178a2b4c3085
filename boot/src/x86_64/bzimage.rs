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

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use crate::BootError;

    /// What is said of an image with `value` at `offset` of its file.
    fn refused(offset: usize, value: &[u8]) -> KernelError {
        let mut contents = bzimage();
        patch(&mut contents, offset, value);
        match boot(&contents, None) {
            Err(BootError::Kernel(error)) => error,
            other => panic!("not refused: {other:?}"),
        }
    }

    #[test]
    fn the_64_bit_entry_is_used_with_room_to_decompress() {
        let state = boot(&bzimage(), None).unwrap();
        assert_eq!(state.protocol, KernelProtocol::BzImage);
        assert_eq!(state.registers.rip, KERNEL + 0x200);
        assert_eq!(state.kernel, KERNEL..KERNEL + BZIMAGE_MEMORY);
        assert!(state.registers.cs.l);
    }

    #[test]
    fn no_setup_sectors_stand_for_four() {
        let mut contents = bzimage();
        contents[0x1f1] = 0;
        assert!(matches!(
            boot(&contents, None),
            Err(BootError::Kernel(KernelError::Truncated { .. }))
        ));
        contents.resize(5 * 512, 0);
        contents.extend([0xcc; CODE.len()]);
        let memory = memory(32);
        crate::load(&memory, &request(&file(&contents))).unwrap();
        assert_eq!(bytes_at(&memory, KERNEL, 4), [0xcc; 4]);
    }

    #[test]
    fn images_that_cannot_be_entered_in_64_bit_mode_are_refused() {
        for (offset, value, word) in [
            (0x206, &[0x0b, 0x02][..], "2.12"),
            (0x211, &[0], "zImage"),
            (0x236, &[0xfe, 0xff], "64-bit entry"),
        ] {
            let error = refused(offset, value);
            assert!(matches!(error, KernelError::BzImageKind(_)), "{error}");
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn a_truncated_image_is_told_from_one_that_does_not_fit() {
        let contents = bzimage();
        let error = boot(&contents[..contents.len() - 1], None).unwrap_err();
        assert!(message(&error).contains("truncated"), "{error}");

        let error = refused(0x260, &(16u32 << 20 | 1).to_le_bytes());
        assert!(matches!(error, KernelError::NoRoom { .. }), "{error}");
    }

    #[test]
    fn addresses_and_sizes_that_cannot_be_are_refused() {
        for (offset, value) in [
            (0x258, u64::MAX << 21),  // pref_address near the end of the address space
            (0x258, KERNEL + 0x1000), // not a multiple of kernel_alignment
            (0x230, 0),               // kernel_alignment
            (0x1f4, 0x20),            // syssize: ends at the entry
        ] {
            let width = if offset == 0x258 { 8 } else { 4 };
            let error = refused(offset, &value.to_le_bytes()[..width]);
            assert!(
                matches!(error, KernelError::BzImageCorrupt(_)),
                "{offset:#x}: {error}"
            );
        }
        // Below 1 MiB lie the boot structures.
        let error = refused(0x258, &0u64.to_le_bytes());
        assert!(matches!(error, KernelError::NoRoom { .. }), "{error}");
    }

    #[test]
    fn fields_beyond_the_headers_end_are_zero() {
        let mut contents = bzimage();
        // The header of protocol 2.12 ends before kernel_info_offset, at 0x268.
        contents[0x201] = 0x66;
        patch(&mut contents, 0x268, &[0xff; 4]);
        let header = read_setup_header(&contents).unwrap();
        assert_eq!({ header.kernel_info_offset }, 0);
        assert_eq!({ header.pref_address }, KERNEL);
    }
}
