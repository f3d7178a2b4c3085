// SPDX-License-Identifier: Apache-2.0
//! The engine that carries out each request on the worker's thread, one after the other.

use std::io;
use std::sync::Arc;

use super::disk::Disk;
use super::engine::{Done, Engine, Ticket, execute};
use super::host::{self, Direction};
use super::request::Request;
use crate::memory::{GuestMemory, IoBuffers};

/// Plain system calls.
pub(super) struct SyncEngine {
    disk: Arc<Disk>,
    buffers: IoBuffers,
    /// Whether each write has to be durable before it is answered.
    durable: bool,
}

impl SyncEngine {
    pub(super) fn new(disk: Arc<Disk>, memory: GuestMemory, durable: bool) -> Self {
        Self {
            disk,
            buffers: IoBuffers::new(memory),
            durable,
        }
    }

    fn transfer(&self, direction: Direction, offset: u64) -> (u32, io::Result<()>) {
        let file = &self.disk.file;
        let (count, result) = host::transfer(file, direction, &self.buffers, offset, self.durable);
        if direction == Direction::Write {
            return (0, result);
        }
        self.buffers.mark_written(count);
        (u32::try_from(count).unwrap_or(u32::MAX), result)
    }
}

impl Engine for SyncEngine {
    fn has_room(&self) -> bool {
        true
    }

    fn buffers(&mut self) -> &mut IoBuffers {
        self.buffers.clear();
        &mut self.buffers
    }

    fn start(&mut self, request: Request, ticket: Ticket) -> Option<Done> {
        let (written, result) = match request {
            Request::Read { offset, .. } => self.transfer(Direction::Read, offset),
            Request::Write { offset, .. } => self.transfer(Direction::Write, offset),
            _ => (0, execute(&self.disk, request, self.durable)),
        };
        Some(Done {
            ticket,
            written,
            result,
        })
    }
}
