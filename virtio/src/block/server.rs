// SPDX-License-Identifier: Apache-2.0
//! The work on a block device's queue: taking requests, having them carried out, answering.

use std::error::Error;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use thiserror::Error;
use vm_memory::{Bytes, GuestMemoryError};
use vmm_sys_util::eventfd::EventFd;

use super::control::Shared;
use super::counters::Kind;
use super::engine::{Done, Engine, Ticket};
use super::request::{HEADER_SIZE, ID_SIZE, Limits, Refusal, Request, S_IOERR, S_OK};
use crate::device::StartError;
use crate::limiter::Gate;
use crate::memory::GuestMemory;
use crate::queue::{Chain, Queue, QueueState};
use crate::signals::DeviceSignals;
#[cfg(test)]
use crate::testing::marks::{self, Site};
use crate::worker::Backend;

/// The most requests that are taken before the worker looks at anything else.
const MAX_ROUND: usize = 64;
/// How many bytes of data are moved before the worker looks at anything else; a single request may
/// have more.
const MAX_ROUND_BYTES: u64 = 16 << 20;
/// How many answers are collected before the driver sees them. Each time it is shown some, the
/// cache line with the index travels; but what it is shown late, it also replaces late.
const MAX_UNPUBLISHED: usize = 8;

/// Why a device cannot go on.
#[derive(Debug, Error)]
enum ServeError {
    #[error("a block request has no room for its status")]
    NoStatus,
    #[error("the status byte of a block request is not in guest memory")]
    Status(#[source] GuestMemoryError),
    #[error("the host takes no more block requests")]
    Host(#[source] io::Error),
}

/// What a server is made of.
pub(super) struct Parts {
    pub(super) queue: Queue,
    pub(super) kick: Arc<EventFd>,
    pub(super) memory: GuestMemory,
    pub(super) signals: DeviceSignals,
    pub(super) limits: Limits,
    pub(super) serial: [u8; ID_SIZE as usize],
    /// What log messages call the device.
    pub(super) name: String,
    pub(super) engine: Box<dyn Engine>,
    pub(super) shared: Arc<Shared>,
    /// That of the disk which `engine` has.
    pub(super) generation: u64,
}

/// The queue of a running block device, and what serves it.
pub(super) struct Server {
    parts: Parts,
    chain: Chain,
    /// How many answers the driver has not been shown.
    unpublished: usize,
    /// How many bytes of data were asked for in this round.
    round_bytes: u64,
    gate: Gate,
    /// About the time that it is: it was read when the last request began or ended.
    now: Instant,
}

impl Server {
    pub(super) fn new(parts: Parts) -> Self {
        Self {
            parts,
            chain: Chain::new(),
            unpublished: 0,
            round_bytes: 0,
            gate: Gate::default(),
            now: Instant::now(),
        }
    }

    /// Starts or answers the request in `self.chain`.
    fn serve(&mut self) -> Result<(), StartError> {
        let Some(status) = self.chain.writable().last_byte() else {
            return Err(ServeError::NoStatus.into());
        };
        let mut ticket = Ticket {
            head: self.chain.head(),
            status,
            kind: Kind::Other,
            offset: 0,
            bytes: 0,
            begun: self.now,
        };
        let Parts { limits, memory, .. } = &self.parts;
        let begun = limits.parse(&self.chain, memory).and_then(|request| {
            ticket.kind = Kind::of(&request);
            (ticket.offset, ticket.bytes) = (request.offset(), request.len());
            self.begin(request, ticket)
        });
        match begun {
            Ok(None) => Ok(()),
            Ok(Some(done)) => {
                // With requests that are carried out at once, one ends when the next begins.
                self.now = Instant::now();
                self.finish_request(&done)
            }
            Err(refusal) => {
                self.parts.shared.counters.refused.add(1);
                self.warn(&refusal);
                self.answer(ticket, 0, refusal.status())
            }
        }
    }

    /// Starts `request`; what is returned is done already.
    fn begin(&mut self, request: Request, ticket: Ticket) -> Result<Option<Done>, Refusal> {
        let (chain, parts) = (&self.chain, &mut self.parts);
        match request {
            Request::GetId => {
                chain.writable().write_at(&parts.memory, 0, &parts.serial)?;
                return Ok(Some(Done {
                    ticket,
                    written: u32::from(ID_SIZE),
                    result: Ok(()),
                }));
            }
            Request::Read { len, .. } => chain.writable().add_to(parts.engine.buffers(), 0, len)?,
            Request::Write { len, .. } => {
                chain
                    .readable()
                    .add_to(parts.engine.buffers(), HEADER_SIZE, len)?;
            }
            Request::Flush | Request::Discard { .. } | Request::WriteZeroes { .. } => {}
        }
        self.round_bytes = self.round_bytes.saturating_add(ticket.bytes);
        if ticket.kind.is_transfer() {
            parts.shared.limiter.charge(ticket.bytes);
        }
        Ok(parts.engine.start(request, ticket))
    }

    fn finish_request(&mut self, done: &Done) -> Result<(), StartError> {
        let Shared { counters, log, .. } = &*self.parts.shared;
        if done.ticket.kind.is_change() {
            // Before it is answered. One that failed may have been carried out in part.
            log.mark(done.ticket.offset, done.ticket.bytes);
        }
        let status = match &done.result {
            Ok(()) => {
                let Ticket {
                    kind, bytes, begun, ..
                } = done.ticket;
                counters.add(kind, bytes, self.now.saturating_duration_since(begun));
                S_OK
            }
            Err(error) => {
                counters.failed.add(1);
                let Parts { name, signals, .. } = &self.parts;
                signals.warn(format_args!("{name}: the host failed a request: {error}"));
                S_IOERR
            }
        };
        self.answer(done.ticket, done.written, status)
    }

    fn answer(&mut self, ticket: Ticket, written: u32, status: u8) -> Result<(), StartError> {
        let Parts { queue, memory, .. } = &mut self.parts;
        memory
            .write_obj(status, ticket.status)
            .map_err(ServeError::Status)?;
        #[cfg(test)]
        marks::made(Site::Status, memory, ticket.status, 1);
        queue.push_used(ticket.head, written.saturating_add(1))?;
        self.unpublished += 1;
        if self.unpublished >= MAX_UNPUBLISHED {
            self.publish()?;
        }
        Ok(())
    }

    /// Shows the driver the answers that it has not seen.
    fn publish(&mut self) -> Result<(), StartError> {
        if self.unpublished == 0 {
            return Ok(());
        }
        self.unpublished = 0;
        let Parts { queue, signals, .. } = &mut self.parts;
        queue.publish()?;
        if queue.needs_interrupt()? {
            signals.used_buffers();
        }
        Ok(())
    }

    /// Answers what the engine has done; whether there was anything.
    fn collect(&mut self) -> Result<bool, StartError> {
        let mut any = false;
        while let Some(done) = self.parts.engine.next_done() {
            if !any {
                self.now = Instant::now();
            }
            any = true;
            self.finish_request(&done)?;
        }
        Ok(any)
    }

    fn warn(&self, error: &dyn Error) {
        let Parts { name, signals, .. } = &self.parts;
        signals.warn(format_args!("{name}: {error}"));
    }

    /// Answers what is in flight until nothing is.
    fn drain(&mut self) -> Result<(), StartError> {
        loop {
            self.collect()?;
            if !self.parts.engine.wait().map_err(ServeError::Host)? {
                return self.publish();
            }
        }
    }

    /// Goes on with the disk that there is now, if it is another one.
    fn look_for_exchange(&mut self) -> Result<(), StartError> {
        let generation = self.parts.shared.generation();
        if generation != self.parts.generation {
            self.drain()?;
            let disk = self.parts.shared.disk();
            self.parts.generation = generation;
            self.parts.limits.sectors = disk.sectors;
            self.parts.engine.set_disk(disk);
        }
        Ok(())
    }

    /// Takes the next request from the queue, if there is one that may be taken.
    fn take(&mut self) -> Result<bool, StartError> {
        let Parts {
            queue,
            engine,
            shared,
            ..
        } = &mut self.parts;
        if self.round_bytes >= MAX_ROUND_BYTES || !engine.has_room() {
            return Ok(false);
        }
        let taken = self.gate.pop(&shared.limiter, queue, &mut self.chain)?;
        if taken {
            // A driver that has heard of another disk asks for that one.
            self.look_for_exchange()?;
        }
        Ok(taken)
    }
}

impl Backend for Server {
    type State = QueueState;

    fn process(&mut self) -> Result<bool, StartError> {
        self.look_for_exchange()?;
        let mut worked = self.collect()?;
        self.round_bytes = 0;
        let mut taken = 0;
        while taken < MAX_ROUND && self.take()? {
            if taken == 0 {
                self.now = Instant::now();
            }
            taken += 1;
            self.serve()?;
        }
        worked |= taken > 0;
        self.parts.engine.submit().map_err(ServeError::Host)?;
        worked |= self.collect()?;
        self.publish()?;
        Ok(worked)
    }

    fn arm(&mut self) -> Result<bool, StartError> {
        // Without room there is nothing to do for new requests; the engine wakes us when there is.
        let Parts { engine, queue, .. } = &mut self.parts;
        Ok(engine.has_room() && self.gate.enable_kicks(queue)?)
    }

    fn disarm(&mut self) -> Result<(), StartError> {
        self.parts.shared.counters.kicks.add(1);
        Ok(self.parts.queue.suppress_kicks()?)
    }

    fn wake_fds(&self) -> Vec<RawFd> {
        let kick = self.parts.kick.as_raw_fd();
        let shared = &self.parts.shared;
        let fixed = [
            kick,
            shared.limiter.as_raw_fd(),
            shared.exchanged.as_raw_fd(),
        ];
        fixed
            .into_iter()
            .chain(self.parts.engine.wake_fd())
            .collect()
    }

    fn finish(mut self) -> QueueState {
        if let Err(error) = self.drain() {
            // What is not answered now never will be, so the driver must not wait for it.
            self.warn(error.as_ref());
            self.parts.signals.needs_reset();
            let Shared { log, .. } = &*self.parts.shared;
            log.all_changed(self.parts.shared.disk().bytes());
        }
        self.parts.queue.state()
    }
}

#[cfg(test)]
mod tests;
