// SPDX-License-Identifier: Apache-2.0
//! A network card that tells the network where it is now, after its machine has moved.
//!
//! Switches send a machine's frames to where the last frame from its MAC address came from, and
//! would do so for minutes after a move. So frames in the guest's name go out of the new TAP: a
//! RARP request, which names the MAC address, and a gratuitous ARP request for each IPv4 address
//! that the guest was seen to use. They are sent five times, since nobody answers to them. A
//! driver with VIRTIO_NET_F_GUEST_ANNOUNCE is told, once, and does it by itself, too, for all the
//! addresses that it knows of (virtio 1.3, section 5.1.6.5.4).

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmm_sys_util::timerfd::TimerFd;

use super::HEADER_LEN;
use super::tap::Tap;
use crate::device::StateError;
use crate::memory::GuestMemory;
use crate::queue::Buffers;

/// How many addresses are kept, the latest ones.
const MAX_ADDRESSES: usize = 4;
/// How often each frame is sent.
const ROUNDS: u32 = 5;
/// From the first round to the second; from each next one to the one after it, it is [`STEP`]
/// longer.
const FIRST_WAIT: Duration = Duration::from_millis(50);
const STEP: Duration = Duration::from_millis(100);

/// Length of an ARP packet for IPv4, with its Ethernet header.
const ARP_LEN: usize = 42;
/// The longest frame that is looked at: an ARP packet is padded at most to the smallest frame.
const MAX_ARP_FRAME: u64 = 64;
const SHORTEST_FRAME: usize = 60;
const TYPE_ARP: [u8; 2] = [0x08, 0x06];
const TYPE_RARP: [u8; 2] = [0x80, 0x35];
/// What follows the Ethernet header: hardware Ethernet, protocol IPv4, and their address lengths.
const ETHERNET_IPV4: [u8; 6] = [0, 1, 0x08, 0, 6, 4];
const REQUEST: u8 = 1;
const REVERSE_REQUEST: u8 = 3;

/// What is known of the guest on its network, and kept with the device's state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Presence {
    /// The MAC address that the driver chose, if none was configured.
    mac: Option<[u8; 6]>,
    /// The guest's IPv4 addresses, the latest last.
    addresses: Vec<Ipv4Addr>,
    /// Whether the driver was asked to announce itself and has not answered.
    asked: bool,
}

impl Presence {
    /// Takes notice of a frame from a guest whose configured MAC address is `own`, if it is an ARP
    /// packet in the guest's own name.
    fn learn(&mut self, frame: &[u8; ARP_LEN], own: Option<[u8; 6]>) {
        let (ethernet, packet) = frame.split_at(14);
        let fields = (
            field::<6>(ethernet, 6),
            field::<2>(ethernet, 12),
            field::<6>(packet, 0),
            field::<6>(packet, 8),
            field::<4>(packet, 14),
        );
        let (Some(source), Some(TYPE_ARP), Some(ETHERNET_IPV4), Some(sender), Some(address)) =
            fields
        else {
            return;
        };
        let is_group = sender.first().is_none_or(|byte| byte & 1 != 0);
        if source != sender || is_group || own.is_some_and(|own| own != sender) {
            return;
        }
        self.mac = own.is_none().then_some(sender);
        let address = Ipv4Addr::from(address);
        if address.is_unspecified() || address.is_broadcast() || address.is_multicast() {
            return;
        }
        if self.addresses.last() == Some(&address) {
            return;
        }
        self.addresses.retain(|known| *known != address);
        if self.addresses.len() >= MAX_ADDRESSES {
            self.addresses.remove(0);
        }
        self.addresses.push(address);
    }
}

fn field<const LEN: usize>(bytes: &[u8], at: usize) -> Option<[u8; LEN]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// A request to everybody in the name of `mac`, with a virtio header: `packet` is the hardware
/// and protocol addresses of the sender and of the target.
fn frame(mac: [u8; 6], kind: [u8; 2], operation: u8, packet: [&[u8]; 4]) -> Vec<u8> {
    let mut frame = vec![0; usize::from(HEADER_LEN)];
    frame.extend([0xff; 6]);
    frame.extend(mac);
    frame.extend(kind);
    frame.extend(ETHERNET_IPV4);
    frame.extend([0, operation]);
    for part in packet {
        frame.extend(part);
    }
    frame.resize(usize::from(HEADER_LEN) + SHORTEST_FRAME, 0);
    frame
}

fn reverse_request(mac: [u8; 6]) -> Vec<u8> {
    let packet: [&[u8]; 4] = [&mac, &[0; 4], &mac, &[0; 4]];
    frame(mac, TYPE_RARP, REVERSE_REQUEST, packet)
}

fn gratuitous_request(mac: [u8; 6], address: Ipv4Addr) -> Vec<u8> {
    let address = address.octets();
    frame(mac, TYPE_ARP, REQUEST, [&mac, &address, &[0; 6], &address])
}

/// What is left of an announcement.
#[derive(Debug)]
struct Rounds {
    left: u32,
    due: Instant,
    wait: Duration,
}

/// What the device, its worker and its controls have in common for announcements.
#[derive(Debug)]
pub(super) struct Announcer {
    /// The configured MAC address.
    own: Option<[u8; 6]>,
    presence: Mutex<Presence>,
    /// The driver is to be asked when the worker next looks.
    ask: AtomicBool,
    /// As in `rounds`, to be seen without a lock.
    left: AtomicU32,
    rounds: Mutex<Rounds>,
    timer: Mutex<TimerFd>,
    /// Of `timer`.
    fd: RawFd,
}

impl Announcer {
    /// # Errors
    ///
    /// The host gives no timer.
    pub(super) fn new(own: Option<[u8; 6]>) -> io::Result<Self> {
        let timer = TimerFd::new()?;
        Ok(Self {
            own,
            presence: Mutex::default(),
            ask: AtomicBool::new(false),
            left: AtomicU32::new(0),
            rounds: Mutex::new(Rounds {
                left: 0,
                due: Instant::now(),
                wait: FIRST_WAIT,
            }),
            fd: timer.as_raw_fd(),
            timer: Mutex::new(timer),
        })
    }

    /// Starts an announcement, or starts it anew. It begins when the worker next looks, and goes
    /// on as long as there is one.
    pub(super) fn start(&self) {
        let mut rounds = lock(&self.rounds);
        *rounds = Rounds {
            left: ROUNDS,
            due: Instant::now(),
            wait: FIRST_WAIT,
        };
        self.ask.store(true, Ordering::Release);
        self.left.store(ROUNDS, Ordering::Release);
        // A time of zero would stop the timer.
        self.wake_in(Duration::from_nanos(1));
    }

    /// Nothing is left to be announced, and nothing is known of the guest.
    pub(super) fn forget(&self) {
        lock(&self.rounds).left = 0;
        self.left.store(0, Ordering::Release);
        self.ask.store(false, Ordering::Release);
        *lock(&self.presence) = Presence::default();
    }

    /// Whether the driver is to be asked to announce itself; once for each announcement.
    pub(super) fn takes_request(&self) -> bool {
        if !self.ask.load(Ordering::Relaxed) || !self.ask.swap(false, Ordering::AcqRel) {
            return false;
        }
        lock(&self.presence).asked = true;
        true
    }

    /// Whether VIRTIO_NET_S_ANNOUNCE is set.
    pub(super) fn is_asked(&self) -> bool {
        lock(&self.presence).asked
    }

    /// The driver has seen VIRTIO_NET_S_ANNOUNCE.
    pub(super) fn acknowledge(&self) {
        lock(&self.presence).asked = false;
    }

    /// Sends what is due; whether there was anything.
    pub(super) fn advance(&self, tap: &Tap) -> bool {
        if self.left.load(Ordering::Acquire) == 0 {
            return false;
        }
        let mut rounds = lock(&self.rounds);
        let now = Instant::now();
        if rounds.left == 0 || now < rounds.due {
            return false;
        }
        for frame in self.frames() {
            // As on any wire, a frame may be lost.
            let _ = tap.write_bytes(&frame);
        }
        rounds.left -= 1;
        if rounds.left > 0 {
            rounds.due = now + rounds.wait;
            self.wake_in(rounds.wait);
            rounds.wait += STEP;
        }
        self.left.store(rounds.left, Ordering::Release);
        true
    }

    /// What is sent in a round; nothing as long as the guest's MAC address is not known.
    fn frames(&self) -> Vec<Vec<u8>> {
        let presence = lock(&self.presence);
        let Some(mac) = self.own.or(presence.mac) else {
            return Vec::new();
        };
        let addresses = presence.addresses.iter();
        let requests = addresses.map(|address| gratuitous_request(mac, *address));
        [reverse_request(mac)].into_iter().chain(requests).collect()
    }

    /// Takes notice of what is in `buffers`: a virtio header and a frame of `len` bytes.
    pub(super) fn see(&self, memory: &GuestMemory, buffers: &Buffers, len: u64) {
        if !(ARP_LEN as u64..=MAX_ARP_FRAME).contains(&len) {
            return;
        }
        let mut frame = [0; ARP_LEN];
        let read = buffers.read_at(memory, HEADER_LEN.into(), &mut frame);
        if read.is_ok() && field(&frame, 12) == Some(TYPE_ARP) {
            lock(&self.presence).learn(&frame, self.own);
        }
    }

    /// What is to be kept; `None` if nothing is known.
    pub(super) fn save(&self) -> Option<Presence> {
        let presence = lock(&self.presence).clone();
        (presence != Presence::default()).then_some(presence)
    }

    /// # Errors
    ///
    /// More is said to be known than is ever kept.
    pub(super) fn restore(&self, presence: Option<Presence>) -> Result<(), StateError> {
        let presence = presence.unwrap_or_default();
        if presence.addresses.len() > MAX_ADDRESSES {
            return Err(StateError::Value("too many addresses of the guest"));
        }
        *lock(&self.presence) = presence;
        Ok(())
    }

    fn wake_in(&self, time: Duration) {
        // It fails for a time that is none.
        let _ = lock(&self.timer).reset(time, None);
    }
}

impl AsRawFd for Announcer {
    fn as_raw_fd(&self) -> RawFd {
        self.fd
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
