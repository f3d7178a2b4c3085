// SPDX-License-Identifier: Apache-2.0
//! All connections of a device, and who is next to speak.
//!
//! ```text
//!   guest's packets --> receive --> Connection <--> unix socket
//!   guest's buffers <-- fill <----- list of connections with something to say <-- events
//! ```
//!
//! It lives as long as the device: connections survive a pause, but not a reset of the device.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use vmm_sys_util::epoll::EventSet;

use super::connection::{Connection, Fate, Speech};
use super::counters::VsockCounters;
use super::listener::{Greeting, Listener, greeting};
use super::packet::{HOST_CID, Header, PORT_ANY, TYPE_STREAM, op};
use super::rx::Rx;
use super::socket;
use super::unsent::Payload;
use super::watch::{FIRST_CLIENT, Source, Watch};
use crate::queue::QueueError;

/// The most connections, with those that are still being made.
pub(super) const MAX_CONNECTIONS: usize = 1023;
/// The most answers to packets without connection that wait for buffers; when there are as many,
/// the guest's packets have to wait.
const MAX_REPLIES: usize = 256;
/// Packets, or runs of packets of one connection, for the guest in one round.
const ROUND: usize = 32;

/// The buffer for what the guest sends, in bytes: large for the first connections, so that they are
/// fast, and smaller for more, so that all of them together stay below 80 MiB.
const LARGE_BUFFER: u32 = 256 * 1024;
const SMALL_BUFFER: u32 = 64 * 1024;
const LARGE_BUFFERS: usize = 64;

/// Ports of the host for connections that it asks for start here.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// The ends of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
}

pub(super) struct Muxer {
    guest_cid: u64,
    listener: Listener,
    watch: Watch,
    /// Whether there may be clients to accept.
    clients_wait: bool,
    clients: HashMap<u32, UnixStream>,
    next_client: u32,
    connections: HashMap<Key, Connection>,
    next_host_port: u32,
    /// Connections that may have something to say, in the order of their turns.
    turns: VecDeque<Key>,
    /// Packets that belong to no connection.
    replies: VecDeque<Header>,
    events: Vec<(Source, EventSet)>,
    counters: Arc<VsockCounters>,
}

impl Muxer {
    pub(super) fn new(
        guest_cid: u64,
        listener: Listener,
        counters: Arc<VsockCounters>,
    ) -> io::Result<Self> {
        Ok(Self {
            guest_cid,
            watch: Watch::new(listener.socket().as_raw_fd())?,
            listener,
            clients_wait: true,
            clients: HashMap::new(),
            next_client: FIRST_CLIENT,
            connections: HashMap::new(),
            next_host_port: FIRST_HOST_PORT,
            turns: VecDeque::new(),
            replies: VecDeque::new(),
            events: Vec::new(),
            counters,
        })
    }

    /// Ends all connections, of which the guest knows nothing any more.
    pub(super) fn disconnect(&mut self) {
        let count = self.connections.len() as u64;
        self.counters.connections_removed.add(count);
        self.connections.clear();
        self.turns.clear();
        self.replies.clear();
    }

    /// Goes on at any port of the host: a guest that was restored may still have sockets that it was
    /// connected with from the first ones, and refuses to be so again.
    pub(super) fn leave_ports(&mut self) {
        let any = RandomState::new().build_hasher().finish() % u64::from(FIRST_HOST_PORT);
        self.next_host_port = FIRST_HOST_PORT + u32::try_from(any).unwrap_or(0);
    }

    fn open(&self) -> usize {
        self.connections.len() + self.clients.len()
    }

    // ---- Sockets ----

    /// Takes what the sockets have to tell; whether there was anything.
    pub(super) fn poll(&mut self) -> io::Result<bool> {
        let mut events = std::mem::take(&mut self.events);
        events.clear();
        self.watch.poll(&mut events)?;
        for &(source, set) in &events {
            match source {
                Source::Listener => self.clients_wait = true,
                Source::Timer => self.end_overdue()?,
                Source::Client(number) => self.hear_client(number),
                Source::Connection(key) => self.hear_host(key, set),
            }
        }
        let any = !events.is_empty();
        self.events = events;
        Ok(self.accept() || any)
    }

    /// Accepts clients; whether there were any.
    fn accept(&mut self) -> bool {
        let mut any = false;
        for _ in 0..ROUND {
            if !self.clients_wait {
                break;
            }
            match self.listener.accept() {
                Ok(client) => {
                    any = true;
                    self.add_client(client);
                }
                // Without file descriptors it is no use until one was closed.
                Err(_) => self.clients_wait = false,
            }
        }
        any
    }

    fn add_client(&mut self, client: UnixStream) {
        let number = self.next_client;
        self.next_client = number.checked_add(1).unwrap_or(FIRST_CLIENT);
        let full = self.open() >= MAX_CONNECTIONS || self.clients.contains_key(&number);
        let source = Source::Client(number);
        if full || self.watch.add_stream(&client, source).is_err() {
            self.counters.connections_refused.add(1);
            return;
        }
        // What it has said already is an event.
        self.clients.insert(number, client);
    }

    fn hear_client(&mut self, number: u32) {
        let Some(client) = self.clients.get(&number) else {
            return;
        };
        let said = greeting(client);
        if said == Greeting::Incomplete {
            return;
        }
        let Some(client) = self.clients.remove(&number) else {
            return;
        };
        // One file fewer, unless it stays as a connection.
        self.clients_wait = true;
        let Greeting::Connect(guest_port) = said else {
            self.counters.connections_refused.add(1);
            return;
        };
        let key = self.free_key(guest_port);
        let source = Source::Connection(key);
        if self.watch.change(&client, source, false).is_ok() {
            let connection = Connection::requested(client, self.buffer());
            self.insert(key, connection);
        }
    }

    /// A connection to the guest's port that there is not yet.
    fn free_key(&mut self, guest_port: u32) -> Key {
        loop {
            let host_port = self.next_host_port;
            self.next_host_port = match host_port.checked_add(1) {
                None | Some(PORT_ANY) => FIRST_HOST_PORT,
                Some(next) => next,
            };
            let key = Key {
                host_port,
                guest_port,
            };
            // There are fewer connections than ports.
            if !self.connections.contains_key(&key) {
                return key;
            }
        }
    }

    fn buffer(&self) -> u32 {
        if self.connections.len() < LARGE_BUFFERS {
            LARGE_BUFFER
        } else {
            SMALL_BUFFER
        }
    }

    fn insert(&mut self, key: Key, connection: Connection) {
        self.connections.insert(key, connection);
        self.counters.connections_added.add(1);
        self.settle(key, Fate::Keep);
    }

    fn hear_host(&mut self, key: Key, set: EventSet) {
        let Some(connection) = self.connections.get_mut(&key) else {
            return;
        };
        let hung_up = set.intersects(EventSet::HANG_UP | EventSet::ERROR);
        if hung_up || set.contains(EventSet::IN) {
            connection.host_spoke(hung_up);
        }
        let fate = if set.contains(EventSet::OUT) {
            connection.host_has_room()
        } else {
            Fate::Keep
        };
        self.settle(key, fate);
    }

    /// Ends connections whose time is over.
    fn end_overdue(&mut self) -> io::Result<()> {
        let now = Instant::now();
        let overdue: Vec<Key> = self
            .connections
            .iter()
            .filter(|(_, connection)| connection.deadline().is_some_and(|at| at <= now))
            .map(|(key, _)| *key)
            .collect();
        for key in overdue {
            self.counters.connections_killed.add(1);
            self.settle(key, Fate::Reset);
        }
        if self.connections.values().any(|c| c.deadline().is_some()) {
            self.watch.tick()?;
        }
        Ok(())
    }

    // ---- From the guest ----

    /// Whether packets of the guest can be taken now.
    pub(super) fn can_receive(&self) -> bool {
        self.replies.len() < MAX_REPLIES
    }

    /// Takes a packet from the guest.
    pub(super) fn receive(&mut self, header: &Header, payload: &mut Payload<'_>) {
        self.counters.tx_packets.add(1);
        self.counters.tx_bytes.add(payload.len.into());
        if header.src_cid != self.guest_cid {
            // Whoever that is, it is not reached here.
            self.counters.bad_packets.add(1);
            return;
        }
        if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            self.refuse(header);
            return;
        }
        let key = Key {
            host_port: header.dst_port,
            guest_port: header.src_port,
        };
        match self.connections.get_mut(&key) {
            Some(connection) => {
                let fate = connection.receive(header, payload, key.host_port);
                self.settle(key, fate);
            }
            None if header.op == op::REQUEST => self.connect(key, header),
            None => self.refuse(header),
        }
    }

    /// Answers a packet that cannot be what it wants to be.
    fn refuse(&mut self, header: &Header) {
        if header.op == op::RST {
            return;
        }
        self.counters.bad_packets.add(1);
        self.replies.push_back(header.reset());
    }

    /// Takes a packet from the guest whose payload is not there.
    pub(super) fn receive_torn(&mut self, header: &Header) {
        if header.src_cid != self.guest_cid {
            self.counters.bad_packets.add(1);
            return;
        }
        self.remove(Key {
            host_port: header.dst_port,
            guest_port: header.src_port,
        });
        self.refuse(header);
    }

    fn connect(&mut self, key: Key, request: &Header) {
        let possible = self.open() < MAX_CONNECTIONS
            && key.guest_port != PORT_ANY
            && key.host_port != PORT_ANY;
        let path = self.listener.path_of_port(key.host_port);
        let stream = if possible {
            socket::connect(&path).and_then(|stream| {
                let source = Source::Connection(key);
                self.watch.add_stream(&stream, source)?;
                Ok(stream)
            })
        } else {
            Err(io::ErrorKind::ConnectionRefused.into())
        };
        match stream {
            Ok(stream) => {
                let connection = Connection::accepted(stream, self.buffer(), request);
                self.insert(key, connection);
            }
            Err(_) => {
                self.counters.connections_refused.add(1);
                self.replies.push_back(request.reset());
            }
        }
    }

    // ---- The table ----

    /// Draws the conclusions from whatever happened to a connection.
    fn settle(&mut self, key: Key, fate: Fate) {
        let Some(connection) = self.connections.get_mut(&key) else {
            return;
        };
        let waits = connection.waits_for_room();
        let mut fate = fate;
        if fate == Fate::Keep && waits != connection.watched_for_room {
            connection.watched_for_room = waits;
            let source = Source::Connection(key);
            if self
                .watch
                .change(connection.stream(), source, waits)
                .is_err()
            {
                fate = Fate::Reset;
            }
        }
        match fate {
            Fate::Keep => {
                if !connection.listed && connection.has_something_to_say() {
                    connection.listed = true;
                    self.turns.push_back(key);
                }
                if connection.deadline().is_some() {
                    // It can only fail for a time that no timer takes.
                    let _ = self.watch.tick();
                }
            }
            Fate::Forget => self.remove(key),
            Fate::Reset => {
                let unheard = connection.is_unheard();
                self.remove(key);
                if !unheard {
                    self.replies.push_back(self.header(key, op::RST));
                }
            }
        }
    }

    fn remove(&mut self, key: Key) {
        if let Some(connection) = self.connections.remove(&key) {
            if connection.listed {
                self.turns.retain(|listed| *listed != key);
            }
            self.counters.connections_removed.add(1);
            self.clients_wait = true;
        }
    }

    fn header(&self, key: Key, op: u16) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: key.host_port,
            dst_port: key.guest_port,
            kind: TYPE_STREAM,
            op,
            ..Header::default()
        }
    }

    // ---- To the guest ----

    /// Whether there may be something for the guest.
    pub(super) fn has_something_to_say(&self) -> bool {
        !self.replies.is_empty() || !self.turns.is_empty()
    }

    /// Fills the guest's buffers with what there is to say, up to a bounded amount; whether there
    /// was anything.
    pub(super) fn fill(&mut self, rx: &mut Rx) -> Result<bool, QueueError> {
        let mut any = false;
        for _ in 0..ROUND {
            if !self.has_something_to_say() || !rx.stock(1)? {
                break;
            }
            any = true;
            if let Some(reply) = self.replies.pop_front() {
                rx.put(&reply)?;
            } else if let Some(key) = self.turns.pop_front() {
                self.give_turn(key, rx)?;
            }
        }
        Ok(any)
    }

    fn give_turn(&mut self, key: Key, rx: &mut Rx) -> Result<(), QueueError> {
        let mut header = self.header(key, op::RW);
        let Some(connection) = self.connections.get_mut(&key) else {
            return Ok(());
        };
        connection.listed = false;
        let fate = match connection.speak() {
            Speech::Silence => Fate::Keep,
            Speech::Control { op, flags } => {
                (header.op, header.flags) = (op, flags);
                connection.stamp(&mut header);
                rx.put(&header)?;
                Fate::Keep
            }
            Speech::Data { limit, packets } => {
                rx.stock(packets)?;
                let (result, room) = rx.read(connection.stream(), limit, packets);
                let count = result.as_ref().map_or(0, |count| *count);
                rx.put_data(&header, count, |header| connection.stamp(header))?;
                connection.has_read(result, room)
            }
        };
        self.settle(key, fate);
        Ok(())
    }
}

impl AsRawFd for Muxer {
    fn as_raw_fd(&self) -> RawFd {
        self.watch.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::memory::IoBuffers;
    use crate::queue::Buffers;
    use crate::testing::memory;

    /// Gives the muxer a packet without payload.
    fn receive(muxer: &mut Muxer, op: u16, port: u32) {
        let header = Header {
            src_cid: 3,
            dst_cid: HOST_CID,
            src_port: port,
            dst_port: 9,
            kind: TYPE_STREAM,
            op,
            ..Header::default()
        };
        let memory = memory();
        let mut payload = Payload {
            memory: &memory,
            buffers: &Buffers::default(),
            offset: 0,
            len: 0,
            places: &mut IoBuffers::new(memory.clone()),
        };
        muxer.receive(&header, &mut payload);
    }

    #[test]
    fn connections_that_are_gone_have_no_turn() {
        let folder = tempfile::tempdir().unwrap();
        let listener = Listener::bind(&folder.path().join("v")).unwrap();
        let host = UnixListener::bind(folder.path().join("v_9")).unwrap();
        let mut muxer = Muxer::new(3, listener, Arc::default()).unwrap();
        for port in 0..500 {
            receive(&mut muxer, op::REQUEST, port);
            host.accept().unwrap();
            assert_eq!(muxer.turns.len(), 1);
            receive(&mut muxer, op::RST, port);
            assert!(!muxer.has_something_to_say());
        }
    }

    #[test]
    fn ports_of_the_host_are_not_given_twice() {
        let folder = tempfile::tempdir().unwrap();
        let listener = Listener::bind(&folder.path().join("v")).unwrap();
        let mut muxer = Muxer::new(3, listener, Arc::default()).unwrap();
        muxer.next_host_port = PORT_ANY - 1;
        let mut ports = Vec::new();
        for _ in 0..3 {
            let key = muxer.free_key(5);
            let (stream, _) = UnixStream::pair().unwrap();
            muxer.insert(key, Connection::requested(stream, 1));
            ports.push(key.host_port);
            muxer.next_host_port = PORT_ANY - 1;
        }
        let expected = [PORT_ANY - 1, FIRST_HOST_PORT, FIRST_HOST_PORT + 1];
        assert_eq!(ports, expected);
        // Where it goes on after a restore is not where any machine begins.
        let mut begun = || {
            muxer.leave_ports();
            muxer.next_host_port
        };
        let places = [begun(), begun(), begun()];
        assert!(places.iter().all(|&port| port >= FIRST_HOST_PORT));
        assert!(places.iter().any(|&port| port != places[0]));
    }
}
