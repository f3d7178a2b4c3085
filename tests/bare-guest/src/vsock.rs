// SPDX-License-Identifier: Apache-2.0
//! `vsock-listen` and `vsock-connect`: connections from and to the host, by virtio-drivers'
//! connection manager.

use crate::console::say;
use crate::memory::{self, BareHal};
use crate::mmio::{self, Mmio};
use crate::{clock, params, pattern};
use alloc::vec::Vec;
use virtio_drivers::Error;
use virtio_drivers::device::socket::{
    SocketError, VirtIOSocket, VsockAddr, VsockConnectionManager, VsockEvent, VsockEventType,
};
use virtio_drivers::transport::DeviceType;

/// What one receive buffer of the device holds, with its header.
const RX_BUFFER: usize = 4096;
/// The room for what a connection has received; the heap is small.
const CAPACITY: u32 = 16 * 1024;
/// Bytes that are sent in one packet.
const CHUNK: usize = 16 * 1024;

const HOST: u64 = 2;
/// The guest's port of connections that it asks for.
const OWN_PORT: u32 = 1024;

type Manager = VsockConnectionManager<BareHal, Mmio, RX_BUFFER>;

fn open() -> Manager {
    let base = mmio::find(DeviceType::Socket).expect("no socket device");
    let transport = Mmio::new(base).expect("the socket device cannot be used");
    let driver = VirtIOSocket::new(transport).expect("no socket driver");
    VsockConnectionManager::new_with_capacity(driver, CAPACITY)
}

fn poll(manager: &mut Manager) -> Option<VsockEvent> {
    manager.poll().expect("the socket device misbehaves")
}

/// Sends as far as there is credit; whether it was sent.
fn try_send(manager: &mut Manager, peer: VsockAddr, port: u32, data: &[u8]) -> bool {
    match manager.send(peer, port, data) {
        Ok(()) => true,
        Err(Error::SocketDeviceError(SocketError::InsufficientBufferSpaceInPeer)) => false,
        Err(error) => panic!("cannot send: {error}"),
    }
}

/// A connection whose bytes go back to where they came from.
struct Echo {
    peer: VsockAddr,
    /// How much of the buffer waits to be sent.
    waiting: usize,
    buffer: &'static mut [u8],
}

impl Echo {
    /// Sends on what has come, as far as possible; how much that was.
    fn advance(&mut self, manager: &mut Manager, port: u32) -> u64 {
        if self.waiting == 0 {
            let Ok(count) = manager.recv(self.peer, port, self.buffer) else {
                return 0;
            };
            if count == 0 {
                return 0;
            }
            self.waiting = count;
            let told = manager.update_credit(self.peer, port);
            told.expect("cannot tell of credit");
        }
        let data = &self.buffer[..self.waiting];
        if !try_send(manager, self.peer, port, data) {
            return 0;
        }
        core::mem::take(&mut self.waiting) as u64
    }
}

/// `vsock-listen`: after `vsock-listen ready`, sends back whatever comes on connections to
/// `bare.port`, until `bare.conns` of them have ended.
pub fn listen() {
    let port = params::number("bare.port", 52) as u32;
    let conns = params::number("bare.conns", 1);
    let mut manager = open();
    manager.listen(port);
    say!("vsock-listen ready cid={}", manager.guest_cid());
    let mut open: Vec<Echo> = Vec::new();
    let mut idle: Vec<&'static mut [u8]> = Vec::new();
    let (mut accepted, mut ended, mut bytes) = (0, 0, 0);
    let done = clock::wait(params::number("bare.timeout_ms", clock::LONG_MS), || {
        if let Some(event) = poll(&mut manager) {
            match event.event_type {
                VsockEventType::ConnectionRequest => {
                    accepted += 1;
                    open.push(Echo {
                        peer: event.source,
                        waiting: 0,
                        buffer: idle.pop().unwrap_or_else(|| memory::take(CHUNK, 64)),
                    });
                }
                VsockEventType::Disconnected { .. } => {
                    ended += 1;
                    if let Some(at) = open.iter().position(|echo| echo.peer == event.source) {
                        idle.push(open.swap_remove(at).buffer);
                    }
                }
                _ => {}
            }
        }
        for echo in &mut open {
            bytes += echo.advance(&mut manager, port);
        }
        ended == conns
    });
    say!(
        "vsock-listen accepted={accepted} ended={ended} bytes={bytes} timeout={}",
        u8::from(!done)
    );
}

/// `vsock-connect`: connects to the host's `bare.port`, sends `bare.bytes` bytes, compares what
/// comes back, and closes the connection.
pub fn connect() {
    let host = VsockAddr {
        cid: HOST,
        port: params::number("bare.port", 52) as u32,
    };
    let len = params::number("bare.bytes", 1 << 20) as usize;
    let seed = params::number("bare.seed", 1);
    let mut manager = open();
    manager
        .connect(host, OWN_PORT)
        .expect("cannot ask for a connection");
    match manager.wait_for_event().map(|event| event.event_type) {
        Ok(VsockEventType::Connected) => {}
        other => {
            say!("vsock-connect refused {other:?}");
            return;
        }
    }
    let data = memory::take(len, 64);
    pattern::fill(data, seed, 0, 0);
    let back = memory::take(len, 64);
    let (mut sent, mut received) = (0, 0);
    let done = clock::wait(params::number("bare.timeout_ms", clock::LONG_MS), || {
        poll(&mut manager);
        let end = len.min(sent + CHUNK);
        if sent < len && try_send(&mut manager, host, OWN_PORT, &data[sent..end]) {
            sent = end;
        }
        let count = manager.recv(host, OWN_PORT, &mut back[received..]);
        let count = count.expect("the connection is gone");
        if count > 0 {
            received += count;
            let told = manager.update_credit(host, OWN_PORT);
            told.expect("cannot tell of credit");
        }
        received == len
    });
    let right = pattern::matches(back, seed, 0, 0);
    manager
        .shutdown(host, OWN_PORT)
        .expect("cannot close the connection");
    let closed = clock::wait(clock::LONG_MS, || {
        poll(&mut manager)
            .is_some_and(|event| matches!(event.event_type, VsockEventType::Disconnected { .. }))
    });
    say!(
        "vsock-connect sent={sent} received={received} right={} closed={} timeout={}",
        u8::from(right),
        u8::from(closed),
        u8::from(!done)
    );
}
