// SPDX-License-Identifier: Apache-2.0
//! Calls of the host that no library has in this form.
//!
//! This is a module with unsafe code: descriptors by their numbers.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

/// Waits until one of `fds` can be read or has ended, and says which; `None` if that takes longer.
pub(crate) fn wait_readable(fds: &[RawFd], limit: Duration) -> io::Result<Option<usize>> {
    let end = Instant::now() + limit;
    let mut polled: Vec<libc::pollfd> = fds
        .iter()
        .map(|&fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    loop {
        let left = end.saturating_duration_since(Instant::now());
        // Rounded up: a wait that is too short is a busy one.
        let millis = i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
        let count = libc::nfds_t::try_from(polled.len()).unwrap_or(0);
        // SAFETY: `polled` has `count` elements, which the kernel reads and writes.
        let ready = unsafe { libc::poll(polled.as_mut_ptr(), count, millis) };
        if ready > 0 {
            return Ok(polled.iter().position(|fd| fd.revents != 0));
        }
        if ready == 0 {
            return Ok(None);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// A duplicate of `fd`, if that is a stream socket with somebody at the other end; and its family.
pub(crate) fn stream_socket(fd: RawFd) -> io::Result<(OwnedFd, libc::c_int)> {
    if option(fd, libc::SO_TYPE)? != libc::SOCK_STREAM || option(fd, libc::SO_ACCEPTCONN)? != 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let family = option(fd, libc::SO_DOMAIN)?;
    has_peer(fd)?;
    // SAFETY: it takes numbers only.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else has it.
    Ok((unsafe { OwnedFd::from_raw_fd(copy) }, family))
}

/// Whether somebody is at the other end; the error says who is not.
fn has_peer(fd: RawFd) -> io::Result<()> {
    let mut peer = libc::sockaddr {
        sa_family: 0,
        sa_data: [0; 14],
    };
    let mut len = length_of::<libc::sockaddr>();
    // SAFETY: the kernel writes at most `len` bytes to `peer`, and to `len` how many there are.
    let result = unsafe { libc::getpeername(fd, &raw mut peer, &raw mut len) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Ends a TCP connection at once; the other side gets a reset. Unlike a close this does so even if
/// the process has the socket under another number too.
pub(crate) fn disconnect(socket: &impl AsFd) -> io::Result<()> {
    let nowhere = libc::sockaddr {
        sa_family: 0,
        sa_data: [0; 14],
    };
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel reads `len` bytes of `nowhere`, whose family is AF_UNSPEC.
    let result = unsafe { libc::connect(fd, &raw const nowhere, length_of::<libc::sockaddr>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn length_of<T>() -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<T>()).unwrap_or(0)
}

fn option(fd: RawFd, option: libc::c_int) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len = length_of::<libc::c_int>();
    // SAFETY: the kernel writes at most `len` bytes to `value`.
    let result = unsafe {
        libc::getsockopt(
            fd,
            libc::SOL_SOCKET,
            option,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(value)
}
