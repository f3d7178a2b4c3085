// SPDX-License-Identifier: Apache-2.0
//! Moves that go wrong: connections that break at the worst moment, processes that end, and people
//! who call it off. The machine runs on one side, goes on at full speed, and can still move.

use std::path::Path;
use std::thread;
use std::time::Duration;

use brume_api::{MigrationPhase, MigrationStatus};
use brume_tests::api::eventually;
use brume_tests::live::Live;
use brume_tests::migration::{Link, Pair, Setup, Side};
use brume_tests::proxy::{Fault, Harm, Place, Proxy, Way};
use serde_json::{Value, json};

use crate::migration::{LIMIT, WRITES, assert_settled, tracks};

/// What the guest of [`WRITES`] writes when nothing holds it back, in pages per second.
const PAGES: u64 = 50_000_000 / 4096;

/// A guest that writes, and a bad connection to another process.
fn setup(link: Link) -> Setup<'static> {
    Setup {
        args: WRITES,
        link,
        proxied: link != Link::TwoHosts,
        ..Setup::default()
    }
}

fn begin(link: Link) -> Pair {
    let mut pair = Pair::start(&setup(link));
    pair.assert_runs_on(Side::Source);
    pair
}

pub(crate) fn proxy(pair: &Pair) -> &Proxy {
    pair.proxy.as_ref().unwrap()
}

/// A move whose pages are what the guest has: a byte in it is a byte of a page.
fn plain() -> Value {
    json!({"compression": "None"})
}

/// A move that takes some seconds.
fn slow() -> Value {
    json!({"compression": "None", "bandwidth_limit": 10_000_000})
}

/// Waits until the move is over and the machine stays; how that is told.
#[track_caller]
pub(crate) fn kept(pair: &Pair, phase: MigrationPhase) -> String {
    let status = pair.wait(Side::Source, &[phase], LIMIT);
    assert!(status.downtime.is_none(), "{status:?}");
    assert_eq!(status.throttle_percent, 0);
    status.error.unwrap()
}

/// Checks that the machine is at the source as if nothing had been tried.
#[track_caller]
fn assert_stays(pair: &mut Pair) {
    assert_goes_on(pair);
    let source = pair.live(Side::Source);
    eventually("the guest is as fast as before", || {
        source.gap();
        thread::sleep(Duration::from_millis(200));
        let gap = source.gap();
        gap.pages * 1_000_000 > PAGES * gap.us / 2
    });
}

/// The same, but for its speed: others may use the processors.
#[track_caller]
pub(crate) fn assert_goes_on(pair: &mut Pair) {
    pair.assert_runs_on(Side::Source);
    pair.api(Side::Source).assert_alive("Running");
    let source = pair.live(Side::Source);
    source.hash();
    eventually("written pages are noted no more", || !tracks(&source.api));
    let pid = source.api.vm.pid();
    eventually("no thread is left", || !threads(pid).contains("migration"));
}

fn threads(pid: i32) -> String {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).ok();
    tasks.flatten().filter_map(name).collect()
}

/// Checks that the machine stays, and that it moves to the same target when it is asked again.
#[track_caller]
fn assert_stays_and_can_move(pair: &mut Pair) {
    assert_stays(pair);
    waits_again(pair);
    pair.moved(&json!({"connections": 2}), LIMIT);
    assert_settled(pair);
}

#[track_caller]
pub(crate) fn waits_again(pair: &Pair) -> MigrationStatus {
    pair.wait(Side::Target, &[MigrationPhase::Listening], LIMIT)
}

/// Waits until every fault has happened.
#[track_caller]
pub(crate) fn sprung(pair: &Pair) {
    eventually("what goes wrong has", || proxy(pair).is_spent());
}

/// Checks that a side does not let a person decide that the machine runs there, and says why.
#[track_caller]
pub(crate) fn may_not_run(pair: &Pair, side: Side, why: &str) {
    let body = r#"{"decision": "Run"}"#;
    let refused = pair.api(side).send("PATCH", "/migration", body);
    assert_eq!(refused.status, 400, "{}", refused.body);
    assert!(refused.body.contains(why), "{}", refused.body);
}

/// A pair whose move has begun and meets `harm` at a message.
#[track_caller]
fn trapped(link: Link, (way, place, message): (Way, Place, &'static str), harm: Harm) -> Pair {
    let pair = begin(link);
    proxy(&pair).trap(way, place, message, harm);
    pair.send(&plain());
    pair
}

#[test]
fn a_connection_that_breaks_before_the_hand_over_leaves_the_machine_where_it_was() {
    let at = 4 << 20;
    for (connection, link) in [(0, Link::Tcp), (0, Link::Unix), (2, Link::Tcp)] {
        let mut pair = begin(link);
        let way = Way::There;
        proxy(&pair).inject(Fault {
            connection,
            way,
            at,
            harm: Harm::Cut,
        });
        pair.send(&json!({"compression": "None", "connections": connection + 1}));
        let error = kept(&pair, MigrationPhase::Failed);
        assert!(!error.is_empty());
        assert!(waits_again(&pair).error.is_some());
        assert_stays_and_can_move(&mut pair);
    }
}

#[test]
fn a_connection_that_breaks_while_both_agree_leaves_the_machine_where_it_was() {
    for (way, place, message) in [
        (Way::There, Place::Before, "Hello"),
        (Way::Back, Place::Before, "Welcome"),
        (Way::There, Place::Behind, "Offer"),
        (Way::Back, Place::Behind, "Accepted"),
        (Way::Back, Place::Before, "PassTaken"),
    ] {
        let mut pair = trapped(Link::Tcp, (way, place, message), Harm::Cut);
        kept(&pair, MigrationPhase::Failed);
        assert_stays_and_can_move(&mut pair);
    }
}

#[test]
fn a_flipped_bit_is_found_and_leaves_the_machine_where_it_was() {
    // In pages of the first connection, in those of others, and in what the target says.
    for (connection, way, at) in [
        (0, Way::There, 1 << 20),
        (1, Way::There, 1 << 20),
        (2, Way::There, 4 << 20),
        (0, Way::Back, 100),
    ] {
        let mut pair = begin(Link::Tcp);
        proxy(&pair).inject(Fault {
            connection,
            way,
            at,
            harm: Harm::Flip,
        });
        pair.send(&json!({"compression": "None", "connections": 3}));
        let error = kept(&pair, MigrationPhase::Failed);
        let told = waits_again(&pair).error.unwrap();
        let text = "the checksum is wrong";
        // Only who has read it knows of it at first.
        assert!(error.contains(text), "{connection} {way:?}: {error}");
        let told_by = match way {
            Way::There => text,
            // It does not wait for the others then.
            Way::Back => "gone before all of its connections",
        };
        assert!(told.contains(told_by), "{told}");
        assert_stays_and_can_move(&mut pair);
    }
}

#[test]
fn a_flipped_bit_in_any_frame_leaves_the_machine_on_one_side() {
    for (way, name) in [
        (Way::There, "Hello"),
        (Way::Back, "Welcome"),
        (Way::There, "Offer"),
        (Way::There, "PassEnded"),
        (Way::Back, "PassTaken"),
        (Way::There, "State"),
        (Way::There, "Sent"),
        (Way::Back, "Ready"),
        (Way::There, "Commit"),
        (Way::Back, "TakenOver"),
        (Way::Back, "Running"),
    ] {
        let mut pair = trapped(Link::Tcp, (way, Place::Before, name), Harm::Flip);
        if end_of_move(&pair) == Side::Source {
            // After this one it is the target's.
            assert_ne!(name, "Running");
            assert_stays_and_can_move(&mut pair);
        } else {
            assert!(
                ["Ready", "Commit", "TakenOver", "Running"].contains(&name),
                "{name}"
            );
            assert_settled(&mut pair);
        }
    }
}

/// Waits until the faults of a move have happened and it is over; which side has the machine.
#[track_caller]
fn end_of_move(pair: &Pair) -> Side {
    sprung(pair);
    let over = [MigrationPhase::Completed, MigrationPhase::Failed];
    let status = pair.wait(Side::Source, &over, LIMIT);
    if status.phase == MigrationPhase::Completed {
        pair.wait(Side::Target, &over, LIMIT);
        Side::Target
    } else {
        waits_again(pair);
        Side::Source
    }
}

#[test]
fn a_connection_that_breaks_before_the_target_is_ready_brings_the_guest_back() {
    for (way, place, message) in [
        (Way::There, Place::Before, "Sent"),
        (Way::Back, Place::Before, "Ready"),
    ] {
        let mut pair = trapped(Link::Tcp, (way, place, message), Harm::Cut);
        kept(&pair, MigrationPhase::Failed);
        // A target that had everything is told that it is not needed.
        assert_stays_and_can_move(&mut pair);
    }
}

#[test]
fn both_sides_find_each_other_after_the_commit_was_lost() {
    for (way, place, message) in [
        // The answer may be quicker than the cut.
        (Way::There, Place::Behind, "Sent"),
        (Way::Back, Place::Behind, "Ready"),
        (Way::There, Place::Before, "Commit"),
        (Way::There, Place::Behind, "Commit"),
        (Way::Back, Place::Before, "TakenOver"),
        (Way::Back, Place::Behind, "TakenOver"),
    ] {
        let mut pair = trapped(Link::Tcp, (way, place, message), Harm::Cut);
        if end_of_move(&pair) == Side::Source {
            // It had not sent its commit yet.
            assert!(message == "Sent" || message == "Ready", "{message}");
            assert_stays_and_can_move(&mut pair);
        } else {
            assert_settled(&mut pair);
        }
    }
}

/// A machine whose commit was lost, and with it the connection.
pub(crate) fn in_doubt() -> Pair {
    let pair = trapped(
        Link::Tcp,
        (Way::There, Place::Before, "Commit"),
        Harm::Stall,
    );
    sprung(&pair);
    proxy(&pair).cut();
    proxy(&pair).go_on();
    for side in [Side::Source, Side::Target] {
        pair.wait(side, &[MigrationPhase::InDoubt], LIMIT);
    }
    pair.assert_runs_nowhere(Duration::from_millis(300));
    pair
}

#[test]
fn nobody_runs_the_machine_in_doubt_until_the_connection_is_back() {
    let mut pair = in_doubt();
    for side in [Side::Source, Side::Target] {
        let refused = pair.cancel(side);
        assert_eq!(refused.status, 400, "{}", refused.body);
        assert!(refused.body.contains("handed over"), "{}", refused.body);
    }
    proxy(&pair).mend();
    pair.arrived(LIMIT);
    assert_settled(&mut pair);
}

#[test]
fn people_decide_when_the_target_is_lost() {
    let mut pair = in_doubt();
    pair.api(Side::Target).vm.signal(libc::SIGKILL);
    pair.end_of(Side::Target);
    pair.assert_runs_nowhere(Duration::from_millis(300));
    pair.patch(Side::Source, &json!({"decision": "Run"}));
    eventually("it stays", || pair.progress(Side::Source).phase.is_over());
    assert_eq!(pair.progress(Side::Source).phase, MigrationPhase::Failed);
    pair.replace_target(&setup(Link::Tcp));
    pair.assert_runs_on(Side::Source);
    let refused = pair
        .api(Side::Source)
        .send("PATCH", "/migration", r#"{"decision": "Run"}"#);
    assert_eq!(refused.status, 400, "{}", refused.body);
    proxy(&pair).mend();
    assert_stays_and_can_move(&mut pair);
}

#[test]
fn people_decide_when_the_source_is_lost() {
    let mut pair = in_doubt();
    pair.api(Side::Source).vm.signal(libc::SIGKILL);
    pair.end_of(Side::Source);
    pair.assert_runs_nowhere(Duration::from_millis(300));
    pair.patch(Side::Target, &json!({"decision": "Run"}));
    pair.wait(Side::Target, &[MigrationPhase::Completed], LIMIT);
    pair.assert_runs_on(Side::Target);
    pair.live(Side::Target).hash();
}

#[test]
fn people_may_give_a_machine_up() {
    let mut pair = in_doubt();
    pair.patch(Side::Target, &json!({"decision": "Abandon"}));
    assert!(waits_again(&pair).error.unwrap().contains("given up"));
    pair.assert_runs_nowhere(Duration::from_millis(100));
    // The source learns of it.
    proxy(&pair).mend();
    kept(&pair, MigrationPhase::Failed);
    assert_stays_and_can_move(&mut pair);

    let mut pair = in_doubt();
    pair.patch(Side::Source, &json!({"decision": "Abandon"}));
    pair.wait(Side::Source, &[MigrationPhase::Lost], LIMIT);
    assert_eq!(pair.end_of(Side::Source), 1);
    pair.patch(Side::Target, &json!({"decision": "Run"}));
    pair.wait(Side::Target, &[MigrationPhase::Completed], LIMIT);
    pair.assert_runs_on(Side::Target);
    pair.live(Side::Target).hash();
}

#[test]
fn a_relay_that_ends_does_not_make_two_machines_of_one() {
    // It ends both connections in order, as if both processes had ended.
    for (way, place, message) in [
        (Way::There, Place::Behind, "Sent"),
        (Way::Back, Place::Before, "Ready"),
        (Way::Back, Place::Behind, "Ready"),
        (Way::There, Place::Before, "Commit"),
        (Way::There, Place::Behind, "Commit"),
        (Way::Back, Place::Before, "TakenOver"),
    ] {
        let mut pair = trapped(Link::Tcp, (way, place, message), Harm::HangUp);
        let side = end_of_move(&pair);
        pair.assert_runs_on(side);
    }
}

#[test]
fn a_target_that_is_killed_leaves_the_machine_where_it_was() {
    for (way, place, message) in [
        (Way::Back, Place::Before, "Welcome"),
        (Way::Back, Place::Before, "Accepted"),
        (Way::Back, Place::Before, "PassTaken"),
        (Way::There, Place::Before, "Sent"),
        (Way::There, Place::Before, "Commit"),
    ] {
        let mut pair = trapped(Link::Unix, (way, place, message), Harm::Stall);
        sprung(&pair);
        pair.api(Side::Target).vm.signal(libc::SIGKILL);
        pair.end_of(Side::Target);
        proxy(&pair).go_on();
        kept(&pair, MigrationPhase::Failed);
        pair.replace_target(&setup(Link::Unix));
        assert_stays_and_can_move(&mut pair);
    }
}

#[test]
fn a_target_that_is_stopped_gives_back_a_machine_that_it_does_not_run_yet() {
    // It says so: over TCP the end of the connection says nothing.
    let mut pair = trapped(Link::Tcp, (Way::There, Place::Before, "Commit"), Harm::Hold);
    sprung(&pair);
    pair.api(Side::Target).vm.signal(libc::SIGTERM);
    let error = kept(&pair, MigrationPhase::Failed);
    assert!(error.contains("process is about to end"), "{error}");
    pair.end_of(Side::Target);
    proxy(&pair).go_on();
    pair.replace_target(&setup(Link::Tcp));
    assert_stays_and_can_move(&mut pair);
}

#[test]
fn a_target_waits_for_another_machine_after_the_source_was_killed() {
    for (way, place, message) in [
        (Way::Back, Place::Before, "Welcome"),
        (Way::Back, Place::Before, "Accepted"),
        (Way::Back, Place::Before, "PassTaken"),
        (Way::There, Place::Before, "Sent"),
    ] {
        let mut pair = trapped(Link::Tcp, (way, place, message), Harm::Stall);
        sprung(&pair);
        pair.api(Side::Source).vm.signal(libc::SIGKILL);
        pair.end_of(Side::Source);
        // What was on its way has to be lost.
        proxy(&pair).drop_connection(0);
        proxy(&pair).go_on();
        assert!(waits_again(&pair).error.is_some());
        pair.assert_runs_nowhere(Duration::from_millis(50));
        pair.replace_source(Live::start(WRITES, &[]));
        pair.moved(&json!({}), LIMIT);
        assert_settled(&mut pair);
    }
}

#[test]
fn a_source_that_is_killed_after_it_has_sent_everything_leaves_the_machine_to_the_target() {
    let mut pair = trapped(Link::Unix, (Way::Back, Place::Before, "Ready"), Harm::Stall);
    sprung(&pair);
    pair.api(Side::Source).vm.signal(libc::SIGKILL);
    pair.end_of(Side::Source);
    proxy(&pair).go_on();
    pair.wait(Side::Target, &[MigrationPhase::Completed], LIMIT);
    pair.assert_runs_on(Side::Target);
    pair.live(Side::Target).hash();
}

#[test]
fn a_connection_that_stalls_for_a_while_carries_the_machine_all_the_same() {
    let mut pair = begin(Link::Tcp);
    let (connection, way) = (0, Way::There);
    proxy(&pair).inject(Fault {
        connection,
        way,
        at: 4 << 20,
        harm: Harm::Stall,
    });
    pair.send(&plain());
    sprung(&pair);
    thread::sleep(Duration::from_secs(2));
    pair.assert_runs_on(Side::Source);
    proxy(&pair).go_on();
    pair.arrived(LIMIT);
    assert_settled(&mut pair);
}

#[test]
fn a_connection_that_stalls_for_too_long_leaves_the_machine_where_it_was() {
    for message in ["Sent", "PassEnded"] {
        let mut pair = trapped(Link::Tcp, (Way::There, Place::Before, message), Harm::Stall);
        sprung(&pair);
        let error = kept(&pair, MigrationPhase::Failed);
        assert!(
            error.contains("answer") || error.contains("too long"),
            "{error}"
        );
        assert_stays(&mut pair);
        proxy(&pair).go_on();
        assert_stays_and_can_move(&mut pair);
    }
}

#[test]
fn a_slow_network_leaves_the_guest_alone() {
    let mut pair = begin(Link::TwoHosts);
    pair.lan.as_ref().unwrap().slow_down("1mbit");
    pair.send(&plain());
    pair.wait(Side::Source, &[MigrationPhase::PreCopy], LIMIT);
    thread::sleep(Duration::from_secs(2));
    let status = pair.progress(Side::Source);
    assert_eq!(status.phase, MigrationPhase::PreCopy);
    assert!(status.bytes < 8 << 20, "{status:?}");
    pair.assert_runs_on(Side::Source);
    assert_eq!(pair.cancel(Side::Source).status, 204);
    kept(&pair, MigrationPhase::Cancelled);
    assert_stays(&mut pair);
    pair.lan.as_ref().unwrap().speed_up();
    assert_stays_and_can_move(&mut pair);
}

#[test]
fn a_pulled_plug_leaves_the_machine_where_it_was() {
    let mut pair = begin(Link::TwoHosts);
    pair.send(&slow());
    pair.wait_until(Side::Source, LIMIT, |status| status.bytes > 1 << 20);
    pair.lan.as_ref().unwrap().unplug();
    assert_eq!(pair.cancel(Side::Source).status, 204);
    kept(&pair, MigrationPhase::Cancelled);
    assert_stays(&mut pair);
    pair.lan.as_ref().unwrap().plug_in();
}

#[test]
fn a_move_is_called_off_in_every_phase() {
    for (way, place, message) in [
        (Way::Back, Place::Before, "Welcome"),
        (Way::Back, Place::Before, "Accepted"),
        (Way::Back, Place::Before, "PassTaken"),
        (Way::There, Place::Before, "Sent"),
        (Way::Back, Place::Before, "Ready"),
    ] {
        let mut pair = trapped(Link::Unix, (way, place, message), Harm::Stall);
        sprung(&pair);
        let twice = pair.try_send(&plain());
        assert_eq!(twice.status, 400, "{}", twice.body);
        let pause = pair
            .api(Side::Source)
            .send("PATCH", "/vm", r#"{"state": "Paused"}"#);
        assert_eq!(pause.status, 400, "{}", pause.body);
        assert_eq!(pair.cancel(Side::Source).status, 204, "{message}");
        proxy(&pair).go_on();
        let error = kept(&pair, MigrationPhase::Cancelled);
        assert!(error.contains("called off"), "{error}");
        let again = pair.cancel(Side::Source);
        assert_eq!(again.status, 400, "{}", again.body);
        assert_stays_and_can_move(&mut pair);
    }
}

#[test]
fn a_move_over_several_connections_is_called_off_at_any_moment() {
    let mut pair = begin(Link::Tcp);
    for bytes in [1, 3 << 20, 5 << 20, 8 << 20, 9 << 20] {
        let fast = json!({"connections": 4, "bandwidth_limit": 30_000_000, "max_downtime_ms": 1});
        pair.send(&fast);
        pair.wait_until(Side::Source, LIMIT, |status| status.bytes >= bytes);
        assert_eq!(pair.cancel(Side::Source).status, 204);
        kept(&pair, MigrationPhase::Cancelled);
        waits_again(&pair);
    }
    assert_stays_and_can_move(&mut pair);
}

#[test]
fn what_was_not_agreed_on_at_the_start_is_refused_later() {
    let balloon = json!({"amount_mib": 1, "deflate_on_oom": false});
    let mut pair = Pair::start(&Setup {
        parts: &[("/balloon", balloon)],
        ..setup(Link::Tcp)
    });
    pair.assert_runs_on(Side::Source);
    pair.send(&slow());
    pair.wait_until(Side::Source, LIMIT, |status| status.bytes > 1 << 20);
    for (path, body, text) in [
        (
            "/migration",
            r#"{"on_timeout": "PostCopy"}"#,
            "when its move began",
        ),
        ("/balloon", r#"{"amount_mib": 2}"#, "is being moved"),
    ] {
        let refused = pair.api(Side::Source).send("PATCH", path, body);
        assert_eq!(refused.status, 400, "{}", refused.body);
        assert!(refused.body.contains(text), "{}", refused.body);
    }
    pair.patch(
        Side::Source,
        &json!({"on_timeout": "Force", "bandwidth_limit": 0}),
    );
    pair.arrived(LIMIT);
    assert_settled(&mut pair);
}

#[test]
fn a_move_is_called_off_while_the_target_is_looked_for() {
    let mut pair = begin(Link::TwoHosts);
    // Nobody says that there is no such host.
    pair.lan.as_ref().unwrap().unplug();
    pair.send(&plain());
    pair.wait(Side::Source, &[MigrationPhase::Connecting], LIMIT);
    assert_eq!(pair.cancel(Side::Source).status, 204);
    kept(&pair, MigrationPhase::Cancelled);
    assert_stays(&mut pair);
    pair.lan.as_ref().unwrap().plug_in();
    assert_stays_and_can_move(&mut pair);
}

#[test]
fn a_move_that_is_called_off_too_late_goes_on() {
    let mut pair = trapped(
        Link::Unix,
        (Way::Back, Place::Before, "TakenOver"),
        Harm::Stall,
    );
    sprung(&pair);
    pair.cancel(Side::Source);
    proxy(&pair).go_on();
    pair.arrived(LIMIT);
    assert_settled(&mut pair);
}

#[test]
fn a_target_that_calls_it_off_leaves_the_machine_where_it_was() {
    let mut pair = Pair::start(&Setup {
        proxied: false,
        ..setup(Link::Unix)
    });
    pair.assert_runs_on(Side::Source);
    let listen = pair.destination();
    let socket = Path::new(listen.strip_prefix("unix:").unwrap());
    for moving in [true, false] {
        if moving {
            pair.send(&slow());
            pair.wait(Side::Target, &[MigrationPhase::PreCopy], LIMIT);
        }
        assert_eq!(pair.cancel(Side::Target).status, 204);
        let status = pair.wait(Side::Target, &[MigrationPhase::Cancelled], LIMIT);
        assert!(status.error.unwrap().contains("called off"));
        eventually("the socket is gone", || !socket.exists());
        if moving {
            kept(&pair, MigrationPhase::Failed);
        }
        assert_stays(&mut pair);
        // It can be asked again.
        let target = pair.api(Side::Target);
        target.done("PUT", "/migration/receive", &json!({"listen": listen}));
    }
    pair.moved(&json!({}), LIMIT);
    assert_settled(&mut pair);
    assert!(!socket.exists());
}

#[test]
fn a_machine_that_ends_while_it_moves_does_not_go_on_at_the_target() {
    for (signal, status) in [(Some(libc::SIGTERM), None), (None, Some(0))] {
        let mut pair = begin(Link::Unix);
        pair.send(&slow());
        pair.wait_until(Side::Source, LIMIT, |status| status.bytes > 1 << 20);
        match signal {
            Some(signal) => pair.api(Side::Source).vm.signal(signal),
            // The guest powers itself off.
            None => pair.live(Side::Source).api.vm.send(b"p"),
        }
        let end = pair.end_of(Side::Source);
        assert!(status.is_none_or(|status| status == end), "{end}");
        assert!(waits_again(&pair).error.is_some());
        pair.assert_runs_nowhere(Duration::from_millis(100));
        let socket = proxy(&pair).connections();
        assert_eq!(socket, 1);
    }
}

#[test]
fn tracking_that_a_client_wanted_goes_on_after_a_failure() {
    let tracked = json!({"vcpu_count": 1, "mem_size_mib": 64, "track_dirty_pages": true});
    let mut pair = Pair::start(&Setup {
        parts: &[("/machine-config", tracked)],
        ..setup(Link::Tcp)
    });
    pair.assert_runs_on(Side::Source);
    pair.send(&slow());
    pair.wait_until(Side::Source, LIMIT, |status| status.bytes > 1 << 20);
    proxy(&pair).cut();
    kept(&pair, MigrationPhase::Failed);
    pair.assert_runs_on(Side::Source);
    assert!(tracks(pair.api(Side::Source)));
    proxy(&pair).mend();
    waits_again(&pair);
    pair.moved(&json!({}), LIMIT);
    pair.live(Side::Target).hash();
}
