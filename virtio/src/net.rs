// SPDX-License-Identifier: Apache-2.0
//! The network device (virtio 1.3, section 5.1), with a TAP as its other end.
//!
//! ```text
//!   guest --- tx queue --> Tx --writev--> +-----+
//!                                         | TAP | --- host's network, or a bridge
//!   guest <-- rx queue --- Rx <--readv--- +-----+
//! ```
//!
//! Frames go between the guest's buffers and the TAP in one system call each, with their virtio
//! header, which is also the TAP's: checksums and segmentation are left to whoever is at the far
//! end. One worker thread (see [`crate::Worker`]) serves both directions, a bounded number of
//! frames of the one and then of the other, so that neither starves.
//!
//! A third queue takes commands of the driver (control_queue.rs). After a move of the machine the
//! device makes itself known in the new place (announce.rs).
//!
//! With a metadata service on the interface, frames for it leave the way to the TAP, and its
//! answers come before what the TAP has.

mod announce;
mod bridge;
mod control_queue;
mod counters;
mod features;
mod interface;
mod metadata;
mod rx;
mod tap;
mod tx;

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use brume_mmds::Stack;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::device::{
    RestoreContext, StartContext, StartError, StateError, VirtioDevice, read_config_bytes, saved,
};
use crate::limiter::{Limiter, LimiterState, LimiterUpdate};
use crate::queue::QueueState;
use crate::signals::DeviceSignals;
use crate::worker::{Backend, Worker};

pub use bridge::{BridgeError, join_bridge};
pub use counters::{NetCounters, NetCounts};
pub use tap::{Tap, TapError};

use announce::{Announcer, Presence};
use control_queue::ControlQueue;
use metadata::Metadata;
use rx::Rx;
use tx::Tx;

/// The device ID of a network card.
const DEVICE_TYPE: u32 = 1;
/// Queue 0 receives, queue 1 transmits, queue 2 is for commands.
const QUEUE_SIZES: [u16; 3] = [256; 3];
/// As many as there are without the features of [`features::ANNOUNCING`].
const DATA_QUEUES: usize = 2;
/// Frames of one direction that are handled before the other has its turn.
const BATCH: usize = 64;

/// Length in bytes of the header before each frame, `struct virtio_net_hdr` (section 5.1.6).
const HEADER_LEN: u16 = 12;
/// The largest frame in bytes, with its header: 64 KiB of segments, Ethernet header, VLAN tag.
const MAX_FRAME: usize = 12 + 14 + 4 + 65536;

/// The smallest MTU that the standard allows to name (section 5.1.4.1).
const MIN_MTU: u16 = 68;

/// What a person decides about a network device.
#[derive(Clone, Debug)]
pub struct NetConfig {
    /// A name for logs and threads.
    pub id: String,
    /// The guest's MAC address; without one the driver chooses at random.
    pub mac: Option<[u8; 6]>,
    /// The MTU that the driver is to use, from 68 bytes; without one it takes its default.
    pub mtu: Option<u16>,
    /// The limits on what the guest receives.
    pub rx_limits: LimiterUpdate,
    /// The limits on what the guest sends.
    pub tx_limits: LimiterUpdate,
}

/// Why there is no network device.
#[derive(Debug, Error)]
pub enum NetError {
    /// The MTU is below what the standard allows.
    #[error("an MTU of {0} bytes is too small: at least {MIN_MTU} are needed")]
    Mtu(u16),
    /// There are no more file descriptors.
    #[error("the host gives no timer for a network device")]
    Events(#[source] std::io::Error),
}

/// Changes the limits of a network device that is in use, and tells what it has counted. Clones
/// are for the same device.
#[derive(Clone, Debug)]
pub struct NetControl {
    rx: Arc<Limiter>,
    tx: Arc<Limiter>,
    counters: Arc<NetCounters>,
    announcer: Arc<Announcer>,
}

impl NetControl {
    /// Makes the guest known to the network, to be called when its machine goes on in another
    /// place: frames in its name go out at once and after 50, 200, 450 and 800 ms, and its driver is
    /// asked to announce itself if it can. Both begin when the device runs, if it does not yet.
    pub fn announce(&self) {
        self.announcer.start();
    }

    /// Changes the limits on what the guest receives and on what it sends.
    pub fn limit(&self, rx: LimiterUpdate, tx: LimiterUpdate) {
        self.rx.update(rx);
        self.tx.update(tx);
    }

    /// What the device has counted so far.
    pub fn counts(&self) -> NetCounts {
        NetCounts {
            rx_throttled: self.rx.throttled(),
            tx_throttled: self.tx.throttled(),
            ..self.counters.get()
        }
    }
}

/// Why a network device does not start.
#[derive(Debug, Error)]
enum NetStartError {
    #[error("a network device needs both its queues, and the driver enabled only some")]
    Queues,
    #[error("TAP {name} does not take the offloads that the driver accepted")]
    Offloads {
        name: String,
        source: std::io::Error,
    },
    #[error("cannot start a thread")]
    Thread(#[source] std::io::Error),
}

/// The state of a network device.
///
/// Of a metadata service nothing is kept: its connections get a reset when the guest goes on with
/// them, and the key of its tokens stays in the process that made it, so that no machine can use
/// those of another that came from the same state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NetState {
    /// The limits on what the guest receives.
    rx_limiter: LimiterState,
    /// The limits on what the guest sends.
    tx_limiter: LimiterState,
    /// What is known of the guest on its network; older states have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    presence: Option<Presence>,
}

/// A network device.
pub struct Net {
    config: NetConfig,
    tap: Arc<Tap>,
    control: NetControl,
    /// While the device is stopped.
    metadata: Option<Metadata>,
    /// Whether it has [`features::ANNOUNCING`], and the queue that goes with it.
    announcing: bool,
    worker: Option<Worker<NetBackend>>,
}

impl Net {
    /// A device whose frames come from and go to `tap`.
    ///
    /// # Errors
    ///
    /// The configuration is not one that the standard allows.
    pub fn new(config: NetConfig, tap: Tap) -> Result<Self, NetError> {
        if let Some(mtu) = config.mtu.filter(|&mtu| mtu < MIN_MTU) {
            return Err(NetError::Mtu(mtu));
        }
        let limiter = |limits| Limiter::new(limits).map(Arc::new);
        let control = NetControl {
            rx: limiter(config.rx_limits).map_err(NetError::Events)?,
            tx: limiter(config.tx_limits).map_err(NetError::Events)?,
            counters: Arc::default(),
            announcer: Announcer::new(config.mac)
                .map(Arc::new)
                .map_err(NetError::Events)?,
        };
        Ok(Self {
            config,
            tap: Arc::new(tap),
            control,
            metadata: None,
            announcing: true,
            worker: None,
        })
    }

    /// A way to change the device while it is used.
    pub fn control(&self) -> NetControl {
        self.control.clone()
    }

    /// The device with a metadata service on its network, beside what the TAP leads to.
    ///
    /// # Errors
    ///
    /// The host gives no timer.
    pub fn with_metadata(mut self, service: Stack) -> std::io::Result<Self> {
        self.metadata = Some(Metadata::new(service)?);
        Ok(self)
    }

    /// `struct virtio_net_config` (section 5.1.4), up to the MTU.
    fn config_space(&self) -> [u8; 12] {
        const LINK_UP: u16 = 1;
        const ANNOUNCE: u16 = 2;
        const QUEUE_PAIRS: u16 = 1;
        let mut space = [0; 12];
        let mac = self.config.mac.unwrap_or_default();
        let status = if self.control.announcer.is_asked() {
            LINK_UP | ANNOUNCE
        } else {
            LINK_UP
        };
        let words = [status, QUEUE_PAIRS, self.config.mtu.unwrap_or(0)];
        let bytes = mac
            .into_iter()
            .chain(words.into_iter().flat_map(u16::to_le_bytes));
        for (to, from) in space.iter_mut().zip(bytes) {
            *to = from;
        }
        space
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        let mut offered = features::offered(self.tap.offloads());
        if self.config.mac.is_some() {
            offered |= features::MAC;
        }
        if self.config.mtu.is_some() {
            offered |= features::MTU;
        }
        if self.announcing {
            offered |= features::ANNOUNCING;
        }
        offered
    }

    fn queue_sizes(&self) -> &[u16] {
        let count = if self.announcing {
            QUEUE_SIZES.len()
        } else {
            DATA_QUEUES
        };
        QUEUE_SIZES.get(..count).unwrap_or(&QUEUE_SIZES)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config_space(), offset, data);
    }

    fn start(&mut self, context: StartContext) -> Result<(), StartError> {
        let StartContext {
            memory,
            features,
            queues,
            signals,
        } = context;
        let count = queues.len();
        let mut queues = queues.into_iter();
        let (Some(Some(rx)), Some(Some(tx))) = (queues.next(), queues.next()) else {
            return Err(NetStartError::Queues.into());
        };
        let commands = queues.next().flatten();
        self.tap
            .set_offloads(features::tap_offloads(features))
            .map_err(|source| NetStartError::Offloads {
                name: self.tap.name().to_owned(),
                source,
            })?;
        let mergeable = features & features::MRG_RXBUF != 0;
        let ends = |limiter: &Arc<Limiter>| Ends {
            tap: self.tap.clone(),
            counters: self.control.counters.clone(),
            limiter: limiter.clone(),
        };
        let announcer = self.control.announcer.clone();
        let kicks = [&rx, &tx].into_iter().chain(&commands);
        let backend = NetBackend {
            kicks: kicks.map(|started| started.kick.clone()).collect(),
            rx: Rx::new(rx.queue, &memory, mergeable, ends(&self.control.rx)),
            tx: Tx::new(tx.queue, &memory, ends(&self.control.tx), announcer.clone()),
            commands: commands
                .map(|started| ControlQueue::new(started.queue, &memory, announcer.clone())),
            announcer,
            can_announce: features & features::GUEST_ANNOUNCE != 0,
            queues: count,
            tap: self.tap.clone(),
            metadata: self.metadata.take(),
            limiters: [self.control.rx.clone(), self.control.tx.clone()],
            signals: signals.clone(),
        };
        let name = format!("net {}", self.config.id);
        let worker = Worker::spawn(&name, backend, signals).map_err(NetStartError::Thread)?;
        self.worker = Some(worker);
        Ok(())
    }

    fn stop(&mut self) -> Vec<Option<QueueState>> {
        let Some((queues, metadata)) = self.worker.take().and_then(Worker::stop) else {
            return Vec::new();
        };
        self.metadata = metadata;
        queues
    }

    fn reset(&mut self) {
        self.control.announcer.forget();
    }

    fn limit_features(&mut self, offered: u64) {
        self.announcing &= offered & features::ANNOUNCING == features::ANNOUNCING;
    }

    fn save(&self) -> Value {
        saved(&NetState {
            rx_limiter: self.control.rx.save(),
            tx_limiter: self.control.tx.save(),
            presence: self.control.announcer.save(),
        })
    }

    fn restore(&mut self, state: Value, _context: RestoreContext) -> Result<(), StateError> {
        let state: NetState = serde_json::from_value(state)?;
        self.control.rx.restore(&state.rx_limiter)?;
        self.control.tx.restore(&state.tx_limiter)?;
        self.control.announcer.restore(state.presence)
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What a direction works with, besides its queue.
struct Ends {
    tap: Arc<Tap>,
    counters: Arc<NetCounters>,
    limiter: Arc<Limiter>,
}

/// All queues, on the worker's thread.
struct NetBackend {
    rx: Rx,
    tx: Tx,
    commands: Option<ControlQueue>,
    announcer: Arc<Announcer>,
    /// Whether the driver can be asked to announce itself.
    can_announce: bool,
    /// How many queues there are, with those that are not in use.
    queues: usize,
    tap: Arc<Tap>,
    metadata: Option<Metadata>,
    kicks: Vec<Arc<EventFd>>,
    limiters: [Arc<Limiter>; 2],
    signals: DeviceSignals,
}

impl Backend for NetBackend {
    type State = (Vec<Option<QueueState>>, Option<Metadata>);

    fn process(&mut self) -> Result<bool, StartError> {
        let served = self.metadata.as_mut().is_some_and(Metadata::advance);
        let received = self.rx.process(&self.signals, self.metadata.as_mut())?;
        let sent = self.tx.process(&self.signals, self.metadata.as_mut())?;
        let answered = match &mut self.commands {
            Some(commands) => commands.process(&self.signals)?,
            None => false,
        };
        let announced = self.announce();
        Ok(served || received || sent || answered || announced)
    }

    fn arm(&mut self) -> Result<bool, StartError> {
        let receive = self.rx.arm()?;
        let send = self.tx.arm()?;
        let serve = match &mut self.metadata {
            Some(service) => service.arm()?,
            None => false,
        };
        let answer = match &mut self.commands {
            Some(commands) => commands.arm()?,
            None => false,
        };
        Ok(receive || send || serve || answer)
    }

    fn disarm(&mut self) -> Result<(), StartError> {
        self.rx.disarm()?;
        self.tx.disarm()?;
        if let Some(commands) = &mut self.commands {
            commands.disarm()?;
        }
        Ok(())
    }

    fn wake_fds(&self) -> Vec<RawFd> {
        let kicks = self.kicks.iter().map(AsRawFd::as_raw_fd);
        let limiters = self.limiters.iter().map(AsRawFd::as_raw_fd);
        let timer = self.metadata.as_ref().map(AsRawFd::as_raw_fd);
        let tap = self.tap.as_raw_fd();
        let others = [tap, self.announcer.as_raw_fd()];
        kicks.chain(limiters).chain(timer).chain(others).collect()
    }

    fn finish(self) -> Self::State {
        let commands = self.commands.map(ControlQueue::finish);
        let mut queues = vec![Some(self.rx.finish()), Some(self.tx.finish()), commands];
        queues.truncate(self.queues);
        (queues, self.metadata)
    }
}

impl NetBackend {
    /// Does what is due of an announcement; whether there was anything.
    fn announce(&self) -> bool {
        if self.can_announce && self.announcer.takes_request() {
            self.signals.config_changed();
        }
        self.announcer.advance(&self.tap)
    }
}

#[cfg(test)]
mod tests;
