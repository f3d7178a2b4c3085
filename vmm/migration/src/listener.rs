// SPDX-License-Identifier: Apache-2.0
//! Where a target waits for connections.

use std::fs;
use std::io;
use std::net::{Shutdown, TcpListener};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::address::Address;
use crate::host;
use crate::link::{Link, LinkError};
use crate::socket::Stream;

/// Where connections arrive.
#[derive(Debug)]
pub struct Listener {
    kind: Kind,
    address: Address,
    stop: Stopper,
    /// Its other end is shut down by a [`Stopper`].
    stopped: UnixStream,
}

/// Ends the wait for connections from another thread.
#[derive(Clone, Debug)]
pub struct Stopper(Arc<UnixStream>);

impl Stopper {
    /// Ends it, for good.
    pub fn stop(&self) {
        // One that has ended already is as it should be.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

#[derive(Debug)]
enum Kind {
    Unix {
        listener: UnixListener,
        path: PathBuf,
        /// Device and inode of the socket: somebody else's is not removed.
        file: Option<(u64, u64)>,
    },
    Tcp(TcpListener),
    Fd {
        fd: RawFd,
        /// It is one connection, which is handed out once.
        is_taken: AtomicBool,
    },
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
                let file = file_of(path);
                Kind::Unix {
                    listener,
                    path: path.clone(),
                    file,
                }
            }
            Address::Tcp { host, port } => {
                let listener = TcpListener::bind((host.as_str(), *port)).map_err(failed)?;
                listener.set_nonblocking(true)?;
                Kind::Tcp(listener)
            }
            Address::Fd(fd) => {
                host::stream_socket(*fd)
                    .map_err(|source| LinkError::NoSocket { fd: *fd, source })?;
                Kind::Fd {
                    fd: *fd,
                    is_taken: AtomicBool::new(false),
                }
            }
        };
        let (stop, stopped) = UnixStream::pair()?;
        Ok(Self {
            kind,
            address: address.clone(),
            stop: Stopper(Arc::new(stop)),
            stopped,
        })
    }

    /// What ends [`Listener::accept`] from another thread.
    pub fn stopper(&self) -> Stopper {
        self.stop.clone()
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

    /// The next connection; `None` if there is none within `limit`. Nothing is read from it, so
    /// somebody who says nothing keeps nobody else waiting.
    ///
    /// # Errors
    ///
    /// The host gives none, or a [`Stopper`] has ended the wait.
    pub fn accept(&self, limit: Duration) -> Result<Option<Link>, LinkError> {
        let stopped = self.stopped.as_raw_fd();
        let ready = match &self.kind {
            Kind::Unix { listener, .. } => {
                host::wait_readable(&[stopped, listener.as_raw_fd()], limit)
            }
            Kind::Tcp(listener) => host::wait_readable(&[stopped, listener.as_raw_fd()], limit),
            Kind::Fd { is_taken, .. } if is_taken.load(Ordering::Acquire) => {
                host::wait_readable(&[stopped], limit)
            }
            Kind::Fd { fd, .. } => host::wait_readable(&[stopped, *fd], limit),
        };
        match ready? {
            None => Ok(None),
            Some(0) => Err(LinkError::Stopped),
            Some(_) => self.take(),
        }
    }

    fn take(&self) -> Result<Option<Link>, LinkError> {
        let accepted = match &self.kind {
            Kind::Unix { listener, path, .. } => listener
                .accept()
                .map(|(stream, _)| (Stream::Unix(stream), format!("unix:{}", path.display()))),
            Kind::Tcp(listener) => listener
                .accept()
                .map(|(stream, peer)| (Stream::Tcp(stream), format!("tcp:{peer}"))),
            Kind::Fd { fd, is_taken } => {
                let link = Link::inherited(*fd)?;
                is_taken.store(true, Ordering::Release);
                return Ok(Some(link));
            }
        };
        match accepted {
            Ok((stream, peer)) => Ok(Some(Link::of(stream, peer)?)),
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
        if let Kind::Unix { path, file, .. } = &self.kind
            && file.is_some()
            && file_of(path) == *file
        {
            // If it cannot be removed, the next who listens does it.
            let _ = fs::remove_file(path);
        }
    }
}

fn file_of(path: &Path) -> Option<(u64, u64)> {
    let found = path.symlink_metadata().ok()?;
    Some((found.dev(), found.ino()))
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
