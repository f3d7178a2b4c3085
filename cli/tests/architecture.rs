// SPDX-License-Identifier: Apache-2.0
//! Which part may use which: the arrows of ARCHITECTURE.md, held against what cargo sees.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "what does not work is a failed test"
)]

use std::collections::BTreeMap;
use std::process::Command;

use serde_json::Value;

/// Each part, and which others it may be built on.
const ARROWS: [(&str, &[&str]); 10] = [
    ("brume-api", &[]),
    ("brume-boot", &[]),
    ("brume-devices", &[]),
    ("brume-mmds", &[]),
    ("brume-migration", &[]),
    ("brume-snapshot", &[]),
    ("brume-virtio", &["brume-devices", "brume-mmds"]),
    (
        "brume-vmm",
        &[
            "brume-api",
            "brume-boot",
            "brume-devices",
            "brume-mmds",
            "brume-migration",
            "brume-snapshot",
            "brume-virtio",
        ],
    ),
    (
        "brume-cli",
        &["brume-api", "brume-mmds", "brume-snapshot", "brume-vmm"],
    ),
    ("brume-tests", &["brume-api"]),
];

/// What a crate depends on when it is built, not tested.
fn dependencies() -> BTreeMap<String, Vec<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let named = |value: &Value| value["name"].as_str().unwrap().to_owned();
    let of = |package: &Value| {
        let all = package["dependencies"].as_array().unwrap();
        all.iter()
            .filter(|dependency| dependency["kind"].is_null())
            .map(named)
            .collect()
    };
    packages.iter().map(|one| (named(one), of(one))).collect()
}

#[test]
fn arrows_point_one_way() {
    let found = dependencies();
    assert_eq!(
        found.len(),
        ARROWS.len(),
        "a part without a rule: {found:?}"
    );
    for (part, allowed) in ARROWS {
        for dependency in &found[part] {
            assert!(
                !dependency.starts_with("brume-") || allowed.contains(&dependency.as_str()),
                "{part} must not depend on {dependency}"
            );
        }
    }
}

#[test]
fn only_the_vmm_knows_kvm() {
    for (part, dependencies) in dependencies() {
        let kvm = dependencies.iter().any(|name| name.starts_with("kvm-"));
        assert_eq!(kvm, part == "brume-vmm", "{part}: {dependencies:?}");
    }
}
