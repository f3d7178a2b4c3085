// SPDX-License-Identifier: Apache-2.0
//! Receiving: frames from the TAP to the guest's buffers.
//!
//! How long a frame is shows only when it is read. A read gets as many of the guest's buffers as
//! recent frames have needed, and behind them a spill of our own that takes the rest of any
//! frame; what lands there is copied. So small frames do not pay for large ones being possible,
//! large ones are not copied as long as they keep coming, and a driver with few buffers gets all
//! the frames that fit into them.
//!
//! Chains are used in the order in which they were popped, always: those that still wait when the
//! device stops are then simply the last ones, and are put back.

use std::collections::VecDeque;

use super::metadata::Metadata;
use super::tap::Frame;
use super::{BATCH, Ends, HEADER_LEN, MAX_FRAME};
use crate::memory::{GuestMemory, IoBuffers};
use crate::queue::{Chain, Queue, QueueError, QueueState};
use crate::signals::DeviceSignals;

/// Offset of `num_buffers` in the header; the TAP leaves it as it is.
const NUM_BUFFERS: u64 = 10;

/// A chain that was popped and not used yet.
struct Waiting {
    chain: Chain,
    /// How many bytes it takes; none if it is not in guest memory.
    room: u64,
}

impl Waiting {
    /// Whether no frame can start here.
    fn is_useless(&self) -> bool {
        self.room < u64::from(HEADER_LEN)
    }
}

pub(super) struct Rx {
    queue: Queue,
    memory: GuestMemory,
    ends: Ends,
    /// Whether a frame may take several chains (VIRTIO_NET_F_MRG_RXBUF).
    mergeable: bool,
    waiting: VecDeque<Waiting>,
    /// Sum of what waits.
    room: u64,
    /// Chains to be popped into.
    spare: Vec<Chain>,
    /// Where what waits lies in memory, if `placed`.
    places: IoBuffers,
    placed: bool,
    spill: Box<[u8]>,
    /// A frame that was read and needs more chains.
    held: Option<Frame>,
    /// How much the next frame is expected to need.
    expected: usize,
    /// The most chains that the driver has had in the queue.
    most_in_flight: u16,
    /// Whether any chain was used since the driver was last told.
    used: bool,
    failed: bool,
}

impl Rx {
    pub(super) fn new(queue: Queue, memory: &GuestMemory, mergeable: bool, ends: Ends) -> Self {
        Self {
            queue,
            memory: memory.clone(),
            ends,
            mergeable,
            waiting: VecDeque::new(),
            room: 0,
            spare: Vec::new(),
            places: IoBuffers::new(memory.clone()),
            placed: true,
            spill: vec![0; MAX_FRAME].into(),
            held: None,
            expected: 0,
            most_in_flight: 0,
            used: false,
            failed: false,
        }
    }

    /// Receives up to a batch of frames; whether there was anything to do.
    pub(super) fn process(
        &mut self,
        signals: &DeviceSignals,
        mut metadata: Option<&mut Metadata>,
    ) -> Result<bool, QueueError> {
        let mut frames = 0;
        while frames < BATCH && self.receive(signals, metadata.as_deref_mut())? {
            frames += 1;
        }
        let used = std::mem::take(&mut self.used);
        if used {
            self.queue.publish()?;
            if self.queue.needs_interrupt()? {
                signals.used_buffers();
            }
        }
        Ok(used || frames > 0)
    }

    /// Receives one frame; whether there was one that is done with.
    fn receive(
        &mut self,
        signals: &DeviceSignals,
        metadata: Option<&mut Metadata>,
    ) -> Result<bool, QueueError> {
        let frame = match self.held {
            Some(frame) => frame,
            None => {
                self.gather(self.expected as u64)?;
                if self.waiting.front().is_none_or(Waiting::is_useless)
                    || !self.ends.limiter.admits()
                {
                    return Ok(false);
                }
                // The service's frames are few: the guest has asked for each.
                let own = metadata.and_then(|service| service.give(&mut self.spill));
                let read = match own {
                    Some(frame) => Some(frame),
                    None => self.read_frame(signals)?,
                };
                let Some(frame) = read else {
                    return Ok(false);
                };
                frame
            }
        };
        if !self.gather(frame.len as u64)? {
            return Ok(self.hold_or_drop(frame));
        }
        self.held = None;
        self.expected = frame.len.max(self.expected - self.expected / 32);
        self.deliver(frame)?;
        Ok(true)
    }

    /// Collects chains until there is room for `len` bytes and a header at the front; whether
    /// there is. A driver without mergeable buffers gets one chain.
    fn gather(&mut self, len: u64) -> Result<bool, QueueError> {
        // A driver could add useless chains as fast as they are taken; there is other work.
        for _ in 0..=self.queue.size() {
            match self.waiting.front() {
                Some(front) if front.is_useless() => {
                    self.ends.counters.rx_bad_chains.add(1);
                    self.use_front(0)?;
                    continue;
                }
                Some(_) if self.room >= len => return Ok(true),
                Some(_) if !self.mergeable => return Ok(false),
                _ => {}
            }
            if !self.pop()? {
                return Ok(false);
            }
        }
        Ok(false)
    }

    fn pop(&mut self) -> Result<bool, QueueError> {
        let mut chain = self.spare.pop().unwrap_or_default();
        if !self.queue.pop(&mut chain)? {
            self.spare.push(chain);
            return Ok(false);
        }
        self.most_in_flight = self.most_in_flight.max(self.queue.in_flight());
        let len = chain.writable().len();
        let fits = chain.writable().add_to(&mut self.places, 0, len).is_ok();
        let room = if fits { len } else { 0 };
        // What was added of one that does not fit has to go again.
        self.placed &= fits;
        self.room += room;
        self.waiting.push_back(Waiting { chain, room });
        Ok(true)
    }

    /// Gives the front chain, with `len` bytes in it, back to the driver.
    fn use_front(&mut self, len: u32) -> Result<(), QueueError> {
        if let Some(Waiting { chain, room }) = self.waiting.pop_front() {
            self.room -= room;
            self.placed = self.waiting.is_empty();
            if self.placed {
                self.places.clear();
            }
            self.used = true;
            let head = chain.head();
            self.spare.push(chain);
            self.queue.push_used(head, len)?;
        }
        Ok(())
    }

    /// Reads a frame into what waits, and the spill.
    fn read_frame(&mut self, signals: &DeviceSignals) -> Result<Option<Frame>, QueueError> {
        if !self.placed {
            self.places.clear();
            for Waiting { chain, room } in &self.waiting {
                chain.writable().add_to(&mut self.places, 0, *room)?;
            }
            self.placed = true;
        }
        let frame = match self.ends.tap.read_frame(&self.places, &mut self.spill) {
            Ok(frame) => frame,
            Err(error) => {
                // What failed may have begun.
                self.places.mark_written(self.places.len());
                self.ends.counters.rx_errors.add(1);
                if !std::mem::replace(&mut self.failed, true) {
                    let name = self.ends.tap.name();
                    signals.warn(format_args!("TAP {name} cannot be read: {error}"));
                }
                None
            }
        };
        if let Some(frame) = frame {
            self.places.mark_written(frame.direct);
            let bytes = frame.len.saturating_sub(HEADER_LEN.into());
            self.ends.limiter.charge(bytes as u64);
        }
        Ok(frame)
    }

    /// What becomes of a frame with no room; whether it is done with.
    fn hold_or_drop(&mut self, frame: Frame) -> bool {
        // It is worth to wait as long as the driver has chains that it has not given us.
        if self.mergeable && self.queue.in_flight() < self.most_in_flight {
            self.held = Some(frame);
            return false;
        }
        self.ends.counters.rx_dropped.add(1);
        self.held = None;
        true
    }

    /// Completes a frame, for which there is room, and gives its chains to the driver.
    fn deliver(&mut self, frame: Frame) -> Result<(), QueueError> {
        self.copy_spill(frame)?;
        let mut left = frame.len as u64;
        let mut count: u16 = 0;
        for waiting in &self.waiting {
            count += 1;
            left = left.saturating_sub(waiting.room);
            if left == 0 {
                break;
            }
        }
        if let Some(front) = self.waiting.front() {
            let header = front.chain.writable();
            header.write_at(&self.memory, NUM_BUFFERS, &count.to_le_bytes())?;
        }
        let mut left = frame.len as u64;
        for _ in 0..count {
            let room = self.waiting.front().map_or(0, |front| front.room);
            let len = room.min(left);
            left -= len;
            // At most a frame's length.
            self.use_front(u32::try_from(len).unwrap_or(u32::MAX))?;
        }
        self.ends.counters.rx_frames.add(1);
        let bytes = frame.len.saturating_sub(HEADER_LEN.into());
        self.ends.counters.rx_bytes.add(bytes as u64);
        Ok(())
    }

    /// Moves what a frame has in the spill to the chains that it belongs to.
    fn copy_spill(&self, Frame { len, direct }: Frame) -> Result<(), QueueError> {
        if direct == len {
            return Ok(());
        }
        let mut rest = self.spill.get(..len - direct).unwrap_or_default();
        let mut skip = direct as u64;
        for Waiting { chain, room } in &self.waiting {
            if skip >= *room {
                skip -= room;
                continue;
            }
            let count = chain.writable().write_at(&self.memory, skip, rest)?;
            rest = rest.get(count..).unwrap_or_default();
            if rest.is_empty() {
                break;
            }
            skip = 0;
        }
        Ok(())
    }

    /// Asks for notifications where only they help. With chains at hand it is the TAP that wakes
    /// the worker, and a notification for each chain that comes back would be for nothing.
    pub(super) fn arm(&mut self) -> Result<bool, QueueError> {
        if self.waiting.is_empty() || self.held.is_some() {
            return self.queue.enable_kicks();
        }
        Ok(false)
    }

    pub(super) fn disarm(&mut self) -> Result<(), QueueError> {
        self.queue.suppress_kicks()
    }

    /// Puts back what was popped. A frame that is still held is lost, as on any wire.
    pub(super) fn finish(mut self) -> QueueState {
        if self.held.is_some() {
            self.ends.counters.rx_dropped.add(1);
        }
        for _ in &self.waiting {
            self.queue.undo_pop();
        }
        self.queue.state()
    }
}
