// SPDX-License-Identifier: Apache-2.0
//! One connection that carries frames.

use std::io::ErrorKind;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

pub use self::error::ChannelError;
use self::read::{ReadError, inside, is_timeout, read_exact};
pub use self::received::Received;
use self::received::understand;
use self::send::{Out, at_most};
use crate::compress::{Choice, Codec, Compressor, Unpacker};
use crate::frame::{HEADER, Header, Kind, verify};
use crate::link::{Closer, Link};
use crate::message::Message;
use crate::pages::{MOST_PAGES, MOST_RUNS, MOST_ZEROS, PAGE, PageBatch};
use crate::state::MOST_STATE;

mod error;
mod greeting;
mod read;
mod received;
mod send;

/// The most that is read for a frame before any of it has come, in bytes.
const STEP: usize = 1 << 20;
/// The most of a state that goes into a frame, in bytes.
const STATE_PART: usize = 1 << 20;
/// Marks that blocks of a drive are zeros: their length is all that follows.
const DISK_ZEROS: u32 = 1 << 31;

/// A connection that carries frames.
///
/// When it is dropped the connection is closed, unless the last thing that was to be sent could not
/// be: then it is reset ([`Link::reset`]), so that the other side does not take the end for one in
/// order. What it was not told may have been that it shall not go on.
#[derive(Debug)]
pub struct Channel {
    link: Link,
    /// Room for what comes; it is never made smaller, for what it grows by is filled with zeros.
    payload: Vec<u8>,
    /// The table of runs that was sent last.
    table: Vec<u8>,
    compressor: Compressor,
    unpacker: Unpacker,
    sent: u64,
    received: u64,
    /// Why nothing can be sent any more.
    unsendable: Option<ErrorKind>,
    /// Whether the last thing that was to be sent was not, in full.
    is_behind: bool,
    /// Why nothing can be received any more.
    unreadable: Option<ErrorKind>,
}

impl Drop for Channel {
    fn drop(&mut self) {
        if self.is_behind {
            self.link.reset();
        }
    }
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
            unsendable: None,
            is_behind: false,
            unreadable: None,
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
        if let Some(kind) = self.unsendable {
            return Err(ChannelError::Lost(kind.into()));
        }
        self.link.send_fd(fd).map_err(inside)
    }

    /// Takes a descriptor, which is to be what comes next. It may be of anything.
    ///
    /// # Errors
    ///
    /// It comes not, or something else does, or this is no unix socket.
    pub fn receive_fd(&mut self) -> Result<OwnedFd, ChannelError> {
        if let Some(kind) = self.unreadable {
            return Err(ChannelError::Lost(kind.into()));
        }
        self.link.receive_fd().map_err(|error| match error.kind() {
            ErrorKind::InvalidData => {
                // A byte of something else is gone.
                self.unreadable = Some(ErrorKind::InvalidData);
                ChannelError::OutOfTurn("something that is no descriptor")
            }
            _ => inside(error),
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
        self.learn(batch);
        self.send_pages_at_once(batch)
    }

    /// Learns from pages how those that are sent from now on are compressed best.
    pub fn learn(&mut self, batch: &PageBatch) {
        self.compressor.learn(batch.data());
    }

    /// As [`Channel::send_pages`] for pages that a guest waits for: no time is taken to learn from
    /// them how they are compressed best.
    ///
    /// # Errors
    ///
    /// Those of [`Channel::send_pages`].
    pub fn send_pages_at_once(&mut self, batch: &PageBatch) -> Result<u64, ChannelError> {
        at_most(batch.data().len(), MOST_PAGES * PAGE)?;
        at_most(batch.runs(), MOST_RUNS)?;
        at_most(batch.told_zeros(), MOST_ZEROS)?;
        let count = batch.table(&mut self.table);
        let (codec, data) = self.compressor.pack(batch.data());
        let begin = Instant::now();
        let mut out = Out {
            link: &mut self.link,
            unsendable: &mut self.unsendable,
            is_behind: &mut self.is_behind,
        };
        let sent = out.frame(Kind::Pages, codec, (count, 0), [&self.table, data])?;
        self.compressor.written(sent, begin, Instant::now());
        self.sent += sent;
        Ok(sent)
    }

    /// Sends the state of a machine, at most [`MOST_STATE`] bytes; how many bytes that took.
    ///
    /// # Errors
    ///
    /// The other side does not take it.
    pub fn send_state(&mut self, state: &[u8]) -> Result<u64, ChannelError> {
        at_most(state.len(), MOST_STATE)?;
        let mut sent = 0;
        let mut offset = 0;
        let mut rest = state;
        loop {
            let (part, after) = rest.split_at(rest.len().min(STATE_PART));
            let last = u32::from(after.is_empty());
            sent += self.frame(Kind::State, last, offset, [part, &[]])?;
            if after.is_empty() {
                return Ok(sent);
            }
            offset += part.len() as u64;
            rest = after;
        }
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
        let drive = drive & !DISK_ZEROS;
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
        let drive = drive | DISK_ZEROS;
        self.frame(Kind::Disk, drive, offset, [&length.to_le_bytes(), &[]])
    }

    fn frame(
        &mut self,
        kind: Kind,
        count: u32,
        argument: u64,
        parts: [&[u8]; 2],
    ) -> Result<u64, ChannelError> {
        let mut out = Out {
            link: &mut self.link,
            unsendable: &mut self.unsendable,
            is_behind: &mut self.is_behind,
        };
        let sent = out.frame(kind, Codec::None, (count, argument), parts)?;
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
        if let Some(kind) = self.unreadable {
            return Err(ChannelError::Lost(kind.into()));
        }
        let (bytes, header) = self.next_header(most)?;
        let read = self.payload_of(&header).and_then(|length| {
            let payload = self.payload.get(..length).unwrap_or_default();
            verify(&bytes, payload).map(|()| length)
        });
        // Where the next frame begins is not known any more, or not to be trusted.
        let length = self.or_unreadable(read)?;
        self.received += (HEADER + length) as u64;
        let payload = self.payload.get(..length).unwrap_or_default();
        understand(&header, payload, &mut self.unpacker)
    }

    fn next_header(&mut self, most: u32) -> Result<([u8; HEADER], Header), ChannelError> {
        let mut bytes = [0; HEADER];
        read_exact(&mut self.link, &mut bytes, true).map_err(|error| self.at_boundary(error))?;
        let header = Header::decode(&bytes).and_then(|header| match header.length {
            length if length > most => Err(ChannelError::TooLong { length, most }),
            _ => Ok(header),
        });
        Ok((bytes, self.or_unreadable(header)?))
    }

    /// What an error means that came while a frame was awaited.
    fn at_boundary(&mut self, error: ReadError) -> ChannelError {
        match (error, self.unsendable) {
            // The error was in the socket, and a write has taken it out: what is left looks like an
            // end in order. A broken pipe says only that the end was there before the write.
            (ReadError::End, Some(kind))
                if !self.link.is_local()
                    && !matches!(kind, ErrorKind::BrokenPipe | ErrorKind::WouldBlock) =>
            {
                self.unreadable = Some(kind);
                ChannelError::Lost(kind.into())
            }
            (ReadError::End, _) => ChannelError::Closed,
            // The other end of a unix socket is gone and all that was in it is read; what we had
            // sent was not.
            (ReadError::Failed(error), _)
                if error.kind() == ErrorKind::ConnectionReset && self.link.is_local() =>
            {
                ChannelError::Closed
            }
            (ReadError::Failed(error), _) if is_timeout(&error) => ChannelError::TimedOut,
            (ReadError::Failed(error) | ReadError::Inside(error), _) => {
                self.unreadable = Some(error.kind());
                inside(error)
            }
        }
    }

    fn or_unreadable<T>(&mut self, result: Result<T, ChannelError>) -> Result<T, ChannelError> {
        if result.is_err() {
            self.unreadable = Some(ErrorKind::InvalidData);
        }
        result
    }

    /// Waits for a message.
    ///
    /// # Errors
    ///
    /// As for [`Channel::receive`], or something else has come.
    pub fn receive_message(&mut self) -> Result<Message, ChannelError> {
        self.receive()?.message()
    }

    /// Reads what a header has announced; room for it is made as it comes. How long it is.
    fn payload_of(&mut self, header: &Header) -> Result<usize, ChannelError> {
        let length = header.length as usize;
        let mut have = 0;
        while have < length {
            let next = length.min(self.payload.len().max(have + STEP));
            if self.payload.len() < next {
                self.payload.reserve_exact(next - self.payload.len());
                self.payload.resize(next, 0);
            }
            let part = self.payload.get_mut(have..next).unwrap_or_default();
            read_exact(&mut self.link, part, false).map_err(|error| match error {
                ReadError::End => ChannelError::Lost(ErrorKind::UnexpectedEof.into()),
                ReadError::Failed(error) | ReadError::Inside(error) => inside(error),
            })?;
            have = next;
        }
        Ok(length)
    }
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;
