// SPDX-License-Identifier: Apache-2.0
//! Connections: bytes there and back, with a limit on how long nothing may move.

use std::fs;
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::address::Address;
use crate::host;

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
    stream: Stream,
    peer: String,
}

#[derive(Debug)]
enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// Ends a connection from another thread: whoever waits in it gets an error.
#[derive(Debug)]
pub struct Closer(Stream);

impl Closer {
    /// Ends it.
    pub fn close(&self) {
        // One that is closed already is as it should be.
        let _ = self.0.shutdown();
    }
}

impl Stream {
    fn shutdown(&self) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
        }
    }

    fn try_clone(&self) -> io::Result<Self> {
        match self {
            Self::Unix(stream) => stream.try_clone().map(Self::Unix),
            Self::Tcp(stream) => stream.try_clone().map(Self::Tcp),
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
            Address::Unix(path) => UnixStream::connect(path)
                .map(Stream::Unix)
                .map_err(failed)?,
            Address::Tcp { host, port } => {
                Stream::Tcp(connect_tcp(host, *port, limit).map_err(failed)?)
            }
            Address::Fd(fd) => inherited(*fd)?,
        };
        Ok(Self::of(stream, address.to_string())?)
    }

    /// A connection that is there already.
    ///
    /// # Errors
    ///
    /// The socket does not take its options.
    pub fn from_unix(stream: UnixStream) -> io::Result<Self> {
        Self::of(Stream::Unix(stream), "unix".into())
    }

    fn of(stream: Stream, peer: String) -> io::Result<Self> {
        if let Stream::Tcp(stream) = &stream {
            // Messages are waited for; memory goes in large pieces anyway.
            stream.set_nodelay(true)?;
        }
        Ok(Self { stream, peer })
    }

    /// Where the other side is, for people.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Whether both sides are on one host for sure.
    pub fn is_local(&self) -> bool {
        matches!(self.stream, Stream::Unix(_))
    }

    /// How long a read or a write may wait without anything moving.
    ///
    /// # Errors
    ///
    /// The socket does not take it.
    pub fn set_limit(&mut self, limit: Duration) -> io::Result<()> {
        let limit = Some(limit.max(Duration::from_millis(1)));
        match &self.stream {
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
        host::wait_readable(&[self.stream.as_raw_fd()], limit).map(|ready| ready == Some(0))
    }

    /// What can end it from another thread.
    ///
    /// # Errors
    ///
    /// The process has no more descriptors.
    pub fn closer(&self) -> io::Result<Closer> {
        self.stream.try_clone().map(Closer)
    }
}

impl Read for Link {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.stream {
            Stream::Unix(stream) => stream.read(buffer),
            Stream::Tcp(stream) => stream.read(buffer),
        }
    }
}

impl Write for Link {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.stream {
            Stream::Unix(stream) => stream.write(bytes),
            Stream::Tcp(stream) => stream.write(bytes),
        }
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        match &mut self.stream {
            Stream::Unix(stream) => stream.write_vectored(parts),
            Stream::Tcp(stream) => stream.write_vectored(parts),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsRawFd for Link {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
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

/// A connected socket that was passed to the process. It is duplicated, so it can be used again if
/// this comes to nothing.
fn inherited(fd: RawFd) -> Result<Stream, LinkError> {
    let failed = |source| LinkError::NoSocket { fd, source };
    let (socket, family) = host::stream_socket(fd).map_err(failed)?;
    if family == libc::AF_UNIX {
        Ok(Stream::Unix(socket.into()))
    } else {
        Ok(Stream::Tcp(socket.into()))
    }
}

/// Where connections arrive.
#[derive(Debug)]
pub struct Listener {
    kind: Kind,
    address: Address,
}

#[derive(Debug)]
enum Kind {
    Unix(UnixListener, PathBuf),
    Tcp(TcpListener),
    Fd(RawFd),
}

impl Listener {
    /// Waits at `address` from now on.
    ///
    /// # Errors
    ///
    /// That cannot be.
    pub fn bind(address: &Address) -> Result<Self, LinkError> {
        let failed = |source| LinkError::Bind {
            address: address.clone(),
            source,
        };
        let kind = match address {
            Address::Unix(path) => {
                remove_dead_socket(path)?;
                let listener = UnixListener::bind(path).map_err(failed)?;
                listener.set_nonblocking(true)?;
                Kind::Unix(listener, path.clone())
            }
            Address::Tcp { host, port } => {
                let listener = TcpListener::bind((host.as_str(), *port)).map_err(failed)?;
                listener.set_nonblocking(true)?;
                Kind::Tcp(listener)
            }
            Address::Fd(fd) => {
                inherited(*fd)?;
                Kind::Fd(*fd)
            }
        };
        Ok(Self {
            kind,
            address: address.clone(),
        })
    }

    /// Where it waits; with the port that the host has chosen, if it was to choose one.
    pub fn address(&self) -> Address {
        match (&self.kind, &self.address) {
            (Kind::Tcp(listener), Address::Tcp { host, .. }) => {
                let port = listener.local_addr().map_or(0, |address| address.port());
                Address::Tcp {
                    host: host.clone(),
                    port,
                }
            }
            _ => self.address.clone(),
        }
    }

    /// The next connection; `None` if there is none within `limit`.
    ///
    /// # Errors
    ///
    /// The host gives none.
    pub fn accept(&self, limit: Duration) -> Result<Option<Link>, LinkError> {
        let fd = match &self.kind {
            Kind::Unix(listener, _) => listener.as_raw_fd(),
            Kind::Tcp(listener) => listener.as_raw_fd(),
            Kind::Fd(fd) => *fd,
        };
        if host::wait_readable(&[fd], limit)?.is_none() {
            return Ok(None);
        }
        let accepted = match &self.kind {
            Kind::Unix(listener, path) => listener
                .accept()
                .map(|(stream, _)| (Stream::Unix(stream), format!("unix:{}", path.display()))),
            Kind::Tcp(listener) => listener
                .accept()
                .map(|(stream, peer)| (Stream::Tcp(stream), format!("tcp:{peer}"))),
            Kind::Fd(fd) => Ok((inherited(*fd)?, format!("fd:{fd}"))),
        };
        match accepted {
            Ok((stream, peer)) => {
                match &stream {
                    Stream::Unix(stream) => stream.set_nonblocking(false)?,
                    Stream::Tcp(stream) => stream.set_nonblocking(false)?,
                }
                Ok(Some(Link::of(stream, peer)?))
            }
            // Whoever came has gone.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Kind::Unix(_, path) = &self.kind {
            // It is ours.
            let _ = fs::remove_file(path);
        }
    }
}

/// Removes the socket of a process that has ended.
fn remove_dead_socket(path: &Path) -> Result<(), LinkError> {
    let Ok(found) = path.symlink_metadata() else {
        return Ok(());
    };
    let is_dead = || {
        UnixStream::connect(path)
            .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    };
    if found.file_type().is_socket() && is_dead() && fs::remove_file(path).is_ok() {
        return Ok(());
    }
    Err(LinkError::InUse(path.into()))
}
