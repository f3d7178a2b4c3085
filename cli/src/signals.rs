// SPDX-License-Identifier: Apache-2.0
//! Signals that ask the program to end, as requests to the machine.
//!
//! This is a module with unsafe code: signal sets and a signalfd.

#![allow(unsafe_code)]

use std::ffi::c_int;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::FromRawFd;
use std::process::Child;

use brume_vmm::{MachineHandle, StopReason};
use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::signal::create_sigset;

const ENDING: [c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];
const RECORD: usize = size_of::<libc::signalfd_siginfo>();

/// The ending signals, blocked and kept for [`Signals::serve`].
pub(crate) struct Signals(File);

impl Signals {
    /// Blocks the ending signals for this thread and all that it starts from now on.
    ///
    /// # Errors
    ///
    /// The host gives no file descriptor for them.
    pub(crate) fn block() -> io::Result<Self> {
        Self::block_all(&ENDING, libc::SFD_NONBLOCK)
    }

    /// The same, for [`Signals::wait`].
    ///
    /// # Errors
    ///
    /// The host gives no file descriptor for them.
    pub(crate) fn block_to_wait() -> io::Result<Self> {
        Self::block_all(&ENDING, 0)
    }

    /// The same, and the end of a child with them, for [`Signals::wait`].
    ///
    /// # Errors
    ///
    /// The host gives no file descriptor for them.
    pub(crate) fn block_with_children() -> io::Result<Self> {
        let [a, b, c, d] = ENDING;
        Self::block_all(&[a, b, c, d, libc::SIGCHLD], 0)
    }

    fn block_all(signals: &[c_int], flags: c_int) -> io::Result<Self> {
        let set = create_sigset(signals).map_err(io::Error::from)?;
        // SAFETY: the set is whole, and the old one is not asked for.
        let result =
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        if result != 0 {
            return Err(io::Error::from_raw_os_error(result));
        }
        let flags = libc::SFD_CLOEXEC | flags;
        // SAFETY: the set is whole; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else has it.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    /// Waits for the next signal.
    ///
    /// # Errors
    ///
    /// None can be read.
    pub(crate) fn wait(&mut self) -> io::Result<c_int> {
        let mut record = [0; RECORD];
        self.0.read_exact(&mut record)?;
        Ok(number(&record))
    }

    /// Turns the signals into requests to `machine`.
    pub(crate) fn serve(self, machine: MachineHandle) -> Box<dyn MutEventSubscriber> {
        Box::new(Server {
            signals: self.0,
            machine,
        })
    }
}

/// The number of a signal is the first field of its record.
fn number(record: &[u8; RECORD]) -> c_int {
    let [a, b, c, d, ..] = *record;
    c_int::from_ne_bytes([a, b, c, d])
}

/// Asks `child` to end, which must not have been waited for yet.
pub(crate) fn terminate(child: &Child) {
    // SAFETY: it only sends a signal, to a process that keeps its number until it is waited for.
    unsafe { libc::kill(child.id().cast_signed(), libc::SIGTERM) };
}

struct Server {
    signals: File,
    machine: MachineHandle,
}

impl MutEventSubscriber for Server {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        let mut record = [0; RECORD];
        while self.signals.read_exact(&mut record).is_ok() {
            self.machine.stop(StopReason::Signal(number(&record)));
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&self.signals, EventSet::IN)) {
            tracing::error!("signals are not watched: {error}");
        }
    }
}
