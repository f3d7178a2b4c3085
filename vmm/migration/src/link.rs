// SPDX-License-Identifier: Apache-2.0
//! Connections: bytes there and back, with a limit on how long nothing may move.

use std::fs;
use std::io::{self, IoSlice, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::address::Address;
use crate::host;
use crate::socket::{Socket, Stream};
use crate::tls::{Secured, Tls, TlsError};

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
    carrier: Carrier,
    peer: String,
}

#[derive(Debug)]
enum Carrier {
    Plain(Socket),
    Tls(Box<Secured>),
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
        Ok(Self {
            carrier: Carrier::Plain(Socket::new(stream)?),
            peer,
        })
    }

    /// Speaks TLS from now on, to a server that is to have a certificate for the name in `tls`, or
    /// else for the host of `address`, or else for "localhost". The handshake ends within the
    /// limit of the link, or within 10 seconds if it has none.
    ///
    /// # Errors
    ///
    /// One side does not accept the other, or there is nobody who speaks TLS.
    pub fn secured_as_client(self, tls: &Tls, address: &Address) -> Result<Self, TlsError> {
        self.secured(|socket| Secured::client(socket, tls, address))
    }

    /// Speaks TLS from now on, to a client. The handshake ends within the limit of the link, or
    /// within 10 seconds if it has none.
    ///
    /// # Errors
    ///
    /// One side does not accept the other, or there is nobody who speaks TLS.
    pub fn secured_as_server(self, tls: &Tls) -> Result<Self, TlsError> {
        self.secured(|socket| Secured::server(socket, tls))
    }

    fn secured(
        self,
        handshake: impl FnOnce(Socket) -> Result<Secured, TlsError>,
    ) -> Result<Self, TlsError> {
        let Carrier::Plain(socket) = self.carrier else {
            return Err(TlsError::Twice);
        };
        Ok(Self {
            carrier: Carrier::Tls(Box::new(handshake(socket)?)),
            peer: self.peer,
        })
    }

    fn socket(&self) -> &Socket {
        match &self.carrier {
            Carrier::Plain(socket) => socket,
            Carrier::Tls(secured) => secured.socket(),
        }
    }

    fn socket_mut(&mut self) -> &mut Socket {
        match &mut self.carrier {
            Carrier::Plain(socket) => socket,
            Carrier::Tls(secured) => secured.socket_mut(),
        }
    }

    /// Where the other side is, for people.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Whether both sides are on one host for sure. Not under TLS: whoever wants that has a unix
    /// socket lead elsewhere.
    pub fn is_local(&self) -> bool {
        matches!(&self.carrier, Carrier::Plain(socket) if socket.is_unix())
    }

    /// Whether nobody between the two sides can read or change anything.
    pub fn is_secured(&self) -> bool {
        matches!(self.carrier, Carrier::Tls(_))
    }

    /// How long a read or a write may wait without anything moving.
    ///
    /// # Errors
    ///
    /// The socket does not take it.
    pub fn set_limit(&mut self, limit: Duration) -> io::Result<()> {
        self.socket_mut().set_limit(limit)
    }

    /// What [`Link::set_limit`] has set.
    pub fn limit(&self) -> Option<Duration> {
        self.socket().limit()
    }

    /// Until when reads and writes may wait, however much moves; `None` for as long as something
    /// does.
    ///
    /// # Errors
    ///
    /// The socket does not take it.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) -> io::Result<()> {
        self.socket_mut().set_deadline(deadline)
    }

    /// What [`Link::set_deadline`] has set.
    pub fn deadline(&self) -> Option<Instant> {
        self.socket().deadline()
    }

    /// Waits until there is something to read, or the end; `false` if that takes longer.
    ///
    /// # Errors
    ///
    /// The host does not tell.
    pub fn wait_readable(&mut self, limit: Duration) -> io::Result<bool> {
        match &mut self.carrier {
            Carrier::Plain(socket) => wait_readable(socket, limit),
            Carrier::Tls(secured) => secured.wait_readable(limit),
        }
    }

    /// Hands a descriptor over to another process of this host, beside one byte.
    ///
    /// # Errors
    ///
    /// The other side does not take it. `Unsupported`: this is no unix socket without TLS.
    pub fn send_fd(&mut self, fd: BorrowedFd<'_>) -> io::Result<()> {
        match &mut self.carrier {
            Carrier::Plain(socket) => socket.send_fd(fd),
            Carrier::Tls(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Takes what the other side hands over with [`Link::send_fd`], which is to be what comes next.
    ///
    /// # Errors
    ///
    /// It comes not, or something else does. `Unsupported`: this is no unix socket without TLS.
    pub fn receive_fd(&mut self) -> io::Result<OwnedFd> {
        match &mut self.carrier {
            Carrier::Plain(socket) => socket.receive_fd(),
            Carrier::Tls(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// What can end it from another thread.
    ///
    /// # Errors
    ///
    /// The process has no more descriptors.
    pub fn closer(&self) -> io::Result<Closer> {
        self.socket().duplicate().map(Closer)
    }
}

impl Read for Link {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.carrier {
            Carrier::Plain(socket) => socket.read(buffer),
            Carrier::Tls(secured) => secured.read(buffer),
        }
    }
}

impl Write for Link {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.carrier {
            Carrier::Plain(socket) => socket.write(bytes),
            Carrier::Tls(secured) => secured.write(bytes),
        }
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        match &mut self.carrier {
            Carrier::Plain(socket) => socket.write_vectored(parts),
            Carrier::Tls(secured) => secured.write_vectored(parts),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsRawFd for Link {
    fn as_raw_fd(&self) -> RawFd {
        self.socket().as_raw_fd()
    }
}

/// Waits until `socket` can be read or has ended; `false` if that takes longer.
pub(crate) fn wait_readable(socket: &Socket, limit: Duration) -> io::Result<bool> {
    host::wait_readable(&[socket.as_raw_fd()], limit).map(|ready| ready == Some(0))
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
                stream.set_nonblocking(false)?;
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
