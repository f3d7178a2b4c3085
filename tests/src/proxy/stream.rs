// SPDX-License-Identifier: Apache-2.0
//! Connections of either kind, and how they end.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use super::Address;
use crate::host;

pub(super) enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    /// Listens at an address of the same kind as `like`.
    pub(super) fn bind(like: &Address, folder: &Path) -> io::Result<(Self, Address)> {
        match like {
            Address::Unix(_) => {
                let path = folder.join("proxy.sock");
                Ok((Self::Unix(UnixListener::bind(&path)?), Address::Unix(path)))
            }
            Address::Tcp(_) => {
                let listener = TcpListener::bind("127.0.0.1:0")?;
                let address = listener.local_addr()?;
                Ok((Self::Tcp(listener), Address::Tcp(address)))
            }
            Address::Passed(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    pub(super) fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Unix(listener) => Ok(Stream::Unix(listener.accept()?.0)),
            Self::Tcp(listener) => Stream::tcp(listener.accept()?.0),
        }
    }
}

pub(super) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    pub(super) fn connect(address: &Address) -> io::Result<Self> {
        match address {
            Address::Unix(path) => Ok(Self::Unix(UnixStream::connect(path)?)),
            Address::Tcp(address) => Self::tcp(TcpStream::connect(address)?),
            Address::Passed(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    pub(super) fn tcp(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self::Tcp(stream))
    }

    pub(super) fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Unix(stream) => Self::Unix(stream.try_clone()?),
            Self::Tcp(stream) => Self::Tcp(stream.try_clone()?),
        })
    }

    /// Says that no more will come.
    pub(super) fn end(&self) {
        self.shut(Shutdown::Write);
    }

    /// Ends it in order.
    pub(super) fn close(&self) {
        self.shut(Shutdown::Both);
    }

    pub(super) fn shut(&self, how: Shutdown) {
        // It may be closed already.
        let _ = match self {
            Self::Unix(stream) => stream.shutdown(how),
            Self::Tcp(stream) => stream.shutdown(how),
        };
    }

    /// Breaks it, if it is of a kind that can break.
    pub(super) fn reset(&self) {
        match self {
            Self::Tcp(stream) if host::reset(stream.as_raw_fd()).is_ok() => {}
            _ => self.close(),
        }
    }
}

impl Read for &Stream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => (&*stream).read(bytes),
            Stream::Tcp(stream) => (&*stream).read(bytes),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => (&*stream).write(bytes),
            Stream::Tcp(stream) => (&*stream).write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
