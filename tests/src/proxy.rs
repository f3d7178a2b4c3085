// SPDX-License-Identifier: Apache-2.0
//! A bad connection: it stands between two programs and flips bits, stalls, or breaks.
//!
//! It carries bytes alone: descriptors that are passed over a unix socket are lost on the way.

mod stream;

use std::fmt;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::frames::Frames;
use stream::{Listener, Stream};

/// How much is carried at a time.
const CHUNK: usize = 64 * 1024;

/// Where somebody listens; shown as a destination of a migration.
#[derive(Clone, Debug)]
pub enum Address {
    /// A socket in the file system.
    Unix(PathBuf),
    /// An address and a port.
    Tcp(SocketAddr),
    /// A connected socket that the process has. No proxy stands before it.
    Passed(RawFd),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
            Self::Passed(fd) => write!(f, "fd:{fd}"),
        }
    }
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From who connected to who listens.
    There,
    /// The other.
    Back,
}

/// What happens to a connection at some byte that it carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Harm {
    /// It breaks before the byte: a TCP connection is reset.
    Cut,
    /// It comes to an end in order before the byte, as one over a relay does that is ended.
    HangUp,
    /// From the byte on nothing goes any way on any connection until [`Proxy::go_on`].
    Stall,
    /// From the byte on nothing goes this way on this connection until [`Proxy::go_on`].
    Hold,
    /// A bit of the byte is flipped. In a frame that is the last byte, wherever it is said to happen.
    Flip,
}

/// Which byte of which connection meets harm. Connections count from 0, bytes too, each way by
/// itself.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// Of which connection.
    pub connection: usize,
    /// On which way.
    pub way: Way,
    /// Which byte.
    pub at: u64,
    /// What happens there.
    pub harm: Harm,
}

/// Before or behind a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nothing of it arrives.
    Before,
    /// All of it arrives.
    Behind,
}

/// A frame that is waited for, and what it does to its connection.
#[derive(Clone, Debug)]
struct Trap {
    way: Way,
    name: &'static str,
    place: Place,
    harm: Harm,
}

/// What stands between.
pub struct Proxy {
    address: Address,
    shared: Arc<Shared>,
}

struct Shared {
    to: Address,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    over: bool,
    refuses: bool,
    stalled: bool,
    /// Whether ways that have met [`Harm::Hold`] carry nothing.
    held: bool,
    faults: Vec<Fault>,
    traps: Vec<Trap>,
    connections: Vec<Connection>,
}

struct Connection {
    ends: [Stream; 2],
    /// How many bytes have gone each way.
    bytes: [u64; 2],
    /// How many ways have come to their end.
    ended: u8,
}

impl Proxy {
    /// Stands before `to` from now on, whether there is somebody or not, at an address of the same
    /// kind; `folder` is for a socket. For TCP that is a port of this thread's loopback interface.
    ///
    /// # Panics
    ///
    /// There is no such address.
    pub fn new(to: Address, folder: &Path) -> Self {
        let (listener, address) = Listener::bind(&to, folder).expect("the proxy's address");
        let shared = Arc::new(Shared {
            to,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let proxy = Self {
            address,
            shared: Arc::clone(&shared),
        };
        thread::spawn(move || serve(&listener, &shared));
        proxy
    }

    /// Where to connect to.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Has `fault` happen, once.
    pub fn inject(&self, fault: Fault) {
        self.shared.lock().faults.push(fault);
    }

    /// Has `harm` happen, once, where a message of that name, or a frame of that kind, goes that way:
    /// `Commit`, `Pages`.
    pub fn trap(&self, way: Way, place: Place, name: &'static str, harm: Harm) {
        self.shared.lock().traps.push(Trap {
            way,
            name,
            place,
            harm,
        });
    }

    /// Whether every fault and trap has happened.
    pub fn is_spent(&self) -> bool {
        let state = self.shared.lock();
        state.faults.is_empty() && state.traps.is_empty()
    }

    /// Breaks every connection, and refuses others until [`Proxy::mend`].
    pub fn cut(&self) {
        let mut state = self.shared.lock();
        state.refuses = true;
        state.connections.iter().for_each(Connection::close);
    }

    /// Takes connections again. Those that were cut stay so.
    pub fn mend(&self) {
        self.shared.lock().refuses = false;
    }

    /// Breaks one connection.
    ///
    /// # Panics
    ///
    /// There were never so many.
    pub fn drop_connection(&self, number: usize) {
        let state = self.shared.lock();
        let connection = state.connections.get(number);
        connection.expect("so many connections").close();
    }

    /// Carries nothing until [`Proxy::go_on`]; nobody is told.
    pub fn stall(&self) {
        self.shared.lock().stalled = true;
    }

    /// Carries bytes again.
    pub fn go_on(&self) {
        let mut state = self.shared.lock();
        (state.stalled, state.held) = (false, false);
        drop(state);
        self.shared.changed.notify_all();
    }

    /// How many connections there were.
    pub fn connections(&self) -> usize {
        self.shared.lock().connections.len()
    }

    /// How many bytes have gone over one connection, both ways.
    pub fn bytes_of(&self, number: usize) -> u64 {
        let state = self.shared.lock();
        let connection = state.connections.get(number);
        connection.map_or(0, |connection| connection.bytes.iter().sum())
    }

    /// How many bytes have gone that way, over all connections.
    pub fn bytes(&self, way: Way) -> u64 {
        let state = self.shared.lock();
        let bytes = |connection: &Connection| connection.bytes(way);
        state.connections.iter().map(bytes).sum()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.over = true;
        state.connections.iter().for_each(Connection::close);
        drop(state);
        self.shared.changed.notify_all();
        // The listener looks up when somebody comes.
        let _ = Stream::connect(&self.address);
        if let Address::Unix(path) = &self.address {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Connection {
    fn close(&self) {
        self.ends.iter().for_each(Stream::reset);
    }

    fn bytes(&self, way: Way) -> u64 {
        let [there, back] = self.bytes;
        match way {
            Way::There => there,
            Way::Back => back,
        }
    }

    fn add(&mut self, way: Way, count: u64) {
        let [there, back] = &mut self.bytes;
        *match way {
            Way::There => there,
            Way::Back => back,
        } += count;
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while nothing is to be carried, or `held`; whether it goes on at all.
    fn wait(&self, held: bool) -> bool {
        let state = self.lock();
        let waited = self.changed.wait_while(state, |state| {
            (state.stalled || held && state.held) && !state.over
        });
        !waited.unwrap_or_else(PoisonError::into_inner).over
    }
}

/// Takes connections until the proxy is dropped.
fn serve(listener: &Listener, shared: &Arc<Shared>) {
    while let Ok(near) = listener.accept() {
        let state = shared.lock();
        if state.over {
            return;
        }
        if state.refuses {
            continue;
        }
        drop(state);
        // Who connected sees that nobody is there.
        if let Ok(far) = Stream::connect(&shared.to) {
            let _ = join(near, far, shared);
        }
    }
}

/// Carries bytes both ways.
fn join(near: Stream, far: Stream, shared: &Arc<Shared>) -> io::Result<()> {
    let ends = [near.try_clone()?, far.try_clone()?];
    let back = (far.try_clone()?, near.try_clone()?);
    let mut state = shared.lock();
    let number = state.connections.len();
    state.connections.push(Connection {
        ends,
        bytes: [0; 2],
        ended: 0,
    });
    drop(state);
    for ((from, to), way) in [((near, far), Way::There), (back, Way::Back)] {
        let shared = Arc::clone(shared);
        thread::spawn(move || {
            let end = pump(&from, &to, number, way, &shared);
            let is_last = shared.way_ended(number);
            match end {
                // The other way has its own end, unless that has come.
                Ok(End::Reached) => to.end(),
                Ok(End::NotTaken) if !is_last => {}
                Ok(End::NotTaken) => [from, to].iter().for_each(Stream::reset),
                Ok(End::HungUp) => [from, to].iter().for_each(Stream::close),
                Ok(End::Cut) | Err(_) => [from, to].iter().for_each(Stream::reset),
            }
        });
    }
    Ok(())
}

/// How the bytes of one way come to their end.
enum End {
    /// There are no more.
    Reached,
    /// Nobody takes them. What that one has said before is still to be heard.
    NotTaken,
    /// As [`Harm::HangUp`] wants it.
    HungUp,
    /// As [`Harm::Cut`] wants it.
    Cut,
}

fn pump(
    mut from: &Stream,
    mut to: &Stream,
    number: usize,
    way: Way,
    shared: &Shared,
) -> io::Result<End> {
    let mut chunk = vec![0; CHUNK];
    let mut frames = Frames::default();
    loop {
        let count = from.read(&mut chunk)?;
        let read = chunk.get(..count).unwrap_or_default();
        let (mut bytes, named) = frames.take(read);
        if bytes.is_empty() {
            if count == 0 {
                return Ok(End::Reached);
            }
            // Not a whole header yet.
            continue;
        }
        if !shared.wait(false) {
            return Ok(End::Cut);
        }
        shared.spring(&named, number, way);
        let harm = shared.harm(&mut bytes, number, way);
        shared.count(bytes.len(), number, way);
        match harm {
            None if to.write_all(&bytes).is_err() => return Ok(End::NotTaken),
            None => {}
            Some((keep, end)) => {
                let (before, after) = bytes.split_at_mut(keep);
                if to.write_all(before).is_err() {
                    return Ok(End::NotTaken);
                }
                match end {
                    Harm::Cut => return Ok(End::Cut),
                    Harm::HangUp => return Ok(End::HungUp),
                    _ if !shared.wait(end == Harm::Hold) => return Ok(End::Cut),
                    _ => to.write_all(after)?,
                }
            }
        }
    }
}

impl Shared {
    fn count(&self, bytes: usize, number: usize, way: Way) {
        if let Some(connection) = self.lock().connections.get_mut(number) {
            connection.add(way, bytes as u64);
        }
    }

    /// Notes that one way of a connection has come to its end; whether it is the last.
    fn way_ended(&self, number: usize) -> bool {
        let mut state = self.lock();
        let connection = state.connections.get_mut(number);
        connection.is_none_or(|connection| {
            connection.ended += 1;
            connection.ended == 2
        })
    }

    /// Makes faults of the traps that `frames` have stepped into: a name each, and where it begins
    /// and ends in what comes next.
    fn spring(&self, frames: &[(String, Range<u64>)], number: usize, of: Way) {
        let mut state = self.lock();
        let Some(begin) = state.connections.get(number).map(|one| one.bytes(of)) else {
            return;
        };
        for (name, range) in frames {
            let found = |trap: &Trap| trap.way == of && trap.name == name;
            let Some(index) = state.traps.iter().position(found) else {
                continue;
            };
            let trap = state.traps.remove(index);
            let at = match (trap.harm, trap.place) {
                (Harm::Flip, _) => begin + range.end - 1,
                (_, Place::Before) => begin + range.start,
                (_, Place::Behind) => begin + range.end,
            };
            state.faults.push(Fault {
                connection: number,
                way: of,
                at,
                harm: trap.harm,
            });
        }
    }

    /// Does to `bytes` what was asked for. When the connection is to end or to stall in them, says
    /// after how many.
    fn harm(&self, bytes: &mut [u8], number: usize, of: Way) -> Option<(usize, Harm)> {
        let mut state = self.lock();
        let begin = state.connections.get(number)?.bytes(of);
        let mut end = None;
        state.faults.retain(|fault| {
            let within = fault.at.checked_sub(begin);
            let within = within.and_then(|at| usize::try_from(at).ok());
            // What comes after the last byte comes now: there may be no other for long.
            let most = bytes.len() - usize::from(fault.harm == Harm::Flip);
            let Some(place) = within.filter(|&place| place <= most) else {
                return true;
            };
            if (fault.connection, fault.way) != (number, of) {
                return true;
            }
            match fault.harm {
                Harm::Flip => bytes.iter_mut().skip(place).take(1).for_each(|b| *b ^= 4),
                harm => end = Some((place, harm)),
            }
            false
        });
        state.stalled |= end.is_some_and(|(_, harm)| harm == Harm::Stall);
        state.held |= end.is_some_and(|(_, harm)| harm == Harm::Hold);
        end
    }
}

#[cfg(test)]
mod tests;
