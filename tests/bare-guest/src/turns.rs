// SPDX-License-Identifier: Apache-2.0
//! How a loop gets on, by the guest's own clock: its turns, and the longest of them.
//!
//! A turn that took long is one in which the machine stood still, or was slowed down. What the loop
//! does on purpose, such as answering, is put aside by [`Turns::rested`].

use crate::clock;

/// The turns of one loop.
pub struct Turns {
    /// All of them.
    count: u64,
    /// When the last began, in ticks of the clock.
    begun: u64,
    longest: Longest,
    since: Since,
}

/// The longest turn since it was asked for.
#[derive(Clone, Copy, Default)]
pub struct Longest {
    /// How long it took, in ticks of the clock.
    pub ticks: u64,
    /// The number of the turn that ended it.
    pub turn: u64,
}

/// What was done since it was asked for.
#[derive(Clone, Copy, Default)]
struct Since {
    turn: u64,
    pages: u64,
    begun: u64,
    /// Ticks that do not count.
    rested: u64,
}

/// A piece of the loop's time.
pub struct Lap {
    /// Turns in it.
    pub turns: u64,
    /// Pages written in it.
    pub pages: u64,
    /// How long it was without answers, in nanoseconds.
    pub ns: u64,
}

impl Turns {
    /// Those of a loop that is about to begin.
    pub fn new() -> Self {
        let begun = clock::now();
        let since = Since {
            begun,
            ..Since::default()
        };
        Self {
            count: 0,
            begun,
            longest: Longest::default(),
            since,
        }
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// A turn begins at `now`.
    pub fn next(&mut self, now: u64) {
        self.count += 1;
        // A counter that went back is one that was set anew.
        let ticks = now.saturating_sub(self.begun);
        if ticks > self.longest.ticks {
            self.longest = Longest {
                ticks,
                turn: self.count,
            };
        }
        self.begun = now;
    }

    /// What was done in this turn from `start` until now does not count.
    pub fn rested(&mut self, start: u64) {
        self.begun = clock::now();
        self.since.rested += self.begun.saturating_sub(start);
    }

    /// The longest turn since the last call.
    pub fn take_longest(&mut self) -> Longest {
        core::mem::take(&mut self.longest)
    }

    /// What was done since the last call, when `pages` is how many have been written in all. The
    /// rest of this turn belongs to neither.
    pub fn take_lap(&mut self, now: u64, pages: u64) -> Lap {
        let ticks = now.saturating_sub(self.since.begun);
        let lap = Lap {
            turns: self.count - self.since.turn,
            pages: pages - self.since.pages,
            ns: clock::ns(ticks.saturating_sub(self.since.rested)),
        };
        self.since = Since {
            turn: self.count,
            pages,
            begun: now,
            rested: 0,
        };
        lap
    }
}
