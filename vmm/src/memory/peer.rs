// SPDX-License-Identifier: Apache-2.0
//! Whether the process at the other end of a unix socket is still there.
//!
//! This is a module with unsafe code: calls that no library has.

#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

/// The process that has connected `socket`, a unix one, or that listened when it was connected from
/// here, as a descriptor to watch (pidfd); `None` if it is of a PID namespace that is not seen from
/// here, or gone already.
pub(crate) fn process(socket: &impl AsRawFd) -> Option<OwnedFd> {
    let mut peer = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut len = libc::socklen_t::try_from(size_of::<libc::ucred>()).ok()?;
    // SAFETY: the kernel writes at most `len` bytes to `peer`, which has as many, and to `len`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut len,
        )
    };
    if result != 0 || peer.pid <= 0 {
        return None;
    }
    open(peer.pid)
}

/// The process `pid` as a descriptor to watch.
pub(crate) fn open(pid: libc::pid_t) -> Option<OwnedFd> {
    // SAFETY: the call takes no pointer.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = RawFd::try_from(fd).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: the descriptor is new and nobody else has it.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether nobody holds the other end of `socket` any more.
pub(super) fn has_hung_up(socket: &UnixStream) -> bool {
    poll(socket.as_raw_fd(), 0) & libc::POLLHUP != 0
}

/// Whether `process`, a pidfd, has ended.
pub(crate) fn has_ended(process: &OwnedFd) -> bool {
    poll(process.as_raw_fd(), libc::POLLIN) & libc::POLLIN != 0
}

/// What of `events`, and of those that are always told, there is now.
fn poll(fd: RawFd, events: libc::c_short) -> libc::c_short {
    let mut poll = libc::pollfd {
        fd,
        events,
        revents: 0,
    };
    // SAFETY: the kernel reads and writes the one structure that it is told of.
    let count = unsafe { libc::poll(&raw mut poll, 1, 0) };
    if count > 0 { poll.revents } else { 0 }
}
