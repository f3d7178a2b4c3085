// SPDX-License-Identifier: Apache-2.0
//! Connections: bytes there and back, with a limit on how long nothing may move.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::address::Address;
use crate::host;
use crate::options;

/// A connection that cannot be had.
#[derive(Debug, Error)]
pub enum LinkError {
    /// Nobody is there.
    #[error("nobody can be reached at {address}")]
    Connect {
        /// Where.
        address: Address,
        /// Why.
        source: io::Error,
    },
    /// Nobody can be waited for there.
    #[error("nobody can be waited for at {address}")]
    Bind {
        /// Where.
        address: Address,
        /// Why.
        source: io::Error,
    },
    /// There is something already.
    #[error("{} is in use: remove it, or name another socket", .0.display())]
    InUse(PathBuf),
    /// It is no socket.
    #[error("descriptor {fd} is no connected stream socket that this process was started with")]
    NoSocket {
        /// Its number.
        fd: RawFd,
        /// What the kernel says.
        source: io::Error,
    },
    /// The socket cannot be used.
    #[error("the connection cannot be used")]
    Socket(#[from] io::Error),
    /// The wait for a connection was ended.
    #[error("nobody is waited for any more")]
    Stopped,
}

/// A connection.
#[derive(Debug)]
pub struct Link {
    shared: Arc<Shared>,
    peer: String,
    /// Whether the process has the socket under another number, too.
    is_inherited: bool,
    was_used: bool,
}

/// What a link and those who may end it have in common.
#[derive(Debug)]
struct Shared {
    stream: Stream,
    /// Whether it was ended from here: then its end says nothing of the other side.
    is_closed: AtomicBool,
}

#[derive(Debug)]
pub(crate) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// Ends a connection from another thread: whoever reads or writes in it gets an error at once, and
/// does not take it for an end that the other side has made. The other side cannot tell it from the
/// end of this process. A closer does not keep a connection open.
#[derive(Clone, Debug)]
pub struct Closer(Weak<Shared>);

impl Closer {
    /// Ends it.
    pub fn close(&self) {
        if let Some(shared) = self.0.upgrade() {
            shared.is_closed.store(true, Ordering::Release);
            // One that is closed already is as it should be.
            let _ = shared.stream.shutdown();
        }
    }
}

impl Stream {
    fn set_nonblocking(&self, to: bool) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_nonblocking(to),
            Self::Tcp(stream) => stream.set_nonblocking(to),
        }
    }

    fn shutdown(&self) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
        }
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Unix(stream) => stream.as_raw_fd(),
            Self::Tcp(stream) => stream.as_raw_fd(),
        }
    }
}

impl Link {
    /// Connects to `address` within `limit`.
    ///
    /// # Errors
    ///
    /// Nobody is there, or a descriptor is no socket.
    pub fn connect(address: &Address, limit: Duration) -> Result<Self, LinkError> {
        let failed = |source| LinkError::Connect {
            address: address.clone(),
            source,
        };
        let stream = match address {
            Address::Unix(path) => {
                Stream::Unix(options::connect_unix(path, limit).map_err(failed)?)
            }
            Address::Tcp { host, port } => {
                Stream::Tcp(connect_tcp(host, *port, limit).map_err(failed)?)
            }
            Address::Fd(fd) => return Self::inherited(*fd),
        };
        Ok(Self::of(stream, address.to_string())?)
    }

    /// A connected socket that was passed to the process. It is duplicated, so it can be used again
    /// if this comes to nothing before anything was said.
    pub(crate) fn inherited(fd: RawFd) -> Result<Self, LinkError> {
        let mut link = Self::of(inherited(fd)?, Address::Fd(fd).to_string())?;
        link.is_inherited = true;
        Ok(link)
    }

    /// A connection that is there already.
    ///
    /// # Errors
    ///
    /// The socket does not take its options.
    pub fn from_unix(stream: UnixStream) -> io::Result<Self> {
        Self::of(Stream::Unix(stream), "unix".into())
    }

    pub(crate) fn of(stream: Stream, peer: String) -> io::Result<Self> {
        // A socket from elsewhere may have been set to anything.
        stream.set_nonblocking(false)?;
        if let Stream::Tcp(stream) = &stream {
            options::set_tcp(stream)?;
        }
        Ok(Self {
            shared: Arc::new(Shared {
                stream,
                is_closed: AtomicBool::new(false),
            }),
            peer,
            is_inherited: false,
            was_used: false,
        })
    }

    /// Ends it so that the other side does not take it for an end in order, which says that this
    /// process is gone: a TCP connection is reset. A unix socket cannot be: it stays open as long
    /// as the process lives, and the other side waits until its own limit has passed.
    pub fn reset(mut self) {
        self.was_used = false;
        match &self.shared.stream {
            // Without a reset, the next best is that nothing is said at all.
            Stream::Tcp(stream) if options::reset(stream).is_ok() => {}
            _ => std::mem::forget(Arc::clone(&self.shared)),
        }
    }

    /// Where the other side is, for people.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Whether both sides are on one host for sure.
    pub fn is_local(&self) -> bool {
        matches!(self.shared.stream, Stream::Unix(_))
    }

    /// How long a read or a write may wait without anything moving.
    ///
    /// # Errors
    ///
    /// The socket does not take it.
    pub fn set_limit(&mut self, limit: Duration) -> io::Result<()> {
        let limit = Some(limit.max(Duration::from_millis(1)));
        match &self.shared.stream {
            Stream::Unix(stream) => {
                stream.set_read_timeout(limit)?;
                stream.set_write_timeout(limit)
            }
            Stream::Tcp(stream) => {
                stream.set_read_timeout(limit)?;
                stream.set_write_timeout(limit)
            }
        }
    }

    /// Waits until there is something to read, or the end; `false` if that takes longer.
    ///
    /// # Errors
    ///
    /// The host does not tell.
    pub fn wait_readable(&mut self, limit: Duration) -> io::Result<bool> {
        host::wait_readable(&[self.shared.stream.as_raw_fd()], limit).map(|ready| ready == Some(0))
    }

    /// What can end it from another thread.
    ///
    /// # Errors
    ///
    /// None now.
    pub fn closer(&self) -> io::Result<Closer> {
        Ok(Closer(Arc::downgrade(&self.shared)))
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // Nobody else can go on with what was begun, and the other side is to know.
        if self.is_inherited && self.was_used {
            let _ = self.shared.stream.shutdown();
        }
    }
}

impl Read for Link {
    /// As for a socket; but an end that was made here, by a [`Closer`], is an error.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
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

impl Write for Link {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.was_used = true;
        match &self.shared.stream {
            Stream::Unix(stream) => (&*stream).write(bytes),
            Stream::Tcp(stream) => (&*stream).write(bytes),
        }
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
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

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.shared.stream {
            Stream::Unix(stream) => stream.as_fd(),
            Stream::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl AsRawFd for Link {
    fn as_raw_fd(&self) -> RawFd {
        self.shared.stream.as_raw_fd()
    }
}

fn connect_tcp(host: &str, port: u16, limit: Duration) -> io::Result<TcpStream> {
    let end = Instant::now() + limit;
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for address in (host, port).to_socket_addrs()? {
        let left = end.saturating_duration_since(Instant::now());
        match TcpStream::connect_timeout(&address, left.max(Duration::from_millis(1))) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn inherited(fd: RawFd) -> Result<Stream, LinkError> {
    let failed = |source| LinkError::NoSocket { fd, source };
    let (socket, family) = host::stream_socket(fd).map_err(failed)?;
    match family {
        libc::AF_UNIX => Ok(Stream::Unix(socket.into())),
        libc::AF_INET | libc::AF_INET6 => Ok(Stream::Tcp(socket.into())),
        _ => Err(failed(io::ErrorKind::Unsupported.into())),
    }
}
