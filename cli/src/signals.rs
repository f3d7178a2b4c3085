// SPDX-License-Identifier: Apache-2.0
//! Signals that ask the program to end, as requests to the machine.
//!
//! This is a module with unsafe code: signal sets and a signalfd.

#![allow(unsafe_code)]

use std::ffi::c_int;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::FromRawFd;

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
        let set = create_sigset(&ENDING).map_err(io::Error::from)?;
        // SAFETY: the set is whole, and the old one is not asked for.
        let result =
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        if result != 0 {
            return Err(io::Error::from_raw_os_error(result));
        }
        let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
        // SAFETY: the set is whole; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else has it.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    /// Turns the signals into requests to `machine`.
    pub(crate) fn serve(self, machine: MachineHandle) -> Box<dyn MutEventSubscriber> {
        Box::new(Server {
            signals: self.0,
            machine,
        })
    }
}

struct Server {
    signals: File,
    machine: MachineHandle,
}

impl MutEventSubscriber for Server {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        let mut record = [0; RECORD];
        while self.signals.read_exact(&mut record).is_ok() {
            // The number is the first field of the record.
            let [a, b, c, d, ..] = record;
            let number = u32::from_ne_bytes([a, b, c, d]);
            self.machine.stop(StopReason::Signal(number.cast_signed()));
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&self.signals, EventSet::IN)) {
            tracing::error!("signals are not watched: {error}");
        }
    }
}
