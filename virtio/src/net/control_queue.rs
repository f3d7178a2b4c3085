// SPDX-License-Identifier: Apache-2.0
//! The control queue (virtio 1.3, section 5.1.6.5): commands of the driver, and an answer to each.
//!
//! The only command that is carried out is the one that goes with VIRTIO_NET_F_GUEST_ANNOUNCE.

use std::sync::Arc;

use super::BATCH;
use super::announce::Announcer;
use crate::memory::GuestMemory;
use crate::queue::{Chain, Queue, QueueError, QueueState};
use crate::signals::DeviceSignals;

/// Class VIRTIO_NET_CTRL_ANNOUNCE, command VIRTIO_NET_CTRL_ANNOUNCE_ACK.
const ANNOUNCE_ACK: [u8; 2] = [3, 0];

const OK: u8 = 0;
const ERR: u8 = 1;

pub(super) struct ControlQueue {
    queue: Queue,
    memory: GuestMemory,
    announcer: Arc<Announcer>,
    chain: Chain,
}

impl ControlQueue {
    pub(super) fn new(queue: Queue, memory: &GuestMemory, announcer: Arc<Announcer>) -> Self {
        Self {
            queue,
            memory: memory.clone(),
            announcer,
            chain: Chain::new(),
        }
    }

    /// Answers up to a batch of commands; whether there was any.
    pub(super) fn process(&mut self, signals: &DeviceSignals) -> Result<bool, QueueError> {
        let mut any = false;
        for _ in 0..BATCH {
            if !self.queue.pop(&mut self.chain)? {
                break;
            }
            any = true;
            let answer = self.carry_out();
            let room = self.chain.writable();
            // There is nobody to tell that there is no place for an answer.
            let written = room.write_at(&self.memory, 0, &[answer]).unwrap_or(0);
            let len = u32::try_from(written).unwrap_or(0);
            self.queue.push_used(self.chain.head(), len)?;
        }
        if any {
            self.queue.publish()?;
            if self.queue.needs_interrupt()? {
                signals.used_buffers();
            }
        }
        Ok(any)
    }

    fn carry_out(&self) -> u8 {
        let mut command = [0xff; 2];
        let read = self.chain.readable().read_at(&self.memory, 0, &mut command);
        if !matches!(read, Ok(2)) || command != ANNOUNCE_ACK {
            return ERR;
        }
        self.announcer.acknowledge();
        OK
    }

    pub(super) fn arm(&mut self) -> Result<bool, QueueError> {
        self.queue.enable_kicks()
    }

    pub(super) fn disarm(&mut self) -> Result<(), QueueError> {
        self.queue.suppress_kicks()
    }

    pub(super) fn finish(self) -> QueueState {
        self.queue.state()
    }
}
