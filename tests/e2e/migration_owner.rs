// SPDX-License-Identifier: Apache-2.0
//! What the process does that a machine moves away from, besides sending it: it keeps the locks of
//! the disks, and does not end while the guest needs it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use brume_api::MigrationPhase;
use brume_tests::api::eventually;
use brume_tests::migration::{Link, Pair, Setup, Side};
use brume_tests::proxy::{Harm, Place, Way};
use serde_json::json;

use crate::block::disk;
use crate::migration::{LIMIT, WRITES, assert_settled};
use crate::migration_resume::interrupted;

/// Whether anybody has locked a file.
fn is_locked(path: &Path) -> bool {
    let inode = format!(":{} ", fs::metadata(path).unwrap().ino());
    let locks = fs::read_to_string("/proc/locks").unwrap();
    locks.contains(&inode)
}

#[test]
fn a_machine_that_stays_gets_the_locks_of_its_disks_back() {
    let (_folder, path) = disk();
    let drive = json!({
        "drive_id": "d", "is_root_device": false, "path_on_host": path, "lock": true,
    });
    let mut pair = Pair::start(&Setup {
        args: WRITES,
        parts: &[("/drives/d", drive)],
        link: Link::Tcp,
        proxied: true,
        ..Setup::default()
    });
    assert!(is_locked(&path));
    // The target has all, the locks too, and keeps them until it hears that nothing comes of it.
    let proxy = pair.proxy.as_ref().unwrap();
    proxy.trap(Way::Back, Place::Before, "Ready", Harm::Cut);
    pair.send(&json!({}));
    pair.wait(Side::Source, &[MigrationPhase::Failed], LIMIT);
    pair.assert_runs_on(Side::Source);
    pair.wait(Side::Target, &[MigrationPhase::Listening], LIMIT);
    eventually("the disk is locked again", || is_locked(&path));
    eventually("and that is told", || {
        let log = pair.api(Side::Source).log();
        log.matches("is not locked").count() == 1 && log.matches("locked again").count() == 1
    });
    pair.moved(&json!({}), LIMIT);
    assert!(is_locked(&path));
    assert_settled(&mut pair);
}

fn terminate(pair: &Pair, told: &str) {
    let source = pair.api(Side::Source);
    source.vm.signal(libc::SIGTERM);
    eventually("it is told what that does", || source.log().contains(told));
}

#[test]
fn a_process_that_the_guest_needs_does_not_end_before_the_guest_has_all_memory() {
    let mut pair = interrupted();
    let stop = json!({"state": "Stopped"}).to_string();
    let refused = pair.api(Side::Source).send("PATCH", "/vm", &stop);
    assert_eq!(refused.status, 400, "{refused:?}");
    assert!(
        refused.body.contains("needs memory from here"),
        "{refused:?}"
    );
    terminate(&pair, "a second signal ends it at once");
    thread::sleep(Duration::from_secs(3));
    let phase = pair.progress(Side::Source).phase;
    assert_eq!(phase, MigrationPhase::PostCopyInterrupted);
    pair.proxy.as_ref().unwrap().mend();
    pair.wait(Side::Target, &[MigrationPhase::Completed], LIMIT);
    assert_settled(&mut pair);
}

#[test]
fn a_second_signal_ends_a_process_that_the_guest_needs() {
    let mut pair = interrupted();
    terminate(&pair, "a second signal ends it at once");
    terminate(&pair, "cannot go on there");
    assert_ne!(pair.end_of(Side::Source), 0);
}

#[test]
fn a_machine_is_not_paused_while_its_memory_follows() {
    let mut pair = interrupted();
    let pause = json!({"state": "Paused"}).to_string();
    let refused = pair.api(Side::Target).send("PATCH", "/vm", &pause);
    assert_eq!(refused.status, 400, "{refused:?}");
    assert!(
        refused.body.contains("still where it came from"),
        "{refused:?}"
    );
    pair.proxy.as_ref().unwrap().mend();
    pair.wait(Side::Target, &[MigrationPhase::Completed], LIMIT);
    pair.live(Side::Target).pause();
    pair.live(Side::Target).resume();
    assert_settled(&mut pair);
}
