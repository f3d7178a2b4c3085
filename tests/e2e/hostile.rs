// SPDX-License-Identifier: Apache-2.0
//! A hostile driver: after whatever it does, a reset makes the device work again.

use brume_tests::netns::NetNs;
use brume_tests::vm::{Outcome, SOON, outcome, run_bare};

use crate::block::disk;

#[test]
fn a_disk_survives_a_hostile_driver() {
    for engine in ["sync", "async"] {
        let (_folder, path) = disk();
        let mut command = run_bare("bare.do=hostile-blk");
        command
            .arg("--disk")
            .arg(format!("{},engine={engine}", path.display()));
        check(&outcome(command, SOON), "hostile-blk");
    }
}

#[test]
fn a_network_interface_survives_a_hostile_driver() {
    let network = NetNs::new();
    network.sh("ip tuntap add tap0 mode tap vnet_hdr; ip link set tap0 up");
    let mut command = run_bare("bare.do=hostile-net");
    command.args(["--net", "tap=tap0"]);
    check(&outcome(network.wrap(&command), SOON), "hostile-net");
}

fn check(outcome: &Outcome, step: &str) {
    assert_eq!(outcome.status, 0, "{outcome:#?}");
    let sums: Vec<_> = outcome
        .stdout
        .lines()
        .filter(|line| line.starts_with(&format!("bare: {step}")) && line.contains(" cases="))
        .collect();
    assert!(
        !sums.is_empty(),
        "the guest did not come to an end: {outcome:#?}"
    );
    assert!(
        sums.iter().all(|sum| sum.contains("dead=0 wrong=0")),
        "{sums:#?}: {outcome:#?}"
    );
    let cases = outcome
        .stdout
        .lines()
        .filter(|line| line.contains(" case="))
        .count();
    assert!(cases > 50, "only {cases} cases: {outcome:#?}");
    // A hundred mistakes are no reason for a hundred lines.
    assert!(outcome.stderr.lines().count() < 10, "{}", outcome.stderr);
}
