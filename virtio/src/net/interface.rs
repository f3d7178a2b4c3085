// SPDX-License-Identifier: Apache-2.0
//! Network interfaces by name: the ioctls that are asked of any socket (netdevice(7)).
//!
//! This is a module with unsafe code: ioctls take and fill a C union.

#![allow(unsafe_code)]

use std::ffi::{c_int, c_short, c_ulong};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use libc::{IFNAMSIZ, ifreq};

/// Adds an interface to a bridge; the libc crate lacks it for this target.
const SIOCBRADDIF: c_ulong = 0x89a2;

/// Whether the kernel can have an interface of this name: 1 to 15 bytes, and none that would end
/// up in a path or a pattern.
pub(super) fn is_valid_name(name: &str) -> bool {
    let refused = |byte: u8| matches!(byte, b'/' | b':' | b'%' | 0) || byte.is_ascii_whitespace();
    (1..IFNAMSIZ).contains(&name.len()) && name != "." && name != ".." && !name.bytes().any(refused)
}

/// A request about the interface `name`, which is cut where no interface's name could go on.
pub(super) fn request(name: &str) -> ifreq {
    // SAFETY: an ifreq is integers and bytes throughout, for all of which zero is a value.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    let (characters, _end) = request.ifr_name.split_at_mut(IFNAMSIZ - 1);
    for (to, from) in characters.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request
}

/// The name in `request`, as the kernel left it.
pub(super) fn name_in(request: &ifreq) -> String {
    let bytes: Vec<u8> = request
        .ifr_name
        .iter()
        .map(|&character| character.cast_unsigned())
        .take_while(|&byte| byte != 0)
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A socket to ask about interfaces by. What it sees is the network namespace of the thread that
/// made it.
pub(super) struct Control(OwnedFd);

impl Control {
    /// # Errors
    ///
    /// The host has no more file descriptors for us.
    pub(super) fn new() -> io::Result<Self> {
        // Any family answers; this one is in every kernel.
        // SAFETY: takes no pointer.
        let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was made just now, and nobody else has it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// The index of an interface; ENODEV if there is none of that name.
    pub(super) fn index(&self, name: &str) -> io::Result<c_int> {
        let mut request = request(name);
        self.ask(libc::SIOCGIFINDEX, &mut request)?;
        // SAFETY: the kernel has just filled this field.
        Ok(unsafe { request.ifr_ifru.ifru_ifindex })
    }

    /// The largest payload of a frame in bytes.
    pub(super) fn mtu(&self, name: &str) -> io::Result<c_int> {
        let mut request = request(name);
        self.ask(libc::SIOCGIFMTU, &mut request)?;
        // SAFETY: the kernel has just filled this field.
        Ok(unsafe { request.ifr_ifru.ifru_mtu })
    }

    pub(super) fn set_mtu(&self, name: &str, mtu: c_int) -> io::Result<()> {
        let mut request = request(name);
        request.ifr_ifru.ifru_mtu = mtu;
        self.ask(libc::SIOCSIFMTU, &mut request)
    }

    /// Takes an interface up, unless it is.
    pub(super) fn bring_up(&self, name: &str) -> io::Result<()> {
        // One of the 16 bits that there are.
        #[allow(clippy::cast_possible_truncation)]
        const UP: c_short = libc::IFF_UP as c_short;
        let mut request = request(name);
        self.ask(libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: the kernel has just filled this field.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        if flags & UP != 0 {
            return Ok(());
        }
        request.ifr_ifru.ifru_flags = flags | UP;
        self.ask(libc::SIOCSIFFLAGS, &mut request)
    }

    /// Adds the interface with `index` to the bridge called `bridge`.
    pub(super) fn add_to_bridge(&self, bridge: &str, index: c_int) -> io::Result<()> {
        let mut request = request(bridge);
        request.ifr_ifru.ifru_ifindex = index;
        self.ask(SIOCBRADDIF, &mut request)
    }

    fn ask(&self, what: c_ulong, request: &mut ifreq) -> io::Result<()> {
        // The type of an ioctl's number differs from one C library to the next.
        #[allow(clippy::unnecessary_cast)]
        let what = what as libc::Ioctl;
        // SAFETY: each `what` used in this file takes a pointer to an ifreq, and this is one.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), what, request) };
        match result {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_no_interface_can_have() {
        for name in [
            "",
            ".",
            "..",
            "a/b",
            "a b",
            "a\tb",
            "eth0:1",
            "tap%d",
            "a\0b",
            "sixteen-bytes-ab",
        ] {
            assert!(!is_valid_name(name), "{name:?}");
        }
        for name in ["a", "tap0", "fifteen-bytes-a", "äöü"] {
            assert!(is_valid_name(name), "{name:?}");
        }
    }

    #[test]
    fn a_name_comes_out_of_a_request_as_it_went_in() {
        assert_eq!(name_in(&request("tap0")), "tap0");
        assert_eq!(
            name_in(&request("a-name-that-is-too-long")),
            "a-name-that-is-"
        );
    }

    #[test]
    fn an_interface_that_is_missing_is_said_to_be() {
        let error = Control::new().unwrap().index("no-such-one").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
    }
}
