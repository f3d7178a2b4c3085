// SPDX-License-Identifier: Apache-2.0
//! What the frames that have come say. Every number in them is one that the other side has made up.

use super::{ChannelError, DISK_ZEROS};
use crate::compress::{Codec, Unpacker};
use crate::frame::{Header, Kind};
use crate::message::Message;
use crate::pages::PagesIn;
use crate::state::MOST_STATE;

/// The most parts that a message may consist of: in memory each takes some hundred bytes.
const MESSAGE_PARTS: usize = 128 << 10;
/// The highest page number, and one more than the last that a run may have.
const PAGES_END: u64 = 1 << 52;

/// A frame that has come.
#[derive(Debug)]
pub enum Received<'a> {
    /// A message.
    Message(Message),
    /// Pages.
    Pages(PagesIn<'a>),
    /// A part of a machine's state.
    State {
        /// Where in the state it is, in bytes.
        offset: u64,
        /// Whether it is the last one.
        last: bool,
        /// What it is.
        bytes: &'a [u8],
    },
    /// Pages that follow later, as words of a bitmap: bit `n` of word `m` is page `64 m + n`.
    Missing {
        /// The number of the first word.
        first_word: u64,
        /// The words, little endian.
        bytes: &'a [u8],
    },
    /// Pages that are wanted now.
    Need {
        /// The first.
        first: u64,
        /// How many.
        pages: u32,
    },
    /// Blocks of a drive.
    Disk {
        /// The number of the drive.
        drive: u32,
        /// Where on it they are, in bytes.
        offset: u64,
        /// What they are.
        bytes: &'a [u8],
    },
    /// Blocks of a drive that are zeros.
    DiskZeros {
        /// The number of the drive.
        drive: u32,
        /// Where on it they are, in bytes.
        offset: u64,
        /// How many bytes they have; their end fits into 64 bits.
        length: u64,
    },
}

impl Received<'_> {
    /// The message that it is to be.
    pub(super) fn message(self) -> Result<Message, ChannelError> {
        match self {
            Self::Message(message) => Ok(message),
            other => Err(ChannelError::OutOfTurn(other.name())),
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Message(_) => "a message",
            Self::Pages(_) => "pages",
            Self::State { .. } => "a machine's state",
            Self::Missing { .. } => "a list of missing pages",
            Self::Need { .. } => "a request for pages",
            Self::Disk { .. } | Self::DiskZeros { .. } => "blocks of a disk",
        }
    }
}

/// What a frame says whose checksum is right.
pub(super) fn understand<'a>(
    header: &Header,
    payload: &'a [u8],
    unpacker: &'a mut Unpacker,
) -> Result<Received<'a>, ChannelError> {
    let Header {
        kind,
        codec,
        count,
        argument,
        ..
    } = *header;
    let codec = Codec::from_number(codec)?;
    if codec != Codec::None && kind != Kind::Pages {
        return Err(ChannelError::Malformed(
            "something compressed that is no pages",
        ));
    }
    match kind {
        Kind::Message => message(payload).map(Received::Message),
        Kind::Pages => pages(codec, count, payload, unpacker),
        Kind::State => state(count, argument, payload),
        Kind::Missing => missing(argument, payload),
        Kind::Need => {
            let end = argument.checked_add(count.into());
            if count == 0 || end.is_none_or(|end| end > PAGES_END) {
                return Err(ChannelError::Malformed(
                    "a request for pages that cannot be",
                ));
            }
            Ok(Received::Need {
                first: argument,
                pages: count,
            })
        }
        Kind::Disk => disk(count, argument, payload),
    }
}

/// Reads a message. Text of a few bytes can take a hundred times as much once it is read, so its
/// parts are counted before.
fn message(text: &[u8]) -> Result<Message, ChannelError> {
    let begins_a_part = |byte: &&u8| matches!(byte, b',' | b'[' | b'{');
    if text.iter().filter(begins_a_part).count() > MESSAGE_PARTS {
        return Err(ChannelError::Malformed("a message of too many parts"));
    }
    serde_json::from_slice(text).map_err(ChannelError::Message)
}

fn pages<'a>(
    codec: Codec,
    count: u32,
    payload: &'a [u8],
    unpacker: &'a mut Unpacker,
) -> Result<Received<'a>, ChannelError> {
    let length = PagesIn::table_length(count)?;
    let parts = payload.split_at_checked(length);
    let (table, data) = parts.ok_or(ChannelError::Malformed(
        "a table of pages that is longer than its frame",
    ))?;
    let data = unpacker.unpack(codec, data, PagesIn::data_length(table)?)?;
    Ok(Received::Pages(PagesIn::new(table, data)?))
}

fn state(last: u32, offset: u64, bytes: &[u8]) -> Result<Received<'_>, ChannelError> {
    let end = offset.checked_add(bytes.len() as u64);
    if last > 1 || end.is_none_or(|end| end > MOST_STATE as u64) {
        return Err(ChannelError::Malformed("a state that is too long"));
    }
    Ok(Received::State {
        offset,
        last: last == 1,
        bytes,
    })
}

fn missing(first_word: u64, bytes: &[u8]) -> Result<Received<'_>, ChannelError> {
    let end = first_word.checked_add((bytes.len() / 8) as u64);
    if !bytes.len().is_multiple_of(8) || end.is_none_or(|end| end > PAGES_END / 64) {
        return Err(ChannelError::Malformed(
            "a list of missing pages that cannot be",
        ));
    }
    Ok(Received::Missing { first_word, bytes })
}

fn disk(count: u32, offset: u64, bytes: &[u8]) -> Result<Received<'_>, ChannelError> {
    let bad = || ChannelError::Malformed("blocks of a disk that cannot be");
    let drive = count & !DISK_ZEROS;
    if count & DISK_ZEROS == 0 {
        offset.checked_add(bytes.len() as u64).ok_or_else(bad)?;
        return Ok(Received::Disk {
            drive,
            offset,
            bytes,
        });
    }
    let length = u64::from_le_bytes(bytes.try_into().map_err(|_| bad())?);
    offset.checked_add(length).ok_or_else(bad)?;
    Ok(Received::DiskZeros {
        drive,
        offset,
        length,
    })
}
