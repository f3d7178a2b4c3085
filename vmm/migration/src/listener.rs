// SPDX-License-Identifier: Apache-2.0
//! Where a target waits for connections.

use std::fs;
use std::io;
use std::net::{Shutdown, TcpListener};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::address::Address;
use crate::host;
use crate::link::{Link, LinkError};
use crate::socket::Stream;

/// How long to wait for the host to have descriptors and memory again.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(100);
/// How often it is told that the host has none.
const TELL_AGAIN: Duration = Duration::from_secs(60);

/// Where connections arrive.
#[derive(Debug)]
pub struct Listener {
    kind: Kind,
    address: Address,
    stop: Stopper,
    /// Its other end is shut down by a [`Stopper`].
    stopped: UnixStream,
    /// When it was told last that the host had no room for a connection.
    told: Mutex<Option<Instant>>,
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
            told: Mutex::new(None),
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

    /// Whether no other connection can come.
    pub fn is_spent(&self) -> bool {
        matches!(&self.kind, Kind::Fd { is_taken, .. } if is_taken.load(Ordering::Acquire))
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
            // One that does not take its options is of no use, and says nothing of the next.
            Ok((stream, peer)) => Ok(Link::of(stream, peer).ok()),
            Err(error) => match trouble_of(&error) {
                Trouble::Visitor => Ok(None),
                Trouble::Shortage => self.wait_for_room(&error),
                Trouble::Listener => Err(error.into()),
            },
        }
    }

    /// Waits a little, for the host to have again what it lacks: who came is still there, so the next
    /// look for a connection would not wait.
    fn wait_for_room(&self, error: &io::Error) -> Result<Option<Link>, LinkError> {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.is_none_or(|told| told.elapsed() >= TELL_AGAIN) {
            *told = Some(Instant::now());
            tracing::warn!(
                "a connection to {} cannot be taken yet: {error}; it is tried again",
                self.address
            );
        }
        drop(told);
        match host::wait_readable(&[self.stopped.as_raw_fd()], SHORTAGE_PAUSE)? {
            None => Ok(None),
            Some(_) => Err(LinkError::Stopped),
        }
    }
}

/// What an error of accept(2) is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    /// Whoever came, who has gone: the next one may do.
    Visitor,
    /// The host or this process, which has no room for now.
    Shortage,
    /// The listener: nobody will ever come.
    Listener,
}

fn trouble_of(error: &io::Error) -> Trouble {
    match error.raw_os_error().unwrap_or(0) {
        // Errors of the network are those of the new connection: accept(2), "Error handling".
        libc::EAGAIN
        | libc::EINTR
        | libc::ECONNABORTED
        | libc::ECONNRESET
        | libc::EPROTO
        | libc::ENOPROTOOPT
        | libc::EOPNOTSUPP
        | libc::ENETDOWN
        | libc::ENETUNREACH
        | libc::EHOSTDOWN
        | libc::EHOSTUNREACH
        | libc::ENONET
        | libc::ETIMEDOUT => Trouble::Visitor,
        libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM => Trouble::Shortage,
        _ => Trouble::Listener,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_trouble_with_the_listener_ends_it() {
        let trouble = |number| trouble_of(&io::Error::from_raw_os_error(number));
        for number in [
            libc::EWOULDBLOCK,
            libc::ECONNABORTED,
            libc::EINTR,
            libc::EPROTO,
        ] {
            assert_eq!(trouble(number), Trouble::Visitor, "{number}");
        }
        for number in [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::ENOBUFS] {
            assert_eq!(trouble(number), Trouble::Shortage, "{number}");
        }
        for number in [libc::EBADF, libc::EINVAL, libc::ENOTSOCK] {
            assert_eq!(trouble(number), Trouble::Listener, "{number}");
        }
    }

    #[test]
    fn a_shortage_is_waited_out_and_a_stop_ends_the_wait() {
        let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let error = io::Error::from_raw_os_error(libc::EMFILE);
        let begun = Instant::now();
        assert!(listener.wait_for_room(&error).unwrap().is_none());
        assert!(begun.elapsed() >= SHORTAGE_PAUSE);
        let told = *listener.told.lock().unwrap();
        assert!(listener.wait_for_room(&error).unwrap().is_none());
        // It is not told again so soon.
        assert_eq!(*listener.told.lock().unwrap(), told);
        listener.stopper().stop();
        let stopped = listener.wait_for_room(&error);
        assert!(matches!(stopped, Err(LinkError::Stopped)));
    }
}
