// SPDX-License-Identifier: Apache-2.0
//! A machine with shared memory moves to another process of its host without a copy, and is
//! otherwise a machine as any other.

use std::fs::{self, File};
use std::thread;
use std::time::Duration;

use brume_api::{MigrationPhase, MigrationStatus};
use brume_migration::{Address, Channel, Listener, Message, Received};
use brume_tests::api::{ApiVm, eventually};
use brume_tests::live::{Live, Snapshot};
use brume_tests::memory_files::{assert_same_memory, merge};
use brume_tests::migration::{Link, Pair, Setup, Side};
use serde_json::{Value, json};

use crate::migration_strangers::{accept, hear_offer};

const LIMIT: Duration = Duration::from_secs(60);
/// A guest that writes while it moves.
const WRITES: &str = "bare.touch=32 bare.rate=50";
const MIB: u64 = 64;

fn shared(track: bool) -> (&'static str, Value) {
    let machine = json!({
        "vcpu_count": 1, "mem_size_mib": MIB, "shared_memory": true, "track_dirty_pages": track,
    });
    ("/machine-config", machine)
}

/// The file that the machine's memory is, by its number; `None` if it is no file.
fn memory_of(vm: &ApiVm) -> Option<u64> {
    let maps = fs::read_to_string(format!("/proc/{}/maps", vm.vm.pid())).unwrap_or_default();
    let line = maps.lines().find(|line| line.contains("guest-memory"))?;
    line.split_whitespace().nth(4)?.parse().ok()
}

/// Whether a process that is our child has ended.
fn has_ended(pid: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.contains("State:\tZ")
}

fn assert_nothing_sent(status: &MigrationStatus) {
    let sent = (status.bytes, status.pages, status.zero_pages);
    assert_eq!(sent, (0, 0, 0), "{status:?}");
    assert!(status.passes.is_empty() && status.pass == 0, "{status:?}");
    assert_eq!(status.memory_bytes, MIB << 20);
}

#[test]
fn a_machine_takes_its_memory_along_without_a_copy() {
    let setup = Setup {
        args: WRITES,
        parts: &[shared(false)],
        ..Setup::default()
    };
    let mut pair = Pair::start(&setup);
    let memory = memory_of(pair.api(Side::Source)).expect("shared memory");
    // There and back, however it is to be sent.
    for body in [
        json!({}),
        json!({"connections": 3}),
        json!({"mode": "PostCopy"}),
        json!({"mode": "Hybrid", "compression": "Zstd"}),
    ] {
        let status = pair.moved(&body, LIMIT);
        assert_nothing_sent(&status);
        assert!(status.downtime.is_some());
        assert_nothing_sent(&pair.progress(Side::Target));
        pair.live(Side::Target).hash();
        assert_eq!(memory_of(pair.api(Side::Target)), Some(memory));
        let source = pair.api(Side::Source).vm.pid();
        eventually("the source ends", || has_ended(source));
        pair.again(&setup);
    }
    pair.live(Side::Source).write_round();
    pair.live(Side::Source).hash();
}

#[test]
fn it_is_copied_where_it_cannot_be_handed_over() {
    for body in [json!({}), json!({"mode": "PostCopy"})] {
        let mut setup = Setup {
            args: WRITES,
            parts: &[shared(false)],
            link: Link::Tcp,
            ..Setup::default()
        };
        let mut pair = Pair::start(&setup);
        let memory = memory_of(pair.api(Side::Source)).expect("shared memory");
        let status = pair.moved(&body, LIMIT);
        assert!(status.pages > 0, "{status:?}");
        pair.live(Side::Target).hash();
        let copy = memory_of(pair.api(Side::Target)).expect("shared memory");
        assert_ne!(copy, memory);
        // What has come so can be handed over.
        setup.link = Link::Unix;
        pair.again(&setup);
        assert_nothing_sent(&pair.moved(&json!({}), LIMIT));
        assert_eq!(memory_of(pair.api(Side::Target)), Some(copy));
        pair.live(Side::Target).hash();
    }
}

#[test]
fn a_machine_of_its_own_memory_is_copied() {
    let mut pair = Pair::new(WRITES);
    assert_eq!(memory_of(pair.api(Side::Source)), None);
    let status = pair.moved(&json!({}), LIMIT);
    assert!(status.pages > 0, "{status:?}");
    assert_eq!(memory_of(pair.api(Side::Target)), None);
}

#[test]
fn a_machine_that_is_refused_goes_on_and_moves_later() {
    let (_folder, disk) = crate::block::disk();
    let drive = json!({
        "drive_id": "data", "path_on_host": disk, "is_root_device": false,
    });
    let elsewhere = json!([{"drive_id": "data", "path_on_host": "/nonexistent"}]);
    let setup = |receive| Setup {
        args: WRITES,
        receive,
        ..Setup::default()
    };
    let parts = [shared(false), ("/drives/data", drive)];
    let mut pair = Pair::start(&Setup {
        parts: &parts,
        ..setup(json!({"drive_overrides": elsewhere}))
    });
    pair.send(&json!({}));
    let status = pair.wait(Side::Source, &[MigrationPhase::Failed], LIMIT);
    let error = status.error.expect("a reason");
    assert!(error.contains("/nonexistent"), "{error}");
    pair.assert_runs_on(Side::Source);
    assert_eq!(memory_of(pair.api(Side::Target)), None, "it lets go of it");
    pair.live(Side::Source).hash();
    pair.replace_target(&setup(json!({})));
    assert_nothing_sent(&pair.moved(&json!({}), LIMIT));
    pair.live(Side::Target).hash();
}

/// A target that takes everything; its connection and what it was handed over.
fn take_all(listener: &Listener) -> (Channel, File) {
    let mut channel = accept(listener, LIMIT);
    let offer = hear_offer(&mut channel);
    assert_eq!(offer.get("shares_memory"), Some(&json!(true)));
    let memory = File::from(channel.receive_fd().unwrap());
    let accepted = json!({"shares_memory": true});
    channel.send(&Message::Accepted(accepted)).unwrap();
    loop {
        match channel.receive().unwrap() {
            Received::State { .. } => {}
            Received::Message(Message::Sent { .. }) => break,
            Received::Message(Message::KeepAlive) => {}
            _ => panic!("something else than the state has come"),
        }
    }
    (channel, memory)
}

/// A target that takes everything and fails at its state; what it was handed over.
fn fail_at_the_state(listener: &Listener) -> File {
    let (mut channel, memory) = take_all(listener);
    let why = "it does not like the state".into();
    channel.send(&Message::Failed { why }).unwrap();
    memory
}

#[test]
fn a_machine_whose_target_fails_goes_on_with_its_memory() {
    let folder = tempfile::tempdir().unwrap();
    let listen = Address::Unix(folder.path().join("target"));
    let listener = Listener::bind(&listen).unwrap();
    let target = thread::spawn(move || fail_at_the_state(&listener));
    let mut live = Live::start(WRITES, &[shared(false)]);
    let before = live.status();
    let body = json!({"destination": listen.to_string()});
    live.api.done("PUT", "/migration/send", &body);
    let memory = target.join().unwrap();
    let mut phase = Value::Null;
    eventually("the move has failed", || {
        phase = live.api.get("/migration")["phase"].clone();
        phase == json!("Failed")
    });
    let after = live.status();
    assert!(after.tick > before.tick && after.writes > before.writes);
    live.hash();
    live.write_round();
    live.hash();
    assert_eq!(memory.metadata().unwrap().len(), MIB << 20);
    assert!(memory.set_len(0).is_err(), "nobody can make it shorter");
}

#[test]
fn nobody_decides_that_two_guests_run_in_one_memory() {
    let folder = tempfile::tempdir().unwrap();
    let listen = Address::Unix(folder.path().join("target"));
    let listener = Listener::bind(&listen).unwrap();
    // It is ready, and says no more.
    let target = thread::spawn(move || {
        let (mut channel, memory) = take_all(&listener);
        channel.send(&Message::Ready { load_us: 0 }).unwrap();
        assert_eq!(channel.receive_message().unwrap(), Message::Commit);
        (channel, memory)
    });
    let live = Live::start(WRITES, &[shared(false)]);
    let body = json!({"destination": listen.to_string()});
    live.api.done("PUT", "/migration/send", &body);
    let held = target.join().unwrap();
    eventually("nobody knows where it is", || {
        live.api.get("/migration")["phase"] == json!("InDoubt")
    });
    // Who has the memory is there still.
    let refused = live
        .api
        .send("PATCH", "/migration", r#"{"decision": "Run"}"#);
    assert_eq!(refused.status, 400, "{}", refused.body);
    assert!(refused.body.contains("two guests"), "{}", refused.body);
    assert_eq!(live.api.get("/migration")["phase"], json!("InDoubt"));
    live.api
        .done("PATCH", "/migration", &json!({"decision": "Abandon"}));
    drop(held);
}

#[test]
fn a_machine_with_shared_memory_is_saved_and_restored() {
    let folder = tempfile::tempdir().unwrap();
    let named = |name| Snapshot::named(folder.path(), name);
    let live = Live::start("bare.touch=4", &[shared(true)]);
    live.pause();
    live.save("Full", &named("full"));
    let mut live = Live::restored(&named("full"), &json!({"track_dirty_pages": true}));
    assert!(memory_of(&live.api).is_some(), "it is shared again");
    live.hash();
    live.write_round();
    live.zero();
    let hash = live.hash();
    live.pause();
    live.save("Diff", &named("diff"));
    live.save("Full", &named("later"));
    let merged = folder.path().join("merged");
    merge(&named("full").memory, &named("diff").memory, &merged);
    assert_same_memory(&merged, &named("later").memory);
    // Without notes, a diff has all that is in use.
    let mut again = Live::restored(&named("later"), &json!({}));
    assert_eq!(again.hash(), hash);
    again.pause();
    again.save("Diff", &named("all"));
    again.save("Full", &named("last"));
    assert_same_memory(&named("all").memory, &named("last").memory);
}

/// Checks that the first diff after a move is of everything, and the second of what was written
/// since.
pub(crate) fn assert_diffs_after_a_move(pair: &mut Pair) {
    let folder = tempfile::tempdir().unwrap();
    let named = |name| Snapshot::named(folder.path(), name);
    let live = pair.live(Side::Target);
    live.pause();
    live.save("Diff", &named("first"));
    live.save("Full", &named("full"));
    assert_same_memory(&named("first").memory, &named("full").memory);
    live.resume();
    live.write_round();
    live.pause();
    live.save("Diff", &named("second"));
    live.save("Full", &named("later"));
    let merged = folder.path().join("merged");
    merge(&named("full").memory, &named("second").memory, &merged);
    assert_same_memory(&merged, &named("later").memory);
}

#[test]
fn a_diff_after_a_move_has_what_was_written_before_it() {
    let mut pair = Pair::start(&Setup {
        args: "bare.touch=4",
        parts: &[shared(true)],
        receive: json!({"track_dirty_pages": true}),
        ..Setup::default()
    });
    assert_nothing_sent(&pair.moved(&json!({}), LIMIT));
    assert_diffs_after_a_move(&mut pair);
}
