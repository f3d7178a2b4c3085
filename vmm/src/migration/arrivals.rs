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
    /// What was wrong with one of them.
    broken: Option<String>,
    /// Whether one of them has come to its end, or is not served any more: no other pass can end.
    is_over: bool,
}

impl Rendezvous {
    /// For so many connections.
    pub(super) fn new(connections: usize) -> Self {
        Self {
            state: Mutex::new(State {
                ended: vec![0; connections],
                broken: None,
                is_over: false,
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
            let is_over = state.is_over || state.broken.is_some();
            !is_over && state.ended.iter().any(|&ended| ended < pass)
        });
        let state = state.unwrap_or_else(PoisonError::into_inner);
        match &state.broken {
            Some(why) => Err(why.clone()),
            None if state.ended.iter().all(|&ended| ended >= pass) => Ok(()),
            None => Err("a connection has ended before a pass over the memory was".into()),
        }
    }

    /// A connection is at its end, or nobody serves it any more: nobody has to wait for it.
    fn end(&self) {
        self.lock().is_over = true;
        self.changed.notify_all();
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
    rendezvous: Arc<Rendezvous>,
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
            rendezvous: rendezvous.clone(),
        };
        for (index, mut channel) in (1..).zip(channels) {
            all.closers.push(channel.closer()?);
            let (filling, rendezvous) = (filling.clone(), rendezvous.clone());
            let progress = progress.clone();
            let serve = move || match serve(&mut channel, index, &filling, &rendezvous, &progress) {
                Ok(()) => rendezvous.end(),
                Err(why) => rendezvous.break_up(why),
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
        // Who waits for the end of a pass reads nothing, and does not see its connection close.
        self.rendezvous.end();
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

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use brume_api::config::MachineConfig;
    use brume_migration::Link;

    use super::*;

    /// The second connection of two, in the target's thread, and its other end.
    fn arrivals() -> (Arrivals, Channel, Arc<Rendezvous>) {
        let (here, there) = UnixStream::pair().unwrap();
        let channel = |stream| Channel::new(Link::from_unix(stream).unwrap());
        let machine = MachineConfig {
            mem_size_mib: 4,
            ..MachineConfig::default()
        };
        let memory = crate::memory::make(&machine).unwrap();
        let filling = Arc::new(Filling::begin(Arc::new(memory), false));
        let rendezvous = Arc::new(Rendezvous::new(2));
        let channels = vec![channel(here)];
        let arrivals = Arrivals::start(channels, &filling, &rendezvous, &Progress::default());
        (arrivals.unwrap(), channel(there), rendezvous)
    }

    const ENDED: Message = Message::PassEnded {
        pass: 1,
        pages: 0,
        zeros: 0,
    };

    #[test]
    fn a_connection_that_ends_before_a_pass_is_not_waited_for() {
        let (_arrivals, other, rendezvous) = arrivals();
        let waiting = thread::spawn(move || rendezvous.wait(0, 1));
        drop(other);
        assert!(waiting.join().unwrap().unwrap_err().contains("has ended"));
    }

    #[test]
    fn a_connection_that_ends_after_a_pass_has_not_broken_it() {
        let (arrivals, mut other, rendezvous) = arrivals();
        other.send(&ENDED).unwrap();
        drop(other);
        rendezvous.wait(0, 1).unwrap();
        while !arrivals.threads[0].is_finished() {
            thread::yield_now();
        }
        assert_eq!(rendezvous.broken(), None);
    }

    #[test]
    fn a_connection_that_waits_for_others_is_not_waited_for() {
        let (arrivals, mut other, rendezvous) = arrivals();
        other.send(&ENDED).unwrap();
        while rendezvous.lock().ended != [0, 1] {
            thread::yield_now();
        }
        drop(arrivals);
        assert_eq!(
            rendezvous.broken().as_deref(),
            Some("a connection has ended before a pass over the memory was")
        );
    }
}
