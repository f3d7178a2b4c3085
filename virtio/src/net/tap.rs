// SPDX-License-Identifier: Apache-2.0
//! TAPs: network interfaces of the host whose wire is a file descriptor.
//!
//! This is a module with unsafe code: ioctls, and vectored I/O on guest memory.

#![allow(unsafe_code)]

use std::ffi::{c_int, c_short, c_ulong};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use libc::iovec;
use thiserror::Error;

use super::HEADER_LEN;
use super::features::{BASIC_OFFLOADS, UDP_OFFLOADS};
use super::interface::{Control, is_valid_name, name_in, request};
use crate::memory::IoBuffers;

const TUN_DEVICE: &str = "/dev/net/tun";
/// An Ethernet wire, without a prefix of its own, with the virtio header before each frame.
const TAP_FLAGS: c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// The most places that one read fills. Up to 8 the kernel does without allocating; a frame of
/// segments takes 17 pages.
const MAX_VECTORS: usize = 32;

/// Why a TAP cannot be had.
#[derive(Debug, Error)]
pub enum TapError {
    /// No interface can be called that.
    #[error("{0:?} cannot be the name of a TAP: 1 to 15 bytes without '/', ':', '%' or blanks")]
    Name(String),
    /// There are no TAPs on this host.
    #[error("cannot open {TUN_DEVICE}: is the module \"tun\" loaded, and the device node here?")]
    NoTunDevice(#[source] io::Error),
    /// The device node is not for us.
    #[error("no permission to open {TUN_DEVICE}: reading and writing are needed")]
    TunPermission(#[source] io::Error),
    /// There is no such interface.
    #[error("there is no TAP {name}: create it with `ip tuntap add {name} mode tap`")]
    Missing {
        /// The name that was asked for.
        name: String,
    },
    /// Somebody else has it open.
    #[error("TAP {name} is in use by another process")]
    InUse {
        /// Its name.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// There is an interface of the name that is to be created.
    #[error("there is an interface {name} already")]
    Exists {
        /// The name.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// It belongs to another user.
    #[error(
        "no permission to use TAP {name}: it takes CAP_NET_ADMIN, or a TAP of one's own \
             (`ip tuntap add {name} mode tap user $USER`)"
    )]
    Permission {
        /// Its name.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The interface is of another kind.
    #[error("{name} is not a TAP with one queue, but another kind of interface")]
    NotATap {
        /// Its name.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Something else was refused.
    #[error("cannot {action} TAP {name}")]
    Refused {
        /// What was tried.
        action: &'static str,
        /// The TAP's name.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A frame that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    /// Its length in bytes, with its header.
    pub(super) len: usize,
    /// How many of them went to the guest's buffers; what is left is in the spill.
    pub(super) direct: usize,
}

/// A TAP, held open. One that was created by us is gone when this is dropped.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    /// What it can be told to leave to the guest, as `TUN_F_*`.
    offloads: u32,
}

impl Tap {
    /// Opens the TAP `name`, which has to exist, and takes it up if it is down and we may.
    ///
    /// # Errors
    ///
    /// There is no such TAP, it is in use, or not for us.
    pub fn open(name: &str) -> Result<Self, TapError> {
        if !is_valid_name(name) {
            return Err(TapError::Name(name.to_owned()));
        }
        // A name that is not there would be created by what opens it.
        let missing = || TapError::Missing {
            name: name.to_owned(),
        };
        let control = control(name)?;
        let index = control.index(name).map_err(|_| missing())?;
        let tap = Self::attach(name, false)?;
        if control.index(name).ok() != Some(index) {
            // It was removed meanwhile, and ours is a new one that nothing is connected to.
            return Err(missing());
        }
        if let Err(error) = control.bring_up(name) {
            // Whoever owns it may do so later.
            tracing::warn!("TAP {name} is down and cannot be taken up: {error}");
        }
        Ok(tap)
    }

    /// Creates a TAP, takes it up, and removes it when the value is dropped. In `pattern`, `%d`
    /// stands for the first number that is free.
    ///
    /// # Errors
    ///
    /// There is an interface of that name, or we may not create one.
    pub fn create(pattern: &str) -> Result<Self, TapError> {
        if !is_valid_name(&pattern.replacen("%d", "0", 1)) {
            return Err(TapError::Name(pattern.to_owned()));
        }
        let tap = Self::attach(pattern, true)?;
        let refused = |source| tap.refused("take up", source);
        control(&tap.name)?.bring_up(&tap.name).map_err(refused)?;
        Ok(tap)
    }

    /// Opens the TAP `name`, or makes it; `new` insists on the latter.
    fn attach(name: &str, new: bool) -> Result<Self, TapError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(TUN_DEVICE)
            .map_err(|error| match error.kind() {
                io::ErrorKind::PermissionDenied => TapError::TunPermission(error),
                _ => TapError::NoTunDevice(error),
            })?;
        let mut request = request(name);
        let exclusive = if new { libc::IFF_TUN_EXCL } else { 0 };
        // All of them are within 16 bits.
        #[allow(clippy::cast_possible_truncation)]
        let flags = (TAP_FLAGS | exclusive) as c_short;
        request.ifr_ifru.ifru_flags = flags;
        // SAFETY: TUNSETIFF takes a pointer to an ifreq, and this is one.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request) };
        check(result).map_err(|error| attach_error(name, new, error))?;
        let mut tap = Self {
            file,
            name: name_in(&request),
            offloads: 0,
        };
        tap.set_header_len()
            .map_err(|source| tap.refused("set the header length of", source))?;
        tap.offloads = tap.probe_offloads();
        Ok(tap)
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The interface's MTU in bytes.
    ///
    /// # Errors
    ///
    /// The interface is gone.
    pub fn mtu(&self) -> Result<u32, TapError> {
        let mtu = control(&self.name)?.mtu(&self.name);
        let mtu = mtu.map_err(|source| self.refused("read the MTU of", source))?;
        Ok(u32::try_from(mtu).unwrap_or(0))
    }

    /// Sets the interface's MTU: 68 to 65521 bytes.
    ///
    /// # Errors
    ///
    /// The interface cannot have this MTU, or we may not set it.
    pub fn set_mtu(&self, mtu: u16) -> Result<(), TapError> {
        let done = control(&self.name)?.set_mtu(&self.name, mtu.into());
        done.map_err(|source| self.refused("set the MTU of", source))
    }

    /// What the TAP can be told to leave to the guest, as `TUN_F_*`.
    pub(super) fn offloads(&self) -> u32 {
        self.offloads
    }

    /// Tells the TAP what to leave to the guest, as `TUN_F_*`.
    pub(super) fn set_offloads(&self, offloads: u32) -> io::Result<()> {
        if self.offloads == 0 {
            return Ok(());
        }
        // SAFETY: TUNSETOFFLOAD takes a number, and no pointer.
        check(unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                libc::TUNSETOFFLOAD,
                c_ulong::from(offloads),
            )
        })
    }

    /// What the TAP accepts of all that we know; nothing is left switched on.
    fn probe_offloads(&mut self) -> u32 {
        let candidates = [BASIC_OFFLOADS | UDP_OFFLOADS, BASIC_OFFLOADS];
        for candidate in candidates {
            self.offloads = candidate;
            if self.set_offloads(candidate).is_ok() && self.set_offloads(0).is_ok() {
                return candidate;
            }
        }
        0
    }

    fn set_header_len(&self) -> io::Result<()> {
        let len = c_int::from(HEADER_LEN);
        // SAFETY: TUNSETVNETHDRSZ takes a pointer to an int, and this is one.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &len) })
    }

    /// Reads one frame into `buffers`, and what they do not take into `spill`; `None` if there is
    /// no frame. The caller marks what was written.
    pub(super) fn read_frame(
        &self,
        buffers: &IoBuffers,
        spill: &mut [u8],
    ) -> io::Result<Option<Frame>> {
        const NOTHING: iovec = iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        let mut vectors = [NOTHING; MAX_VECTORS];
        let (mut room, mut count) = (0, 0);
        let places = buffers.as_iovecs().iter().take(MAX_VECTORS - 1);
        let end = iovec {
            iov_base: spill.as_mut_ptr().cast(),
            iov_len: spill.len(),
        };
        for (to, from) in vectors.iter_mut().zip(places.chain([&end])) {
            *to = *from;
            room += from.iov_len;
            count += 1;
        }
        room -= spill.len();
        // SAFETY: the first `count` vectors are places in guest memory that `buffers` keeps
        // mapped, and then `spill`, which is borrowed for us alone.
        let result = unsafe { libc::readv(self.file.as_raw_fd(), vectors.as_ptr(), count) };
        match usize::try_from(result) {
            Ok(0) => Ok(None),
            // Not a frame; a TAP has none like it.
            Ok(len) if len < usize::from(HEADER_LEN) => Err(io::ErrorKind::InvalidData.into()),
            Ok(len) => Ok(Some(Frame {
                len,
                direct: len.min(room),
            })),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::WouldBlock {
                    return Ok(None);
                }
                Err(error)
            }
        }
    }

    /// Writes one frame.
    pub(super) fn write_frame(&self, buffers: &IoBuffers) -> io::Result<()> {
        let vectors = buffers.as_iovecs();
        // More than the kernel takes is refused there.
        let count = c_int::try_from(vectors.len()).unwrap_or(c_int::MAX);
        // SAFETY: the vectors are places in guest memory that `buffers` keeps mapped.
        let result = unsafe { libc::writev(self.file.as_raw_fd(), vectors.as_ptr(), count) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Writes one frame that lies in memory of our own.
    pub(super) fn write_bytes(&self, frame: &[u8]) -> io::Result<()> {
        (&self.file).write(frame).map(drop)
    }

    fn refused(&self, action: &'static str, source: io::Error) -> TapError {
        TapError::Refused {
            action,
            name: self.name.clone(),
            source,
        }
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn control(name: &str) -> Result<Control, TapError> {
    Control::new().map_err(|source| TapError::Refused {
        action: "ask about",
        name: name.to_owned(),
        source,
    })
}

fn attach_error(name: &str, new: bool, source: io::Error) -> TapError {
    let name = name.to_owned();
    match source.raw_os_error() {
        Some(libc::EBUSY) if new => TapError::Exists { name, source },
        Some(libc::EBUSY) => TapError::InUse { name, source },
        Some(libc::EPERM | libc::EACCES) => TapError::Permission { name, source },
        Some(libc::EINVAL) => TapError::NotATap { name, source },
        _ => TapError::Refused {
            action: "open",
            name,
            source,
        },
    }
}

fn check(result: c_int) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
impl Tap {
    /// A TAP that is one end of a pair of sockets, which keep frames apart as a wire does; and the
    /// other end, whose reads and writes give up after a while.
    pub(crate) fn mock() -> (Self, std::os::unix::net::UnixStream) {
        use std::os::fd::{FromRawFd, OwnedFd};
        use std::time::Duration;

        let mut pair = [0; 2];
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
        // SAFETY: the array has room for the two descriptors.
        let result = unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, pair.as_mut_ptr()) };
        assert_eq!(result, 0);
        let [ours, theirs] = pair.map(|fd| {
            // SAFETY: the descriptor was made just now, and nobody else has it.
            std::os::unix::net::UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) })
        });
        ours.set_nonblocking(true).unwrap();
        let patience = Some(Duration::from_secs(10));
        theirs.set_read_timeout(patience).unwrap();
        theirs.set_write_timeout(patience).unwrap();
        let tap = Self {
            file: File::from(OwnedFd::from(ours)),
            name: "mock".to_owned(),
            offloads: 0,
        };
        (tap, theirs)
    }
}
