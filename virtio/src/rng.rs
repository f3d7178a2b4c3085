// SPDX-License-Identifier: Apache-2.0
//! The entropy device (virtio 1.3, section 5.4): random bytes of the host for the guest.
//!
//! The driver offers buffers and gets them back with random bytes in them, never more than
//! [`MAX_REQUEST`] at a time, however long a chain claims to be: its descriptors may all name the
//! same page. The kernel's generator does not run dry, so nothing is ever in flight. A request that
//! has to wait for the rate limit stays in the queue.

mod host;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use brume_devices::Counter;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;
use vm_memory::GuestMemoryError;
use vmm_sys_util::eventfd::EventFd;

use crate::device::{
    RestoreContext, StartContext, StartError, StateError, VirtioDevice, read_config_bytes, saved,
};
use crate::limiter::{Gate, Limiter, LimiterState, LimiterUpdate};
use crate::queue::{Chain, Queue, QueueState};
use crate::signals::DeviceSignals;
use crate::worker::{Backend, Worker};

/// The device ID of an entropy source.
const DEVICE_TYPE: u32 = 4;
const QUEUE_SIZES: [u16; 1] = [256];
/// The most bytes that one request gets.
const MAX_REQUEST: u64 = 64 * 1024;
/// How many bytes are fetched from the host at a time.
const PIECE: usize = 4096;
/// Requests that are answered before a wish to stop is looked for.
const BATCH: usize = 16;

/// Why an entropy device does not start.
#[derive(Debug, Error)]
enum RngStartError {
    #[error("an entropy device needs its queue, and the driver did not enable it")]
    Queue,
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

/// A request that gets no more bytes.
#[derive(Debug, Error)]
enum RequestError {
    #[error("the host gives no random bytes: {0}")]
    Host(#[from] io::Error),
    #[error("a buffer cannot be written: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// What the device, its worker and its controls have in common.
#[derive(Debug)]
struct Shared {
    limiter: Limiter,
    requests: Counter,
    bytes: Counter,
    failed: Counter,
}

/// Tells what an entropy device has counted. Clones are for the same device.
#[derive(Clone, Debug)]
pub struct RngControl(Arc<Shared>);

/// The values of the counters since the device was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RngCounts {
    /// Requests that were answered.
    pub requests: u64,
    /// Random bytes that the guest got.
    pub bytes: u64,
    /// Requests that got less than they could have.
    pub failed: u64,
    /// How often the rate limiter made a request wait.
    pub throttled: u64,
}

impl RngControl {
    /// What the device has counted so far.
    pub fn counts(&self) -> RngCounts {
        RngCounts {
            requests: self.0.requests.get(),
            bytes: self.0.bytes.get(),
            failed: self.0.failed.get(),
            throttled: self.0.limiter.throttled(),
        }
    }
}

/// The state of an entropy device. The bytes themselves are the host's: no two machines that come
/// from one state get the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RngState {
    /// The limits on what the guest takes.
    limiter: LimiterState,
}

/// An entropy device.
pub struct Rng {
    shared: Arc<Shared>,
    worker: Option<Worker<RngBackend>>,
}

impl Rng {
    /// A device that does not run yet, with limits on what the guest takes.
    ///
    /// # Errors
    ///
    /// The host gives no timer.
    pub fn new(limits: LimiterUpdate) -> io::Result<Self> {
        let shared = Shared {
            limiter: Limiter::new(limits)?,
            requests: Counter::default(),
            bytes: Counter::default(),
            failed: Counter::default(),
        };
        Ok(Self {
            shared: Arc::new(shared),
            worker: None,
        })
    }

    /// A way to see what the device counts.
    pub fn control(&self) -> RngControl {
        RngControl(self.shared.clone())
    }
}

impl VirtioDevice for Rng {
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
        read_config_bytes(&[], offset, data);
    }

    fn start(&mut self, context: StartContext) -> Result<(), StartError> {
        let StartContext {
            queues, signals, ..
        } = context;
        let Ok([Some(started)]) = <[_; 1]>::try_from(queues) else {
            return Err(RngStartError::Queue.into());
        };
        let backend = RngBackend {
            queue: started.queue,
            kick: started.kick,
            chain: Chain::new(),
            piece: vec![0; PIECE].into(),
            shared: self.shared.clone(),
            gate: Gate::default(),
            signals: signals.clone(),
        };
        let worker = Worker::spawn("rng", backend, signals).map_err(RngStartError::Thread)?;
        self.worker = Some(worker);
        Ok(())
    }

    fn stop(&mut self) -> Vec<Option<QueueState>> {
        let state = self.worker.take().and_then(Worker::stop);
        state.map_or_else(Vec::new, |queue| vec![Some(queue)])
    }

    fn save(&self) -> Value {
        saved(&RngState {
            limiter: self.shared.limiter.save(),
        })
    }

    fn restore(&mut self, state: Value, _context: RestoreContext) -> Result<(), StateError> {
        let state: RngState = serde_json::from_value(state)?;
        self.shared.limiter.restore(&state.limiter)
    }
}

impl Drop for Rng {
    fn drop(&mut self) {
        self.stop();
    }
}

struct RngBackend {
    queue: Queue,
    kick: Arc<EventFd>,
    chain: Chain,
    piece: Box<[u8]>,
    shared: Arc<Shared>,
    gate: Gate,
    signals: DeviceSignals,
}

impl RngBackend {
    /// Answers the request in the chain; how many bytes it got.
    fn answer(&mut self) -> u32 {
        let wanted = self.chain.writable().len().min(MAX_REQUEST);
        let mut done = 0;
        while done < wanted {
            let before = done;
            if let Err(error) = self.write_piece(&mut done, wanted) {
                self.shared.failed.add(1);
                self.signals
                    .warn(format_args!("the entropy device: {error}"));
                break;
            }
            if done == before {
                break;
            }
        }
        // Not more than MAX_REQUEST.
        u32::try_from(done).unwrap_or(0)
    }

    /// Writes random bytes from `done` on, and not beyond `wanted`.
    fn write_piece(&mut self, done: &mut u64, wanted: u64) -> Result<(), RequestError> {
        let len = usize::try_from(wanted - *done).map_or(PIECE, |left| left.min(PIECE));
        let piece = self.piece.get_mut(..len).unwrap_or_default();
        host::fill(piece)?;
        let memory = self.queue.memory();
        let written = self.chain.writable().write_at(memory, *done, piece)?;
        *done += written as u64;
        Ok(())
    }
}

impl Backend for RngBackend {
    type State = QueueState;

    fn process(&mut self) -> Result<bool, StartError> {
        let mut any = false;
        for _ in 0..BATCH {
            let limiter = &self.shared.limiter;
            if !self.gate.pop(limiter, &mut self.queue, &mut self.chain)? {
                break;
            }
            any = true;
            let len = self.answer();
            self.shared.limiter.charge(len.into());
            self.shared.requests.add(1);
            self.shared.bytes.add(len.into());
            self.queue.push_used(self.chain.head(), len)?;
        }
        if any {
            self.queue.publish()?;
            if self.queue.needs_interrupt()? {
                self.signals.used_buffers();
            }
        }
        Ok(any)
    }

    fn arm(&mut self) -> Result<bool, StartError> {
        Ok(self.gate.enable_kicks(&mut self.queue)?)
    }

    fn disarm(&mut self) -> Result<(), StartError> {
        Ok(self.queue.suppress_kicks()?)
    }

    fn wake_fds(&self) -> Vec<RawFd> {
        vec![self.kick.as_raw_fd(), self.shared.limiter.as_raw_fd()]
    }

    fn finish(self) -> Self::State {
        self.queue.state()
    }
}

#[cfg(test)]
mod tests;
