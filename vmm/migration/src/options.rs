// SPDX-License-Identifier: Apache-2.0
//! How sockets are set up and torn down.

use std::io;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use socket2::{Domain, SockAddr, SockRef, Socket, TcpKeepalive, Type};

/// After how long without a word the other host is asked whether it is there.
const QUIET: Duration = Duration::from_secs(15);
/// How often it is asked.
const ASK_EVERY: Duration = Duration::from_secs(5);
/// After how long without an answer the connection is lost. Shorter outages are sat out.
const SILENT: Duration = Duration::from_secs(60);

/// Connects within `limit`: a listener that does not accept lets others wait.
pub(crate) fn connect_unix(path: &Path, limit: Duration) -> io::Result<UnixStream> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_write_timeout(Some(limit.max(Duration::from_millis(1))))?;
    match socket.connect(&SockAddr::unix(path)?) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            return Err(io::ErrorKind::TimedOut.into());
        }
        connected => connected?,
    }
    socket.set_write_timeout(None)?;
    Ok(OwnedFd::from(socket).into())
}

/// Sets what every TCP connection is to have.
pub(crate) fn set_tcp(stream: &TcpStream) -> io::Result<()> {
    // Messages are waited for; memory goes in large pieces anyway.
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    let asked = TcpKeepalive::new()
        .with_time(QUIET)
        .with_interval(ASK_EVERY);
    socket.set_tcp_keepalive(&asked)?;
    socket.set_tcp_user_timeout(Some(SILENT))
}
