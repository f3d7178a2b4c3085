// SPDX-License-Identifier: Apache-2.0
//! The bytes of a state file that are in no encoding: its header and those of its sections.
//!
//! They say what the file is, how long, and whether it is whole, before anything in it is
//! believed. All numbers are little endian; the layout is pinned below.

use sha2::{Digest, Sha256};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The version of the layout in this module.
pub const FORMAT_VERSION: u32 = 1;

/// The architecture that this program is for, as an ELF file names it in `e_machine`.
#[cfg(target_arch = "x86_64")]
pub const ARCHITECTURE: u32 = 62;
#[cfg(target_arch = "aarch64")]
/// The architecture that this program is for, as an ELF file names it in `e_machine`.
pub const ARCHITECTURE: u32 = 183;

/// The first bytes of each state file.
pub(crate) const MAGIC: [u8; 8] = *b"BRUMESNP";
/// How Firecracker's state files can be known, on either architecture.
const FIRECRACKER_MAGICS: [[u8; 8]; 2] = [
    0x0710_1984_8664_0000_u64.to_le_bytes(),
    0x0710_1984_AAAA_0000_u64.to_le_bytes(),
];
/// How far into a file to look for those: its encoding puts a few lengths before them.
const FIRECRACKER_PREFIX: usize = 4096;
/// The longest name of a kind of section, in bytes.
pub(crate) const KIND_BYTES: usize = 16;

pub(crate) const HEADER_BYTES: usize = size_of::<Header>();
pub(crate) const SECTION_HEADER_BYTES: usize = size_of::<SectionHeader>();

/// The start of the file.
#[derive(Clone, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Header {
    pub(crate) magic: [u8; 8],
    pub(crate) format_version: U32,
    /// `e_machine` of an ELF file.
    pub(crate) architecture: U32,
    pub(crate) sections: U32,
    /// 0.
    pub(crate) reserved: U32,
    /// Of the whole file, in bytes.
    pub(crate) length: U64,
    /// SHA-256 of the whole file with zeros for this field.
    pub(crate) checksum: [u8; 32],
}

/// What stands before the payload of each section.
#[derive(Clone, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct SectionHeader {
    /// ASCII, filled up with NULs.
    pub(crate) kind: [u8; KIND_BYTES],
    pub(crate) id: U32,
    pub(crate) version: U32,
    /// Of the payload, in bytes.
    pub(crate) length: U64,
}

// A file that was written today is read by the programs of years to come.
const _: () = {
    use std::mem::offset_of;
    assert!(HEADER_BYTES == 64);
    assert!(offset_of!(Header, magic) == 0);
    assert!(offset_of!(Header, format_version) == 8);
    assert!(offset_of!(Header, architecture) == 12);
    assert!(offset_of!(Header, sections) == 16);
    assert!(offset_of!(Header, reserved) == 20);
    assert!(offset_of!(Header, length) == 24);
    assert!(offset_of!(Header, checksum) == 32);
    assert!(SECTION_HEADER_BYTES == 32);
    assert!(offset_of!(SectionHeader, kind) == 0);
    assert!(offset_of!(SectionHeader, id) == 16);
    assert!(offset_of!(SectionHeader, version) == 20);
    assert!(offset_of!(SectionHeader, length) == 24);
};

/// What a machine of this architecture is called.
pub(crate) fn architecture_name(architecture: u32) -> String {
    match architecture {
        62 => "x86_64".into(),
        183 => "aarch64".into(),
        other => format!("ELF machine {other}"),
    }
}

/// SHA-256 of a file of which `bytes` are all, whatever its checksum field holds.
pub(crate) fn checksum(header: &Header, rest: &[u8]) -> [u8; 32] {
    let mut header = header.clone();
    header.checksum = [0; 32];
    let mut hash = Sha256::new();
    hash.update(header.as_bytes());
    hash.update(rest);
    hash.finalize().into()
}

/// The name of a kind, or `None` for what no writer makes: an empty one, one that would not print,
/// or something after the NULs.
pub(crate) fn kind_name(bytes: &[u8; KIND_BYTES]) -> Option<&str> {
    let end = bytes.iter().position(|&byte| byte == 0);
    let (name, padding) = bytes.split_at(end.unwrap_or(KIND_BYTES));
    let valid = is_kind(name) && padding.iter().all(|&byte| byte == 0);
    std::str::from_utf8(name).ok().filter(|_| valid)
}

/// The bytes of a name for which [`is_kind`] holds.
pub(crate) fn kind_bytes(name: &str) -> [u8; KIND_BYTES] {
    let mut bytes = [0; KIND_BYTES];
    for (to, from) in bytes.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    bytes
}

/// Whether this can name a kind of section: 1 to 16 printing characters of ASCII.
pub(crate) const fn is_kind(name: &[u8]) -> bool {
    let mut rest = name;
    while let [first, tail @ ..] = rest {
        if !first.is_ascii_graphic() {
            return false;
        }
        rest = tail;
    }
    !name.is_empty() && name.len() <= KIND_BYTES
}

/// Whether the file seems to be a state file of Firecracker's.
pub(crate) fn looks_like_firecracker(bytes: &[u8]) -> bool {
    let start = bytes.get(..FIRECRACKER_PREFIX).unwrap_or(bytes);
    start
        .windows(8)
        .any(|window| FIRECRACKER_MAGICS.iter().any(|magic| magic == window))
}
