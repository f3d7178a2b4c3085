// SPDX-License-Identifier: Apache-2.0
//! Small kernels made by hand, for tests: correct as they are, to be broken byte by byte.

use std::fs::File;
use std::io::Write;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::{BootError, BootRequest, BootState, DeviceArguments, KernelProtocol};

/// Where the kernels go and start.
pub(super) const KERNEL: u64 = 0x100_0000;
/// PVH entry point of [`elf`].
pub(super) const PVH_ENTRY: u32 = 0x100_0040;
/// Memory that the ELF kernel needs, of which [`CODE`] is in the file.
pub(super) const ELF_MEMORY: u64 = 0x5000;
/// The kernels' contents.
pub(super) const CODE: [u8; 0x1000] = [0x90; 0x1000];
/// Offset of [`CODE`] in the ELF file, and of the note segment.
pub(super) const ELF_CODE_OFFSET: usize = 0x1000;
pub(super) const ELF_NOTE_OFFSET: usize = 0x200;
/// Offset of [`CODE`] in the bzImage.
pub(super) const BZIMAGE_CODE_OFFSET: usize = 0x400;
/// `init_size` of the bzImage.
pub(super) const BZIMAGE_MEMORY: u64 = 0x20_0000;

/// Overwrites the bytes at `offset`.
pub(super) fn patch(bytes: &mut [u8], offset: usize, value: &[u8]) {
    bytes[offset..offset + value.len()].copy_from_slice(value);
}

/// An ELF kernel with one loadable segment and, if asked for, a note with a PVH entry after a note
/// that is something else.
pub(super) fn elf(with_pvh: bool) -> Vec<u8> {
    let mut notes = note(b"GNU\0", 3, &[0xaa; 20]);
    if with_pvh {
        // As Linux has it: the address in a field of 64 bits.
        notes.extend(note(b"Xen\0", 18, &u64::from(PVH_ENTRY).to_le_bytes()));
    }
    let mut bytes = vec![0; ELF_CODE_OFFSET];
    patch(&mut bytes, 0, b"\x7fELF\x02\x01\x01");
    patch(&mut bytes, 16, &2u16.to_le_bytes()); // e_type
    patch(&mut bytes, 18, &62u16.to_le_bytes()); // e_machine
    patch(&mut bytes, 24, &KERNEL.to_le_bytes()); // e_entry
    patch(&mut bytes, 32, &64u64.to_le_bytes()); // e_phoff
    patch(&mut bytes, 54, &56u16.to_le_bytes()); // e_phentsize
    patch(&mut bytes, 56, &2u16.to_le_bytes()); // e_phnum
    let code = [
        ELF_CODE_OFFSET as u64,
        0,
        KERNEL,
        CODE.len() as u64,
        ELF_MEMORY,
        0,
    ];
    let note = [
        ELF_NOTE_OFFSET as u64,
        0,
        0,
        notes.len() as u64,
        notes.len() as u64,
        4,
    ];
    for (index, (kind, fields)) in [(1u32, code), (4u32, note)].into_iter().enumerate() {
        let header = 64 + index * 56;
        patch(&mut bytes, header, &kind.to_le_bytes());
        patch(
            &mut bytes,
            header + 8,
            fields.map(u64::to_le_bytes).as_flattened(),
        );
    }
    patch(&mut bytes, ELF_NOTE_OFFSET, &notes);
    bytes.extend(CODE);
    bytes
}

/// An ELF note whose name and description are whole words.
pub(super) fn note(name: &[u8], kind: u32, description: &[u8]) -> Vec<u8> {
    let sizes = [low(name.len() as u64), low(description.len() as u64), kind];
    [
        sizes.map(u32::to_le_bytes).as_flattened(),
        name,
        description,
    ]
    .concat()
}

/// A bzImage with one setup sector.
pub(super) fn bzimage() -> Vec<u8> {
    let mut bytes = vec![0; BZIMAGE_CODE_OFFSET];
    bytes[0x1f1] = 1; // setup_sects
    patch(
        &mut bytes,
        0x1f4,
        &(low(CODE.len() as u64) / 16).to_le_bytes(),
    ); // syssize
    patch(&mut bytes, 0x1fe, &0xaa55u16.to_le_bytes());
    patch(&mut bytes, 0x200, &[0xeb, 0x6a]); // jump over the header, to 0x26c
    patch(&mut bytes, 0x202, b"HdrS");
    patch(&mut bytes, 0x206, &0x020fu16.to_le_bytes()); // version
    bytes[0x211] = 1; // loadflags
    patch(&mut bytes, 0x22c, &0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
    patch(&mut bytes, 0x230, &0x20_0000u32.to_le_bytes()); // kernel_alignment
    bytes[0x234] = 1; // relocatable_kernel
    patch(&mut bytes, 0x236, &1u16.to_le_bytes()); // xloadflags
    patch(&mut bytes, 0x238, &2047u32.to_le_bytes()); // cmdline_size
    patch(&mut bytes, 0x258, &KERNEL.to_le_bytes()); // pref_address
    patch(&mut bytes, 0x260, &low(BZIMAGE_MEMORY).to_le_bytes()); // init_size
    bytes.extend(CODE);
    bytes
}

pub(super) fn file(contents: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(contents).unwrap();
    file
}

pub(super) fn memory(mib: usize) -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), mib << 20)]).unwrap()
}

/// A request for one vCPU without devices.
pub(super) fn request(kernel: &File) -> BootRequest<'_> {
    BootRequest {
        kernel,
        initrd: None,
        cmdline: "console=ttyS0",
        protocol: None,
        vcpus: 1,
        devices: &[],
        device_arguments: DeviceArguments::WithoutAcpi,
    }
}

/// Loads a kernel into 32 MiB.
pub(super) fn boot(
    contents: &[u8],
    protocol: Option<KernelProtocol>,
) -> Result<BootState, BootError> {
    crate::load(
        &memory(32),
        &BootRequest {
            protocol,
            ..request(&file(contents))
        },
    )
}

/// The message of an error with its sources, as the program prints it.
pub(super) fn message(error: &BootError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

pub(super) fn bytes_at(memory: &GuestMemoryMmap, address: u64, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    memory
        .read_slice(&mut bytes, GuestAddress(address))
        .unwrap();
    bytes
}

/// The sum of all bytes, which is zero where a checksum is right.
pub(super) fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

pub(super) fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(*bytes[offset..].first_chunk().unwrap())
}

pub(super) fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(*bytes[offset..].first_chunk().unwrap())
}

pub(super) fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(*bytes[offset..].first_chunk().unwrap())
}

/// A number that is known to fit into 32 bits.
pub(super) fn low(number: u64) -> u32 {
    u32::try_from(number).unwrap()
}
