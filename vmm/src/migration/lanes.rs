// SPDX-License-Identifier: Apache-2.0
//! The connections that carry memory away. The first is the one that everything else goes over; it
//! is used by the thread that drives the move. Each of the others has a thread, called
//! `migration N`, which takes no locks but that of the bandwidth limit, and ends with its [`Lanes`].

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

use brume_api::OnTimeout;
use brume_migration::{Channel, ChannelError, Message, PageBatch, Zeros};
use thiserror::Error;

use super::control::Control;
use crate::memory::MachineMemory;

/// How many pages are sent at once.
pub(super) const BATCH_PAGES: u64 = 128;
/// How many batches may wait for a connection.
const BACKLOG: usize = 4;

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
    /// Bytes on the wire.
    pub(super) bytes: u64,
}

impl Amount {
    pub(super) fn add(&mut self, other: Self) {
        self.pages += other.pages;
        self.zeros += other.zeros;
        self.bytes += other.bytes;
    }
}

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
        let amount = self.send_filled()?;
        if zeros == Zeros::Absent {
            self.left_out += amount.zeros;
        }
        self.wait_for_limit(amount.bytes)?;
        Ok(amount)
    }

    /// Copies pages, to be sent next.
    pub(super) fn fill(&mut self, pages: &[Range<u64>], zeros: Zeros) -> Result<(), LaneError> {
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
    pub(super) fn send_filled(&mut self) -> Result<Amount, LaneError> {
        let mut amount = Amount {
            pages: self.batch.data_pages(),
            zeros: self.batch.zero_pages(),
            bytes: 0,
        };
        if !self.batch.is_empty() {
            amount.bytes = self.channel.send_pages(&self.batch)?;
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

    pub(super) fn wait_for_limit(&self, bytes: u64) -> Result<(), LaneError> {
        let wait = self.control.rate().take(bytes);
        if !wait.is_zero() {
            self.control.sleep(wait);
        }
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
    KeepAlive,
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
            .spawn(move || {
                while let Ok(order) = orders.recv() {
                    let result = match order {
                        Work::Send(batch, zeros) => lane.send(&batch, zeros),
                        Work::EndPass(pass) => lane.end_pass(pass).map(|()| Amount::default()),
                        Work::KeepAlive => lane.keep_alive().map(|()| Amount::default()),
                    };
                    let failed = result.is_err();
                    if answers.send(result).is_err() || failed {
                        break;
                    }
                }
            })?;
        Ok(Self {
            work: Some(work),
            done,
            thread: Some(thread),
            open: 0,
        })
    }

    /// Gives it something to do; what it has done meanwhile.
    fn give(&mut self, order: Work) -> Done {
        let mut amount = Amount::default();
        while self.open > BACKLOG {
            amount.add(self.wait()?);
        }
        let work = self.work.as_ref().ok_or(LaneError::Ended)?;
        if work.send(order).is_err() {
            // Why it has ended is in an answer.
            while self.open > 0 {
                amount.add(self.wait()?);
            }
            return Err(LaneError::Ended);
        }
        self.open += 1;
        Ok(amount)
    }

    fn wait(&mut self) -> Done {
        let done = self.done.recv().map_err(|_| LaneError::Ended)?;
        self.open = self.open.saturating_sub(1);
        done
    }

    fn finish(&mut self) -> Done {
        let mut amount = Amount::default();
        while self.open > 0 {
            amount.add(self.wait()?);
        }
        Ok(amount)
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
            Some(other) => other.give(Work::Send(pages, zeros)),
            None => self.first.send(&pages, zeros),
        }
    }

    /// Says on all but the first, between passes, that they are still there.
    pub(super) fn keep_alive(&mut self) -> Result<(), LaneError> {
        let mut others = self.others.iter_mut();
        others.try_for_each(|other| other.give(Work::KeepAlive).map(drop))
    }

    /// Ends a pass on all of them; what was sent meanwhile.
    pub(super) fn end_pass(&mut self, pass: u32) -> Done {
        let mut amount = Amount::default();
        for other in &mut self.others {
            amount.add(other.give(Work::EndPass(pass))?);
        }
        self.first.end_pass(pass)?;
        for other in &mut self.others {
            amount.add(other.finish()?);
        }
        Ok(amount)
    }
}
