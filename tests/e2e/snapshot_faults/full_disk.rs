// SPDX-License-Identifier: Apache-2.0
//! A disk that gets full: the save is refused, and nothing is lost by it.

use std::path::{Path, PathBuf};
use std::process::Command;

use brume_tests::live::{Live, Snapshot};
use brume_tests::vm::{SOON, brume, outcome};
use serde_json::json;
use tempfile::TempDir;

use super::{assert_works, run, unfinished};

/// A file system of some bytes.
struct Small {
    mount: PathBuf,
    _folder: TempDir,
}

impl Small {
    fn new(bytes: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mount = folder.path().join("mount");
        std::fs::create_dir(&mount).unwrap();
        let size = format!("size={bytes}");
        let args = ["-t", "tmpfs", "-o", &size, "tmpfs"].map(std::ffi::OsStr::new);
        let made = Self {
            mount,
            _folder: folder,
        };
        run("mount", &[&args[..], &[made.mount.as_os_str()]].concat());
        made
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // It fails if it was never mounted.
        let _ = Command::new("umount").arg(&self.mount).output();
    }
}

/// Has the machine save itself, which fails for want of room in `file`.
#[track_caller]
fn assert_no_room(live: &Live, kind: &str, files: &Snapshot, file: &Path) {
    let request = files.create_request(kind).to_string();
    let reply = live.api.send("PUT", "/snapshot/create", &request);
    println!("expected no room for {}: {}", file.display(), reply.body);
    assert_eq!(reply.status, 400, "{}", reply.body);
    for words in [
        "Create snapshot error: ",
        file.to_str().unwrap(),
        "No space left on device",
    ] {
        assert!(reply.body.contains(words), "`{words}`: {}", reply.body);
    }
    for path in [&files.state, &files.memory] {
        assert_eq!(unfinished(path.parent().unwrap()), [""; 0]);
    }
}

#[test]
fn a_full_disk_leaves_the_machine_and_the_old_snapshot() {
    // In this order: what uses it has to be gone before it.
    let small = Small::new(24 << 20);
    let files = Snapshot::named(&small.mount, "it");
    let mut live = Live::start("bare.touch=16", &[]);
    live.pause();
    live.save("Full", &files);
    live.resume();
    live.write_round();
    let newer = live.status().writes;
    live.pause();
    assert_no_room(&live, "Full", &files, &files.memory);
    // The guest goes on, the old one loads, and a save to another place is a good one.
    live.resume();
    live.hash();
    assert_eq!(live.status().writes, newer);
    let mut old = assert_works(&files);
    assert_eq!(old.status().writes, 0);
    drop(old);
    live.pause();
    let elsewhere = tempfile::tempdir().unwrap();
    let files = Snapshot::named(elsewhere.path(), "it");
    live.save("Full", &files);
    let mut restored = assert_works(&files);
    assert_eq!(restored.status().writes, newer);
}

#[test]
fn a_state_that_does_not_fit_leaves_the_old_snapshot() {
    let small = Small::new(8192);
    let folder = tempfile::tempdir().unwrap();
    let files = Snapshot {
        state: small.mount.join("state"),
        memory: folder.path().join("memory"),
    };
    let mut live = Live::start("", &[]);
    std::fs::write(&files.memory, "old").unwrap();
    live.pause();
    assert_no_room(&live, "Full", &files, &files.state);
    assert_eq!(std::fs::read(&files.memory).unwrap(), b"old");
    assert!(!files.state.exists());
    live.resume();
    live.hash();
}

#[test]
fn a_diff_that_did_not_fit_is_in_the_next_one() {
    let small = Small::new(4 << 20);
    let folder = tempfile::tempdir().unwrap();
    let [base, diff] = ["base", "diff"].map(|name| Snapshot::named(folder.path(), name));
    let tracking = json!({"vcpu_count": 1, "mem_size_mib": 128, "track_dirty_pages": true});
    let mut live = Live::start("bare.touch=16", &[("/machine-config", tracking)]);
    live.pause();
    live.save("Full", &base);
    live.resume();
    live.write_round();
    let written = live.status().writes;
    live.pause();
    let no_room = Snapshot::named(&small.mount, "diff");
    assert_no_room(&live, "Diff", &no_room, &no_room.memory);
    // The state is written after the pages are taken, too.
    let tiny = Small::new(8192);
    let no_room = Snapshot {
        state: tiny.mount.join("state"),
        memory: diff.memory.clone(),
    };
    assert_no_room(&live, "Diff", &no_room, &no_room.state);
    live.resume();
    live.status();
    live.pause();
    live.save("Diff", &diff);
    drop(live);
    let mut rebase = brume();
    rebase.arg("rebase").args([&base.memory, &diff.memory]);
    let merged = outcome(rebase, SOON);
    assert_eq!(merged.status, 0, "{merged:#?}");
    let mut restored = assert_works(&Snapshot {
        memory: base.memory,
        ..diff
    });
    assert_eq!(restored.status().writes, written);
}
