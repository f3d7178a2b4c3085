// SPDX-License-Identifier: Apache-2.0
//! ELF kernels: a vmlinux as the linker leaves it, loaded segment by segment to the physical
//! addresses in its program headers ("ELF-64 Object File Format", version 1.5).
//!
//! The headers are checked here and not by linux-loader, whose errors do not tell a truncated file
//! from guest memory that is too small, and which accepts segments anywhere in guest memory.

use std::ops::Range;

use linux_loader::elf::{self, Elf64_Ehdr, Elf64_Nhdr, Elf64_Phdr};
use vm_memory::GuestMemoryBackend;

use super::kernel::{self, HEAD_SIZE, Head, Kernel};
use super::layout;
use crate::error::KernelError;
use crate::guest;
use crate::protocol::KernelProtocol;

const MAGIC: &[u8] = b"\x7fELF";
/// `e_machine` of x86-64.
const EM_X86_64: u16 = 62;
/// `e_type`: executable, and shared object (a position-independent executable).
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
/// Program headers that fit into what is read of the file. A vmlinux has five.
const MAX_PROGRAM_HEADERS: usize = HEAD_SIZE / size_of::<Elf64_Phdr>();
/// The note with the PVH entry point ("x86/HVM direct boot ABI").
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// Bytes of a note segment that are looked at; a vmlinux has about 500.
const MAX_NOTES: usize = 64 << 10;

/// If the file starts with the ELF magic number.
pub(super) fn is_elf(head: &Head<'_>) -> bool {
    head.bytes.starts_with(MAGIC)
}

/// Loads the segments into `ram`.
pub(super) fn load<M: GuestMemoryBackend>(
    memory: &M,
    head: &Head<'_>,
    asked: Option<KernelProtocol>,
    ram: &Range<u64>,
) -> Result<Kernel, KernelError> {
    let header = read_header(head)?;
    let program_headers = read_program_headers(head, &header)?;
    let segments: Vec<Segment> = program_headers
        .iter()
        .filter(|entry| entry.p_type == elf::PT_LOAD && entry.p_memsz > 0)
        .map(|entry| Segment::check(entry, head.file_size, ram))
        .collect::<Result<_, _>>()?;
    let start = segments.iter().map(|segment| segment.start).min();
    let end = segments.iter().map(|segment| segment.end).max();
    let (Some(start), Some(end)) = (start, end) else {
        return Err(KernelError::ElfCorrupt("it has no segment to load"));
    };

    let (protocol, entry) = choose_entry(head, &header, &program_headers, asked)?;
    if !segments
        .iter()
        .any(|segment| (segment.start..segment.end).contains(&entry))
    {
        return Err(KernelError::Entry(entry));
    }
    for segment in &segments {
        kernel::copy(
            memory,
            head,
            segment.offset,
            segment.file_size,
            segment.start,
        )?;
    }
    Ok(Kernel {
        protocol,
        entry,
        range: start..end,
        initrd_end: ram.end,
        cmdline_limit: layout::CMDLINE_MAX_SIZE - 1,
        setup_header: None,
    })
}

/// A loadable segment that was found to fit. What it has beyond `file_size` is zero.
struct Segment {
    offset: u64,
    file_size: u64,
    start: u64,
    end: u64,
}

impl Segment {
    fn check(header: &Elf64_Phdr, size: u64, ram: &Range<u64>) -> Result<Self, KernelError> {
        let overflow = KernelError::ElfCorrupt("a segment's address or size is impossible");
        if header.p_filesz > header.p_memsz {
            return Err(KernelError::ElfCorrupt(
                "a segment is larger in the file than in memory",
            ));
        }
        let Some(end) = header.p_paddr.checked_add(header.p_memsz) else {
            return Err(overflow);
        };
        let Some(file_end) = header.p_offset.checked_add(header.p_filesz) else {
            return Err(overflow);
        };
        if file_end > size {
            return Err(KernelError::Truncated {
                what: "segment",
                end: file_end,
                size,
            });
        }
        kernel::check_room(header.p_paddr, end, ram)?;
        Ok(Self {
            offset: header.p_offset,
            file_size: header.p_filesz,
            start: header.p_paddr,
            end,
        })
    }
}

fn read_header(head: &Head<'_>) -> Result<Elf64_Ehdr, KernelError> {
    let [_, _, _, _, class, data, ..] = *head.bytes else {
        return Err(truncated("ELF header", size_of::<Elf64_Ehdr>(), head));
    };
    // Class and byte order say how to read the rest, so they come first.
    if class != elf::ELFCLASS64 {
        return Err(KernelError::ElfKind("it is not a 64-bit file"));
    }
    if data != elf::ELFDATA2LSB {
        return Err(KernelError::ElfKind("it is big-endian"));
    }
    let Some(header) = guest::parse::<Elf64_Ehdr>(head.bytes, 0) else {
        return Err(truncated("ELF header", size_of::<Elf64_Ehdr>(), head));
    };
    if header.e_machine != EM_X86_64 {
        return Err(KernelError::ElfKind("it is built for another machine"));
    }
    if header.e_type != ET_EXEC && header.e_type != ET_DYN {
        return Err(KernelError::ElfKind("it is not an executable"));
    }
    Ok(header)
}

fn read_program_headers(
    head: &Head<'_>,
    header: &Elf64_Ehdr,
) -> Result<Vec<Elf64_Phdr>, KernelError> {
    let count = usize::from(header.e_phnum);
    if count == 0 {
        return Err(KernelError::ElfCorrupt("it has no program headers"));
    }
    if count > MAX_PROGRAM_HEADERS {
        return Err(KernelError::ElfCorrupt("it has too many program headers"));
    }
    if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() {
        return Err(KernelError::ElfCorrupt(
            "its program headers have an impossible size",
        ));
    }
    let mut table = [0; HEAD_SIZE];
    let table = table
        .get_mut(..count * size_of::<Elf64_Phdr>())
        .unwrap_or_default();
    let read = guest::read_at(head.file, table, header.e_phoff).map_err(KernelError::Read)?;
    if read < table.len() {
        let size = u64::try_from(table.len()).unwrap_or(u64::MAX);
        return Err(KernelError::Truncated {
            what: "program header table",
            end: header.e_phoff.saturating_add(size),
            size: head.file_size,
        });
    }
    Ok((0..count)
        .filter_map(|index| guest::parse(table, index * size_of::<Elf64_Phdr>()))
        .collect())
}

/// The protocol and its entry point. A kernel that offers PVH is entered that way unless the other
/// protocol was asked for.
fn choose_entry(
    head: &Head<'_>,
    header: &Elf64_Ehdr,
    program_headers: &[Elf64_Phdr],
    asked: Option<KernelProtocol>,
) -> Result<(KernelProtocol, u64), KernelError> {
    if asked != Some(KernelProtocol::Linux64) {
        for notes in program_headers
            .iter()
            .filter(|entry| entry.p_type == elf::PT_NOTE)
        {
            if let Some(entry) = pvh_entry(head, notes)? {
                return Ok((KernelProtocol::Pvh, entry));
            }
        }
        if asked == Some(KernelProtocol::Pvh) {
            return Err(KernelError::NoPvhEntry);
        }
    }
    Ok((KernelProtocol::Linux64, header.e_entry))
}

/// The PVH entry point, if one of the notes in a note segment gives it.
fn pvh_entry(head: &Head<'_>, segment: &Elf64_Phdr) -> Result<Option<u64>, KernelError> {
    let size = usize::try_from(segment.p_filesz).map_or(MAX_NOTES, |size| size.min(MAX_NOTES));
    let mut notes = vec![0; size];
    let read =
        guest::read_at(head.file, &mut notes, segment.p_offset).map_err(KernelError::Read)?;
    if read < size {
        return Err(KernelError::Truncated {
            what: "note segment",
            end: segment.p_offset.saturating_add(segment.p_filesz),
            size: head.file_size,
        });
    }
    Ok(find_pvh_note(&notes))
}

fn find_pvh_note(mut notes: &[u8]) -> Option<u64> {
    loop {
        let note: Elf64_Nhdr = guest::parse(notes, 0)?;
        let (_, rest) = notes.split_at_checked(size_of::<Elf64_Nhdr>())?;
        let (name, rest) = split_field(rest, note.n_namesz)?;
        let (description, rest) = split_field(rest, note.n_descsz)?;
        if note.n_type == XEN_ELFNOTE_PHYS32_ENTRY && name == b"Xen\0" {
            // The address is of 32 bits; Linux stores it in a field of 64.
            return description
                .first_chunk()
                .map(|bytes| u64::from(u32::from_le_bytes(*bytes)));
        }
        notes = rest;
    }
}

/// Splits off a note's field: `size` bytes, padded to a multiple of four.
fn split_field(bytes: &[u8], size: u32) -> Option<(&[u8], &[u8])> {
    let size = usize::try_from(size).ok()?;
    let padded = size.checked_next_multiple_of(4)?.min(bytes.len());
    Some((bytes.get(..size)?, bytes.get(padded..)?))
}

fn truncated(what: &'static str, end: usize, head: &Head<'_>) -> KernelError {
    let end = u64::try_from(end).unwrap_or(u64::MAX);
    KernelError::Truncated {
        what,
        end,
        size: head.file_size,
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use crate::BootError;

    fn refused(contents: &[u8], asked: Option<KernelProtocol>) -> KernelError {
        match boot(contents, asked) {
            Err(BootError::Kernel(error)) => error,
            other => panic!("not refused: {other:?}"),
        }
    }

    /// A kernel with `value` at `offset` of its file.
    fn patched(offset: usize, value: &[u8]) -> Vec<u8> {
        let mut contents = elf(true);
        patch(&mut contents, offset, value);
        contents
    }

    // Offsets in the file: fields of the first program header.
    const P_OFFSET: usize = 64 + 8;
    const P_PADDR: usize = 64 + 24;
    const P_FILESZ: usize = 64 + 32;
    const P_MEMSZ: usize = 64 + 40;
    /// Size of the note segment.
    const NOTES_SIZE: usize = 64 + 56 + 32;

    #[test]
    fn the_note_decides_and_the_request_can_insist() {
        let pvh = boot(&elf(true), None).unwrap();
        assert_eq!(
            (pvh.protocol, pvh.registers.rip),
            (KernelProtocol::Pvh, u64::from(PVH_ENTRY))
        );
        let linux = boot(&elf(false), None).unwrap();
        assert_eq!(
            (linux.protocol, linux.registers.rip),
            (KernelProtocol::Linux64, KERNEL)
        );
        let insisted = boot(&elf(true), Some(KernelProtocol::Linux64)).unwrap();
        assert_eq!(insisted.protocol, KernelProtocol::Linux64);
        let missing = refused(&elf(false), Some(KernelProtocol::Pvh));
        assert!(matches!(missing, KernelError::NoPvhEntry));
    }

    #[test]
    fn other_machines_and_kinds_are_refused() {
        for (offset, value, word) in [
            (4, &[1][..], "64-bit"),
            (5, &[2], "big-endian"),
            (18, &[183, 0], "another machine"),
            (16, &[1, 0], "executable"),
        ] {
            let error = refused(&patched(offset, value), None);
            assert!(matches!(error, KernelError::ElfKind(_)), "{error}");
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn a_truncated_file_says_what_is_cut_off() {
        let contents = elf(true);
        for (size, what) in [
            (5, "ELF header"),
            (63, "ELF header"),
            (64, "program header table"),
            (ELF_NOTE_OFFSET, "segment"),
            (contents.len() - 1, "segment"),
        ] {
            let error = refused(&contents[..size], None);
            let KernelError::Truncated {
                what: found,
                size: reported,
                ..
            } = error
            else {
                panic!("{size}: {error}");
            };
            assert_eq!((found, reported), (what, size as u64));
        }
    }

    #[test]
    fn segments_outside_ram_or_over_boot_structures_are_refused() {
        for address in [
            0,
            0x7000,
            layout::HIGH_MEMORY_START - 1,
            32 << 20,
            0xc000_0000,
        ] {
            let error = refused(&patched(P_PADDR, &u64::to_le_bytes(address)), None);
            assert!(
                matches!(error, KernelError::NoRoom { .. }),
                "{address:#x}: {error}"
            );
        }
        let too_big = patched(P_MEMSZ, &u64::to_le_bytes(16 << 20 | 1));
        assert!(matches!(
            refused(&too_big, None),
            KernelError::NoRoom { .. }
        ));
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        let huge = u64::MAX.to_le_bytes();
        for offset in [P_OFFSET, P_PADDR, P_MEMSZ, P_FILESZ] {
            let error = refused(&patched(offset, &huge), None);
            assert!(
                matches!(error, KernelError::ElfCorrupt(_)),
                "{offset}: {error}"
            );
        }
        for (offset, value, words) in [
            (54, 32u16, "impossible size"),
            (56, 0, "no program headers"),
            (56, 0xffff, "too many program headers"),
        ] {
            let error = refused(&patched(offset, &value.to_le_bytes()), None);
            assert!(error.to_string().contains(words), "{error}");
        }
        let no_segment = refused(&patched(64, &[0]), None);
        assert!(
            no_segment.to_string().contains("no segment to load"),
            "{no_segment}"
        );
    }

    #[test]
    fn an_entry_outside_the_segments_is_refused() {
        let outside = KERNEL + ELF_MEMORY;
        let contents = patched(24, &outside.to_le_bytes());
        let error = refused(&contents, Some(KernelProtocol::Linux64));
        assert!(matches!(error, KernelError::Entry(entry) if entry == outside));
    }

    #[test]
    fn a_note_segment_of_a_terabyte_is_not_read_whole() {
        let contents = patched(NOTES_SIZE, &u64::to_le_bytes(1 << 40));
        let file = file(&contents);
        file.set_len(2 << 40).unwrap();
        let state = crate::load(&memory(32), &request(&file)).unwrap();
        assert_eq!(state.protocol, KernelProtocol::Pvh);
    }

    #[test]
    fn notes_that_lie_about_their_sizes_have_no_entry() {
        for size in [1, 24, u32::MAX - 2, u32::MAX] {
            let mut notes = note(b"Xen\0", XEN_ELFNOTE_PHYS32_ENTRY, &[1, 0, 0, 0]);
            patch(&mut notes, 0, &size.to_le_bytes());
            assert_eq!(find_pvh_note(&notes), None, "name of {size}");
        }
        let short = note(b"Xen\0", XEN_ELFNOTE_PHYS32_ENTRY, &[]);
        assert_eq!(find_pvh_note(&short), None);
        let other_owner = note(b"GNU\0", XEN_ELFNOTE_PHYS32_ENTRY, &[1, 0, 0, 0]);
        assert_eq!(find_pvh_note(&other_owner), None);
    }

    #[test]
    fn a_note_is_found_behind_one_of_odd_length() {
        let mut notes = note(b"Linux\0\0\0", 257, &[0; 4]);
        patch(&mut notes, 0, &6u32.to_le_bytes());
        patch(&mut notes, 4, &1u32.to_le_bytes());
        notes.extend(note(
            b"Xen\0",
            XEN_ELFNOTE_PHYS32_ENTRY,
            &PVH_ENTRY.to_le_bytes(),
        ));
        assert_eq!(find_pvh_note(&notes), Some(u64::from(PVH_ENTRY)));
    }
}
