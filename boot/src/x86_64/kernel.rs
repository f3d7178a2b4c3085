// SPDX-License-Identifier: Apache-2.0
//! Tells what a kernel file is, settles the protocol, and has the file loaded.

use std::fs::File;
use std::ops::Range;

use linux_loader::loader::bootparam::setup_header;
use vm_memory::GuestMemoryBackend;

use super::{bzimage, elf, layout};
use crate::error::KernelError;
use crate::guest;
use crate::protocol::KernelProtocol;

/// Bytes from the file's beginning that are looked at: the ELF header with its program headers, or
/// the bzImage's setup header.
pub(super) const HEAD_SIZE: usize = 4096;

/// A kernel in guest memory.
pub(super) struct Kernel {
    /// How it is entered.
    pub(super) protocol: KernelProtocol,
    /// Guest-physical address of its entry point for that protocol.
    pub(super) entry: u64,
    /// The memory that it needs until it has read the memory map.
    pub(super) range: Range<u64>,
    /// Address that the initrd has to end at or below.
    pub(super) initrd_end: u64,
    /// Most bytes of the command line, without its NUL.
    pub(super) cmdline_limit: usize,
    /// The header that a bzImage wants back in its `boot_params`.
    pub(super) setup_header: Option<setup_header>,
}

/// The beginning of a kernel file, and how long the file is.
pub(super) struct Head<'a> {
    pub(super) file: &'a File,
    pub(super) bytes: &'a [u8],
    pub(super) file_size: u64,
}

/// Loads `file` by the protocol `asked` for, or by one that suits it.
pub(super) fn load<M: GuestMemoryBackend>(
    memory: &M,
    file: &File,
    asked: Option<KernelProtocol>,
    low_ram_end: u64,
) -> Result<Kernel, KernelError> {
    let mut buffer = [0; HEAD_SIZE];
    let read = guest::read_at(file, &mut buffer, 0).map_err(KernelError::Read)?;
    let bytes = buffer.get(..read).unwrap_or_default();
    if bytes.is_empty() {
        return Err(KernelError::Empty);
    }
    let file_size = file.metadata().map_err(KernelError::Read)?.len();
    let head = Head {
        file,
        bytes,
        file_size,
    };

    let ram = layout::HIGH_MEMORY_START..low_ram_end;
    if elf::is_elf(&head) {
        if asked == Some(KernelProtocol::BzImage) {
            return Err(wrong_format(
                KernelProtocol::BzImage,
                "an ELF file",
                "use elf64 or pvh",
            ));
        }
        elf::load(memory, &head, asked, &ram)
    } else if bzimage::is_bzimage(&head) {
        match asked {
            Some(asked @ (KernelProtocol::Linux64 | KernelProtocol::Pvh)) => Err(wrong_format(
                asked,
                "a bzImage",
                "use bzimage, or give the vmlinux",
            )),
            Some(KernelProtocol::BzImage) | None => bzimage::load(memory, &head, &ram),
        }
    } else {
        Err(KernelError::NotAKernel)
    }
}

fn wrong_format(asked: KernelProtocol, found: &'static str, hint: &'static str) -> KernelError {
    KernelError::WrongFormat { asked, found, hint }
}

/// Checks that `start..end` lies in `ram`.
pub(super) fn check_room(start: u64, end: u64, ram: &Range<u64>) -> Result<(), KernelError> {
    if start < ram.start || end > ram.end {
        return Err(KernelError::NoRoom {
            start,
            end,
            ram_start: ram.start,
            ram_end: ram.end,
        });
    }
    Ok(())
}

/// Copies `size` bytes from `offset` of the file to `address`.
pub(super) fn copy<M: GuestMemoryBackend>(
    memory: &M,
    head: &Head<'_>,
    offset: u64,
    size: u64,
    address: u64,
) -> Result<(), KernelError> {
    let copied =
        guest::copy_file(memory, address, head.file, offset, size).map_err(KernelError::Copy)?;
    if copied < size {
        // The sizes were checked before: the file has become shorter since.
        return Err(KernelError::Truncated {
            what: "code",
            end: offset.saturating_add(size),
            size: offset.saturating_add(copied),
        });
    }
    Ok(())
}
