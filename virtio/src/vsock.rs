// SPDX-License-Identifier: Apache-2.0
//! The socket device (virtio 1.3, section 5.10): stream connections between the guest and
//! programs on the host, which see unix sockets.
//!
//! ```text
//!   host -> guest: a client connects to `uds_path`, writes "CONNECT <port>\n" and
//!                  reads "OK <host port>\n"; then come the guest's bytes
//!   guest -> host: a connection to port P of CID 2 becomes one to `<uds_path>_P`
//! ```
//!
//! One worker thread (see [`crate::Worker`]) serves the queues and all sockets, without ever
//! waiting for one of them. Bytes go straight between a socket and the guest's buffers; only what
//! a program on the host is too slow to take is kept, and never more than the guest was given
//! credit for.

mod connection;
mod counters;
mod listener;
mod muxer;
mod packet;
mod rx;
mod server;
mod socket;
mod unsent;
mod watch;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;
use thiserror::Error;

use crate::device::{
    RestoreContext, StartContext, StartError, StateError, VirtioDevice, read_config_bytes,
};
use crate::queue::QueueState;
use crate::worker::Worker;

use counters::VsockCounters;
pub use counters::VsockCounts;

use listener::Listener;
use muxer::{MAX_CONNECTIONS, Muxer};
use rx::Rx;
use server::{Events, Server, Stopped, Tx};

/// The device ID of a socket device.
const DEVICE_TYPE: u32 = 19;
/// Queue 0 receives, queue 1 transmits, queue 2 carries events.
const QUEUE_SIZES: [u16; 3] = [256; 3];
/// The lowest CID that a guest can have: those below stand for the host and the like.
pub const MIN_GUEST_CID: u32 = 3;
/// Files that a process needs which has all connections open, with some for the rest of it.
const OPEN_FILES: u64 = 2 * (MAX_CONNECTIONS as u64 + 1);

/// What a person decides about a socket device.
#[derive(Clone, Debug)]
pub struct VsockConfig {
    /// The guest's address, from [`MIN_GUEST_CID`] up to 2^32 - 2.
    pub guest_cid: u32,
    /// Where clients on the host connect, and the start of the paths where guests' connections are
    /// taken.
    pub uds_path: PathBuf,
}

/// Why there is no socket device.
#[derive(Debug, Error)]
pub enum VsockError {
    /// The CID means something else.
    #[error("a guest cannot have the CID {0}: {MIN_GUEST_CID} to 4294967294 are possible")]
    Cid(u32),
    /// The socket cannot be made; most likely there is a file with its name.
    #[error("Error binding to the host-side Unix socket: {source} ({})", path.display())]
    Bind {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The host has no more file descriptors for us.
    #[error("the host gives no file descriptors for a vsock device")]
    Host(#[source] io::Error),
}

/// Why a socket device does not start.
#[derive(Debug, Error)]
enum VsockStartError {
    #[error("a vsock device needs its three queues, and the driver enabled only some")]
    Queues,
    #[error("the vsock device lost its sockets in a failure before")]
    Lost,
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

/// Tells what a socket device has counted. Clones are for the same device.
#[derive(Clone, Debug)]
pub struct VsockControl {
    counters: Arc<VsockCounters>,
    socket_stays: Arc<AtomicBool>,
}

impl VsockControl {
    /// What the device has counted so far.
    pub fn counts(&self) -> VsockCounts {
        self.counters.get()
    }

    /// Leaves the socket's file where it is when the device is gone, as Firecracker does, whose
    /// clients remove it themselves. Without this it is removed.
    pub fn leave_socket(&self) {
        self.socket_stays.store(true, Ordering::Relaxed);
    }
}

/// A socket device.
pub struct Vsock {
    guest_cid: u32,
    control: VsockControl,
    /// The connections, while the device does not run.
    muxer: Option<Muxer>,
    owes_reset: bool,
    worker: Option<Worker<Server>>,
}

impl Vsock {
    /// A device whose clients on the host may connect from now on; they are served when the guest
    /// has started it. The limit on open files of the process is raised if it is too low.
    ///
    /// # Errors
    ///
    /// The CID is none for a guest, or the socket cannot be made: it must not exist.
    pub fn new(config: &VsockConfig) -> Result<Self, VsockError> {
        let cid = config.guest_cid;
        if !(MIN_GUEST_CID..u32::MAX).contains(&cid) {
            return Err(VsockError::Cid(cid));
        }
        let listener = Listener::bind(&config.uds_path).map_err(|source| VsockError::Bind {
            path: config.uds_path.clone(),
            source,
        })?;
        // Without it there are fewer connections at once, which is no reason not to start.
        if let Err(error) = socket::allow_open_files(OPEN_FILES) {
            tracing::warn!(
                "the limit on open files stays too low for many vsock connections: {error}"
            );
        }
        let counters = Arc::<VsockCounters>::default();
        let control = VsockControl {
            counters: counters.clone(),
            socket_stays: listener.stays(),
        };
        let muxer = Muxer::new(cid.into(), listener, counters).map_err(VsockError::Host)?;
        Ok(Self {
            guest_cid: cid,
            control,
            muxer: Some(muxer),
            owes_reset: false,
            worker: None,
        })
    }

    /// A way to see what the device counts, and to say what becomes of its socket.
    pub fn control(&self) -> VsockControl {
        self.control.clone()
    }

    /// Has the guest told, when the device starts next, that all its connections are gone and that
    /// its CID may be another: for a guest that goes on from a snapshot.
    pub fn announce_transport_reset(&mut self) {
        self.owes_reset = true;
        if let Some(muxer) = &mut self.muxer {
            muxer.disconnect();
            muxer.leave_ports();
        }
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // struct virtio_vsock_config: le64 guest_cid.
        read_config_bytes(&u64::from(self.guest_cid).to_le_bytes(), offset, data);
    }

    fn start(&mut self, context: StartContext) -> Result<(), StartError> {
        let StartContext {
            memory,
            queues,
            signals,
            ..
        } = context;
        let Ok([Some(rx), Some(tx), Some(events)]) = <[_; 3]>::try_from(queues) else {
            return Err(VsockStartError::Queues.into());
        };
        let muxer = self.muxer.take().ok_or(VsockStartError::Lost)?;
        let server = Server {
            kicks: [rx.kick, tx.kick, events.kick],
            rx: Rx::new(rx.queue, &memory, self.control.counters.clone()),
            tx: Tx::new(tx.queue, &memory, self.control.counters.clone()),
            events: Events {
                queue: events.queue,
                memory,
                owes_reset: self.owes_reset,
            },
            muxer,
            signals: signals.clone(),
        };
        let worker = Worker::spawn("vsock", server, signals).map_err(VsockStartError::Thread)?;
        self.worker = Some(worker);
        Ok(())
    }

    fn stop(&mut self) -> Vec<Option<QueueState>> {
        let Some(stopped) = self.worker.take().and_then(Worker::stop) else {
            return Vec::new();
        };
        let Stopped {
            queues,
            muxer,
            owes_reset,
        } = stopped;
        self.muxer = Some(muxer);
        self.owes_reset = owes_reset;
        queues.map(Some).to_vec()
    }

    /// Connections end in sockets of the host and cannot be kept, so there is no state: the guest
    /// is told that they are gone. Its listeners go on.
    fn restore(&mut self, state: Value, context: RestoreContext) -> Result<(), StateError> {
        if !state.is_null() {
            return Err(StateError::Unexpected);
        }
        if context.running {
            self.announce_transport_reset();
        }
        Ok(())
    }

    fn reset(&mut self) {
        // A driver that starts anew knows of no connections that it could lose.
        self.owes_reset = false;
        if let Some(muxer) = &mut self.muxer {
            muxer.disconnect();
        }
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests;
