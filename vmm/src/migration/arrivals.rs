// SPDX-License-Identifier: Apache-2.0
//! Memory that arrives over several connections. Pages of a pass must not overtake those of the
//! pass before it, so all connections wait for each other at its end.
//!
//! Each connection but the first has a thread, called `migration N`. They share the memory, which
//! nobody else uses yet, and the [`Rendezvous`]; its lock is held for a few instructions.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use brume_api::with_causes;
use brume_migration::{Channel, ChannelError, Closer, Message, PagesIn, Received};

use super::status::Progress;
use crate::memory::Filling;
use crate::page_set::PAGE_SIZE;

/// Where connections wait for each other.
pub(super) struct Rendezvous {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// The last pass that has ended, by connection.
    ended: Vec<u32>,
    /// Why one of them has none any more.
    broken: Option<String>,
}

impl Rendezvous {
    /// For so many connections.
    pub(super) fn new(connections: usize) -> Self {
        Self {
            state: Mutex::new(State {
                ended: vec![0; connections],
                broken: None,
            }),
            changed: Condvar::new(),
        }
    }

    /// Waits until all connections are at the end of `pass`, as this one is; why they never will.
    pub(super) fn wait(&self, connection: usize, pass: u32) -> Result<(), String> {
        let mut state = self.lock();
        let mine = state.ended.get_mut(connection);
        if mine.as_ref().is_none_or(|ended| **ended + 1 != pass) {
            return Err("the source counts passes wrong".into());
        }
        if let Some(mine) = mine {
            *mine = pass;
        }
        self.changed.notify_all();
        let state = self.changed.wait_while(state, |state| {
            state.broken.is_none() && state.ended.iter().any(|&ended| ended < pass)
        });
        let state = state.unwrap_or_else(PoisonError::into_inner);
        match &state.broken {
            Some(why) => Err(why.clone()),
            None => Ok(()),
        }
    }

    /// A connection is gone: nobody has to wait any more.
    pub(super) fn break_up(&self, why: String) {
        self.lock().broken.get_or_insert(why);
        self.changed.notify_all();
    }

    /// Why it was broken up.
    pub(super) fn broken(&self) -> Option<String> {
        self.lock().broken.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Puts pages in their places and tells of them.
pub(super) fn take(
    filling: &Filling,
    pages: PagesIn<'_>,
    progress: &Progress,
) -> Result<(), String> {
    let (data, zeros) = put(filling, pages)
        .map_err(|error| format!("the source has sent pages that cannot be taken: {error}"))?;
    progress.update(|status| {
        status.pages = status.pages.saturating_add(data);
        status.zero_pages = status.zero_pages.saturating_add(zeros);
        status.bytes = status.bytes.saturating_add(data * PAGE_SIZE);
    });
    Ok(())
}

/// Counts pages of zeros that the source has not sent, which are anything it says.
pub(super) fn count_zeros(zeros: u64, progress: &Progress) {
    progress.update(|status| status.zero_pages = status.zero_pages.saturating_add(zeros));
}

/// How many had bytes, and how many were zeros.
fn put(filling: &Filling, pages: PagesIn<'_>) -> io::Result<(u64, u64)> {
    let mut counts = (0, 0);
    for (run, bytes) in pages.runs() {
        let range = run.first..run.first + u64::from(run.pages);
        match bytes {
            Some(bytes) => {
                filling.write(range, bytes)?;
                counts.0 += u64::from(run.pages);
            }
            None => {
                filling.zero(range)?;
                counts.1 += u64::from(run.pages);
            }
        }
    }
    Ok(counts)
}

/// The connections but the first one.
pub(super) struct Arrivals {
    threads: Vec<JoinHandle<()>>,
    closers: Vec<Closer>,
}

impl Arrivals {
    /// Serves `channels`.
    ///
    /// # Errors
    ///
    /// The host gives no thread.
    pub(super) fn start(
        channels: Vec<Channel>,
        filling: &Arc<Filling>,
        rendezvous: &Arc<Rendezvous>,
        progress: &Progress,
    ) -> Result<Self, ChannelError> {
        let mut all = Self {
            threads: Vec::new(),
            closers: Vec::new(),
        };
        for (index, mut channel) in (1..).zip(channels) {
            all.closers.push(channel.closer()?);
            let (filling, rendezvous) = (filling.clone(), rendezvous.clone());
            let progress = progress.clone();
            let serve = move || {
                if let Err(why) = serve(&mut channel, index, &filling, &rendezvous, &progress) {
                    rendezvous.break_up(why);
                }
            };
            let thread = thread::Builder::new().name(format!("migration {index}"));
            let thread = thread.spawn(serve).map_err(ChannelError::Lost)?;
            all.threads.push(thread);
        }
        Ok(all)
    }
}

impl Drop for Arrivals {
    fn drop(&mut self) {
        self.closers.iter().for_each(Closer::close);
        for thread in self.threads.drain(..) {
            // A panic has been reported by the thread itself.
            let _ = thread.join();
        }
    }
}

fn serve(
    channel: &mut Channel,
    index: usize,
    filling: &Filling,
    rendezvous: &Rendezvous,
    progress: &Progress,
) -> Result<(), String> {
    loop {
        match channel.receive() {
            Ok(Received::Pages(pages)) => take(filling, pages, progress)?,
            Ok(Received::Message(Message::PassEnded { pass, zeros, .. })) => {
                count_zeros(zeros, progress);
                rendezvous.wait(index, pass)?;
            }
            Ok(Received::Message(Message::KeepAlive)) => {}
            Ok(_) => return Err("the source has sent something else than pages".into()),
            // How the move ends is said on the first connection.
            Err(ChannelError::Closed) => return Ok(()),
            Err(error) => return Err(with_causes(&error)),
        }
    }
}
