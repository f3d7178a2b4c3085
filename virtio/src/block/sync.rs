// SPDX-License-Identifier: Apache-2.0
//! The engine that carries out each request on the worker's thread, one after the other.

use std::sync::Arc;

use super::disk::Disk;
use super::engine::{Done, Engine, Image, Ticket};
use super::request::Request;
use crate::memory::{GuestMemory, IoBuffers};

/// Plain system calls.
pub(super) struct SyncEngine {
    image: Image,
    buffers: IoBuffers,
}

impl SyncEngine {
    pub(super) fn new(image: Image, memory: GuestMemory) -> Self {
        Self {
            image,
            buffers: IoBuffers::new(memory),
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

    fn set_disk(&mut self, disk: Arc<Disk>) {
        self.image.disk = disk;
    }

    fn start(&mut self, request: Request, ticket: Ticket) -> Option<Done> {
        let (written, result) = self.image.execute(request, &self.buffers);
        Some(Done {
            ticket,
            written,
            result,
        })
    }
}
