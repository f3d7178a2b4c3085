// SPDX-License-Identifier: Apache-2.0
//! Moves that are refused before memory moves, each with its reason, and peers that are not what
//! they say.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use brume_api::MigrationPhase;
use brume_migration::{
    Address, Channel, Hello, Link as Connection, Listener, Message, PageBatch, Purpose, Session,
    Zeros,
};
use brume_tests::api::ApiVm;
use brume_tests::migration::{Link, Pair, Setup, Side};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::block::disk;
use crate::migration::{LIMIT, WRITES, assert_settled, tracks};

const SHORT: Duration = Duration::from_secs(5);

/// Asks for a move that does not begin; why.
#[track_caller]
fn refused(pair: &mut Pair, body: &Value) -> String {
    pair.send(body);
    let status = pair.wait(Side::Source, &[MigrationPhase::Failed], LIMIT);
    assert_eq!((status.pass, status.pages), (0, 0), "{status:?}");
    pair.assert_runs_on(Side::Source);
    assert!(!tracks(pair.api(Side::Source)));
    status.error.unwrap()
}

/// The same of a target that says the same of it, and waits for another machine.
#[track_caller]
fn refused_by_target(pair: &mut Pair, text: &str) {
    let error = refused(pair, &json!({}));
    assert!(error.contains(text), "{error}");
    let status = pair.wait(Side::Target, &[MigrationPhase::Listening], LIMIT);
    let told = status.error.unwrap();
    assert!(told.contains(text), "{told}");
}

#[test]
fn a_request_that_cannot_be_is_refused_at_once() {
    let mut pair = Pair::new("");
    for (body, text) in [
        (json!({"destination": "here"}), "`destination` is `here`"),
        (
            json!({"destination": "tcp:host"}),
            "`destination` is `tcp:host`",
        ),
        (
            json!({"destination": "tcp:[::1:7000"}),
            "is no place to move a machine to",
        ),
        (json!({"connections": 0}), "`connections` is 0"),
        (json!({"connections": 17}), "`connections` is 17"),
        (json!({"max_downtime_ms": 0}), "max_downtime_ms"),
        (json!({"speed": 1}), "speed"),
    ] {
        let reply = pair.try_send(&body);
        assert_eq!(reply.status, 400, "{body}: {}", reply.body);
        assert!(reply.body.contains(text), "{body}: {}", reply.body);
    }
    let source = pair.api(Side::Source);
    let reply = source.send("PUT", "/migration/receive", r#"{"listen": "unix:/x"}"#);
    assert!(
        reply.status == 400 && reply.body.contains("a machine already"),
        "{}",
        reply.body
    );
    for (method, body) in [("DELETE", ""), ("PATCH", r#"{"bandwidth_limit": 1}"#)] {
        let reply = source.send(method, "/migration", body);
        assert!(
            reply.status == 400 && reply.body.contains("not being moved"),
            "{}",
            reply.body
        );
    }
    let target = pair.api(Side::Target);
    let reply = target.send("PUT", "/migration/send", r#"{"destination": "unix:/x"}"#);
    assert!(
        reply.status == 400 && reply.body.contains("no machine yet"),
        "{}",
        reply.body
    );
    let reply = target.send("PUT", "/migration/receive", r#"{"listen": "unix:/x"}"#);
    assert!(
        reply.status == 400 && reply.body.contains("awaited already"),
        "{}",
        reply.body
    );
    let reply = target.send("PATCH", "/migration", r#"{"bandwidth_limit": 1}"#);
    assert!(
        reply.status == 400 && reply.body.contains("at the source"),
        "{}",
        reply.body
    );
    pair.moved(&json!({}), LIMIT);
}

#[test]
fn a_place_where_nobody_can_wait_is_refused() {
    let api = ApiVm::new();
    let file = api.folder().join("file");
    fs::write(&file, "mine").unwrap();
    let unix = format!("unix:{}", file.display());
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp = format!("tcp:{}", taken.local_addr().unwrap());
    for (listen, text) in [
        (&*unix, "is in use"),
        (&tcp, "nobody can be waited for"),
        ("tcp:192.0.2.77:1", "nobody can be waited for"),
        ("unix:/nowhere/at/all", "nobody can be waited for"),
        ("fd:0", "descriptor 0 is no connected stream socket"),
        ("fd:77", "descriptor 77 is no connected stream socket"),
        ("everywhere", "`listen` is `everywhere`"),
    ] {
        let body = json!({"listen": listen}).to_string();
        let reply = api.send("PUT", "/migration/receive", &body);
        assert_eq!(reply.status, 400, "{listen}: {}", reply.body);
        assert!(reply.body.contains(text), "{listen}: {}", reply.body);
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
    // It can still become a machine of its own.
    api.start_bare("bare.do=live", &[]);
}

#[test]
fn who_is_not_there_or_is_somebody_else_is_told() {
    let mut pair = Pair::new(WRITES);
    let to = |address: &str| json!({"destination": address});
    for (address, text) in [
        (
            "unix:/nowhere/at/all",
            "nobody can be reached at unix:/nowhere/at/all",
        ),
        (
            "tcp:127.0.0.1:1",
            "nobody can be reached at tcp:127.0.0.1:1",
        ),
        ("fd:88", "descriptor 88 is no connected stream socket"),
    ] {
        let error = refused(&mut pair, &to(address));
        assert!(error.contains(text), "{error}");
    }
    let web = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", web.local_addr().unwrap());
    let answers: [(&[u8], &str); 3] = [
        (
            b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n",
            "does not speak brume's",
        ),
        (b"", "closed the connection"),
        (
            b"BRMG\0\0\0\0\xff\xff\xff\xff and much more than that would follow",
            "announced",
        ),
    ];
    for (answer, text) in answers {
        let listener = web.try_clone().unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut hello = [0; 64];
            stream.read_exact(&mut hello).unwrap();
            stream.write_all(answer).unwrap();
            // A reset would take the answer along.
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let error = refused(&mut pair, &to(&address));
        assert!(error.contains(text), "{error}");
        server.join().unwrap();
    }
    pair.moved(&json!({}), LIMIT);
    assert_settled(&mut pair);
}

/// Somebody who only says to be a target, once; what it was told in the end.
fn fake_target<T: Send + 'static>(
    play: impl FnOnce(Channel) -> T + Send + 'static,
) -> (TempDir, String, JoinHandle<T>) {
    let folder = tempfile::tempdir().unwrap();
    let address = format!("unix:{}", folder.path().join("fake").display());
    let listener = Listener::bind(&address.parse().unwrap()).unwrap();
    let thread = thread::spawn(move || {
        let link = listener.accept(SHORT).unwrap().expect("a source");
        let mut channel = Channel::new(link);
        channel.set_limit(SHORT).unwrap();
        play(channel)
    });
    (folder, address, thread)
}

/// Takes a source in, and what it offers.
fn hear_offer(channel: &mut Channel) -> Value {
    let hello = channel.meet().unwrap();
    channel.welcome(&hello).unwrap();
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
            "MiB of memory and the target's host has",
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

#[test]
fn a_source_that_lies_about_sizes_takes_no_memory_and_no_place() {
    let mut pair = Pair::new(WRITES);
    let offer = offer_of(&mut pair);
    let lies: [fn(&mut Channel); 5] = [
        // Pages beyond the memory, and around its end.
        |channel| pages(channel, 1 << 40),
        |channel| pages(channel, (128 << 8) - 1),
        |channel| pages(channel, 1 << 52),
        // A state that is none, and one without an end.
        |channel| {
            let _ = channel.send_state(&[7; 100_000]);
            sent(channel);
        },
        |channel| while channel.send_state(&vec![0; 4 << 20]).is_ok() {},
    ];
    for (number, lie) in lies.into_iter().enumerate() {
        let mut channel = fake_source(&pair);
        channel.send(&Message::Offer(offer.clone())).unwrap();
        let answer = channel.receive_message().unwrap();
        assert!(
            matches!(answer, Message::Accepted(_)),
            "{number}: {answer:?}"
        );
        lie(&mut channel);
        let status = pair.wait(Side::Target, &[MigrationPhase::Listening], LIMIT);
        assert!(
            status.error.is_some_and(|error| !error.is_empty()),
            "{number}"
        );
        let rss = resident_mib(pair.api(Side::Target));
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

fn sent(channel: &mut Channel) {
    let (paused_us, unix_ns) = (0, 0);
    let _ = channel.send(&Message::Sent { paused_us, unix_ns });
}

fn resident_mib(api: &ApiVm) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", api.vm.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib: u64 = line
        .unwrap()
        .trim()
        .strip_suffix(" kB")
        .unwrap()
        .parse()
        .unwrap();
    kib >> 10
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
    assert!(time < SHORT / 2, "{time:?}");
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

fn drive(path: &std::path::Path) -> Value {
    json!({"drive_id": "d", "is_root_device": false, "path_on_host": path})
}

#[test]
fn a_disk_that_is_missing_or_another_is_told() {
    let (folder, path) = disk();
    let (other, missing) = (folder.path().join("other"), folder.path().join("missing"));
    fs::write(&other, [0; 1 << 20]).unwrap();
    for (there, text) in [
        (
            &missing,
            format!(
                "no file {} that can be read for drive \"d\"",
                missing.display()
            ),
        ),
        (
            &other,
            "drive \"d\" has 4194304 bytes at the source".to_owned(),
        ),
    ] {
        let setup = Setup {
            args: WRITES,
            parts: &[("/drives/d", drive(&path))],
            receive: json!({"drive_overrides": [{"drive_id": "d", "path_on_host": there}]}),
            ..Setup::default()
        };
        let mut pair = Pair::start(&setup);
        refused_by_target(&mut pair, &text);
        pair.live(Side::Source).hash();
    }
}

#[test]
fn an_override_for_what_the_machine_does_not_have_is_told() {
    for (receive, text) in [
        (
            json!({"network_overrides": [{"iface_id": "e9", "host_dev_name": "tap0"}]}),
            "another TAP for network interface \"e9\"",
        ),
        (
            json!({"drive_overrides": [{"drive_id": "d9", "path_on_host": "/x"}]}),
            "another file for drive \"d9\"",
        ),
        (
            json!({"vsock_override": {"uds_path": "/x"}}),
            "another socket for the socket device",
        ),
    ] {
        let setup = Setup {
            args: WRITES,
            receive,
            ..Setup::default()
        };
        refused_by_target(&mut Pair::start(&setup), text);
    }
}

#[test]
fn a_tap_that_is_missing_is_told() {
    let interface = json!({"iface_id": "e", "host_dev_name": "tap0"});
    let setup = |receive| Setup {
        args: WRITES,
        link: Link::TwoHosts,
        receive,
        ..Setup::default()
    };
    // Nobody may make one where the target is.
    let overrides = json!({"network_overrides": [
        {"iface_id": "e", "host_dev_name": "a_name_too_long_for_one"}]});
    let parts = [("/network-interfaces/e", interface)];
    let mut pair = Pair::start(&Setup {
        parts: &parts,
        ..setup(overrides)
    });
    refused_by_target(&mut pair, "a_name_too_long_for_one");
    pair.replace_target(&setup(json!({})));
    pair.moved(&json!({}), LIMIT);
    assert_settled(&mut pair);
}

#[test]
fn a_process_with_parts_of_a_machine_receives_none() {
    let api = ApiVm::new();
    api.done(
        "PUT",
        "/machine-config",
        &json!({"vcpu_count": 1, "mem_size_mib": 64}),
    );
    let listen = format!("unix:{}", api.folder().join("m").display());
    let body = json!({"listen": listen}).to_string();
    let reply = api.send("PUT", "/migration/receive", &body);
    assert!(
        reply.status == 400 && reply.body.contains("none was described"),
        "{}",
        reply.body
    );
    // And one that waits takes no parts.
    let pair = Pair::new("");
    let target = pair.api(Side::Target);
    let reply = target.send(
        "PUT",
        "/machine-config",
        r#"{"vcpu_count": 1, "mem_size_mib": 64}"#,
    );
    assert!(
        reply.status == 400 && reply.body.contains("is awaited"),
        "{}",
        reply.body
    );
}
