// SPDX-License-Identifier: Apache-2.0
//! The source after its guest has gone on at the target: it sends what is left of the memory.
//!
//! Two threads send: `migration` goes over the pages one after the other, and `migration faults`
//! answers what the guest waits for, on a connection of its own, with the pages that follow it.
//! Where the guest waits, the first one goes on too. They share [`Left`], whose lock is held for a
//! few words.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use brume_migration::{Channel, ChannelError, Closer, Message, Purpose, Received, Zeros};

use super::error::SourceError;
use super::lanes::{BATCH_PAGES, Lane, LaneError};
use super::route::Route;
use super::status::Progress;
use crate::memory::MachineMemory;
use crate::page_set::PageSet;

/// How many pages are sent for one that the guest waits for.
const AHEAD: u64 = 16;
/// How long the target may take to say that it has everything.
const COMPLETE_LIMIT: Duration = Duration::from_secs(10);
/// How long it may take if what was sent has come.
const COMPLETE_SOON: Duration = Duration::from_secs(1);
/// How often it is looked at what else has happened.
const LOOK: Duration = Duration::from_millis(100);
/// How long nothing may move.
const STALL_LIMIT: Duration = Duration::from_secs(10);

/// What was not sent yet.
pub(super) struct Left {
    state: Mutex<State>,
    /// The page after the last one of each region.
    ends: Vec<u64>,
}

struct State {
    pages: PageSet,
    /// Where to go on.
    next: u64,
    /// Whether pages that are not left may not have come.
    is_doubted: bool,
}

impl State {
    fn of(pages: PageSet) -> Self {
        Self {
            pages,
            next: 0,
            is_doubted: false,
        }
    }
}

impl Left {
    /// `pages` of a memory whose regions end before the pages `ends`.
    pub(super) fn new(pages: PageSet, ends: Vec<u64>) -> Self {
        Self {
            state: Mutex::new(State::of(pages)),
            ends,
        }
    }

    /// The end of the region that has `page`.
    fn end_after(&self, page: u64) -> u64 {
        let mut ends = self.ends.iter().copied();
        ends.find(|&end| page < end).unwrap_or(page)
    }

    /// What is left, as words of a bitmap.
    pub(super) fn words(&self) -> Vec<u64> {
        self.lock().pages.clone().into_words()
    }

    /// How many pages are left.
    fn count(&self) -> u64 {
        self.lock().pages.count()
    }

    /// Exchanges what is left.
    fn replace(&self, pages: PageSet) {
        *self.lock() = State::of(pages);
    }

    /// A connection that carried pages has broken.
    fn doubt(&self) {
        self.lock().is_doubted = true;
    }

    /// Goes on as long as all pages that are not left have come, as far as is known.
    fn trust(&self) -> Result<(), SourceError> {
        match self.lock().is_doubted {
            true => Err(SourceError::FollowsAnew),
            false => Ok(()),
        }
    }

    /// The next pages to send, which are left no more.
    fn take(&self) -> Option<Range<u64>> {
        let mut state = self.lock();
        let from = state.next;
        let after = state.pages.first_from(from);
        let range = after.or_else(|| state.pages.first_from(0))?;
        let most = self.end_after(range.start).min(range.start + BATCH_PAGES);
        let range = range.start..range.end.min(most);
        state.next = range.end;
        for page in range.clone() {
            state.pages.remove(page);
        }
        Some(range)
    }

    /// A page that is waited for, and those after it that are left; the stream goes on there.
    fn take_at(&self, page: u64) -> Range<u64> {
        let mut state = self.lock();
        state.next = page;
        let most = self.end_after(page).min(page.saturating_add(AHEAD));
        let mut end = page.saturating_add(1);
        while end < most && state.pages.contains(end) {
            end += 1;
        }
        for page in page..end {
            state.pages.remove(page);
        }
        page..end
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread that answers what the guest waits for.
pub(super) struct Faults {
    closer: Closer,
    thread: Option<JoinHandle<()>>,
}

impl Faults {
    /// Makes the connection that the target is to ask on.
    ///
    /// # Errors
    ///
    /// The target does not take it.
    pub(super) fn connect(route: &Route) -> Result<Channel, SourceError> {
        let mut channel = route.open(STALL_LIMIT)?;
        channel.greet(&route.session, Purpose::Faults)?;
        Ok(channel)
    }

    /// Answers on `lane`, which was made before: the guest may stand still now.
    ///
    /// # Errors
    ///
    /// The host gives no thread.
    pub(super) fn serve(
        mut lane: Lane,
        left: &Arc<Left>,
        progress: &Progress,
    ) -> Result<Self, SourceError> {
        let closer = lane.channel.closer()?;
        let (left, progress) = (left.clone(), progress.clone());
        let answer = move || {
            if let Err(error) = answer(&mut lane, &left, &progress) {
                tracing::debug!("the target asks for no more pages: {error}");
                // What was on its way may be lost; only the target knows.
                left.doubt();
            }
        };
        let thread = thread::Builder::new()
            .name("migration faults".into())
            .spawn(answer)
            .map_err(SourceError::Thread)?;
        Ok(Self {
            closer,
            thread: Some(thread),
        })
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        self.closer.close();
        if let Some(thread) = self.thread.take() {
            // A panic has been reported by the thread itself.
            let _ = thread.join();
        }
    }
}

fn answer(lane: &mut Lane, left: &Left, progress: &Progress) -> Result<(), LaneError> {
    loop {
        // The target asks when its guest waits, which may be never again.
        if !lane.channel.wait(Duration::from_secs(3600))? {
            continue;
        }
        match lane.channel.receive()? {
            Received::Need { first, pages: 1 } => {
                let pages = left.take_at(first);
                let amount = lane.send_at_once(&[pages])?;
                progress.sent(amount);
                progress.update(|status| status.faults += 1);
                lane.learn();
            }
            Received::Message(Message::KeepAlive) => {}
            _ => {
                return Err(ChannelError::OutOfTurn("something else than a need of pages").into());
            }
        }
    }
}

/// Sends all that is left over `lane`, and waits until the target has everything.
///
/// # Errors
///
/// The connection broke; what the target lacks then has to be asked from it.
pub(super) fn stream(lane: &mut Lane, left: &Left, progress: &Progress) -> Result<(), SourceError> {
    while let Some(range) = left.take() {
        left.trust()?;
        let amount = lane.send(std::slice::from_ref(&range), Zeros::Told)?;
        progress.sent(amount);
        let left = left.count();
        progress.update(|status| status.remaining_pages = left);
    }
    lane.channel.send(&Message::MemorySent)?;
    lane.channel.set_limit(COMPLETE_LIMIT)?;
    let begun = Instant::now();
    loop {
        if !lane.channel.wait(LOOK)? {
            let time = begun.elapsed();
            // A target that has everything asks for no more either, and says so.
            if time >= COMPLETE_SOON {
                left.trust()?;
            }
            if time >= COMPLETE_LIMIT {
                return Err(SourceError::Silent);
            }
            continue;
        }
        match lane.channel.receive_message()? {
            Message::Complete => return Ok(()),
            // It lives, and wants another connection.
            Message::Standing(_) => return Err(SourceError::FollowsAnew),
            Message::Running { .. } | Message::KeepAlive | Message::TakenOver => {}
            _ => return Err(super::source::out_of_turn()),
        }
    }
}

/// What a target that was found again lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lacks {
    /// It has everything.
    Nothing,
    /// Pages.
    Pages,
}

/// Hears from a target that was found again what it lacks.
///
/// # Errors
///
/// It does not tell.
pub(super) fn hear_missing(
    channel: &mut Channel,
    left: &Left,
    memory: &MachineMemory,
) -> Result<Lacks, SourceError> {
    let mut pages = PageSet::empty(memory.size);
    let words = pages.words_len();
    let mut come = 0;
    while come < words {
        match channel.receive()? {
            Received::Message(Message::Complete) => return Ok(Lacks::Nothing),
            Received::Missing { first_word, bytes } => {
                let part = words_of(bytes);
                let first = usize::try_from(first_word).unwrap_or(usize::MAX);
                if first != come || part.is_empty() || come + part.len() > words {
                    return Err(super::source::out_of_turn());
                }
                come += part.len();
                pages.insert_words(first, &part);
            }
            Received::Message(Message::KeepAlive | Message::TakenOver) => {}
            _ => return Err(super::source::out_of_turn()),
        }
    }
    left.replace(pages);
    Ok(Lacks::Pages)
}

/// Words of a bitmap as they are on the wire.
pub(super) fn words_of(bytes: &[u8]) -> Vec<u64> {
    let words = bytes.chunks_exact(8);
    words
        .map(|word| word.try_into().map_or(0, u64::from_le_bytes))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page_set::PAGE_SIZE;

    #[test]
    fn each_page_is_sent_once_and_what_is_waited_for_comes_first() {
        let mut pages = PageSet::empty(1024 * PAGE_SIZE);
        pages.insert_range(0..300);
        pages.insert_range(600..610);
        let left = Left::new(pages, vec![604, 1024]);
        assert_eq!(left.take(), Some(0..128));
        assert_eq!(left.take_at(601), 601..604);
        // The stream goes on where the guest is, and comes back to the rest.
        assert_eq!(left.take(), Some(604..610));
        assert_eq!(left.take(), Some(128..256));
        assert_eq!(left.take_at(5), 5..6);
        assert_eq!(left.take(), Some(256..300));
        assert_eq!(left.take(), Some(600..601));
        assert_eq!(left.take(), None);
        assert_eq!(left.count(), 0);
    }

    #[test]
    fn words_come_as_they_were_sent() {
        assert_eq!(
            words_of(&[1, 0, 0, 0, 0, 0, 0, 0x80]),
            [0x8000_0000_0000_0001]
        );
    }
}
