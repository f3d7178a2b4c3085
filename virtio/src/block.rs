// SPDX-License-Identifier: Apache-2.0
//! The block device (virtio 1.3, section 5.2): one queue on a raw image.
//!
//! ```text
//!   Block ---start---> Worker<Server>  one thread: queue, engine            (server.rs)
//!     |                   |- request.rs   chain -> checked Request
//!     |                   |- engine.rs    the seam to the host's I/O
//!     |                   |    |- sync.rs   each request at once, by system calls
//!     |                   |    `- uring.rs  many in flight, by io_uring
//!     |- disk.rs          `- host.rs      system calls (unsafe)
//!     `- control.rs       what can be changed meanwhile: the image, its lock, the limits;
//!                         log.rs: which blocks are written
//! ```

mod config;
mod control;
mod copy;
mod counters;
mod disk;
mod engine;
mod host;
mod log;
mod request;
mod server;
mod state;
mod sync;
mod uring;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use control::Shared;
use disk::Disk;
use engine::Image;
use request::{
    F_BLK_SIZE, F_DISCARD, F_FLUSH, F_RO, F_SEG_MAX, F_TOPOLOGY, F_WRITE_ZEROES, ID_SIZE, Limits,
};
use serde_json::Value;
use server::{Parts, Server};
use state::{BlockState, Geometry};
use sync::SyncEngine;
use uring::{AsyncEngine, Ring};

use crate::device::{
    RestoreContext, StartContext, StartError, StateError, VirtioDevice, read_config_bytes, saved,
};
use crate::limiter::LimiterUpdate;
use crate::memory::GuestMemory;
use crate::queue::QueueState;
use crate::worker::Worker;

pub use control::BlockControl;
pub use copy::CopiedImage;
pub use counters::{BlockCounts, KindCounts};
pub use disk::{BlockError, image_size};
pub use log::{BlockLog, Written};

/// The device ID (section 5).
const DEVICE_TYPE: u32 = 2;
const QUEUE_SIZES: [u16; 1] = [256];

/// How requests are carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// One after the other, by system calls.
    #[default]
    Sync,
    /// Many at once, by io_uring; they end in any order.
    Async,
}

/// What a guest can rely on after a crash of the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheType {
    /// Nothing: flushes are not offered, and the host writes when it likes.
    #[default]
    Unsafe,
    /// What it has flushed. If its driver does not use flushes, each write is durable when it is
    /// answered.
    Writeback,
}

/// When the image is locked against other machines: shared if read-only, else exclusive. The lock is
/// advisory (`F_OFD_SETLK`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Locking {
    /// Never.
    #[default]
    Off,
    /// When it is opened.
    Now,
    /// By [`BlockControl::take_lock`]: another machine, which is to give it up, may hold it until
    /// then.
    Later,
}

/// What a block device is made from.
#[derive(Clone, Debug)]
pub struct BlockConfig {
    /// Name of the drive. Its first 20 bytes are the serial id that the guest can read.
    pub id: String,
    /// The image: a raw file, or a block device of the host.
    pub path: PathBuf,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// How requests are carried out.
    pub engine: Engine,
    /// What a guest can rely on after a crash of the host.
    pub cache: CacheType,
    /// Whether to lock the image against other machines, and when.
    pub locking: Locking,
    /// The limits on its traffic.
    pub limits: LimiterUpdate,
}

/// A virtio block device.
pub struct Block {
    config: BlockConfig,
    shared: Arc<Shared>,
    /// Made when the image is opened, so that its lack is told then; used by the first start.
    ring: Option<Ring>,
    worker: Option<Worker<Server>>,
}

impl Block {
    /// Opens the image and makes a device of it.
    ///
    /// An image smaller than a sector is an empty disk, and a last part of a sector is left out;
    /// both are told in the log.
    ///
    /// # Errors
    ///
    /// The image is missing, of the wrong kind or in use, or the host lacks what the engine needs.
    pub fn open(config: BlockConfig) -> Result<Self, BlockError> {
        let lock = config.locking == Locking::Now;
        let disk = Disk::open(&config.path, config.read_only, lock)?;
        let ring = match config.engine {
            Engine::Sync => None,
            Engine::Async => Some(Ring::new().map_err(|source| BlockError::Ring {
                path: config.path.clone(),
                source,
            })?),
        };
        let shared = Shared::new(disk, lock, config.limits).map_err(BlockError::Events)?;
        Ok(Self {
            config,
            shared: Arc::new(shared),
            ring,
            worker: None,
        })
    }

    /// A way to change the device while it is used.
    pub fn control(&self) -> BlockControl {
        BlockControl {
            shared: self.shared.clone(),
            read_only: self.config.read_only,
            locks: self.config.locking != Locking::Off,
        }
    }

    /// Whether each write has to be durable when it is answered: it is so for a driver that was
    /// offered flushes and does without (section 5.2.6.2).
    fn writes_through(&self, features: u64) -> bool {
        self.config.cache == CacheType::Writeback && features & F_FLUSH == 0
    }

    fn engine(
        &mut self,
        memory: GuestMemory,
        features: u64,
    ) -> io::Result<Box<dyn engine::Engine>> {
        let image = Image {
            disk: self.shared.disk(),
            durable: self.writes_through(features),
        };
        Ok(match self.config.engine {
            Engine::Sync => Box::new(SyncEngine::new(image, memory)),
            Engine::Async => {
                let ring = match self.ring.take() {
                    Some(ring) => ring,
                    None => Ring::new()?,
                };
                Box::new(AsyncEngine::new(ring, image, memory))
            }
        })
    }

    fn serial(&self) -> [u8; ID_SIZE as usize] {
        let mut serial = [0; ID_SIZE as usize];
        for (to, from) in serial.iter_mut().zip(self.config.id.bytes()) {
            *to = from;
        }
        serial
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        let access = if self.config.read_only {
            F_RO
        } else {
            F_DISCARD | F_WRITE_ZEROES
        };
        let cache = match self.config.cache {
            CacheType::Unsafe => 0,
            CacheType::Writeback => F_FLUSH,
        };
        F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY | access | cache
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&config::config_space(&self.shared.disk()), offset, data);
    }

    fn start(&mut self, context: StartContext) -> Result<(), StartError> {
        let StartContext {
            memory,
            features,
            queues,
            signals,
        } = context;
        let Some(started) = queues.into_iter().flatten().next() else {
            // The driver uses no queue, so there is nothing to serve.
            return Ok(());
        };
        // Before the disk is looked at: a change after it is seen by the worker.
        let generation = self.shared.generation();
        let engine = self.engine(memory.clone(), features)?;
        self.shared.connect(signals.clone());
        let server = Server::new(Parts {
            queue: started.queue,
            kick: started.kick,
            memory,
            signals: signals.clone(),
            limits: Limits {
                sectors: self.shared.disk().sectors,
                features,
                read_only: self.config.read_only,
            },
            shared: self.shared.clone(),
            generation,
            serial: self.serial(),
            name: format!("block device {}", self.config.id),
            engine,
        });
        self.worker = Some(Worker::spawn("block", server, signals)?);
        Ok(())
    }

    fn stop(&mut self) -> Vec<Option<QueueState>> {
        self.worker
            .take()
            .map(|worker| vec![worker.stop()])
            .unwrap_or_default()
    }

    fn save(&self) -> Value {
        let disk = self.shared.disk();
        if self.config.cache == CacheType::Writeback && !disk.read_only {
            // The state may outlive a crash of the host, so what goes with it has to.
            if let Err(error) = disk.file.sync_data() {
                let name = &self.config.id;
                tracing::error!("the image of block device {name} cannot be flushed: {error}");
            }
        }
        saved(&BlockState {
            geometry: Geometry::of(&disk),
            limiter: self.shared.limiter.save(),
        })
    }

    /// An image of another size is one that was exchanged while the machine did not run.
    fn restore(&mut self, state: Value, context: RestoreContext) -> Result<(), StateError> {
        let state: BlockState = serde_json::from_value(state)?;
        self.shared.limiter.restore(&state.limiter)?;
        if !context.running {
            // The driver has yet to look at the image.
            return Ok(());
        }
        if state.geometry != Geometry::of(&self.shared.disk()) {
            context.signals.config_changed();
        }
        self.shared.connect(context.signals);
        Ok(())
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests;
