// SPDX-License-Identifier: Apache-2.0
//! What tests and benchmarks need of the host: the processor's clock, raw frames.
//!
//! This is a module with unsafe code: system calls that the standard library has not.

#![allow(unsafe_code)]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "sizes and flags of C interfaces"
)]

use std::ffi::CString;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

/// The Ethernet type of test frames.
const ETHERTYPE: u16 = 0x88b5;

/// How fast the time stamp counter runs.
pub fn tsc_khz() -> u64 {
    // SAFETY: every x86-64 processor has the instruction.
    let ticks = || unsafe { std::arch::x86_64::_rdtsc() };
    let (start, begin) = (Instant::now(), ticks());
    std::thread::sleep(Duration::from_millis(100));
    let (time, ticks) = (start.elapsed(), ticks() - begin);
    (u128::from(ticks) * 1_000_000 / time.as_nanos()) as u64
}

/// A socket for the frames of one Ethernet type on one interface.
pub struct FrameSocket(OwnedFd);

impl FrameSocket {
    /// Opens one for test frames on the interface `name`.
    ///
    /// # Errors
    ///
    /// There is no such interface, or it is not allowed.
    pub fn open(name: &str) -> io::Result<Self> {
        Self::open_for(name, ETHERTYPE)
    }

    /// Opens one for frames of `ethertype` on the interface `name`.
    ///
    /// # Errors
    ///
    /// As [`FrameSocket::open`].
    pub fn open_for(name: &str, ethertype: u16) -> io::Result<Self> {
        let protocol = ethertype.to_be();
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: it takes no pointer.
        let fd = check(unsafe { libc::socket(libc::AF_PACKET, kind, i32::from(protocol)) })?;
        // SAFETY: the descriptor is new and nobody else has it.
        let socket = Self(unsafe { OwnedFd::from_raw_fd(fd) });
        socket.set(libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, &1i32)?;
        let limit = libc::timeval {
            tv_sec: 0,
            tv_usec: 100_000,
        };
        socket.set(libc::SOL_SOCKET, libc::SO_RCVTIMEO, &limit)?;

        let name = CString::new(name)?;
        // SAFETY: all zeroes is a valid address.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        // SAFETY: the name is a C string.
        address.sll_ifindex = unsafe { libc::if_nametoindex(name.as_ptr()) } as i32;
        let len = size_of::<libc::sockaddr_ll>() as u32;
        // SAFETY: the pointer and the length are those of the address.
        check(unsafe { libc::bind(socket.0.as_raw_fd(), (&raw const address).cast(), len) })?;
        Ok(socket)
    }

    fn set<T>(&self, level: i32, option: i32, value: &T) -> io::Result<()> {
        let (fd, len) = (self.0.as_raw_fd(), size_of::<T>() as u32);
        // SAFETY: the pointer and the length are those of the value.
        check(unsafe { libc::setsockopt(fd, level, option, std::ptr::from_ref(value).cast(), len) })
            .map(drop)
    }

    /// Waits a tenth of a second for a frame; how long it is.
    pub fn receive(&self, frame: &mut [u8]) -> Option<usize> {
        // SAFETY: the pointer and the length are those of the buffer.
        let count = unsafe {
            libc::recv(
                self.0.as_raw_fd(),
                frame.as_mut_ptr().cast(),
                frame.len(),
                0,
            )
        };
        usize::try_from(count).ok()
    }

    /// Sends a frame; whether it was taken.
    pub fn send(&self, frame: &[u8]) -> bool {
        // SAFETY: the pointer and the length are those of the frame.
        let count =
            unsafe { libc::send(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        count >= 0
    }

    /// Sends a frame many times in one call; how often it was taken.
    pub fn send_many(&self, frame: &[u8], times: usize) -> usize {
        let mut vector = libc::iovec {
            iov_base: frame.as_ptr().cast_mut().cast(),
            iov_len: frame.len(),
        };
        // SAFETY: all zeroes is a valid message.
        let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
        message.msg_hdr.msg_iov = &raw mut vector;
        message.msg_hdr.msg_iovlen = 1;
        let mut messages = vec![message; times];
        // SAFETY: the pointer and the count are those of the messages, whose vector is alive.
        let count =
            unsafe { libc::sendmmsg(self.0.as_raw_fd(), messages.as_mut_ptr(), times as u32, 0) };
        usize::try_from(count).unwrap_or(0)
    }
}

/// Breaks a TCP connection: the peer is told that it was reset.
///
/// # Errors
///
/// It is none.
pub fn reset(socket: RawFd) -> io::Result<()> {
    // SAFETY: all zeroes is a valid address, of the family AF_UNSPEC, which dissolves a connection.
    let address: libc::sockaddr = unsafe { std::mem::zeroed() };
    let len = size_of::<libc::sockaddr>() as u32;
    // SAFETY: the pointer and the length are those of the address.
    check(unsafe { libc::connect(socket, &raw const address, len) }).map(drop)
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
