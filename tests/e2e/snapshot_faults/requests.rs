// SPDX-License-Identifier: Apache-2.0
//! Requests at the wrong time, and paths that no file can be at.

use brume_tests::live::{Live, Snapshot};
use serde_json::{Value, json};

use super::{Saved, fresh, unfinished};

/// Sends a request that is refused with a text that has `words`, by a machine that stays as it is.
#[track_caller]
fn refused(live: &Live, path: &str, body: &Value, words: &str) {
    let reply = live.api.send("PUT", path, &body.to_string());
    println!("expected `{words}`: {}", reply.body);
    assert_eq!(reply.status, 400, "{}", reply.body);
    assert!(reply.body.contains(words), "`{words}`: {}", reply.body);
}

#[test]
fn requests_at_the_wrong_time_are_refused_and_change_nothing() {
    let saved = Saved::new("", &[]);
    let load = saved.files.load_request(&json!({}));
    let create = saved.files.create_request("Full");
    let before = std::fs::read(&saved.files.state).unwrap();
    let not_allowed = "Loading a microVM snapshot not allowed after configuring";
    let too_late = "not supported after starting the microVM";
    // Something is configured already; nothing is started.
    let idle = Live { api: fresh() };
    refused(
        &idle,
        "/snapshot/create",
        &create,
        "not supported before starting the microVM",
    );
    let config = json!({"vcpu_count": 1, "mem_size_mib": 64});
    idle.api.done("PUT", "/machine-config", &config);
    refused(&idle, "/snapshot/load", &load, not_allowed);
    idle.api.assert_alive("Not started");
    idle.api.start_bare("bare.do=hello", &[]);
    idle.api.vm.wait_for("bare: hello", brume_tests::vm::SOON);
    // Runs already.
    let mut live = Live::restored(&saved.files, &json!({}));
    for _ in 0..2 {
        refused(&live, "/snapshot/load", &load, too_late);
        refused(
            &live,
            "/snapshot/create",
            &create,
            "save/restore unavailable while running",
        );
    }
    live.hash();
    live.pause();
    refused(&live, "/snapshot/load", &load, too_late);
    live.resume();
    live.status();
    assert!(before == std::fs::read(&saved.files.state).unwrap());
}

#[test]
fn paths_that_no_file_can_be_at_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let good = Snapshot::named(folder.path(), "good");
    let mut live = Live::start("", &[]);
    live.pause();
    live.save("Full", &good);
    let before = std::fs::read(&good.state).unwrap();
    super::run("mkfifo", &[path("pipe").as_os_str()]);
    std::fs::create_dir(path("folder")).unwrap();
    for (bad, words) in [
        (path("pipe"), "is a named pipe"),
        (path("folder"), "is a folder"),
        (path("none/file"), "cannot be created"),
        ("/dev/zero".into(), "is a device"),
        // Not even root makes a file there.
        ("/proc/self/file".into(), "cannot be created"),
        (path("name/"), "names no file"),
    ] {
        let state = Snapshot {
            state: bad.clone(),
            ..good.clone()
        };
        let memory = Snapshot {
            memory: bad.clone(),
            ..good.clone()
        };
        for files in [state, memory] {
            let request = files.create_request("Full");
            refused(&live, "/snapshot/create", &request, words);
            refused(&live, "/snapshot/create", &request, bad.to_str().unwrap());
        }
    }
    // Both the same, by whatever name.
    std::os::unix::fs::symlink(folder.path(), path("link")).unwrap();
    for other in [good.state.clone(), path("link/good.state")] {
        let same = Snapshot {
            memory: other,
            ..good.clone()
        };
        let words = "cannot be both the memory and the state";
        refused(
            &live,
            "/snapshot/create",
            &same.create_request("Full"),
            words,
        );
    }
    assert!(before == std::fs::read(&good.state).unwrap());
    assert_eq!(unfinished(folder.path()), [""; 0]);
    live.resume();
    live.hash();
    drop(live);
    super::assert_works(&good);
}
