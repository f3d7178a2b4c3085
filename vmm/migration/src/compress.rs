// SPDX-License-Identifier: Apache-2.0
//! Pages made smaller on their way.
//!
//! The codec in the header of a frame says how the bytes after its table are compressed: as one
//! LZ4 block, or as one Zstandard frame (RFC 8878). How many bytes they become follows from the
//! table. Bytes that do not get smaller are sent as they are.

use std::fmt::{self, Debug, Formatter};
use std::time::Instant;

use lz4_flex::block;
use zstd::bulk;

use crate::channel::ChannelError;

mod auto;

use auto::Auto;

/// Any more, and the processor is slower than the networks that machines are moved over.
const ZSTD_LEVEL: i32 = 1;

/// How pages are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// In the way that moves most pages in a second, by what is measured all the time.
    Auto,
    /// Not at all.
    #[default]
    None,
    /// Little, and fast: LZ4.
    Lz4,
    /// More, and slower: Zstandard.
    Zstd,
}

/// How the pages of a frame are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Codec {
    None,
    Lz4,
    Zstd,
}

impl Codec {
    pub(crate) fn number(self) -> u8 {
        self as u8
    }

    pub(crate) fn from_number(number: u8) -> Result<Self, ChannelError> {
        let known = [Self::None, Self::Lz4, Self::Zstd];
        let codec = known.into_iter().find(|codec| codec.number() == number);
        codec.ok_or(ChannelError::Malformed("pages in a form that is unknown"))
    }
}

/// Compresses pages on their way out.
#[derive(Debug, Default)]
pub(crate) struct Compressor {
    choice: Choice,
    packer: Packer,
    auto: Auto,
    before: u64,
    after: u64,
}

impl Compressor {
    pub(crate) fn set_choice(&mut self, choice: Choice) {
        self.choice = choice;
    }

    /// Tells that no more than `rate` bytes per second will be sent; 0 for no such limit.
    pub(crate) fn set_wire_rate(&mut self, rate: u64) {
        self.auto.set_wire_rate(rate);
    }

    /// How many bytes the pages had, and how many were sent for them.
    pub(crate) fn totals(&self) -> (u64, u64) {
        (self.before, self.after)
    }

    /// Takes the time to learn from `pages` how those that are sent from now on are compressed best.
    pub(crate) fn learn(&mut self, pages: &[u8]) {
        if self.choice == Choice::Auto {
            self.auto.learn(pages, &mut self.packer);
        }
    }

    /// The bytes to send for `pages`, and what they are.
    pub(crate) fn pack<'a>(&'a mut self, pages: &'a [u8]) -> (Codec, &'a [u8]) {
        let codec = match self.choice {
            Choice::None => Codec::None,
            Choice::Lz4 => Codec::Lz4,
            Choice::Zstd => Codec::Zstd,
            Choice::Auto => self.auto.codec(),
        };
        let begin = Instant::now();
        let packed = self.packer.pack(codec, pages);
        if codec != Codec::None && self.choice == Choice::Auto {
            let sent = packed.map_or(pages.len(), <[u8]>::len);
            self.auto.packed(codec, pages.len(), sent, begin.elapsed());
        }
        let (codec, bytes) = packed.map_or((Codec::None, pages), |packed| (codec, packed));
        self.before += pages.len() as u64;
        self.after += bytes.len() as u64;
        (codec, bytes)
    }

    /// Tells that `bytes` bytes were written from `begin` to `end`.
    pub(crate) fn written(&mut self, bytes: u64, begin: Instant, end: Instant) {
        if self.choice == Choice::Auto {
            self.auto.written(bytes, begin, end);
        }
    }
}

/// What compresses.
#[derive(Default)]
struct Packer {
    zstd: Option<bulk::Compressor<'static>>,
    out: Vec<u8>,
}

impl Debug for Packer {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Packer").finish_non_exhaustive()
    }
}

impl Packer {
    /// `bytes` made smaller; `None` if they do not get smaller.
    fn pack(&mut self, codec: Codec, bytes: &[u8]) -> Option<&[u8]> {
        let room = match codec {
            Codec::None => return None,
            // It wants room for the worst.
            Codec::Lz4 => block::get_maximum_output_size(bytes.len()),
            Codec::Zstd => bytes.len(),
        };
        if self.out.len() < room {
            self.out.resize(room, 0);
        }
        let out = self.out.get_mut(..room)?;
        let length = match codec {
            Codec::None => return None,
            Codec::Lz4 => block::compress_into(bytes, out).ok()?,
            Codec::Zstd => {
                let zstd = match &mut self.zstd {
                    Some(zstd) => zstd,
                    none => none.insert(bulk::Compressor::new(ZSTD_LEVEL).ok()?),
                };
                zstd.compress_to_buffer(bytes, out).ok()?
            }
        };
        self.out.get(..length).filter(|_| length < bytes.len())
    }
}

/// Undoes what a [`Compressor`] has done.
#[derive(Default)]
pub(crate) struct Unpacker {
    zstd: Option<bulk::Decompressor<'static>>,
    out: Vec<u8>,
}

impl Debug for Unpacker {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Unpacker").finish_non_exhaustive()
    }
}

impl Unpacker {
    /// The `length` bytes that `packed` is to become, which are at most those of a frame.
    pub(crate) fn unpack<'a>(
        &'a mut self,
        codec: Codec,
        packed: &'a [u8],
        length: usize,
    ) -> Result<&'a [u8], ChannelError> {
        if codec == Codec::None {
            return Ok(packed);
        }
        if self.out.len() < length {
            self.out.resize(length, 0);
        }
        let out = self.out.get_mut(..length).unwrap_or_default();
        let unpacked = match codec {
            Codec::None => None,
            Codec::Lz4 => block::decompress_into(packed, out).ok(),
            Codec::Zstd => {
                let zstd = match &mut self.zstd {
                    Some(zstd) => zstd,
                    none => none.insert(bulk::Decompressor::new().map_err(ChannelError::Lost)?),
                };
                zstd.decompress_to_buffer(packed, out).ok()
            }
        };
        if unpacked != Some(length) {
            return Err(ChannelError::Malformed(
                "compressed pages that cannot be decompressed",
            ));
        }
        Ok(self.out.get(..length).unwrap_or_default())
    }

    /// How much memory it holds for what was unpacked last, in bytes.
    #[cfg(test)]
    pub(crate) fn capacity(&self) -> usize {
        self.out.capacity()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Bytes that get smaller.
    pub(crate) fn text(length: usize) -> Vec<u8> {
        let words = ["the guest ", "has ", "written ", "a page ", "of text. "];
        let mut state = 1_u32;
        let mut text = Vec::new();
        while text.len() < length {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let word = words[(state >> 16) as usize % words.len()];
            text.extend_from_slice(word.as_bytes());
        }
        text.truncate(length);
        text
    }

    /// Bytes that do not.
    pub(crate) fn noise(length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        getrandom::fill(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn what_gets_smaller_comes_back_as_it_was() {
        let mut unpacker = Unpacker::default();
        for (choice, codec) in [
            (Choice::None, Codec::None),
            (Choice::Lz4, Codec::Lz4),
            (Choice::Zstd, Codec::Zstd),
        ] {
            let mut compressor = Compressor::default();
            compressor.set_choice(choice);
            for length in [4096, 128 * 4096, 8192] {
                let text = text(length);
                let (used, packed) = compressor.pack(&text);
                assert_eq!(used, codec);
                assert!((packed.len() < length / 2) == (codec != Codec::None));
                let unpacked = unpacker.unpack(used, packed, length).unwrap();
                assert!(unpacked == text);
                let noise = noise(length);
                let (used, packed) = compressor.pack(&noise);
                assert!(used == Codec::None && packed == noise);
            }
            let (before, after) = compressor.totals();
            assert_eq!(before, 2 * 131 * 4096);
            assert!((after < before) == (codec != Codec::None));
        }
    }

    #[test]
    fn what_does_not_become_its_length_is_refused() {
        let text = text(8192);
        let mut unpacker = Unpacker::default();
        for codec in [Codec::Lz4, Codec::Zstd] {
            let mut packer = Packer::default();
            let packed = packer.pack(codec, &text).unwrap().to_vec();
            unpacker.unpack(codec, &packed, 8192).unwrap();
            for length in [0, 4096, 8191, 8193, 128 * 4096] {
                assert!(unpacker.unpack(codec, &packed, length).is_err());
            }
            for wrong in [&packed[..packed.len() - 1], &[], &[0xff; 99]] {
                assert!(unpacker.unpack(codec, wrong, 8192).is_err());
            }
        }
        assert!(Codec::from_number(3).is_err());
    }
}
