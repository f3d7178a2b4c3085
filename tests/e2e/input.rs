// SPDX-License-Identifier: Apache-2.0
//! Bad input: one clear line on stderr, the right exit status, nothing on stdout.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use brume_tests::artefacts;
use brume_tests::netns::NetNs;
use brume_tests::vm::{SOON, Vm, brume, inside, outcome, run_bare};

const BAD_CONFIGURATION: i32 = 152;
const BAD_ARGUMENTS: i32 = 153;

/// Checks that `command` is refused with one line that has each of `parts`.
#[track_caller]
fn refused(command: Command, status: i32, parts: &[&str]) {
    let what = format!("{:?}", command.get_args());
    let outcome = outcome(command, SOON);
    assert_eq!(outcome.status, status, "{what}: {outcome:#?}");
    assert!(outcome.stdout.is_empty(), "{what}: {outcome:#?}");
    assert_eq!(outcome.stderr.lines().count(), 1, "{what}: {outcome:#?}");
    assert!(
        outcome.stderr.starts_with("brume: "),
        "{what}: {outcome:#?}"
    );
    for part in parts {
        assert!(
            outcome.stderr.contains(part),
            "{what}: no `{part}` in {}",
            outcome.stderr
        );
    }
}

/// Checks that the command line is refused, with the usage after what is wrong.
#[track_caller]
fn misused(args: &[&str], part: &str) {
    let mut command = run_bare("bare.do=hello");
    command.args(args);
    let outcome = outcome(command, SOON);
    assert_eq!(outcome.status, BAD_ARGUMENTS, "{args:?}: {outcome:#?}");
    assert!(
        outcome.stdout.is_empty() && outcome.stderr.contains(part),
        "{args:?}: {outcome:#?}"
    );
}

fn with_kernel(kernel: &Path) -> Command {
    let mut command = brume();
    command.arg("run").arg("--kernel").arg(kernel);
    command
}

fn bare_with(args: &[&str]) -> Command {
    let mut command = run_bare("bare.do=hello");
    command.args(args);
    command
}

#[test]
fn kernels_that_are_none() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        path
    };
    let elf = fs::read(artefacts::bare()).unwrap();
    refused(
        with_kernel(Path::new("/no/kernel")),
        BAD_CONFIGURATION,
        &["No such file", "/no/kernel"],
    );
    refused(
        with_kernel(folder.path()),
        BAD_CONFIGURATION,
        &["not a regular file"],
    );
    refused(
        with_kernel(&file("text", b"I am no kernel\n")),
        BAD_CONFIGURATION,
        &["kernel"],
    );
    refused(
        with_kernel(&file("empty", b"")),
        BAD_CONFIGURATION,
        &["empty"],
    );
    refused(
        with_kernel(&file("header", &elf[..100])),
        BAD_CONFIGURATION,
        &["truncated"],
    );
    refused(
        with_kernel(&file("half", &elf[..elf.len() / 2])),
        BAD_CONFIGURATION,
        &["truncated"],
    );
    refused(
        bare_with(&["--kernel-protocol=bzimage"]),
        BAD_CONFIGURATION,
        &["bzimage"],
    );
    refused(
        bare_with(&["--kernel-protocol=efi"]),
        BAD_CONFIGURATION,
        &["efi"],
    );
    let loop_link = folder.path().join("loop");
    symlink(&loop_link, &loop_link).unwrap();
    refused(with_kernel(&loop_link), BAD_CONFIGURATION, &["loop"]);
}

#[test]
fn initrds_that_do_not_fit() {
    let folder = tempfile::tempdir().unwrap();
    let large = folder.path().join("large");
    fs::File::create(&large)
        .unwrap()
        .set_len(200 << 20)
        .unwrap();
    let large = large.to_str().unwrap();
    refused(
        bare_with(&["--initrd", large]),
        BAD_CONFIGURATION,
        &["initrd", "memory"],
    );
    refused(
        bare_with(&["--initrd", "/no/initrd"]),
        BAD_CONFIGURATION,
        &["/no/initrd"],
    );
}

#[test]
fn machines_that_cannot_be() {
    refused(
        bare_with(&["--memory", "0"]),
        BAD_CONFIGURATION,
        &["memory size"],
    );
    refused(
        bare_with(&["--memory", "1M"]),
        BAD_CONFIGURATION,
        &["2 MiB"],
    );
    refused(
        bare_with(&["--memory", "4000000G"]),
        BAD_CONFIGURATION,
        &["memory size"],
    );
    refused(
        bare_with(&["--cpus", "0"]),
        BAD_CONFIGURATION,
        &["0 were asked for", "1 to 32"],
    );
    refused(
        bare_with(&["--cpus", "33"]),
        BAD_CONFIGURATION,
        &["33 were asked for", "1 to 32"],
    );
    refused(
        bare_with(&["--cpus", "3", "--smt"]),
        BAD_CONFIGURATION,
        &["even"],
    );
    let long = "x".repeat(4000);
    refused(
        bare_with(&["--append", &long]),
        BAD_CONFIGURATION,
        &["command line"],
    );
}

#[test]
fn disks_that_cannot_be_used() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    fs::write(&path, vec![0; 4096]).unwrap();
    let (path, folder) = (path.to_str().unwrap(), folder.path().to_str().unwrap());
    refused(
        bare_with(&["--disk", "/no/disk"]),
        BAD_CONFIGURATION,
        &["No such file", "/no/disk"],
    );
    refused(
        bare_with(&["--disk", folder]),
        BAD_CONFIGURATION,
        &["directory", folder],
    );
    refused(
        bare_with(&["--disk", "/dev/null"]),
        BAD_CONFIGURATION,
        &["/dev/null"],
    );
    let root = format!("{path},root");
    refused(
        bare_with(&["--disk", &root, "--disk", &root]),
        BAD_CONFIGURATION,
        &["root"],
    );
    let named = format!("{path},id=a");
    refused(
        bare_with(&["--disk", &named, "--disk", &named]),
        BAD_CONFIGURATION,
        &["\"a\"", "twice"],
    );
    refused(
        bare_with(&["--disk", &format!("{path},id=a/b")]),
        BAD_CONFIGURATION,
        &["a/b"],
    );
    let holder = Vm::spawn(bare_with(&["--disk", path, "--append", "bare.end=spin"]));
    holder.wait_for("bare: hello", SOON);
    refused(
        bare_with(&["--disk", path]),
        BAD_CONFIGURATION,
        &["in use", path],
    );
    let many: Vec<_> = (0..20).flat_map(|_| ["--disk", path]).collect();
    drop(holder);
    let many: Vec<String> = many
        .iter()
        .map(|&arg| {
            if arg == path {
                format!("{path},ro,nolock")
            } else {
                arg.into()
            }
        })
        .collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    refused(bare_with(&many), BAD_CONFIGURATION, &["19"]);
}

#[test]
fn networks_that_cannot_be_used() {
    let network = NetNs::new();
    network
        .sh("ip link add br0 type bridge; ip tuntap add tap0 mode tap; ip link add d0 type veth peer name d1");
    let with = |spec: &str| network.wrap(&bare_with(&["--net", spec]));
    refused(with("tap=none"), BAD_CONFIGURATION, &["none"]);
    refused(with("tap=d0"), BAD_CONFIGURATION, &["d0"]);
    refused(
        with("tap=a-name-that-is-too-long"),
        BAD_CONFIGURATION,
        &["a-name-that-is-too-long"],
    );
    refused(with("bridge=none"), BAD_CONFIGURATION, &["none"]);
    refused(with("bridge=d0"), BAD_CONFIGURATION, &["d0", "bridge"]);
    refused(
        with("tap=tap0,mac=01:00:00:00:00:00"),
        BAD_CONFIGURATION,
        &["MAC"],
    );
    refused(with("tap=tap0,mtu=60"), BAD_CONFIGURATION, &["MTU"]);
    let holder = network.wrap(&bare_with(&[
        "--net",
        "tap=tap0",
        "--append",
        "bare.end=spin",
    ]));
    let holder = Vm::spawn(holder);
    holder.wait_for("bare: hello", SOON);
    refused(with("tap=tap0"), BAD_CONFIGURATION, &["tap0", "use"]);
    drop(holder);
    // br0, tap0, d0, d1 and the loopback: no TAP of ours is left.
    assert_eq!(network.links().lines().count(), 5, "{}", network.links());
}

#[test]
fn a_host_without_kvm() {
    let hide = |over: &str| {
        let script = format!("mount --bind {over} /dev/kvm && exec \"$@\"");
        inside(
            "unshare",
            &["-m", "sh", "-c", &script, "sh"],
            &run_bare("bare.do=hello"),
        )
    };
    refused(hide("/dev/null"), 3, &["/dev/kvm"]);
    let folder = tempfile::tempdir().unwrap();
    let nothing = folder.path().join("nothing");
    fs::write(&nothing, "").unwrap();
    refused(hide(nothing.to_str().unwrap()), 3, &["/dev/kvm"]);
}

#[test]
fn command_lines_that_are_wrong() {
    misused(&["--memory", "lots"], "256M");
    misused(&["--cpus", "many"], "--cpus");
    misused(&["--disk", "d,rot"], "`rot`");
    misused(&["--disk", ""], "file");
    misused(&["--net", "br0"], "`br0`");
    misused(&["--net", "tap=a,bridge=b"], "either");
    misused(&["--colour"], "--colour");
    misused(&["--log-level", "loud"], "warning");
    refused(brume(), BAD_ARGUMENTS, &["brume run", "--config-file"]);
}
