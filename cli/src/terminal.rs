// SPDX-License-Identifier: Apache-2.0
//! The terminal's raw mode, put back on every way out that a process can catch.
//!
//! This is a module with unsafe code: terminal attributes and handlers for fatal signals.

#![allow(unsafe_code)]

use std::ffi::c_int;
use std::io::{self, IsTerminal};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;

use libc::termios;

/// The attributes that were there before us, also for the signal handler.
static BEFORE: OnceLock<termios> = OnceLock::new();

/// Signals that end the process with a fault.
const FATAL: [c_int; 6] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGABRT,
    libc::SIGSYS,
];

/// A terminal in raw mode, for as long as this exists.
pub(crate) struct RawMode(());

impl RawMode {
    /// Puts stdin into raw mode; `None` if it is no terminal.
    ///
    /// # Errors
    ///
    /// The terminal does not do it.
    pub(crate) fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let fd = stdin.as_raw_fd();
        let mut attributes = MaybeUninit::uninit();
        // SAFETY: the pointer is to a place for a `termios`.
        check(unsafe { libc::tcgetattr(fd, attributes.as_mut_ptr()) })?;
        // SAFETY: the call above succeeded, so it is filled.
        let before = unsafe { attributes.assume_init() };
        let before = *BEFORE.get_or_init(|| before);
        install_handlers();
        let mut raw = before;
        // SAFETY: the pointer is to a `termios`.
        unsafe { libc::cfmakeraw(&raw mut raw) };
        // Output goes on to be translated: messages of ours end in a plain newline.
        raw.c_oflag = before.c_oflag;
        // SAFETY: the pointer is to a `termios`.
        check(unsafe { libc::tcsetattr(fd, libc::TCSANOW, &raw const raw) })?;
        Ok(Some(Self(())))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts the attributes back. It is safe to call from a signal handler.
fn restore() {
    if let Some(before) = BEFORE.get() {
        // SAFETY: the pointer is to a `termios`; POSIX lists tcsetattr as async-signal-safe.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, before) };
    }
}

extern "C" fn on_fatal(signal: c_int) {
    restore();
    // SAFETY: raise is async-signal-safe; the handler was reset to the default, which ends us.
    unsafe { libc::raise(signal) };
}

fn install_handlers() {
    for signal in FATAL {
        // SAFETY: all zeroes is a valid `sigaction`.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_fatal as extern "C" fn(c_int) as usize;
        action.sa_flags = libc::SA_RESETHAND | libc::SA_NODEFER;
        // SAFETY: `action` is whole and its handler does only what a handler may.
        unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
    }
}

fn check(result: c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
