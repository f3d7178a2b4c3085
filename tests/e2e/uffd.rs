// SPDX-License-Identifier: Apache-2.0
//! A machine whose memory another program serves is like any other; whatever becomes of that
//! program, the machine can be asked and ended.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use brume_api::Client;
use brume_tests::api::{ApiVm, eventually};
use brume_tests::live::{Live, Snapshot};
use brume_tests::vm::{SOON, Vm};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Enough for an end on a busy machine, and not for one that was waited for in vain.
const AT_ONCE: Duration = Duration::from_secs(8);

/// A machine that was saved.
struct Saved {
    folder: TempDir,
    snapshot: Snapshot,
    /// What the guest's area was.
    hash: String,
}

fn saved(args: &str) -> Saved {
    let folder = tempfile::tempdir().unwrap();
    let snapshot = Snapshot::named(folder.path(), "base");
    let mut live = Live::start(args, &[]);
    let hash = live.hash();
    live.pause();
    live.save("Full", &snapshot);
    Saved {
        folder,
        snapshot,
        hash,
    }
}

/// A program that serves `memory`.
struct Handler {
    program: Vm,
    socket: PathBuf,
    _folder: TempDir,
}

impl Handler {
    fn start(memory: &Path, how: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("uffd.sock");
        let mut command = Command::new(env!("CARGO_BIN_EXE_uffd-handler"));
        command.arg(&socket).arg(memory).arg(how);
        let program = Vm::spawn(command);
        program.wait_for("listening", SOON);
        Self {
            program,
            socket,
            _folder: folder,
        }
    }

    fn backend(&self) -> Value {
        json!({"backend_type": "Uffd", "backend_path": self.socket})
    }

    fn kill(self) {
        self.program.signal(libc::SIGKILL);
        self.program.wait(SOON);
    }
}

#[test]
fn a_machine_whose_memory_is_served_goes_on_and_can_be_saved() {
    let base = saved("bare.touch=4");
    for how in ["serve", "serve-apart"] {
        let handler = Handler::start(&base.snapshot.memory, how);
        let extra = json!({"mem_backend": handler.backend(), "track_dirty_pages": true});
        let mut live = Live::restored(&base.snapshot, &extra);
        assert_eq!(live.hash(), base.hash, "{how}");
        live.write_round();
        let hash = live.hash();
        live.pause();
        let full = Snapshot::named(base.folder.path(), "full");
        live.save("Full", &full);
        live.resume();
        live.write_round();
        let later = live.hash();
        live.pause();
        // A diff goes into a copy of what it is a diff to.
        let diff = Snapshot::named(base.folder.path(), "diff");
        fs::copy(&full.memory, &diff.memory).unwrap();
        live.save("Diff", &diff);
        drop(live);
        assert_eq!(Live::restored(&full, &json!({})).hash(), hash);
        assert_eq!(Live::restored(&diff, &json!({})).hash(), later);
    }
}

#[test]
fn a_served_machine_can_have_all_of_its_memory_first() {
    let base = saved("bare.touch=4");
    let handler = Handler::start(&base.snapshot.memory, "serve");
    let extra = json!({"mem_backend": handler.backend(), "prefault": true});
    let mut live = Live::restored(&base.snapshot, &extra);
    handler.kill();
    assert_eq!(live.hash(), base.hash);
}

/// Loads what cannot be loaded; what the client and the log are told.
fn refused(snapshot: &Snapshot, extra: &Value) -> (String, Duration) {
    let api = ApiVm::new();
    let begun = Instant::now();
    let body = snapshot.load_request(extra).to_string();
    let client = Client::new(&api.socket).unwrap().with_patience(SOON);
    let answer = client.send("PUT", "/snapshot/load", &body);
    let answer = answer.unwrap_or_else(|error| panic!("{error}: {}", api.log()));
    let took = begun.elapsed();
    assert_eq!(answer.status, 400, "{}", answer.body);
    let outcome = api.vm.wait(AT_ONCE);
    assert_eq!(outcome.status, 1, "{outcome:?}");
    (answer.body, took)
}

#[test]
fn a_handler_that_does_not_serve_is_told_and_not_waited_for() {
    let base = saved("");
    let none = base.folder.path().join("none");
    let nobody = json!({"mem_backend": {"backend_type": "Uffd", "backend_path": none}});
    let (text, _) = refused(&base.snapshot, &nobody);
    let words = "Load snapshot error: Failed to restore from snapshot: Failed to load guest \
                 memory: Error creating guest memory from uffd: Failed to connect to UDS Unix \
                 stream: No such file or directory (os error 2)";
    assert!(text.contains(words), "{text}");
    for (how, what, limit) in [
        ("die", "has ended", 8),
        ("die=1", "has ended", 8),
        ("silent", "has not answered a page fault for 10s", 30),
        ("silent=1", "has not answered a page fault for 10s", 30),
        ("lie", "is not the one that was written with", 8),
    ] {
        let handler = Handler::start(&base.snapshot.memory, how);
        let extra = json!({"mem_backend": handler.backend()});
        let (text, took) = refused(&base.snapshot, &extra);
        assert!(text.contains(what), "{how}: {text}");
        assert!(took < Duration::from_secs(limit), "{how}: {took:?}");
    }
}

/// How a machine is told to stop.
#[derive(Clone, Copy, Debug)]
enum Stop {
    Signal,
    Request,
}

#[test]
fn a_machine_that_lost_its_memory_is_alive_to_the_outside_and_can_be_ended() {
    let base = saved("bare.touch=8");
    for (how, stop) in [
        ("die=200", Stop::Signal),
        ("die=200", Stop::Request),
        ("silent=200", Stop::Signal),
        ("silent=200", Stop::Request),
    ] {
        let handler = Handler::start(&base.snapshot.memory, how);
        let extra = json!({"mem_backend": handler.backend()});
        let mut live = Live::restored(&base.snapshot, &extra);
        let watch = Vm::spawn(live.api.ctl(["events", "--json"]));
        watch.wait_for("Running", SOON);
        // It reads more than there will be.
        live.api.vm.send(b"h");
        handler.program.wait_for("end", SOON);
        if how.starts_with("die") {
            watch.wait_for("memory_handler_gone", SOON);
            let log = live.api.log();
            assert!(log.contains("serves the guest's memory has ended"), "{log}");
        }
        live.api.assert_alive("Running");
        let begun = Instant::now();
        match stop {
            Stop::Signal => live.api.vm.signal(libc::SIGTERM),
            Stop::Request => live.api.done("PATCH", "/vm", &json!({"state": "Stopped"})),
        }
        let outcome = live.api.vm.wait(AT_ONCE);
        let status = if matches!(stop, Stop::Signal) { 143 } else { 0 };
        assert_eq!(outcome.status, status, "{how} {stop:?}: {outcome:?}");
        assert!(begun.elapsed() < AT_ONCE);
    }
}

#[test]
fn nothing_of_a_machine_that_lost_its_memory_is_waited_for_without_a_limit() {
    let base = saved("bare.touch=8");
    let handler = Handler::start(&base.snapshot.memory, "die=200");
    let extra = json!({"mem_backend": handler.backend()});
    let mut live = Live::restored(&base.snapshot, &extra);
    live.api.vm.send(b"h");
    handler.program.wait_for("end", SOON);
    handler.kill();
    // Whether a vCPU can be called back from a fault is the host's matter.
    let pause = json!({"state": "Paused"}).to_string();
    let paused = live.api.send("PATCH", "/vm", &pause);
    if paused.status == 204 {
        let full = Snapshot::named(base.folder.path(), "full");
        let request = full.create_request("Full").to_string();
        let answer = live.api.send("PUT", "/snapshot/create", &request);
        assert_eq!(answer.status, 400);
        assert!(answer.body.contains("has ended"), "{}", answer.body);
        assert!(!full.memory.exists() && !full.state.exists());
    } else {
        assert_eq!(paused.status, 400);
        assert!(paused.body.contains("waits for a page"), "{}", paused.body);
    }
    live.api.vm.signal(libc::SIGTERM);
    assert_eq!(live.api.vm.wait(AT_ONCE).status, 143);
}

/// A machine of the bare guest that waits for its balloon to be told a size, saved.
fn saved_with_balloon() -> Saved {
    let folder = tempfile::tempdir().unwrap();
    let snapshot = Snapshot::named(folder.path(), "base");
    let api = ApiVm::new();
    let balloon = json!({
        "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1,
    });
    let args = "bare.do=balloon-check bare.ms=600000 bare.hold=1 bare.end=spin";
    api.start_bare(args, &[("/balloon", balloon)]);
    eventually("the guest has a driver", || {
        let statistics = api.send("GET", "/balloon/statistics", "");
        statistics.body.contains("free_memory")
    });
    api.done("PATCH", "/vm", &json!({"state": "Paused"}));
    let request = snapshot.create_request("Full");
    api.done("PUT", "/snapshot/create", &request);
    Saved {
        folder,
        snapshot,
        hash: String::new(),
    }
}

#[test]
fn memory_that_the_balloon_gives_back_is_told_to_the_handler() {
    let base = saved_with_balloon();
    let amount = json!({"amount_mib": 16});
    for dies in [false, true] {
        let handler = Handler::start(&base.snapshot.memory, "serve");
        let extra = json!({"mem_backend": handler.backend()});
        let mut live = Live::restored(&base.snapshot, &extra);
        live.api.done("PATCH", "/balloon", &amount);
        live.api.vm.wait_for("bare: balloon filled mib=16", SOON);
        if dies {
            // Nobody hears then what the guest gives back.
            handler.kill();
            live.api.vm.send(b"x");
            std::thread::sleep(Duration::from_secs(1));
            live.api.assert_alive("Running");
            live.api.vm.signal(libc::SIGTERM);
            assert_eq!(live.api.vm.wait(AT_ONCE).status, 143);
            continue;
        }
        live.api.vm.send(b"xx");
        let line = "bare: balloon inflate kept=0 zero=256 again=256";
        live.api.vm.wait_for(line, SOON);
        handler.program.wait_for("removed", SOON);
    }
}

/// The pages of a paused machine that the host holds.
fn resident(api: &ApiVm) -> Vec<u64> {
    let memory = api.get("/memory");
    let words = memory["resident"].as_array().unwrap().iter();
    let words = words.map(|word| word.as_u64().unwrap());
    let pages = words.enumerate().flat_map(|(index, word)| {
        (0..64_u64)
            .filter(move |bit| word >> bit & 1 == 1)
            .map(move |bit| 64 * index as u64 + bit)
    });
    pages.collect()
}

#[test]
fn the_pages_of_a_working_set_are_there_before_they_are_touched() {
    let folder = tempfile::tempdir().unwrap();
    let snapshot = Snapshot::named(folder.path(), "base");
    let set = folder.path().join("set");
    let mut live = Live::start("bare.touch=16", &[]);
    let hash = live.hash();
    live.pause();
    live.save("Full", &snapshot);
    live.api
        .done("PUT", "/memory/working-set", &json!({"path": set}));
    let used = resident(&live.api);
    assert!(used.len() >= 4096, "{}", used.len());
    drop(live);
    let paused = json!({"resume_vm": false});
    let without = Live::restored(&snapshot, &paused);
    let few = resident(&without.api).len();
    assert!(few < 1024, "{few}");
    let handler = Handler::start(&snapshot.memory, "serve");
    for extra in [
        json!({"resume_vm": false, "working_set_path": set}),
        json!({"resume_vm": false, "prefault": true}),
        json!({"resume_vm": false, "working_set_path": set, "mem_backend": handler.backend()}),
    ] {
        let mut live = Live::restored(&snapshot, &extra);
        eventually("the pages are there", || {
            let there = resident(&live.api);
            // A file has holes where the guest has zeros.
            let found = used.iter().filter(|page| there.binary_search(page).is_ok());
            found.count() >= 4096
        });
        live.resume();
        assert_eq!(live.hash(), hash, "{extra}");
    }
    fs::write(
        &set,
        r#"{"version":1,"page_size":4096,"memory_size":4096,"ranges":[]}"#,
    )
    .unwrap();
    let (text, _) = refused(&snapshot, &json!({"working_set_path": set}));
    assert!(
        text.contains("is of a machine with 4096 bytes of memory"),
        "{text}"
    );
}
