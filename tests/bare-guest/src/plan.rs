// SPDX-License-Identifier: Apache-2.0
//! The requests of `blk-check` and what the disk must hold after them.
//!
//! Pure: the host's tests include this file by `#[path]`, beside `rng.rs` and `pattern.rs`, to know
//! what must be in the image file.

use super::rng::Rng;

/// One request; sectors count from the start of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Read `count` sectors.
    Read {
        /// The first.
        sector: u64,
        /// How many.
        count: u64,
    },
    /// Write `count` sectors, each in its next generation.
    Write {
        /// The first.
        sector: u64,
        /// How many.
        count: u64,
    },
    /// Flush.
    Flush,
}

/// The requests that follow from a seed: half reads, half writes, now and then a flush; sizes from
/// one sector to `max`, small ones more often.
#[derive(Clone, Debug)]
pub struct Plan {
    rng: Rng,
    window: u64,
    max: u64,
    left: u64,
}

impl Plan {
    /// `ops` requests within the first `window` sectors, of at most `max` sectors each.
    pub fn new(seed: u64, window: u64, max: u64, ops: u64) -> Self {
        Self {
            rng: Rng::new(seed),
            window,
            max: max.clamp(1, window.max(1)),
            left: ops,
        }
    }
}

impl Iterator for Plan {
    type Item = Op;

    fn next(&mut self) -> Option<Op> {
        self.left = self.left.checked_sub(1)?;
        let kind = self.rng.below(64);
        let scale = self.rng.below(u64::from(self.max.ilog2()) + 1);
        let count = (1 + self.rng.below(2 << scale)).min(self.max);
        let sector = self.rng.below(self.window - count + 1);
        Some(match kind {
            0 => Op::Flush,
            1..=31 => Op::Read { sector, count },
            _ => Op::Write { sector, count },
        })
    }
}

/// Sets each sector's generation to what it is after the whole plan: 1 from the first filling, and
/// one more for each write that covers it.
pub fn generations(plan: Plan, of: &mut [u32]) {
    of.fill(1);
    for op in plan {
        advance(of, op);
    }
}

/// Counts a write into the generations.
pub fn advance(of: &mut [u32], op: Op) {
    if let Op::Write { sector, count } = op {
        for generation in of.iter_mut().skip(sector as usize).take(count as usize) {
            *generation += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_lies_in_the_window() {
        for (window, max) in [(1, 1), (2, 256), (1000, 256), (32768, 1)] {
            let plan = Plan::new(5, window, max, 5000);
            assert_eq!(plan.clone().count(), 5000);
            for op in plan {
                if let Op::Read { sector, count } | Op::Write { sector, count } = op {
                    assert!((1..=max).contains(&count), "{op:?}");
                    assert!(sector + count <= window, "{op:?}");
                }
            }
        }
    }

    #[test]
    fn the_plan_has_all_kinds_and_all_sizes() {
        let ops = || Plan::new(1, 32768, 256, 5000);
        let sized = |n| ops().any(|op| matches!(op, Op::Write { count, .. } if count == n));
        assert!(sized(1) && sized(256));
        assert!(ops().any(|op| op == Op::Flush));
        assert!(ops().any(|op| matches!(op, Op::Read { .. })));
    }

    #[test]
    fn a_write_raises_the_generation_of_its_sectors_alone() {
        let mut generations = [1; 4];
        advance(
            &mut generations,
            Op::Write {
                sector: 1,
                count: 2,
            },
        );
        advance(
            &mut generations,
            Op::Read {
                sector: 0,
                count: 4,
            },
        );
        assert_eq!(generations, [1, 2, 2, 1]);
    }
}
