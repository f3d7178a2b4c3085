// SPDX-License-Identifier: Apache-2.0
//! Moves with disks that go wrong: the machine keeps the disks that it has, and nothing is left of
//! the others.

use std::path::Path;

use brume_api::MigrationPhase;
use brume_tests::api::eventually;
use brume_tests::migration::{Link, Pair, Setup, Side};
use brume_tests::proxy::{Harm, Place, Way};
use serde_json::{Value, json};

use crate::migration::LIMIT;
use crate::migration_disks::{assert_moved, overrides, start, work_past};
use crate::migration_faults::{proxy, sprung};

/// A guest at work on disks in `folder`, and a process behind a bad connection that waits for all of
/// them. The guest does not go on there at once: the disks are compared before.
fn setup(folder: &Path, link: Link) -> Setup<'static> {
    Setup {
        link,
        proxied: link != Link::TwoHosts,
        receive: json!({"drive_overrides": overrides(folder), "resume_vm": false}),
        ..Setup::default()
    }
}

fn begin(folder: &Path, link: Link) -> Pair {
    let mut pair = Pair::start_with(&setup(folder, link), |api| start(api, folder, "Async"));
    work_past(pair.live(Side::Source), 100);
    pair
}

/// The guest may write faster than its disk is sent, and moves for all that.
fn with_disks() -> Value {
    json!({
        "with_disks": true, "connections": 2, "bandwidth_limit": 40 << 20,
        "timeout_s": 2, "on_timeout": "Force",
    })
}

/// Checks that the machine moves with all its disks.
#[track_caller]
fn assert_moves(pair: &mut Pair, folder: &Path) {
    pair.send(&with_disks());
    pair.arrived(LIMIT);
    assert_moved(folder);
    pair.live(Side::Target).resume();
    work_past(pair.live(Side::Target), 100);
}

#[test]
fn disks_move_between_two_hosts() {
    let folder = tempfile::tempdir().unwrap();
    let mut pair = begin(folder.path(), Link::TwoHosts);
    assert_moves(&mut pair, folder.path());
}

#[test]
fn a_connection_that_fails_leaves_the_machine_with_its_disks() {
    for (link, way, name, harm) in [
        (Link::Tcp, Way::There, "Disk", Harm::Cut),
        (Link::Tcp, Way::There, "Disk", Harm::Flip),
        (Link::Unix, Way::There, "DisksEnded", Harm::HangUp),
        (Link::Tcp, Way::There, "DisksEnded", Harm::Flip),
        (Link::Tcp, Way::Back, "DisksTaken", Harm::Cut),
        (Link::Tcp, Way::There, "Sent", Harm::Cut),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let mut pair = begin(folder.path(), link);
        proxy(&pair).trap(way, Place::Before, name, harm);
        pair.send(&with_disks());
        pair.wait(Side::Source, &[MigrationPhase::Failed], LIMIT);
        assert!(proxy(&pair).is_spent(), "{name}");
        pair.wait(Side::Target, &[MigrationPhase::Listening], LIMIT);
        let there = folder.path().join("disk-there");
        eventually("the file goes", || !there.exists());
        work_past(pair.live(Side::Source), 100);
        assert_moves(&mut pair, folder.path());
    }
}

#[test]
fn a_process_that_ends_takes_no_disk_with_it() {
    for (side, name) in [
        (Side::Target, "Disk"),
        (Side::Target, "DisksEnded"),
        (Side::Source, "Disk"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let mut pair = begin(folder.path(), Link::Tcp);
        proxy(&pair).trap(Way::There, Place::Before, name, Harm::Stall);
        pair.send(&with_disks());
        sprung(&pair);
        pair.api(side).vm.signal(libc::SIGKILL);
        pair.end_of(side);
        proxy(&pair).go_on();
        let there = folder.path().join("disk-there");
        if side == Side::Source {
            pair.wait(Side::Target, &[MigrationPhase::Listening], LIMIT);
            eventually("the file goes", || !there.exists());
            continue;
        }
        pair.wait(Side::Source, &[MigrationPhase::Failed], LIMIT);
        work_past(pair.live(Side::Source), 100);
        // Nobody could take it away; what is in it does not matter.
        assert!(there.exists());
        pair.replace_target(&setup(folder.path(), Link::Tcp));
        assert_moves(&mut pair, folder.path());
    }
}
