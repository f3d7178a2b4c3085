// SPDX-License-Identifier: Apache-2.0
//! What can go wrong with a snapshot, end to end: whatever it is, the old snapshot or the new one is
//! there, the reason is said in words, and no machine runs that is not whole.

mod crash;
mod damage;
mod full_disk;
mod hostile;
mod requests;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use brume_tests::api::ApiVm;
use brume_tests::live::{Live, Snapshot};
use brume_tests::vm::{Outcome, SOON, brume};
use serde_json::json;
use tempfile::TempDir;

/// How long a load may take that comes to nothing, on a host that stands still now and then.
const REFUSAL: Duration = Duration::from_secs(20);

/// A snapshot of a guest that lives on, in a folder of its own.
struct Saved {
    folder: TempDir,
    files: Snapshot,
}

impl Saved {
    /// Of a machine with `args` and these parts besides.
    fn new(args: &str, parts: &[(&str, serde_json::Value)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let files = Snapshot::named(folder.path(), "good");
        let live = Live::start(args, parts);
        live.pause();
        live.save("Full", &files);
        Self { folder, files }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The memory with another state.
    fn with_state(&self, bytes: &[u8]) -> Snapshot {
        let state = self.path("other.state");
        std::fs::write(&state, bytes).unwrap();
        Snapshot {
            state,
            ..self.files.clone()
        }
    }

    /// The state with another memory.
    fn with_memory(&self, memory: PathBuf) -> Snapshot {
        Snapshot {
            memory,
            ..self.files.clone()
        }
    }

    fn state(&self) -> Vec<u8> {
        std::fs::read(&self.files.state).unwrap()
    }
}

/// A process that takes a snapshot, in a folder of its own.
fn fresh() -> ApiVm {
    ApiVm::start_with(brume(), |command| {
        // What a forged snapshot names is made there, not here.
        let mut args = command.get_args();
        let folder = args
            .find(|arg| *arg == "--api-sock")
            .and_then(|_| args.next())
            .and_then(|socket| Path::new(socket).parent().map(Path::to_owned));
        let mut command = command;
        command.current_dir(folder.unwrap());
        command
    })
}

/// Loads `files` in a fresh process, which refuses them: the fault. The process says one line and
/// ends with status 1 soon.
#[track_caller]
fn refusal(files: &Snapshot) -> String {
    match load(files) {
        Load::Refused(fault) => fault,
        Load::Works(_) => panic!("loaded: {files:?}"),
    }
}

/// What has come of a load.
enum Load {
    /// The fault of one that was refused as it has to be.
    Refused(String),
    /// The machine.
    Works(Live),
}

#[track_caller]
fn load(files: &Snapshot) -> Load {
    let api = fresh();
    let begun = Instant::now();
    let body = files.load_request(&json!({})).to_string();
    let reply = api.send("PUT", "/snapshot/load", &body);
    if reply.status == 204 {
        let took = begun.elapsed();
        assert!(took < REFUSAL, "the load took {took:?}");
        return Load::Works(Live { api });
    }
    assert_eq!(reply.status, 400, "{}", reply.body);
    let fault: serde_json::Value = serde_json::from_str(&reply.body).expect("a fault");
    let fault = fault["fault_message"].as_str().expect("a fault").to_owned();
    let ApiVm { vm, .. } = api;
    let outcome = vm.wait(SOON);
    let took = begun.elapsed();
    assert!(took < REFUSAL, "the refusal took {took:?}: {fault}");
    assert_ended(&outcome, &fault);
    assert!(
        fault.starts_with("Load snapshot error: Failed to restore from snapshot: "),
        "{fault}"
    );
    Load::Refused(fault)
}

/// Checks that the process of a failed load has ended as one.
#[track_caller]
fn assert_ended(outcome: &Outcome, fault: &str) {
    let lines: Vec<_> = outcome.stderr.lines().collect();
    assert!(
        outcome.status == 1 && lines.len() == 1 && lines[0].starts_with("brume: "),
        "{fault}: {outcome:#?}"
    );
    assert!(outcome.stdout.is_empty(), "the guest ran: {outcome:#?}");
}

/// Loads `files`, which are refused with a text that has `words`.
#[track_caller]
fn assert_refused(what: &str, files: &Snapshot, words: &str) {
    let fault = refusal(files);
    println!("{what}: expected `{words}`, got `{fault}`");
    assert!(
        fault.contains(words),
        "{what}: `{words}` is not in `{fault}`"
    );
}

/// Loads `files`; the guest goes on and finds its memory as it was.
#[track_caller]
fn assert_works(files: &Snapshot) -> Live {
    match load(files) {
        Load::Works(mut live) => {
            live.hash();
            live
        }
        Load::Refused(fault) => panic!("refused: {fault}"),
    }
}

/// The names in a folder of what was begun and not ended.
fn unfinished(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.ends_with(".brume-tmp")).collect()
}

#[track_caller]
fn run(program: &str, args: &[&std::ffi::OsStr]) {
    let output = Command::new(program).args(args).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} failed: {said}");
}
