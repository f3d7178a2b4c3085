// SPDX-License-Identifier: Apache-2.0
//! The thread that serves a device's queues.
//!
//! One thread per running device, so that a slow disk never stalls a NIC. It owns the device's
//! [`Backend`] (queues, file, TAP) outright and shares nothing but the stop flag and the
//! [`DeviceSignals`], so there are no locks and no lock order.
//!
//! The thread looks at the queues for a little while after the last work before it sleeps, with
//! the driver's notifications off: a notification costs the guest an exit, and a wake-up costs the
//! host a switch, both more than most requests. How long it looks adapts to whether that found
//! anything, so that an idle or slow guest costs nothing.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::StartError;
use crate::signals::DeviceSignals;

/// The longest time that a worker looks at its queues with nothing to do.
const MAX_POLL: Duration = Duration::from_micros(50);
/// Where the time starts when looking begins to be worth it.
const MIN_POLL: Duration = Duration::from_micros(8);
/// Between two looks at the clock, which costs more than a look at a ring.
const LOOKS_PER_CLOCK: u32 = 16;

/// A device's work, without the waiting.
pub trait Backend: Send + 'static {
    /// What is handed back when the work ends.
    type State: Send + 'static;

    /// Does all that can be done without waiting; whether there was anything.
    ///
    /// # Errors
    ///
    /// The device cannot go on until it is reset.
    fn process(&mut self) -> Result<bool, StartError>;

    /// Asks for notifications, before the thread sleeps; `true` if there is work already.
    ///
    /// # Errors
    ///
    /// The device cannot go on until it is reset.
    fn arm(&mut self) -> Result<bool, StartError>;

    /// Takes the wish for notifications back, after the thread has slept.
    ///
    /// # Errors
    ///
    /// The device cannot go on until it is reset.
    fn disarm(&mut self) -> Result<(), StartError>;

    /// The file descriptors that have to wake the thread. They are watched edge-triggered, which
    /// `process` makes good by working until nothing is left, and are never read here.
    fn wake_fds(&self) -> Vec<RawFd>;

    /// Finishes what is in flight and gives the state back.
    fn finish(self) -> Self::State;
}

struct Stop {
    requested: AtomicBool,
    event: EventFd,
}

/// A running backend.
pub struct Worker<B: Backend> {
    thread: JoinHandle<B::State>,
    stop: Arc<Stop>,
}

impl<B: Backend> Worker<B> {
    /// Starts a thread called `name` (15 bytes at most are shown by the kernel) on `backend`.
    ///
    /// # Errors
    ///
    /// The host has no more threads or file descriptors for us.
    pub fn spawn(name: &str, backend: B, signals: DeviceSignals) -> io::Result<Self> {
        let stop = Arc::new(Stop {
            requested: AtomicBool::new(false),
            event: EventFd::new(EFD_NONBLOCK)?,
        });
        let epoll = Epoll::new()?;
        let fds = backend
            .wake_fds()
            .into_iter()
            .chain([stop.event.as_raw_fd()]);
        for fd in fds {
            let interest = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
            epoll.ctl(ControlOperation::Add, fd, interest)?;
        }
        let running = Run {
            backend,
            epoll,
            signals,
            stop: stop.clone(),
            poll: AdaptivePoll::new(),
        };
        let name = name.chars().filter(|c| *c != '\0').collect();
        let thread = thread::Builder::new()
            .name(name)
            // A worker's frames are small; its buffers are on the heap.
            .stack_size(256 * 1024)
            .spawn(move || running.run())?;
        Ok(Self { thread, stop })
    }

    /// Stops the thread and returns what its backend left; `None` if the thread panicked.
    pub fn stop(self) -> Option<B::State> {
        self.stop.requested.store(true, Ordering::SeqCst);
        // The counter cannot be at its end: it is written once.
        let _ = self.stop.event.write(1);
        self.thread.join().ok()
    }
}

struct Run<B> {
    backend: B,
    epoll: Epoll,
    signals: DeviceSignals,
    stop: Arc<Stop>,
    poll: AdaptivePoll,
}

impl<B: Backend> Run<B> {
    fn run(mut self) -> B::State {
        if let Err(error) = self.serve() {
            let error = chain_of(error.as_ref());
            self.signals
                .warn(format_args!("a virtio device needs a reset: {error}"));
            self.signals.needs_reset();
            self.sleep_until_stopped();
        }
        self.backend.finish()
    }

    fn serve(&mut self) -> Result<(), StartError> {
        self.backend.disarm()?;
        while !self.stopped() {
            if self.work_for_a_while()? || self.backend.arm()? {
                continue;
            }
            let asleep = Instant::now();
            self.wait()?;
            self.poll.slept(asleep.elapsed());
            self.backend.disarm()?;
        }
        Ok(())
    }

    /// Works until nothing was there for the poll time; `true` if it has to stop.
    fn work_for_a_while(&mut self) -> Result<bool, StartError> {
        let mut looks = 0;
        let mut idle_since = None;
        while !self.stopped() {
            if self.backend.process()? {
                (looks, idle_since) = (0, None);
                continue;
            }
            if self.poll.time.is_zero() {
                return Ok(false);
            }
            looks += 1;
            if looks % LOOKS_PER_CLOCK == 0 {
                let since: Instant = *idle_since.get_or_insert_with(Instant::now);
                if since.elapsed() >= self.poll.time {
                    return Ok(false);
                }
            }
            std::hint::spin_loop();
        }
        Ok(true)
    }

    fn wait(&self) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 4];
        match self.epoll.wait(-1, &mut events) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
            _ => Ok(()),
        }
    }

    fn sleep_until_stopped(&self) {
        while !self.stopped() {
            if self.wait().is_err() {
                thread::sleep(Duration::from_millis(10));
            }
        }
    }

    fn stopped(&self) -> bool {
        self.stop.requested.load(Ordering::Relaxed)
    }
}

/// How long to look before sleeping, learnt from how long the sleeps were.
struct AdaptivePoll {
    time: Duration,
    max: Duration,
}

impl AdaptivePoll {
    fn new() -> Self {
        // With one CPU, looking takes the time from the guest that is to be waited for.
        let alone = thread::available_parallelism().is_ok_and(|cpus| cpus.get() == 1);
        Self {
            time: Duration::ZERO,
            max: if alone { Duration::ZERO } else { MAX_POLL },
        }
    }

    /// A short sleep would have been avoided by looking longer; a long one was not worth a look.
    fn slept(&mut self, time: Duration) {
        self.time = if time <= self.max {
            (self.time * 2).max(MIN_POLL).min(self.max)
        } else {
            let half = self.time / 2;
            if half < MIN_POLL {
                Duration::ZERO
            } else {
                half
            }
        };
    }
}

/// An error and its sources, on one line.
fn chain_of(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text.push_str(": ");
        text.push_str(&source.to_string());
        next = source.source();
    }
    text
}
