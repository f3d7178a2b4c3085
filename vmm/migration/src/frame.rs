// SPDX-License-Identifier: Apache-2.0
//! Frames: a header of 32 bytes, little endian, and what it announces.
//!
//! ```text
//!   0  magic     u32  "BRMG"
//!   4  kind      u8
//!   5  codec     u8   how pages were made smaller: 0 not at all, 1 LZ4, 2 Zstandard
//!   6  reserved  u16  0
//!   8  length    u32  of what follows, in bytes
//!  12  count     u32  its meaning depends on the kind
//!  16  argument  u64  its meaning depends on the kind
//!  24  checksum  u64  XXH3 of what follows, seeded with XXH3 of the first 24 bytes
//! ```

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::channel::ChannelError;

/// The size of a header in bytes.
pub(crate) const HEADER: usize = 32;
const MAGIC: u32 = u32::from_le_bytes(*b"BRMG");
/// How many bytes of a header its checksum is for.
const CHECKED: usize = 24;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A message in JSON.
    Message,
    /// Pages: `count` runs.
    Pages,
    /// A part of a machine's state; `argument` is where it begins, `count` is 1 for the last.
    State,
    /// Words of a bitmap of pages that follow; `argument` is the first word.
    Missing,
    /// Pages that the guest waits for: `count` from `argument` on.
    Need,
    /// Blocks of drive `count` from byte `argument` on.
    Disk,
}

impl Kind {
    const ALL: [Self; 6] = [
        Self::Message,
        Self::Pages,
        Self::State,
        Self::Missing,
        Self::Need,
        Self::Disk,
    ];

    fn number(self) -> u8 {
        self as u8
    }

    /// The most that such a frame may announce, in bytes.
    pub(crate) fn most(self) -> u32 {
        match self {
            Self::Message => 4 << 20,
            // Compressed data may be larger than it was, by a little.
            Self::Pages => (1 << 20) + (64 << 10),
            Self::State | Self::Missing | Self::Disk => 1 << 20,
            Self::Need => 0,
        }
    }
}

/// A header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: Kind,
    pub(crate) codec: u8,
    pub(crate) length: u32,
    pub(crate) count: u32,
    pub(crate) argument: u64,
}

impl Header {
    /// The header as bytes, for a frame whose payload consists of `parts`.
    pub(crate) fn encode(&self, parts: [&[u8]; 2]) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let fields = MAGIC
            .to_le_bytes()
            .into_iter()
            .chain([self.kind.number(), self.codec, 0, 0])
            .chain(self.length.to_le_bytes())
            .chain(self.count.to_le_bytes())
            .chain(self.argument.to_le_bytes());
        for (byte, field) in bytes.iter_mut().zip(fields) {
            *byte = field;
        }
        let sum = checksum(&bytes, parts).to_le_bytes();
        for (byte, sum) in bytes.iter_mut().skip(CHECKED).zip(sum) {
            *byte = sum;
        }
        bytes
    }

    /// Reads a header. Nothing in it is true until [`verify`] has said so, but no length is more
    /// than such a frame may have.
    pub(crate) fn decode(bytes: &[u8; HEADER]) -> Result<Self, ChannelError> {
        let [m0, m1, m2, m3, kind, codec, r0, r1, rest @ ..] = *bytes;
        if u32::from_le_bytes([m0, m1, m2, m3]) != MAGIC {
            return Err(ChannelError::Magic);
        }
        let [l0, l1, l2, l3, c0, c1, c2, c3, rest @ ..] = rest;
        let [a0, a1, a2, a3, a4, a5, a6, a7, ..] = rest;
        let kind = Kind::ALL.into_iter().find(|known| known.number() == kind);
        let kind = kind.ok_or(ChannelError::Malformed("a frame of a kind that is unknown"))?;
        if [r0, r1] != [0; 2] {
            return Err(ChannelError::Malformed(
                "a header whose reserved bytes are used",
            ));
        }
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        if length > kind.most() {
            return Err(ChannelError::TooLong {
                length,
                most: kind.most(),
            });
        }
        Ok(Self {
            kind,
            codec,
            length,
            count: u32::from_le_bytes([c0, c1, c2, c3]),
            argument: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
        })
    }
}

/// Holds the checksum of `header` against what came with it.
pub(crate) fn verify(header: &[u8; HEADER], payload: &[u8]) -> Result<(), ChannelError> {
    let [.., s0, s1, s2, s3, s4, s5, s6, s7] = *header;
    let told = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    if told == checksum(header, [payload, &[]]) {
        return Ok(());
    }
    Err(ChannelError::Checksum)
}

fn checksum(header: &[u8; HEADER], parts: [&[u8]; 2]) -> u64 {
    let (checked, _) = header.split_at(CHECKED);
    let seed = xxh3_64(checked);
    match parts {
        [all, []] => xxh3_64_with_seed(all, seed),
        [first, second] => {
            let mut hasher = xxhash_rust::xxh3::Xxh3::with_seed(seed);
            hasher.update(first);
            hasher.update(second);
            hasher.digest()
        }
    }
}

/// Gives a whole frame, in `bytes`, the checksum that it should have.
#[cfg(test)]
pub(crate) fn seal(bytes: &mut [u8]) {
    if let Some((header, payload)) = bytes.split_first_chunk_mut::<HEADER>() {
        let sum = checksum(header, [payload, &[]]);
        header[CHECKED..].copy_from_slice(&sum.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn headers_are_read_as_they_were_written(
            payload in proptest::collection::vec(any::<u8>(), 0..5000),
            (count, argument, codec) in any::<(u32, u64, u8)>(),
            split in 0..5000_usize,
            flip in any::<(prop::sample::Index, u8)>(),
        ) {
            let header = Header {
                kind: Kind::Pages,
                codec,
                length: u32::try_from(payload.len()).unwrap(),
                count,
                argument,
            };
            let (first, second) = payload.split_at(split.min(payload.len()));
            let bytes = header.encode([first, second]);
            assert_eq!(Header::decode(&bytes).unwrap(), header);
            verify(&bytes, &payload).unwrap();
            // Any other bit is found.
            let mut all = [&bytes[..], &payload].concat();
            let at = flip.0.index(all.len());
            all[at] ^= 1 << (flip.1 % 8);
            let (bytes, payload) = all.split_first_chunk().unwrap();
            assert!(Header::decode(bytes).is_err() || verify(bytes, payload).is_err());
        }
    }

    #[test]
    fn what_is_no_frame_is_told() {
        let good = Header {
            kind: Kind::Message,
            codec: 0,
            length: 3,
            count: 0,
            argument: 0,
        };
        let bytes = good.encode([b"{}\n", &[]]);
        let with = |at: usize, byte: u8| {
            let mut bytes = bytes;
            bytes[at] = byte;
            Header::decode(&bytes)
        };
        assert!(matches!(with(0, b'X'), Err(ChannelError::Magic)));
        assert!(matches!(with(4, 6), Err(ChannelError::Malformed(_))));
        assert!(matches!(with(7, 1), Err(ChannelError::Malformed(_))));
        assert!(matches!(with(11, 0xff), Err(ChannelError::TooLong { .. })));
    }
}
