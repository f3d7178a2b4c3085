// SPDX-License-Identifier: Apache-2.0
//! Every way for a machine to end has its exit status, and leaves nothing behind.

use std::fs;
use std::path::Path;

use brume_tests::artefacts;
use brume_tests::netns::NetNs;
use brume_tests::vm::{SOON, Vm, brume, outcome, run_bare};
use serde_json::json;

use crate::block::disk;

#[test]
fn reset_and_power_off_end_with_0() {
    for end in ["reset", "poweroff"] {
        let outcome = outcome(run_bare(&format!("bare.do=hello bare.end={end}")), SOON);
        assert!(
            !outcome.assert_clean().stdout.contains("ignored"),
            "{outcome:#?}"
        );
    }
}

#[test]
fn a_panic_is_logged_once_and_ends_nothing() {
    let outcome = outcome(run_bare("bare.do=panic,hello"), SOON);
    assert_eq!(outcome.status, 0, "{outcome:#?}");
    let said = outcome.stderr.matches("the guest's kernel has panicked");
    assert_eq!(said.count(), 1, "{outcome:#?}");
    for line in ["bare: panicked events=0x1", "bare: hello"] {
        assert!(outcome.stdout.contains(line), "{outcome:#?}");
    }
}

#[test]
fn a_triple_fault_ends_with_4_but_is_orderly_for_firecrackers_clients() {
    let args = "bare.do=hello bare.end=triple";
    assert_eq!(outcome(run_bare(args), SOON).status, 4);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vm.json");
    let boot = json!({"kernel_image_path": artefacts::bare(), "boot_args": args});
    fs::write(
        &file,
        json!({"boot-source": boot, "drives": []}).to_string(),
    )
    .unwrap();
    let mut command = brume();
    command.arg("--no-api").arg("--config-file").arg(file);
    outcome(command, SOON).assert_clean();
}

#[test]
fn an_instruction_kvm_cannot_emulate_is_shown_and_ends_with_5() {
    let outcome = outcome(run_bare("bare.do=hello bare.end=badinsn"), SOON);
    assert_eq!(outcome.status, 5, "{outcome:#?}");
    for part in [
        "brume: vCPU 0: ",
        "internal error 1",
        "rip ",
        "cr3 ",
        "f3 48 0f b8",
        "`popcnt`",
        "clearcpuid",
    ] {
        assert!(
            outcome.stderr.contains(part),
            "`{part}` is missing: {}",
            outcome.stderr
        );
    }
    assert_eq!(
        outcome.stderr.matches("rip ").count(),
        1,
        "it is said once: {}",
        outcome.stderr
    );
}

#[test]
fn signals_end_it_with_their_statuses() {
    for (signal, status) in [
        (libc::SIGTERM, 143),
        (libc::SIGINT, 130),
        (libc::SIGHUP, 156),
    ] {
        let vm = Vm::spawn(run_bare("bare.do=hello bare.end=spin"));
        vm.wait_for("bare: hello", SOON);
        vm.signal(signal);
        let outcome = vm.wait(SOON);
        assert!(
            outcome.status == status && outcome.stderr.is_empty(),
            "{signal}: {outcome:#?}"
        );
    }
}

#[test]
fn a_tap_that_was_made_goes_with_the_machine_and_one_that_was_there_stays() {
    let network = NetNs::new();
    network.sh("ip link add br0 type bridge; ip link set br0 up; ip tuntap add tap0 mode tap");
    for (spec, links) in [("bridge=br0", 4), ("tap=tap0", 3)] {
        for signal in [libc::SIGTERM, libc::SIGKILL] {
            let mut command = run_bare("bare.do=hello bare.end=spin");
            command.args(["--net", spec]);
            let vm = Vm::spawn(network.wrap(&command));
            vm.wait_for("bare: hello", SOON);
            assert_eq!(
                network.links().lines().count(),
                links,
                "{spec}: {}",
                network.links()
            );
            vm.signal(signal);
            vm.wait(SOON);
            // The kernel takes a TAP down a moment after its last user is gone.
            for _ in 0..1000 {
                if network.links().lines().count() == 3 {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            assert_eq!(
                network.links().lines().count(),
                3,
                "{spec}: {}",
                network.links()
            );
        }
    }
}

#[test]
fn a_tap_that_was_made_has_the_mtu_that_the_guest_is_told() {
    let network = NetNs::new();
    network.sh("ip link add br0 type bridge; ip link set br0 up");
    let mut command = run_bare("bare.do=hello bare.end=spin");
    command.args(["--net", "bridge=br0,mtu=1400"]);
    let vm = Vm::spawn(network.wrap(&command));
    vm.wait_for("bare: hello", SOON);
    let links = network.links();
    let tap = links.lines().find(|line| line.contains("brume0")).unwrap();
    assert!(tap.contains("mtu 1400"), "{tap}");
    vm.signal(libc::SIGTERM);
    vm.wait(SOON);
}

#[test]
fn the_lock_on_a_disk_goes_with_the_machine() {
    let (_folder, path) = disk();
    let with_disk = |args: &str| {
        let mut command = run_bare(args);
        command.arg("--disk").arg(&path);
        command
    };
    let vm = Vm::spawn(with_disk("bare.do=hello bare.end=spin"));
    vm.wait_for("bare: hello", SOON);
    assert_eq!(outcome(with_disk("bare.do=hello"), SOON).status, 152);
    vm.signal(libc::SIGKILL);
    assert_eq!(vm.wait(SOON).status, 128 + libc::SIGKILL);
    outcome(with_disk("bare.do=hello"), SOON).assert_clean();
}

#[test]
fn no_process_outlives_its_machine() {
    let vm = Vm::spawn(run_bare("bare.do=hello bare.end=spin"));
    vm.wait_for("bare: hello", SOON);
    let pid = vm.pid();
    vm.signal(libc::SIGTERM);
    vm.wait(SOON);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}
