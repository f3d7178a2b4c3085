// SPDX-License-Identifier: Apache-2.0
//! The door of a target. Whoever comes is greeted beside all others, so that one who says nothing
//! keeps nobody waiting.
//!
//! The thread `migration door` takes connections and has a thread `migration hello` for each of
//! those who have not said yet who they are. There are no more than [`MOST`] of these: the one that
//! came first has to go when another comes, for a source needs less time than any number of
//! strangers has. Those who have said it wait for [`Door::next`], under a lock that is held for a
//! few instructions.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use brume_api::with_causes;
use brume_migration::{Channel, Closer, Hello, Link, LinkError, Listener, Stopper, Tls};

/// How often the thread looks for those who are greeted no more.
const LOOK: Duration = Duration::from_secs(1);
/// How long somebody may take to say who it is.
const GREETING_LIMIT: Duration = Duration::from_secs(5);
/// The most who are greeted at once, and the most who wait after that.
const MOST: usize = 16;

/// Who has said who it is, and is still to be welcomed.
pub(super) struct Met {
    pub(super) channel: Channel,
    pub(super) hello: Hello,
    /// Where it comes from, for people.
    pub(super) peer: String,
}

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
                for stranger in strangers {
                    stranger.closer.close();
                    // A panic has been reported by the thread itself.
                    let _ = stranger.thread.join();
                }
                inside.lock().closed = Some(with_causes(&error));
                inside.changed.notify_all();
            })?;
        Ok(Self {
            hall,
            stop,
            thread: Some(thread),
        })
    }

    /// The next who has said who it is; `None` if there is nobody within `limit`.
    ///
    /// # Errors
    ///
    /// Why nobody comes any more.
    pub(super) fn next(&self, limit: Duration) -> Result<Option<Met>, String> {
        let state = self.hall.lock();
        let waited = self.hall.changed.wait_timeout_while(state, limit, |state| {
            state.met.is_empty() && state.closed.is_none()
        });
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match (state.met.pop_front(), &state.closed) {
            (None, Some(why)) => Err(why.clone()),
            (met, _) => Ok(met),
        }
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
            continue;
        };
        if strangers.len() >= MOST
            && let Some(first) = strangers.pop_front()
        {
            first.closer.close();
        }
        let closer = link.closer()?;
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

    const LIMIT: Duration = Duration::from_secs(3);

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
        let mut met = door.next(LIMIT).unwrap().unwrap();
        assert!(begun.elapsed() < Duration::from_secs(1));
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
        assert!(begun.elapsed() < Duration::from_secs(1));
        Link::connect(&address, LIMIT).unwrap_err();
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
        while let Some(mut met) = door.next(Duration::from_millis(200)).unwrap() {
            met.channel.welcome(&met.hello).unwrap();
            welcome += 1;
        }
        assert_eq!(welcome, MOST);
        let heard = sources.into_iter().map(|source| source.join().unwrap());
        assert_eq!(heard.filter(Result::is_ok).count(), MOST);
    }
}
