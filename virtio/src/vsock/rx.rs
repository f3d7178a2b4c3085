// SPDX-License-Identifier: Apache-2.0
//! The receive queue: packets for the guest, and bytes straight from a socket to its buffers.
//!
//! A single read fills the buffers of several packets, whose headers are written when it is known
//! how much there was. Chains that turn out not to be needed stay popped for the next packet.

use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::counters::VsockCounters;
use super::packet::{HEADER_LEN, Header, op};
use super::socket;
use crate::memory::{GuestMemory, IoBuffers};
use crate::queue::{Chain, Queue, QueueError, QueueState};

/// The longest payload of a packet, in bytes.
const MAX_PAYLOAD: u64 = 64 * 1024;
/// The most bytes in one read.
const MAX_READ: u64 = 256 * 1024;

/// The most chains of no use that are given back in one go.
const MAX_BAD: usize = 64;

pub(super) struct Rx {
    queue: Queue,
    counters: Arc<VsockCounters>,
    memory: GuestMemory,
    /// Chains that are popped, have room for a header and a byte, and lie in guest memory.
    stock: VecDeque<Chain>,
    spare: Vec<Chain>,
    places: IoBuffers,
    used: bool,
}

/// How much fits into a chain behind the header.
fn room(chain: &Chain) -> u64 {
    let len = chain.writable().len();
    len.saturating_sub(HEADER_LEN as u64).min(MAX_PAYLOAD)
}

impl Rx {
    pub(super) fn new(queue: Queue, memory: &GuestMemory, counters: Arc<VsockCounters>) -> Self {
        Self {
            queue,
            counters,
            memory: memory.clone(),
            stock: VecDeque::new(),
            spare: Vec::new(),
            places: IoBuffers::new(memory.clone()),
            used: false,
        }
    }

    /// Sees to it that there are buffers for `count` packets, if the guest has given that many;
    /// whether there are any. Chains that are of no use go back empty, and are counted.
    pub(super) fn stock(&mut self, count: usize) -> Result<bool, QueueError> {
        let mut bad = 0;
        while self.stock.len() < count && bad < MAX_BAD {
            let mut chain = self.spare.pop().unwrap_or_default();
            if !self.queue.pop(&mut chain)? {
                self.spare.push(chain);
                break;
            }
            self.places.clear();
            let buffers = chain.writable();
            let here = buffers.add_to(&mut self.places, 0, buffers.len()).is_ok();
            if here && room(&chain) > 0 {
                self.stock.push_back(chain);
                continue;
            }
            if !self.stock.is_empty() {
                // Chains are used in the order in which they were popped, so that those in stock
                // can be put back.
                self.queue.undo_pop();
                self.spare.push(chain);
                break;
            }
            bad += 1;
            self.counters.bad_chains.add(1);
            self.give_back(chain, 0)?;
        }
        Ok(!self.stock.is_empty())
    }

    fn give_back(&mut self, chain: Chain, len: u64) -> Result<(), QueueError> {
        let head = chain.head();
        self.spare.push(chain);
        self.used = true;
        // At most a header and a payload.
        self.queue
            .push_used(head, u32::try_from(len).unwrap_or(u32::MAX))
    }

    /// Gives the guest a packet in the first chain of the stock; its payload is there already.
    pub(super) fn put(&mut self, header: &Header) -> Result<(), QueueError> {
        let Some(chain) = self.stock.pop_front() else {
            return Ok(());
        };
        self.counters.rx_packets.add(1);
        self.counters.rx_bytes.add(header.len.into());
        let bytes = header.to_bytes();
        chain.writable().write_at(&self.memory, 0, &bytes)?;
        self.give_back(chain, HEADER_LEN as u64 + u64::from(header.len))
    }

    /// Reads up to `limit` bytes from `stream` to where the payload of up to `packets` packets
    /// goes; how many there were, and how many there was room for.
    pub(super) fn read(
        &mut self,
        stream: &UnixStream,
        limit: u32,
        packets: usize,
    ) -> (io::Result<usize>, usize) {
        self.places.clear();
        let mut left = u64::from(limit).min(MAX_READ);
        for chain in self.stock.iter().take(packets) {
            let len = room(chain).min(left);
            let added = chain
                .writable()
                .add_to(&mut self.places, HEADER_LEN as u64, len);
            if let Err(error) = added {
                return (Err(io::Error::other(error)), 0);
            }
            left -= len;
        }
        let result = socket::receive(stream, &self.places);
        match &result {
            Ok(count) => self.places.mark_written(*count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // What failed may have begun.
            Err(_) => self.places.mark_written(self.places.len()),
        }
        (result, self.places.len())
    }

    /// Gives the guest `count` bytes that were read, in as many packets as they take. `stamp`
    /// completes each header.
    pub(super) fn put_data(
        &mut self,
        header: &Header,
        count: usize,
        mut stamp: impl FnMut(&mut Header),
    ) -> Result<(), QueueError> {
        let mut left = count as u64;
        while left > 0
            && let Some(chain) = self.stock.front()
        {
            let len = room(chain).min(left);
            left -= len;
            let mut header = Header {
                op: op::RW,
                // At most `MAX_PAYLOAD`.
                len: u32::try_from(len).unwrap_or(u32::MAX),
                ..*header
            };
            stamp(&mut header);
            self.put(&header)?;
        }
        Ok(())
    }

    /// Shows the guest what was given; whether it wants an interrupt for it.
    pub(super) fn publish(&mut self) -> Result<bool, QueueError> {
        if !std::mem::take(&mut self.used) {
            return Ok(false);
        }
        self.queue.publish()?;
        self.queue.needs_interrupt()
    }

    /// Asks to be notified of buffers; whether there are any.
    pub(super) fn arm(&mut self) -> Result<bool, QueueError> {
        self.queue.enable_kicks()
    }

    pub(super) fn disarm(&mut self) -> Result<(), QueueError> {
        self.queue.suppress_kicks()
    }

    /// Puts back what was popped and not used.
    pub(super) fn finish(mut self) -> QueueState {
        for _ in &self.stock {
            self.queue.undo_pop();
        }
        self.queue.state()
    }
}
