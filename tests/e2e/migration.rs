// SPDX-License-Identifier: Apache-2.0
//! A machine moves to another process: over each kind of connection, back and forth, and over
//! connections that break.

use std::time::Duration;

use brume_api::MigrationPhase;
use brume_tests::migration::{Link, Pair, Setup, Side};
use brume_tests::proxy::{Fault, Way};
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(60);
/// A guest that writes while it moves.
const WRITES: &str = "bare.touch=32 bare.rate=50";

#[test]
fn a_guest_moves_over_every_link_and_has_all_its_memory() {
    for link in [Link::Unix, Link::Tcp, Link::TwoHosts] {
        let mut pair = Pair::start(&Setup {
            args: WRITES,
            link,
            ..Setup::default()
        });
        pair.assert_runs_on(Side::Source);
        pair.moved(&json!({}), LIMIT);
        pair.live(Side::Target).hash();
    }
}

#[test]
fn what_is_told_of_the_downtime_is_what_the_guest_saw() {
    let mut pair = Pair::new("bare.touch=32");
    let longest = pair.live(Side::Source).gap().max_us;
    let status = pair.moved(&json!({}), LIMIT);
    let told = status.downtime.expect("a downtime").total_us;
    let gap = pair.live(Side::Target).gap();
    // A busy machine stops a guest as well.
    let slack = longest.max(10_000);
    assert!(
        gap.max_us.abs_diff(told) <= slack,
        "told {told} us, seen {gap:?}, at rest {longest} us"
    );
}

#[test]
fn a_machine_goes_back_and_forth() {
    let setup = Setup {
        args: WRITES,
        link: Link::TwoHosts,
        ..Setup::default()
    };
    let mut pair = Pair::start(&setup);
    for _ in 0..4 {
        pair.moved(&json!({}), LIMIT);
        pair.again(&setup);
    }
    pair.assert_runs_on(Side::Source);
    pair.live(Side::Source).hash();
}

#[test]
fn the_command_receives_as_the_api_does() {
    let mut pair = Pair::start(&Setup {
        args: WRITES,
        command: Some(&[]),
        ..Setup::default()
    });
    pair.moved(&json!({}), LIMIT);
    pair.live(Side::Target).hash();
}

#[test]
fn a_flipped_bit_leaves_the_machine_where_it_was() {
    let mut pair = Pair::start(&Setup {
        args: WRITES,
        link: Link::Tcp,
        proxied: true,
        ..Setup::default()
    });
    let proxy = pair.proxy.as_ref().expect("a proxy");
    let (connection, way) = (0, Way::There);
    proxy.inject(Fault::Flip {
        connection,
        way,
        at: 1 << 20,
    });
    pair.send(&json!({"compression": "None"}));
    let status = pair.wait(Side::Source, &[MigrationPhase::Failed], LIMIT);
    assert!(status.error.is_some(), "{status:?}");
    pair.assert_runs_on(Side::Source);
    pair.live(Side::Source).hash();
}
