// SPDX-License-Identifier: Apache-2.0
//! Virtio devices: from their configuration to their place on the bus.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use brume_api::config::{
    self, CacheType, Drive, IoEngine, NetworkInterface, RateLimiter, TokenBucket,
};
use brume_boot::{MmioDevice, layout};
use brume_devices::{BusError, Interrupt};
use brume_mmds::{Stack, StackError};
use brume_virtio::balloon::BalloonNewError;
use brume_virtio::block::{self, Block, BlockConfig, BlockError, Locking};
use brume_virtio::net::{BridgeError, Net, NetConfig, NetError, Tap, TapError, join_bridge};
use brume_virtio::transport::{MMIO_SIZE, MmioTransport, QUEUE_NOTIFY, TransportCore};
use brume_virtio::vsock::{Vsock, VsockConfig, VsockError};
use brume_virtio::{
    BucketLimits, BucketUpdate, DeviceSignals, GuestMemory, LimiterUpdate, VirtioDevice,
};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::chipset::Buses;
use crate::event::{Event, EventSender};
use crate::kvm::{KvmError, Vm};

/// What a TAP that we make is called; the kernel puts a number for the `%d`.
const TAP_PATTERN: &str = "brume%d";

/// A device that cannot be made or put into its place.
#[derive(Debug, Error)]
pub enum AttachError {
    /// A disk.
    #[error("drive \"{id}\" cannot be used")]
    Block {
        /// The drive.
        id: String,
        /// Why.
        source: BlockError,
    },
    /// A TAP.
    #[error("Could not create the network device \"{id}\"")]
    Tap {
        /// The interface.
        id: String,
        /// Why.
        source: TapError,
    },
    /// A bridge.
    #[error("Could not create the network device \"{id}\"")]
    Bridge {
        /// The interface.
        id: String,
        /// Why.
        source: BridgeError,
    },
    /// A network device.
    #[error("Could not create the network device \"{id}\"")]
    Net {
        /// The interface.
        id: String,
        /// Why.
        source: NetError,
    },
    /// A balloon.
    #[error("the balloon cannot be made")]
    Balloon(#[from] BalloonNewError),
    /// The socket device.
    #[error("Vsock config error: Cannot create backend for vsock device")]
    Vsock(#[source] VsockError),
    /// The metadata service.
    #[error("the network device \"{id}\" cannot have the metadata service")]
    Metadata {
        /// The interface.
        id: String,
        /// Why.
        source: StackError,
    },
    /// More devices than there are interrupts for.
    #[error(
        "a machine can have {} drives and network interfaces",
        layout::MAX_VIRTIO_MMIO_DEVICES
    )]
    TooMany,
    /// No place on the bus.
    #[error("a device has no place on the bus")]
    Bus(#[from] BusError),
    /// No more file descriptors.
    #[error("the host gives no event file descriptors for a device")]
    Event(#[from] io::Error),
    /// KVM does not wire it.
    #[error("a device cannot be wired to the machine")]
    Kvm(#[from] KvmError),
}

/// A device, and what it is called in events.
pub(crate) struct NamedDevice {
    pub(crate) name: String,
    pub(crate) device: Box<dyn VirtioDevice>,
}

/// A virtio device in its place.
#[derive(Clone)]
pub(crate) struct NamedTransport {
    /// What it is called in events and files.
    pub(crate) name: String,
    pub(crate) transport: Arc<Mutex<MmioTransport>>,
}

/// Puts virtio devices on the bus, one after the other.
pub(crate) struct VirtioSlots<'a> {
    vm: &'a Vm,
    memory: &'a GuestMemory,
    events: &'a EventSender,
    pub(crate) transports: Vec<NamedTransport>,
    /// Where the devices are, for the firmware tables.
    pub(crate) places: Vec<MmioDevice>,
}

impl<'a> VirtioSlots<'a> {
    pub(crate) fn new(vm: &'a Vm, memory: &'a GuestMemory, events: &'a EventSender) -> Self {
        Self {
            vm,
            memory,
            events,
            transports: Vec::new(),
            places: Vec::new(),
        }
    }

    /// Gives a device the next place.
    pub(crate) fn add(
        &mut self,
        buses: &mut Buses,
        NamedDevice { name, device }: NamedDevice,
    ) -> Result<(), AttachError> {
        let index = self.places.len();
        if index >= layout::MAX_VIRTIO_MMIO_DEVICES {
            return Err(AttachError::TooMany);
        }
        let number = u32::try_from(index).unwrap_or(u32::MAX);
        let address = layout::VIRTIO_MMIO_START + u64::from(number) * MMIO_SIZE;
        let gsi = layout::FIRST_VIRTIO_GSI + number;

        let irq = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        self.vm.wire_interrupt(&irq, gsi)?;
        let (events, failed) = (self.events.clone(), name.clone());
        let failure = Interrupt::from_fn(move || {
            events.send(Event::DeviceFailed(failed.clone()));
        });
        let signals = DeviceSignals::new(Interrupt::from_event(irq)).with_failure(failure);
        let core = TransportCore::new(device, self.memory.clone(), signals)?;
        for (queue, kick) in (0..).zip(core.kicks()) {
            self.vm.wire_write(kick, address + QUEUE_NOTIFY, queue)?;
        }
        let transport = Arc::new(Mutex::new(MmioTransport::new(core)));
        buses.mmio.insert(address, MMIO_SIZE, transport.clone())?;
        self.transports.push(NamedTransport { name, transport });
        self.places.push(MmioDevice {
            address,
            size: MMIO_SIZE,
            gsi,
        });
        Ok(())
    }
}

/// What a limiter is to limit, as the device takes it.
pub(crate) fn limits(limiter: Option<RateLimiter>) -> LimiterUpdate {
    let bucket = |bucket: Option<TokenBucket>| match bucket {
        None => BucketUpdate::Keep,
        Some(bucket) => bucket_limits(bucket).map_or(BucketUpdate::Remove, BucketUpdate::Set),
    };
    let limiter = limiter.unwrap_or_default();
    LimiterUpdate {
        bandwidth: bucket(limiter.bandwidth),
        ops: bucket(limiter.ops),
    }
}

/// What one bucket limits; `None` if it is no limit.
pub(crate) fn bucket_limits(bucket: TokenBucket) -> Option<BucketLimits> {
    (bucket.size > 0 && bucket.refill_time > 0).then(|| BucketLimits {
        size: bucket.size,
        refill_time: Duration::from_millis(bucket.refill_time),
        one_time_burst: bucket.one_time_burst.unwrap_or(0),
    })
}

/// Opens what is behind a drive.
pub(crate) fn open_drive(drive: &Drive, locking: Locking) -> Result<Block, AttachError> {
    let config = BlockConfig {
        id: drive.drive_id.clone(),
        path: drive.path_on_host.clone().unwrap_or_default(),
        read_only: drive.is_read_only,
        engine: match drive.io_engine {
            IoEngine::Sync => block::Engine::Sync,
            IoEngine::Async => block::Engine::Async,
        },
        cache: match drive.cache_type {
            CacheType::Unsafe => block::CacheType::Unsafe,
            CacheType::Writeback => block::CacheType::Writeback,
        },
        locking: if drive.lock.unwrap_or(false) {
            locking
        } else {
            Locking::Off
        },
        limits: limits(drive.rate_limiter),
    };
    Block::open(config).map_err(|source| AttachError::Block {
        id: drive.drive_id.clone(),
        source,
    })
}

/// Opens or makes what is behind a network interface, on which the guest also finds `metadata`.
pub(crate) fn open_interface(
    interface: &NetworkInterface,
    metadata: Option<Stack>,
) -> Result<Net, AttachError> {
    let id = || interface.iface_id.clone();
    let opened = match &interface.host_dev_name {
        Some(name) => Tap::open(name),
        None => create_tap(interface.mtu),
    };
    let tap = opened.map_err(|source| AttachError::Tap { id: id(), source })?;
    if let Some(bridge) = &interface.bridge {
        join_bridge(bridge, &tap).map_err(|source| AttachError::Bridge { id: id(), source })?;
    }
    let config = NetConfig {
        id: id(),
        mac: interface.mac(),
        mtu: interface.mtu,
        rx_limits: limits(interface.rx_rate_limiter),
        tx_limits: limits(interface.tx_rate_limiter),
    };
    let net = Net::new(config, tap).map_err(|source| AttachError::Net { id: id(), source })?;
    Ok(match metadata {
        Some(service) => net.with_metadata(service)?,
        None => net,
    })
}

/// Makes a TAP, with the MTU that the guest will be told.
fn create_tap(mtu: Option<u16>) -> Result<Tap, TapError> {
    let tap = Tap::create(TAP_PATTERN)?;
    if let Some(mtu) = mtu {
        tap.set_mtu(mtu)?;
    }
    Ok(tap)
}

/// Makes the socket device, which has its unix socket from then on.
pub(crate) fn open_vsock(vsock: &config::Vsock) -> Result<Vsock, AttachError> {
    let config = VsockConfig {
        guest_cid: vsock.guest_cid,
        uds_path: vsock.uds_path.clone(),
    };
    Vsock::new(&config).map_err(AttachError::Vsock)
}
