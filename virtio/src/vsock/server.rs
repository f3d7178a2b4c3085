// SPDX-License-Identifier: Apache-2.0
//! The work on a vsock device's queues, on its worker's thread.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vm_memory::GuestMemoryError;
use vmm_sys_util::eventfd::EventFd;

use super::counters::VsockCounters;
use super::muxer::Muxer;
use super::packet::{HEADER_LEN, Header};
use super::rx::Rx;
use super::unsent::Payload;
use crate::device::StartError;
use crate::memory::{GuestMemory, IoBuffers};
use crate::queue::{Chain, Queue, QueueError, QueueState};
use crate::signals::DeviceSignals;
use crate::worker::Backend;

/// Packets of the guest in one round.
const ROUND: usize = 64;

/// Event: the device has lost all connections, and may have another CID (section 5.10.6.7).
const TRANSPORT_RESET: u32 = 0;

/// The queues of a running device, and what serves them.
pub(super) struct Server {
    pub(super) rx: Rx,
    pub(super) tx: Tx,
    pub(super) events: Events,
    pub(super) muxer: Muxer,
    pub(super) kicks: [Arc<EventFd>; 3],
    pub(super) signals: DeviceSignals,
}

/// What is left when a device stops.
pub(super) struct Stopped {
    pub(super) queues: [QueueState; 3],
    pub(super) muxer: Muxer,
    /// Whether the guest has not been told yet that its connections are gone.
    pub(super) owes_reset: bool,
}

impl Backend for Server {
    type State = Stopped;

    fn process(&mut self) -> Result<bool, StartError> {
        let mut any = self.muxer.poll()?;
        any |= self.tx.process(&mut self.muxer)?;
        any |= self.muxer.fill(&mut self.rx)?;
        any |= self.events.process()?;
        let wanted = [
            self.tx.queue.needs_interrupt()?,
            self.rx.publish()?,
            self.events.queue.needs_interrupt()?,
        ];
        if wanted.contains(&true) {
            self.signals.used_buffers();
        }
        Ok(any)
    }

    fn arm(&mut self) -> Result<bool, StartError> {
        // The queue that nothing can be done with now is left alone.
        let mut any = self.muxer.can_receive() && self.tx.queue.enable_kicks()?;
        any |= self.muxer.has_something_to_say() && self.rx.arm()?;
        any |= self.events.owes_reset && self.events.queue.enable_kicks()?;
        Ok(any)
    }

    fn disarm(&mut self) -> Result<(), StartError> {
        self.tx.queue.suppress_kicks()?;
        self.rx.disarm()?;
        self.events.queue.suppress_kicks()?;
        Ok(())
    }

    fn wake_fds(&self) -> Vec<RawFd> {
        let kicks = self.kicks.iter().map(AsRawFd::as_raw_fd);
        kicks.chain([self.muxer.as_raw_fd()]).collect()
    }

    fn finish(self) -> Stopped {
        Stopped {
            queues: [
                self.rx.finish(),
                self.tx.queue.state(),
                self.events.queue.state(),
            ],
            muxer: self.muxer,
            owes_reset: self.events.owes_reset,
        }
    }
}

/// The transmit queue.
pub(super) struct Tx {
    queue: Queue,
    memory: GuestMemory,
    counters: Arc<VsockCounters>,
    chain: Chain,
    places: IoBuffers,
}

impl Tx {
    pub(super) fn new(queue: Queue, memory: &GuestMemory, counters: Arc<VsockCounters>) -> Self {
        Self {
            queue,
            memory: memory.clone(),
            counters,
            chain: Chain::new(),
            places: IoBuffers::new(memory.clone()),
        }
    }

    /// Takes the guest's packets, up to a bounded number; whether there were any.
    fn process(&mut self, muxer: &mut Muxer) -> Result<bool, QueueError> {
        let mut any = false;
        for _ in 0..ROUND {
            if !muxer.can_receive() || !self.queue.pop(&mut self.chain)? {
                break;
            }
            any = true;
            self.hand_over(muxer);
            self.queue.push_used(self.chain.head(), 0)?;
        }
        self.queue.publish()?;
        Ok(any)
    }

    /// Gives the packet in the chain to the muxer.
    fn hand_over(&mut self, muxer: &mut Muxer) {
        let buffers = self.chain.readable();
        let mut bytes = [0; HEADER_LEN];
        if !matches!(buffers.read_at(&self.memory, 0, &mut bytes), Ok(HEADER_LEN)) {
            self.counters.bad_chains.add(1);
            return;
        }
        let header = Header::from_bytes(&bytes);
        let offset = HEADER_LEN as u64;
        if buffers.len() - offset < header.len.into() {
            self.counters.bad_chains.add(1);
            muxer.receive_torn(&header);
            return;
        }
        let mut payload = Payload {
            memory: &self.memory,
            buffers,
            offset,
            len: header.len,
            places: &mut self.places,
        };
        muxer.receive(&header, &mut payload);
    }
}

/// The event queue.
pub(super) struct Events {
    pub(super) queue: Queue,
    pub(super) memory: GuestMemory,
    /// Whether the guest has to be told that its connections are gone.
    pub(super) owes_reset: bool,
}

impl Events {
    /// Tells the guest what it has to be told, as soon as it has a buffer for it; whether it has.
    fn process(&mut self) -> Result<bool, QueueError> {
        if !self.owes_reset {
            return Ok(false);
        }
        let mut chain = Chain::new();
        if !self.queue.pop(&mut chain)? {
            return Ok(false);
        }
        let event = TRANSPORT_RESET.to_le_bytes();
        let written = chain.writable().write_at(&self.memory, 0, &event);
        let fits = is_whole(&written, event.len());
        self.queue
            .push_used(chain.head(), if fits { 4 } else { 0 })?;
        self.queue.publish()?;
        self.owes_reset = !fits;
        Ok(true)
    }
}

fn is_whole(written: &Result<usize, GuestMemoryError>, len: usize) -> bool {
    written.as_ref().is_ok_and(|written| *written == len)
}
