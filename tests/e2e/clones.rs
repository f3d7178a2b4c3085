// SPDX-License-Identifier: Apache-2.0
//! A hundred machines of one snapshot: all answer, no two take themselves for the same, and nothing
//! is left of them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use brume_tests::api::eventually;
use brume_tests::live::{Live, Snapshot};
use brume_tests::netns::NetNs;
use brume_tests::vm::{SOON, Vm, brume, outcome};
use serde_json::{Value, json};
use tempfile::TempDir;

const CLONES: usize = 100;
/// How `brume clone` ends when a clone has refused its snapshot.
const REFUSED: i32 = 8;
/// The most that an idle clone may have of its own, in KiB.
const OWN_KIB: u64 = 32 << 10;

/// A folder for the sockets of clones. Whatever still runs with one of them is killed with it.
struct Run(TempDir);

impl Run {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `brume clone` of a snapshot, with sockets and logs in here.
    fn clone_command(&self, files: &Snapshot, count: usize) -> Command {
        let mut command = brume();
        command.arg("clone").args(["--count", &count.to_string()]);
        command.arg("--state").arg(&files.state);
        command.arg("--memory").arg(&files.memory);
        command.arg("--api-sock").arg(self.path("{}.sock"));
        command.arg("--log").arg(self.path("{}.log"));
        command
    }

    /// The processes that were started with a path in here.
    fn processes(&self) -> Vec<i32> {
        let folder = self.0.path().to_str().unwrap();
        let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| {
            let entry = entry.ok()?;
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let line = fs::read(entry.path().join("cmdline")).ok()?;
            String::from_utf8_lossy(&line)
                .contains(folder)
                .then_some(pid)
        });
        pids.collect()
    }

    fn sockets(&self) -> usize {
        let entries = fs::read_dir(self.0.path()).unwrap();
        let is_socket = |name: PathBuf| name.extension().is_some_and(|end| end == "sock");
        entries
            .filter(|entry| is_socket(entry.as_ref().unwrap().path()))
            .count()
    }

    #[track_caller]
    fn assert_empty(&self) {
        assert_eq!((self.processes(), self.sockets()), (Vec::new(), 0));
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        for pid in self.processes() {
            // One that has ended meanwhile is no matter.
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).output();
        }
    }
}

/// What a process has of its own and its part of what it shares, in KiB.
fn memory_of(pid: i32) -> (u64, u64) {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let field = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace()
            .nth(1)
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
    (
        field("Private_Dirty:") + field("Private_Clean:"),
        field("Pss:"),
    )
}

#[track_caller]
fn print_memory(what: &str, pids: impl IntoIterator<Item = i32>) {
    let (mut own, pss): (Vec<_>, Vec<_>) = pids.into_iter().map(memory_of).unzip();
    own.sort_unstable();
    let (median, most) = (own[own.len() / 2], own[own.len() - 1]);
    let pss = pss.iter().sum::<u64>() / pss.len() as u64;
    println!("{what}: own memory {median} KiB (median), {most} KiB (most); Pss {pss} KiB (mean)");
    assert!(most < OWN_KIB, "a clone has {most} KiB of its own");
}

/// A snapshot of a machine that runs `args`, with these parts besides.
fn saved(folder: &Path, args: &str, parts: &[(&str, Value)]) -> Snapshot {
    let files = Snapshot::named(folder, "it");
    let mut live = Live::start(args, parts);
    live.status();
    live.pause();
    live.save("Full", &files);
    files
}

#[test]
fn a_hundred_clones_answer_and_differ() {
    let folder = tempfile::tempdir().unwrap();
    let files = saved(folder.path(), "", &[]);
    let begun = Instant::now();
    let load = |_| Live::restored(&files, &json!({"resume_vm": false}));
    let mut clones: Vec<_> = (0..CLONES).map(load).collect();
    println!("{CLONES} machines after {:?}", begun.elapsed());
    let mut ids = BTreeSet::new();
    for clone in &mut clones {
        clone.resume();
        let status = clone.status();
        assert_eq!((status.writes, status.generation), (0, 1), "{status:?}");
        assert!(ids.insert(status.generation_id), "two have one id");
        // Its guest never rests, and the others want the processor.
        clone.pause();
    }
    println!(
        "all have answered after {:?}; {} ids",
        begun.elapsed(),
        ids.len()
    );
    for clone in &clones {
        clone.api.assert_alive("Paused");
    }
    print_memory("idle clones", clones.iter().map(|clone| clone.api.vm.pid()));
    let sockets: Vec<_> = clones
        .iter()
        .map(|clone| clone.api.socket.clone())
        .collect();
    drop(clones);
    assert!(!sockets.iter().any(|socket| socket.exists()));
}

#[test]
fn brume_clone_starts_a_hundred_and_ends_them() {
    let folder = tempfile::tempdir().unwrap();
    let files = Snapshot::named(folder.path(), "it");
    let api = brume_tests::api::ApiVm::new();
    api.start_bare("bare.do=generation-watch", &[]);
    let mut original = None;
    eventually("the guest has told its id", || {
        original = id_of(&api.vm.stdout());
        original.is_some()
    });
    let original = original.unwrap();
    let live = Live { api };
    live.pause();
    live.save("Full", &files);
    drop(live);
    let run = Run::new();
    let mut command = run.clone_command(&files, CLONES);
    // Guests that never rest, so each runs only for a while.
    command.args(["--json", "--paused"]);
    let begun = Instant::now();
    let fleet = Vm::spawn(command);
    fleet.wait_for("}]", SOON);
    println!("brume clone: {CLONES} machines after {:?}", begun.elapsed());
    let rows: Value = serde_json::from_str(&fleet.stdout()).unwrap();
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), CLONES);
    let mut ids = BTreeSet::from([original]);
    for (number, row) in rows.iter().enumerate() {
        let socket = run.path(&format!("{number}.sock"));
        assert_eq!(
            (&row["number"], &row["state"]),
            (&json!(number), &json!("Paused"))
        );
        assert_eq!(row["api_sock"], json!(socket));
        let client = brume_api::Client::new(&socket).unwrap();
        let set = |state: &str| {
            let body = json!({"state": state}).to_string();
            let reply = client.send("PATCH", "/vm", &body).unwrap();
            assert_eq!(reply.status, 204, "{}", reply.body);
        };
        set("Resumed");
        let log = run.path(&format!("{number}.log"));
        let mut id = None;
        eventually("the guest has seen that it is another machine", || {
            id = id_of(&fs::read_to_string(&log).unwrap_or_default());
            id.is_some()
        });
        let id = id.unwrap();
        assert!(ids.insert(id.clone()), "clone {number}: {id} is another's");
        set("Paused");
    }
    println!("all have answered after {:?}", begun.elapsed());
    let pids = rows.iter().map(|row| row["pid"].as_i64().unwrap() as i32);
    print_memory("clones of brume clone", pids);
    assert_eq!((run.processes().len(), run.sockets()), (CLONES + 1, CLONES));
    fleet.signal(libc::SIGTERM);
    let end = fleet.wait(SOON);
    assert!(end.stderr.is_empty(), "{}", end.stderr);
    run.assert_empty();
}

/// The last id that a guest has told.
fn id_of(console: &str) -> Option<String> {
    let line = console
        .lines()
        .rfind(|line| line.starts_with("bare: generation-watch id="))?;
    let id = line.split("id=").nth(1)?.split(' ').next()?;
    // It may still be on its way.
    (id.len() == 32).then(|| id.to_owned())
}

#[test]
fn a_clone_that_cannot_start_is_named_and_no_other_stays() {
    const COUNT: usize = 6;
    const MISSING: usize = 3;
    let net = NetNs::new();
    let folder = tempfile::tempdir().unwrap();
    net.sh("ip tuntap add tap mode tap");
    for number in (0..COUNT).filter(|&number| number != MISSING) {
        net.sh(&format!("ip tuntap add tap{number} mode tap"));
    }
    let interface = json!({"iface_id": "eth0", "host_dev_name": "tap"});
    let api = brume_tests::api::ApiVm::start_with(brume(), |command| net.wrap(&command));
    let files = Snapshot::named(folder.path(), "it");
    let live = Live::start_in(api, "", &[("/network-interfaces/eth0", interface)]);
    live.pause();
    live.save("Full", &files);
    drop(live);
    let run = Run::new();
    let mut command = run.clone_command(&files, COUNT);
    command.args(["--net", "eth0=tap{}"]);
    let end = outcome(net.wrap(&command), SOON);
    println!("expected `clone {MISSING}` and its TAP: {}", end.stderr);
    assert_eq!(end.status, REFUSED, "{end:#?}");
    for words in [format!("clone {MISSING}"), format!("tap{MISSING}")] {
        assert!(end.stderr.contains(&words), "`{words}`: {}", end.stderr);
    }
    assert_eq!(end.stderr.lines().count(), 1, "{}", end.stderr);
    run.assert_empty();
    // With all TAPs all start, and stay when the one who started them has gone.
    net.sh(&format!("ip tuntap add tap{MISSING} mode tap"));
    let mut command = run.clone_command(&files, COUNT);
    command.args(["--net", "eth0=tap{}", "--detach"]);
    let end = outcome(net.wrap(&command), SOON);
    assert_eq!(end.status, 0, "{end:#?}");
    assert_eq!((run.processes().len(), run.sockets()), (COUNT, COUNT));
    // A second fleet has no sockets to be had, and does not touch the first.
    let mut command = run.clone_command(&files, COUNT);
    command.args(["--net", "eth0=tap{}"]);
    let end = outcome(net.wrap(&command), SOON);
    println!("expected `exists already`: {}", end.stderr);
    assert!(
        end.status != 0 && end.stderr.contains("exists already"),
        "{end:#?}"
    );
    assert_eq!((run.processes().len(), run.sockets()), (COUNT, COUNT));
    for number in 0..COUNT {
        let client = brume_api::Client::new(&run.path(&format!("{number}.sock"))).unwrap();
        let stop = json!({"state": "Stopped"}).to_string();
        let reply = client.send("PATCH", "/vm", &stop).unwrap();
        assert_eq!(reply.status, 204, "{}", reply.body);
    }
    let begun = Instant::now();
    while !run.processes().is_empty() {
        assert!(begun.elapsed() < SOON, "they do not end");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_clone_of_a_bad_snapshot_starts_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let files = saved(folder.path(), "", &[]);
    let run = Run::new();
    let bad = Snapshot {
        memory: files.state.clone(),
        ..files
    };
    let end = outcome(run.clone_command(&bad, 5), SOON);
    println!("expected the length of the memory file: {}", end.stderr);
    assert_eq!(end.status, REFUSED, "{end:#?}");
    assert!(end.stderr.starts_with("brume: clone "), "{}", end.stderr);
    assert!(end.stderr.contains("the memory file has"), "{}", end.stderr);
    run.assert_empty();
}
