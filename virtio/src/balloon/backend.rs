// SPDX-License-Identifier: Apache-2.0
//! A balloon's queues, on its worker's thread.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{io, iter};

use vm_memory::GuestMemoryError;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::control::Shared;
use super::counters::GivenBackCounters;
use super::host::give_back;
use super::ranges::Ranges;
use super::statistics;
use crate::device::{StartError, StartedQueue};
use crate::memory::GuestMemory;
use crate::queue::{Chain, Queue, QueueError, QueueState};
use crate::signals::DeviceSignals;
use crate::worker::Backend;

/// Chains of one queue that are served before the next has its turn.
const BATCH: usize = 16;
/// Length in bytes of a page frame number (le32).
const PFN_LEN: usize = 4;
/// Pages of the balloon have this size, in bits of an address, whatever the guest's have.
const PFN_SHIFT: u32 = 12;
/// Bytes of page frame numbers that are read at a time.
const PFN_PIECE: usize = 1024 * PFN_LEN;
/// The most bytes of page frame numbers in a chain; drivers use a 64th of it.
const MAX_PFN_BYTES: u64 = 16 * PFN_PIECE as u64;
/// The most bytes of hinted memory that are given back before a command can come between.
const HINT_STEP: u64 = 16 << 20;

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Inflate,
    Deflate,
    Statistics,
    Hinting,
    Reporting,
    /// It goes with a feature that the driver did not accept.
    Unused,
}

/// All queues of a running balloon.
pub(super) struct BalloonBackend {
    /// In the device's order; `None` where the driver uses none.
    queues: Vec<Option<(Role, Queue)>>,
    kicks: Vec<Arc<EventFd>>,
    work: Work,
}

impl BalloonBackend {
    /// Serves `queues`, each of which is for what the same place in `roles` says; those behind them
    /// are not used.
    pub(super) fn new(
        queues: Vec<Option<StartedQueue>>,
        roles: &[Role],
        memory: GuestMemory,
        shared: Arc<Shared>,
        signals: DeviceSignals,
    ) -> io::Result<Self> {
        let mut kicks = Vec::new();
        let roles = roles.iter().copied().chain(iter::repeat(Role::Unused));
        let queues = queues.into_iter().zip(roles).map(|(started, role)| {
            let StartedQueue { queue, kick } = started?;
            kicks.push(kick);
            Some((role, queue))
        });
        Ok(Self {
            queues: queues.collect(),
            kicks,
            work: Work {
                timer: StatisticsTimer::start(shared.interval())?,
                memory,
                shared,
                signals,
                chain: Chain::new(),
                bytes: vec![0; PFN_PIECE.max(statistics::MAX_LEN)].into(),
                ranges: Ranges::default(),
                held: None,
            },
        })
    }

    /// The queues that the driver uses.
    fn each(&mut self) -> impl Iterator<Item = &mut (Role, Queue)> {
        self.queues.iter_mut().flatten()
    }
}

impl Backend for BalloonBackend {
    type State = Vec<Option<QueueState>>;

    fn process(&mut self) -> Result<bool, StartError> {
        let mut any = false;
        for (role, queue) in self.queues.iter_mut().flatten() {
            any |= self.work.serve(*role, queue)?;
        }
        Ok(any)
    }

    fn arm(&mut self) -> Result<bool, StartError> {
        let mut any = false;
        for (_, queue) in self.each() {
            any |= queue.enable_kicks()?;
        }
        Ok(any)
    }

    fn disarm(&mut self) -> Result<(), StartError> {
        for (_, queue) in self.each() {
            queue.suppress_kicks()?;
        }
        Ok(())
    }

    fn wake_fds(&self) -> Vec<RawFd> {
        let kicks = self.kicks.iter().map(AsRawFd::as_raw_fd);
        let own = [
            self.work.shared.wake.as_raw_fd(),
            self.work.timer.fd.as_raw_fd(),
        ];
        kicks.chain(own).collect()
    }

    /// The buffer that is held for the next statistics goes back into its queue.
    fn finish(mut self) -> Self::State {
        let held = self.work.held.take();
        let state = |(role, mut queue): (Role, Queue)| {
            if role == Role::Statistics && held.is_some() {
                queue.undo_pop();
            }
            queue.state()
        };
        self.queues
            .into_iter()
            .map(|queue| queue.map(state))
            .collect()
    }
}

/// What serving a queue needs besides the queue.
struct Work {
    memory: GuestMemory,
    shared: Arc<Shared>,
    signals: DeviceSignals,
    chain: Chain,
    bytes: Box<[u8]>,
    ranges: Ranges,
    timer: StatisticsTimer,
    /// The buffer with the last statistics; the driver fills it again when it gets it back. It is
    /// the last one that was popped.
    held: Option<u16>,
}

impl Work {
    /// Serves up to a batch of chains; whether there was anything to do.
    fn serve(&mut self, role: Role, queue: &mut Queue) -> Result<bool, QueueError> {
        if role == Role::Unused {
            return Ok(false);
        }
        let mut any = false;
        for _ in 0..BATCH {
            if !queue.pop(&mut self.chain)? {
                break;
            }
            any = true;
            match role {
                Role::Inflate => self.inflate(),
                // Pages that the guest takes back come when it touches them.
                Role::Deflate => self.shared.counters.deflates.add(1),
                Role::Unused => {}
                Role::Statistics => {
                    self.take_statistics();
                    // One that is held already is against the rules, and given back.
                    self.release_held(queue)?;
                    self.held = Some(self.chain.head());
                    continue;
                }
                Role::Hinting => self.hint(),
                Role::Reporting => self.report(),
            }
            queue.push_used(self.chain.head(), 0)?;
        }
        if role == Role::Statistics && self.statistics_wanted() {
            any |= self.release_held(queue)?;
        }
        queue.publish()?;
        if queue.needs_interrupt()? {
            self.signals.used_buffers();
        }
        Ok(any)
    }

    fn statistics_wanted(&mut self) -> bool {
        if self.shared.take_refresh() {
            self.timer.restart(self.shared.interval());
            return true;
        }
        self.timer.is_due()
    }

    /// Gives the held buffer back; whether there was one.
    fn release_held(&mut self, queue: &mut Queue) -> Result<bool, QueueError> {
        let Some(head) = self.held.take() else {
            return Ok(false);
        };
        queue.push_used(head, 0)?;
        Ok(true)
    }

    fn take_statistics(&mut self) {
        let bytes = self
            .bytes
            .get_mut(..statistics::MAX_LEN)
            .unwrap_or_default();
        match self.chain.readable().read_at(&self.memory, 0, bytes) {
            Ok(len) => {
                self.shared.counters.statistics.add(1);
                self.shared
                    .update_statistics(bytes.get(..len).unwrap_or_default());
            }
            Err(error) => {
                self.shared.counters.statistics_fails.add(1);
                self.bad_buffer("statistics", &error);
            }
        }
    }

    /// Gives back the pages whose numbers are in the chain.
    fn inflate(&mut self) {
        self.shared.counters.inflates.add(1);
        let mut at = 0;
        while at < MAX_PFN_BYTES {
            let bytes = self.bytes.get_mut(..PFN_PIECE).unwrap_or_default();
            let read = match self.chain.readable().read_at(&self.memory, at, bytes) {
                Ok(0) => break,
                Ok(len) => bytes.get(..len).unwrap_or_default(),
                Err(error) => {
                    self.bad_buffer("page numbers", &error);
                    break;
                }
            };
            at += read.len() as u64;
            self.ranges.clear();
            let (numbers, _) = read.as_chunks::<PFN_LEN>();
            for number in numbers {
                let page = u64::from(u32::from_le_bytes(*number)) << PFN_SHIFT;
                self.ranges.push(page, 1 << PFN_SHIFT);
            }
            self.ranges.merge();
            self.give_back_ranges(&self.shared.counters.inflate);
        }
    }

    /// Gives back what the driver reports as free; it waits with using it until the chain is used.
    fn report(&mut self) {
        self.collect_ranges();
        self.give_back_ranges(&self.shared.counters.report);
    }

    /// Takes a command or a hint.
    fn hint(&mut self) {
        let mut command = [0; 4];
        match self.chain.readable().read_at(&self.memory, 0, &mut command) {
            Ok(4) => self
                .shared
                .confirm_hint(u32::from_le_bytes(command), &self.signals),
            Ok(_) => {}
            Err(error) => self.bad_buffer("hint command", &error),
        }
        self.collect_ranges();
        for (start, end) in self.ranges.iter() {
            if !self.give_back_hinted(start, end) {
                break;
            }
        }
    }

    /// Gives back a hinted range step by step; whether the run goes on.
    fn give_back_hinted(&self, start: u64, end: u64) -> bool {
        let end = end.min(memory_end(&self.memory));
        let mut at = start;
        while at < end {
            let next = end.min(at.saturating_add(HINT_STEP));
            let step = || give_back(&self.memory, at, next);
            match self.shared.while_hinting(step) {
                None => return false,
                Some(result) => self.note(result, &self.shared.counters.hint),
            }
            at = next;
        }
        true
    }

    /// Collects the buffers of the chain that the device may write.
    fn collect_ranges(&mut self) {
        self.ranges.clear();
        for buffer in self.chain.writable().iter() {
            self.ranges.push(buffer.address.0, buffer.len.into());
        }
        self.ranges.merge();
    }

    /// Gives back the ranges, which are merged.
    fn give_back_ranges(&self, counters: &GivenBackCounters) {
        for (start, end) in self.ranges.iter() {
            self.note(give_back(&self.memory, start, end), counters);
        }
    }

    fn note(&self, result: io::Result<u64>, counters: &GivenBackCounters) {
        match result {
            Ok(bytes) => {
                counters.ranges.add(1);
                counters.bytes.add(bytes);
            }
            Err(error) => {
                counters.fails.add(1);
                self.signals.warn(format_args!(
                    "the balloon cannot give memory back to the host: {error}"
                ));
            }
        }
    }

    fn bad_buffer(&self, what: &str, error: &GuestMemoryError) {
        self.signals
            .warn(format_args!("the balloon's {what} cannot be read: {error}"));
    }
}

/// The address behind the last byte of guest memory.
fn memory_end(memory: &GuestMemory) -> u64 {
    use vm_memory::GuestMemoryBackend;
    memory.last_addr().0.saturating_add(1)
}

/// Says when the guest is to be asked for new statistics. The timer only wakes the thread, and is
/// set anew each time, so that it need not be read.
struct StatisticsTimer {
    fd: TimerFd,
    interval: Duration,
    due: Option<Instant>,
}

impl StatisticsTimer {
    /// A timer that is due every `interval_s` seconds; with zero never.
    fn start(interval_s: u16) -> io::Result<Self> {
        let mut timer = Self {
            fd: TimerFd::new()?,
            interval: Duration::ZERO,
            due: None,
        };
        timer.restart(interval_s);
        Ok(timer)
    }

    fn restart(&mut self, interval_s: u16) {
        self.interval = Duration::from_secs(interval_s.into());
        self.set();
    }

    fn set(&mut self) {
        let running = !self.interval.is_zero();
        self.due = running.then(|| Instant::now() + self.interval);
        // It can only fail for a descriptor that is no timer or a time that is none.
        let _ = self.fd.reset(self.interval, None);
    }

    /// Whether the time has come; it then begins anew.
    fn is_due(&mut self) -> bool {
        let due = self.due.is_some_and(|due| Instant::now() >= due);
        if due {
            self.set();
        }
        due
    }
}
