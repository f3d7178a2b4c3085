// SPDX-License-Identifier: Apache-2.0
//! The thread of the target that has pages brought that the guest waits for, called
//! `migration faults`. It owns the connection on which it asks, and shares [`Following`]. If the
//! connection breaks, it goes on with what needs no source, and asks again for the rest when it is
//! given another connection.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use brume_migration::{Channel, PagesIn, Received};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::status::Progress;
use crate::memory::Following;
use crate::page_set::PAGE_SIZE;

/// How often it is looked for another connection, in milliseconds.
const LOOK_MS: i32 = 50;

/// Gives the thread a connection. Clones are for the same thread.
#[derive(Clone, Default)]
pub(super) struct Handset(Arc<Mutex<Option<Channel>>>);

impl Handset {
    pub(super) fn give(&self, channel: Channel) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(channel);
    }

    fn take(&self) -> Option<Channel> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Starts the thread, which ends when all memory is there.
///
/// # Errors
///
/// The host gives no thread.
pub(super) fn start(
    following: Arc<Following>,
    handset: Handset,
    progress: Progress,
) -> io::Result<()> {
    let mut asker = Asker {
        following,
        handset,
        progress,
        channel: None,
        asked: BTreeSet::new(),
    };
    let ask = move || {
        if let Err(error) = asker.run() {
            tracing::error!("the guest's memory cannot be brought any more: {error}");
        }
    };
    thread::Builder::new()
        .name("migration faults".into())
        .spawn(ask)
        .map(drop)
}

/// Puts pages that have come in their places.
///
/// # Errors
///
/// The memory has no such pages.
pub(super) fn give(
    following: &Following,
    pages: PagesIn<'_>,
    progress: &Progress,
) -> io::Result<()> {
    for (run, bytes) in pages.runs() {
        let end = run.first.saturating_add(u64::from(run.pages));
        let given = following.give(run.first..end, bytes)?;
        progress.update(|status| match bytes {
            Some(_) => {
                status.pages += given;
                status.bytes += given * PAGE_SIZE;
            }
            None => status.zero_pages = status.zero_pages.saturating_add(given),
        });
    }
    let left = following.left();
    progress.update(|status| status.remaining_pages = left);
    Ok(())
}

struct Asker {
    following: Arc<Following>,
    handset: Handset,
    progress: Progress,
    channel: Option<Channel>,
    /// Pages that the guest waits for.
    asked: BTreeSet<u64>,
}

impl Asker {
    fn run(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 2];
        let mut epoll = self.watch()?;
        while !self.following.is_complete() {
            if let Some(channel) = self.handset.take() {
                self.channel = Some(channel);
                let waited: Vec<u64> = self.asked.iter().copied().collect();
                waited.into_iter().for_each(|page| self.ask(page));
                epoll = self.watch()?;
            }
            match epoll.wait(LOOK_MS, &mut events) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
            while let Some(page) = self.following.wanted()? {
                self.progress.update(|status| status.faults += 1);
                self.asked.insert(page);
                self.ask(page);
            }
            let had = self.channel.is_some();
            self.hear()?;
            if had && self.channel.is_none() {
                epoll = self.watch()?;
            }
        }
        Ok(())
    }

    /// What to wait for.
    fn watch(&self) -> io::Result<Epoll> {
        let epoll = Epoll::new()?;
        let add = |fd| {
            let event = EpollEvent::new(EventSet::IN, 0);
            epoll.ctl(ControlOperation::Add, fd, event)
        };
        add(self.following.as_raw_fd())?;
        if let Some(channel) = &self.channel {
            add(channel.link().as_raw_fd())?;
        }
        Ok(epoll)
    }

    fn ask(&mut self, page: u64) {
        if let Some(channel) = &mut self.channel
            && channel.send_need(page, 1).is_err()
        {
            // The guest waits until there is another.
            self.channel = None;
        }
    }

    /// Takes what has come.
    fn hear(&mut self) -> io::Result<()> {
        while let Some(channel) = &mut self.channel
            && channel.wait(std::time::Duration::ZERO).unwrap_or(true)
        {
            match channel.receive() {
                Ok(Received::Pages(pages)) => {
                    for (run, _) in pages.runs() {
                        self.asked.remove(&run.first);
                    }
                    give(&self.following, pages, &self.progress)?;
                }
                _ => self.channel = None,
            }
        }
        Ok(())
    }
}
