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

use super::{Load, assert_refused, assert_works, load, unfinished};

/// How often it is killed at any moment.
const KILLS: usize = 50;
/// How often when the memory has its name and the state has not.
const BETWEEN: usize = 10;
/// After how many kills the guest looks through its memory.
const LOOKS: usize = 10;
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

/// When to kill.
enum When {
    /// At any time while it saves.
    Any,
    /// When the memory has its name, and the state probably not yet.
    Between,
}

/// What kills have left.
#[derive(Default)]
struct Left {
    old: usize,
    new: usize,
    /// Of the new ones, those whose state had not its name.
    between: usize,
}

/// Loads `files`; every so often the guest looks through all of its memory.
fn next(files: &Snapshot, kill: usize) -> Live {
    if kill.is_multiple_of(LOOKS) {
        return assert_works(files);
    }
    match load(files) {
        Load::Works(live) => live,
        Load::Refused(fault) => panic!("kill {kill}: refused: {fault}"),
    }
}

/// Saves a machine with `mib` MiB of memory in use over a good snapshot, again and again, and kills
/// it meanwhile; each time the files are loaded, and the machine that comes of it is the next. Each
/// load adds 1 to the generation of the machine that was saved, which tells the old from the new.
fn kills(files: &Snapshot, mib: usize, count: usize, when: &When) -> Left {
    let mut random = Random::seeded("kills", 1);
    let live = Live::start(&format!("bare.touch={mib}"), &[]);
    live.pause();
    live.save("Full", files);
    drop(live);
    let mut live = assert_works(files);
    live.pause();
    let begun = Instant::now();
    live.save(
        "Full",
        &Snapshot::named(files.memory.parent().unwrap(), "first"),
    );
    let duration = begun.elapsed();
    println!("a save takes {duration:?}; expected: {count} kills, no torn snapshot");
    live.resume();
    let mut generation = live.status().generation;
    let mut left = Left::default();
    let mut span = duration.as_micros() as u64;
    let states = files.state.parent().unwrap();
    for kill in 0..count {
        live.pause();
        let inode = files.memory.metadata().unwrap().ino();
        killed_while_saving(live, files, || match when {
            When::Between => replaced(&files.memory, inode),
            When::Any => {
                let moment = random.below(span as usize) as u64;
                thread::sleep(NOTHING_YET + Duration::from_micros(moment));
            }
        });
        let is_new = files.memory.metadata().unwrap().ino() != inode;
        let state_left = !unfinished(states).is_empty();
        live = next(files, kill);
        let found = live.status().generation;
        let expected = generation + u64::from(is_new);
        assert_eq!(found, expected, "kill {kill} of generation {generation}");
        // How long a save takes changes with the host.
        if is_new {
            left.new += 1;
            span -= span / 8;
        } else {
            left.old += 1;
            span += span / 8;
        }
        left.between += usize::from(is_new && state_left);
        generation = found;
    }
    let Left { old, new, between } = left;
    println!("{old} times the old one, {new} times the new, {between} of those between the names");
    // What is left of all that goes with the next save.
    live.pause();
    live.save("Full", files);
    for file in [&files.state, &files.memory] {
        assert_eq!(unfinished(file.parent().unwrap()), [""; 0]);
    }
    drop(live);
    assert_works(files);
    left
}

#[test]
fn kills_while_saving_leave_the_old_snapshot_or_the_new() {
    // In memory: for a process that is killed, a disk is only slower.
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let files = Snapshot::named(folder.path(), "it");
    let left = kills(&files, 64, KILLS, &When::Any);
    assert!(
        left.old > 0 && left.new > 0,
        "{} times the old one, {} times the new: not at all moments",
        left.old,
        left.new
    );
}

#[test]
fn kills_between_the_two_names_leave_the_new_snapshot() {
    let folder = tempfile::tempdir().unwrap();
    let states = folder.path().join("states");
    std::fs::create_dir(&states).unwrap();
    // In two folders on a disk, there is some time between the two names.
    let files = Snapshot {
        state: states.join("state"),
        memory: folder.path().join("memory"),
    };
    let left = kills(&files, 1, BETWEEN, &When::Between);
    assert_eq!(left.new, BETWEEN, "killed too early");
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
