// SPDX-License-Identifier: Apache-2.0
//! The state file: a header, then named sections of JSON.
//!
//! A section is found by its kind and id, so the order of sections means nothing. A reader takes
//! the sections that it knows and then calls [`StateFile::finish`]: what nobody took is state that
//! would be lost. The file may come from anyone, so nothing is allocated because of a number in it,
//! and a checksum that holds says nothing good of the contents.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use zerocopy::{FromBytes, IntoBytes};

use crate::error::{StateError, UpgradeError};
use crate::layout::{
    ARCHITECTURE, FORMAT_VERSION, HEADER_BYTES, Header, MAGIC, SECTION_HEADER_BYTES, SectionHeader,
    checksum, is_kind, kind_bytes, kind_name, looks_like_firecracker,
};

/// The largest state file, in bytes.
pub(crate) const MAX_FILE_BYTES: u64 = 64 << 20;

/// In the place of a checksum: there is none.
const UNSEALED: [u8; 32] = [0; 32];

/// Something that has a section of its own in a state file.
pub trait Saved: Serialize + DeserializeOwned {
    /// What its section is called: 1 to 16 printing characters of ASCII.
    const KIND: &'static str;
    /// The version of its form in JSON, from 1; raised whenever an older reader would read a new
    /// section wrong.
    const VERSION: u32;

    /// Makes the content of the current version from that of an older one; called only for a
    /// version below [`Saved::VERSION`].
    ///
    /// # Errors
    ///
    /// That version is not read any more, or the content is not what it had.
    fn upgrade(_version: u32, _value: Value) -> Result<Value, UpgradeError> {
        Err(UpgradeError::TooOld)
    }
}

/// Puts a state file together, in memory.
#[derive(Debug, Default)]
pub struct StateWriter {
    names: BTreeSet<(&'static str, u32)>,
    sections: Vec<u8>,
}

impl StateWriter {
    /// Begins a file without sections.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the section `T::KIND` `id`.
    ///
    /// # Errors
    ///
    /// There is one of that name already, the value has no form in JSON, or the file gets larger
    /// than one that would be read.
    pub fn push<T: Saved>(&mut self, id: u32, value: &T) -> Result<(), StateError> {
        const { assert!(is_kind(T::KIND.as_bytes())) };
        let kind = T::KIND;
        let payload =
            serde_json::to_vec(value).map_err(|source| StateError::Encode { kind, id, source })?;
        let offset = self.length();
        let after = offset + (SECTION_HEADER_BYTES + payload.len()) as u64;
        if after > MAX_FILE_BYTES {
            return Err(StateError::TooBig {
                length: after,
                limit: MAX_FILE_BYTES,
            });
        }
        if !self.names.insert((kind, id)) {
            let kind = kind.to_owned();
            return Err(StateError::Repeated { kind, id, offset });
        }
        let header = SectionHeader {
            kind: kind_bytes(kind),
            id: id.into(),
            version: T::VERSION.into(),
            length: (payload.len() as u64).into(),
        };
        self.sections.extend_from_slice(header.as_bytes());
        self.sections.extend_from_slice(&payload);
        Ok(())
    }

    /// The whole file, with its header and checksum.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        let mut header = self.header();
        header.checksum = checksum(&header, &self.sections);
        self.with_header(&header)
    }

    /// The whole file, but for a way that has checksums of its own: without one, which takes long.
    /// Only [`StateFile::parse_unsealed`] reads it.
    #[must_use]
    pub fn finish_unsealed(self) -> Vec<u8> {
        self.with_header(&self.header())
    }

    /// The header of what there is, without a checksum.
    fn header(&self) -> Header {
        Header {
            magic: MAGIC,
            format_version: FORMAT_VERSION.into(),
            architecture: ARCHITECTURE.into(),
            // The limit of the file's size keeps the count far below 2^32.
            sections: u32::try_from(self.names.len()).unwrap_or(u32::MAX).into(),
            reserved: 0.into(),
            length: self.length().into(),
            checksum: UNSEALED,
        }
    }

    fn with_header(&self, header: &Header) -> Vec<u8> {
        let mut file = Vec::with_capacity(HEADER_BYTES + self.sections.len());
        file.extend_from_slice(header.as_bytes());
        file.extend_from_slice(&self.sections);
        file
    }

    /// How long the file is so far, in bytes.
    fn length(&self) -> u64 {
        (HEADER_BYTES + self.sections.len()) as u64
    }
}

/// A section as it is in the file.
#[derive(Debug)]
pub struct Section {
    kind: String,
    id: u32,
    version: u32,
    /// Of its header, in the file.
    offset: u64,
    payload: Box<[u8]>,
}

impl Section {
    /// What it is of, such as `vcpu`; printing characters of ASCII.
    #[must_use]
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// Which one of its kind it is.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The version of its content's form.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.version
    }

    /// How long its content is, in bytes.
    #[must_use]
    pub fn length(&self) -> usize {
        self.payload.len()
    }

    /// What it holds, whether or not this program knows its kind and version.
    ///
    /// # Errors
    ///
    /// It is not JSON.
    pub fn content(&self) -> Result<Value, StateError> {
        serde_json::from_slice(&self.payload).map_err(|source| self.malformed(source))
    }

    /// What it holds, as what it is.
    fn decode<T: Saved>(&self) -> Result<T, StateError> {
        let (kind, id, version) = (self.kind.clone(), self.id, self.version);
        if version == T::VERSION {
            serde_json::from_slice(&self.payload).map_err(|source| self.malformed(source))
        } else if version > T::VERSION {
            Err(StateError::Newer {
                kind,
                id,
                version,
                known: T::VERSION,
            })
        } else {
            let value = T::upgrade(version, self.content()?);
            let value = value.map_err(|source| StateError::Upgrade {
                kind,
                id,
                version,
                source,
            })?;
            serde_json::from_value(value).map_err(|source| self.malformed(source))
        }
    }

    fn malformed(&self, source: serde_json::Error) -> StateError {
        StateError::Content {
            kind: self.kind.clone(),
            id: self.id,
            offset: self.offset + SECTION_HEADER_BYTES as u64,
            source,
        }
    }
}

/// A state file that is whole: its sections, each of which can be taken once.
#[derive(Debug)]
pub struct StateFile {
    sections: Vec<Section>,
}

impl StateFile {
    /// Reads a file of at most 64 MiB.
    ///
    /// # Errors
    ///
    /// It cannot be read, is no regular file, is too big, or see [`StateFile::parse`].
    pub fn read(path: &Path) -> Result<Self, StateError> {
        Self::parse(&read_limited(path)?)
    }

    /// Checks the bytes of a file and finds its sections.
    ///
    /// # Errors
    ///
    /// The bytes are not, to the last bit, what a writer of this format version made for this
    /// architecture.
    pub fn parse(bytes: &[u8]) -> Result<Self, StateError> {
        Scan::of(bytes).whole()
    }

    /// As [`StateFile::parse`], for what [`StateWriter::finish_unsealed`] has made.
    ///
    /// # Errors
    ///
    /// The bytes have another form, or a checksum.
    pub fn parse_unsealed(bytes: &[u8]) -> Result<Self, StateError> {
        Scan::with_seal(bytes, |_, _| UNSEALED).whole()
    }

    /// The sections that have not been taken.
    pub fn sections(&self) -> impl Iterator<Item = &Section> {
        self.sections.iter()
    }

    /// Takes the section `T::KIND` `id`.
    ///
    /// # Errors
    ///
    /// It is not there (any more), is of a newer version, or its content is not a `T`.
    pub fn take<T: Saved>(&mut self, id: u32) -> Result<T, StateError> {
        self.take_optional(id)?.ok_or_else(|| missing::<T>(id))
    }

    /// Takes the section `T::KIND` `id` if it is there.
    ///
    /// # Errors
    ///
    /// It is of a newer version, or its content is not a `T`.
    pub fn take_optional<T: Saved>(&mut self, id: u32) -> Result<Option<T>, StateError> {
        let place = |section: &Section| section.kind == T::KIND && section.id == id;
        let Some(index) = self.sections.iter().position(place) else {
            return Ok(None);
        };
        self.sections.remove(index).decode().map(Some)
    }

    /// Takes all sections of `T`'s kind, in the order of their ids, which are 0, 1, 2 and so on.
    ///
    /// # Errors
    ///
    /// An id is left out, or one of them is of a newer version or does not hold a `T`.
    pub fn take_all<T: Saved>(&mut self) -> Result<Vec<T>, StateError> {
        let (mut taken, rest) = std::mem::take(&mut self.sections)
            .into_iter()
            .partition::<Vec<_>, _>(|section| section.kind == T::KIND);
        self.sections = rest;
        taken.sort_by_key(Section::id);
        (0_u32..)
            .zip(&taken)
            .map(|(id, section)| match section.id == id {
                true => section.decode(),
                false => Err(missing::<T>(id)),
            })
            .collect()
    }

    /// Ends the reading.
    ///
    /// # Errors
    ///
    /// There is a section that nobody took.
    pub fn finish(self) -> Result<(), StateError> {
        let Some(section) = self.sections.into_iter().next() else {
            return Ok(());
        };
        Err(StateError::Unknown {
            kind: section.kind,
            id: section.id,
            offset: section.offset,
        })
    }
}

fn missing<T: Saved>(id: u32) -> StateError {
    StateError::Missing {
        kind: T::KIND.to_owned(),
        id,
    }
}

/// The bytes of a file that is regular and not too big.
pub(crate) fn read_limited(path: &Path) -> Result<Vec<u8>, StateError> {
    // Opening a pipe that nobody writes to would wait for a writer.
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_NONBLOCK);
    let file = options.open(path).map_err(StateError::Read)?;
    let metadata = file.metadata().map_err(StateError::Read)?;
    if !metadata.is_file() {
        return Err(StateError::NotAFile);
    }
    let length = metadata.len();
    if length > MAX_FILE_BYTES {
        return Err(too_big(length));
    }
    let mut bytes = Vec::new();
    // It may grow while it is read.
    Read::take(&file as &File, MAX_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(StateError::Read)?;
    Ok(bytes)
}

fn too_big(length: u64) -> StateError {
    StateError::TooBig {
        length,
        limit: MAX_FILE_BYTES,
    }
}

/// All that can be found in a file, which may be damaged.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    /// The header, if the file is a state file at all.
    pub(crate) header: Option<Header>,
    /// The sections up to the place where they cannot be followed any more.
    pub(crate) sections: Vec<Section>,
    /// The first thing that is wrong.
    pub(crate) damage: Option<StateError>,
}

impl Scan {
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self::with_seal(bytes, checksum)
    }

    /// As [`Scan::of`] where `seal` makes checksums.
    fn with_seal(bytes: &[u8], seal: Seal) -> Self {
        let mut scan = Self::default();
        let (header, body) = match read_header(bytes) {
            Ok(found) => found,
            Err(error) => {
                scan.damage = Some(error);
                return scan;
            }
        };
        let format_version = header.format_version.get();
        scan.header = Some(header.clone());
        scan.damage = check_header(&header, body, seal).err();
        // Another version's sections may look different.
        if format_version == FORMAT_VERSION {
            let count = header.sections.get();
            let found = read_sections(body, count, &mut scan.sections);
            scan.damage = scan.damage.or(found.err());
        }
        scan
    }

    fn whole(self) -> Result<StateFile, StateError> {
        match self.damage {
            Some(error) => Err(error),
            None => Ok(StateFile {
                sections: self.sections,
            }),
        }
    }
}

/// What makes the checksum of a header and what comes after it.
type Seal = fn(&Header, &[u8]) -> [u8; 32];

fn read_header(bytes: &[u8]) -> Result<(Header, &[u8]), StateError> {
    let Ok((header, body)) = Header::read_from_prefix(bytes) else {
        return Err(StateError::TooShort(bytes.len()));
    };
    if header.magic == MAGIC {
        Ok((header, body))
    } else if looks_like_firecracker(bytes) {
        Err(StateError::Firecracker)
    } else {
        Err(StateError::NotASnapshot)
    }
}

/// Whether the file is for this program, and whole.
fn check_header(header: &Header, body: &[u8], seal: Seal) -> Result<(), StateError> {
    let version = header.format_version.get();
    if version != FORMAT_VERSION {
        return Err(StateError::FormatVersion(version));
    }
    let architecture = header.architecture.get();
    if architecture != ARCHITECTURE {
        return Err(StateError::Architecture(architecture));
    }
    let expected = header.length.get();
    let found = (HEADER_BYTES + body.len()) as u64;
    if found < expected {
        return Err(StateError::Cut { expected, found });
    }
    if found > expected {
        return Err(StateError::Excess { expected, found });
    }
    if found > MAX_FILE_BYTES {
        return Err(too_big(found));
    }
    let checksum = seal(header, body);
    if checksum != header.checksum {
        return Err(StateError::Checksum {
            expected: hex(&header.checksum),
            found: hex(&checksum),
        });
    }
    if header.reserved.get() != 0 {
        return Err(StateError::Malformed {
            offset: std::mem::offset_of!(Header, reserved) as u64,
            problem: "this field is 0 in all files".into(),
        });
    }
    Ok(())
}

/// Finds `count` sections, which are all of `body`.
fn read_sections(body: &[u8], count: u32, sections: &mut Vec<Section>) -> Result<(), StateError> {
    let mut names = BTreeSet::new();
    let mut rest = body;
    for number in 0..count {
        let offset = (HEADER_BYTES + body.len() - rest.len()) as u64;
        let malformed = |problem| StateError::Malformed { offset, problem };
        let Ok((header, after)) = SectionHeader::read_from_prefix(rest) else {
            let left = rest.len();
            return Err(malformed(format!(
                "{count} sections were written, and of number {number} only {left} bytes are there"
            )));
        };
        let Some(kind) = kind_name(&header.kind) else {
            return Err(malformed("a section has no proper name".into()));
        };
        let length = header.length.get();
        let split = usize::try_from(length).ok();
        let Some((payload, next)) = split.and_then(|at| after.split_at_checked(at)) else {
            let left = after.len();
            return Err(malformed(format!(
                "section \"{kind}\" has {length} bytes, and only {left} are there"
            )));
        };
        let (kind, id) = (kind.to_owned(), header.id.get());
        if !names.insert((header.kind, id)) {
            return Err(StateError::Repeated { kind, id, offset });
        }
        sections.push(Section {
            kind,
            id,
            version: header.version.get(),
            offset,
            payload: payload.into(),
        });
        rest = next;
    }
    if rest.is_empty() {
        return Ok(());
    }
    Err(StateError::Malformed {
        offset: (HEADER_BYTES + body.len() - rest.len()) as u64,
        problem: format!("{} bytes follow the last section", rest.len()),
    })
}

/// Bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
