// SPDX-License-Identifier: Apache-2.0
//! The program that serves the guest's memory, as far as it can be trusted: it may be slow, silent
//! or dead, and nobody but the guest may wait for it without a limit.
//!
//! Two threads are started here. `uffd_guard` lives as long as a machine is being made and lets go
//! of the memory if that hangs; `uffd_fetch` touches pages for somebody who waits with a limit, and
//! is left alone with its fault if they do not come. Neither takes a lock.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;

use super::MachineMemory;
use super::peer;
use super::populate::Pages;
use super::uffd::{Uffd, UffdError};
use crate::event::{Event, EventSender};
use crate::page_set::{PageSet, Region};

/// How long a handler may leave a fault that somebody but the guest waits for.
const ANSWER_LIMIT: Duration = if cfg!(test) {
    Duration::from_secs(3)
} else {
    Duration::from_secs(10)
};
/// How often it is looked whether the handler is still there.
const TICK: Duration = Duration::from_millis(50);

/// The program at the other end of the socket.
pub(crate) struct Handler {
    /// Ours, so that the registration outlives the program.
    uffd: Uffd,
    /// Kept open: the program sees by it that we are there, and we that it is.
    socket: UnixStream,
    /// The process that has listened at the socket, if it can be seen from here.
    process: Option<OwnedFd>,
    path: PathBuf,
    regions: Vec<Region>,
}

impl Handler {
    pub(super) fn new(uffd: Uffd, socket: UnixStream, path: &Path, regions: Vec<Region>) -> Self {
        Self {
            uffd,
            process: peer::process(&socket),
            socket,
            path: path.into(),
            regions,
        }
    }

    /// Whether the program has ended. One that has closed the socket may serve on.
    fn is_gone(&self) -> bool {
        peer::has_hung_up(&self.socket) && self.process.as_ref().is_none_or(peer::has_ended)
    }

    /// Waits until the sending end is dropped; each message is a sign of life.
    ///
    /// # Errors
    ///
    /// There was none for too long.
    fn wait(&self, signs: &Receiver<()>) -> Result<(), UffdError> {
        let mut last = Instant::now();
        loop {
            match signs.recv_timeout(TICK) {
                Ok(()) => last = Instant::now(),
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Err(RecvTimeoutError::Timeout) if self.is_gone() => {
                    return Err(UffdError::Gone(self.path.clone()));
                }
                Err(RecvTimeoutError::Timeout) if last.elapsed() > ANSWER_LIMIT => {
                    return Err(UffdError::Silent {
                        path: self.path.clone(),
                        limit: ANSWER_LIMIT,
                    });
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// Does `work` on a machine that is not started yet. If it waits for a page in vain, the whole
    /// memory is let go of, so that the work comes to an end with what is no machine.
    ///
    /// # Errors
    ///
    /// It did, or the work failed.
    pub(crate) fn guard<T, E: From<UffdError>>(
        self: &Arc<Self>,
        work: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        let (working, signs) = channel();
        let handler = self.clone();
        let watch = move || {
            let result = handler.wait(&signs);
            if result.is_err() {
                handler.let_go();
            }
            result
        };
        let watch = thread::Builder::new()
            .name("uffd_guard".into())
            .spawn(watch)
            .map_err(UffdError::Thread)?;
        let result = work();
        drop(working);
        match watch.join() {
            Ok(Err(error)) => Err(error.into()),
            // A panic was told by the thread.
            Ok(Ok(())) | Err(_) => result,
        }
    }

    fn let_go(&self) {
        for region in &self.regions {
            if let Err(error) = self.uffd.unregister(region) {
                tracing::error!("the guest's memory cannot be let go of: {error}");
            }
        }
    }

    /// What watches the program from an event loop.
    pub(crate) fn watch(self: &Arc<Self>, sender: EventSender) -> Box<dyn MutEventSubscriber> {
        Box::new(Watch {
            handler: self.clone(),
            sender,
        })
    }
}

impl MachineMemory {
    /// Sees to it that `pages` are there before somebody who must not wait for ever touches them.
    /// Only a handler can let it wait, so for other memory there is nothing to do.
    ///
    /// # Errors
    ///
    /// The handler does not bring them.
    pub(crate) fn fetch(&self, pages: &PageSet) -> Result<(), UffdError> {
        let Some(handler) = &self.handler else {
            return Ok(());
        };
        let (sender, signs) = channel();
        let (brought, result) = channel();
        let (touched, pages) = (Pages::of(self), pages.clone());
        let touch = move || {
            let sign = || sender.send(()).is_ok();
            let _ = brought.send(touched.read_in(&pages, sign));
        };
        thread::Builder::new()
            .name("uffd_fetch".into())
            .spawn(touch)
            .map_err(UffdError::Thread)?;
        handler.wait(&signs)?;
        let ended = || Err(io::Error::other("the thread has ended"));
        let result = result.recv().unwrap_or_else(|_| ended());
        result.map_err(UffdError::ReadIn)
    }
}

/// Tells the owner of the machine when the program has ended.
struct Watch {
    handler: Arc<Handler>,
    sender: EventSender,
}

impl MutEventSubscriber for Watch {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let Handler {
            socket, process, ..
        } = &*self.handler;
        // It has nothing more to tell.
        let _ = ops.remove(Events::empty(&Fd(events.fd())));
        match process {
            Some(process) if events.fd() == socket.as_raw_fd() && !peer::has_ended(process) => {
                tracing::info!("the program that serves the guest's memory has hung up");
                // If it cannot be watched, its end is not told.
                let _ = ops.add(Events::new(process, EventSet::IN));
            }
            _ => drop(self.sender.send(Event::MemoryHandlerGone)),
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        // The loop is new and the socket is ours: it is not in it yet. A message would be none of
        // ours to read.
        let _ = ops.add(Events::new(&self.handler.socket, EventSet::HANG_UP));
    }
}

struct Fd(RawFd);

impl AsRawFd for Fd {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}
