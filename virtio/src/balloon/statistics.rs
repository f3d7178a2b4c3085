// SPDX-License-Identifier: Apache-2.0
//! What a guest tells about its memory (virtio 1.3, section 5.5.6.3).

/// How many statistics there are.
pub const STATISTICS: usize = 16;
/// Length in bytes of `struct virtio_balloon_stat`: a tag (le16) and a value (le64).
const ENTRY: usize = 10;
/// The most bytes of a buffer that are looked at.
pub(super) const MAX_LEN: usize = 256 * ENTRY;

/// The values that the guest has told last, by their tag: 0 to 9 as in the standard (swap in, swap
/// out, major faults, minor faults, free, total and available memory, disk caches, huge page
/// allocations and failures), 10 to 15 as in Linux since 6.12 (OOM kills, allocation stalls,
/// asynchronous and direct scans, asynchronous and direct reclaims). Memory is in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Each value; `None` as long as the guest has not told it.
    pub values: [Option<u64>; STATISTICS],
}

impl Statistics {
    /// Takes what is in a buffer. Tags that mean nothing are left out, as is an entry that is cut.
    pub(super) fn update(&mut self, buffer: &[u8]) {
        for entry in buffer.chunks_exact(ENTRY) {
            let Some((tag, value)) = entry.split_first_chunk::<2>() else {
                continue;
            };
            let tag = usize::from(u16::from_le_bytes(*tag));
            if let Some(slot) = self.values.get_mut(tag) {
                *slot = value.first_chunk().map(|value| u64::from_le_bytes(*value));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_tags_are_kept_and_others_left_out() {
        let mut statistics = Statistics::default();
        let mut buffer = Vec::new();
        for (tag, value) in [
            (4_u16, 7_u64),
            (15, u64::MAX),
            (16, 1),
            (u16::MAX, 2),
            (4, 8),
        ] {
            buffer.extend(tag.to_le_bytes());
            buffer.extend(value.to_le_bytes());
        }
        // The last one is cut.
        buffer.extend([5, 0, 1, 2, 3]);
        statistics.update(&buffer);
        let mut expected = Statistics::default();
        (expected.values[4], expected.values[15]) = (Some(8), Some(u64::MAX));
        assert_eq!(statistics, expected);
        // What the next buffer leaves out stays as it was.
        statistics.update(&[0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        expected.values[0] = Some(1);
        assert_eq!(statistics, expected);
    }
}
