// SPDX-License-Identifier: Apache-2.0
//! The door of a target. Whoever comes is greeted beside all others, so that one who says nothing
//! keeps nobody waiting.
//!
//! The thread `migration door` takes connections and has a thread `migration hello` for each of
//! those who have not said yet who they are. There are no more than [`MOST`] of these: the one that
//! came first has to go when another comes, for a source needs less time than any number of
//! strangers has. Those who have said it wait for [`Door::next`], under a lock that is held for a
//! few instructions; a source for which there is nothing to wait for hears so instead.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use brume_api::with_causes;
use brume_migration::{Channel, Closer, Hello, Link, LinkError, Listener, Session, Stopper, Tls};

use super::errand::{Errand, Met, Moves};

/// How often the thread looks for those who are greeted no more.
const LOOK: Duration = Duration::from_secs(1);
/// How long somebody may take to say who it is.
const GREETING_LIMIT: Duration = Duration::from_secs(5);
/// The most who are greeted at once, and the most who wait after that.
const MOST: usize = 16;
/// How long a source waits for the end of another's move before it is sent away: one that has just
/// failed may be tried again at once.
const OTHER_LIMIT: Duration = if cfg!(test) {
    Duration::from_secs(3)
} else {
    Duration::from_secs(1)
};
/// The most who wait for that at once. Closing its connection wakes nobody of them.
const MOST_OTHERS: usize = 4;

/// Where connections arrive. When it is dropped nobody is let in any more.
pub(crate) struct Door {
    hall: Arc<Hall>,
    stop: Stopper,
    thread: Option<JoinHandle<()>>,
}

/// Where those who were greeted wait.
#[derive(Default)]
struct Hall {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    met: VecDeque<Met>,
    moves: Moves,
    /// How many wait for the end of another's move.
    others: usize,
    /// Why nobody comes any more.
    closed: Option<String>,
}

/// Somebody who is being greeted.
struct Stranger {
    closer: Closer,
    thread: JoinHandle<()>,
}

impl Door {
    /// Lets in who comes to `listener`, with `tls` only who is let in by it.
    ///
    /// # Errors
    ///
    /// The host gives no thread.
    pub(crate) fn open(listener: Listener, tls: Option<Tls>) -> io::Result<Self> {
        let hall = Arc::new(Hall::default());
        let (stop, inside) = (listener.stopper(), hall.clone());
        let thread = thread::Builder::new()
            .name("migration door".into())
            .spawn(move || {
                let mut strangers = VecDeque::new();
                let Err(error) = let_in(&listener, tls.as_ref(), &inside, &mut strangers);
                inside.lock().closed = Some(with_causes(&error));
                inside.changed.notify_all();
                for stranger in strangers {
                    stranger.closer.close();
                    // A panic has been reported by the thread itself.
                    let _ = stranger.thread.join();
                }
            })?;
        Ok(Self {
            hall,
            stop,
            thread: Some(thread),
        })
    }

    /// The next who begins a move, or has come for the one that is going on; `None` if there is
    /// nobody within `limit`.
    pub(super) fn next(&self, limit: Duration) -> Option<Met> {
        let state = self.hall.lock();
        let nobody = |state: &mut State| state.met.is_empty();
        let waited = self.hall.changed.wait_timeout_while(state, limit, nobody);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let met = state.met.pop_front()?;
        // It may have changed while this one was waiting.
        let errand = state.moves.errand(&met.hello);
        drop(state);
        if errand == Errand::Move {
            return Some(met);
        }
        met.turn_away(errand);
        None
    }

    /// Why nobody comes any more.
    pub(super) fn closed(&self) -> Option<String> {
        self.hall.lock().closed.clone()
    }

    /// A move is going on: from now on no other begins.
    pub(super) fn begin(&self, session: &Session) {
        let mut state = self.hall.lock();
        state.moves.begin(session);
        let met: Vec<_> = state.met.drain(..).collect();
        drop(state);
        // Those who came at the same time have to wait, or go.
        met.into_iter()
            .for_each(|met| self.hall.place(self.hall.lock(), met));
    }

    /// The move that was going on came to nothing.
    pub(super) fn drop_move(&self) {
        self.hall.lock().moves.end();
        self.hall.changed.notify_all();
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            // A panic has been reported by the thread itself.
            let _ = thread.join();
        }
    }
}

impl Hall {
    fn add(&self, met: Met) {
        let mut state = self.lock();
        if state.others < MOST_OTHERS {
            state.others += 1;
            let is_other = |state: &mut State| {
                state.closed.is_none() && state.moves.errand(&met.hello) == Errand::OtherMove
            };
            let waited = self
                .changed
                .wait_timeout_while(state, OTHER_LIMIT, is_other);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
            state.others -= 1;
        }
        self.place(state, met);
    }

    /// Has somebody wait for [`Door::next`], or tells it why not.
    fn place(&self, mut state: MutexGuard<'_, State>, met: Met) {
        let errand = state.moves.errand(&met.hello);
        if errand != Errand::Move {
            drop(state);
            return met.turn_away(errand);
        }
        if state.met.len() >= MOST {
            state.met.pop_front();
        }
        state.met.push_back(met);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Has whoever comes greeted, until that is stopped or the host gives no more connections.
fn let_in(
    listener: &Listener,
    tls: Option<&Tls>,
    hall: &Arc<Hall>,
    strangers: &mut VecDeque<Stranger>,
) -> Result<Infallible, LinkError> {
    loop {
        let accepted = listener.accept(LOOK)?;
        strangers.retain(|stranger| !stranger.thread.is_finished());
        let Some(link) = accepted else {
            if listener.is_spent() && strangers.is_empty() {
                return Err(LinkError::Spent);
            }
            continue;
        };
        if strangers.len() >= MOST
            && let Some(first) = strangers.pop_front()
        {
            first.closer.close();
        }
        let closer = match link.closer() {
            Ok(closer) => closer,
            Err(error) => {
                let why = with_causes(&error);
                tracing::warn!("{} is sent away: {why}", link.peer());
                continue;
            }
        };
        let (tls, hall) = (tls.cloned(), hall.clone());
        let spawned = thread::Builder::new()
            .name("migration hello".into())
            .spawn(move || {
                let peer = link.peer().to_owned();
                match greet(link, tls.as_ref()) {
                    Ok((channel, hello)) => hall.add(Met {
                        channel,
                        hello,
                        peer,
                    }),
                    // It is none of ours.
                    Err(why) => tracing::warn!("{peer}: {why}"),
                }
            });
        match spawned {
            Ok(thread) => strangers.push_back(Stranger { closer, thread }),
            Err(error) => {
                tracing::warn!("somebody who came is sent away for want of a thread: {error}");
            }
        }
    }
}

/// Hears who somebody is; why it cannot be let in.
fn greet(mut link: Link, tls: Option<&Tls>) -> Result<(Channel, Hello), String> {
    link.set_limit(GREETING_LIMIT)
        .map_err(|error| with_causes(&error))?;
    if let Some(tls) = tls {
        let secured = link.secured_as_server(tls);
        link = secured.map_err(|error| with_causes(&error))?;
    }
    let mut channel = Channel::new(link);
    let hello = channel.meet().map_err(|error| with_causes(&error))?;
    Ok((channel, hello))
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::time::Instant;

    use brume_migration::{Address, ChannelError, Purpose, Session};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    fn door() -> (tempfile::TempDir, Address, Door) {
        let folder = tempfile::tempdir().unwrap();
        let address = Address::Unix(folder.path().join("door"));
        let door = Door::open(Listener::bind(&address).unwrap(), None).unwrap();
        (folder, address, door)
    }

    fn source(address: &Address) -> (Session, JoinHandle<Result<(), ChannelError>>) {
        let mut channel = Channel::new(Link::connect(address, LIMIT).unwrap());
        channel.set_limit(LIMIT).unwrap();
        let session = Session::new().unwrap();
        let greeted = session.clone();
        let greet = move || channel.greet(&greeted, Purpose::Control);
        (session, thread::spawn(greet))
    }

    fn silent(address: &Address) -> UnixStream {
        let Address::Unix(path) = address else {
            unreachable!();
        };
        UnixStream::connect(path).unwrap()
    }

    #[test]
    fn those_who_say_nothing_keep_nobody_waiting() {
        let (_folder, address, door) = door();
        let mut strangers: Vec<_> = (0..3 * MOST).map(|_| silent(&address)).collect();
        let begun = Instant::now();
        let (_, source) = source(&address);
        let mut met = door.next(LIMIT).unwrap();
        assert!(begun.elapsed() < GREETING_LIMIT);
        met.channel.welcome(&met.hello).unwrap();
        source.join().unwrap().unwrap();
        // The first of them had to go; those who came last may still say something.
        let mut byte = [0];
        let gone = &mut strangers[0];
        gone.set_read_timeout(Some(LIMIT)).unwrap();
        assert_eq!(gone.read(&mut byte).unwrap(), 0);
        let last = strangers.last_mut().unwrap();
        last.set_nonblocking(true).unwrap();
        let error = last.read(&mut byte).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        // They do not keep the door open either.
        let begun = Instant::now();
        drop(door);
        assert!(begun.elapsed() < GREETING_LIMIT);
        Link::connect(&address, LIMIT).unwrap_err();
    }

    #[test]
    fn a_source_waits_a_little_for_the_end_of_another_move_and_is_sent_away() {
        let (_folder, address, door) = door();
        let (first, _first) = source(&address);
        door.next(LIMIT).unwrap();
        door.begin(&first);
        let (_, late) = source(&address);
        // Nobody has to look at it for that.
        let refused = late.join().unwrap();
        assert!(
            matches!(refused, Err(ChannelError::Refused(_))),
            "{refused:?}"
        );
        assert!(door.next(Duration::ZERO).is_none());
        let (second, _second) = source(&address);
        door.drop_move();
        let met = door.next(LIMIT).unwrap();
        assert_eq!(met.hello.session, second);
    }

    #[test]
    fn of_sources_that_come_at_once_all_but_one_are_sent_away() {
        let (_folder, address, door) = door();
        let all: Vec<_> = (0..MOST).map(|_| source(&address)).collect();
        while door.hall.lock().met.len() < MOST {
            thread::sleep(Duration::from_millis(1));
        }
        let mut met = door.next(LIMIT).unwrap();
        door.begin(&met.hello.session);
        met.channel.welcome(&met.hello).unwrap();
        let heard = all.into_iter().map(|(_, source)| source.join().unwrap());
        assert_eq!(heard.filter(Result::is_ok).count(), 1);
    }

    #[test]
    fn those_who_are_met_by_nobody_do_not_become_more_and_more() {
        let (_folder, address, door) = door();
        let come = |_| {
            let (session, source) = source(&address);
            let is_met = || {
                let state = door.hall.lock();
                state
                    .met
                    .back()
                    .is_some_and(|met| met.hello.session == session)
            };
            while !is_met() {
                thread::sleep(Duration::from_millis(1));
            }
            source
        };
        let sources: Vec<_> = (0..MOST + 4).map(come).collect();
        let mut welcome = 0;
        while let Some(mut met) = door.next(Duration::from_millis(200)) {
            met.channel.welcome(&met.hello).unwrap();
            welcome += 1;
        }
        assert_eq!(welcome, MOST);
        let heard = sources.into_iter().map(|source| source.join().unwrap());
        assert_eq!(heard.filter(Result::is_ok).count(), MOST);
    }
}
