// SPDX-License-Identifier: Apache-2.0
//! A machine that has lost its way at the hand-over, or whose memory has later: people say at which
//! other address it goes on, from the command line.

use std::thread;
use std::time::Duration;

use brume_api::{MigrationPhase, MigrationStatus};
use brume_tests::migration::{Link, Pair, Setup, Side};
use brume_tests::proxy::{Fault, Harm, Proxy, Way};
use brume_tests::vm::{Outcome, SOON, outcome};
use serde_json::json;

use crate::migration::{LIMIT, WRITES, assert_settled};
use crate::migration_faults::{in_doubt, proxy, sprung};

/// How much of the memory goes the first way, in bytes.
const FIRST_WAY: u64 = 8 << 20;
/// What the guest has written, in bytes.
const TOUCHED: u64 = 32 << 20;
/// Longer than a source waits between two tries to find its target again.
const SOME_TRIES: Duration = Duration::from_secs(2);

fn setup() -> Setup<'static> {
    Setup {
        args: WRITES,
        link: Link::Tcp,
        proxied: true,
        ..Setup::default()
    }
}

/// A machine that runs at the target, whose memory has come in part, and whose line is cut for good.
pub(crate) fn interrupted() -> Pair {
    let mut pair = Pair::start(&setup());
    pair.assert_runs_on(Side::Source);
    proxy(&pair).inject(Fault {
        connection: 0,
        way: Way::There,
        at: FIRST_WAY,
        harm: Harm::Stall,
    });
    pair.send(&json!({"mode": "PostCopy", "compression": "None"}));
    sprung(&pair);
    proxy(&pair).cut();
    proxy(&pair).go_on();
    for side in [Side::Source, Side::Target] {
        let interrupted = [MigrationPhase::PostCopyInterrupted];
        pair.wait(side, &interrupted, LIMIT);
    }
    pair
}

fn ctl(pair: &Pair, side: Side, words: &[&str]) -> Outcome {
    let words = ["migrate"].iter().chain(words);
    outcome(pair.api(side).ctl(words), SOON)
}

#[track_caller]
fn has_come(pair: &mut Pair) -> MigrationStatus {
    let status = pair.arrived(LIMIT);
    assert_settled(pair);
    status
}

#[test]
fn a_machine_in_doubt_finds_its_target_at_another_address() {
    let mut pair = in_doubt();
    let folder = pair.api(Side::Source).folder();
    let nobody = format!("unix:{}", folder.join("nobody.sock").display());
    // It is a try like any other: nobody is there.
    ctl(&pair, Side::Source, &["--resume", &nobody]).assert_clean();
    thread::sleep(SOME_TRIES);
    assert_eq!(pair.progress(Side::Source).phase, MigrationPhase::InDoubt);
    let second = Proxy::new(pair.listens_at().clone(), folder);
    let address = second.address().to_string();
    ctl(&pair, Side::Source, &["--resume", &address]).assert_clean();
    let status = has_come(&mut pair);
    assert_eq!(status.peer, Some(address));
}

#[test]
fn memory_goes_on_at_another_address_when_the_first_stays_lost() {
    let mut pair = interrupted();
    let first = proxy(&pair).bytes(Way::There);
    let folder = pair.api(Side::Source).folder();
    let second = Proxy::new(pair.listens_at().clone(), folder);
    thread::sleep(SOME_TRIES);
    // By itself it does not find the way.
    let phase = pair.progress(Side::Source).phase;
    assert_eq!(phase, MigrationPhase::PostCopyInterrupted);
    assert_eq!(second.connections(), 0);
    let address = second.address().to_string();
    ctl(&pair, Side::Source, &["--resume", &address]).assert_clean();
    let status = has_come(&mut pair);
    assert_eq!((status.error, status.peer), (None, Some(address)));
    assert_eq!(proxy(&pair).bytes(Way::There), first);
    // What the target lacks: what was on its way is lost.
    let bytes = second.bytes(Way::There);
    let enough = first + bytes > TOUCHED && bytes < TOUCHED / 20 * 21;
    assert!(enough, "{first} and then {bytes}");
}

#[test]
fn memory_goes_on_at_the_second_address_that_people_try() {
    let mut pair = interrupted();
    let folder = pair.api(Side::Source).folder().join("nobody.sock");
    let nobody = format!("unix:{}", folder.display());
    // It is a try like any other: nobody is there.
    ctl(&pair, Side::Source, &["--resume", &nobody]).assert_clean();
    thread::sleep(SOME_TRIES);
    let phase = pair.progress(Side::Source).phase;
    assert_eq!(phase, MigrationPhase::PostCopyInterrupted);
    let address = pair.listens_at().to_string();
    ctl(&pair, Side::Source, &["--resume", &address]).assert_clean();
    let status = has_come(&mut pair);
    assert_eq!((status.error, status.peer), (None, Some(address)));
}

#[test]
fn memory_goes_on_where_it_was_when_no_address_is_said() {
    let mut pair = interrupted();
    let there = pair.destination();
    // In vain for now; it goes on trying.
    ctl(&pair, Side::Source, &["--resume"]).assert_clean();
    proxy(&pair).mend();
    let status = has_come(&mut pair);
    assert_eq!((status.error, status.peer), (None, Some(there)));
}

#[test]
fn the_command_says_when_there_is_nothing_to_resume() {
    let mut pair = Pair::start(&setup());
    pair.assert_runs_on(Side::Source);
    let refused = |pair: &Pair, side, words: &[&str], why: &str| {
        let end = ctl(pair, side, words);
        assert_eq!((end.status, &*end.stdout), (8, ""), "{end:?}");
        assert!(end.stderr.contains(why), "{end:?}");
    };
    let to = pair.destination();
    for side in [Side::Source, Side::Target] {
        let why = match side {
            Side::Source => "The machine is not being moved",
            Side::Target => "at the source",
        };
        refused(&pair, side, &["--resume"], why);
        refused(&pair, side, &["--resume", &to], why);
    }
    // A move that goes on by itself, and would take what is said now for an address later on.
    pair.send(&json!({"compression": "None", "bandwidth_limit": 1_000_000}));
    pair.wait(Side::Source, &[MigrationPhase::PreCopy], LIMIT);
    refused(
        &pair,
        Side::Source,
        &["--resume"],
        "There is nothing to resume",
    );
    refused(
        &pair,
        Side::Source,
        &["--resume", "there"],
        "`tcp:HOST:PORT`",
    );
    pair.patch(Side::Source, &json!({"bandwidth_limit": 0}));
    has_come(&mut pair);
}
