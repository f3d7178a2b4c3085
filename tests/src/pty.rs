// SPDX-License-Identifier: Apache-2.0
//! A terminal of a test's own.
//!
//! This is a module with unsafe code: making a terminal, and its attributes.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use crate::vm::die_with_us;

/// A new terminal: the side of a person and that of a program. Neither is inherited by programs.
///
/// # Errors
///
/// There are no more.
fn open() -> io::Result<(File, OwnedFd)> {
    let (mut person, mut terminal) = (0, 0);
    let null = std::ptr::null_mut();
    // SAFETY: the first two are places for descriptors, the rest is not wanted.
    let made = unsafe {
        libc::openpty(
            &raw mut person,
            &raw mut terminal,
            null,
            null.cast(),
            null.cast(),
        )
    };
    if made != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else has it.
    let person = unsafe { File::from_raw_fd(person) };
    // SAFETY: the descriptor is new and nobody else has it.
    let terminal = unsafe { OwnedFd::from_raw_fd(terminal) };
    for fd in [person.as_raw_fd(), terminal.as_raw_fd()] {
        // SAFETY: it takes no pointer.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    Ok((person, terminal))
}

/// The same, on which every byte passes at once and as it is.
///
/// # Errors
///
/// There are no more.
pub fn raw() -> io::Result<(File, OwnedFd)> {
    let (person, terminal) = open()?;
    let mut attributes = MaybeUninit::<libc::termios>::uninit();
    // SAFETY: the pointer is to a place for a `termios`.
    let got = unsafe { libc::tcgetattr(terminal.as_raw_fd(), attributes.as_mut_ptr()) };
    if got != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it has been filled in, as the result says.
    let mut attributes = unsafe { attributes.assume_init() };
    // SAFETY: the pointer is to a `termios`.
    unsafe { libc::cfmakeraw(&raw mut attributes) };
    // SAFETY: as above.
    let set =
        unsafe { libc::tcsetattr(terminal.as_raw_fd(), libc::TCSANOW, &raw const attributes) };
    match set {
        0 => Ok((person, terminal)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A program on a terminal, killed when this is dropped.
pub struct OnTerminal {
    child: Child,
    /// The side of the person.
    person: File,
    /// The side of the program, kept to look at its attributes.
    terminal: OwnedFd,
    seen: Vec<u8>,
}

impl OnTerminal {
    /// Starts `command` with a terminal as its stdin, stdout and stderr.
    ///
    /// # Panics
    ///
    /// It cannot be started.
    pub fn spawn(mut command: Command) -> Self {
        let (person, terminal) = open().expect("a terminal");
        // SAFETY: it takes no pointer.
        unsafe { libc::fcntl(person.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
        let side = || terminal.try_clone().expect("a descriptor");
        command.stdin(side()).stdout(side()).stderr(side());
        die_with_us(&mut command);
        let child = command
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        Self {
            child,
            person,
            terminal,
            seen: Vec::new(),
        }
    }

    /// The flags of the terminal: input, output, control and local modes.
    ///
    /// # Panics
    ///
    /// They cannot be read.
    pub fn modes(&self) -> [u32; 4] {
        let mut attributes = MaybeUninit::<libc::termios>::uninit();
        // SAFETY: the pointer is to a place for a `termios`.
        let got = unsafe { libc::tcgetattr(self.terminal.as_raw_fd(), attributes.as_mut_ptr()) };
        assert_eq!(got, 0, "the terminal's modes");
        // SAFETY: the call above succeeded, so it is filled.
        let modes = unsafe { attributes.assume_init() };
        [modes.c_iflag, modes.c_oflag, modes.c_cflag, modes.c_lflag]
    }

    /// Types `text`.
    ///
    /// # Panics
    ///
    /// The terminal does not take it.
    pub fn send(&mut self, text: &[u8]) {
        self.person.write_all(text).expect("typing");
    }

    /// Sends the program a signal.
    pub fn signal(&self, signal: i32) {
        // SAFETY: it takes no pointer; the child has not been waited for, so the id is its own.
        unsafe { libc::kill(self.child.id().cast_signed(), signal) };
    }

    /// Waits until the screen has shown `text`.
    ///
    /// # Panics
    ///
    /// It does not come in time.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str, time: Duration) {
        let deadline = Instant::now() + time;
        while !self.screen().contains(text) {
            assert!(
                Instant::now() < deadline,
                "`{text}` did not come: {:?}",
                self.screen()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// All that the screen has shown.
    pub fn screen(&mut self) -> String {
        let mut chunk = [0; 4096];
        while let Ok(count @ 1..) = self.person.read(&mut chunk) {
            self.seen
                .extend_from_slice(chunk.get(..count).unwrap_or_default());
        }
        String::from_utf8_lossy(&self.seen).into_owned()
    }

    /// Waits for the program's end and returns its exit status, 128 and the number for a signal.
    ///
    /// # Panics
    ///
    /// It does not end in time.
    #[track_caller]
    pub fn wait(&mut self, time: Duration) -> i32 {
        let deadline = Instant::now() + time;
        loop {
            // Read on, lest the program waits for room on the screen.
            let screen = self.screen();
            if let Some(status) = self.child.try_wait().expect("waiting") {
                return status
                    .code()
                    .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
            }
            assert!(Instant::now() < deadline, "it does not end: {screen:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        // One that has ended is not killed, only waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
