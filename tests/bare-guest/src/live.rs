// SPDX-License-Identifier: Apache-2.0
//! A guest that goes on for ever and tells how it is: what snapshots, clones and the read-out of
//! dirty pages are tried on.

use crate::area::Area;
use crate::boot_info::BootInfo;
use crate::console::{self, say};
use crate::generation::Pages;
use crate::turns::Turns;
use crate::{clock, end, params};

const PAGES_PER_MIB: u64 = 256;
const PAGE_BYTES: u64 = 4096;
/// Of how many pages `z` empties one.
const ZEROED: u64 = 4;
/// A guest that is later than this with its writes has stood still, and does not make up for it.
const LATE_MS: u64 = 10;

/// Fills its memory, then writes to it and answers the host until that says `p`.
pub fn run(boot: &BootInfo) {
    let touch = params::number("bare.touch", 1) * PAGES_PER_MIB;
    let pages = params::number("bare.area", touch / PAGES_PER_MIB) * PAGES_PER_MIB;
    let mut live = Live {
        area: Area::new(&boot.memory, pages.max(1), params::number("bare.seed", 1)),
        machine: Pages::new(),
        pace: Pace::new(),
        next: 0,
        writes: 0,
        turns: Turns::new(),
    };
    (0..touch.min(pages)).for_each(|page| live.area.write(page));
    say!("live ready");
    live.answer_for_ever();
}

struct Live {
    area: Area,
    machine: Pages,
    pace: Pace,
    /// The page to be written next.
    next: u64,
    /// Pages written since `live ready`.
    writes: u64,
    turns: Turns,
}

impl Live {
    fn answer_for_ever(&mut self) {
        let interval = clock::ms(1) * params::number("bare.poll_us", 200) / 1000;
        let beat = params::number("bare.beat", 0) != 0;
        let mut polled = clock::now();
        self.turns = Turns::new();
        loop {
            if self.pace.is_due() {
                self.write_next();
            }
            let now = clock::now();
            self.turns.next(now);
            if now.wrapping_sub(polled) < interval {
                continue;
            }
            if beat {
                console::beat();
            }
            // One at a time: who asked before sees the turn counted when it asks again.
            if let Some(command) = console::read_byte() {
                let start = clock::now();
                self.answer(command);
                self.turns.rested(start);
            }
            polled = clock::now();
        }
    }

    fn write_next(&mut self) {
        self.area.write(self.next);
        self.next = (self.next + 1) % self.area.pages();
        self.writes += 1;
    }

    fn answer(&mut self, command: u8) {
        match command {
            b'?' => self.tell(),
            b'h' => match self.area.hash() {
                (hash, None) => say!("hash {hash:016x} ok"),
                (hash, Some(page)) => say!("hash {hash:016x} BAD page {page}"),
            },
            b'w' => {
                let start = clock::now();
                (0..self.area.pages()).for_each(|_| self.write_next());
                let ticks = clock::now().wrapping_sub(start);
                say!("wrote {} ns={}", self.area.pages(), clock::ns(ticks));
            }
            b'z' => {
                let zeroed = (0..self.area.pages()).step_by(ZEROED as usize);
                let count = zeroed.map(|page| self.area.zero(page)).count();
                say!("zeroed {count}");
            }
            b'g' => say!("gap ns={}", clock::ns(self.turns.take_longest().ticks)),
            b'd' => {
                let lap = self.turns.take_lap(clock::now(), self.writes);
                let longest = self.turns.take_longest();
                say!(
                    "gap max_us={} at tick={} turns={} pages={} us={}",
                    clock::ns(longest.ticks) / 1000,
                    longest.turn,
                    lap.turns,
                    lap.pages,
                    lap.ns / 1000
                );
            }
            b'p' => end::power_off(),
            _ => {}
        }
    }

    fn tell(&self) {
        let (disruption, generation) = self.machine.clock().unwrap_or_default();
        say!(
            "alive tick={} writes={} gen={} disruption={disruption} generation={generation} tsc={}",
            self.turns.count(),
            self.writes,
            self.machine.id(),
            clock::now()
        );
    }
}

/// When a page is to be written: `bare.rate` is a number of megabytes a second, or `max`.
enum Pace {
    Never,
    Always,
    Every { ticks: u64, next: u64 },
}

impl Pace {
    fn new() -> Self {
        match params::text("bare.rate") {
            Some("max") => Self::Always,
            _ => match params::number("bare.rate", 0) {
                0 => Self::Never,
                rate => Self::Every {
                    ticks: clock::ms(1000) * PAGE_BYTES / (rate * 1_000_000),
                    next: clock::now(),
                },
            },
        }
    }

    fn is_due(&mut self) -> bool {
        match self {
            Self::Never => false,
            Self::Always => true,
            Self::Every { ticks, next } => {
                let late = clock::now().wrapping_sub(*next).cast_signed();
                if late.unsigned_abs() > clock::ms(LATE_MS) {
                    *next = clock::now();
                }
                let due = late >= 0;
                if due {
                    *next += *ticks;
                }
                due
            }
        }
    }
}
