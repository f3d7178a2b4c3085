// SPDX-License-Identifier: Apache-2.0
//! Pieces of guest memory that are to be given back, merged before they are: a system call per
//! range instead of one per page, and no byte twice however often the guest names it.

/// A list of address ranges, in bytes. It holds what one descriptor chain names at most.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    /// Start, and the address behind the end.
    list: Vec<(u64, u64)>,
}

impl Ranges {
    pub(super) fn clear(&mut self) {
        self.list.clear();
    }

    /// Adds `len` bytes from `start`; what would be behind the end of the address space is cut.
    pub(super) fn push(&mut self, start: u64, len: u64) {
        let end = start.saturating_add(len);
        if end > start {
            self.list.push((start, end));
        }
    }

    /// Sorts the ranges and joins those that touch or overlap.
    pub(super) fn merge(&mut self) {
        self.list.sort_unstable();
        self.list.dedup_by(|next, kept| {
            let joined = next.0 <= kept.1;
            if joined {
                kept.1 = kept.1.max(next.1);
            }
            joined
        });
    }

    /// Start of each range, and the address behind its end.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        self.list.iter().copied()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn merged(pieces: &[(u64, u64)]) -> Vec<(u64, u64)> {
        let mut ranges = Ranges::default();
        for &(start, len) in pieces {
            ranges.push(start, len);
        }
        ranges.merge();
        ranges.iter().collect()
    }

    #[test]
    fn what_touches_or_overlaps_becomes_one() {
        for (pieces, expected) in [
            (&[][..], &[][..]),
            (&[(8, 4), (0, 4), (4, 4)], &[(0, 12)]),
            (&[(0, 4), (0, 4), (0, 4)], &[(0, 4)]),
            (&[(0, 100), (10, 5), (100, 1)], &[(0, 101)]),
            (&[(0, 4), (5, 4)], &[(0, 4), (5, 9)]),
            (&[(7, 0)], &[]),
            (&[(u64::MAX - 1, 100)], &[(u64::MAX - 1, u64::MAX)]),
        ] {
            assert_eq!(merged(pieces), expected, "{pieces:?}");
        }
    }

    proptest! {
        #[test]
        fn exactly_the_same_addresses_are_covered(
            pieces in prop::collection::vec((0_u64..200, 0_u64..20), 0..40)
        ) {
            let result = merged(&pieces);
            for address in 0..240 {
                let named = pieces.iter().any(|&(start, len)| (start..start + len).contains(&address));
                let kept = result.iter().filter(|&&(start, end)| (start..end).contains(&address));
                prop_assert_eq!(kept.count(), usize::from(named));
            }
            prop_assert!(result.iter().zip(result.iter().skip(1)).all(|(a, b)| a.1 < b.0));
        }
    }
}
