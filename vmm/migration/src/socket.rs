// SPDX-License-Identifier: Apache-2.0
//! A connected socket, with a limit on each wait and, for a while, on all of them together.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::host;

/// The most that is written at once under a deadline, in bytes: the kernel's own limit starts anew
/// with each piece of a larger write.
const PIECE: usize = 32 << 10;

/// What kind of socket it is.
#[derive(Debug)]
pub(crate) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    pub(crate) fn shutdown(&self) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
        }
    }

    pub(crate) fn set_nonblocking(&self, to: bool) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_nonblocking(to),
            Self::Tcp(stream) => stream.set_nonblocking(to),
        }
    }

    fn try_clone(&self) -> io::Result<Self> {
        match self {
            Self::Unix(stream) => stream.try_clone().map(Self::Unix),
            Self::Tcp(stream) => stream.try_clone().map(Self::Tcp),
        }
    }

    fn set_timeouts(&self, limit: Option<Duration>) -> io::Result<()> {
        let limit = limit.map(|limit| limit.max(Duration::from_millis(1)));
        match self {
            Self::Unix(stream) => {
                stream.set_read_timeout(limit)?;
                stream.set_write_timeout(limit)
            }
            Self::Tcp(stream) => {
                stream.set_read_timeout(limit)?;
                stream.set_write_timeout(limit)
            }
        }
    }
}

/// A connected socket.
#[derive(Debug)]
pub(crate) struct Socket {
    stream: Stream,
    limit: Option<Duration>,
    deadline: Option<Instant>,
}

impl Socket {
    /// # Errors
    ///
    /// It does not take its options.
    pub(crate) fn new(stream: Stream) -> io::Result<Self> {
        if let Stream::Tcp(stream) = &stream {
            // Messages are waited for; memory goes in large pieces anyway.
            stream.set_nodelay(true)?;
        }
        Ok(Self {
            stream,
            limit: None,
            deadline: None,
        })
    }

    pub(crate) fn is_unix(&self) -> bool {
        matches!(self.stream, Stream::Unix(_))
    }

    pub(crate) fn limit(&self) -> Option<Duration> {
        self.limit
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// How long a read or a write may wait without anything moving.
    pub(crate) fn set_limit(&mut self, limit: Duration) -> io::Result<()> {
        self.limit = Some(limit);
        self.stream.set_timeouts(self.limit)
    }

    /// Until when reads and writes may wait, however much moves.
    pub(crate) fn set_deadline(&mut self, deadline: Option<Instant>) -> io::Result<()> {
        self.deadline = deadline;
        if deadline.is_none() {
            self.stream.set_timeouts(self.limit)?;
        }
        Ok(())
    }

    /// The same socket for somebody who is to end it.
    pub(crate) fn duplicate(&self) -> io::Result<Stream> {
        self.stream.try_clone()
    }

    /// Lets the next call wait no longer than until the deadline; whether there is one.
    fn bound(&self) -> io::Result<bool> {
        let Some(deadline) = self.deadline else {
            return Ok(false);
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let left = self.limit.map_or(left, |limit| limit.min(left));
        self.stream.set_timeouts(Some(left))?;
        Ok(true)
    }
}

impl Socket {
    /// Sends one byte and a descriptor beside it.
    pub(crate) fn send_fd(&mut self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.for_descriptors()?;
        host::send_fd(self.as_raw_fd(), fd)
    }

    /// Receives what [`Socket::send_fd`] sends.
    pub(crate) fn receive_fd(&mut self) -> io::Result<OwnedFd> {
        self.for_descriptors()?;
        host::receive_fd(self.as_raw_fd())
    }

    fn for_descriptors(&self) -> io::Result<()> {
        if !self.is_unix() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.bound().map(|_| ())
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.bound()?;
        match &mut self.stream {
            Stream::Unix(stream) => stream.read(buffer),
            Stream::Tcp(stream) => stream.read(buffer),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let bytes = if self.bound()? {
            bytes.get(..PIECE).unwrap_or(bytes)
        } else {
            bytes
        };
        match &mut self.stream {
            Stream::Unix(stream) => stream.write(bytes),
            Stream::Tcp(stream) => stream.write(bytes),
        }
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        if self.deadline.is_some() {
            let part = parts.iter().find(|part| !part.is_empty());
            return part.map_or(Ok(0), |part| self.write(part));
        }
        match &mut self.stream {
            Stream::Unix(stream) => stream.write_vectored(parts),
            Stream::Tcp(stream) => stream.write_vectored(parts),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        match &self.stream {
            Stream::Unix(stream) => stream.as_raw_fd(),
            Stream::Tcp(stream) => stream.as_raw_fd(),
        }
    }
}
