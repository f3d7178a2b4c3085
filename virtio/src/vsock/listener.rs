// SPDX-License-Identifier: Apache-2.0
//! The socket that programs on the host connect to, and what they say first.
//!
//! A client writes `CONNECT <port>\n` and reads `OK <host port>\n` once the guest has accepted;
//! if it does not, the connection is closed.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::packet::PORT_ANY;
use super::socket;

/// The longest first line, in bytes, with its end.
const MAX_LINE: usize = 32;

/// A listening socket whose file goes with it.
#[derive(Debug)]
pub(super) struct Listener {
    socket: UnixListener,
    path: PathBuf,
    /// Device and number of the file, to remove no other.
    file: Option<(u64, u64)>,
    /// Whether the file stays.
    stays: Arc<AtomicBool>,
}

impl Listener {
    /// Listens at `path`, where nothing may be yet.
    pub(super) fn bind(path: &Path) -> io::Result<Self> {
        let socket = UnixListener::bind(path)?;
        let listener = Self {
            socket,
            path: path.into(),
            file: file_at(path),
            stays: Arc::default(),
        };
        listener.socket.set_nonblocking(true)?;
        Ok(listener)
    }

    /// Set for the file to stay when this is dropped.
    pub(super) fn stays(&self) -> Arc<AtomicBool> {
        self.stays.clone()
    }

    pub(super) fn socket(&self) -> &UnixListener {
        &self.socket
    }

    /// Where guests' connections to the host's `port` are taken.
    pub(super) fn path_of_port(&self, port: u32) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        path.into()
    }

    /// The next client, if there is one.
    pub(super) fn accept(&self) -> io::Result<UnixStream> {
        let (stream, _) = self.socket.accept()?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let stays = self.stays.load(Ordering::Relaxed);
        if !stays && self.file.is_some() && self.file == file_at(&self.path) {
            // If it cannot be removed, nobody is left to be told.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn file_at(path: &Path) -> Option<(u64, u64)> {
    let file = fs::symlink_metadata(path).ok()?;
    Some((file.dev(), file.ino()))
}

/// What a client has said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Greeting {
    /// Not a whole line yet.
    Incomplete,
    /// It wants to be connected to this port of the guest.
    Connect(u32),
    /// It has gone, or says something else.
    Bad,
}

/// Reads a client's first line, and nothing behind it.
pub(super) fn greeting(client: &UnixStream) -> Greeting {
    let mut line = [0; MAX_LINE];
    let count = match socket::peek(client, &mut line) {
        Ok(0) => return Greeting::Bad,
        Ok(count) => count,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Greeting::Incomplete,
        Err(_) => return Greeting::Bad,
    };
    let seen = line.get(..count).unwrap_or_default();
    let Some(end) = seen.iter().position(|&byte| byte == b'\n') else {
        return if count < MAX_LINE {
            Greeting::Incomplete
        } else {
            Greeting::Bad
        };
    };
    let port = seen.get(..end).and_then(parse);
    // Take the line out of the socket; what follows is for the guest.
    let place = line.get_mut(..=end).unwrap_or_default();
    match (port, io::Read::read_exact(&mut &*client, place)) {
        (Some(port), Ok(())) => Greeting::Connect(port),
        _ => Greeting::Bad,
    }
}

/// The port in `CONNECT <port>`; the word may be in either case, as it may for Firecracker.
fn parse(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_whitespace();
    let word = words.next()?;
    let port = words.next()?.parse().ok()?;
    (word.eq_ignore_ascii_case("connect") && words.next().is_none() && port != PORT_ANY)
        .then_some(port)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn after(text: &[u8]) -> (Greeting, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.write_all(text).unwrap();
        (greeting(&ours), ours)
    }

    #[test]
    fn only_a_connect_line_is_understood() {
        for (text, expected) in [
            ("CONNECT 52\n", Greeting::Connect(52)),
            ("connect 0\r\n", Greeting::Connect(0)),
            ("CONNECT 4294967294\n", Greeting::Connect(u32::MAX - 1)),
            ("CONNECT 4294967295\n", Greeting::Bad),
            ("CONNECT 4294967296\n", Greeting::Bad),
            ("CONNECT -1\n", Greeting::Bad),
            ("CONNECT\n", Greeting::Bad),
            ("CONNECT 1 2\n", Greeting::Bad),
            ("GET / HTTP/1.1\n", Greeting::Bad),
            ("\n", Greeting::Bad),
            ("CONNECT 5", Greeting::Incomplete),
            ("CONNECT 0000000000000000000000000052\n", Greeting::Bad),
        ] {
            assert_eq!(after(text.as_bytes()).0, expected, "{text:?}");
        }
        assert_eq!(after(b"\xff\xfe\n").0, Greeting::Bad);
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert_eq!(greeting(&ours), Greeting::Bad);
    }

    #[test]
    fn what_follows_the_line_stays_in_the_socket() {
        let (greeting, mut ours) = after(b"CONNECT 7\nhello");
        assert_eq!(greeting, Greeting::Connect(7));
        let mut rest = [0; 5];
        ours.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"hello");
    }

    #[test]
    fn the_file_goes_with_the_listener_and_nothing_else_does() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("v.sock");
        let listener = Listener::bind(&path).unwrap();
        assert_eq!(listener.path_of_port(9), folder.path().join("v.sock_9"));
        let error = Listener::bind(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert!(path.exists(), "a second one must not take it away");
        drop(listener);
        assert!(!path.exists());

        let listener = Listener::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "of somebody else").unwrap();
        drop(listener);
        assert!(path.exists());
    }
}
