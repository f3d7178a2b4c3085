// SPDX-License-Identifier: Apache-2.0
//! A socket with TLS on it.

use std::io::{self, BufReader, ErrorKind, IoSlice, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::{ClientConnection, Connection, ServerConnection};

use super::{Tls, TlsError};
use crate::address::Address;
use crate::link::wait_readable;
use crate::socket::Socket;

/// How long a handshake may take if the socket has no limit.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long an end may take that the other side does not wait for.
const FAREWELL: Duration = Duration::from_millis(100);
/// How much is read at once, in bytes: a few records.
const READ: usize = 64 << 10;

/// A socket with TLS on it.
#[derive(Debug)]
pub(crate) struct Secured {
    connection: Connection,
    /// What has come and is not decrypted yet.
    socket: BufReader<Socket>,
    /// Whether nothing may be written any more: what was to be written before has not been in full,
    /// and whoever wanted it knows that.
    is_silenced: bool,
}

impl Secured {
    /// Does the handshake with a server.
    pub(crate) fn client(socket: Socket, tls: &Tls, address: &Address) -> Result<Self, TlsError> {
        let name = tls.server_name(address)?;
        let connection =
            ClientConnection::new(Arc::clone(&tls.client), name).map_err(TlsError::Setup)?;
        Self::handshake(connection.into(), socket)
    }

    /// Does the handshake with a client.
    pub(crate) fn server(socket: Socket, tls: &Tls) -> Result<Self, TlsError> {
        let connection = ServerConnection::new(Arc::clone(&tls.server)).map_err(TlsError::Setup)?;
        Self::handshake(connection.into(), socket)
    }

    fn handshake(connection: Connection, mut socket: Socket) -> Result<Self, TlsError> {
        let before = socket.deadline();
        let end = Instant::now().checked_add(socket.limit().unwrap_or(HANDSHAKE));
        let nearer = before.into_iter().chain(end).min();
        socket.set_deadline(nearer).map_err(TlsError::Socket)?;
        let mut secured = Self {
            connection,
            socket: BufReader::with_capacity(READ, socket),
            is_silenced: false,
        };
        secured.agree()?;
        secured.accept()?;
        let socket = secured.socket.get_mut();
        socket.set_deadline(before).map_err(TlsError::Socket)?;
        Ok(secured)
    }

    fn agree(&mut self) -> Result<(), TlsError> {
        while self.connection.is_handshaking() {
            self.flush_records().map_err(TlsError::of_socket)?;
            if !self.connection.is_handshaking() {
                break;
            }
            if self.read_records().map_err(TlsError::of_socket)? == 0 {
                return Err(TlsError::Ended);
            }
            self.decrypt().map_err(TlsError::of_protocol)?;
        }
        self.flush_records().map_err(TlsError::of_socket)
    }

    /// Tells a client that its certificate is accepted, or waits to be told.
    fn accept(&mut self) -> Result<(), TlsError> {
        if matches!(self.connection, Connection::Server(_)) {
            let sent = self.write(&[0]);
            return sent.map(|_| ()).map_err(TlsError::of_socket);
        }
        match self.read(&mut [0]) {
            Ok(0) => Err(TlsError::Ended),
            Ok(_) => Ok(()),
            Err(error) => Err(match error.downcast::<rustls::Error>() {
                Ok(error) => TlsError::of_protocol(error),
                Err(error) => TlsError::of_socket(error),
            }),
        }
    }

    pub(crate) fn socket(&self) -> &Socket {
        self.socket.get_ref()
    }

    pub(crate) fn socket_mut(&mut self) -> &mut Socket {
        self.socket.get_mut()
    }

    /// Waits until there is something to read, or the end; `false` if that takes longer.
    pub(crate) fn wait_readable(&mut self, limit: Duration) -> io::Result<bool> {
        let end = Instant::now().checked_add(limit);
        loop {
            // Whatever is wrong, the next read tells it.
            let Ok(state) = self.connection.process_new_packets() else {
                return Ok(true);
            };
            if state.plaintext_bytes_to_read() > 0 || state.peer_has_closed() {
                return Ok(true);
            }
            let left = end.map_or(limit, |end| end.saturating_duration_since(Instant::now()));
            if self.socket.buffer().is_empty() && !wait_readable(self.socket.get_ref(), left)? {
                return Ok(false);
            }
            if !matches!(self.read_records(), Ok(1..)) {
                return Ok(true);
            }
        }
    }

    /// Takes encrypted bytes from the socket; 0 at the end of the connection.
    fn read_records(&mut self) -> io::Result<usize> {
        loop {
            match self.connection.read_tls(&mut self.socket) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    /// Decrypts what was taken. The other side is told what is wrong with it.
    fn decrypt(&mut self) -> Result<(), rustls::Error> {
        let done = self.connection.process_new_packets().map(|_| ());
        if done.is_err() {
            // It may be gone.
            let _ = self.flush_records();
        }
        done
    }

    /// Writes nothing from now on, not even that the end has come.
    pub(crate) fn silence(&mut self) {
        self.is_silenced = true;
    }

    /// Writes all that is encrypted.
    fn flush_records(&mut self) -> io::Result<()> {
        if self.is_silenced {
            return Err(ErrorKind::BrokenPipe.into());
        }
        let written = self.write_records();
        self.is_silenced = written.is_err();
        written
    }

    fn write_records(&mut self) -> io::Result<()> {
        while self.connection.wants_write() {
            match self.connection.write_tls(self.socket.get_mut()) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

impl Read for Secured {
    /// An end that the other side has not announced is an error of kind `UnexpectedEof`.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            self.decrypt()
                .map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
            match self.connection.reader().read(buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                other => return other,
            }
            self.read_records()?;
        }
    }
}

impl Write for Secured {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.flush_records()?;
        let taken = self.connection.writer().write(bytes)?;
        self.flush_records()?;
        Ok(taken)
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.flush_records()?;
        let taken = self.connection.writer().write_vectored(parts)?;
        self.flush_records()?;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.flush_records()
    }
}

impl Drop for Secured {
    /// Announces the end, if the other side still takes anything and has got all there was.
    fn drop(&mut self) {
        let end = Instant::now().checked_add(FAREWELL);
        if self.socket.get_mut().set_deadline(end).is_ok() {
            self.connection.send_close_notify();
            let _ = self.flush_records();
        }
    }
}
