// SPDX-License-Identifier: Apache-2.0
//! What can be wrong with a state file. The texts do not name the file: whoever has its path does.

use std::io;

use thiserror::Error;

use crate::layout::{ARCHITECTURE, FORMAT_VERSION, HEADER_BYTES, architecture_name};

/// Why a state file cannot be read or written.
#[derive(Debug, Error)]
pub enum StateError {
    /// The system would not open or read it.
    #[error("it cannot be read")]
    Read(#[source] io::Error),
    /// It is a directory, a pipe or a device.
    #[error("it is not a regular file")]
    NotAFile,
    /// There is more of it than any machine has.
    #[error("a state file has at most {limit} bytes, and this has {length}")]
    TooBig {
        /// How many bytes there are, or how many at least.
        length: u64,
        /// How many there may be.
        limit: u64,
    },
    /// It ends within its header. Clients of Firecracker look for the first words.
    #[error(
        "IO Error: File too short to contain CRC: it has {0} bytes, and its header has {HEADER_BYTES}"
    )]
    TooShort(usize),
    /// It is another program's.
    #[error("it is not a snapshot of brume: its first 8 bytes are not \"BRUMESNP\"")]
    NotASnapshot,
    /// It is Firecracker's.
    #[error(
        "it is a snapshot of Firecracker's, not of brume: each reads only its own, so start the \
         machine anew and save it with brume"
    )]
    Firecracker,
    /// Another version of the layout.
    #[error(
        "its format has version {0}, and this brume knows up to {FORMAT_VERSION}: {reason}",
        reason = if *.0 > FORMAT_VERSION { "it was made by a newer brume" } else { "it is damaged" }
    )]
    FormatVersion(u32),
    /// It is of a machine that does not exist here.
    #[error(
        "it is of a machine for {}, and this brume is for {}",
        architecture_name(*.0), architecture_name(ARCHITECTURE)
    )]
    Architecture(u32),
    /// Bytes at its end are gone.
    #[error("it is cut off: {} bytes are missing of {expected}", expected.saturating_sub(*found))]
    Cut {
        /// How many bytes the header tells of.
        expected: u64,
        /// How many there are.
        found: u64,
    },
    /// There are bytes after its end.
    #[error("it ends at byte {expected}, and {} more bytes follow", found.saturating_sub(*expected))]
    Excess {
        /// How many bytes the header tells of.
        expected: u64,
        /// How many there are.
        found: u64,
    },
    /// Some bit has changed since it was written.
    #[error("it is damaged: its SHA-256 is {found}, and was {expected} when it was written")]
    Checksum {
        /// In its header, as hexadecimal digits.
        expected: String,
        /// What it really is.
        found: String,
    },
    /// The bytes are as they were written, but no writer makes such ones.
    #[error("it is malformed at byte {offset}: {problem}")]
    Malformed {
        /// Where, in bytes from the start of the file.
        offset: u64,
        /// What is wrong there.
        problem: String,
    },
    /// Two sections go by one name.
    #[error("section \"{kind}\" {id} is there twice, the second time at byte {offset}")]
    Repeated {
        /// Kind of the section.
        kind: String,
        /// Id of the section.
        id: u32,
        /// Where the second one starts.
        offset: u64,
    },
    /// A section that the machine needs.
    #[error("section \"{kind}\" {id} is missing")]
    Missing {
        /// Kind of the section.
        kind: String,
        /// Id of the section.
        id: u32,
    },
    /// A section that nobody knows. What it holds would be lost.
    #[error(
        "unknown section \"{kind}\" {id} at byte {offset}: it was made by a newer brume, or for \
         something that this machine does not have"
    )]
    Unknown {
        /// Kind of the section.
        kind: String,
        /// Id of the section.
        id: u32,
        /// Where it starts.
        offset: u64,
    },
    /// A section of the future.
    #[error(
        "section \"{kind}\" {id} has version {version}, and this brume knows up to {known}: it was \
         made by a newer brume"
    )]
    Newer {
        /// Kind of the section.
        kind: String,
        /// Id of the section.
        id: u32,
        /// Its version.
        version: u32,
        /// The last version that is known.
        known: u32,
    },
    /// A section of the past that could not be brought up to date.
    #[error("section \"{kind}\" {id} has version {version}, which cannot be read any more")]
    Upgrade {
        /// Kind of the section.
        kind: String,
        /// Id of the section.
        id: u32,
        /// Its version.
        version: u32,
        /// Why not.
        source: UpgradeError,
    },
    /// What is in a section is not what its kind has.
    #[error("section \"{kind}\" {id}, whose content starts at byte {offset}, is malformed")]
    Content {
        /// Kind of the section.
        kind: String,
        /// Id of the section.
        id: u32,
        /// Where its content starts; places in the cause count from there.
        offset: u64,
        /// What does not fit.
        source: serde_json::Error,
    },
    /// A value that is to be written has no form in JSON.
    #[error("section \"{kind}\" {id} cannot be written")]
    Encode {
        /// Kind of the section.
        kind: &'static str,
        /// Id of the section.
        id: u32,
        /// Why not.
        source: serde_json::Error,
    },
}

/// Why a section of an older version cannot be brought up to date.
#[derive(Debug, Error)]
pub enum UpgradeError {
    /// Nobody reads that version any more.
    #[error("load it with the brume that made it")]
    TooOld,
    /// It is not what that version had.
    #[error("{0}")]
    Malformed(String),
}

impl From<serde_json::Error> for UpgradeError {
    fn from(error: serde_json::Error) -> Self {
        Self::Malformed(error.to_string())
    }
}
