// SPDX-License-Identifier: Apache-2.0
//! Whole exchanges of frames, with a second stack as the guest.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use serde_json::json;
use smoltcp::iface::SocketHandle;
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::SocketBuffer;
use smoltcp::wire::{IpEndpoint, Ipv4Address};

use super::*;
use crate::Mmds;

const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
const GUEST_MAC: EthernetAddress = EthernetAddress([6, 0, 0xac, 0x10, 0, 2]);
const GUEST: Ipv4Address = Ipv4Address::new(172, 16, 0, 2);

/// The guest's network card, without bounds.
#[derive(Default)]
struct Card {
    incoming: VecDeque<Vec<u8>>,
    outgoing: VecDeque<Vec<u8>>,
}

struct In(Vec<u8>);
struct Out<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for In {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Out<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}

impl Device for Card {
    type RxToken<'a> = In;
    type TxToken<'a> = Out<'a>;

    fn receive(&mut self, _now: StackTime) -> Option<(In, Out<'_>)> {
        Some((In(self.incoming.pop_front()?), Out(&mut self.outgoing)))
    }

    fn transmit(&mut self, _now: StackTime) -> Option<Out<'_>> {
        Some(Out(&mut self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        // As a guest's card that leaves checksums to the host, and checks what it gets.
        capabilities.checksum.tcp = Checksum::Rx;
        capabilities
    }
}

/// A guest, the service, and the time.
struct Net {
    stack: Stack,
    mmds: SharedMmds,
    card: Card,
    guest: Interface,
    sockets: SocketSet<'static>,
    now: Duration,
    next_port: u16,
    /// Whether the guest has buffers for frames.
    listens: bool,
}

impl Net {
    fn new(needs_token: bool) -> Self {
        let mmds: SharedMmds = Arc::new(Mutex::new(Mmds::default()));
        let config = StackConfig {
            address: ADDRESS,
            needs_token,
            imds_compat: false,
        };
        let mut card = Card::default();
        let mut guest = Interface::new(Config::new(GUEST_MAC.into()), &mut card, StackTime::ZERO);
        guest.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(GUEST.into(), 0)).unwrap();
        });
        Self {
            stack: Stack::new(config, mmds.clone()).unwrap(),
            mmds,
            card,
            guest,
            sockets: SocketSet::new(Vec::new()),
            now: Duration::ZERO,
            next_port: 50000,
            listens: true,
        }
    }

    /// A millisecond in the life of both.
    fn step(&mut self) {
        self.step_with(|frame| vec![frame]);
    }

    /// A step in which `wire` says what becomes of each of the guest's frames.
    fn step_with(&mut self, mut wire: impl FnMut(Vec<u8>) -> Vec<Vec<u8>>) {
        self.now += Duration::from_millis(1);
        self.guest
            .poll(stack_time(self.now), &mut self.card, &mut self.sockets);
        while let Some(frame) = self.card.outgoing.pop_front() {
            assert!(self.stack.is_addressee(&frame));
            for frame in wire(frame) {
                self.stack.receive_at(self.now, frame);
            }
        }
        self.stack.advance_at(self.now);
        while self.listens
            && let Some(frame) = self.stack.transmit()
        {
            self.card.incoming.push_back(frame);
        }
    }

    fn steps(&mut self, count: usize) {
        (0..count).for_each(|_| self.step());
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    fn connect_to(&mut self, port: u16) -> SocketHandle {
        let buffer = || SocketBuffer::new(vec![0; 0x10000]);
        let handle = self.sockets.add(Socket::new(buffer(), buffer()));
        self.next_port += 1;
        let socket: &mut Socket<'_> = self.sockets.get_mut(handle);
        let there = IpEndpoint::new(ADDRESS.into(), port);
        socket
            .connect(self.guest.context(), there, self.next_port)
            .unwrap();
        handle
    }

    fn connect(&mut self) -> SocketHandle {
        let handle = self.connect_to(80);
        for _ in 0..3000 {
            self.step();
            if self.socket(handle).state() == State::Established {
                return handle;
            }
        }
        panic!("no connection");
    }

    /// What arrives until nothing has for a while.
    fn read(&mut self, handle: SocketHandle) -> String {
        let (mut data, mut quiet) = (Vec::new(), 0);
        while quiet < 100 {
            self.step();
            quiet += 1;
            let mut part = [0; 0x10000];
            if let Ok(len @ 1..) = self.socket(handle).recv_slice(&mut part) {
                data.extend(&part[..len]);
                quiet = 0;
            }
        }
        String::from_utf8(data).unwrap()
    }

    fn write(&mut self, handle: SocketHandle, text: &str) {
        let sent = self.socket(handle).send_slice(text.as_bytes()).unwrap();
        assert_eq!(sent, text.len());
    }

    fn ask(&mut self, handle: SocketHandle, request: &str) -> (String, String) {
        self.write(handle, request);
        let answer = self.read(handle);
        let (head, body) = answer.split_once("\r\n\r\n").expect(&answer);
        (head.to_owned(), body.to_owned())
    }

    fn put(&self, data: serde_json::Value) {
        self.mmds.lock().unwrap().put(data).unwrap();
    }

    fn connections(&self) -> usize {
        self.stack.connections.len()
    }
}

#[test]
fn a_guest_gets_a_token_and_the_data() {
    let mut net = Net::new(true);
    net.put(json!({"latest": {"meta-data": {"ami-id": "ami-1"}}}));
    let connection = net.connect();
    let put = "PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n\r\n";
    let (head, token) = net.ask(connection, put);
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    // The connection is kept, and another one does as well.
    for connection in [connection, net.connect()] {
        let get = format!("GET /latest/meta-data/ami-id HTTP/1.1\r\nX-metadata-token: {token}\r\n");
        let (head, body) = net.ask(connection, &format!("{get}\r\n"));
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        assert_eq!(body, "ami-1");
    }
    let (head, _) = net.ask(connection, "GET / HTTP/1.1\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 401"), "{head}");
}

#[test]
fn an_answer_of_many_frames_arrives_whole() {
    let mut net = Net::new(false);
    let text = "0123456789".repeat(5000);
    net.put(json!({"big": text}));
    let connection = net.connect();
    for _ in 0..3 {
        let (head, body) = net.ask(connection, "GET /big HTTP/1.1\r\n\r\n");
        assert!(head.contains("Content-Length: 50000"), "{head}");
        assert!(body == text, "{} bytes", body.len());
    }
}

#[test]
fn a_request_in_pieces_and_requests_in_one_piece_are_answered() {
    let mut net = Net::new(false);
    net.put(json!({"a": "x", "b": "y"}));
    let connection = net.connect();
    for piece in "GET /a HTTP/1.1\r\nHost: h\r\n\r".split_inclusive(' ') {
        net.write(connection, piece);
        assert_eq!(net.read(connection), "");
    }
    let (_, body) = net.ask(connection, "\n");
    assert_eq!(body, "x");
    // More of them than the service has room for, so that its buffer goes round.
    let many = "GET /a HTTP/1.1\r\n\r\nGET /b HTTP/1.1\r\n\r\n".repeat(300);
    net.write(connection, &many);
    let answers = net.read(connection);
    assert_eq!(answers.matches("\r\n\r\nx").count(), 300);
    assert_eq!(answers.matches("\r\n\r\ny").count(), 300);
}

#[test]
fn connections_end_as_the_guest_asks() {
    let mut net = Net::new(false);
    net.put(json!({"a": "x"}));
    let by_service = net.connect();
    let (head, body) = net.ask(by_service, "GET /a HTTP/1.0\r\n\r\n");
    assert!(head.starts_with("HTTP/1.0 200"), "{head}");
    assert!(head.contains("Connection: close"), "{head}");
    assert_eq!(body, "x");
    assert_eq!(net.socket(by_service).state(), State::CloseWait);

    // The guest has said all it will say, and still wants its answer.
    let by_guest = net.connect();
    net.write(by_guest, "GET /a HTTP/1.1\r\n\r\n");
    net.socket(by_guest).close();
    assert!(net.read(by_guest).ends_with("\r\n\r\nx"));

    let in_the_middle = net.connect();
    net.write(in_the_middle, "GET /a HT");
    net.socket(in_the_middle).close();
    assert_eq!(net.read(in_the_middle), "");
    net.socket(by_service).close();
    net.steps(11_000);
    assert_eq!(net.connections(), 1, "only the one that listens");
}

#[test]
fn what_is_no_request_is_refused_and_ends_the_connection() {
    let mut net = Net::new(false);
    for nonsense in [
        "\0\0\r\n\r\n".to_owned(),
        "PUT / HTTP/1.1\r\nContent-Length: 100\r\n\r\nsome body".to_owned(),
        format!("GET /{} HTTP/1.1\r\n", "x".repeat(20_000)),
    ] {
        let connection = net.connect();
        let (head, body) = net.ask(connection, &nonsense);
        assert!(head.starts_with("HTTP/1.1 400"), "{head}");
        assert_eq!(body, "Invalid request.");
        net.steps(10);
        assert!(!net.socket(connection).may_recv());
    }
}

#[test]
fn other_ports_are_closed() {
    let mut net = Net::new(false);
    net.connect();
    let refused = net.connect_to(81);
    net.steps(20);
    assert_eq!(net.socket(refused).state(), State::Closed);
}

#[test]
fn a_quiet_connection_is_given_up() {
    let mut net = Net::new(false);
    let quiet = net.connect();
    net.write(quiet, "GET / HT");
    net.steps(29_000);
    assert_eq!(net.socket(quiet).state(), State::Established);
    // It is not the guest that has to ask for it: the time comes with nothing arriving.
    let due = net.stack.due.expect("a deadline");
    assert!(due > net.now && due < Duration::from_secs(31));
    net.now = due;
    net.steps(10);
    assert_eq!(net.socket(quiet).state(), State::Closed);
    assert_eq!((net.connections(), net.stack.due), (1, None));
}

#[test]
fn a_connection_after_one_that_was_taken_back_has_its_own_time() {
    let mut net = Net::new(false);
    net.put(json!({"a": "x"}));
    net.stack
        .receive_at(net.now, segment(2, 999, 0, 0xffff, b""));
    net.stack
        .receive_at(net.now, segment(4, 1000, 0, 0xffff, b""));
    assert!(net.stack.connections.iter().all(|one| one.since.is_none()));
    net.now += Duration::from_secs(40);
    let connection = net.connect();
    let (_, body) = net.ask(connection, "GET /a HTTP/1.1\r\n\r\n");
    assert_eq!(body, "x");
}

#[test]
fn new_connections_take_the_place_of_quiet_ones() {
    let mut net = Net::new(false);
    net.put(json!({"a": "x"}));
    let connections: Vec<_> = (0..100).map(|_| net.connect()).collect();
    assert_eq!(net.connections(), MAX_CONNECTIONS);
    let (_, body) = net.ask(connections[99], "GET /a HTTP/1.1\r\n\r\n");
    assert_eq!(body, "x");
    assert_eq!(net.socket(connections[0]).state(), State::Closed);
    assert_eq!(net.socket(connections[80]).state(), State::Established);
}

#[test]
fn a_guest_that_takes_no_frames_costs_no_time_and_loses_nothing() {
    let mut net = Net::new(false);
    net.put(json!({"big": "x".repeat(50_000)}));
    let connections = [(); 20].map(|()| net.connect());
    net.listens = false;
    for connection in connections {
        net.write(connection, "GET /big HTTP/1.1\r\n\r\n");
    }
    net.steps(200);
    let waiting = net.stack.port.is_starved();
    assert!(
        waiting && net.stack.due().is_none(),
        "{:?}",
        net.stack.due()
    );
    // Room for one frame, and there is something to do without the guest saying anything.
    net.card.incoming.extend(net.stack.transmit());
    assert_eq!(net.stack.due(), Some(Duration::ZERO));
    net.listens = true;
    for connection in connections {
        assert!(net.read(connection).ends_with("xxx"));
    }
}

#[test]
fn the_gateway_is_a_way_to_the_service_too() {
    let mut net = Net::new(false);
    let arp_comes_first = net.connect();
    net.socket(arp_comes_first).abort();
    // The guest never asked for the address, and does not answer when asked for its own.
    let mut frames = Vec::new();
    let handle = net.connect_to(80);
    for _ in 0..50 {
        net.now += Duration::from_millis(1);
        net.guest
            .poll(stack_time(net.now), &mut net.card, &mut net.sockets);
        while let Some(mut frame) = net.card.outgoing.pop_front() {
            if field(&frame, ETHERTYPE) == Some([8, 0]) {
                frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
                net.stack.interface = Stack::new(CONFIG, net.mmds.clone()).unwrap().interface;
                net.stack.receive_at(net.now, frame);
            }
        }
        while let Some(frame) = net.stack.transmit() {
            frames.push(frame.clone());
            net.card.incoming.push_back(frame);
        }
    }
    assert_eq!(net.socket(handle).state(), State::Established);
    assert!(frames.iter().all(|frame| frame[..6] == GUEST_MAC.0));
}

const CONFIG: StackConfig = StackConfig {
    address: ADDRESS,
    needs_token: false,
    imds_compat: false,
};

#[test]
fn frames_for_others_are_left_alone() {
    let stack = Net::new(false).stack;
    let mut packet = vec![0; 60];
    packet[12..14].copy_from_slice(&[8, 0]);
    packet[30..34].copy_from_slice(&ADDRESS.octets());
    assert!(stack.is_addressee(&packet));
    for at in [12, 13, 30, 31, 32, 33] {
        let mut other = packet.clone();
        other[at] ^= 1;
        assert!(!stack.is_addressee(&other), "byte {at}");
    }
    let mut arp = vec![0; 42];
    arp[12..14].copy_from_slice(&[8, 6]);
    arp[38..42].copy_from_slice(&ADDRESS.octets());
    assert!(stack.is_addressee(&arp));
    assert!(!stack.is_addressee(&arp[..41]));
    assert!(!stack.is_addressee(&[]));
}

/// A segment from port 40000, with the options of a SYN if it is one.
fn segment(flags: u8, sequence: u32, acknowledged: u32, window: u16, data: &[u8]) -> Vec<u8> {
    let options: &[u8] = if flags & 2 != 0 {
        &[2, 4, 2, 0, 3, 3, 7, 4, 2, 0, 0, 0]
    } else {
        &[]
    };
    let len = u16::try_from(40 + options.len() + data.len()).unwrap();
    let header_len = u8::try_from(20 + options.len()).unwrap() << 2;
    let mut frame = [MAC.0, GUEST_MAC.0].concat();
    frame.extend([8, 0, 0x45, 0]);
    frame.extend(len.to_be_bytes());
    frame.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
    frame.extend(GUEST.octets());
    frame.extend(ADDRESS.octets());
    frame.extend([0x9c, 0x40, 0, 80]);
    frame.extend(sequence.to_be_bytes());
    frame.extend(acknowledged.to_be_bytes());
    frame.extend([header_len, flags]);
    frame.extend(window.to_be_bytes());
    frame.extend([0; 4]);
    frame.extend(options);
    frame.extend(data);
    frame
}

/// The frames of a connection and a request.
fn recorded() -> Vec<Vec<u8>> {
    let mut net = Net::new(false);
    let mut frames = Vec::new();
    let handle = net.connect_to(80);
    for step in 0..50 {
        if step == 20 {
            net.write(handle, "GET / HTTP/1.1\r\n\r\n");
        }
        net.now += Duration::from_millis(1);
        net.guest
            .poll(stack_time(net.now), &mut net.card, &mut net.sockets);
        while let Some(frame) = net.card.outgoing.pop_front() {
            frames.push(frame.clone());
            net.stack.receive_at(net.now, frame);
        }
        while let Some(frame) = net.stack.transmit() {
            net.card.incoming.push_back(frame);
        }
    }
    frames
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Broken frames, in any order and number, neither panic nor make anything grow, and others
    /// are served afterwards.
    #[test]
    fn hostile_frames_do_no_harm(
        edits in prop::collection::vec(
            (any::<prop::sample::Index>(), 14..80usize, any::<u8>(), 0..1600usize),
            1..400,
        )
    ) {
        let frames = recorded();
        let mut net = Net::new(false);
        net.put(json!({"a": "x"}));
        for (which, at, value, len) in edits {
            let mut frame = which.get(&frames).clone();
            if let Some(byte) = frame.get_mut(at) {
                *byte = value;
            }
            if len > 100 {
                frame.resize(len, value);
            } else if len > 42 {
                frame.truncate(len);
            }
            net.now += Duration::from_micros(300);
            net.stack.receive_at(net.now, frame);
            prop_assert!(net.connections() <= MAX_CONNECTIONS + 1);
            net.stack.transmit();
        }
        while net.stack.transmit().is_some() {}
        // Not the port of a connection that was half made.
        net.next_port = 60_000;
        let connection = net.connect();
        let (_, body) = net.ask(connection, "GET /a HTTP/1.1\r\n\r\n");
        prop_assert_eq!(body, "x");
    }

    /// A guest that knows its connection's numbers and does with them what it likes.
    #[test]
    fn hostile_segments_do_no_harm(
        segments in prop::collection::vec(
            (
                prop::sample::select(vec![2, 0x10, 0x10, 0x18, 0x18, 0x11, 0x14, 4, 0x12, 0x38, 0]),
                prop_oneof![Just(0), -3..3i32, -9000..9000, any::<i32>()],
                prop_oneof![Just(0), -3..3i32, -9000..9000, any::<i32>()],
                any::<u16>(),
                prop_oneof![Just(0), 0..4usize, 0..8000usize],
                prop_oneof![Just(0), 0..3u64, 0..40_000u64],
                any::<bool>(),
            ),
            1..60,
        )
    ) {
        let mut net = Net::new(false);
        net.put(json!({"a": "x".repeat(20_000)}));
        let (mut sequence, mut acknowledged) = (1000u32, 0u32);
        net.stack.receive_at(net.now, segment(2, 999, 0, 0xffff, b""));
        for (flags, ahead, behind, window, len, wait, takes) in segments {
            while takes && let Some(frame) = net.stack.transmit() {
                let number = u32::from_be_bytes(field(&frame, 38).unwrap());
                // What a SYN, a FIN or data count.
                let data = u32::from(u16::from_be_bytes(field(&frame, 16).unwrap())) - 20;
                let header = u32::from(frame[46] >> 4) * 4;
                let one = u32::from(frame[47] & 3 != 0);
                acknowledged = number.wrapping_add(data - header + one);
            }
            let mut data = b"GET /a HTTP/1.1\r\n\r\n".repeat(len / 19 + 1);
            data.truncate(len);
            let numbers = (
                sequence.wrapping_add_signed(ahead),
                acknowledged.wrapping_add_signed(behind),
            );
            net.now += Duration::from_millis(wait);
            net.stack.advance_at(net.now);
            net.stack.receive_at(net.now, segment(flags, numbers.0, numbers.1, window, &data));
            if ahead == 0 {
                sequence = sequence.wrapping_add(u32::try_from(len).unwrap());
            }
            prop_assert!(net.connections() <= MAX_CONNECTIONS + 1);
            prop_assert!(net.stack.due.is_none_or(|due| due > net.now));
        }
        while net.stack.transmit().is_some() {}
        let connection = net.connect();
        let (_, body) = net.ask(connection, "GET /a HTTP/1.1\r\n\r\n");
        prop_assert_eq!(body.len(), 20_000);
    }

    /// A guest whose frames go astray in the middle of good conversations: what it sends is in the
    /// service's windows, and so gets further.
    #[test]
    fn broken_conversations_do_no_harm(
        edits in prop::collection::vec(
            prop::option::weighted(0.4, (34..60usize, any::<u8>(), 0..4u8)),
            1..100,
        )
    ) {
        let mut net = Net::new(false);
        net.put(json!({"a": "x", "big": "y".repeat(30_000)}));
        let mut edits = edits.iter().cycle();
        for round in 0..6 {
            let handle = net.connect_to(80);
            for step in 0..60 {
                if step % 20 == 10 && net.socket(handle).may_send() {
                    let text = "GET /big HTTP/1.1\r\n\r\nGET /a HTTP/1.1\r\n\r\n";
                    let _ = net.socket(handle).send_slice(text.as_bytes());
                }
                if step == 50 && round % 2 == 0 {
                    net.socket(handle).close();
                }
                net.step_with(|frame| {
                    let Some(Some((at, value, kind))) = edits.next() else {
                        return vec![frame];
                    };
                    let mut broken = frame.clone();
                    if let Some(byte) = broken.get_mut(*at) {
                        *byte ^= value;
                    }
                    match kind {
                        0 => vec![broken],
                        1 => vec![frame, broken],
                        2 => vec![broken.clone(), frame, broken],
                        _ => Vec::new(),
                    }
                });
                prop_assert!(net.connections() <= MAX_CONNECTIONS + 1);
                // Whatever there is to wait for, it is not a busy wait.
                let due = net.stack.due;
                prop_assert!(due.is_none_or(|due| due > net.now));
            }
        }
        net.next_port = 60_000;
        let connection = net.connect();
        let (_, body) = net.ask(connection, "GET /a HTTP/1.1\r\n\r\n");
        prop_assert_eq!(body, "x");
    }
}

#[test]
fn a_flood_of_connections_is_bounded() {
    let mut net = Net::new(false);
    net.put(json!({"a": "x"}));
    let syn = recorded()
        .into_iter()
        .find(|frame| frame.get(47).is_some_and(|flags| flags & 2 != 0))
        .unwrap();
    for number in 0..20_000u16 {
        let mut frame = syn.clone();
        frame[34..36].copy_from_slice(&number.to_be_bytes());
        // Another guest address each time, which nobody will answer for.
        frame[28..30].copy_from_slice(&number.to_le_bytes());
        net.now += Duration::from_micros(10);
        net.stack.receive_at(net.now, frame);
        assert!(net.connections() <= MAX_CONNECTIONS + 1);
    }
    while net.stack.transmit().is_some() {}
    let connection = net.connect();
    let (_, body) = net.ask(connection, "GET /a HTTP/1.1\r\n\r\n");
    assert_eq!(body, "x");
}

#[test]
fn a_frame_that_is_too_large_is_dropped() {
    let mut net = Net::new(false);
    let mut frame = vec![0; MAX_FRAME + 1];
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[30..34].copy_from_slice(&ADDRESS.octets());
    net.stack.receive(frame);
    assert!(!net.stack.has_frames());
    assert!(!net.stack.advance());
}
