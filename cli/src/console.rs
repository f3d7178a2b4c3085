// SPDX-License-Identifier: Apache-2.0
//! Stdin as the guest's keyboard.
//!
//! On a terminal Ctrl-A is the escape key: `Ctrl-A x` ends the machine, `Ctrl-A h` lists the keys,
//! `Ctrl-A a` sends a Ctrl-A. A pipe is passed on as it is.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, AsRawFd};

use brume_vmm::{Console, MachineHandle, StopReason};
use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;

const ESCAPE: u8 = 0x01;
const KEYS: &str = "\n\
    Ctrl-A x   end the machine\n\
    Ctrl-A a   send a Ctrl-A to the guest\n\
    Ctrl-A h   this list\n";

/// What an escape sequence asks for.
#[derive(Debug, PartialEq, Eq)]
enum Key {
    End,
    Help,
}

/// Passes stdin on to the guest.
pub(crate) struct ConsoleInput {
    stdin: File,
    console: Console,
    machine: MachineHandle,
    keys: Option<EscapeKeys>,
    /// Read, and refused by the guest's serial port until it has room.
    waiting: Vec<u8>,
}

impl ConsoleInput {
    /// Serves stdin, with escape keys if it is a terminal.
    ///
    /// # Errors
    ///
    /// There is no stdin.
    pub(crate) fn new(
        console: Console,
        machine: MachineHandle,
        terminal: bool,
    ) -> io::Result<Self> {
        let stdin = File::from(io::stdin().as_fd().try_clone_to_owned()?);
        let keys = terminal.then(EscapeKeys::default);
        Ok(Self {
            stdin,
            console,
            machine,
            keys,
            waiting: Vec::new(),
        })
    }

    /// Reads once, since that is what does not block; `false` at the end of the input.
    fn read(&mut self) -> bool {
        let mut chunk = [0; 1024];
        let count = match self.stdin.read(&mut chunk) {
            Ok(0) => return false,
            Ok(count) => count,
            Err(error) => {
                return matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock);
            }
        };
        for &byte in chunk.iter().take(count) {
            match &mut self.keys {
                None => self.waiting.push(byte),
                Some(keys) => match keys.take(byte, &mut self.waiting) {
                    Some(Key::End) => self.machine.stop(StopReason::Console),
                    Some(Key::Help) => show_keys(),
                    None => {}
                },
            }
        }
        true
    }

    /// Passes on what waits; whether nothing waits any more.
    fn pass_on(&mut self) -> bool {
        let taken = self.console.push(&self.waiting);
        self.waiting.drain(..taken);
        self.waiting.is_empty()
    }
}

#[expect(
    clippy::print_stderr,
    reason = "the person at the terminal asked for it"
)]
fn show_keys() {
    eprint!("{KEYS}");
}

impl MutEventSubscriber for ConsoleInput {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let mut open = true;
        if events.fd() == self.console.room().as_raw_fd() {
            let _ = self.console.room().read();
        } else {
            open = self.read();
        }
        let watched = Events::new(&self.stdin, EventSet::IN);
        let passed = self.pass_on();
        if !open {
            // Nothing will come; not being in the set is all that matters.
            let _ = ops.remove(watched);
        } else if passed {
            let _ = ops.modify(watched);
        } else {
            // Read on when there is room, which is announced by the other event.
            let _ = ops.modify(Events::empty(&self.stdin));
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        // A regular file or /dev/null cannot be watched: it is read now, as far as there is room.
        if ops.add(Events::new(&self.stdin, EventSet::IN)).is_err() {
            while self.read() && self.pass_on() {}
        }
        if let Err(error) = ops.add(Events::new(self.console.room(), EventSet::IN)) {
            tracing::error!("the console is not watched: {error}");
        }
    }
}

/// Finds the escape key in what is typed.
#[derive(Debug, Default)]
struct EscapeKeys {
    escaped: bool,
}

impl EscapeKeys {
    /// Takes one byte; what is for the guest goes to `output`.
    fn take(&mut self, byte: u8, output: &mut Vec<u8>) -> Option<Key> {
        if !std::mem::take(&mut self.escaped) {
            if byte == ESCAPE {
                self.escaped = true;
            } else {
                output.push(byte);
            }
            return None;
        }
        match byte {
            b'x' | b'X' => return Some(Key::End),
            b'h' | b'H' | b'?' => return Some(Key::Help),
            b'a' | b'A' | ESCAPE => output.push(ESCAPE),
            // Not one of ours: the guest's program may know it.
            _ => output.extend([ESCAPE, byte]),
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(text: &[u8]) -> (Vec<u8>, Vec<Key>) {
        let mut keys = EscapeKeys::default();
        let mut output = Vec::new();
        let found = text
            .iter()
            .filter_map(|&byte| keys.take(byte, &mut output))
            .collect();
        (output, found)
    }

    #[test]
    fn the_escape_key_is_found_and_the_rest_passes() {
        assert_eq!(typed(b"ab\x01xc"), (b"abc".to_vec(), vec![Key::End]));
        assert_eq!(typed(b"\x01h"), (vec![], vec![Key::Help]));
        assert_eq!(typed(b"\x01a\x01\x01"), (vec![1, 1], vec![]));
        assert_eq!(typed(b"\x01z\x03"), (vec![1, b'z', 3], vec![]));
    }
}
