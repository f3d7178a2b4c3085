// SPDX-License-Identifier: Apache-2.0
//! Sending frames, whole or not at all.

use std::io::{ErrorKind, IoSlice, Write};

use super::ChannelError;
use super::read::is_timeout;
use crate::compress::Codec;
use crate::frame::{HEADER, Header, Kind};
use crate::link::Link;

/// The way out of a channel.
pub(super) struct Out<'a> {
    pub(super) link: &'a mut Link,
    /// Why nothing can be sent any more.
    pub(super) unsendable: &'a mut Option<ErrorKind>,
    /// Whether the other side does not know something that it was to be told.
    pub(super) is_behind: &'a mut bool,
}

impl Out<'_> {
    /// Sends a frame; how many bytes that took.
    pub(super) fn frame(
        &mut self,
        kind: Kind,
        codec: Codec,
        (count, argument): (u32, u64),
        parts: [&[u8]; 2],
    ) -> Result<u64, ChannelError> {
        if let Some(kind) = *self.unsendable {
            *self.is_behind = true;
            return Err(ChannelError::Lost(kind.into()));
        }
        let [first, second] = parts;
        *self.is_behind = true;
        let length = at_most(first.len() + second.len(), kind.most() as usize)?;
        let header = Header {
            kind,
            codec: codec.number(),
            length,
            count,
            argument,
        };
        let header = header.encode(parts);
        let bytes = (HEADER + first.len() + second.len()) as u64;
        let written = self.write(&mut [&header[..], first, second].map(IoSlice::new), bytes);
        *self.is_behind = written.is_err();
        written.map(|()| bytes)
    }

    /// Writes all of a frame, which has `bytes` bytes. After a part of it nothing else may follow.
    fn write(&mut self, parts: &mut [IoSlice<'_>], bytes: u64) -> Result<(), ChannelError> {
        let mut parts = parts;
        let mut left = bytes;
        while left > 0 {
            let error = match self.link.write_vectored(parts) {
                Ok(0) => ErrorKind::WriteZero.into(),
                Ok(written) => {
                    IoSlice::advance_slices(&mut parts, written);
                    left = left.saturating_sub(written as u64);
                    continue;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => error,
            };
            let timed_out = is_timeout(&error);
            // What TLS has taken it may have written, too.
            if !timed_out || left < bytes || self.link.is_secured() {
                *self.unsendable = Some(error.kind());
            }
            if timed_out {
                return Err(ChannelError::TimedOut);
            }
            return Err(ChannelError::Lost(error));
        }
        Ok(())
    }
}

/// The length as it is announced, if it is no more than `most`.
pub(super) fn at_most(length: usize, most: usize) -> Result<u32, ChannelError> {
    u32::try_from(length)
        .ok()
        .filter(|_| length <= most)
        .ok_or(ChannelError::TooLarge { length, most })
}
