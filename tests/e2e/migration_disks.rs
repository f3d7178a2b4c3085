// SPDX-License-Identifier: Apache-2.0
//! A machine moves with its disks, while its guest writes to one of them all the time.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use brume_api::{MigrationPhase, MigrationStatus};
use brume_tests::api::{ApiVm, eventually, with};
use brume_tests::live::Live;
use brume_tests::vm::SOON;
use serde_json::{Value, json};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;
const READ_ONLY_SIZE: u64 = 3 * MIB + 512;
/// So few bytes per second that both disks take 45 s.
const SLOW: u64 = MIB / 4;
/// Long enough for a disk that is synced on a busy host.
const LIMIT: Duration = Duration::from_secs(60);

/// A guest at work on its disk, and a process that waits for it.
struct Move {
    source: Live,
    target: Live,
    folder: TempDir,
}

impl Move {
    /// The target has its disks at other paths, and does not let the guest go on at once.
    fn new(engine: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let source = start(ApiVm::new(), folder.path(), engine);
        let target = Self::target(&folder, &overrides(folder.path()));
        Self {
            source,
            target,
            folder,
        }
    }

    fn target(folder: &TempDir, overrides: &Value) -> Live {
        let listen = format!("unix:{}", folder.path().join("move.sock").display());
        let api = ApiVm::new();
        let body = json!({"listen": listen, "drive_overrides": overrides, "resume_vm": false});
        api.done("PUT", "/migration/receive", &body);
        Live { api }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn send(&self, more: &Value) {
        let destination = format!("unix:{}", self.path("move.sock").display());
        let body = with(
            json!({"destination": destination, "with_disks": true}),
            more,
        );
        self.source.api.done("PUT", "/migration/send", &body);
    }

    /// Waits until a side says that it is over.
    #[track_caller]
    fn over(&self, side: &Live) -> MigrationStatus {
        let begun = Instant::now();
        loop {
            let status = status(side);
            if status.phase.is_over() {
                return status;
            }
            let logs = [&self.source, &self.target].map(|side| side.api.log());
            assert!(begun.elapsed() < LIMIT, "{status:#?}\n{logs:#?}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// The source keeps its guest, which goes on; why it did not move.
    #[track_caller]
    fn stays(&mut self, phase: MigrationPhase) -> String {
        let status = self.over(&self.source);
        assert_eq!(status.phase, phase, "{status:#?}");
        eventually("the target waits again", || {
            self.target.api.get("/migration").get("phase") == Some(&json!("Listening"))
        });
        work_past(&mut self.source, 200);
        status.error.unwrap()
    }
}

/// Starts a guest at work on disks that it makes in `folder`.
pub(crate) fn start(api: ApiVm, folder: &Path, engine: &str) -> Live {
    let path = |name: &str| folder.join(name);
    make_disk(&path("disk"));
    fs::write(path("read-only"), vec![0xa5; READ_ONLY_SIZE as usize]).unwrap();
    let machine = json!({"vcpu_count": 1, "mem_size_mib": 32});
    let drive = |id: &str, path: PathBuf, read_only: bool| {
        json!({
            "drive_id": id, "is_root_device": false, "is_read_only": read_only,
            "path_on_host": path, "io_engine": engine,
        })
    };
    let parts = [
        ("/machine-config", machine),
        ("/drives/d", drive("d", path("disk"), false)),
        ("/drives/r", drive("r", path("read-only"), true)),
    ];
    api.start_bare(
        "bare.do=live-blk bare.qd=32 bare.bytes=65536 bare.area=8",
        &parts,
    );
    api.vm.wait_for("bare: live-blk ready\n", SOON);
    Live { api }
}

/// Where a target has the disks.
pub(crate) fn overrides(folder: &Path) -> Value {
    json!([
        {"drive_id": "d", "path_on_host": folder.join("disk-there")},
        {"drive_id": "r", "path_on_host": folder.join("read-only-there")},
    ])
}

/// Checks that the disks in `folder` are the same on both sides.
#[track_caller]
pub(crate) fn assert_moved(folder: &Path) {
    for name in ["disk", "read-only"] {
        let there = folder.join(format!("{name}-there"));
        assert_same(&folder.join(name), &there);
    }
}

fn status(side: &Live) -> MigrationStatus {
    serde_json::from_value(side.api.get("/migration")).unwrap()
}

/// Data, a hole, data, zeros that are written down, a hole.
fn make_disk(path: &Path) {
    let file = File::create_new(path).unwrap();
    file.set_len(SIZE).unwrap();
    let data: Vec<u8> = (0..4 * MIB).map(|at| (at * 7 / 3) as u8 | 1).collect();
    for at in [0, 21 * MIB] {
        file.write_all_at(&data, at).unwrap();
    }
    let zeros = vec![0; 4 * MIB as usize];
    file.write_all_at(&zeros, 25 * MIB).unwrap();
}

/// Waits until the guest has done `more` requests, all of them well.
#[track_caller]
pub(crate) fn work_past(side: &mut Live, more: u64) {
    let begun = Instant::now();
    let mut first = None;
    loop {
        let line = side.ask(b'?', "live-blk");
        assert!(line.contains("errors=0 bad=0"), "{line}");
        let ops = line.split(' ').find_map(|word| word.strip_prefix("ops="));
        let ops: u64 = ops.unwrap().parse().unwrap();
        if ops > *first.get_or_insert(ops) + more {
            return;
        }
        assert!(begun.elapsed() < SOON, "{line}");
    }
}

#[track_caller]
fn assert_same(one: &Path, other: &Path) {
    let [one, other] = [one, other].map(|path| fs::read(path).unwrap());
    let differs = one.iter().zip(&other).position(|(one, other)| one != other);
    assert_eq!((one.len(), differs), (other.len(), None));
}

#[test]
fn disks_are_the_same_when_the_machine_arrives() {
    for engine in ["Sync", "Async"] {
        let mut machine = Move::new(engine);
        work_past(&mut machine.source, 500);
        // Slow enough for the guest to write while its disk moves.
        let body = json!({
            "bandwidth_limit": 40 * MIB,
            // It may write faster than that.
            "timeout_s": 2,
            "on_timeout": "Force",
        });
        machine.send(&body);
        let target = machine.over(&machine.target);
        assert_eq!(target.phase, MigrationPhase::Completed, "{target:#?}");
        let source = machine.over(&machine.source);
        assert_eq!(source.phase, MigrationPhase::Completed, "{source:#?}");
        assert_moved(machine.folder.path());
        // All data and what was written meanwhile; neither holes nor zeros.
        let bytes = target.disk_bytes;
        assert!(bytes > 8 * MIB + READ_ONLY_SIZE, "{target:#?}");
        let there = fs::metadata(machine.path("disk-there")).unwrap();
        assert!(there.blocks() * 512 <= 9 * MIB, "{}", there.blocks());
        machine.target.resume();
        work_past(&mut machine.target, 500);
    }
}

/// Checks that both disks are the same at the target, and lets the guest go on there.
#[track_caller]
fn assert_arrived(machine: &mut Move) {
    // The source is gone a while after its end.
    for side in [&machine.source, &machine.target] {
        let over = machine.over(side);
        assert_eq!(over.phase, MigrationPhase::Completed, "{over:#?}");
    }
    assert_moved(machine.folder.path());
    machine.target.resume();
    work_past(&mut machine.target, 500);
    machine.target.hash();
}

#[test]
fn disks_move_beside_memory_that_goes_over_several_connections() {
    for (connections, mode) in [
        (2, "PreCopy"),
        (4, "PreCopy"),
        (2, "PostCopy"),
        (1, "Hybrid"),
    ] {
        let mut machine = Move::new("Async");
        work_past(&mut machine.source, 500);
        // Some of it twice.
        for _ in 0..8 {
            machine.source.write_round();
        }
        // Slowly, so that it is here until it has written.
        let body = json!({"connections": connections, "mode": mode, "bandwidth_limit": MIB / 2});
        machine.send(&body);
        eventually("the disk moves", || status(&machine.target).disk_bytes > 0);
        // What the guest writes while its disk moves.
        machine.source.write_round();
        work_past(&mut machine.source, 100);
        let now = json!({"bandwidth_limit": 0, "timeout_s": 1, "on_timeout": "Force"});
        machine.source.api.done("PATCH", "/migration", &now);
        assert_arrived(&mut machine);
    }
}

#[test]
fn connections_that_have_nothing_to_carry_while_a_disk_moves_are_kept() {
    let mut machine = Move::new("Async");
    // It would write more than the connection carries otherwise.
    machine.source.ask(b's', "live-blk");
    machine.source.write_round();
    machine.send(&json!({"connections": 3, "bandwidth_limit": SLOW}));
    // Longer than a target waits for a connection that says nothing.
    thread::sleep(Duration::from_secs(35));
    let moving = status(&machine.source);
    assert_eq!(moving.phase, MigrationPhase::PreCopy, "{moving:#?}");
    assert!(
        moving.pages == 0 && moving.disk_bytes > 5 * MIB,
        "{moving:#?}"
    );
    machine.source.ask(b'g', "live-blk");
    let quick = json!({"bandwidth_limit": 0, "timeout_s": 1, "on_timeout": "Force"});
    machine.source.api.done("PATCH", "/migration", &quick);
    assert_arrived(&mut machine);
}

#[test]
fn a_move_that_is_called_off_leaves_no_files() {
    let mut machine = Move::new("Async");
    fs::write(
        machine.path("read-only-there"),
        vec![9; READ_ONLY_SIZE as usize],
    )
    .unwrap();
    machine.send(&json!({"bandwidth_limit": MIB}));
    eventually("the disk moves", || status(&machine.target).disk_bytes > 0);
    let made = fs::metadata(machine.path("disk-there")).unwrap();
    assert_eq!(made.len(), SIZE);
    let reply = machine.source.api.send("DELETE", "/migration", "");
    assert_eq!(reply.status, 204, "{}", reply.body);
    machine.stays(MigrationPhase::Cancelled);
    eventually("the file goes", || !machine.path("disk-there").exists());
    // It was there before.
    assert!(machine.path("read-only-there").exists());
    // And again, to its end.
    machine.send(&json!({"timeout_s": 2, "on_timeout": "Force"}));
    let over = machine.over(&machine.target);
    assert_eq!(over.phase, MigrationPhase::Completed, "{over:#?}");
    assert_moved(machine.folder.path());
}

#[test]
fn disks_that_do_not_fit_are_refused() {
    let mut machine = Move::new("Sync");
    let there = machine.path("disk-there");
    File::create_new(&there)
        .unwrap()
        .set_len(SIZE + 512)
        .unwrap();
    machine.send(&json!({}));
    let told = machine.stays(MigrationPhase::Failed);
    let size = SIZE + 512;
    let words = [
        format!("drive \"d\" has {SIZE} bytes at the source, and "),
        format!("disk-there has {size} at the target"),
    ];
    assert!(words.iter().all(|words| told.contains(words)), "{told}");
    assert!(!machine.path("read-only-there").exists());
    assert_eq!(fs::metadata(&there).unwrap().blocks(), 0);

    // The source's own disk, which it does not lock otherwise.
    fs::remove_file(&there).unwrap();
    fs::hard_link(machine.path("disk"), &there).unwrap();
    machine.send(&json!({}));
    let told = machine.stays(MigrationPhase::Failed);
    assert!(told.contains("disk-there is in use"), "{told}");
}
