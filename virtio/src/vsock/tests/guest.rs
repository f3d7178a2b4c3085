// SPDX-License-Identifier: Apache-2.0
//! A guest's driver of the device, as far as tests need one.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use brume_devices::Interrupt;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use crate::device::{StartContext, StartedQueue, VirtioDevice, feature};
use crate::memory::GuestMemory;
use crate::signals::DeviceSignals;
use crate::testing::{BUFFERS, Driver, memory_of, readable, writable};
use crate::vsock::packet::{HEADER_LEN, Header, TYPE_STREAM, op};
use crate::vsock::{Vsock, VsockConfig};

pub(super) const CID: u32 = 5;
/// How long a test waits for what has to happen.
pub(super) const SOON: Duration = Duration::from_secs(10);

/// Each queue's rings have as much.
const RINGS: u64 = 0x10000;
const RX_BUFFERS: u64 = BUFFERS + 3 * RINGS;
pub(super) const RX_LEN: u32 = 4096;
const TX_BUFFERS: u64 = 0x80_0000;
const TX_LEN: u64 = 0x2_0000;
const MEMORY: u64 = 0x300_0000;
const SIZE: u16 = 256;

/// A running device and its guest.
pub(super) struct Guest {
    pub(super) device: Vsock,
    pub(super) rx: Driver,
    pub(super) tx: Driver,
    pub(super) events: Driver,
    pub(super) memory: GuestMemory,
    pub(super) folder: TempDir,
    pub(super) signals: DeviceSignals,
    pub(super) interrupts: Arc<AtomicU32>,
    features: u64,
    /// Address and length of each rx buffer, by the head of its chain.
    rx_buffers: Vec<u64>,
    next_tx: u64,
    /// Packets that were received and not looked at.
    pub(super) inbox: VecDeque<(Header, Vec<u8>)>,
}

fn driver(memory: &GuestMemory, number: u64) -> Driver {
    let mut driver = Driver::new(memory.clone(), SIZE);
    let base = BUFFERS + number * RINGS;
    driver.state.desc_table = base;
    driver.state.avail_ring = base + 0x8000;
    driver.state.used_ring = base + 0xa000;
    driver
}

impl Guest {
    /// A running device, whose guest has given it all the buffers it has.
    pub(super) fn new() -> Self {
        let mut guest = Self::without_buffers();
        guest.start();
        guest.give_buffers(SIZE.into());
        guest
    }

    /// A device that is not started.
    pub(super) fn without_buffers() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let memory = memory_of(MEMORY);
        let interrupts = Arc::new(AtomicU32::new(0));
        let counter = interrupts.clone();
        let line = Interrupt::from_fn(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        });
        let config = VsockConfig {
            guest_cid: CID,
            uds_path: folder.path().join("v.sock"),
        };
        Self {
            device: Vsock::new(&config).unwrap(),
            rx: driver(&memory, 0),
            tx: driver(&memory, 1),
            events: driver(&memory, 2),
            memory,
            folder,
            signals: DeviceSignals::new(line),
            interrupts,
            features: feature::VERSION_1,
            rx_buffers: (0..u64::from(SIZE))
                .map(|slot| RX_BUFFERS + slot * u64::from(RX_LEN))
                .collect(),
            next_tx: 0,
            inbox: VecDeque::new(),
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
            memory: self.memory.clone(),
            features: self.features,
            queues: vec![queue(&self.rx), queue(&self.tx), queue(&self.events)],
            signals: self.signals.clone(),
        };
        self.device.start(context).unwrap();
    }

    /// Stops the device, and keeps its queues to start from.
    pub(super) fn stop(&mut self) {
        let states = self.device.stop();
        let [Some(rx), Some(tx), Some(events)] = states[..] else {
            panic!("three queues ran, and these came back: {states:?}");
        };
        (self.rx.state, self.tx.state, self.events.state) = (rx, tx, events);
    }

    pub(super) fn rx_buffer(&self, head: u32) -> GuestAddress {
        GuestAddress(self.rx_buffers[head as usize])
    }

    pub(super) fn path(&self) -> PathBuf {
        self.folder.path().join("v.sock")
    }

    /// Gives the device `count` buffers to receive into.
    pub(super) fn give_buffers(&mut self, count: usize) {
        for _ in 0..count {
            let slot = usize::from(self.rx.avail % SIZE);
            self.rx.add(&[writable(self.rx_buffers[slot], RX_LEN)]);
        }
        self.rx.kick();
    }

    /// Takes what the device has sent, and gives the buffers back.
    fn collect(&mut self) {
        let mut count = 0;
        while let Some(used) = self.rx.take_used() {
            let address = self.rx_buffer(used.head);
            let mut packet = vec![0; used.len as usize];
            self.memory.read_slice(&mut packet, address).unwrap();
            let payload = packet.split_off(HEADER_LEN);
            let header = Header::from_bytes(&packet.try_into().unwrap());
            assert_eq!(header.len as usize, payload.len(), "{header:?}");
            assert_eq!((header.dst_cid, header.kind), (CID.into(), TYPE_STREAM));
            self.inbox.push_back((header, payload));
            count += 1;
        }
        if count > 0 {
            self.give_buffers(count);
        }
    }

    /// The next packet from the device.
    pub(super) fn next(&mut self) -> (Header, Vec<u8>) {
        let start = Instant::now();
        loop {
            self.collect();
            if let Some(packet) = self.inbox.pop_front() {
                return packet;
            }
            assert!(start.elapsed() < SOON, "no packet came");
            std::thread::yield_now();
        }
    }

    /// The next packet, which has to be of this operation.
    pub(super) fn expect(&mut self, op: u16) -> Header {
        let (header, _) = self.next();
        assert_eq!(header.op, op, "{header:?}");
        header
    }

    /// Sees to it that no packet comes for a while.
    pub(super) fn expect_nothing(&mut self) {
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(100) {
            self.collect();
            assert_eq!(self.inbox, []);
            std::thread::yield_now();
        }
    }

    /// Writes a packet to the next transmit buffer, as a header and a payload of its own.
    pub(super) fn send(&mut self, header: &Header, payload: &[u8]) {
        while self.tx.take_used().is_some() {}
        let start = Instant::now();
        while self.tx.avail.wrapping_sub(self.tx.used) >= SIZE / 2 {
            while self.tx.take_used().is_some() {}
            assert!(start.elapsed() < SOON, "the device takes no packets");
            std::thread::yield_now();
        }
        let address = TX_BUFFERS + self.next_tx * TX_LEN;
        self.next_tx = (self.next_tx + 1) % 128;
        let at = |offset: u64| GuestAddress(address + offset);
        self.memory.write_slice(&header.to_bytes(), at(0)).unwrap();
        self.memory.write_slice(payload, at(64)).unwrap();
        let mut pieces = vec![readable(address, HEADER_LEN as u32)];
        if !payload.is_empty() {
            pieces.push(readable(address + 64, payload.len() as u32));
        }
        self.tx.add(&pieces);
        self.tx.kick();
    }

    /// Listens on the host for the guest's connections to `port`.
    pub(super) fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.folder.path().join(format!("v.sock_{port}"))).unwrap()
    }

    /// Connects from the guest to the host; the host's end comes with it.
    pub(super) fn connect(&mut self, listener: &UnixListener, guest: u32, host: u32) -> Peer {
        let mut peer = Peer::new(guest, host);
        self.send(&peer.header(op::REQUEST, 0), &[]);
        let (stream, _) = listener.accept().unwrap();
        peer.take(stream);
        peer.hear(&self.expect(op::RESPONSE));
        peer
    }

    /// Connects from the host to the guest's `port`, which accepts.
    pub(super) fn accept(&mut self, port: u32) -> Peer {
        let mut stream = UnixStream::connect(self.path()).unwrap();
        writeln!(stream, "CONNECT {port}").unwrap();
        let request = self.expect(op::REQUEST);
        assert_eq!(request.dst_port, port);
        let mut peer = Peer::new(port, request.src_port);
        peer.hear(&request);
        self.send(&peer.header(op::RESPONSE, 0), &[]);
        peer.take(stream);
        let ok = format!("OK {}\n", request.src_port);
        assert_eq!(peer.read(ok.len()), ok.as_bytes());
        peer
    }
}

/// The guest's end of a connection, and the host's.
pub(super) struct Peer {
    pub(super) guest_port: u32,
    pub(super) host_port: u32,
    /// What the guest has taken.
    pub(super) forwarded: u32,
    pub(super) buf_alloc: u32,
    /// What the guest has sent.
    pub(super) sent: u32,
    /// What the device says of its credit.
    pub(super) host_alloc: u32,
    pub(super) host_forwarded: u32,
    stream: Option<UnixStream>,
}

impl Peer {
    pub(super) fn new(guest_port: u32, host_port: u32) -> Self {
        Self {
            guest_port,
            host_port,
            forwarded: 0,
            buf_alloc: 0x4_0000,
            sent: 0,
            host_alloc: 0,
            host_forwarded: 0,
            stream: None,
        }
    }

    pub(super) fn header(&self, op: u16, len: u32) -> Header {
        Header {
            src_cid: CID.into(),
            dst_cid: 2,
            src_port: self.guest_port,
            dst_port: self.host_port,
            len,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.forwarded,
        }
    }

    fn take(&mut self, stream: UnixStream) {
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.set_write_timeout(Some(SOON)).unwrap();
        self.stream = Some(stream);
    }

    pub(super) fn stream(&mut self) -> &mut UnixStream {
        self.stream.as_mut().unwrap()
    }

    /// Closes the host's end.
    pub(super) fn close(&mut self) {
        self.stream = None;
    }

    /// Takes the credit out of a packet of this connection.
    pub(super) fn hear(&mut self, header: &Header) {
        let ends = (header.src_port, header.dst_port);
        assert_eq!(ends, (self.host_port, self.guest_port), "{header:?}");
        (self.host_alloc, self.host_forwarded) = (header.buf_alloc, header.fwd_cnt);
    }

    pub(super) fn credit(&self) -> u32 {
        self.host_alloc - self.sent.wrapping_sub(self.host_forwarded)
    }

    /// Sends from the guest, whatever the credit is.
    pub(super) fn send(&mut self, guest: &mut Guest, data: &[u8]) {
        guest.send(&self.header(op::RW, data.len() as u32), data);
        self.sent = self.sent.wrapping_add(data.len() as u32);
    }

    /// Reads on the host.
    pub(super) fn read(&mut self, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.stream().read_exact(&mut data).unwrap();
        data
    }

    /// Whether the host's end has nothing more to be read.
    pub(super) fn is_at_end(&mut self) -> bool {
        matches!(self.stream().read(&mut [0]), Ok(0))
    }

    /// Receives `len` bytes in the guest.
    pub(super) fn receive(&mut self, guest: &mut Guest, len: usize) -> Vec<u8> {
        let mut data = Vec::new();
        while data.len() < len {
            let (header, payload) = guest.next();
            self.hear(&header);
            assert_eq!(header.op, op::RW, "{header:?}");
            data.extend(payload);
            self.forwarded = self.forwarded.wrapping_add(header.len);
        }
        assert_eq!(data.len(), len);
        data
    }
}

/// Bytes that differ from place to place.
pub(super) fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 251) as u8).collect()
}
