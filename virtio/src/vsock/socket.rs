// SPDX-License-Identifier: Apache-2.0
//! Unix sockets of the host: vectored I/O on guest memory, and calls that never wait.
//!
//! This is a module with unsafe code: system calls that the standard library does not have.

#![allow(unsafe_code)]

use std::io::{self, Error};
use std::mem::{offset_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use libc::{c_int, iovec, msghdr, sockaddr_un, socklen_t};

use crate::memory::IoBuffers;

/// The most places that one system call takes (`UIO_MAXIOV`).
const MAX_VECTORS: usize = 1024;

/// `AF_UNIX` in the type that addresses have it in.
const FAMILY: libc::sa_family_t = 1;
const _: () = assert!(libc::AF_UNIX == 1);

/// Receives bytes into `places`, up to all they take. The caller marks what was written.
pub(super) fn receive(stream: &UnixStream, places: &IoBuffers) -> io::Result<usize> {
    let mut message = message(places.as_iovecs());
    // SAFETY: the message names places in guest memory, which `places` keeps mapped, and nothing
    // else.
    let result = unsafe { libc::recvmsg(stream.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) };
    usize::try_from(result).map_err(|_| Error::last_os_error())
}

/// Sends bytes from `places`, as many as the socket takes now.
pub(super) fn send(stream: &UnixStream, places: &IoBuffers) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    let message = message(places.as_iovecs());
    // SAFETY: the message names places in guest memory, which `places` keeps mapped, and nothing
    // else.
    let result = unsafe { libc::sendmsg(stream.as_raw_fd(), &message, flags) };
    usize::try_from(result).map_err(|_| Error::last_os_error())
}

fn message(vectors: &[iovec]) -> msghdr {
    // SAFETY: a message header of zeroes is one without address, data and control data.
    let mut message: msghdr = unsafe { zeroed() };
    message.msg_iov = vectors.as_ptr().cast_mut();
    message.msg_iovlen = vectors.len().min(MAX_VECTORS);
    message
}

/// Sends bytes from `data`, as many as the socket takes now.
pub(super) fn send_bytes(stream: &UnixStream, data: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the pointer and the length are those of a slice.
    let result = unsafe { libc::send(stream.as_raw_fd(), data.as_ptr().cast(), data.len(), flags) };
    usize::try_from(result).map_err(|_| Error::last_os_error())
}

/// Copies what could be received to `data` and leaves it there; how much it was.
pub(super) fn peek(stream: &UnixStream, data: &mut [u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_PEEK;
    let (fd, place) = (stream.as_raw_fd(), data.as_mut_ptr().cast());
    // SAFETY: the pointer and the length are those of a slice that is borrowed for us alone.
    let result = unsafe { libc::recv(fd, place, data.len(), flags) };
    usize::try_from(result).map_err(|_| Error::last_os_error())
}

/// Whether neither direction will carry another byte, except what is there to be read.
pub(super) fn is_hung_up(stream: &UnixStream) -> bool {
    let mut poll = libc::pollfd {
        fd: stream.as_raw_fd(),
        events: 0,
        revents: 0,
    };
    // SAFETY: the pointer is to one pollfd, as the count says.
    let count = unsafe { libc::poll(&mut poll, 1, 0) };
    count == 1 && poll.revents & (libc::POLLHUP | libc::POLLERR) != 0
}

/// Connects to the socket at `path`, or fails if that cannot be done at once.
pub(super) fn connect(path: &Path) -> io::Result<UnixStream> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the call takes numbers only.
    let fd = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    if fd < 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: the descriptor was made just now, and nobody else has it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let (address, len) = address(path)?;
    let place = (&raw const address).cast();
    // SAFETY: the pointer is to an address of at least `len` bytes.
    if unsafe { libc::connect(fd.as_raw_fd(), place, len) } < 0 {
        return Err(Error::last_os_error());
    }
    Ok(fd.into())
}

fn address(path: &Path) -> io::Result<(sockaddr_un, socklen_t)> {
    // SAFETY: an address of zeroes is one without family and path.
    let mut address: sockaddr_un = unsafe { zeroed() };
    let bytes = path.as_os_str().as_bytes();
    // The zero at the end has to stay.
    if bytes.is_empty() || bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    address.sun_family = FAMILY;
    for (to, &from) in address.sun_path.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    let len = offset_of!(sockaddr_un, sun_path) + bytes.len() + 1;
    let len = socklen_t::try_from(len).map_err(Error::other)?;
    Ok((address, len))
}

/// Lets the process open up to `count` files, as far as it may have that many.
pub(super) fn allow_open_files(count: u64) -> io::Result<()> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    let check = |result: c_int| match result {
        0 => Ok(()),
        _ => Err(Error::last_os_error()),
    };
    // SAFETY: the pointer is to a limit that is ours.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) })?;
    let wanted = count.min(limit.rlim_max);
    if limit.rlim_cur >= wanted {
        return Ok(());
    }
    limit.rlim_cur = wanted;
    // SAFETY: the pointer is to a limit that is ours.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) })
}
