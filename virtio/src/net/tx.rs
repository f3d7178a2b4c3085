// SPDX-License-Identifier: Apache-2.0
//! Transmitting: frames from the guest's buffers to the TAP.
//!
//! The kernel copies a frame while it is written, so a buffer is the driver's again at once, and
//! nothing is ever in flight. It also checks the header, which the guest may fill with anything;
//! what it refuses is dropped, as by a network card that cannot send.
//!
//! A frame for the metadata service is caught in [`Tx::transmit`], before the TAP sees it. One that
//! has to wait for a rate limit would be so too.

use std::sync::Arc;

use super::announce::Announcer;
use super::metadata::Metadata;
use super::{BATCH, Ends, HEADER_LEN, MAX_FRAME};
use crate::limiter::Gate;
use crate::memory::{GuestMemory, IoBuffers};
use crate::queue::{Chain, Queue, QueueError, QueueState};
use crate::signals::DeviceSignals;

pub(super) struct Tx {
    queue: Queue,
    ends: Ends,
    memory: GuestMemory,
    chain: Chain,
    buffers: IoBuffers,
    gate: Gate,
    announcer: Arc<Announcer>,
}

impl Tx {
    pub(super) fn new(
        queue: Queue,
        memory: &GuestMemory,
        ends: Ends,
        announcer: Arc<Announcer>,
    ) -> Self {
        Self {
            queue,
            ends,
            memory: memory.clone(),
            chain: Chain::new(),
            buffers: IoBuffers::new(memory.clone()),
            gate: Gate::default(),
            announcer,
        }
    }

    /// Sends up to a batch of frames; whether there was any.
    pub(super) fn process(
        &mut self,
        signals: &DeviceSignals,
        mut metadata: Option<&mut Metadata>,
    ) -> Result<bool, QueueError> {
        let mut any = false;
        for _ in 0..BATCH {
            let limiter = &self.ends.limiter;
            if !self.gate.pop(limiter, &mut self.queue, &mut self.chain)? {
                break;
            }
            any = true;
            self.transmit(metadata.as_deref_mut());
            self.queue.push_used(self.chain.head(), 0)?;
        }
        if any {
            self.queue.publish()?;
            if self.queue.needs_interrupt()? {
                signals.used_buffers();
            }
        }
        Ok(any)
    }

    /// Sends what is in the chain.
    fn transmit(&mut self, metadata: Option<&mut Metadata>) {
        let Ends {
            tap,
            counters,
            limiter,
        } = &self.ends;
        let frame = self.chain.readable();
        let Some(len) = frame_len(frame.len()) else {
            counters.tx_bad_chains.add(1);
            return;
        };
        if metadata.is_some_and(|service| service.take(&self.memory, frame, len)) {
            return;
        }
        self.announcer.see(&self.memory, frame, len);
        self.buffers.clear();
        if frame.add_to(&mut self.buffers, 0, frame.len()).is_err() {
            counters.tx_bad_chains.add(1);
            return;
        }
        limiter.charge(len);
        match tap.write_frame(&self.buffers) {
            Ok(()) => {
                counters.tx_frames.add(1);
                counters.tx_bytes.add(len);
            }
            Err(_) => counters.tx_errors.add(1),
        }
    }

    pub(super) fn arm(&mut self) -> Result<bool, QueueError> {
        self.gate.enable_kicks(&mut self.queue)
    }

    pub(super) fn disarm(&mut self) -> Result<(), QueueError> {
        self.queue.suppress_kicks()
    }

    pub(super) fn finish(self) -> QueueState {
        self.queue.state()
    }
}

/// The length of the frame behind its header, if `len` bytes can be a header and a frame.
fn frame_len(len: u64) -> Option<u64> {
    let header = u64::from(HEADER_LEN);
    (header + 1..=MAX_FRAME as u64)
        .contains(&len)
        .then(|| len - header)
}
