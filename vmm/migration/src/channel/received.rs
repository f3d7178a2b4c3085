// SPDX-License-Identifier: Apache-2.0
//! What comes in a frame.

use super::ChannelError;
use crate::compress::{Codec, Unpacker};
use crate::frame::{Header, Kind};
use crate::message::Message;
use crate::pages::PagesIn;

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
    /// Zeros on a drive.
    DiskZeros {
        /// The number of the drive.
        drive: u32,
        /// Where on it they are, in bytes.
        offset: u64,
        /// How many, in bytes.
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
            Self::Disk { .. } => "blocks of a disk",
            Self::DiskZeros { .. } => "zeros of a disk",
        }
    }
}

/// What a frame is, of which the checksum is right.
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
    Ok(match kind {
        Kind::Message => {
            let message = serde_json::from_slice(payload).map_err(ChannelError::Message)?;
            Received::Message(message)
        }
        Kind::Pages => {
            let length = PagesIn::table_length(count)?;
            let (table, data) = payload
                .split_at_checked(length)
                .ok_or(ChannelError::Malformed(
                    "a table of pages that is longer than its frame",
                ))?;
            let data = unpacker.unpack(codec, data, PagesIn::data_length(table)?)?;
            Received::Pages(PagesIn::new(table, data)?)
        }
        Kind::State => Received::State {
            offset: argument,
            last: count != 0,
            bytes: payload,
        },
        Kind::Missing => Received::Missing {
            first_word: argument,
            bytes: payload,
        },
        Kind::Need => Received::Need {
            first: argument,
            pages: count,
        },
        Kind::Disk => Received::Disk {
            drive: count,
            offset: argument,
            bytes: payload,
        },
        Kind::DiskZeros => {
            let length = payload.try_into().map(u64::from_le_bytes);
            Received::DiskZeros {
                drive: count,
                offset: argument,
                length: length
                    .map_err(|_| ChannelError::Malformed("zeros of a disk without their number"))?,
            }
        }
    })
}
