// SPDX-License-Identifier: Apache-2.0
//! The control API, end to end: what each endpoint answers, and what is told of a machine's life.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use brume_tests::api::{ApiVm, eventually};
use brume_tests::artefacts;
use brume_tests::netns::NetNs;
use brume_tests::vm::{SOON, Vm, brume, outcome};
use serde_json::{Value, json};

use crate::block::disk;

const CONTRACT: &str = include_str!("api/contract.txt");

/// A request and what is answered.
struct Row {
    method: &'static str,
    path: &'static str,
    body: &'static str,
    answer: &'static str,
}

/// The rows of the contract; `firecracker` chooses its answers where they are others.
fn rows(firecracker: bool) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    let lines = CONTRACT.lines();
    for line in lines.filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let Some(answer) = line.strip_prefix("  ") else {
            let mut words = line.splitn(3, ' ');
            let mut word = || words.next().unwrap_or_default();
            let (method, path, body) = (word(), word(), word());
            rows.push(Row {
                method,
                path,
                body,
                answer: "",
            });
            continue;
        };
        let row = rows.last_mut().unwrap();
        match answer.strip_prefix("Firecracker ") {
            Some(other) if firecracker => row.answer = other,
            Some(_) => {}
            None => row.answer = answer,
        }
    }
    rows
}

/// Sends all of the contract to `program`; the rows that are answered otherwise.
fn differences(program: Command, version: &str, firecracker: bool) -> Vec<String> {
    let network = NetNs::new();
    for tap in ["tap0", "tap1"] {
        network.sh(&format!(
            "ip tuntap add {tap} mode tap vnet_hdr; ip link set {tap} up"
        ));
    }
    let api = ApiVm::start_with(program, |command| network.wrap(&command));
    for name in ["disk", "disk2"] {
        fs::write(api.folder().join(name), vec![0; 1 << 20]).unwrap();
    }
    fs::write(api.folder().join("f"), "").unwrap();
    let fill = |text: &str| {
        text.replace("$K", artefacts::bare().to_str().unwrap())
            .replace("$D", api.folder().to_str().unwrap())
            .replace("$V", version)
    };
    let mut found = Vec::new();
    for row in rows(firecracker) {
        let reply = api.send(row.method, row.path, &fill(row.body));
        let deprecated = reply.header("deprecation") == Some("true");
        let status = format!("{}{}", reply.status, if deprecated { "!" } else { "" });
        let (expected_status, expected) = row.answer.split_once(' ').unwrap_or((row.answer, ""));
        if status != expected_status || !is_answer(&reply.body, &fill(expected)) {
            found.push(format!(
                "{} {} {}\n  wanted {}\n  got    {status} {}",
                row.method, row.path, row.body, row.answer, reply.body
            ));
        }
    }
    found
}

/// Whether `body` is nothing, this fault, this JSON value or this text.
fn is_answer(body: &str, expected: &str) -> bool {
    let Ok(value) = serde_json::from_str::<Value>(body) else {
        return body.split_whitespace().eq(expected.split_whitespace());
    };
    match &value["fault_message"] {
        Value::String(text) => text == expected,
        _ => serde_json::from_str(expected).is_ok_and(|expected: Value| value == expected),
    }
}

#[test]
fn each_endpoint_keeps_the_contract_in_each_phase() {
    assert!(rows(false).len() > 250, "rows are missing");
    let found = differences(brume(), brume_vmm::FIRECRACKER_VERSION, false);
    assert!(
        found.is_empty(),
        "{} rows:\n{}",
        found.len(),
        found.join("\n")
    );
}

/// Says whether the contract is right about Firecracker. It needs its program in `$FIRECRACKER`.
#[test]
fn firecracker_differs_only_where_the_contract_says_so() {
    let Some(program) = std::env::var_os("FIRECRACKER") else {
        return;
    };
    let version = outcome_of_version(Path::new(&program));
    let mut command = Command::new(&program);
    command.arg("--no-seccomp");
    let found = differences(command, &version, true);
    assert!(
        found.is_empty(),
        "{} rows:\n{}",
        found.len(),
        found.join("\n")
    );
}

/// The version that `program` tells in its first line.
fn outcome_of_version(program: &Path) -> String {
    let mut command = Command::new(program);
    command.arg("--version");
    let outcome = outcome(command, SOON);
    let line = outcome.line("Firecracker v");
    line.trim_start_matches("Firecracker v").trim().to_owned()
}

#[test]
fn a_socket_path_that_is_taken_is_refused_and_left_alone() {
    let first = ApiVm::new();
    let file = first.folder().join("file");
    fs::write(&file, "mine").unwrap();
    for path in [&first.socket, &file] {
        let mut command = brume();
        command.arg("--api-sock").arg(path);
        let refusal = outcome(command, SOON);
        assert_ne!(refusal.status, 0, "{refusal:#?}");
        let told = format!("{}{}", refusal.stdout, refusal.stderr);
        assert!(told.contains("exists already"), "{told}");
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
    first.assert_alive("Not started");
}

/// The `data:` of each event that `text` has.
fn events(text: &str) -> Vec<Value> {
    let data = text.lines().filter(|line| line.starts_with('{'));
    data.map(|data| serde_json::from_str(data).unwrap())
        .collect()
}

#[test]
fn events_tell_each_change_and_the_end() {
    let api = ApiVm::new();
    let (_folder, disk) = disk();
    let drive = json!({"drive_id": "d", "is_root_device": false, "path_on_host": disk});
    let watch = Vm::spawn(api.ctl(["events", "--json"]));
    watch.wait_for("Not started", SOON);
    // It takes some time, in which it is paused and resumed, and then powers itself off.
    let args = "bare.do=echo bare.end=poweroff";
    let mut api = api;
    api.start_bare(args, &[("/drives/d", drive)]);
    watch.wait_for("Running", SOON);
    api.done("PATCH", "/vm", &json!({"state": "Paused"}));
    let patch = json!({"drive_id": "d", "path_on_host": disk});
    api.done("PATCH", "/drives/d", &patch);
    api.done("PATCH", "/vm", &json!({"state": "Resumed"}));
    api.vm.wait_for("bare: echo ready", SOON);
    api.vm.send(b"end\n");
    let told = watch.wait(SOON);
    assert_eq!(told.status, 0, "{told:#?}");
    let told = events(&told.stdout);
    let names: Vec<_> = told
        .iter()
        .map(|event| {
            let detail = ["state", "device"].map(|key| event[key].as_str().unwrap_or(""));
            format!("{} {}", event["event"].as_str().unwrap(), detail.concat())
        })
        .collect();
    let expected = [
        "state Not started",
        "state Running",
        "state Paused",
        "device_changed d",
        "state Running",
        "power_off ",
    ];
    assert_eq!(
        names.get(..expected.len()),
        Some(&expected.map(String::from)[..]),
        "{names:?}"
    );
    let times: Vec<_> = told.iter().map(|event| event["time_ms"].as_u64()).collect();
    assert!(
        times.is_sorted() && times[0] > Some(1_600_000_000_000),
        "{times:?}"
    );
    let end = api.vm.wait(SOON);
    assert_eq!(end.status, 0, "{end:#?}");
}

#[test]
fn ctl_shows_and_steers_a_machine() {
    let api = ApiVm::new();
    let ctl = |args: &[&str]| outcome(api.ctl(args), SOON);
    let early = ctl(&["pause"]);
    assert_ne!(early.status, 0);
    assert!(early.stderr.contains("not supported before"), "{early:#?}");
    api.start_bare("bare.do=hello bare.end=spin", &[]);
    ctl(&["pause"]).assert_clean();
    let shown = ctl(&["info"]);
    let state = shown.assert_clean().line("state");
    assert_eq!(state.split_whitespace().last(), Some("Paused"));
    let shown = ctl(&["info", "--json"]);
    let shown: Value = serde_json::from_str(&shown.assert_clean().stdout).unwrap();
    assert_eq!(shown["instance"]["state"], "Paused");
    assert_eq!(shown["config"]["machine-config"]["vcpu_count"], 1);
    ctl(&["resume"]).assert_clean();
    api.assert_alive("Running");
    let metrics = ctl(&["metrics"]);
    assert!(metrics.assert_clean().stdout.contains("# HELP"));
    ctl(&["stop"]).assert_clean();
    let ApiVm { vm, .. } = api;
    let end = vm.wait(SOON);
    assert_eq!(end.status, 0, "{end:#?}");
}

#[test]
fn metrics_are_prometheus_text() {
    let api = ApiVm::new();
    let before = samples(&api);
    api.start_bare("bare.do=hello bare.end=spin", &[]);
    api.vm.wait_for("bare: hello", SOON);
    let after = samples(&api);
    let requests = |samples: &[(String, f64)]| -> f64 {
        let named = samples
            .iter()
            .filter(|(name, _)| name.starts_with("brume_api_requests"));
        named.map(|(_, value)| value).sum()
    };
    assert!(requests(&before) < requests(&after), "{after:?}");
    let exits = after
        .iter()
        .any(|(name, value)| name.contains("exit") && *value > 0.0);
    assert!(exits, "{after:?}");
}

/// The samples of GET /metrics, each of whose families has a help text and a type.
fn samples(api: &ApiVm) -> Vec<(String, f64)> {
    let reply = api.send("GET", "/metrics", "");
    assert_eq!(reply.status, 200);
    assert_eq!(
        reply.header("content-type"),
        Some("text/plain; version=0.0.4")
    );
    let (mut helped, mut typed, mut samples) = (Vec::new(), Vec::new(), Vec::new());
    for line in reply.body.lines() {
        let mut words = line.split(' ');
        match (words.next(), words.next()) {
            (Some("#"), Some("HELP")) => helped.push(words.next().unwrap().to_owned()),
            (Some("#"), Some("TYPE")) => typed.push(words.next().unwrap().to_owned()),
            _ => {
                let (name, value) = line.rsplit_once(' ').unwrap();
                let family = name.split('{').next().unwrap();
                let of_family = |known: &String| {
                    let rest = family.strip_prefix(known.as_str());
                    matches!(rest, Some("" | "_bucket" | "_sum" | "_count"))
                };
                assert!(
                    helped.iter().any(of_family) && typed.iter().any(of_family),
                    "{line}"
                );
                samples.push((name.to_owned(), value.parse().unwrap()));
            }
        }
    }
    assert!(samples.len() > 10, "{}", reply.body);
    samples
}

#[test]
fn the_metrics_file_has_firecrackers_keys() {
    let api = ApiVm::new();
    let (_folder, disk) = disk();
    let file = api.folder().join("metrics");
    let drive = json!({"drive_id": "d", "is_root_device": false, "path_on_host": disk});
    let metrics = json!({"metrics_path": file});
    api.start_bare(
        "bare.end=spin",
        &[("/drives/d", drive), ("/metrics", metrics)],
    );
    let lines = || {
        let text = fs::read_to_string(&file).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
        lines.collect::<Vec<Value>>()
    };
    eventually("a line is there from the start", || lines().len() == 1);
    api.done("PATCH", "/vm", &json!({"state": "Paused"}));
    api.assert_alive("Paused");
    api.done("PUT", "/actions", &json!({"action_type": "FlushMetrics"}));
    let lines = lines();
    assert_eq!(lines.len(), 2);
    let last = lines[1].as_object().unwrap();
    let groups = [
        "api_server",
        "balloon",
        "block",
        "block_d",
        "deprecated_api",
        "entropy",
        "get_api_requests",
        "i8042",
        "interrupts",
        "latencies_us",
        "logger",
        "memory_hotplug",
        "mmds",
        "net",
        "patch_api_requests",
        "pmem",
        "put_api_requests",
        "seccomp",
        "signals",
        "uart",
        "utc_timestamp_ms",
        "vcpu",
        "vhost_user_block",
        "vmm",
        "vsock",
    ];
    for group in groups {
        if group != "vhost_user_block" {
            assert!(last.contains_key(group), "{group} is missing");
        }
    }
    assert_eq!(
        last["get_api_requests"]["instance_info_count"], 1,
        "{last:?}"
    );
    assert!(last["latencies_us"]["vmm_pause_vm"].as_u64() > Some(0));
    let numbers = last.iter().filter(|(name, _)| *name != "utc_timestamp_ms");
    for (name, group) in numbers {
        let group = group.as_object().unwrap();
        assert!(
            group
                .values()
                .all(|value| value.is_u64() || value.is_object()),
            "{name}"
        );
    }
}

#[test]
fn the_guest_is_told_of_another_size() {
    let api = ApiVm::new();
    let (_folder, disk) = disk();
    let drive = json!({"drive_id": "d", "is_root_device": false, "path_on_host": disk});
    api.start_bare(
        "bare.do=blk-resize bare.ops=2 bare.end=spin",
        &[("/drives/d", drive)],
    );
    api.vm.wait_for("blk-resize capacity=8192 last=0", SOON);
    fs::File::options()
        .write(true)
        .open(&disk)
        .unwrap()
        .set_len(9000 * 512)
        .unwrap();
    // The same file again, to look at its size.
    outcome(
        api.ctl(["drive".as_ref(), "d".as_ref(), disk.as_os_str()]),
        SOON,
    )
    .assert_clean();
    api.vm.wait_for("blk-resize capacity=9000 last=0", SOON);
    let other = api.folder().join("other");
    fs::write(&other, vec![0; 512 * 100]).unwrap();
    let patch = json!({"drive_id": "d", "path_on_host": other});
    api.done("PATCH", "/drives/d", &patch);
    api.vm.wait_for("blk-resize capacity=100 last=0", SOON);
    assert_eq!(
        api.get("/vm/config")["drives"][0]["path_on_host"],
        json!(other)
    );
    // What cannot be used is refused, and the disk stays.
    let missing = json!({"drive_id": "d", "path_on_host": "/no/disk"}).to_string();
    assert_eq!(api.send("PATCH", "/drives/d", &missing).status, 400);
    assert_eq!(
        api.get("/vm/config")["drives"][0]["path_on_host"],
        json!(other)
    );
    std::thread::sleep(Duration::from_millis(50));
    api.assert_alive("Running");
}
