// SPDX-License-Identifier: Apache-2.0
//! What wakes the muxer: sockets and a timer, behind one file descriptor.
//!
//! The sockets are watched edge-triggered: each event is turned into a mark on its connection,
//! which stays until a call says that it would have to wait. So a socket that nobody can read for
//! now wakes nobody, and needs no system call to be left alone.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use super::muxer::Key;
use super::packet::PORT_ANY;

/// The most events that are taken in one go.
const MAX_EVENTS: usize = 64;
/// How exactly a connection's deadline is kept.
const TICK: Duration = Duration::from_millis(100);

/// The lowest number of a client.
pub(super) const FIRST_CLIENT: u32 = 2;

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Listener,
    Timer,
    /// A client that has not said yet what it wants, by its number from [`FIRST_CLIENT`] on.
    Client(u32),
    Connection(Key),
}

impl Source {
    /// As 64 bits. No connection's guest port is `PORT_ANY`.
    fn token(self) -> u64 {
        let (guest_port, rest) = match self {
            Self::Listener => (PORT_ANY, 0),
            Self::Timer => (PORT_ANY, 1),
            Self::Client(number) => (PORT_ANY, number),
            Self::Connection(key) => (key.guest_port, key.host_port),
        };
        u64::from(guest_port) << 32 | u64::from(rest)
    }

    fn from_token(token: u64) -> Self {
        let [guest_port, host_port] = [token >> 32, token & u64::from(u32::MAX)]
            .map(|half| u32::try_from(half).unwrap_or_default());
        match (guest_port, host_port) {
            (PORT_ANY, 0) => Self::Listener,
            (PORT_ANY, 1) => Self::Timer,
            (PORT_ANY, number) => Self::Client(number),
            _ => Self::Connection(Key {
                guest_port,
                host_port,
            }),
        }
    }
}

/// Everything that is watched.
pub(super) struct Watch {
    epoll: Epoll,
    timer: TimerFd,
    /// Whether the timer runs.
    ticking: bool,
    events: Vec<EpollEvent>,
}

impl Watch {
    pub(super) fn new(listener: RawFd) -> io::Result<Self> {
        let watch = Self {
            epoll: Epoll::new()?,
            timer: TimerFd::new()?,
            ticking: false,
            events: vec![EpollEvent::default(); MAX_EVENTS],
        };
        watch.add(listener, Source::Listener)?;
        watch.add(watch.timer.as_raw_fd(), Source::Timer)?;
        Ok(watch)
    }

    fn control(
        &self,
        operation: ControlOperation,
        fd: RawFd,
        source: Source,
        extra: EventSet,
    ) -> io::Result<()> {
        let set = EventSet::IN | EventSet::EDGE_TRIGGERED | extra;
        let interest = EpollEvent::new(set, source.token());
        self.epoll.ctl(operation, fd, interest)
    }

    fn add(&self, fd: RawFd, source: Source) -> io::Result<()> {
        self.control(ControlOperation::Add, fd, source, EventSet::empty())
    }

    /// Watches for something to be read. Closing the socket ends it.
    pub(super) fn add_stream(&self, stream: &UnixStream, source: Source) -> io::Result<()> {
        self.add(stream.as_raw_fd(), source)
    }

    /// Watches for `room` to write too, or not any more; also gives the socket a new name. What
    /// is so already is an event again.
    pub(super) fn change(&self, stream: &UnixStream, source: Source, room: bool) -> io::Result<()> {
        let extra = if room {
            EventSet::OUT
        } else {
            EventSet::empty()
        };
        self.control(ControlOperation::Modify, stream.as_raw_fd(), source, extra)
    }

    /// Adds the events that are there to `found`, up to a bounded number.
    pub(super) fn poll(&mut self, found: &mut Vec<(Source, EventSet)>) -> io::Result<()> {
        let count = match self.epoll.wait(0, &mut self.events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            result => result?,
        };
        for event in self.events.iter().take(count) {
            let source = Source::from_token(event.data());
            self.ticking &= source != Source::Timer;
            found.push((source, event.event_set()));
        }
        Ok(())
    }

    /// Lets the timer speak once in a while.
    pub(super) fn tick(&mut self) -> io::Result<()> {
        if !self.ticking {
            // Setting it also forgets that it has expired before.
            self.timer.reset(TICK, None)?;
            self.ticking = true;
        }
        Ok(())
    }
}

impl AsRawFd for Watch {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}
