// SPDX-License-Identifier: Apache-2.0
//! Real Linux, by every way to start it, with everything it needs from the machine.
//!
//! On a KVM that emulates guest kernel code a boot takes from ten seconds to a minute, so each boot
//! checks several things.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use brume_tests::netns::NetNs;
use brume_tests::vm::{LINUX, Outcome, Vm, brume, outcome, output_of, run_linux};
use brume_tests::{artefacts, linux_slot};
use serde_json::json;
use tempfile::TempDir;

fn copy_of_rootfs() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rootfs.ext4");
    fs::copy(artefacts::rootfs(), &path).unwrap();
    (folder, path)
}

/// Runs a guest with `vcpus` vCPUs to its orderly end.
fn run(mut command: Command, vcpus: usize) -> Outcome {
    command.args(["--cpus", &vcpus.to_string()]);
    let _slot = linux_slot(vcpus);
    let outcome = outcome(command, LINUX);
    outcome.assert_clean();
    outcome
}

/// Checks that the guest did each step.
#[track_caller]
fn assert_ok(outcome: &Outcome, steps: &[&str]) {
    for step in steps {
        outcome.line(&format!("brume-guest: {step} ok"));
    }
    assert!(!outcome.stdout.contains(" failed: "), "{outcome:#?}");
}

/// Checks that the file system in `image` has the guest's file with `token` in it.
#[track_caller]
fn assert_wrote(image: &Path, token: &str) {
    let image = image.to_str().unwrap();
    let debugfs = if Path::new("/sbin/debugfs").exists() {
        "/sbin/debugfs"
    } else {
        "debugfs"
    };
    let text = output_of(debugfs, &["-R", "cat /brume-wrote", image]);
    assert!(
        text.contains(token),
        "no `{token}` in the guest's file: {text:?}"
    );
}

#[test]
fn elf_with_acpi_and_a_disk() {
    let (_folder, disk) = copy_of_rootfs();
    let args = "brume.token=by-elf brume.do=hello,blkid,disk,poweroff";
    let mut command = run_linux(&artefacts::vmlinux(), args);
    command
        .args(["--kernel-protocol", "elf64", "--disk"])
        .arg(&disk);
    let outcome = run(command, 1);
    assert_ok(&outcome, &["hello", "blkid", "disk", "poweroff"]);
    assert!(outcome.line("brume-guest: hello").contains("acpi=on"));
    assert!(outcome.line("brume-guest: poweroff").contains("by=acpi"));
    assert_wrote(&disk, "by-elf");
}

#[test]
fn pvh_without_acpi_and_two_vcpus_at_work() {
    let (_folder, disk) = copy_of_rootfs();
    let args = "acpi=off brume.token=by-pvh brume.do=hello,cpus,disk,reboot";
    let mut command = run_linux(&artefacts::vmlinux(), args);
    command
        .args(["--kernel-protocol", "pvh", "--disk"])
        .arg(&disk);
    let outcome = run(command, 2);
    assert_ok(&outcome, &["hello", "cpus", "disk", "reboot"]);
    assert!(outcome.line("brume-guest: hello").contains("acpi=off"));
    assert!(outcome.line("brume-guest: cpus").contains("online=2 cpu0="));
    assert_wrote(&disk, "by-pvh");
}

#[test]
fn two_vcpus_with_acpi() {
    let command = run_linux(&artefacts::vmlinux(), "brume.do=hello,cpus,poweroff");
    let outcome = run(command, 2);
    assert_ok(&outcome, &["hello", "cpus", "poweroff"]);
    let line = outcome.line("brume-guest: cpus");
    for cpu in ["cpu0=", "cpu1="] {
        let count = line.split(cpu).nth(1).unwrap().split(' ').next().unwrap();
        assert!(count.parse::<u64>().unwrap() > 0, "{line}");
    }
}

#[test]
fn bzimage() {
    let command = run_linux(&artefacts::bzimage(), "brume.do=hello,poweroff");
    assert_ok(&run(command, 1), &["hello", "poweroff"]);
}

/// A guest with its root on the disk in `spec`, told `args`.
fn run_from_disk(spec: &str, memory: &str, args: &str) -> Outcome {
    let mut command = brume();
    command.args(["run", "--memory", memory, "--disk", spec, "--kernel"]);
    command.arg(artefacts::vmlinux());
    let args = format!("{} quiet init=/sbin/init {args}", artefacts::linux_args());
    command.arg("--cmdline").arg(args);
    run(command, 1)
}

#[test]
fn root_on_a_disk() {
    let (_folder, disk) = copy_of_rootfs();
    let spec = format!("{},root,engine=async", disk.display());
    let args = "brume.token=from-root brume.do=hello,disk,poweroff";
    let outcome = run_from_disk(&spec, "256M", args);
    assert_ok(&outcome, &["hello", "disk", "poweroff"]);
    assert!(
        !outcome
            .line("brume-guest: hello")
            .contains("root=initramfs")
    );
    assert_wrote(&disk, "from-root");
}

#[test]
fn a_read_only_disk_from_a_configuration_file() {
    let (folder, disk) = copy_of_rootfs();
    let before = fs::read(&disk).unwrap();
    let file = folder.path().join("vm.json");
    let args = format!(
        "{} quiet brume.do=hello,diskro,reboot",
        artefacts::linux_args()
    );
    let config = json!({
        "boot-source": {
            "kernel_image_path": artefacts::vmlinux(), "initrd_path": artefacts::initramfs(),
            "boot_args": args,
        },
        "drives": [{
            "drive_id": "d", "is_root_device": false, "is_read_only": true, "path_on_host": disk,
        }],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 256},
    });
    fs::write(&file, config.to_string()).unwrap();
    let mut command = brume();
    command.arg("--no-api").arg("--config-file").arg(file);
    let _slot = linux_slot(1);
    let outcome = outcome(command, LINUX);
    assert_ok(outcome.assert_clean(), &["hello", "diskro", "reboot"]);
    assert!(fs::read(&disk).unwrap() == before, "the disk has changed");
}

#[test]
fn four_gib_of_memory() {
    // The kernel sets up every page it manages, which takes minutes where it is emulated; so it is
    // given the first part, and the guest's program checks the rest as it lies in the machine.
    // An initrd lies at the end of low RAM, out of that part, so the root is on a disk.
    let (_folder, disk) = copy_of_rootfs();
    let spec = format!("{},root", disk.display());
    let outcome = run_from_disk(&spec, "4G", "mem=256M brume.do=hello,ram,poweroff");
    assert_ok(&outcome, &["hello", "ram", "poweroff"]);
}

#[test]
fn two_guests_on_one_bridge_reach_each_other() {
    let network = NetNs::new();
    network.sh("ip link add br0 type bridge; ip link set br0 up; ip tuntap add tap0 mode tap");
    network.sh("ip link set tap0 master br0; ip link set tap0 up");
    let guest = |net: &str, args: &str| {
        let mut command = run_linux(&artefacts::vmlinux(), args);
        command.args(["--net", net]);
        network.wrap(&command)
    };
    let _slot = linux_slot(2);
    // One on a TAP of brume's, one on a TAP that was there.
    let answers = "brume.ip=10.9.0.1/24 brume.do=hello,net,pinged=3,poweroff";
    let asks = "brume.ip=10.9.0.2/24 brume.do=hello,net,echo,ping=10.9.0.1,poweroff";
    let listener = Vm::spawn(guest("bridge=br0,mac=06:00:00:00:09:01", answers));
    let mut asker = Vm::spawn(guest("tap=tap0", asks));
    listener.wait_for("brume-guest: pinged note waiting_for=3", LINUX);
    asker.wait_for("brume-guest: echo note ready", LINUX);
    asker.send(b"go\n");
    let [listener, asker] = [listener, asker]
        .map(|vm| thread::spawn(move || vm.wait(LINUX)))
        .map(|t| t.join().unwrap());
    let steps = ["hello", "net", "echo", "ping", "poweroff"];
    assert_ok(asker.assert_clean(), &steps);
    assert_ok(
        listener.assert_clean(),
        &["hello", "net", "pinged", "poweroff"],
    );
    assert!(
        listener
            .line("brume-guest: net ok")
            .contains("mac=06:00:00:00:09:01")
    );
    assert_eq!(network.links().lines().count(), 3, "{}", network.links());
}
