// SPDX-License-Identifier: Apache-2.0
//! Rate limiters, over ten seconds of a guest that asks for as much as it gets.

use std::fs;
use std::process::Command;
use std::thread;

use brume_tests::artefacts;
use brume_tests::host;
use brume_tests::netns::NetNs;
use brume_tests::vm::{SOON, brume, outcome};
use serde_json::{Value, json};

use crate::block::disk;

/// How long each guest asks.
const MS: u32 = 10_000;

/// A limit per second, with a bucket for half a second: a host that takes the processor away takes
/// nothing from a guest for so long.
fn bucket(per_second: u64) -> Value {
    json!({"size": per_second / 2, "refill_time": 500})
}

/// The program on a configuration with `parts`, and where that is.
fn command(args: &str, parts: &Value) -> (tempfile::TempDir, Command) {
    let args = format!("bare.tsc_khz={} bare.ms={MS} {args}", host::tsc_khz());
    let mut config = json!({
        "boot-source": {"kernel_image_path": artefacts::bare(), "boot_args": args},
        "drives": [],
    });
    let all = config.as_object_mut().unwrap();
    all.extend(parts.as_object().unwrap().clone());
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vm.json");
    fs::write(&file, config.to_string()).unwrap();
    let mut command = brume();
    command.arg("--no-api").arg("--config-file").arg(file);
    (folder, command)
}

/// Checks what the guest got of what `key` counts in the line of `step`.
fn check(command: Command, step: &str, key: &str, limit: u64) {
    let outcome = outcome(command, SOON);
    let line = outcome.line(&format!("bare: {step} "));
    let number = |key: &str| -> f64 {
        let mut words = line.split_whitespace();
        let value = words.find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        value.unwrap().parse().unwrap()
    };
    // By the guest's own clock.
    let flown = number("ns") / 1e9 * limit as f64;
    let most = flown + limit as f64 / 2.0;
    let got = number(key);
    assert!(
        (0.95 * flown..=1.01 * most).contains(&got),
        "{step}: {got}, though {flown} flowed into the bucket"
    );
}

fn drive(limiter: &Value, step: &str, key: &str, limit: u64) {
    let (_folder, path) = disk();
    let drive = json!({"drives": [{
        "drive_id": "d", "is_root_device": false, "path_on_host": path, "rate_limiter": limiter,
    }]});
    let (_config, command) = command(&format!("bare.do={step}"), &drive);
    check(command, step, key, limit);
}

#[test]
fn limits_are_held() {
    thread::scope(|scope| {
        scope.spawn(|| {
            let limiter = json!({"ops": bucket(2000)});
            drive(&limiter, "blk-randread", "ops", 2000);
        });
        scope.spawn(|| {
            let limiter = json!({"bandwidth": bucket(40 << 20)});
            drive(&limiter, "blk-seqwrite", "bytes", 40 << 20);
        });
        scope.spawn(|| {
            let network = NetNs::new();
            network.sh("ip tuntap add tap0 mode tap vnet_hdr; ip link set tap0 up");
            let interface = json!({"network-interfaces": [{
                "iface_id": "e", "host_dev_name": "tap0",
                "tx_rate_limiter": {"bandwidth": bucket(2 << 20)},
            }]});
            let (_config, command) = command("bare.do=net-tx bare.bytes=1514", &interface);
            check(network.wrap(&command), "net-tx", "bytes", 2 << 20);
        });
    });
}
