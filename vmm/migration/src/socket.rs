// SPDX-License-Identifier: Apache-2.0
//! A connected socket, with a limit on each wait and, for a while, on all of them together.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crate::{host, options};

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

/// What a socket and those who may end it have in common.
#[derive(Debug)]
pub(crate) struct Shared {
    stream: Stream,
    /// Whether it was ended from here: then its end says nothing of the other side.
    is_closed: AtomicBool,
}

impl Shared {
    /// Ends it, while somebody else may wait in it.
    pub(crate) fn close(&self) {
        self.is_closed.store(true, Ordering::Release);
        // One that has ended already is as it should be.
        let _ = self.stream.shutdown();
    }
}

/// A connected socket.
#[derive(Debug)]
pub(crate) struct Socket {
    shared: Arc<Shared>,
    limit: Option<Duration>,
    deadline: Option<Instant>,
    /// Whether the process has it under another number, too.
    is_inherited: bool,
    was_used: bool,
}

impl Socket {
    /// A socket; one that `is_inherited` the process has under another number, too.
    ///
    /// # Errors
    ///
    /// It does not take its options.
    pub(crate) fn new(stream: Stream, is_inherited: bool) -> io::Result<Self> {
        // One from elsewhere may have been set to anything.
        stream.set_nonblocking(false)?;
        if let Stream::Tcp(stream) = &stream {
            options::set_tcp(stream)?;
        }
        Ok(Self {
            shared: Arc::new(Shared {
                stream,
                is_closed: AtomicBool::new(false),
            }),
            limit: None,
            deadline: None,
            is_inherited,
            was_used: false,
        })
    }

    pub(crate) fn is_unix(&self) -> bool {
        matches!(self.shared.stream, Stream::Unix(_))
    }

    pub(crate) fn is_inherited(&self) -> bool {
        self.is_inherited
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
        self.shared.stream.set_timeouts(self.limit)
    }

    /// Until when reads and writes may wait, however much moves.
    pub(crate) fn set_deadline(&mut self, deadline: Option<Instant>) -> io::Result<()> {
        self.deadline = deadline;
        if deadline.is_none() {
            self.shared.stream.set_timeouts(self.limit)?;
        }
        Ok(())
    }

    /// For those who may end it. They do not keep it open.
    pub(crate) fn shared(&self) -> Weak<Shared> {
        Arc::downgrade(&self.shared)
    }

    /// Ends it; nothing that was not written before is from now on.
    pub(crate) fn close(&self) {
        self.shared.close();
    }

    /// Resets it, so that the other side knows that this is no end in order; `false` if it is of a
    /// kind that cannot be reset.
    pub(crate) fn reset(&self) -> bool {
        matches!(&self.shared.stream, Stream::Tcp(stream) if host::disconnect(stream).is_ok())
    }

    /// Lets it stay open as long as the process lives.
    pub(crate) fn keep_open(&mut self) {
        self.is_inherited = false;
        std::mem::forget(Arc::clone(&self.shared));
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
        self.shared.stream.set_timeouts(Some(left))?;
        Ok(true)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Nobody else can go on with what was begun, and the other side is to know.
        if self.is_inherited && self.was_used {
            let _ = self.shared.stream.shutdown();
        }
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
    /// An end that was made here, by [`Shared::close`], is an error of kind `ConnectionAborted`.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.bound()?;
        self.was_used = true;
        let read = match &self.shared.stream {
            Stream::Unix(stream) => (&*stream).read(buffer),
            Stream::Tcp(stream) => (&*stream).read(buffer),
        };
        if self.shared.is_closed.load(Ordering::Acquire) && !buffer.is_empty() {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        read
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let bytes = if self.bound()? {
            bytes.get(..PIECE).unwrap_or(bytes)
        } else {
            bytes
        };
        self.was_used = true;
        match &self.shared.stream {
            Stream::Unix(stream) => (&*stream).write(bytes),
            Stream::Tcp(stream) => (&*stream).write(bytes),
        }
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        if self.deadline.is_some() {
            let part = parts.iter().find(|part| !part.is_empty());
            return part.map_or(Ok(0), |part| self.write(part));
        }
        self.was_used = true;
        match &self.shared.stream {
            Stream::Unix(stream) => (&*stream).write_vectored(parts),
            Stream::Tcp(stream) => (&*stream).write_vectored(parts),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.shared.stream {
            Stream::Unix(stream) => stream.as_fd(),
            Stream::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        match &self.shared.stream {
            Stream::Unix(stream) => stream.as_raw_fd(),
            Stream::Tcp(stream) => stream.as_raw_fd(),
        }
    }
}
