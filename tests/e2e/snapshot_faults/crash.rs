// SPDX-License-Identifier: Apache-2.0
//! A program that is killed while it saves leaves the old snapshot or the new one.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use brume_tests::forge::Random;
use brume_tests::live::{Live, Snapshot};
use brume_tests::vm::SOON;
use serde_json::json;

use super::{assert_refused, assert_works, unfinished};

/// How often it is killed.
const KILLS: usize = 50;
/// How many of those are in the moment when the memory has its name and the state has not.
const BETWEEN: usize = 10;
/// Until a request has come to the program and the save has begun, at the least.
const NOTHING_YET: Duration = Duration::from_micros(200);

/// Has the machine save itself, and kills it at a moment of `when`'s choice.
fn killed_while_saving(live: Live, files: &Snapshot, when: impl FnOnce()) {
    let body = files.create_request("Full").to_string();
    let socket = live.api.socket.clone();
    // Its answer may never come.
    let save = thread::spawn(move || {
        let client = brume_api::Client::new(&socket).unwrap();
        client.send("PUT", "/snapshot/create", &body).is_ok()
    });
    when();
    live.api.vm.signal(libc::SIGKILL);
    save.join().unwrap();
    let status = live.api.vm.wait(SOON).status;
    assert_eq!(status, 128 + libc::SIGKILL);
}

/// Waits until another file has the name, looking all the time.
fn replaced(path: &Path, old: u64) {
    let begun = Instant::now();
    while path.metadata().is_ok_and(|found| found.ino() == old) {
        assert!(begun.elapsed() < SOON, "it is not saved");
    }
}

#[test]
fn fifty_kills_while_saving_leave_the_old_snapshot_or_the_new() {
    let folder = tempfile::tempdir().unwrap();
    let states = folder.path().join("states");
    std::fs::create_dir(&states).unwrap();
    // In two folders there is more time between the two names.
    let files = Snapshot {
        state: states.join("state"),
        memory: folder.path().join("memory"),
    };
    let mut random = Random::seeded("kills", 1);
    let mut live = Live::start("bare.touch=64", &[]);
    live.pause();
    live.save("Full", &files);
    let begun = Instant::now();
    live.save("Full", &files);
    let duration = begun.elapsed();
    println!("a save takes {duration:?}; expected: {KILLS} kills, no torn snapshot");
    live.resume();
    let (mut old, mut new, mut between) = (0, 0, 0);
    let mut writes = live.status().writes;
    for kill in 0..KILLS {
        let written = writes + live.write_round();
        live.pause();
        let inode = files.memory.metadata().unwrap().ino();
        killed_while_saving(live, &files, || {
            if kill % (KILLS / BETWEEN) == 0 {
                replaced(&files.memory, inode);
            } else {
                let span = duration.as_micros() as usize * 5 / 4;
                thread::sleep(NOTHING_YET + Duration::from_micros(random.below(span) as u64));
            }
        });
        let has_new_memory = files.memory.metadata().unwrap().ino() != inode;
        let state_left = !unfinished(&states).is_empty();
        live = assert_works(&files);
        let found = live.status().writes;
        let expected = if has_new_memory { written } else { writes };
        assert_eq!(
            found, expected,
            "kill {kill}: before it {writes} pages were written, saved were {written}"
        );
        *(if has_new_memory { &mut new } else { &mut old }) += 1;
        between += usize::from(has_new_memory && state_left);
        writes = found;
    }
    println!("{old} times the old one, {new} times the new, {between} of those between the names");
    assert!(
        old > 0 && new > 0,
        "{old} old, {new} new: not at all moments"
    );
    // What is left of all that goes with the next save.
    live.pause();
    live.save("Full", &files);
    assert_eq!(unfinished(folder.path()), [""; 0]);
    assert_eq!(unfinished(&states), [""; 0]);
    drop(live);
    assert_works(&files);
}

#[test]
fn between_the_two_names_the_new_snapshot_is_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let [files, next] = ["it", "next"].map(|name| Snapshot::named(folder.path(), name));
    let mut live = Live::start("", &[]);
    live.pause();
    live.save("Full", &files);
    live.resume();
    let writes = live.write_round();
    live.pause();
    live.save("Full", &next);
    drop(live);
    // As a save that was killed between the names leaves them, after one that was killed earlier.
    std::fs::rename(&next.memory, &files.memory).unwrap();
    assert_refused(
        "no state that fits",
        &files,
        "is not the one that was written with this",
    );
    let left = |number| {
        folder
            .path()
            .join(format!(".it.state.{number}.0.brume-tmp"))
    };
    std::fs::write(left(1), &std::fs::read(&next.state).unwrap()[..1000]).unwrap();
    assert_refused(
        "half a state",
        &files,
        "is not the one that was written with this",
    );
    std::fs::rename(&next.state, left(2)).unwrap();
    let mut live = assert_works(&files);
    assert_eq!(live.status().writes, writes, "it is not the new one");
    // It is loaded from there as often as anyone likes, until a save has got to its end.
    live.pause();
    let bad = json!({"snapshot_path": files.state, "mem_file_path": folder.path()});
    let reply = live.api.send("PUT", "/snapshot/create", &bad.to_string());
    assert_eq!(reply.status, 400, "{}", reply.body);
    assert_works(&files);
    live.save("Full", &files);
    assert_eq!(unfinished(folder.path()), [""; 0]);
    drop(live);
    assert_works(&files);
}
