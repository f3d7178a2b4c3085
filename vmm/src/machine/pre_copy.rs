// SPDX-License-Identifier: Apache-2.0
//! A snapshot that is written while the machine runs, and needs a pause for the last pages only.
//!
//! ```text
//!  owner:   journal on, pages of the first pass    written pages         pause, last pages, state,
//!                   |                   Copied --> of this pass, ...     resume
//!                   v                      |          v                     |            Saved -> answer
//!  thread:      write, sync ---------------+       write ---- ... ----------+--> sync, rename --+
//! ```
//!
//! One thread at a time, called `snapshot`, has the files and writes; it shares the memory, and
//! nothing else. The owner decides between passes. It pauses when what is left can be written
//! within [`PAUSE_BUDGET`], when another pass would not make it less, or after [`MAX_PASSES`].

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use brume_api::{Answer, CreateSnapshot, SnapshotType};

use super::Machine;
use super::snapshot::create_fault;
use crate::dirty::Reader;
use crate::event::Event;
use crate::instance::ApiCall;
use crate::lifecycle::VmState;
use crate::memory::MachineMemory;
use crate::page_set::{PAGE_SIZE, PageSet};
use crate::snapshot::{CreateError, Writer, pages_in_use};

/// How long writing the last pages may take while the machine is paused.
const PAUSE_BUDGET: Duration = Duration::from_micros(500);
/// How many passes there are at most before the pause.
const MAX_PASSES: u32 = 16;

/// What a client waits for.
struct Order {
    call: ApiCall,
    request: CreateSnapshot,
    begun: Instant,
    /// What the journal of the next diff has to get back if this fails.
    taken: Option<PageSet>,
}

/// A pass that is over.
pub(crate) struct Pass {
    order: Order,
    writer: Writer,
    number: u32,
    /// How many bytes were written, and in which time.
    written: Result<(u64, Duration), CreateError>,
}

/// A snapshot that is over.
pub(crate) struct PreCopied {
    order: Order,
    result: Result<(), CreateError>,
}

impl Machine {
    /// Begins a snapshot that `call` asks for. A machine that is paused already needs no passes.
    pub(super) fn begin_pre_copy(&mut self, call: ApiCall, request: CreateSnapshot) {
        if self.state != VmState::Running {
            return call.answer(|_| {
                self.create_snapshot(&request)?;
                Ok(Answer::done())
            });
        }
        if self.saving {
            return call.answer(|_| Err(create_fault(&CreateError::Busy)));
        }
        let mut order = Order {
            call,
            request,
            begun: Instant::now(),
            taken: None,
        };
        match self.first_pass(&mut order) {
            Ok((writer, pages)) => {
                self.saving = true;
                self.spawn_pass(order, writer, pages, 1);
            }
            Err(error) => self.give_up(order, &error),
        }
    }

    /// The files, and the pages to begin with.
    fn first_pass(&mut self, order: &mut Order) -> Result<(Writer, PageSet), CreateError> {
        let writer = Writer::new(&order.request, &self.memory)?;
        // Before the pages are looked for: what is written from now on is for the next pass.
        self.tracker().start(Reader::PreCopy)?;
        if order.request.mem_file_path.is_some() {
            order.taken = self.tracker().take(Reader::Snapshot)?;
        }
        let diff = order.request.snapshot_type == SnapshotType::Diff;
        let pages = match order.taken.as_ref().filter(|_| diff) {
            Some(journal) => journal.clone(),
            None => pages_in_use(&self.memory, order.request.snapshot_type)?,
        };
        Ok((writer, pages))
    }

    fn spawn_pass(&mut self, order: Order, mut writer: Writer, pages: PageSet, number: u32) {
        let (sender, memory) = (self.sender.clone(), self.memory.clone());
        spawn(Box::new(move || {
            let written = write_pass(&mut writer, &memory, &pages, number);
            sender.send(Event::Copied(Box::new(Pass {
                order,
                writer,
                number,
                written,
            })));
        }));
    }

    /// Another pass, or the end.
    pub(crate) fn copied(&mut self, pass: Pass) {
        let Pass {
            order,
            mut writer,
            number,
            written,
        } = pass;
        if self.state == VmState::Stopped {
            // What is left of the machine is no machine.
            return self.give_up(order, &CreateError::Ended);
        }
        let next = written.and_then(|(bytes, time)| {
            let left = self.tracker().peek(Reader::PreCopy)?.unwrap_or_default();
            Ok(is_worth_a_pass(
                bytes,
                time,
                left.count() * PAGE_SIZE,
                number,
            ))
        });
        // What a page is now has to replace what it was in a pass.
        writer.overwrite();
        match next {
            Ok(true) => {
                let pages = self.tracker().take(Reader::PreCopy);
                match pages {
                    Ok(pages) => {
                        self.spawn_pass(order, writer, pages.unwrap_or_default(), number + 1);
                    }
                    Err(error) => self.give_up(order, &error.into()),
                }
            }
            Ok(false) => self.finish_pre_copy(order, writer, number),
            Err(error) => self.give_up(order, &error),
        }
    }

    fn finish_pre_copy(&mut self, mut order: Order, mut writer: Writer, passes: u32) {
        let running = self.state == VmState::Running;
        let paused = Instant::now();
        let state = self.write_last(&mut order, &mut writer, running);
        if running && self.state == VmState::Paused {
            // Paused by us, so it can go on.
            let _ = self.resume();
        }
        let pause = paused.elapsed();
        self.telemetry.times.snapshot_pause = pause;
        tracing::info!(
            "snapshot: {passes} passes, then a pause of {} us",
            pause.as_micros()
        );
        match state {
            Ok(state) => {
                let sender = self.sender.clone();
                spawn(Box::new(move || {
                    let result = writer.commit(&state);
                    sender.send(Event::Saved(Box::new(PreCopied { order, result })));
                }));
            }
            Err(error) => self.give_up(order, &error),
        }
    }

    fn write_last(
        &mut self,
        order: &mut Order,
        writer: &mut Writer,
        running: bool,
    ) -> Result<Vec<u8>, CreateError> {
        if running {
            self.pause()?;
        }
        writer.mark(&self.memory)?;
        let last = self.tracker().take(Reader::PreCopy)?.unwrap_or_default();
        if let Some(taken) = &mut order.taken
            && let Some(since) = self.tracker().take(Reader::Snapshot)?
        {
            taken.insert_all(&since);
        }
        writer.write(&self.memory, &last)?;
        writer.state_of(&self.paused_view())
    }

    /// The files have their names, or there are none.
    pub(crate) fn saved(&mut self, saved: PreCopied) {
        let PreCopied { order, result } = saved;
        match result {
            Ok(()) => {
                self.end_pre_copy();
                self.snapshot_is_made(&order.request, order.begun.elapsed());
                order.call.answer(|_| Ok(Answer::done()));
            }
            Err(error) => self.give_up(order, &error),
        }
    }

    fn give_up(&mut self, order: Order, error: &CreateError) {
        self.end_pre_copy();
        if let Some(taken) = &order.taken {
            self.tracker().put_back(Reader::Snapshot, taken);
        }
        order.call.answer(|_| Err(create_fault(error)));
    }

    fn end_pre_copy(&mut self) {
        self.saving = false;
        if let Err(error) = self.tracker().stop(Reader::PreCopy) {
            tracing::warn!("written pages go on being noted, which slows the guest: {error}");
        }
    }
}

fn write_pass(
    writer: &mut Writer,
    memory: &Arc<MachineMemory>,
    pages: &PageSet,
    number: u32,
) -> Result<(u64, Duration), CreateError> {
    let begun = Instant::now();
    let bytes = writer.write(memory, pages)?;
    let time = begun.elapsed();
    if number == 1 {
        // Most of it. The disk is not to be busy with it when the machine is paused.
        writer.sync()?;
    }
    Ok((bytes, time))
}

/// Whether writing what is left, of `left` bytes, should not be done in the pause yet.
fn is_worth_a_pass(written: u64, time: Duration, left: u64, number: u32) -> bool {
    let nanos = time.as_nanos().max(1);
    let predicted = u128::from(left) * nanos / u128::from(written.max(PAGE_SIZE));
    // The second pass has what was written while the first was being synced.
    let shrinks = number < 2 || u128::from(left) * 10 < u128::from(written) * 9;
    predicted > PAUSE_BUDGET.as_nanos() && shrinks && number < MAX_PASSES
}

/// What is to be done beside the machine.
type Work = Box<dyn FnOnce() + Send>;

/// Has `work` done beside the machine. Without a thread for it, it is done at once, and the machine
/// has to wait.
fn spawn(work: Work) {
    let shared = Arc::new(Mutex::new(Some(work)));
    let run = |work: &Mutex<Option<Work>>| {
        let work = work.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(work) = work {
            work();
        }
    };
    let work = shared.clone();
    let thread = thread::Builder::new()
        .name("snapshot".into())
        .spawn(move || run(&work));
    if thread.is_err() {
        run(&shared);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn passes_go_on_until_the_rest_is_small_or_no_smaller() {
        let mib = 1 << 20;
        // 100 MiB in 100 ms.
        assert!(is_worth_a_pass(100 * mib, 100 * MS, 50 * mib, 1));
        assert!(!is_worth_a_pass(100 * mib, 100 * MS, mib / 4, 1));
        assert!(is_worth_a_pass(100 * mib, 100 * MS, 200 * mib, 1));
        assert!(!is_worth_a_pass(100 * mib, 100 * MS, 99 * mib, 2));
        assert!(!is_worth_a_pass(100 * mib, 100 * MS, 50 * mib, MAX_PASSES));
        assert!(!is_worth_a_pass(0, Duration::ZERO, 0, 1));
    }
}
