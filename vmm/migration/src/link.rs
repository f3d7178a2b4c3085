// SPDX-License-Identifier: Apache-2.0
//! Connections: bytes there and back, with a limit on how long nothing may move.

use std::io::{self, IoSlice, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Weak;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::address::Address;
use crate::host;
use crate::options;
use crate::socket::{Shared, Socket, Stream};
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
    /// There was one connection, and no other can come.
    #[error("the socket that was passed is one connection, which has come to its end")]
    Spent,
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

/// Ends a connection from another thread: whoever reads or writes in it gets an error at once, and
/// does not take it for an end that the other side has made. The other side cannot tell it from the
/// end of this process. A closer does not keep a connection open.
#[derive(Clone, Debug)]
pub struct Closer(Weak<Shared>);

impl Closer {
    /// Ends it.
    pub fn close(&self) {
        if let Some(shared) = self.0.upgrade() {
            shared.close();
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

    /// A connection that is there already.
    ///
    /// # Errors
    ///
    /// The socket does not take its options.
    pub fn from_unix(stream: UnixStream) -> io::Result<Self> {
        Self::of(Stream::Unix(stream), "unix".into())
    }

    /// A connected socket that was passed to the process. It is duplicated, so it can be used again
    /// if this comes to nothing before anything was said.
    pub(crate) fn inherited(fd: RawFd) -> Result<Self, LinkError> {
        let socket = Socket::new(inherited(fd)?, true)?;
        Ok(Self {
            carrier: Carrier::Plain(socket),
            peer: Address::Fd(fd).to_string(),
        })
    }

    pub(crate) fn of(stream: Stream, peer: String) -> io::Result<Self> {
        Ok(Self {
            carrier: Carrier::Plain(Socket::new(stream, false)?),
            peer,
        })
    }

    /// Ends it so that the other side does not take it for an end in order, which says that this
    /// process is gone: a TCP connection is reset, and the end of one with TLS is not announced. A
    /// plain unix socket has no such end: it stays open as long as the process lives, and the other
    /// side waits until its own limit has passed.
    pub fn reset(&mut self) {
        match &mut self.carrier {
            Carrier::Plain(socket) => {
                if !socket.reset() {
                    socket.keep_open();
                }
            }
            Carrier::Tls(secured) => {
                secured.silence();
                if !secured.socket().reset() {
                    secured.socket().close();
                }
            }
        }
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

    /// Whether the socket was passed to this process, so that the kernel may know somebody else as
    /// its other side: who has made it.
    pub fn was_passed(&self) -> bool {
        self.socket().is_inherited()
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

    /// Whether the other side says nothing more than what can still be read.
    ///
    /// # Errors
    ///
    /// The host does not tell.
    pub fn has_ended(&self) -> io::Result<bool> {
        host::has_ended(self.socket().as_raw_fd())
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
    /// None at present.
    pub fn closer(&self) -> io::Result<Closer> {
        Ok(Closer(self.socket().shared()))
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

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket().as_fd()
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

fn inherited(fd: RawFd) -> Result<Stream, LinkError> {
    let failed = |source| LinkError::NoSocket { fd, source };
    let (socket, family) = host::stream_socket(fd).map_err(failed)?;
    match family {
        libc::AF_UNIX => Ok(Stream::Unix(socket.into())),
        libc::AF_INET | libc::AF_INET6 => Ok(Stream::Tcp(socket.into())),
        _ => Err(failed(io::ErrorKind::Unsupported.into())),
    }
}
