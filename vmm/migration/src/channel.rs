// SPDX-License-Identifier: Apache-2.0
//! One connection that carries frames.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::compress::{Choice, Codec, Compressor, Unpacker};
use crate::frame::{HEADER, Header, Kind, verify};
use crate::link::{Closer, Link};
use crate::message::Message;
use crate::pages::PageBatch;

mod greeting;
mod received;

pub use received::Received;
use received::understand;

/// The most that is read for a frame before any of it has come, in bytes.
const STEP: usize = 1 << 20;
/// The most of a state that goes into a frame, in bytes.
const STATE_PART: usize = 1 << 20;

/// A connection that does not carry what it should.
#[derive(Debug, Error)]
pub enum ChannelError {
    /// The other side has closed it, and everything that it had sent has been read.
    #[error("the other side has closed the connection")]
    Closed,
    /// It broke. What the other side has sent may be lost.
    #[error("the connection broke")]
    Lost(#[source] io::Error),
    /// Nothing has moved for too long.
    #[error("the other side has neither sent nor taken anything for too long")]
    TimedOut,
    /// It was changed on its way.
    #[error("what came is not what was sent: the checksum is wrong")]
    Checksum,
    /// It is somebody else.
    #[error("the other side does not speak brume's migration protocol")]
    Magic,
    /// It makes no sense.
    #[error("the other side has sent {0}")]
    Malformed(&'static str),
    /// It is more than it may be.
    #[error("the other side has announced {length} bytes where there may be {most}")]
    TooLong {
        /// What it has announced.
        length: u32,
        /// What it may.
        most: u32,
    },
    /// A message that is none.
    #[error("the other side has sent a message that is not understood")]
    Message(#[source] serde_json::Error),
    /// It does not want us.
    #[error("the other side refuses: {}", .0.join("; "))]
    Refused(Vec<String>),
    /// It is not what comes now.
    #[error("the other side has sent {0} out of turn")]
    OutOfTurn(&'static str),
}

/// A connection that carries frames.
#[derive(Debug)]
pub struct Channel {
    link: Link,
    /// The payload that has come last.
    payload: Vec<u8>,
    /// The table of runs that was sent last.
    table: Vec<u8>,
    compressor: Compressor,
    unpacker: Unpacker,
    sent: u64,
    received: u64,
}

impl Channel {
    /// Frames over `link`.
    pub fn new(link: Link) -> Self {
        Self {
            link,
            payload: Vec::new(),
            table: Vec::new(),
            compressor: Compressor::default(),
            unpacker: Unpacker::default(),
            sent: 0,
            received: 0,
        }
    }

    /// What is below.
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// How long the other side may let us wait.
    ///
    /// # Errors
    ///
    /// The socket does not take it.
    pub fn set_limit(&mut self, limit: Duration) -> Result<(), ChannelError> {
        self.link.set_limit(limit).map_err(ChannelError::Lost)
    }

    /// Until when the other side may let us wait in all, however much it sends; `None` for as long
    /// as it does.
    ///
    /// # Errors
    ///
    /// The socket does not take it.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) -> Result<(), ChannelError> {
        self.link.set_deadline(deadline).map_err(ChannelError::Lost)
    }

    /// How pages are compressed from now on; at first they are not. Whoever receives them need not
    /// know.
    pub fn set_compression(&mut self, choice: Choice) {
        self.compressor.set_choice(choice);
    }

    /// Tells [`Choice::Auto`] that no more than `rate` bytes per second will be sent; 0 for no such
    /// limit.
    pub fn set_wire_rate(&mut self, rate: u64) {
        self.compressor.set_wire_rate(rate);
    }

    /// How many bytes the pages had that were sent, and how many were sent for them.
    pub fn compressed(&self) -> (u64, u64) {
        self.compressor.totals()
    }

    /// Hands a descriptor over to another process of this host, between two frames.
    ///
    /// # Errors
    ///
    /// The other side does not take it, or is not on a unix socket.
    pub fn send_fd(&mut self, fd: BorrowedFd<'_>) -> Result<(), ChannelError> {
        self.link.send_fd(fd).map_err(failed)
    }

    /// Takes a descriptor, which is to be what comes next.
    ///
    /// # Errors
    ///
    /// It comes not, or something else does, or this is no unix socket.
    pub fn receive_fd(&mut self) -> Result<OwnedFd, ChannelError> {
        self.link.receive_fd().map_err(|error| match error.kind() {
            ErrorKind::InvalidData => ChannelError::OutOfTurn("something that is no descriptor"),
            _ => failed(error),
        })
    }

    /// Waits for something to receive, or the end; `false` if that takes longer than `limit`.
    ///
    /// # Errors
    ///
    /// The host does not tell.
    pub fn wait(&mut self, limit: Duration) -> Result<bool, ChannelError> {
        self.link.wait_readable(limit).map_err(ChannelError::Lost)
    }

    /// What ends it from another thread.
    ///
    /// # Errors
    ///
    /// The process has no more descriptors.
    pub fn closer(&self) -> Result<Closer, ChannelError> {
        self.link.closer().map_err(ChannelError::Lost)
    }

    /// Bytes that were sent.
    pub fn bytes_sent(&self) -> u64 {
        self.sent
    }

    /// Bytes that have come.
    pub fn bytes_received(&self) -> u64 {
        self.received
    }

    /// Sends a message; how many bytes that took.
    ///
    /// # Errors
    ///
    /// The other side does not take it.
    pub fn send(&mut self, message: &Message) -> Result<u64, ChannelError> {
        let text = serde_json::to_vec(message).map_err(ChannelError::Message)?;
        self.frame(Kind::Message, 0, 0, [&text, &[]])
    }

    /// Sends pages; how many bytes that took.
    ///
    /// # Errors
    ///
    /// The other side does not take them.
    pub fn send_pages(&mut self, batch: &PageBatch) -> Result<u64, ChannelError> {
        let count = batch.table(&mut self.table);
        let (codec, data) = self.compressor.pack(batch.data());
        let begin = Instant::now();
        let sent = write_frame(
            &mut self.link,
            Kind::Pages,
            codec,
            (count, 0),
            [&self.table, data],
        )?;
        self.compressor.written(sent, begin, Instant::now());
        self.sent += sent;
        Ok(sent)
    }

    /// Sends the state of a machine; how many bytes that took.
    ///
    /// # Errors
    ///
    /// The other side does not take it.
    pub fn send_state(&mut self, state: &[u8]) -> Result<u64, ChannelError> {
        let mut sent = 0;
        let mut offset = 0;
        let mut parts = state.chunks(STATE_PART).peekable();
        while let Some(part) = parts.next() {
            let last = u32::from(parts.peek().is_none());
            sent += self.frame(Kind::State, last, offset, [part, &[]])?;
            offset += part.len() as u64;
        }
        Ok(sent)
    }

    /// Tells which pages follow later; how many bytes that took.
    ///
    /// # Errors
    ///
    /// The other side does not take it.
    pub fn send_missing(&mut self, words: &[u64]) -> Result<u64, ChannelError> {
        const PART: usize = STEP / 8;
        let mut sent = 0;
        for (index, part) in words.chunks(PART).enumerate() {
            let bytes: Vec<u8> = part.iter().flat_map(|word| word.to_le_bytes()).collect();
            let first = (index * PART) as u64;
            sent += self.frame(Kind::Missing, 0, first, [&bytes, &[]])?;
        }
        Ok(sent)
    }

    /// Asks for pages.
    ///
    /// # Errors
    ///
    /// The other side does not take it.
    pub fn send_need(&mut self, first: u64, pages: u32) -> Result<u64, ChannelError> {
        self.frame(Kind::Need, pages, first, [&[], &[]])
    }

    /// Sends blocks of a drive, at most 1 MiB; how many bytes that took.
    ///
    /// # Errors
    ///
    /// The other side does not take them.
    pub fn send_disk(
        &mut self,
        drive: u32,
        offset: u64,
        bytes: &[u8],
    ) -> Result<u64, ChannelError> {
        self.frame(Kind::Disk, drive, offset, [bytes, &[]])
    }

    /// Tells that `length` bytes of a drive are zeros; how many bytes that took.
    ///
    /// # Errors
    ///
    /// The other side does not take it.
    pub fn send_disk_zeros(
        &mut self,
        drive: u32,
        offset: u64,
        length: u64,
    ) -> Result<u64, ChannelError> {
        let length = length.to_le_bytes();
        self.frame(Kind::DiskZeros, drive, offset, [&length, &[]])
    }

    fn frame(
        &mut self,
        kind: Kind,
        count: u32,
        argument: u64,
        parts: [&[u8]; 2],
    ) -> Result<u64, ChannelError> {
        let link = &mut self.link;
        let sent = write_frame(link, kind, Codec::None, (count, argument), parts)?;
        self.sent += sent;
        Ok(sent)
    }

    /// Waits for a frame.
    ///
    /// # Errors
    ///
    /// None comes, or it is not what it should be.
    pub fn receive(&mut self) -> Result<Received<'_>, ChannelError> {
        self.receive_at_most(u32::MAX)
    }

    /// The same for a frame of at most `most` bytes.
    fn receive_at_most(&mut self, most: u32) -> Result<Received<'_>, ChannelError> {
        let mut bytes = [0; HEADER];
        self.read(&mut bytes, true)?;
        let header = Header::decode(&bytes)?;
        if header.length > most {
            return Err(ChannelError::TooLong {
                length: header.length,
                most,
            });
        }
        let length = usize::try_from(header.length).unwrap_or(usize::MAX);
        let mut payload = std::mem::take(&mut self.payload);
        let read = self.read_payload(&mut payload, length);
        self.payload = payload;
        read?;
        self.received += (HEADER + length) as u64;
        verify(&bytes, &self.payload)?;
        understand(&header, &self.payload, &mut self.unpacker)
    }

    /// Waits for a message.
    ///
    /// # Errors
    ///
    /// As for [`Channel::receive`], or something else has come.
    pub fn receive_message(&mut self) -> Result<Message, ChannelError> {
        self.receive()?.message()
    }

    /// Reads so many bytes; room for them is made as they come.
    fn read_payload(&mut self, payload: &mut Vec<u8>, length: usize) -> Result<(), ChannelError> {
        if payload.len() < length {
            let mut have = payload.len().min(length);
            self.read(payload.get_mut(..have).unwrap_or_default(), false)?;
            while have < length {
                let next = length.min(have + STEP);
                payload.resize(next, 0);
                self.read(payload.get_mut(have..).unwrap_or_default(), false)?;
                have = next;
            }
            return Ok(());
        }
        payload.truncate(length);
        self.read(payload, false)
    }

    /// Fills `buffer`. Only between two frames is the end of the connection an orderly one.
    fn read(&mut self, buffer: &mut [u8], between: bool) -> Result<(), ChannelError> {
        let mut rest = buffer;
        let mut nothing_yet = between;
        while !rest.is_empty() {
            match self.link.read(rest) {
                Ok(0) if nothing_yet => return Err(ChannelError::Closed),
                Ok(0) => return Err(ChannelError::Lost(ErrorKind::UnexpectedEof.into())),
                Ok(count) => {
                    nothing_yet = false;
                    let (_, after) = rest.split_at_mut(count);
                    rest = after;
                }
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted => {}
                    ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                        return Err(ChannelError::TimedOut);
                    }
                    // A unix socket whose other end is gone, with all read that was in it; what we
                    // had sent was not.
                    ErrorKind::ConnectionReset if nothing_yet && self.link.is_local() => {
                        return Err(ChannelError::Closed);
                    }
                    _ => return Err(ChannelError::Lost(error)),
                },
            }
        }
        Ok(())
    }
}

fn write_frame(
    link: &mut Link,
    kind: Kind,
    codec: Codec,
    (count, argument): (u32, u64),
    parts: [&[u8]; 2],
) -> Result<u64, ChannelError> {
    let [first, second] = parts;
    let header = Header {
        kind,
        codec: codec.number(),
        length: u32::try_from(first.len() + second.len()).unwrap_or(u32::MAX),
        count,
        argument,
    };
    let header = header.encode(parts);
    let mut slices = [&header[..], first, second].map(IoSlice::new);
    let mut left = &mut slices[..];
    IoSlice::advance_slices(&mut left, 0);
    while !left.is_empty() {
        match link.write_vectored(left) {
            Ok(0) => return Err(ChannelError::Closed),
            Ok(written) => IoSlice::advance_slices(&mut left, written),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Ok((HEADER + first.len() + second.len()) as u64)
}

/// What an error in writing means. What the other side has said before its end can still be read,
/// so only a read can tell that it has closed in order.
fn failed(error: io::Error) -> ChannelError {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => ChannelError::TimedOut,
        _ => ChannelError::Lost(error),
    }
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;
