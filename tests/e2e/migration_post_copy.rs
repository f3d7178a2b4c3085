// SPDX-License-Identifier: Apache-2.0
//! A guest that goes before its memory, which follows it; also when the connection breaks meanwhile,
//! and when others must not read along.

use std::path::Path;
use std::process::Command;
use std::thread;

use brume_api::MigrationPhase;
use brume_migration::{Address, Channel, Listener, Message, Received};
use brume_tests::api::eventually;
use brume_tests::live::Live;
use brume_tests::migration::{Link, Pair, Setup, Side};
use serde_json::{Value, json};

use crate::migration::{LIMIT, WRITES, assert_settled};
use crate::migration_memfd::assert_diffs_after_a_move;
use crate::migration_resume::interrupted;
use crate::migration_strangers::{accept, hear_offer, welcome};

/// A guest that writes to all that it has touched, faster than a slow link carries it.
pub(crate) const WRITES_ALL: &str = "bare.touch=64 bare.rate=200";

#[test]
fn memory_follows_a_guest_over_every_link() {
    for link in [Link::Unix, Link::Tcp, Link::TwoHosts] {
        for mode in ["PostCopy", "Hybrid"] {
            let mut pair = Pair::start(&Setup {
                args: WRITES,
                link,
                ..Setup::default()
            });
            let body = json!({"mode": mode, "connections": 2, "max_downtime_ms": 1});
            pair.moved(&body, LIMIT);
            assert_settled(&mut pair);
        }
    }
}

#[test]
fn what_was_written_again_follows_the_guest() {
    for (shared, pages) in [
        (false, "None"),
        (false, "Transparent"),
        (true, "None"),
        (true, "Transparent"),
    ] {
        let machine = json!({
            "vcpu_count": 1, "mem_size_mib": 128, "shared_memory": shared, "huge_pages": pages,
        });
        let mut pair = Pair::start(&Setup {
            args: WRITES_ALL,
            parts: &[("/machine-config", machine)],
            link: Link::Tcp,
            ..Setup::default()
        });
        // All of it has been written again when the first pass ends.
        let slowly = json!({"mode": "Hybrid", "max_downtime_ms": 1, "bandwidth_limit": 50 << 20});
        let status = pair.moved(&slowly, LIMIT);
        assert_eq!(status.passes.len(), 1, "{status:?}");
        assert!(status.passes[0].dirtied_pages > 1000, "{status:?}");
        assert_settled(&mut pair);
    }
}

/// A target that takes a pass, up to the word that some of it is old; how many pages that is.
fn take_a_pass(listener: &Listener) -> (Channel, Channel, u32) {
    let mut channel = accept(listener, LIMIT);
    hear_offer(&mut channel);
    channel.send(&Message::Accepted(Value::Null)).unwrap();
    let mut faults = accept(listener, LIMIT);
    welcome(&mut faults);
    let mut stale = 0;
    loop {
        match channel.receive().unwrap() {
            Received::Pages(_) | Received::Message(Message::KeepAlive) => {}
            Received::Message(Message::PassEnded { pass, .. }) => {
                channel.send(&Message::PassTaken { pass }).unwrap();
            }
            Received::Missing { bytes, .. } => {
                stale += bytes.iter().map(|byte| byte.count_ones()).sum::<u32>();
            }
            Received::Message(Message::Stale) => return (channel, faults, stale),
            _ => panic!("something else has come"),
        }
    }
}

#[test]
fn what_is_old_is_forgotten_while_the_guest_runs() {
    let folder = tempfile::tempdir().unwrap();
    let listen = Address::Unix(folder.path().join("target"));
    let listener = Listener::bind(&listen).unwrap();
    let target = thread::spawn(move || take_a_pass(&listener));
    let mut live = Live::start(WRITES_ALL, &[]);
    let body = json!({"destination": listen.to_string(), "mode": "Hybrid", "max_downtime_ms": 1,
        "bandwidth_limit": 50 << 20});
    live.api.done("PUT", "/migration/send", &body);
    let (channel, faults, stale) = target.join().unwrap();
    assert!(stale > 1000, "{stale}");
    // It has not been stopped, and stays when the target goes.
    let before = live.status();
    drop((channel, faults));
    eventually("the move has failed", || {
        live.api.get("/migration")["phase"] == json!("Failed")
    });
    let after = live.status();
    assert!(after.tick > before.tick && after.writes > before.writes);
    live.hash();
}

#[test]
fn a_diff_has_what_was_sent_and_what_has_followed() {
    for mode in ["PreCopy", "PostCopy"] {
        let mut pair = Pair::start(&Setup {
            args: "bare.touch=4",
            receive: json!({"track_dirty_pages": true}),
            ..Setup::default()
        });
        pair.moved(&json!({"mode": mode}), LIMIT);
        assert_diffs_after_a_move(&mut pair);
    }
}

#[test]
fn a_guest_waits_for_memory_whose_connection_breaks_and_gets_it() {
    let mut pair = interrupted();
    let limit = r#"{"bandwidth_limit": 1000}"#;
    let refused = pair.api(Side::Source).send("PATCH", "/migration", limit);
    assert!(refused.body.contains("was handed over"), "{refused:?}");
    // Neither side gives it up.
    let refused = pair.cancel(Side::Source);
    assert_eq!(refused.status, 400, "{refused:?}");
    pair.proxy.as_ref().unwrap().mend();
    let status = pair.wait(Side::Source, &[MigrationPhase::Completed], LIMIT);
    assert_eq!(status.error, None);
    pair.wait(Side::Target, &[MigrationPhase::Completed], LIMIT);
    assert_settled(&mut pair);
}

/// Makes an authority in `folder`, and a certificate for each of both sides.
fn make_certificates(folder: &Path) {
    let script = "
        openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -subj /CN=ca -days 2
        for name in a b; do
            openssl req -newkey rsa:2048 -nodes -keyout $name.key -out $name.csr -subj /CN=$name
            printf 'subjectAltName=DNS:localhost,IP:127.0.0.1\\nbasicConstraints=CA:FALSE\\n' > ext
            openssl x509 -req -in $name.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 \
                -extfile ext -out $name.pem
        done";
    let made = Command::new("sh")
        .args(["-ec", script])
        .current_dir(folder)
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
}

fn tls(folder: &Path, name: &str) -> Value {
    json!({
        "ca": folder.join("ca.pem"),
        "certificate": folder.join(format!("{name}.pem")),
        "key": folder.join(format!("{name}.key")),
        "server_name": "localhost",
    })
}

#[test]
fn a_machine_moves_in_secret_to_whom_it_is_meant_for() {
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_certificates(ours.path());
    make_certificates(theirs.path());
    for mode in ["PreCopy", "PostCopy"] {
        let mut pair = Pair::start(&Setup {
            args: WRITES,
            link: Link::Tcp,
            receive: json!({"tls": tls(ours.path(), "b")}),
            ..Setup::default()
        });
        pair.send(&json!({"tls": tls(theirs.path(), "a")}));
        let status = pair.wait(Side::Source, &[MigrationPhase::Failed], LIMIT);
        let error = status.error.unwrap();
        assert!(error.contains("certificate"), "{error}");
        pair.assert_runs_on(Side::Source);
        let body = json!({"mode": mode, "connections": 2, "tls": tls(ours.path(), "a")});
        pair.moved(&body, LIMIT);
        assert_settled(&mut pair);
    }
}
