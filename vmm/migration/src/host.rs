// SPDX-License-Identifier: Apache-2.0
//! Calls of the host that no library has in this form.
//!
//! This is a module with unsafe code: descriptors by their numbers.

#![allow(unsafe_code)]

use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

/// Waits until one of `fds` can be read or has ended, and says which; `None` if that takes longer.
pub(crate) fn wait_readable(fds: &[RawFd], limit: Duration) -> io::Result<Option<usize>> {
    wait_for(libc::POLLIN, fds, limit)
}

/// Whether the other side of the socket `fd` says nothing more than what can still be read.
pub(crate) fn has_ended(fd: RawFd) -> io::Result<bool> {
    wait_for(libc::POLLRDHUP, &[fd], Duration::ZERO).map(|ended| ended.is_some())
}

fn wait_for(events: i16, fds: &[RawFd], limit: Duration) -> io::Result<Option<usize>> {
    let end = Instant::now() + limit;
    let mut polled: Vec<libc::pollfd> = fds
        .iter()
        .map(|&fd| libc::pollfd {
            fd,
            events,
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

/// What goes beside the bytes of a message on a unix socket: one descriptor (cmsg(3)).
#[repr(C)]
struct Control {
    header: libc::cmsghdr,
    fd: RawFd,
}

impl Control {
    /// Its length in bytes. There is no room for a second descriptor in it.
    const LENGTH: usize = offset_of!(Self, fd) + size_of::<RawFd>();

    fn new(fd: RawFd) -> Self {
        Self {
            header: libc::cmsghdr {
                cmsg_len: Self::LENGTH,
                cmsg_level: libc::SOL_SOCKET,
                cmsg_type: libc::SCM_RIGHTS,
            },
            fd,
        }
    }
}

/// Calls `call` with a message of `byte` and `control`, again if a signal comes; what it returns.
fn with_message(
    byte: &mut u8,
    control: &mut Control,
    call: impl Fn(&mut libc::msghdr) -> isize,
) -> io::Result<isize> {
    let mut part = libc::iovec {
        iov_base: (&raw mut *byte).cast(),
        iov_len: 1,
    };
    loop {
        // SAFETY: numbers and pointers, for which zeros stand for nothing.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = (&raw mut *control).cast();
        message.msg_controllen = Control::LENGTH;
        let result = call(&mut message);
        if result >= 0 {
            return Ok(result);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Sends one byte and, beside it, `fd` over `socket`, which is a unix socket.
pub(crate) fn send_fd(socket: RawFd, fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut control = Control::new(fd.as_raw_fd());
    let sent = with_message(&mut 0, &mut control, |message| {
        // SAFETY: the message points to one byte and to a whole `Control`, which outlive the call.
        unsafe { libc::sendmsg(socket, message, libc::MSG_NOSIGNAL) }
    })?;
    if sent == 1 {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}

/// Receives what [`send_fd`] sends.
pub(crate) fn receive_fd(socket: RawFd) -> io::Result<OwnedFd> {
    let mut byte = 0;
    let mut control = Control::new(-1);
    control.header.cmsg_len = 0;
    let received = with_message(&mut byte, &mut control, |message| {
        // SAFETY: the message has room for one byte and for a `Control`, which outlive the call.
        unsafe { libc::recvmsg(socket, message, libc::MSG_CMSG_CLOEXEC) }
    })?;
    let header = control.header;
    let has_fd = header.cmsg_len == Control::LENGTH
        && (header.cmsg_level, header.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS);
    if has_fd && control.fd >= 0 {
        // SAFETY: the kernel has just made this descriptor for us.
        let fd = unsafe { OwnedFd::from_raw_fd(control.fd) };
        if byte == 0 {
            return Ok(fd);
        }
    }
    Err(if received == 0 {
        io::ErrorKind::UnexpectedEof.into()
    } else {
        io::Error::new(io::ErrorKind::InvalidData, "no descriptor came")
    })
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

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, SeekFrom, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_file_is_handed_over_between_other_bytes() {
        let (mut one, mut other) = UnixStream::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"memory").unwrap();
        one.write_all(b"before").unwrap();
        send_fd(one.as_raw_fd(), file.as_fd()).unwrap();
        send_fd(one.as_raw_fd(), file.as_fd()).unwrap();
        one.write_all(b"after").unwrap();
        drop((file, one));
        let mut before = [0; 6];
        other.read_exact(&mut before).unwrap();
        for _ in 0..2 {
            let mut file = File::from(receive_fd(other.as_raw_fd()).unwrap());
            // SAFETY: it takes numbers only.
            let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFD) };
            assert_eq!(flags, libc::FD_CLOEXEC);
            let mut text = String::new();
            file.seek(SeekFrom::Start(0)).unwrap();
            file.read_to_string(&mut text).unwrap();
            assert_eq!(text, "memory");
        }
        let mut after = String::new();
        other.read_to_string(&mut after).unwrap();
        assert_eq!((&before, after.as_str()), (b"before", "after"));
        let end = receive_fd(other.as_raw_fd()).unwrap_err();
        assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_byte_alone_is_no_file() {
        let (mut one, other) = UnixStream::pair().unwrap();
        one.write_all(&[0, 1]).unwrap();
        for _ in 0..2 {
            let error = receive_fd(other.as_raw_fd()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
    }
}
