// SPDX-License-Identifier: Apache-2.0
//! What a socket can carry: memory that was written, copied to memory that is new.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Instant;

/// Bytes in each write, and the most in each read.
const CHUNK: usize = 1 << 20;

/// How much is there to be copied, at most; then it begins again. A large machine is there beside it.
const MOST: usize = 1 << 30;

/// Bytes per second for so many bytes through a unix socket, or through TCP on this host.
///
/// # Errors
///
/// There is no socket.
pub(crate) fn rate(bytes: usize, tcp: bool) -> io::Result<f64> {
    if tcp {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let near = TcpStream::connect(listener.local_addr()?)?;
        copy(bytes, near, listener.accept()?.0)
    } else {
        let (near, far) = UnixStream::pair()?;
        copy(bytes, near, far)
    }
}

fn copy(bytes: usize, mut near: impl Write + Send, mut far: impl Read) -> io::Result<f64> {
    // Written, so that it is there; zeroes are no less to carry than anything else.
    let from = vec![1_u8; bytes.min(MOST)];
    // Zeroes that are asked for are mapped, and there only when they are written.
    let mut to = vec![0_u8; bytes];
    thread::scope(|scope| {
        let begun = Instant::now();
        let from = &from;
        let sender = scope.spawn(move || {
            let mut left = bytes;
            let mut chunks = from.chunks(CHUNK).cycle();
            while let Some(chunk) = chunks.next().filter(|_| left > 0) {
                let chunk = chunk.get(..left).unwrap_or(chunk);
                near.write_all(chunk)?;
                left -= chunk.len();
            }
            Ok(())
        });
        for chunk in to.chunks_mut(CHUNK) {
            far.read_exact(chunk)?;
        }
        let took = begun.elapsed();
        let sent = sender.join();
        sent.unwrap_or_else(|_| Err(io::Error::other("the sender panicked")))?;
        Ok(bytes as f64 / took.as_secs_f64())
    })
}
