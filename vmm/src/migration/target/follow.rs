// SPDX-License-Identifier: Apache-2.0
//! A machine that has come before its memory: what follows is taken, as often as that takes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use brume_api::{MigrationPhase, with_causes};
use brume_migration::{Message, Purpose, Received, Standing, TargetEvent};

use super::super::following;
use super::Failure;
use super::arrival::{Arrival, OTHERS_LIMIT, STALL_LIMIT, let_in, out_of_turn};
use super::errand::send_away;
use crate::memory::{Filling, Following, UffdError};

/// How long nothing may come of the memory that follows. The source looks for another way before, and
/// the guest may be waiting.
const SILENCE_LIMIT: Duration = Duration::from_secs(15);

impl Arrival<'_> {
    /// Lets the guest wait for what is to follow, if something is.
    pub(super) fn begin_to_follow(&mut self, filling: &Filling) -> Result<(), Failure> {
        let Some(missing) = self.missing.take() else {
            filling.settle();
            return filling.is_whole().then_some(()).ok_or_else(out_of_turn);
        };
        let following = Following::begin(filling, missing);
        let following = Arc::new(following.map_err(|error| Failure(with_causes(&error)))?);
        let progress = self.reception.progress.clone();
        let left = following.left();
        progress.update(|status| status.remaining_pages = left);
        following::start(following.clone(), self.handset.clone(), progress)
            .map_err(|error| Failure(with_causes(&UffdError::Thread(error))))?;
        self.following = Some(following);
        Ok(())
    }

    /// Takes what follows, as often as that takes.
    pub(super) fn follow(&mut self) {
        let Some(following) = self.following.clone() else {
            return;
        };
        let progress = &self.reception.progress;
        while let Err(Failure(why)) = self.take_rest(&following) {
            tracing::warn!("the rest of the memory is held up: {why}");
            progress.update(|status| status.error = Some(why));
            progress.enter(MigrationPhase::PostCopyInterrupted);
            if let Some(mut channel) = self.channel.take() {
                // That this end of it is no end of the guest.
                let _ = channel.send(&Message::Standing(Standing::HasTakenOver));
            }
            while self.channel.is_none() {
                if let Err(Failure(why)) = self.let_return(&following) {
                    tracing::warn!("the source is not found again: {why}");
                    self.channel = None;
                }
            }
            progress.update(|status| status.error = None);
            progress.enter(MigrationPhase::PostCopy);
        }
        progress.enter(MigrationPhase::Completed);
    }

    fn take_rest(&mut self, following: &Following) -> Result<(), Failure> {
        let progress = &self.reception.progress;
        let Some(channel) = &mut self.channel else {
            return Err(Failure("there is no connection".into()));
        };
        channel.set_limit(SILENCE_LIMIT)?;
        loop {
            match channel.receive()? {
                Received::Pages(pages) => following::give(following, pages, progress)
                    .map_err(|error| Failure(error.to_string()))?,
                Received::Message(Message::MemorySent) => break,
                Received::Message(Message::KeepAlive | Message::Commit) => {}
                _ => return Err(out_of_turn()),
            }
        }
        if !following.wait_complete(STALL_LIMIT) {
            return Err(Failure("the source has not sent all pages".into()));
        }
        following
            .end()
            .map_err(|error| Failure(error.to_string()))?;
        self.step(TargetEvent::MemoryComplete);
        Ok(())
    }

    /// Waits for the source to come back, and tells it what is missing. It may come more than once:
    /// what it has waited for in vain before is met first.
    fn let_return(&mut self, following: &Following) -> Result<(), Failure> {
        let mut end = Instant::now();
        loop {
            match self.meet() {
                Some((mut channel, hello)) if hello.purpose == Purpose::Return => {
                    let_in(&mut channel, &hello)?;
                    self.channel = Some(channel);
                    self.has_returned = true;
                    self.step(TargetEvent::Returned);
                    let Some(channel) = &mut self.channel else {
                        continue;
                    };
                    channel.send_missing(&following.words())?;
                    end = Instant::now() + OTHERS_LIMIT;
                }
                Some((mut faults, hello))
                    if hello.purpose == Purpose::Faults && self.channel.is_some() =>
                {
                    let_in(&mut faults, &hello)?;
                    self.handset.give(faults);
                    return Ok(());
                }
                Some((mut other, _)) => send_away(&mut other),
                None if self.channel.is_none() => return Ok(()),
                None if Instant::now() >= end => {
                    return Err(Failure("not all connections have come back".into()));
                }
                None => {}
            }
        }
    }
}
