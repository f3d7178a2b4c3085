// SPDX-License-Identifier: Apache-2.0
//! Guests that go before their memory, and connections and processes that end at a bad moment.

use std::fs;
use std::time::Duration;

use brume_api::MigrationPhase;
use brume_tests::api::eventually;
use brume_tests::migration::{Link, Pair, Setup, Side};
use brume_tests::proxy::{Harm, Place, Proxy, Way};
use serde_json::json;

use crate::migration::{LIMIT, assert_settled};

/// A guest whose memory takes a while to follow.
fn setup(link: Link, proxied: bool) -> Setup<'static> {
    Setup {
        args: "bare.touch=64 bare.rate=20",
        link,
        proxied,
        ..Setup::default()
    }
}

fn proxy(pair: &Pair) -> &Proxy {
    pair.proxy.as_ref().unwrap()
}

/// A guest that has begun to go, whose connection breaks at a message.
fn cut(way: Way, place: Place, message: &'static str) -> Pair {
    let mut pair = Pair::start(&setup(Link::Tcp, true));
    pair.assert_runs_on(Side::Source);
    proxy(&pair).trap(way, place, message, Harm::Cut);
    pair.send(&json!({"mode": "PostCopy"}));
    pair
}

#[test]
fn a_guest_that_has_not_gone_on_stays_and_leaves_nothing_at_the_target() {
    for (way, message) in [(Way::There, "Sent"), (Way::Back, "Ready")] {
        let mut pair = cut(way, Place::Before, message);
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
        pair.moved(&json!({"mode": "PostCopy"}), LIMIT);
        assert_settled(&mut pair);
    }
}

#[test]
fn both_sides_find_each_other_after_any_word_was_lost() {
    for message in ["TakenOver", "Complete"] {
        let mut pair = cut(Way::Back, Place::Before, message);
        pair.wait(Side::Source, &[MigrationPhase::Completed], LIMIT);
        pair.wait(Side::Target, &[MigrationPhase::Completed], LIMIT);
        assert_settled(&mut pair);
    }
}

#[test]
fn a_source_does_not_wait_for_a_target_that_has_ended() {
    let mut pair = Pair::start(&Setup {
        args: "bare.touch=100",
        ..setup(Link::Unix, false)
    });
    pair.send(&json!({"mode": "PostCopy"}));
    pair.wait(Side::Source, &[MigrationPhase::PostCopy], LIMIT);
    pair.api(Side::Target).vm.signal(libc::SIGKILL);
    pair.end_of(Side::Target);
    eventually("it is over", || pair.progress(Side::Source).phase.is_over());
    let status = pair.progress(Side::Source);
    assert_eq!(status.phase, MigrationPhase::Failed);
    assert!(status.error.unwrap().contains("has ended"));
    pair.end_of(Side::Source);
}

#[test]
fn people_may_give_up_a_target_that_is_lost() {
    let mut pair = Pair::start(&setup(Link::Tcp, true));
    proxy(&pair).trap(Way::Back, Place::Behind, "TakenOver", Harm::Stall);
    pair.send(&json!({"mode": "PostCopy"}));
    pair.wait(Side::Source, &[MigrationPhase::PostCopy], LIMIT);
    pair.api(Side::Target).vm.signal(libc::SIGKILL);
    pair.end_of(Side::Target);
    proxy(&pair).cut();
    proxy(&pair).go_on();
    pair.wait(Side::Source, &[MigrationPhase::PostCopyInterrupted], LIMIT);
    let run = pair
        .api(Side::Source)
        .send("PATCH", "/migration", r#"{"decision": "Run"}"#);
    assert_eq!(run.status, 400, "{}", run.body);
    assert!(run.body.contains("runs at the target"), "{}", run.body);
    pair.assert_runs_nowhere(Duration::from_millis(100));
    pair.patch(Side::Source, &json!({"decision": "Abandon"}));
    eventually("it is over", || pair.progress(Side::Source).phase.is_over());
    let error = pair.progress(Side::Source).error.unwrap();
    assert!(error.contains("given up"), "{error}");
    pair.end_of(Side::Source);
}
