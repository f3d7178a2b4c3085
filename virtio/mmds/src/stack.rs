// SPDX-License-Identifier: Apache-2.0
//! The service as a neighbour on the guest's network: ARP, IPv4, TCP on port 80, and HTTP on that.
//!
//! All that a guest can make grow is bounded: connections, of which the one with the longest quiet
//! makes room for a new one; the bytes of a request and of an answer under way; the frames that
//! wait for it. What it does not answer is given up after a while.

use std::net::Ipv4Addr;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::socket::tcp::{Socket, State};
use smoltcp::time::Instant as StackTime;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol,
    EthernetRepr, IpCidr, Ipv4Packet,
};
use thiserror::Error;

use crate::SharedMmds;
use crate::connection::{Connection, listener};
use crate::counts::MmdsCounts;
use crate::port::Port;
use crate::respond::{Rules, respond};

/// The largest frame that is taken from a guest, in bytes. Its card may leave segmentation to the
/// host, but not for more than the service has room for.
pub const MAX_FRAME: usize = 8192;

/// The service's MAC address, which is Firecracker's: a guest may have learnt it there.
const MAC: EthernetAddress = EthernetAddress([0x06, 0x01, 0x23, 0x45, 0x67, 0x01]);
const HTTP_PORT: u16 = 80;
/// The most connections at a time.
const MAX_CONNECTIONS: usize = 30;
/// How often a stack looks for more to do before others have their turn.
const MAX_ROUNDS: usize = 8;
/// The least time between two looks at the clock's behest.
const MIN_WAIT: Duration = Duration::from_millis(1);

/// Bytes of an Ethernet header, and where the type and the addresses of what follows are.
const ETHERNET_HEADER: usize = 14;
const ETHERTYPE: usize = 12;
const IPV4_DESTINATION: usize = 30;
const ARP_TARGET: usize = 38;

/// What the host decides about the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StackConfig {
    /// Where the guest finds it.
    pub address: Ipv4Addr,
    /// Whether the data is only given to who has a token (version 2).
    pub needs_token: bool,
    /// Whether answers are text whatever was asked for, as those of EC2's service.
    pub imds_compat: bool,
}

/// Why there is no stack.
#[derive(Debug, Error)]
pub enum StackError {
    /// The host has no random numbers, without which a connection could be forged.
    #[error("the host gives no random numbers for the metadata service")]
    Random(#[from] getrandom::Error),
}

/// The service, as one network interface of a guest sees it.
pub struct Stack {
    address: Ipv4Addr,
    rules: Rules,
    mmds: SharedMmds,
    interface: Interface,
    port: Port,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
    /// What times are counted from.
    epoch: Instant,
    /// When there is something to do next, as far as it does not depend on the guest.
    due: Option<Duration>,
    /// Whether there is something to do now.
    ready: bool,
}

impl Stack {
    /// A stack that answers with what is in `mmds`.
    ///
    /// # Errors
    ///
    /// The host has no random numbers.
    pub fn new(config: StackConfig, mmds: SharedMmds) -> Result<Self, StackError> {
        let mut seed = [0; 8];
        getrandom::fill(&mut seed)?;
        let mut settings = Config::new(MAC.into());
        settings.random_seed = u64::from_ne_bytes(seed);
        let mut port = Port::default();
        let mut interface = Interface::new(settings, &mut port, StackTime::ZERO);
        interface.update_ip_addrs(|addresses| {
            // Whatever address the guest has, it is next to us. There is room for one.
            let _ = addresses.push(IpCidr::new(config.address.into(), 0));
        });
        Ok(Self {
            address: config.address,
            rules: Rules {
                needs_token: config.needs_token,
                always_text: config.imds_compat,
            },
            mmds,
            interface,
            port,
            sockets: SocketSet::new(Vec::new()),
            connections: Vec::new(),
            epoch: Instant::now(),
            due: None,
            ready: false,
        })
    }

    /// Whether the frame that begins with `head`, of which 42 bytes are enough, is for the service
    /// and for nobody else.
    pub fn is_addressee(&self, head: &[u8]) -> bool {
        let at = match field(head, ETHERTYPE) {
            Some([0x08, 0x00]) => IPV4_DESTINATION,
            Some([0x08, 0x06]) => ARP_TARGET,
            _ => return false,
        };
        field(head, at) == Some(self.address.octets())
    }

    /// Takes a frame from the guest; one that is too large or makes no sense is dropped.
    pub fn receive(&mut self, frame: Vec<u8>) {
        self.receive_at(self.epoch.elapsed(), frame);
    }

    /// The next frame for the guest.
    pub fn transmit(&mut self) -> Option<Vec<u8>> {
        let (frame, was_starved) = self.port.take()?;
        self.ready |= was_starved;
        self.count(|counts| {
            counts.tx_frames += 1;
            counts.tx_bytes += frame.len() as u64;
        });
        Some(frame)
    }

    /// Whether there is a frame for the guest.
    pub fn has_frames(&self) -> bool {
        !self.port.is_empty()
    }

    /// Does what is due, which may make frames for the guest; whether there was anything.
    pub fn advance(&mut self) -> bool {
        // Most of the time nobody talks to the service, and looking at the clock has its price.
        if !self.ready && self.due.is_none() {
            return false;
        }
        self.advance_at(self.epoch.elapsed())
    }

    /// How long from now until [`Stack::advance`] has something to do again if no frame arrives;
    /// `None` for as long as none does.
    pub fn due(&self) -> Option<Duration> {
        if self.ready {
            return Some(Duration::ZERO);
        }
        Some(self.due?.saturating_sub(self.epoch.elapsed()))
    }

    fn receive_at(&mut self, now: Duration, mut frame: Vec<u8>) {
        let bad = frame.len() > MAX_FRAME || !self.is_addressee(&frame);
        self.count(|counts| {
            counts.rx_frames += 1;
            counts.rx_bad += u64::from(bad);
        });
        if bad {
            return;
        }
        if let Some(answer) = self.introduce(&mut frame) {
            self.port.incoming = Some(answer);
            self.poll(now);
        }
        self.port.incoming = Some(frame);
        self.ready = true;
        self.advance_at(now);
    }

    fn count(&self, count: impl FnOnce(&mut MmdsCounts)) {
        let mut mmds = self.mmds.lock().unwrap_or_else(PoisonError::into_inner);
        count(&mut mmds.counts);
    }

    /// Makes `frame`, if it is an IPv4 packet, one that was sent to our MAC address: the guest may
    /// take its gateway for the way to us. What is returned tells the stack of the sender, whom it
    /// would have to ask for by ARP otherwise, and who may not answer that.
    fn introduce(&self, frame: &mut [u8]) -> Option<Vec<u8>> {
        let mut ethernet = EthernetFrame::new_checked(frame).ok()?;
        if ethernet.ethertype() != EthernetProtocol::Ipv4 {
            return None;
        }
        ethernet.set_dst_addr(MAC);
        let source = ethernet.src_addr();
        let packet = Ipv4Packet::new_checked(ethernet.payload_mut()).ok()?;
        let arp = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Reply,
            source_hardware_addr: source,
            source_protocol_addr: packet.src_addr(),
            target_hardware_addr: MAC,
            target_protocol_addr: self.address,
        };
        let header = EthernetRepr {
            src_addr: source,
            dst_addr: MAC,
            ethertype: EthernetProtocol::Arp,
        };
        let mut answer = vec![0; ETHERNET_HEADER + arp.buffer_len()];
        let mut ethernet = EthernetFrame::new_unchecked(&mut answer[..]);
        header.emit(&mut ethernet);
        arp.emit(&mut ArpPacket::new_unchecked(ethernet.payload_mut()));
        Some(answer)
    }

    fn advance_at(&mut self, now: Duration) -> bool {
        if !self.ready && self.due.is_none_or(|due| now < due) {
            return false;
        }
        self.ready = false;
        self.keep_listening();
        for round in 0.. {
            self.poll(now);
            self.drop_ended();
            if !self.serve(now) {
                break;
            }
            self.keep_listening();
            if round == MAX_ROUNDS {
                self.ready = true;
                break;
            }
        }
        self.plan(now);
        true
    }

    fn poll(&mut self, now: Duration) {
        self.interface
            .poll(stack_time(now), &mut self.port, &mut self.sockets);
    }

    /// Serves all connections; whether there was anything to do.
    fn serve(&mut self, now: Duration) -> bool {
        let (mut any, mut opened) = (false, 0);
        for connection in &mut self.connections {
            let waited = connection.since.is_none();
            let socket: &mut Socket<'_> = self.sockets.get_mut(connection.handle);
            any |= connection.serve(socket, now, &mut |request| {
                let mut mmds = self.mmds.lock().unwrap_or_else(PoisonError::into_inner);
                respond(&mut mmds, self.rules, request)
            });
            opened += u64::from(waited && connection.since.is_some());
        }
        if opened > 0 {
            self.count(|counts| counts.connections_opened += opened);
        }
        any
    }

    /// Sees to it that there is one socket that listens, if need be in the place of the connection
    /// that was quiet for the longest time.
    fn keep_listening(&mut self) {
        if self.connections.iter().any(|one| one.since.is_none()) {
            return;
        }
        if self.connections.len() >= MAX_CONNECTIONS {
            let oldest = self.connections.iter().min_by_key(|one| {
                let state = self.sockets.get::<Socket<'_>>(one.handle).state();
                (!matches!(state, State::Closed | State::TimeWait), one.since)
            });
            if let Some(oldest) = oldest {
                self.sockets.get_mut::<Socket<'_>>(oldest.handle).abort();
            }
        }
        if let Some(socket) = listener(HTTP_PORT) {
            let handle = self.sockets.add(socket);
            self.connections.push(Connection::new(handle));
        }
    }

    /// Forgets the connections that have ended. The last word on them has been said: this comes
    /// after the stack has sent what it had to.
    fn drop_ended(&mut self) {
        let mut gone = 0;
        let sockets = &mut self.sockets;
        self.connections.retain(|one| {
            let ended = sockets.get::<Socket<'_>>(one.handle).state() == State::Closed;
            if ended {
                gone += u64::from(one.since.is_some());
                sockets.remove(one.handle);
            }
            !ended
        });
        if gone > 0 {
            self.count(|counts| counts.connections_ended += gone);
        }
    }

    /// Finds out when there is something to do next.
    fn plan(&mut self, now: Duration) {
        // A guest that takes no frames is waited for, however long.
        if self.port.is_starved() {
            self.due = None;
            return;
        }
        let poll_at = self.interface.poll_at(stack_time(now), &self.sockets);
        let poll_at = poll_at
            .map(|time| Duration::from_micros(u64::try_from(time.total_micros()).unwrap_or(0)));
        let deadlines = self.connections.iter().filter_map(Connection::deadline);
        self.due = deadlines
            .chain(poll_at)
            .min()
            .map(|due| due.max(now + MIN_WAIT));
    }
}

fn stack_time(time: Duration) -> StackTime {
    StackTime::from_micros(i64::try_from(time.as_micros()).unwrap_or(i64::MAX))
}

/// `N` bytes of `data` from `at` on.
fn field<const N: usize>(data: &[u8], at: usize) -> Option<[u8; N]> {
    data.get(at..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests;
