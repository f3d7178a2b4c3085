// SPDX-License-Identifier: Apache-2.0
//! A monitor with its control API, and one connection to that.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::program::{CLOUD_HYPERVISOR, Programs, Running};

/// Until the socket is there.
const START: Duration = Duration::from_secs(10);
/// Until a request is answered: a snapshot of gigabytes takes its time.
const ANSWER: Duration = Duration::from_secs(300);

/// The monitor and the connection; both end with it.
pub(crate) struct Session {
    /// The monitor.
    pub(crate) monitor: Running,
    /// When its process was started.
    pub(crate) begun: Instant,
    /// From then until the connection.
    pub(crate) ready: Duration,
    stream: UnixStream,
    socket: PathBuf,
}

impl Session {
    /// Starts `monitor` with a socket called `name`, and waits for it.
    ///
    /// # Errors
    ///
    /// It does not start.
    pub(crate) fn start(programs: &Programs, monitor: &str, name: &str) -> io::Result<Self> {
        let socket = programs.folder().join(name);
        // One that was killed leaves its socket behind.
        let _ = fs::remove_file(&socket);
        let command = programs.api_command(monitor, &socket)?;
        let begun = Instant::now();
        let monitor = match monitor {
            CLOUD_HYPERVISOR => Running::spawn_on_terminal(command)?,
            _ => Running::spawn_typed(command)?,
        };
        let stream = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(error) if begun.elapsed() > START => return Err(error),
                Err(_) => std::hint::spin_loop(),
            }
        };
        let ready = begun.elapsed();
        stream.set_read_timeout(Some(ANSWER))?;
        Ok(Self {
            monitor,
            begun,
            ready,
            stream,
            socket,
        })
    }

    /// Sends a request and waits for the answer; its body.
    ///
    /// # Errors
    ///
    /// There is no answer, or the request is refused: then the kind is
    /// [`io::ErrorKind::InvalidInput`].
    pub(crate) fn send(&mut self, request: (&str, &str, String)) -> io::Result<String> {
        let (method, path, _) = request;
        let name = format!("{method} {path}");
        self.begin(request)?;
        self.answer(&name)
    }

    /// Sends a request that is answered when what it asks for is done; then comes
    /// [`Session::answer`].
    ///
    /// # Errors
    ///
    /// It cannot be sent.
    pub(crate) fn begin(&mut self, (method, path, body): (&str, &str, String)) -> io::Result<()> {
        let len = body.len();
        let text = format!("{method} {path} HTTP/1.1\r\nContent-Length: {len}\r\n\r\n{body}");
        self.stream.write_all(text.as_bytes())
    }

    /// Waits for the answer to a request called `name`; its body.
    ///
    /// # Errors
    ///
    /// As [`Session::send`].
    pub(crate) fn answer(&mut self, name: &str) -> io::Result<String> {
        let mut answer = Vec::new();
        let mut whole = None;
        let mut chunk = [0; 64 * 1024];
        while whole.is_none_or(|whole| answer.len() < whole) {
            let count = self.stream.read(&mut chunk)?;
            if count == 0 {
                return Err(io::Error::other(format!("{name}: no answer")));
            }
            answer.extend_from_slice(&chunk[..count]);
            whole = whole.or_else(|| length(&answer));
        }
        let answer = String::from_utf8_lossy(&answer);
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
        if head.starts_with("HTTP/1.1 20") {
            return Ok(body.to_owned());
        }
        let text = format!("{name}: {head}\n{body}");
        Err(io::Error::new(io::ErrorKind::InvalidInput, text))
    }
}

/// What a request gave, or nothing if it was refused.
///
/// # Errors
///
/// There was no answer.
pub(crate) fn unless_refused<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(given) => Ok(Some(given)),
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(None),
        Err(error) => Err(error),
    }
}

/// How long the whole answer is, once its head is there.
fn length(answer: &[u8]) -> Option<usize> {
    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&answer[..end]);
    let body = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        let is_length = name.eq_ignore_ascii_case("content-length");
        is_length.then(|| value.trim().parse::<usize>().ok())?
    });
    Some(end + 4 + body.unwrap_or(0))
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.socket);
    }
}
