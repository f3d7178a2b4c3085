// SPDX-License-Identifier: Apache-2.0
//! Guests that go before their memory, and connections and processes that end at a bad moment.

use std::fs;
use std::thread;
use std::time::Duration;

use brume_api::MigrationPhase;
use brume_tests::api::eventually;
use brume_tests::migration::{Link, Pair, Setup, Side};
use brume_tests::proxy::{Fault, Harm, Place, Way};
use serde_json::json;

use crate::migration::{LIMIT, assert_settled};
use crate::migration_faults::{may_not_run, proxy, sprung};
use crate::migration_post_copy::WRITES_ALL;

/// A guest whose memory takes a while to follow.
fn setup(link: Link, proxied: bool) -> Setup<'static> {
    Setup {
        args: "bare.touch=64 bare.rate=20",
        link,
        proxied,
        ..Setup::default()
    }
}

/// A guest that has begun to go, whose connection breaks at a message.
fn cut(mode: &str, way: Way, message: &'static str) -> Pair {
    let mut pair = Pair::start(&Setup {
        args: WRITES_ALL,
        ..setup(Link::Tcp, true)
    });
    pair.assert_runs_on(Side::Source);
    proxy(&pair).trap(way, Place::Before, message, Harm::Cut);
    // Much of it has been written again after a pass, and follows.
    let slowly = json!({"mode": mode, "max_downtime_ms": 1, "bandwidth_limit": 50 << 20});
    pair.send(&slowly);
    pair
}

#[test]
fn a_guest_that_has_not_gone_on_stays_and_leaves_nothing_at_the_target() {
    for (mode, way, message) in [
        ("PostCopy", Way::There, "Sent"),
        ("PostCopy", Way::Back, "Ready"),
        ("Hybrid", Way::There, "Stale"),
        ("Hybrid", Way::Back, "Forgotten"),
        ("Hybrid", Way::Back, "Ready"),
    ] {
        let mut pair = cut(mode, way, message);
        pair.wait(Side::Source, &[MigrationPhase::Failed], LIMIT);
        pair.wait(Side::Target, &[MigrationPhase::Listening], LIMIT);
        pair.assert_runs_on(Side::Source);
        pair.live(Side::Source).hash();
        // Nobody waits for memory that does not come.
        let pid = pair.api(Side::Target).vm.pid();
        eventually("the thread for its memory has ended", || {
            let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
            let mut names = tasks
                .flatten()
                .filter_map(|task| fs::read(task.path().join("comm")).ok());
            !names.any(|name| name.starts_with(b"migration fault"))
        });
        pair.moved(&json!({"mode": mode}), LIMIT);
        assert_settled(&mut pair);
    }
}

#[test]
fn both_sides_find_each_other_after_any_word_was_lost() {
    for (mode, message) in [
        ("PostCopy", "TakenOver"),
        ("PostCopy", "Complete"),
        ("Hybrid", "TakenOver"),
        ("Hybrid", "Complete"),
    ] {
        let mut pair = cut(mode, Way::Back, message);
        pair.arrived(LIMIT);
        assert_settled(&mut pair);
    }
}

#[test]
fn a_flipped_bit_is_found_while_memory_follows() {
    for (way, name) in [
        (Way::There, "Pages"),
        (Way::Back, "Need"),
        (Way::There, "MemorySent"),
        (Way::Back, "Complete"),
    ] {
        let mut pair = Pair::start(&setup(Link::Tcp, true));
        pair.assert_runs_on(Side::Source);
        proxy(&pair).trap(Way::Back, Place::Behind, "TakenOver", Harm::Stall);
        pair.send(&json!({"mode": "PostCopy"}));
        pair.wait(Side::Target, &[MigrationPhase::PostCopy], LIMIT);
        sprung(&pair);
        proxy(&pair).trap(way, Place::Before, name, Harm::Flip);
        if name == "Need" {
            // Else everything may have come before the guest waits for anything.
            pair.wait_until(Side::Target, LIMIT, |status| status.faults > 0);
        }
        proxy(&pair).go_on();
        pair.arrived(LIMIT);
        assert!(proxy(&pair).is_spent(), "{name}");
        assert_settled(&mut pair);
    }
}

#[test]
fn a_source_does_not_wait_for_a_target_that_has_ended() {
    let mut pair = Pair::start(&Setup {
        args: "bare.touch=100",
        ..setup(Link::Unix, true)
    });
    proxy(&pair).inject(Fault {
        connection: 0,
        way: Way::There,
        at: 8 << 20,
        harm: Harm::Stall,
    });
    pair.send(&json!({"mode": "PostCopy", "compression": "None"}));
    sprung(&pair);
    pair.api(Side::Target).vm.signal(libc::SIGKILL);
    pair.end_of(Side::Target);
    proxy(&pair).go_on();
    let status = pair.wait(Side::Source, &[MigrationPhase::Lost], LIMIT);
    assert!(status.error.unwrap().contains("has ended"));
    assert_eq!(pair.end_of(Side::Source), 1);
}

#[test]
fn people_may_give_up_a_target_that_is_lost() {
    let mut pair = Pair::start(&setup(Link::Tcp, true));
    proxy(&pair).trap(Way::Back, Place::Behind, "TakenOver", Harm::Stall);
    pair.send(&json!({"mode": "PostCopy"}));
    pair.wait(Side::Source, &[MigrationPhase::PostCopy], LIMIT);
    sprung(&pair);
    pair.api(Side::Target).vm.signal(libc::SIGKILL);
    pair.end_of(Side::Target);
    proxy(&pair).cut();
    proxy(&pair).go_on();
    pair.wait(Side::Source, &[MigrationPhase::PostCopyInterrupted], LIMIT);
    may_not_run(&pair, Side::Source, "runs at the target");
    pair.assert_runs_nowhere(Duration::from_millis(100));
    pair.patch(Side::Source, &json!({"decision": "Abandon"}));
    let status = pair.wait(Side::Source, &[MigrationPhase::Lost], LIMIT);
    assert!(
        status.error.as_ref().unwrap().contains("given up"),
        "{status:?}"
    );
    assert_eq!(pair.end_of(Side::Source), 1);
}

#[test]
fn nobody_decides_that_a_guest_runs_without_its_memory() {
    let mut pair = Pair::start(&setup(Link::Tcp, true));
    pair.assert_runs_on(Side::Source);
    proxy(&pair).trap(Way::There, Place::Before, "Commit", Harm::Stall);
    pair.send(&json!({"mode": "PostCopy"}));
    sprung(&pair);
    proxy(&pair).cut();
    proxy(&pair).go_on();
    pair.wait(Side::Target, &[MigrationPhase::InDoubt], LIMIT);
    may_not_run(&pair, Side::Target, "still at the source");
    proxy(&pair).mend();
    pair.arrived(LIMIT);
    assert_settled(&mut pair);
}

#[test]
fn a_guest_gets_its_memory_without_the_connection_that_it_would_ask_on() {
    let mut pair = Pair::start(&setup(Link::Tcp, true));
    pair.assert_runs_on(Side::Source);
    pair.send(&json!({"mode": "Hybrid", "max_downtime_ms": 1, "bandwidth_limit": 20_000_000}));
    pair.wait_until(Side::Source, LIMIT, |status| status.bytes > 1 << 20);
    proxy(&pair).drop_connection(1);
    pair.arrived(LIMIT);
    assert_settled(&mut pair);
}

#[test]
fn a_guest_waits_for_its_memory_behind_a_slow_network() {
    let mut pair = Pair::start(&setup(Link::TwoHosts, false));
    pair.assert_runs_on(Side::Source);
    let lan = pair.lan.as_ref().unwrap();
    lan.slow_down("2mbit");
    pair.send(&json!({"mode": "PostCopy"}));
    pair.wait(Side::Target, &[MigrationPhase::PostCopy], LIMIT);
    thread::sleep(Duration::from_secs(2));
    let status = pair.progress(Side::Target);
    assert_eq!(status.phase, MigrationPhase::PostCopy, "{status:?}");
    assert!(status.remaining_pages > 10_000, "{status:?}");
    pair.lan.as_ref().unwrap().speed_up();
    pair.arrived(LIMIT);
    assert_settled(&mut pair);
}

#[test]
fn a_target_says_when_the_source_is_lost_that_has_its_memory() {
    let mut pair = Pair::start(&setup(Link::Tcp, true));
    pair.assert_runs_on(Side::Source);
    proxy(&pair).trap(Way::There, Place::Before, "MemorySent", Harm::Stall);
    pair.send(&json!({"mode": "PostCopy"}));
    pair.wait(Side::Target, &[MigrationPhase::PostCopy], LIMIT);
    sprung(&pair);
    pair.api(Side::Source).vm.signal(libc::SIGKILL);
    pair.end_of(Side::Source);
    proxy(&pair).cut();
    proxy(&pair).go_on();
    let lost = [MigrationPhase::PostCopyInterrupted];
    let status = pair.wait(Side::Target, &lost, LIMIT);
    assert!(status.error.is_some(), "{status:?}");
}
