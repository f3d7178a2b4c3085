// SPDX-License-Identifier: Apache-2.0
//! A device that goes on from a state that was saved in the middle of its work.

use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::time::Duration;

use brume_mmds::{SharedMmds, Stack, StackConfig};
use serde_json::json;

use super::device::config;
use super::metadata::{ACK, PUSH_ACK, SERVICE, SYN, flags, segment, sequence};
use super::{HEADER, frame};
use crate::limiter::{BucketLimits, BucketUpdate, LimiterUpdate};
use crate::net::features::MRG_RXBUF;
use crate::net::{Net, NetConfig, Tap};
use crate::testing::machine::{FREE, Machine};
use crate::testing::{readable, writable};

const RST: u8 = 4;
const TX: u64 = FREE + 0x10_0000;

fn add_rx(machine: &mut Machine, slots: std::ops::Range<u64>) {
    for slot in slots {
        machine.drivers[0].add(&[writable(FREE + 2048 * slot, 2048)]);
    }
    machine.drivers[0].kick();
}

fn add_tx(machine: &mut Machine, slot: u64, frame: &[u8]) {
    let address = TX + 2048 * slot;
    machine.put(address, frame);
    machine.drivers[1].add(&[readable(address, frame.len() as u32)]);
    machine.drivers[1].kick();
}

fn received(machine: &Machine, slot: u64, len: usize) -> Vec<u8> {
    machine.get(FREE + 2048 * slot + HEADER as u64, len - HEADER)
}

#[test]
fn half_filled_rings_go_on_where_they_were() {
    for accepted in [0, MRG_RXBUF, u64::MAX] {
        let two_ops = LimiterUpdate {
            ops: BucketUpdate::Set(BucketLimits {
                size: 2,
                refill_time: Duration::from_secs(3600),
                one_time_burst: 0,
            }),
            ..LimiterUpdate::default()
        };
        let config = NetConfig {
            tx_limits: two_ops,
            ..config()
        };
        let (tap, mut wire) = Tap::mock();
        let net = Net::new(config.clone(), tap).unwrap();
        let mut machine = Machine::new(Box::new(net), accepted);
        add_rx(&mut machine, 0..8);
        for seed in 0..3 {
            wire.write_all(&frame(100 + usize::from(seed), seed))
                .unwrap();
        }
        machine.wait_used(0, 3);
        for slot in 0..5 {
            add_tx(&mut machine, slot, &frame(200, slot as u8));
        }
        let mut data = [0; 2048];
        for seed in 0..2 {
            assert_eq!(wire.read(&mut data).unwrap(), 200);
            assert_eq!(data[HEADER..200], frame(200, seed)[HEADER..]);
        }

        let (tap, mut wire) = Tap::mock();
        let net = Net::new(config, tap).unwrap();
        let control = net.control();
        let mut machine = machine.reborn(|| Box::new(net));
        for seed in 3..8 {
            wire.write_all(&frame(100 + usize::from(seed), seed))
                .unwrap();
        }
        machine.wait_used(0, 8);
        assert_eq!(machine.heads(0), [0, 1, 2, 3, 4, 5, 6, 7]);
        for seed in 0..8 {
            let whole = frame(100 + usize::from(seed), seed);
            let bytes = received(&machine, seed.into(), whole.len());
            assert_eq!(bytes, whole[HEADER..], "frame {seed}");
        }
        machine.stays_used(1, 2);
        let unlimited = LimiterUpdate {
            ops: BucketUpdate::Remove,
            ..LimiterUpdate::default()
        };
        control.limit(LimiterUpdate::default(), unlimited);
        for seed in 2..5 {
            assert_eq!(wire.read(&mut data).unwrap(), 200);
            assert_eq!(data[HEADER..200], frame(200, seed)[HEADER..]);
        }
        machine.stays_used(1, 5);
    }
}

/// A device with a service that wants tokens, as a process of its own would make it.
fn with_service() -> (Box<Net>, std::os::unix::net::UnixStream) {
    let mmds = SharedMmds::default();
    mmds.lock().unwrap().put(json!({"secret": "x"})).unwrap();
    let settings = StackConfig {
        address: Ipv4Addr::from(SERVICE),
        needs_token: true,
        imds_compat: false,
    };
    let (tap, wire) = Tap::mock();
    let stack = Stack::new(settings, mmds).unwrap();
    let net = Net::new(config(), tap).unwrap();
    (Box::new(net.with_metadata(stack).unwrap()), wire)
}

/// A guest's connection to the service.
struct Client {
    machine: Machine,
    slot: u64,
    sent: u64,
    next: u32,
    acknowledged: u32,
}

impl Client {
    fn send(&mut self, flags: u8, data: &[u8]) {
        let segment = segment(flags, self.next, self.acknowledged, data);
        add_tx(&mut self.machine, self.sent, &segment);
        self.sent += 1;
        self.next = self.next.wrapping_add(data.len() as u32);
    }

    /// The next frame from the service.
    fn hear(&mut self) -> Vec<u8> {
        self.slot += 1;
        self.machine.wait_used(0, self.slot as u16);
        let used = self.machine.drivers[0].take_used().unwrap();
        self.machine
            .get(FREE + 2048 * (self.slot - 1), used.len as usize)
    }

    fn connect(&mut self) {
        (self.next, self.acknowledged) = (self.next.wrapping_add(100_000), 0);
        self.send(SYN, b"");
        let answer = self.hear();
        assert_eq!(flags(&answer), SYN | ACK);
        self.next = self.next.wrapping_add(1);
        self.acknowledged = sequence(&answer).wrapping_add(1);
    }

    fn ask(&mut self, request: &str) -> String {
        self.send(PUSH_ACK, request.as_bytes());
        let answer = self.hear();
        let payload = &answer[HEADER + 54..];
        self.acknowledged = sequence(&answer).wrapping_add(payload.len() as u32);
        String::from_utf8(payload.to_vec()).unwrap()
    }

    fn token(&mut self) -> String {
        let answer =
            self.ask("PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n\r\n");
        assert!(answer.contains(" 200 "), "{answer}");
        answer.rsplit("\r\n").next().unwrap().to_owned()
    }

    fn secret(&mut self, token: &str) -> String {
        self.ask(&format!(
            "GET /secret HTTP/1.1\r\nX-metadata-token: {token}\r\nAccept: */*\r\n\r\n"
        ))
    }
}

#[test]
fn a_connection_to_the_service_is_reset_and_its_tokens_open_nothing() {
    let (net, _wire) = with_service();
    let mut client = Client {
        machine: Machine::new(net, 0),
        slot: 0,
        sent: 0,
        next: 999,
        acknowledged: 0,
    };
    add_rx(&mut client.machine, 0..64);
    client.connect();
    let token = client.token();
    assert!(client.secret(&token).ends_with('x'));

    let (net, _wire) = with_service();
    client.machine = client.machine.reborn(|| net);
    client.send(PUSH_ACK, b"GET /secret HTTP/1.1\r\n\r\n");
    assert_eq!(flags(&client.hear()) & RST, RST);
    client.connect();
    let refused = client.secret(&token);
    assert!(refused.contains(" 401 "), "{refused}");
    let token = client.token();
    assert!(client.secret(&token).ends_with('x'));
}

#[test]
fn the_format_is_that_of_the_golden_file() {
    crate::testing::golden::<crate::net::NetState>(include_str!("../../../testdata/net.json"));
    // As it is since the device knows of the guest's addresses.
    let text = include_str!("../../../testdata/net-presence.json");
    crate::testing::golden::<crate::net::NetState>(text);
}
