// SPDX-License-Identifier: Apache-2.0
//! Seen from a third place on the network: a train of pings, and what a machine says of where it
//! is.
//!
//! Frames are made here, so that a train knows the moment of each.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::frame;
use crate::host::FrameSocket;
use crate::netns::NetNs;

const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const RARP: u16 = 0x8035;
const ICMP: u8 = 1;
const ECHO: u8 = 8;
const ECHO_REPLY: u8 = 0;
/// Marks the pings of all trains.
const IDENTIFIER: [u8; 2] = [0xb7, 0x3e];
/// How long the last of a train may take. On a busy host an emulated guest takes seconds now and
/// then; only what it never answers is lost.
const LATE: Duration = Duration::from_secs(10);
/// How long after the answer to a ping one to an earlier ping may come: a guest answers in turn.
const BEHIND: Duration = Duration::from_millis(500);
/// How long announcements may take to be enough.
const SETTLED: Duration = Duration::from_secs(30);
/// Ethernet header, IPv4 header, echo request with 8 bytes.
const LENGTH: usize = 14 + 20 + 16;

/// What is sent, and answered.
#[derive(Clone, Copy, Debug)]
pub enum Probe {
    /// ICMP echo requests: the MAC addresses of who is pinged and who pings, and their IPv4
    /// addresses.
    Echo([[u8; 6]; 2], [Ipv4Addr; 2]),
    /// Test frames, which the bare guest's step `net-respond` sends back: their MAC addresses.
    Frame([[u8; 6]; 2]),
}

impl Probe {
    fn ethertype(self) -> u16 {
        match self {
            Self::Echo(..) => IPV4,
            Self::Frame(_) => u16::from_be_bytes(frame::ETHERTYPE),
        }
    }

    fn request(self, number: u16) -> Vec<u8> {
        match self {
            Self::Echo(macs, addresses) => echo_request(macs, addresses, number),
            Self::Frame([to, from]) => {
                let mut bytes = vec![0; frame::MIN];
                frame::build(&mut bytes, to, from, frame::DATA, number.into(), 0);
                bytes
            }
        }
    }

    /// The number of the ping that `bytes` answers.
    fn reply(self, bytes: &[u8]) -> Option<u16> {
        match self {
            Self::Echo(_, [from, _]) => echo_reply(from, bytes),
            Self::Frame([from, _]) => {
                let (_, number) = frame::parse(bytes)?;
                let is_answer = bytes.get(6..12)? == from && frame::intact(bytes, 0);
                is_answer
                    .then_some(number)
                    .and_then(|number| u16::try_from(number).ok())
            }
        }
    }
}

/// One ping.
#[derive(Clone, Copy, Debug)]
pub struct Ping {
    /// When it left.
    pub sent: Instant,
    /// When the answer came, if one did.
    pub answered: Option<Instant>,
}

impl Ping {
    /// How long the answer took, if one came.
    pub fn time(&self) -> Option<Duration> {
        Some(self.answered?.saturating_duration_since(self.sent))
    }
}

/// A train of pings, until it is asked how it went.
pub struct Train {
    stop: Arc<AtomicBool>,
    /// How many were sent, once no more are.
    count: Arc<OnceLock<usize>>,
    sender: JoinHandle<Vec<Instant>>,
    receiver: JoinHandle<BTreeMap<u16, Instant>>,
}

impl Train {
    /// Pings by the interface `name` in `network`, one every `interval`.
    ///
    /// # Panics
    ///
    /// There is no such interface, or it is not allowed.
    pub fn start(network: &NetNs, name: &str, probe: Probe, interval: Duration) -> Self {
        let socket = Arc::new(open(network, name, probe.ethertype()));
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, out) = (stop.clone(), socket.clone());
        let sender = thread::spawn(move || send(&out, probe, interval, &stopped));
        let count = Arc::new(OnceLock::new());
        let expected = count.clone();
        let receiver = thread::spawn(move || receive(&socket, probe, &expected));
        Self {
            stop,
            count,
            sender,
            receiver,
        }
    }

    /// Sends no more, and waits for what may still come; how it went with each.
    ///
    /// # Panics
    ///
    /// A thread has.
    pub fn end(self) -> Vec<Ping> {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.sender.join().expect("the sender");
        self.count.get_or_init(|| sent.len());
        let answers = self.receiver.join().expect("the receiver");
        let pings = sent.into_iter().zip(0..);
        let pings = pings.map(|(sent, number)| Ping {
            sent,
            answered: answers.get(&number).copied(),
        });
        pings.collect()
    }
}

fn send(socket: &FrameSocket, probe: Probe, interval: Duration, stop: &AtomicBool) -> Vec<Instant> {
    let mut times = Vec::new();
    let begin = Instant::now();
    for number in 0..u16::MAX {
        let due = begin + interval * u32::from(number);
        thread::sleep(due.saturating_duration_since(Instant::now()));
        if stop.load(Ordering::Relaxed) {
            break;
        }
        times.push(Instant::now());
        // What the host does not take is lost as well.
        socket.send(&probe.request(number));
    }
    times
}

/// When the first answer to each ping came: until all of them have one, or it is too late for those
/// that have none.
fn receive(socket: &FrameSocket, probe: Probe, count: &OnceLock<usize>) -> BTreeMap<u16, Instant> {
    let mut answers = BTreeMap::new();
    let mut bytes = [0; 128];
    let mut end = None;
    loop {
        if let Some(&count) = count.get() {
            let end = *end.get_or_insert_with(|| Instant::now() + LATE);
            let last = count
                .checked_sub(1)
                .and_then(|last| u16::try_from(last).ok());
            let last = last.and_then(|last| answers.get(&last));
            let passed = last.is_some_and(|last: &Instant| last.elapsed() > BEHIND);
            if answers.len() >= count || passed || Instant::now() > end {
                return answers;
            }
        }
        let Some(length) = socket.receive(&mut bytes) else {
            continue;
        };
        let at = Instant::now();
        let frame = bytes.get(..length).unwrap_or_default();
        if let Some(number) = probe.reply(frame) {
            answers.entry(number).or_insert(at);
        }
    }
}

/// A frame with the echo request `number`.
fn echo_request(macs: [[u8; 6]; 2], [to, from]: [Ipv4Addr; 2], number: u16) -> Vec<u8> {
    let mut echo = vec![ECHO, 0, 0, 0];
    echo.extend(IDENTIFIER);
    echo.extend(number.to_be_bytes());
    echo.extend([0; 8]);
    seal(&mut echo, 2);
    let length = 20 + u16::try_from(echo.len()).expect("it is short");
    let mut header = vec![0x45, 0];
    header.extend(length.to_be_bytes());
    // No identification, no fragments, a time to live, ICMP, room for the sum.
    header.extend([0, 0, 0x40, 0, 64, ICMP, 0, 0]);
    header.extend(from.octets());
    header.extend(to.octets());
    seal(&mut header, 10);
    let mut frame = macs.concat();
    frame.extend(IPV4.to_be_bytes());
    frame.extend(header);
    frame.extend(echo);
    frame
}

/// Puts the Internet checksum of `bytes` (RFC 1071) at `at`, where they are zero.
fn seal(bytes: &mut [u8], at: usize) {
    let words = bytes.as_chunks::<2>().0.iter();
    let sum: u32 = words.map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = u16::try_from((folded & 0xffff) + (folded >> 16)).expect("16 bits");
    if let Some(place) = bytes.get_mut(at..at + 2) {
        place.copy_from_slice(&(!folded).to_be_bytes());
    }
}

/// The number of the echo reply in `frame`, if it is one of `from`.
fn echo_reply(from: Ipv4Addr, frame: &[u8]) -> Option<u16> {
    let frame: &[u8; LENGTH] = frame.first_chunk()?;
    let is_from = frame.get(26..30)? == from.octets();
    let is_reply = frame.get(23) == Some(&ICMP) && frame.get(34) == Some(&ECHO_REPLY);
    let ours = frame.get(38..40)? == IDENTIFIER;
    let number = frame.get(40..42)?.first_chunk()?;
    (is_from && is_reply && ours).then(|| u16::from_be_bytes(*number))
}

/// Trains of pings of which no more should be lost than were sent while the machine stood still, and
/// one. Others may have the host's processors for a moment: of three trains one may lose more than it
/// should, and no more than in another second.
#[derive(Debug, Default)]
pub struct Losses {
    trains: usize,
    late: usize,
}

/// How long a machine may be silent for want of a processor.
const NO_PROCESSOR: Duration = Duration::from_secs(1);

impl Losses {
    /// Notes a train with `interval`, during which the machine stood still for `downtime`; how many
    /// were lost.
    ///
    /// # Panics
    ///
    /// Far more than may be were lost.
    #[track_caller]
    pub fn note(&mut self, pings: &[Ping], interval: Duration, downtime: Duration) -> usize {
        let begun = pings.first().map(|ping| ping.sent);
        let lost = pings.iter().filter(|ping| ping.answered.is_none());
        let when: Vec<_> = lost.filter_map(|ping| Some(ping.sent - begun?)).collect();
        let in_time = |time: Duration| time.as_micros().div_ceil(interval.as_micros()) + 1;
        let (allowed, most) = (in_time(downtime), in_time(downtime + NO_PROCESSOR));
        self.trains += 1;
        self.late += usize::from(when.len() as u128 > allowed);
        assert!(
            when.len() as u128 <= most,
            "{downtime:?} stood still; of {} pings each {interval:?} these were lost: {when:?}",
            pings.len()
        );
        when.len()
    }

    /// Checks that it was few trains that lost more than they should.
    ///
    /// # Panics
    ///
    /// It was not.
    #[track_caller]
    pub fn assert_few(&self) {
        let Self { trains, late } = self;
        assert!(*late <= trains / 3, "{late} of {trains} have lost too much");
    }
}

/// What a machine says of where it is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Announcements {
    /// RARP requests in its own name.
    pub rarp: usize,
    /// ARP requests of its own address by itself.
    pub arp: usize,
}

impl Announcements {
    /// Whether there are as many as in `enough`, or more.
    pub fn has(self, enough: Self) -> bool {
        self.rarp >= enough.rarp && self.arp >= enough.arp
    }
}

/// Whoever hears what the machine with one MAC address announces.
pub struct Listener {
    stop: Arc<AtomicBool>,
    /// How many of each kind.
    heard: [Arc<AtomicUsize>; 2],
    ears: [JoinHandle<()>; 2],
}

impl Listener {
    /// Listens to `mac` on the interface `name` in `network`.
    ///
    /// # Panics
    ///
    /// There is no such interface, or it is not allowed.
    pub fn start(network: &NetNs, name: &str, mac: [u8; 6]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let heard = <[Arc<AtomicUsize>; 2]>::default();
        let ear = |kind, heard: &Arc<AtomicUsize>| {
            let socket = open(network, name, kind);
            let (stop, heard) = (stop.clone(), heard.clone());
            thread::spawn(move || hear(&socket, mac, &stop, &heard))
        };
        let ears = [ear(RARP, &heard[0]), ear(ARP, &heard[1])];
        Self { stop, heard, ears }
    }

    /// What there was until each kind had `enough`, or it was too late; it hears no more.
    ///
    /// # Panics
    ///
    /// A thread has.
    pub fn end(self, enough: Announcements) -> Announcements {
        let end = Instant::now() + SETTLED;
        let [rarp, arp] = &self.heard;
        let heard = || Announcements {
            rarp: rarp.load(Ordering::Relaxed),
            arp: arp.load(Ordering::Relaxed),
        };
        while !heard().has(enough) && Instant::now() < end {
            thread::sleep(Duration::from_millis(10));
        }
        self.stop.store(true, Ordering::Relaxed);
        for ear in self.ears {
            ear.join().expect("an ear");
        }
        heard()
    }
}

/// Counts announcements: senders that ask for themselves, by their protocol address. A RARP
/// request has none.
fn hear(socket: &FrameSocket, mac: [u8; 6], stop: &AtomicBool, count: &AtomicUsize) {
    let mut bytes = [0; 128];
    while !stop.load(Ordering::Relaxed) {
        let Some(length) = socket.receive(&mut bytes) else {
            continue;
        };
        let frame = bytes.get(..length).unwrap_or_default();
        let from = frame.get(6..12) == Some(&mac) && frame.get(22..28) == Some(&mac);
        let of_itself = frame.len() >= 42 && frame.get(28..32) == frame.get(38..42);
        count.fetch_add(usize::from(from && of_itself), Ordering::Relaxed);
    }
}

/// A socket in `network`.
fn open(network: &NetNs, name: &str, kind: u16) -> FrameSocket {
    network.within(|| FrameSocket::open_for(name, kind).expect("a socket"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACS: [[u8; 6]; 2] = [[2; 6], [4; 6]];
    const ADDRESSES: [Ipv4Addr; 2] = [Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2)];

    #[test]
    fn a_request_turned_round_is_a_reply() {
        let probe = Probe::Echo(MACS, ADDRESSES);
        let mut frame = probe.request(513);
        assert_eq!(frame.len(), LENGTH);
        assert_eq!(probe.reply(&frame), None);
        frame[34] = ECHO_REPLY;
        frame[26..34].rotate_left(4);
        assert_eq!(probe.reply(&frame), Some(513));
        assert_eq!(probe.reply(&frame[..LENGTH - 1]), None);
    }

    #[test]
    fn a_frame_turned_round_is_a_reply() {
        let probe = Probe::Frame(MACS);
        let mut frame = probe.request(513);
        assert_eq!(probe.reply(&frame), None);
        frame::turn_round(&mut frame);
        assert_eq!(probe.reply(&frame), Some(513));
    }

    #[test]
    fn sums_are_right() {
        let frame = echo_request(MACS, ADDRESSES, 7);
        for part in [&frame[14..34], &frame[34..]] {
            let mut copy = part.to_vec();
            copy.extend([0, 0]);
            let end = copy.len() - 2;
            seal(&mut copy, end);
            assert_eq!(copy[end..], [0, 0]);
        }
    }
}
