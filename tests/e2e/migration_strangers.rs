// SPDX-License-Identifier: Apache-2.0
//! Peers that are not what they say, or nobody who was waited for.

use std::io::Write;
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use brume_api::MigrationPhase;
use brume_migration::{
    Address, Channel, Hello, Link as Connection, Listener, Message, PageBatch, Purpose, Session,
    Zeros,
};
use brume_tests::migration::{Link, Pair, Setup, Side};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::migration::{LIMIT, WRITES, assert_settled};
use crate::migration_refusals::refused;

const SHORT: Duration = Duration::from_secs(20);
/// How long a target listens to somebody who says nothing.
const GREETING: Duration = Duration::from_secs(5);

/// Somebody who only says to be a target, once; what it was told in the end.
fn fake_target<T: Send + 'static>(
    play: impl FnOnce(Channel) -> T + Send + 'static,
) -> (TempDir, String, JoinHandle<T>) {
    let folder = tempfile::tempdir().unwrap();
    let address = format!("unix:{}", folder.path().join("fake").display());
    let listener = Listener::bind(&address.parse().unwrap()).unwrap();
    let thread = thread::spawn(move || play(accept(&listener, SHORT)));
    (folder, address, thread)
}

/// The next connection of a source, which is still to be welcomed.
pub(crate) fn accept(listener: &Listener, limit: Duration) -> Channel {
    let link = listener.accept(limit).unwrap().expect("a source");
    let mut channel = Channel::new(link);
    channel.set_limit(limit).unwrap();
    channel
}

/// Lets a connection of a source in.
pub(crate) fn welcome(channel: &mut Channel) {
    let hello = channel.meet().unwrap();
    channel.welcome(&hello).unwrap();
}

/// Takes a source in, and what it offers.
pub(crate) fn hear_offer(channel: &mut Channel) -> Value {
    welcome(channel);
    match channel.receive_message().unwrap() {
        Message::Offer(offer) => offer,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_target_that_lies_gets_nothing() {
    let mut pair = Pair::new(WRITES);
    let welcome = Message::Welcome {
        protocol: 99,
        brume: "9".into(),
    };
    let reasons = vec!["the moon is full".into()];
    let plays: [(Vec<Message>, bool, &str); 5] = [
        (vec![welcome], false, "out of turn"),
        (
            vec![Message::Refused {
                reasons: reasons.clone(),
            }],
            false,
            "the moon is full",
        ),
        (vec![Message::Refused { reasons }], true, "the moon is full"),
        (vec![Message::Ready { load_us: 0 }], true, "out of turn"),
        (
            vec![Message::Failed {
                why: "no room".into(),
            }],
            true,
            "no room",
        ),
    ];
    for (words, offered, text) in plays {
        let (_folder, address, fake) = fake_target(move |mut channel| {
            if offered {
                hear_offer(&mut channel);
            } else {
                channel.receive_message().unwrap();
            }
            for word in &words {
                channel.send(word).unwrap();
            }
            // Until it has gone.
            while channel.receive().is_ok() {}
        });
        let error = refused(&mut pair, &json!({"destination": address}));
        assert!(error.contains(text), "{error}");
        fake.join().unwrap();
    }
    // One that takes it over without being asked, and one that claims to have what it has not.
    for word in [
        Message::TakenOver,
        Message::Complete,
        Message::PassTaken { pass: 7 },
    ] {
        let (_folder, address, fake) = fake_target(move |mut channel| {
            hear_offer(&mut channel);
            channel.send(&Message::Accepted(Value::Null)).unwrap();
            channel.send(&word).unwrap();
            while channel.receive().is_ok() {}
        });
        pair.send(&json!({"destination": address}));
        let status = pair.wait(Side::Source, &[MigrationPhase::Failed], LIMIT);
        assert!(status.error.unwrap().contains("out of turn"));
        fake.join().unwrap();
        pair.assert_runs_on(Side::Source);
    }
    pair.moved(&json!({}), LIMIT);
    assert_settled(&mut pair);
}

#[test]
fn a_source_of_another_version_is_told_which_are_spoken() {
    let mut pair = Pair::new(WRITES);
    let address: Address = pair.destination().parse().unwrap();
    let mut channel = Channel::new(Connection::connect(&address, SHORT).unwrap());
    channel.set_limit(SHORT).unwrap();
    let hello = Hello {
        protocol: 99,
        oldest: 98,
        brume: "9.9.9".into(),
        session: Session::new().unwrap(),
        purpose: Purpose::Control,
    };
    channel.send(&Message::Hello(hello)).unwrap();
    let Message::Refused { reasons } = channel.receive_message().unwrap() else {
        panic!("it was not refused");
    };
    let text = "the source (brume 9.9.9) speaks versions 98 to 99 of the migration protocol";
    assert!(reasons[0].starts_with(text), "{reasons:?}");
    pair.moved(&json!({}), LIMIT);
}

/// A source that only says to be one, as far as the welcome.
fn fake_source(pair: &Pair) -> Channel {
    let address: Address = pair.destination().parse().unwrap();
    let mut channel = Channel::new(Connection::connect(&address, SHORT).unwrap());
    channel.set_limit(SHORT).unwrap();
    let session = Session::new().unwrap();
    channel.greet(&session, Purpose::Control).unwrap();
    channel
}

/// What the machine of `pair` offers.
fn offer_of(pair: &mut Pair) -> Value {
    let (_folder, address, fake) = fake_target(|mut channel| {
        let offer = hear_offer(&mut channel);
        channel.refuse(vec!["no".into()]);
        offer
    });
    refused(pair, &json!({"destination": address}));
    fake.join().unwrap()
}

#[test]
fn an_offer_that_does_not_fit_is_refused_with_what_does_not() {
    let mut pair = Pair::new(WRITES);
    let offer = offer_of(&mut pair);
    let with = |path: &str, value: Value| {
        let mut offer = offer.clone();
        *offer.pointer_mut(path).unwrap() = value;
        offer
    };
    let huge = 1_u64 << 50;
    for (offer, text) in [
        (
            json!({"machine": 1}),
            "does not understand what the machine is",
        ),
        (json!({}), "does not understand what the machine is"),
        (with("/connections", json!(0)), "over 1 to 16 connections"),
        (with("/connections", json!(17)), "over 1 to 16 connections"),
        (
            with("/memory", json!(huge)),
            "bytes of memory for a machine with",
        ),
        (
            with("/memory_in_use", json!(huge)),
            "MiB of memory and the target can have",
        ),
        (
            with("/sections/0/0", json!("soul")),
            "`soul` state, which the target does not know",
        ),
        (with("/sections/0/1", json!(77)), "needs a newer brume"),
        (
            with("/config/machine-config/vcpu_count", json!(200)),
            "is none that can be made here",
        ),
        (
            with("/config/machine-config/mem_size_mib", json!(1_u64 << 40)),
            "memory",
        ),
    ] {
        let mut channel = fake_source(&pair);
        channel.send(&Message::Offer(offer)).unwrap();
        let Message::Refused { reasons } = channel.receive_message().unwrap() else {
            panic!("{text}: it was not refused");
        };
        assert!(reasons.join("; ").contains(text), "{text}: {reasons:?}");
        pair.wait(Side::Target, &[MigrationPhase::Listening], LIMIT);
    }
    pair.moved(&json!({}), LIMIT);
    assert_settled(&mut pair);
}

/// What a source sends, and hears.
type Lie = fn(&mut Channel);

#[test]
fn a_source_that_lies_about_sizes_takes_no_memory_and_no_place() {
    let mut pair = Pair::new(WRITES);
    let offer = offer_of(&mut pair);
    let lies: [(Lie, &str); 7] = [
        // Pages beyond the memory, and around its end.
        (|channel| pages(channel, 1 << 40), "pages that cannot be"),
        (
            |channel| pages(channel, (128 << 8) - 1),
            "pages that cannot be",
        ),
        (|channel| pages(channel, 1 << 52), "pages that cannot be"),
        // A state that is none, and one without an end.
        (state, "not a snapshot of brume"),
        (
            |channel| while channel.send_state(&vec![0; 4 << 20]).is_ok() {},
            "out of turn",
        ),
        // Nothing to forget, and something that is never sent again.
        (|channel| drop(channel.send(&Message::Stale)), "out of turn"),
        (
            |channel| {
                channel.send_missing(&[1]).unwrap();
                channel.send(&Message::Stale).unwrap();
                while channel.receive_message().unwrap() != Message::Forgotten {}
                state(channel);
            },
            "out of turn",
        ),
    ];
    for (number, (lie, text)) in lies.into_iter().enumerate() {
        let mut channel = fake_source(&pair);
        channel.send(&Message::Offer(offer.clone())).unwrap();
        let answer = channel.receive_message().unwrap();
        assert!(
            matches!(answer, Message::Accepted(_)),
            "{number}: {answer:?}"
        );
        lie(&mut channel);
        let status = pair.wait(Side::Target, &[MigrationPhase::Listening], LIMIT);
        let error = status.error.unwrap_or_default();
        assert!(error.contains(text), "{number}: {error}");
        let rss = pair.api(Side::Target).vm.resident_mib();
        assert!(rss < 128, "{number}: {rss} MiB");
    }
    pair.moved(&json!({}), LIMIT);
    assert_settled(&mut pair);
}

fn pages(channel: &mut Channel, first: u64) {
    let mut batch = PageBatch::new();
    batch.push_run(first, 2, Zeros::Told, |bytes| bytes.fill(1));
    let _ = channel.send_pages(&batch);
}

/// Sends what is no state, as all that there is.
fn state(channel: &mut Channel) {
    let _ = channel.send_state(&[7; 100_000]);
    let (paused_us, unix_ns) = (0, 0);
    let _ = channel.send(&Message::Sent { paused_us, unix_ns });
}

#[test]
fn strangers_do_not_keep_a_target_from_its_machine() {
    let mut pair = Pair::start(&Setup {
        args: WRITES,
        link: Link::Tcp,
        ..Setup::default()
    });
    let address = pair.destination();
    let address = address.strip_prefix("tcp:").unwrap();
    for bytes in [
        &b"GET / HTTP/1.1\r\nHost: here.example.com\r\n\r\n"[..],
        b"BRMG\0\0\0\0\xff\xff\xff\xff and much more than that would follow",
        b"BRM",
        b"",
    ] {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        stream.write_all(bytes).unwrap();
    }
    // For a machine that is moved back to nobody it is no target.
    let mut channel = {
        let address: Address = pair.destination().parse().unwrap();
        Channel::new(Connection::connect(&address, SHORT).unwrap())
    };
    channel.set_limit(SHORT).unwrap();
    let session = Session::new().unwrap();
    let refusal = channel
        .greet(&session, Purpose::Return)
        .unwrap_err()
        .to_string();
    assert!(refusal.contains("begun with another process"), "{refusal}");
    // Those who say nothing, before it comes and while it asks for its connections.
    let connect = || std::net::TcpStream::connect(address).unwrap();
    let silent: Vec<_> = (0..40).map(|_| connect()).collect();
    let begun = Instant::now();
    let options = json!({"connections": 2, "mode": "PostCopy"});
    pair.moved(&options, LIMIT);
    let time = begun.elapsed();
    assert!(time < GREETING, "{time:?}");
    drop(silent);
    assert_settled(&mut pair);
}

#[test]
fn a_target_without_descriptors_goes_on_waiting() {
    let mut pair = Pair::start(&Setup {
        args: WRITES,
        link: Link::Tcp,
        ..Setup::default()
    });
    let pid = pair.api(Side::Target).vm.pid().to_string();
    let limit = |most: &str| {
        let most = format!("--nofile={most}");
        let set = Command::new("prlimit")
            .args(["--pid", &pid, &most])
            .status();
        assert!(set.unwrap().success());
    };
    let address: Address = pair.destination().parse().unwrap();
    // The soft limit: the other one not everybody could raise again.
    limit("3:");
    let channels: Vec<_> = (0..2)
        .map(|_| Connection::connect(&address, SHORT).unwrap())
        .collect();
    thread::sleep(Duration::from_millis(500));
    drop(channels);
    limit("1024:");
    pair.moved(&json!({}), LIMIT);
    assert_settled(&mut pair);
}
