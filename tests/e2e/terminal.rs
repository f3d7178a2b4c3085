// SPDX-License-Identifier: Apache-2.0
//! The person's terminal: raw while a machine runs, as it was after every end.

use brume_tests::pty::OnTerminal;
use brume_tests::vm::{SOON, brume, run_bare};

const SPIN: &str = "bare.do=hello bare.end=spin";

#[test]
fn the_terminal_is_raw_while_the_machine_runs_and_restored_by_every_end() {
    type Act = fn(&mut OnTerminal);
    let ends: [(&str, Act, i32); 6] = [
        ("bare.do=hello,echo", |vm| vm.send(b"end\r"), 0),
        (SPIN, |vm| vm.send(b"\x01x"), 130),
        (SPIN, |vm| vm.signal(libc::SIGTERM), 143),
        (SPIN, |vm| vm.signal(libc::SIGHUP), 156),
        (
            "bare.do=hello,echo bare.end=badinsn",
            |vm| vm.send(b"end\r"),
            5,
        ),
        (SPIN, |vm| vm.signal(libc::SIGSEGV), 128 + libc::SIGSEGV),
    ];
    for (args, act, status) in ends {
        let mut vm = OnTerminal::spawn(run_bare(args));
        // The guest speaks only after the terminal was changed or not yet; both ends are seen.
        vm.wait_for("bare: hello", SOON);
        let raw = |modes: [u32; 4]| modes[3] & (libc::ICANON | libc::ECHO | libc::ISIG) == 0;
        while !raw(vm.modes()) {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        act(&mut vm);
        assert_eq!(vm.wait(SOON), status, "{args}: {:?}", vm.screen());
        assert!(!raw(vm.modes()), "{args}: the terminal is still raw");
        assert_eq!(vm.modes(), fresh_modes(), "{args}");
    }
}

/// The modes of a terminal that nobody has changed.
fn fresh_modes() -> [u32; 4] {
    let mut untouched = OnTerminal::spawn(std::process::Command::new("true"));
    untouched.wait(SOON);
    untouched.modes()
}

#[test]
fn a_failure_before_the_start_leaves_the_terminal_alone() {
    let mut command = brume();
    command.args(["run", "--kernel", "/no/kernel"]);
    let mut vm = OnTerminal::spawn(command);
    assert_eq!(vm.wait(SOON), 152);
    assert_eq!(vm.modes(), fresh_modes());
    assert!(
        vm.screen()
            .contains("brume: The kernel file cannot be opened"),
        "{}",
        vm.screen()
    );
}

#[test]
fn the_progress_line_is_there_until_the_guest_speaks() {
    let mut vm = OnTerminal::spawn(run_bare("bare.do=hello"));
    vm.wait_for("bare: hello", SOON);
    vm.wait(SOON);
    let screen = vm.screen();
    let (before, after) = screen.split_once("bare: hello").unwrap();
    assert!(
        before.contains("brume: starting") && before.contains("1 vCPU, 128 MiB"),
        "{screen:?}"
    );
    // Carriage return and erase-to-the-end come after the line.
    let (_, rest) = before.rsplit_once("brume: starting").unwrap();
    assert!(rest.contains("\r\x1b[K"), "{screen:?}");
    assert!(!after.contains("brume: starting"), "{screen:?}");
    assert!(after.contains("brume: the guest restarted"), "{screen:?}");
}

#[test]
fn keys_reach_the_guest_and_the_escape_key_is_ours() {
    let mut vm = OnTerminal::spawn(run_bare("bare.do=hello,echo"));
    vm.wait_for("bare: hello", SOON);
    vm.send(b"\x01h");
    vm.wait_for("Ctrl-A x   end the machine", SOON);
    vm.send(b"typed by hand\r");
    vm.wait_for("typed by hand", SOON);
    // Ctrl-C is for the guest, too.
    vm.send(b"\x03 still here\r");
    vm.wait_for("still here", SOON);
    vm.send(b"\x01x");
    assert_eq!(vm.wait(SOON), 130);
}
