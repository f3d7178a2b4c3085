// SPDX-License-Identifier: Apache-2.0
//! `net-echo`, `net-respond` and `net-gso`: frames go out, come back, and are compared.

use crate::console::say;
use crate::net::{self, HEADER, Net};
use crate::rng::Rng;
use crate::{clock, cmdline, frame, params, pattern};

/// The host's address, `bare.peer`; everybody by default.
pub fn peer() -> [u8; 6] {
    match params::text("bare.peer") {
        None => [0xff; 6],
        Some(text) => cmdline::mac(text).expect("bare.peer is not a MAC address"),
    }
}

fn introduce(step: &str, net: &Net) {
    let [a, b, c, d, e, f] = net.mac;
    say!(
        "{step} ready mac={a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x} mtu={} features={:#x}",
        net.mtu,
        net.features
    );
}

/// Sequence numbers seen, one bit each.
struct Seen(&'static mut [u8]);

impl Seen {
    /// Marks a number; returns whether it is new.
    fn mark(&mut self, sequence: u64) -> bool {
        let (byte, bit) = ((sequence / 8) as usize, 1 << (sequence % 8));
        let new = self.0[byte] & bit == 0;
        self.0[byte] |= bit;
        new
    }
}

/// `net-echo`: sends `bare.frames` frames of all sizes, in one to four pieces, at most `bare.qd`
/// of them unanswered, and compares what the host sends back.
pub fn echo() {
    let max = params::number("bare.max", frame::MAX as u64) as usize;
    let frames = params::number("bare.frames", 1000);
    let seed = params::number("bare.seed", 1);
    let depth = params::number("bare.qd", 16);
    let timeout = clock::ms(params::number("bare.timeout_ms", clock::LONG_MS));
    let mut net = Net::open(max);
    introduce("net-echo", &net);
    let mut seen = Seen(crate::memory::take(frames.div_ceil(8) as usize, 64));
    let mut rng = Rng::new(seed);
    let (destination, source) = (peer(), net.mac);
    let (mut sent, mut good, mut bad, mut twice, mut other) = (0, 0, 0, 0, 0);
    let mut last = clock::now();
    while good + bad < frames && clock::now() - last < timeout {
        while sent < frames && sent < good + bad + depth {
            let Some(slot) = net.tx.take() else { break };
            let len = frame::length(seed, sent, max);
            let bytes = &mut net.tx.buffer(slot)[HEADER..HEADER + len];
            frame::build(bytes, destination, source, frame::DATA, sent, seed);
            if !net.tx.submit(slot, len, 1 + rng.below(4) as usize) {
                break;
            }
            sent += 1;
        }
        net.kick();
        net.tx.reap();
        net.rx.poll(|_, bytes| match frame::parse(bytes) {
            Some((frame::DATA, sequence)) if sequence < frames => {
                last = clock::now();
                let right = frame::intact(bytes, seed)
                    && bytes.len() == frame::length(seed, sequence, max)
                    && bytes[..6] == source;
                match (seen.mark(sequence), right) {
                    (false, _) => twice += 1,
                    (true, true) => good += 1,
                    (true, false) => bad += 1,
                }
            }
            _ => other += 1,
        });
    }
    let lost = sent - good - bad;
    say!(
        "net-echo sent={sent} good={good} bad={bad} lost={lost} twice={twice} other={other} \
         broken={}",
        net.rx.broken
    );
}

/// `net-respond`: sends every test frame back with its addresses exchanged, until a frame says
/// stop, `bare.frames` have come, or `bare.ms` are over.
pub fn respond() {
    let max = params::number("bare.max", frame::MAX as u64) as usize;
    let frames = params::number("bare.frames", u64::MAX);
    let limit = clock::ms(params::number("bare.ms", 60_000));
    let mut net = Net::open(max);
    introduce("net-respond", &net);
    let (mut count, mut bytes, mut dropped, mut other, mut stop) = (0, 0, 0, 0, false);
    let start = clock::now();
    while !stop && count < frames && clock::now() - start < limit {
        net.tx.reap();
        let Net {
            rx, tx, transport, ..
        } = &mut net;
        rx.poll(|_, data| match frame::parse(data) {
            Some((frame::STOP, _)) => stop = true,
            Some(_) => {
                count += 1;
                bytes += data.len();
                // A full queue is waited for, so that what is missing was lost on the way.
                if tx.is_full() {
                    tx.kick(transport);
                    clock::wait(clock::LONG_MS, || tx.reap() > 0);
                }
                let Some(slot) = tx.take() else {
                    dropped += 1;
                    return;
                };
                let to = &mut tx.buffer(slot)[HEADER..HEADER + data.len()];
                to.copy_from_slice(data);
                frame::turn_round(to);
                dropped += u64::from(!tx.submit(slot, data.len(), 1));
            }
            None => other += 1,
        });
        net.kick();
    }
    clock::wait(clock::LONG_MS, || net.tx.reap() == 0 && net.tx.is_idle());
    say!(
        "net-respond frames={count} bytes={bytes} dropped={dropped} other={other} broken={} \
         stopped={}",
        net.rx.broken,
        u8::from(stop)
    );
}

/// Where a TCP/IPv4 segment's payload begins.
const PAYLOAD: usize = 14 + 20 + 20;
const TCP: usize = 14 + 20;
const TCP_CHECKSUM: usize = 16;
const NEEDS_CSUM: u8 = 1;
const GSO_TCPV4: u8 = 1;
const MSS: u16 = 1448;

/// The ones' complement sum of 16-bit words, folded.
fn internet_sum(bytes: &[u8], start: u32) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|w| u32::from(w[0]) << 8 | w.get(1).map_or(0, |&b| b.into()));
    let mut sum = words.fold(start, |sum, word| sum + word);
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

/// Writes one TCP/IPv4 segment of `len` bytes, its checksum left to be completed by the device,
/// with the virtio header before it.
fn build_segment(to: &mut [u8], net: ([u8; 6], [u8; 6]), len: usize, sequence: u64, seed: u64) {
    let (header, frame) = to.split_at_mut(HEADER);
    header.fill(0);
    header[0] = NEEDS_CSUM;
    header[1] = if len - PAYLOAD > usize::from(MSS) {
        GSO_TCPV4
    } else {
        0
    };
    header[2..4].copy_from_slice(&(PAYLOAD as u16).to_le_bytes());
    header[4..6].copy_from_slice(&MSS.to_le_bytes());
    header[6..8].copy_from_slice(&(TCP as u16).to_le_bytes());
    header[8..10].copy_from_slice(&(TCP_CHECKSUM as u16).to_le_bytes());
    let frame = &mut frame[..len];
    frame[..6].copy_from_slice(&net.0);
    frame[6..12].copy_from_slice(&net.1);
    frame[12..14].copy_from_slice(&[8, 0]);
    let ip = &mut frame[14..TCP];
    ip.copy_from_slice(&[
        0x45, 0, 0, 0, 0, 0, 0, 0, 64, 6, 0, 0, 192, 0, 2, 2, 192, 0, 2, 1,
    ]);
    ip[2..4].copy_from_slice(&((len - 14) as u16).to_be_bytes());
    let checksum = !internet_sum(ip, 0);
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    let pseudo = internet_sum(&ip[12..20], 6 + (len - TCP) as u32);
    let tcp = &mut frame[TCP..PAYLOAD];
    tcp.copy_from_slice(&[
        0x88, 0xb5, 0x88, 0xb5, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0,
    ]);
    tcp[4..8].copy_from_slice(&(sequence as u32).to_be_bytes());
    tcp[16..18].copy_from_slice(&pseudo.to_be_bytes());
    pattern::fill(&mut frame[PAYLOAD..], seed, sequence, 0);
}

/// `net-gso`: sends `bare.frames` TCP segments of up to 60 KiB, to be cut by the device's side, and
/// compares those that the host sends back whole. TCP port 0x88b5, 192.0.2.2 to 192.0.2.1.
pub fn segments() {
    let frames = params::number("bare.frames", 100);
    let seed = params::number("bare.seed", 1);
    let mut net = Net::open(frame::MAX);
    introduce("net-gso", &net);
    let needed = net::HOST_TSO4 | net::GUEST_TSO4 | 1;
    if net.features & needed != needed {
        say!("net-gso errors=1 not-offered");
        return;
    }
    let mut rng = Rng::new(seed);
    let ends = (peer(), net.mac);
    let (mut good, mut bad, mut lost, mut other, mut largest) = (0, 0, 0, 0, 0);
    for sequence in 0..frames {
        let len = PAYLOAD + 1 + rng.below(60 * 1024) as usize;
        let slot = net.tx.take().expect("a buffer, since each is waited for");
        build_segment(net.tx.buffer(slot), ends, len, sequence, seed);
        net.tx.submit(slot, len, 1);
        let mut back = None;
        let came = clock::wait(params::number("bare.timeout_ms", clock::LONG_MS), || {
            net.kick();
            net.tx.reap();
            net.rx.poll(|_, bytes| {
                let ours = bytes.len() > PAYLOAD
                    && bytes[TCP..TCP + 2] == frame::ETHERTYPE
                    && bytes[TCP + 4..TCP + 8] == (sequence as u32).to_be_bytes();
                if ours {
                    let right = pattern::matches(&bytes[PAYLOAD..], seed, sequence, 0);
                    back = Some(right && bytes.len() == len);
                } else {
                    other += 1;
                }
            });
            back.is_some() && net.tx.is_idle()
        });
        match back {
            Some(true) if came => {
                good += 1;
                largest = largest.max(len);
            }
            Some(_) => bad += 1,
            None => lost += 1,
        }
    }
    say!(
        "net-gso sent={frames} good={good} bad={bad} lost={lost} other={other} largest={largest} \
         broken={}",
        net.rx.broken
    );
}
