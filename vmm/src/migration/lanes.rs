// SPDX-License-Identifier: Apache-2.0
//! The connections that carry memory away. The first is the one that everything else goes over; it
//! is used by the thread that drives the move. Each of the others has a thread, called
//! `migration N`, which takes no locks but that of the bandwidth limit, and ends with its [`Lanes`].

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use brume_api::OnTimeout;
use brume_migration::{Channel, ChannelError, Message, PageBatch, Zeros};
use thiserror::Error;

use super::control::Control;
use crate::memory::MachineMemory;

/// How many pages are sent at once.
pub(super) const BATCH_PAGES: u64 = 128;
/// How many batches may wait for a connection.
const BACKLOG: usize = 4;
/// After how long without anything else a connection says that it is still there. The target gives
/// one up after 30 seconds.
const KEEP_ALIVE: Duration = if cfg!(test) {
    Duration::from_millis(20)
} else {
    Duration::from_secs(5)
};

/// Memory that cannot be sent.
#[derive(Debug, Error)]
pub(super) enum LaneError {
    /// The connection does not take it.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The memory cannot be read.
    #[error("the guest's memory cannot be read")]
    Memory(#[from] io::Error),
    /// It was called off.
    #[error("it was called off")]
    Cancelled,
    /// The time is up, and the machine stays.
    #[error("it takes too long")]
    TooSlow,
    /// A thread is gone.
    #[error("a connection's thread has ended")]
    Ended,
}

/// Pages to be sent together, at most [`BATCH_PAGES`].
pub(super) type Batch = Vec<Range<u64>>;

/// How much was sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Amount {
    /// Pages with something in them.
    pub(super) pages: u64,
    /// Pages of zeros.
    pub(super) zeros: u64,
    /// Bytes that the pages with something in them have become.
    pub(super) packed: u64,
    /// Bytes on the wire.
    pub(super) bytes: u64,
}

impl Amount {
    pub(super) fn add(&mut self, other: Self) {
        self.pages += other.pages;
        self.zeros += other.zeros;
        self.packed += other.packed;
        self.bytes += other.bytes;
    }
}

/// A way to send pages on a channel; how many bytes that took.
type SendPages = fn(&mut Channel, &PageBatch) -> Result<u64, ChannelError>;

/// One connection, and what it sends.
pub(super) struct Lane {
    pub(super) channel: Channel,
    memory: Arc<MachineMemory>,
    control: Control,
    batch: PageBatch,
    /// Since the connection was opened.
    pages: u64,
    /// Pages of zeros in this pass that the target was not told of.
    left_out: u64,
}

impl Lane {
    pub(super) fn new(channel: Channel, memory: Arc<MachineMemory>, control: Control) -> Self {
        Self {
            channel,
            memory,
            control,
            batch: PageBatch::new(),
            pages: 0,
            left_out: 0,
        }
    }

    /// What it sends from.
    pub(super) fn memory(&self) -> &MachineMemory {
        &self.memory
    }

    /// Sends pages as they are now.
    pub(super) fn send(&mut self, pages: &[Range<u64>], zeros: Zeros) -> Result<Amount, LaneError> {
        self.fill(pages, zeros)?;
        self.channel.set_wire_rate(self.control.rate().get());
        let amount = self.send_filled(Channel::send_pages)?;
        if zeros == Zeros::Absent {
            self.left_out += amount.zeros;
        }
        self.wait_for_limit(amount.bytes)?;
        Ok(amount)
    }

    /// Sends pages without regard to the limit: a guest waits for them.
    pub(super) fn send_at_once(&mut self, pages: &[Range<u64>]) -> Result<Amount, LaneError> {
        self.fill(pages, Zeros::Told)?;
        self.send_filled(Channel::send_pages_at_once)
    }

    /// Takes the time to learn from what was sent last how pages are compressed best.
    pub(super) fn learn(&mut self) {
        self.channel.learn(&self.batch);
    }

    /// Copies pages, to be sent next.
    fn fill(&mut self, pages: &[Range<u64>], zeros: Zeros) -> Result<(), LaneError> {
        self.batch.clear();
        for range in pages {
            let count = u32::try_from(range.end - range.start).map_err(io::Error::other)?;
            let slice = self.memory.slice(range.clone())?;
            self.batch.push_run(range.start, count, zeros, |bytes| {
                slice.copy_to(bytes);
            });
        }
        Ok(())
    }

    /// Sends what was copied.
    fn send_filled(&mut self, send: SendPages) -> Result<Amount, LaneError> {
        let mut amount = Amount {
            pages: self.batch.data_pages(),
            zeros: self.batch.zero_pages(),
            ..Amount::default()
        };
        if !self.batch.is_empty() {
            let (_, before) = self.channel.compressed();
            amount.bytes = send(&mut self.channel, &self.batch)?;
            let (_, after) = self.channel.compressed();
            amount.packed = after - before;
        }
        self.pages += amount.pages;
        Ok(amount)
    }

    /// Says that the pass is over.
    pub(super) fn end_pass(&mut self, pass: u32) -> Result<(), LaneError> {
        let (pages, zeros) = (self.pages, std::mem::take(&mut self.left_out));
        self.channel
            .send(&Message::PassEnded { pass, pages, zeros })?;
        Ok(())
    }

    /// Says that it is still there.
    fn keep_alive(&mut self) -> Result<(), LaneError> {
        self.channel.send(&Message::KeepAlive)?;
        Ok(())
    }

    /// Waits until there is room for `bytes` that were sent. The other side hears of it now and then,
    /// for it may be long: all connections share the limit.
    pub(super) fn wait_for_limit(&mut self, bytes: u64) -> Result<(), LaneError> {
        let rate = self.control.rate().get();
        let end = Instant::now().checked_add(self.control.rate().take(bytes));
        loop {
            let left = end.map_or(KEEP_ALIVE, |end| {
                end.saturating_duration_since(Instant::now())
            });
            if !left.is_zero() {
                self.control.sleep(left.min(KEEP_ALIVE), rate);
            }
            self.check()?;
            if left <= KEEP_ALIVE || self.control.rate().get() != rate || self.is_forced() {
                return Ok(());
            }
            self.keep_alive()?;
        }
    }

    /// Finds out whether it is still wanted.
    pub(super) fn check(&self) -> Result<(), LaneError> {
        if self.control.is_cancelled() {
            return Err(LaneError::Cancelled);
        }
        if self.control.late() == Some(OnTimeout::Cancel) {
            return Err(LaneError::TooSlow);
        }
        Ok(())
    }

    /// Whether the machine has to move now, whatever is left to send.
    pub(super) fn is_forced(&self) -> bool {
        let late = self.control.late();
        late.is_some_and(|wanted| wanted != OnTimeout::Cancel)
    }
}

enum Work {
    Send(Batch, Zeros),
    EndPass(u32),
}

/// What a lane's thread has done.
type Done = Result<Amount, LaneError>;

struct Worker {
    work: Option<SyncSender<Work>>,
    done: Receiver<Done>,
    thread: Option<JoinHandle<()>>,
    /// How many answers are awaited.
    open: usize,
}

impl Worker {
    fn spawn(index: usize, mut lane: Lane) -> io::Result<Self> {
        let (work, orders) = sync_channel(BACKLOG);
        let (answers, done) = sync_channel(2 * BACKLOG + 2);
        let thread = thread::Builder::new()
            .name(format!("migration {index}"))
            .spawn(move || serve(&mut lane, &orders, &answers))?;
        Ok(Self {
            work: Some(work),
            done,
            thread: Some(thread),
            open: 0,
        })
    }

    /// Gives it something to do; what it has done meanwhile. The `first` lane, which has nothing to
    /// do as long as that takes, says that it is still there.
    fn give(&mut self, order: Work, first: &mut Lane) -> Done {
        let mut amount = Amount::default();
        while self.open > BACKLOG {
            amount.add(self.wait(first)?);
        }
        let work = self.work.as_ref().ok_or(LaneError::Ended)?;
        if work.send(order).is_err() {
            // Why it has ended is in an answer.
            while self.open > 0 {
                amount.add(self.wait(first)?);
            }
            return Err(LaneError::Ended);
        }
        self.open += 1;
        Ok(amount)
    }

    fn wait(&mut self, first: &mut Lane) -> Done {
        loop {
            match self.done.recv_timeout(KEEP_ALIVE) {
                Ok(done) => {
                    self.open = self.open.saturating_sub(1);
                    return done;
                }
                Err(RecvTimeoutError::Timeout) => first.keep_alive()?,
                Err(RecvTimeoutError::Disconnected) => return Err(LaneError::Ended),
            }
        }
    }

    fn finish(&mut self, first: &mut Lane) -> Done {
        let mut amount = Amount::default();
        while self.open > 0 {
            amount.add(self.wait(first)?);
        }
        Ok(amount)
    }
}

/// Does what a lane is given to do, and says that it is still there when that is nothing.
fn serve(lane: &mut Lane, orders: &Receiver<Work>, answers: &SyncSender<Done>) {
    loop {
        let result = match orders.recv_timeout(KEEP_ALIVE) {
            Ok(Work::Send(batch, zeros)) => lane.send(&batch, zeros),
            Ok(Work::EndPass(pass)) => lane.end_pass(pass).map(|()| Amount::default()),
            Err(RecvTimeoutError::Timeout) => {
                // After the last pass the target needs it no more; else what is sent next fails too.
                let _ = lane.keep_alive();
                continue;
            }
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let failed = result.is_err();
        if answers.send(result).is_err() || failed {
            return;
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.work.take());
        if let Some(thread) = self.thread.take() {
            // A panic has been reported by the thread itself.
            let _ = thread.join();
        }
    }
}

/// All connections that carry memory.
pub(super) struct Lanes {
    /// The one that everything else goes over.
    pub(super) first: Lane,
    others: Vec<Worker>,
    next: usize,
}

impl Lanes {
    /// Starts a thread for each of `others`.
    ///
    /// # Errors
    ///
    /// The host gives no thread.
    pub(super) fn new(first: Lane, others: Vec<Lane>) -> io::Result<Self> {
        let others = (1..).zip(others);
        let others = others.map(|(index, lane)| Worker::spawn(index, lane));
        Ok(Self {
            first,
            others: others.collect::<io::Result<_>>()?,
            next: 0,
        })
    }

    /// Sends `pages` over one of them; what was sent meanwhile.
    pub(super) fn send(&mut self, pages: Batch, zeros: Zeros) -> Done {
        let turn = self.next;
        self.next = (self.next + 1) % (self.others.len() + 1);
        match turn
            .checked_sub(1)
            .and_then(|other| self.others.get_mut(other))
        {
            Some(other) => other.give(Work::Send(pages, zeros), &mut self.first),
            None => self.first.send(&pages, zeros),
        }
    }

    /// Ends a pass on all of them; what was sent meanwhile.
    pub(super) fn end_pass(&mut self, pass: u32) -> Done {
        let mut amount = Amount::default();
        for other in &mut self.others {
            amount.add(other.give(Work::EndPass(pass), &mut self.first)?);
        }
        self.first.end_pass(pass)?;
        for other in &mut self.others {
            amount.add(other.finish(&mut self.first)?);
        }
        Ok(amount)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use brume_api::config::MachineConfig;
    use brume_api::{MigrationPatch, SendMigration};
    use brume_migration::Link;
    use serde_json::json;

    use super::*;

    fn control(bandwidth_limit: u64) -> Control {
        let request = json!({"destination": "unix:/a", "bandwidth_limit": bandwidth_limit});
        let request: SendMigration = serde_json::from_value(request).unwrap();
        Control::sending(&request)
    }

    /// A lane, and the target's end of it.
    fn lane(control: &Control) -> (Lane, Channel) {
        let machine = MachineConfig {
            mem_size_mib: 4,
            ..MachineConfig::default()
        };
        let memory = Arc::new(crate::memory::make(&machine).unwrap());
        let (ours, theirs) = UnixStream::pair().unwrap();
        let channel = |stream| Channel::new(Link::from_unix(stream).unwrap());
        let mut target = channel(theirs);
        target.set_limit(Duration::from_secs(10)).unwrap();
        (Lane::new(channel(ours), memory, control.clone()), target)
    }

    /// Has `lane` wait for what takes a quarter of an hour.
    fn wait(mut lane: Lane) -> JoinHandle<Result<(), LaneError>> {
        thread::spawn(move || {
            lane.wait_for_limit(1_000_000)?;
            lane.wait_for_limit(1)
        })
    }

    fn stays(target: &mut Channel) {
        for _ in 0..3 {
            assert_eq!(target.receive_message().unwrap(), Message::KeepAlive);
        }
    }

    #[test]
    fn a_lane_that_waits_for_the_limit_stays_and_hears_of_a_change() {
        let control = control(1000);
        let (lane, mut target) = lane(&control);
        let waiting = wait(lane);
        stays(&mut target);
        control.patch(&MigrationPatch {
            bandwidth_limit: Some(0),
            ..MigrationPatch::default()
        });
        waiting.join().unwrap().unwrap();
    }

    #[test]
    fn a_lane_that_waits_for_the_limit_hears_that_it_is_over() {
        let control = control(1000);
        let (one, mut target) = lane(&control);
        let waiting = wait(one);
        stays(&mut target);
        control.cancel();
        assert!(matches!(waiting.join().unwrap(), Err(LaneError::Cancelled)));
    }

    #[test]
    fn lanes_with_nothing_to_send_stay() {
        let control = control(0);
        let ((first, mut target), (other, mut other_target)) = (lane(&control), lane(&control));
        let mut lanes = Lanes::new(first, vec![other]).unwrap();
        stays(&mut other_target);
        // The first one waits for the other.
        let (orders, waiting) = sync_channel(BACKLOG);
        let (answers, done) = sync_channel(1);
        let mut slow = Worker {
            work: Some(orders),
            done,
            thread: None,
            open: 1,
        };
        let answer = thread::spawn(move || {
            stays(&mut target);
            answers.send(Ok(Amount::default())).unwrap();
        });
        slow.finish(&mut lanes.first).unwrap();
        answer.join().unwrap();
        drop(waiting);
    }
}
