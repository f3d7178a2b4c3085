// SPDX-License-Identifier: Apache-2.0
//! The metadata service, with Linux as the client.

use std::fs;

use brume_tests::netns::NetNs;
use brume_tests::vm::{LINUX, brume, outcome};
use brume_tests::{artefacts, linux_slot};
use serde_json::json;

/// FNV-1a of 64 bits, as the guest counts it.
fn fnv1a(data: &[u8]) -> u64 {
    data.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[test]
fn linux_gets_a_token_and_a_value_of_many_segments() {
    let network = NetNs::new();
    network.sh("ip tuntap add tap0 mode tap vnet_hdr; ip link set tap0 up");
    let folder = tempfile::tempdir().unwrap();
    let [file, metadata] = ["vm.json", "metadata.json"].map(|name| folder.path().join(name));
    let value: String = (0..9000).map(|n| format!("{n:05}")).collect();
    fs::write(&metadata, json!({"big": value}).to_string()).unwrap();
    let args = format!(
        "{} quiet brume.ip=169.254.1.2/16 brume.do=net,mmds=169.254.170.2/big,reboot",
        artefacts::linux_args()
    );
    let config = json!({
        "boot-source": {
            "kernel_image_path": artefacts::vmlinux(), "initrd_path": artefacts::initramfs(),
            "boot_args": args,
        },
        "drives": [],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 256},
        "network-interfaces": [{"iface_id": "eth0", "host_dev_name": "tap0"}],
        "mmds-config": {
            "version": "V2", "network_interfaces": ["eth0"], "ipv4_address": "169.254.170.2",
        },
    });
    fs::write(&file, config.to_string()).unwrap();
    let mut command = brume();
    command.arg("--no-api").arg("--config-file").arg(file);
    command.arg("--metadata").arg(metadata);
    let _slot = linux_slot(1);
    let outcome = outcome(network.wrap(&command), LINUX);
    let json = format!("\"{value}\"");
    assert_eq!(
        outcome.assert_clean().line("brume-guest: mmds"),
        format!(
            "brume-guest: mmds ok without=401 token=200 status=200 bytes={} fnv={:016x}",
            json.len(),
            fnv1a(json.as_bytes())
        )
    );
}
