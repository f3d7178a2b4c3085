// SPDX-License-Identifier: Apache-2.0
//! The bare guest boots, finds its machine as it should be, and reaches its console.

use brume_tests::vm::{SOON, Vm, outcome, run_bare};

#[test]
fn it_boots_by_pvh_and_by_the_64_bit_protocol() {
    for (insist, protocol) in [
        (None, "pvh"),
        (Some("pvh"), "pvh"),
        (Some("elf64"), "linux64"),
    ] {
        let mut command = run_bare("bare.do=hello");
        command.args(insist.map(|name| format!("--kernel-protocol={name}")));
        let outcome = outcome(command, SOON);
        let line = outcome.assert_clean().line("bare: hello ");
        assert!(
            line.contains(&format!("protocol={protocol}")),
            "{insist:?}: {line}"
        );
    }
}

#[test]
fn the_memory_map_has_the_memory_that_was_asked_for() {
    // 4 GiB reach over the hole below 4 GiB: 3 GiB under it, 1 GiB above.
    for (size, ram) in [("128M", 128u64 << 20), ("3G", 3 << 30), ("4G", 4 << 30)] {
        let mut command = run_bare("bare.do=hello");
        command.args(["--memory", size]);
        let outcome = outcome(command, SOON);
        outcome.assert_clean();
        let usable: u64 = outcome
            .stdout
            .lines()
            .filter(|line| line.starts_with("bare: memory") && line.ends_with("kind=1"))
            .map(|line| {
                line.split("len=0x")
                    .nth(1)
                    .unwrap()
                    .split(' ')
                    .next()
                    .unwrap()
            })
            .map(|len| u64::from_str_radix(len, 16).unwrap())
            .sum();
        // Firmware tables take some of the first MiB.
        assert!(
            usable <= ram && usable > ram - (1 << 20),
            "{size}: {usable:#x}"
        );
        assert_eq!(outcome.stdout.contains("start=0x100000000"), size == "4G");
    }
}

#[test]
fn the_first_byte_reaches_stdout() {
    let outcome = outcome(run_bare("bare.do=first-byte"), SOON);
    assert_eq!(outcome.assert_clean().stdout, "\n");
}

#[test]
fn the_boot_timer_is_logged_when_it_is_asked_for() {
    let mut command = run_bare("bare.do=boot-timer");
    command.args(["--boot-timer", "--log-level", "info"]);
    let with = outcome(command, SOON);
    assert!(
        with.status == 0 && with.stderr.contains("Guest-boot-time ="),
        "{with:#?}"
    );
    outcome(run_bare("bare.do=boot-timer"), SOON).assert_clean();
}

#[test]
fn what_is_typed_reaches_the_guest() {
    let mut vm = Vm::spawn(run_bare("bare.do=echo"));
    vm.send(b"a line from the host\nend\n");
    let outcome = vm.wait(SOON);
    assert!(
        outcome
            .assert_clean()
            .stdout
            .contains("a line from the host"),
        "{outcome:#?}"
    );
}

#[test]
fn the_legacy_interrupt_controllers_are_masked() {
    let outcome = outcome(run_bare("bare.do=hello"), SOON);
    let line = outcome.assert_clean().line("bare: interrupts ");
    assert!(line.contains("pic_masks=0xff,0xff"), "{line}");
}

#[test]
fn every_machine_has_a_generation_id_of_its_own() {
    let ids = [(); 2].map(|()| {
        let outcome = outcome(run_bare("bare.do=generation"), SOON);
        let line = outcome.assert_clean().line("bare: generation id=");
        let rest = "vmclock=v1 flags=0x300 seq=0 disruption=0 generation=0";
        assert!(line.contains(rest), "{line}");
        let id = line.split("id=").nth(1).unwrap().split(' ').next().unwrap();
        assert!(
            id.len() == 32 && id.contains(|digit: char| digit != '0'),
            "{line}"
        );
        id.to_owned()
    });
    assert_ne!(ids[0], ids[1]);
}
