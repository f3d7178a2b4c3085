// SPDX-License-Identifier: Apache-2.0
//! Bytes from the guest that the host's side has not taken yet.

use std::io;
use std::os::unix::net::UnixStream;

use super::socket;
use crate::memory::{GuestMemory, IoBuffers};
use crate::queue::Buffers;

/// The payload of a packet, in the guest's buffers.
pub(super) struct Payload<'a> {
    pub(super) memory: &'a GuestMemory,
    /// The packet's buffers.
    pub(super) buffers: &'a Buffers,
    /// Where in them the payload starts.
    pub(super) offset: u64,
    /// Its length in bytes; the buffers have as many.
    pub(super) len: u32,
    /// A list to use.
    pub(super) places: &'a mut IoBuffers,
}

impl Payload<'_> {
    /// Sends as much as the socket takes straight from guest memory.
    pub(super) fn send(&mut self, stream: &UnixStream) -> io::Result<usize> {
        self.places.clear();
        self.buffers
            .add_to(self.places, self.offset, self.len.into())
            .map_err(io::Error::other)?;
        socket::send(stream, self.places)
    }
}

/// A queue of bytes that takes no memory while it is empty.
#[derive(Debug, Default)]
pub(super) struct Unsent {
    data: Vec<u8>,
    /// How much of `data` is sent.
    start: usize,
}

impl Unsent {
    pub(super) fn len(&self) -> usize {
        self.data.len() - self.start
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds a payload without its first `skip` bytes; `false` if it is not in guest memory.
    pub(super) fn append(&mut self, payload: &Payload<'_>, skip: usize) -> bool {
        let count = (payload.len as usize).saturating_sub(skip);
        self.data.drain(..self.start);
        self.start = 0;
        let before = self.data.len();
        self.data.resize(before + count, 0);
        let place = self.data.get_mut(before..).unwrap_or_default();
        let offset = payload.offset + skip as u64;
        let copied = payload.buffers.read_at(payload.memory, offset, place);
        copied.is_ok_and(|copied| copied == count)
    }

    /// Sends as much as the socket takes; how much that was.
    pub(super) fn send(&mut self, stream: &UnixStream) -> io::Result<usize> {
        let rest = self.data.get(self.start..).unwrap_or_default();
        let sent = socket::send_bytes(stream, rest)?;
        self.start += sent;
        if self.is_empty() {
            *self = Self::default();
        }
        Ok(sent)
    }

    /// Forgets everything; how much it was.
    pub(super) fn discard(&mut self) -> usize {
        let len = self.len();
        *self = Self::default();
        len
    }
}
