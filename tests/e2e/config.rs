// SPDX-License-Identifier: Apache-2.0
//! Firecracker's flags and its configuration file.

use std::fs;
use std::path::Path;
use std::process::Command;

use brume_tests::artefacts;
use brume_tests::vm::{SOON, brume, outcome};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::block::disk;

/// A configuration of the bare guest with some parts of it replaced.
fn config(parts: &Value) -> Value {
    let boot_args = "bare.tsc_khz=2000000 bare.do=hello";
    let mut config = json!({
        "boot-source": {"kernel_image_path": artefacts::bare(), "boot_args": boot_args},
        "drives": [],
    });
    config
        .as_object_mut()
        .unwrap()
        .extend(parts.as_object().unwrap().clone());
    config
}

fn no_api(file: &Path) -> Command {
    let mut command = brume();
    command.arg("--no-api").arg("--config-file").arg(file);
    command
}

fn with_file(content: &[u8]) -> (TempDir, Command) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vm.json");
    fs::write(&file, content).unwrap();
    let command = no_api(&file);
    (folder, command)
}

/// Checks that the file is refused with one line that has `part` in it.
#[track_caller]
fn refused(content: &[u8], part: &str) {
    let (_folder, command) = with_file(content);
    let outcome = outcome(command, SOON);
    assert_eq!(outcome.status, 152, "{part}: {outcome:#?}");
    let mut lines = outcome.stderr.lines();
    assert!(
        lines.next().is_some_and(|line| line.contains(part)),
        "{part}: {outcome:#?}"
    );
    assert_eq!(lines.next(), None, "{part}: {outcome:#?}");
}

#[test]
fn a_file_as_firecrackers_clients_write_it_boots() {
    let (_disk_folder, disk) = disk();
    let (folder, mut command) = with_file(
        config(&json!({
            "boot-source": {
                "kernel_image_path": artefacts::bare(),
                "boot_args": "bare.tsc_khz=2000000 bare.do=hello,blk-check",
                "initrd_path": null,
            },
            "drives": [{
                "drive_id": "rootfs", "path_on_host": disk, "is_root_device": true,
                "partuuid": null, "is_read_only": false, "cache_type": "Unsafe",
                "io_engine": "Sync", "rate_limiter": null, "socket": null,
            }],
            "machine-config": {
                "vcpu_count": 2, "mem_size_mib": 256, "smt": false, "track_dirty_pages": true,
                "huge_pages": "None",
            },
            "cpu-config": null, "balloon": null, "network-interfaces": [], "vsock": null,
            "logger": null, "metrics": null, "mmds-config": null, "entropy": null, "pmem": [],
            "memory-hotplug": null,
        }))
        .to_string()
        .as_bytes(),
    );
    let log = folder.path().join("log");
    command.args([
        "--id",
        "my-vm",
        "--level",
        "Info",
        "--show-level",
        "--show-log-origin",
    ]);
    command.arg("--log-path").arg(&log);
    let outcome = outcome(command, SOON);
    let console = &outcome.assert_clean().stdout;
    assert!(console.contains("root=/dev/vda rw"), "{console}");
    assert!(
        console.contains("virtio_mmio.device=4K@0xc0001000:5"),
        "{console}"
    );
    assert!(
        console.contains("serial=rootfs") && console.contains("mismatches=0"),
        "{console}"
    );
    let log = fs::read_to_string(log).unwrap();
    let line = log
        .lines()
        .find(|line| line.contains("Running brume"))
        .unwrap();
    let (time, rest) = line.split_once(' ').unwrap();
    assert_eq!((time.len(), &time[10..11]), (29, "T"), "{line}");
    assert!(
        rest.starts_with("[my-vm:main:INFO:") && rest.contains(".rs:"),
        "{line}"
    );
}

#[test]
fn without_a_log_file_the_log_is_on_stdout() {
    let (_folder, command) = with_file(config(&json!({"colour": 1})).to_string().as_bytes());
    let outcome = outcome(command, SOON);
    assert_eq!(outcome.status, 0, "{outcome:#?}");
    assert!(
        outcome
            .stdout
            .contains("[anonymous-instance:main] Running brume"),
        "{outcome:#?}"
    );
    assert!(outcome.stdout.contains("`colour`"), "{outcome:#?}");
}

#[test]
fn a_file_that_is_wrong_is_refused_by_name_and_place() {
    let table = [
        (
            json!({"machine-config": {"vcpu_count": 1, "mem_size_mib": 8, "cores": 1}}),
            "`cores`",
        ),
        (
            json!({"machine-config": {"vcpu_count": 1}}),
            "`mem_size_mib`",
        ),
        (
            json!({"machine-config": {"vcpu_count": "one", "mem_size_mib": 8}}),
            "invalid type",
        ),
        (
            json!({"machine-config": {"vcpu_count": 0, "mem_size_mib": 8}}),
            "0 were asked for",
        ),
        (
            json!({"machine-config": {"vcpu_count": 33, "mem_size_mib": 8}}),
            "33 were asked for",
        ),
        (
            json!({"machine-config": {"vcpu_count": 1, "mem_size_mib": 0}}),
            "memory size",
        ),
        (json!({"machine-config": []}), "line 1"),
        (json!({"boot-source": {"kernel": "/k"}}), "`kernel`"),
        (json!({"boot-source": null}), "invalid type: null"),
        (json!({"drives": {}}), "invalid type: map"),
        (
            json!({"drives": [{"drive_id": "d", "is_root_device": 1}]}),
            "invalid type: integer",
        ),
        (
            json!({"drives": [{"drive_id": "d", "is_root_device": false}]}),
            "path_on_host",
        ),
        (
            json!({"network-interfaces": [{"iface_id": "n"}]}),
            "host_dev_name",
        ),
        (
            json!({"vsock": {"guest_cid": 2, "uds_path": "/v"}}),
            "`guest_cid` is 2",
        ),
        (json!({"logger": {"level": "Loud"}}), "Loud"),
        (
            json!({"logger": {"log_path": "/no/folder/log"}}),
            "/no/folder/log",
        ),
    ];
    for (parts, part) in table {
        refused(config(&parts).to_string().as_bytes(), part);
    }
}

#[test]
fn a_file_that_is_none_is_refused() {
    refused(b"", "EOF");
    refused(b"{", "EOF");
    refused(b"[]", "line 1 column");
    refused(b"hello", "line 1 column 1");
    refused(b"{\"boot-source\": \xff}", "UTF-8");
    refused(&vec![b' '; 2 << 20], "more than");
    refused("[".repeat(100_000).as_bytes(), "line 1 column");
    let folder = tempfile::tempdir().unwrap();
    for path in [folder.path(), Path::new("/no/file")] {
        let outcome = outcome(no_api(path), SOON);
        assert_eq!(
            (outcome.status, outcome.stderr.lines().count()),
            (152, 1),
            "{outcome:#?}"
        );
        assert!(
            outcome.stderr.contains(path.to_str().unwrap()),
            "{outcome:#?}"
        );
    }
}

#[test]
fn flags_that_are_wrong_are_refused() {
    let (_folder, mut command) = with_file(config(&json!({})).to_string().as_bytes());
    command.args(["--id", "a_b"]);
    let refusal = outcome(command, SOON);
    assert_eq!(refusal.status, 153, "{refusal:#?}");
    assert!(refusal.stderr.contains("a_b"), "{refusal:#?}");
    let mut alone = brume();
    alone.arg("--no-api");
    let refusal = outcome(alone, SOON);
    assert_eq!(refusal.status, 153, "{refusal:#?}");
    assert!(refusal.stderr.contains("--config-file"), "{refusal:#?}");
}
