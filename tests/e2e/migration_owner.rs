// SPDX-License-Identifier: Apache-2.0
//! What the process does that a machine moves away from, besides sending it: it keeps the locks of
//! the disks, and does not end while the guest needs it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use brume_api::MigrationPhase;
use brume_tests::api::eventually;
use brume_tests::migration::{Link, Pair, Setup, Side};
use brume_tests::proxy::{Harm, Place, Way};
use serde_json::json;

use crate::block::disk;
use crate::migration::{LIMIT, WRITES, assert_settled};

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
