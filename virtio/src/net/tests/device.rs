// SPDX-License-Identifier: Apache-2.0
//! The whole device, with its worker.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::{eventually, frame, read, second_driver, signals};
use crate::device::{StartContext, StartedQueue, VirtioDevice, feature};
use crate::limiter::{BucketLimits, BucketUpdate, LimiterUpdate};
use crate::net::features::{MAC, MRG_RXBUF, MTU};
use crate::net::{Net, NetConfig, NetError, Tap};
use crate::signals::DeviceSignals;
use crate::testing::{BUFFERS, Driver, NEXT, memory, readable, writable};

/// Where the receive buffers are, behind the rings of the second queue.
pub(super) const RX_BUFFERS: u64 = BUFFERS + 0x20000;
const TX_BUFFERS: u64 = BUFFERS + 0x200_000;

pub(super) fn config() -> NetConfig {
    NetConfig {
        id: "eth0".to_owned(),
        mac: None,
        mtu: None,
        rx_limits: LimiterUpdate::default(),
        tx_limits: LimiterUpdate::default(),
    }
}

pub(super) struct Rig {
    pub(super) net: Net,
    pub(super) rx: Driver,
    pub(super) tx: Driver,
    pub(super) wire: UnixStream,
    features: u64,
    pub(super) signals: DeviceSignals,
    interrupts: Arc<AtomicU32>,
}

impl Rig {
    pub(super) fn new(size: u16, features: u64) -> Self {
        let (tap, wire) = Tap::mock();
        Self::of(Net::new(config(), tap).unwrap(), wire, size, features)
    }

    /// A rig round a device that is there already.
    pub(super) fn of(net: Net, wire: UnixStream, size: u16, features: u64) -> Self {
        let memory = memory();
        let (signals, interrupts) = signals();
        Self {
            net,
            rx: Driver::new(memory.clone(), size),
            tx: second_driver(memory, size),
            wire,
            features: features | feature::VERSION_1,
            signals,
            interrupts,
        }
    }

    pub(super) fn start(&mut self) {
        let queue = |driver: &Driver| {
            Some(StartedQueue {
                queue: driver.queue(self.features),
                kick: driver.kick.clone(),
            })
        };
        let context = StartContext {
            memory: self.rx.memory.clone(),
            features: self.features,
            queues: vec![queue(&self.rx), queue(&self.tx)],
            signals: self.signals.clone(),
        };
        self.net.start(context).unwrap();
    }

    /// Stops the device, and keeps its queues to start from.
    pub(super) fn stop(&mut self) {
        let states = self.net.stop();
        let [Some(rx), Some(tx)] = states[..] else {
            panic!("two queues ran, and these came back: {states:?}");
        };
        (self.rx.state, self.tx.state) = (rx, tx);
    }

    pub(super) fn add_rx(&mut self, slot: u64) {
        self.rx.add(&[writable(RX_BUFFERS + 2048 * slot, 2048)]);
    }

    pub(super) fn add_tx(&mut self, slot: u64, frame: &[u8]) {
        let address = TX_BUFFERS + 2048 * slot;
        self.tx
            .memory
            .write_slice(frame, GuestAddress(address))
            .unwrap();
        self.tx.add(&[readable(address, frame.len() as u32)]);
    }
}

#[test]
fn the_configuration_says_what_was_configured() {
    let mut space = [0; 16];
    let (tap, _wire) = Tap::mock();
    let net = Net::new(config(), tap).unwrap();
    assert_eq!(
        net.features() & (MAC | MTU),
        0,
        "a driver then chooses for itself"
    );
    assert_eq!((net.device_type(), net.queue_sizes().len()), (1, 3));

    let (tap, _wire) = Tap::mock();
    let mac = Some([6, 0, 0xac, 0x10, 0, 2]);
    let net = Net::new(
        NetConfig {
            mac,
            mtu: Some(9000),
            ..config()
        },
        tap,
    )
    .unwrap();
    assert_eq!(net.features() & (MAC | MTU), MAC | MTU);
    net.read_config(0, &mut space);
    let expected = [6, 0, 0xac, 0x10, 0, 2, 1, 0, 1, 0, 0x28, 0x23, 0, 0, 0, 0];
    assert_eq!(space, expected);
}

#[test]
fn an_mtu_below_the_standards_is_refused() {
    let (tap, _wire) = Tap::mock();
    let refused = Net::new(
        NetConfig {
            mtu: Some(67),
            ..config()
        },
        tap,
    );
    assert!(matches!(refused, Err(NetError::Mtu(67))));
    let (tap, _wire) = Tap::mock();
    Net::new(
        NetConfig {
            mtu: Some(68),
            ..config()
        },
        tap,
    )
    .unwrap();
}

#[test]
fn one_queue_is_not_enough() {
    let mut rig = Rig::new(16, 0);
    for missing in 0..2 {
        let mut queues: Vec<_> = [&rig.rx, &rig.tx]
            .map(|driver| {
                Some(StartedQueue {
                    queue: driver.queue(0),
                    kick: driver.kick.clone(),
                })
            })
            .into();
        queues[missing] = None;
        let context = StartContext {
            memory: rig.rx.memory.clone(),
            features: rig.features,
            queues,
            signals: rig.signals.clone(),
        };
        assert!(rig.net.start(context).is_err());
        assert!(rig.net.stop().is_empty());
    }
}

#[test]
fn frames_go_both_ways() {
    for features in [
        0,
        feature::EVENT_IDX,
        MRG_RXBUF,
        MRG_RXBUF | feature::EVENT_IDX,
    ] {
        let mut rig = Rig::new(64, features);
        rig.start();
        let (mut tx_event, mut rx_event) = (0, 0);
        for round in 0..500u16 {
            let whole = frame(60 + usize::from(round), round as u8);
            rig.add_tx(0, &whole);
            // A driver that leaves out the kicks that are not wanted.
            let wanted = if features & feature::EVENT_IDX != 0 {
                rig.tx.avail_event() == round
            } else {
                std::sync::atomic::fence(Ordering::SeqCst);
                rig.tx.used_flags() == 0
            };
            if wanted {
                rig.tx.kick();
            }
            let mut data = [0; 2048];
            let len = rig.wire.read(&mut data).unwrap();
            assert!(data[..len] == whole, "round {round}");
            eventually("the frame's buffer is given back", || {
                rig.tx.take_used().is_some()
            });
            tx_event += 1;
            rig.tx.set_used_event(tx_event);

            rig.add_rx(0);
            rig.rx.kick();
            assert_eq!(rig.wire.write(&whole).unwrap(), whole.len());
            eventually("the frame arrives", || rig.rx.take_used().is_some());
            rx_event += 1;
            rig.rx.set_used_event(rx_event);
            assert!(read(&rig.rx.memory, RX_BUFFERS + 12, len - 12) == whole[12..]);
        }
        assert!(rig.interrupts.load(Ordering::SeqCst) > 0);
        rig.stop();
        let counts = rig.net.control().counts();
        assert_eq!((counts.rx_frames, counts.tx_frames), (500, 500));
    }
}

#[test]
fn a_kick_ends_the_wait_for_buffers() {
    for features in [MRG_RXBUF, MRG_RXBUF | feature::EVENT_IDX] {
        let mut rig = Rig::new(16, features);
        rig.start();
        for round in 0..20u8 {
            assert_eq!(rig.wire.write(&frame(100, round)).unwrap(), 100);
            // Long enough for the worker to have gone to sleep, most times.
            std::thread::sleep(Duration::from_millis(2));
            assert_eq!(rig.rx.take_used(), None);
            rig.add_rx(0);
            rig.rx.kick();
            eventually("the frame arrives", || rig.rx.take_used().is_some());
            assert!(read(&rig.rx.memory, RX_BUFFERS + 12, 88) == frame(100, round)[12..]);
        }
    }
}

#[test]
fn nothing_is_lost_or_doubled_by_pauses_under_traffic() {
    const FRAMES: u32 = 1000;
    let mut rig = Rig::new(64, MRG_RXBUF | feature::EVENT_IDX);
    rig.start();
    let numbered = |number: u32| {
        let mut whole = frame(200, number as u8);
        whole[12..16].copy_from_slice(&number.to_le_bytes());
        whole
    };
    let mut wire = rig.wire.try_clone().unwrap();
    let echo = std::thread::spawn(move || {
        let mut data = [0; 2048];
        for number in 0..FRAMES {
            let len = wire.read(&mut data).unwrap();
            assert!(
                data[..len] == numbered(number),
                "frame {number} from the guest"
            );
            assert_eq!(wire.write(&data[..len]).unwrap(), len);
        }
    });
    for slot in 0..64 {
        rig.add_rx(slot);
    }
    rig.rx.kick();
    let (mut sent, mut done, mut received, mut turns) = (0, 0, 0, 0u32);
    let start = Instant::now();
    while received < FRAMES {
        assert!(
            start.elapsed().as_secs() < 30,
            "{sent} sent, {received} received"
        );
        // No more than the wire holds, which loses what it has no room for.
        while sent < FRAMES && sent - received < 32 && sent - done < 32 {
            rig.add_tx((sent % 64).into(), &numbered(sent));
            sent += 1;
        }
        rig.tx.kick();
        while rig.tx.take_used().is_some() {
            done += 1;
        }
        while let Some(used) = rig.rx.take_used() {
            let slot = u64::from(received % 64);
            assert_eq!(used.len, 200);
            let seen = read(&rig.rx.memory, RX_BUFFERS + 2048 * slot + 12, 188);
            assert!(
                seen == numbered(received)[12..],
                "frame {received} at the guest"
            );
            rig.add_rx(slot);
            received += 1;
        }
        rig.rx.kick();
        std::thread::yield_now();
        turns += 1;
        if turns % 8 == 0 {
            rig.stop();
            rig.start();
            rig.rx.kick();
        }
    }
    echo.join().unwrap();
    rig.stop();
    assert_eq!(rig.net.control().counts().rx_dropped, 0);
}

#[test]
fn neither_direction_starves_the_other() {
    let mut rig = Rig::new(256, MRG_RXBUF);
    for slot in 0..256 {
        rig.add_rx(slot);
        rig.add_tx(slot, &frame(100, 0));
    }
    for _ in 0..128 {
        assert_eq!(rig.wire.write(&frame(100, 0)).unwrap(), 100);
    }
    rig.start();
    rig.tx.kick();
    eventually("all frames arrived both ways", || {
        let counts = rig.net.control().counts();
        (counts.rx_frames, counts.tx_frames + counts.tx_errors) == (128, 256)
    });
}

#[test]
fn a_broken_queue_asks_for_a_reset_and_can_be_stopped() {
    let mut rig = Rig::new(16, 0);
    rig.start();
    rig.tx.set_descriptor(0, (BUFFERS, 100, NEXT, 0));
    rig.tx.offer(0);
    rig.tx.kick();
    eventually("a reset is asked for", || rig.signals.is_reset_needed());
    rig.stop();
    rig.signals.clear();
    // After the reset it works again.
    rig.rx = Driver::new(rig.rx.memory.clone(), 16);
    rig.tx = second_driver(rig.rx.memory.clone(), 16);
    rig.tx.set_avail_index(0);
    rig.start();
    rig.add_tx(0, &frame(100, 7));
    rig.tx.kick();
    let mut data = [0; 200];
    assert_eq!(rig.wire.read(&mut data).unwrap(), 100);
}

#[test]
fn a_driver_that_only_adds_useless_buffers_does_not_keep_the_worker_from_stopping() {
    let mut rig = Rig::new(256, MRG_RXBUF);
    rig.start();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = stop.clone();
    let mut driver = Driver::new(rig.rx.memory.clone(), 256);
    driver.kick = rig.rx.kick.clone();
    let guest = std::thread::spawn(move || {
        while !stopped.load(Ordering::Relaxed) {
            if driver.avail.wrapping_sub(driver.used_index()) < 256 {
                driver.add(&[readable(BUFFERS, 100)]);
                driver.kick();
            }
        }
    });
    std::thread::sleep(Duration::from_millis(50));
    rig.add_tx(0, &frame(100, 1));
    rig.tx.kick();
    let mut data = [0; 200];
    assert_eq!(
        rig.wire.read(&mut data).unwrap(),
        100,
        "the other direction has its turn"
    );
    rig.net.stop();
    stop.store(true, Ordering::Relaxed);
    guest.join().unwrap();
    assert!(rig.net.control().counts().rx_bad_chains > 0);
}

#[test]
fn limited_frames_wait_and_none_is_lost() {
    let limits = LimiterUpdate {
        ops: BucketUpdate::Set(BucketLimits {
            size: 4,
            refill_time: Duration::from_millis(100),
            one_time_burst: 0,
        }),
        bandwidth: BucketUpdate::Keep,
    };
    let mut rig = Rig::new(16, MRG_RXBUF);
    rig.net.control().limit(limits, limits);
    rig.start();
    let whole = frame(100, 1);
    let start = Instant::now();
    let mut data = [0; 2048];
    for _ in 0..12 {
        rig.tx
            .memory
            .write_slice(&whole, GuestAddress(TX_BUFFERS))
            .unwrap();
        rig.tx.add(&[readable(TX_BUFFERS, 100)]);
        rig.tx.kick();
        rig.add_rx(0);
        rig.rx.kick();
        assert_eq!(rig.wire.write(&whole).unwrap(), 100);
        assert_eq!(rig.wire.read(&mut data).unwrap(), 100);
        eventually("the frame arrives", || rig.rx.take_used().is_some());
        eventually("the buffer comes back", || rig.tx.take_used().is_some());
    }
    // Four at once, and one every 25 ms after that.
    assert!(start.elapsed() >= Duration::from_millis(190));
    let counts = rig.net.control().counts();
    assert_eq!((counts.rx_frames, counts.tx_frames), (12, 12));
    // A slow host has more time between them.
    assert!(
        counts.rx_throttled >= 1 && counts.tx_throttled >= 1,
        "{counts:?}"
    );
}
