// SPDX-License-Identifier: Apache-2.0
//! The engine that carries out each request on the worker's thread, one after the other.

use std::sync::Arc;

use super::disk::Disk;
use super::engine::{Done, Engine, Ticket, execute};
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
        let (written, result) = execute(&self.disk, request, &self.buffers, self.durable);
        Some(Done {
            ticket,
            written,
            result,
        })
    }
}
