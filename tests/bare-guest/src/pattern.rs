// SPDX-License-Identifier: Apache-2.0
//! What every byte must be: the pattern of a sector or of a frame, from a seed.
//!
//! Pure: the host's tests include this file by `#[path]`, so both sides reckon the same.

/// Bytes in a sector.
pub const SECTOR: usize = 512;

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finaliser of splitmix64.
pub const fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Fills `to` with the bytes of `place` (a sector or sequence number) in its `generation`-th
/// writing.
///
/// With `base = mix(seed ^ mix(place ^ mix(generation)))`, the 64-bit little-endian word number `i`
/// is `mix(base + (i + 1) * GOLDEN)`; a last, shorter word is cut.
pub fn fill(to: &mut [u8], seed: u64, place: u64, generation: u64) {
    let mut state = mix(seed ^ mix(place ^ mix(generation)));
    for word in to.chunks_mut(8) {
        state = state.wrapping_add(GOLDEN);
        word.copy_from_slice(&mix(state).to_le_bytes()[..word.len()]);
    }
}

/// Whether `bytes` are what [`fill`] would have written.
pub fn matches(bytes: &[u8], seed: u64, place: u64, generation: u64) -> bool {
    let mut state = mix(seed ^ mix(place ^ mix(generation)));
    bytes.chunks(8).all(|word| {
        state = state.wrapping_add(GOLDEN);
        word == &mix(state).to_le_bytes()[..word.len()]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pins the function: a disk written by one version must be readable by another.
    #[test]
    fn the_first_words_of_a_sector_are_these() {
        let mut sector = [0; 16];
        fill(&mut sector, 1, 2, 3);
        let base = mix(1 ^ mix(2 ^ mix(3)));
        assert_eq!(sector[..8], mix(base.wrapping_add(GOLDEN)).to_le_bytes());
        assert_eq!(
            sector[8..],
            mix(base.wrapping_add(GOLDEN.wrapping_mul(2))).to_le_bytes()
        );
        assert_eq!(mix(1), 0x5692_161d_100b_05e5);
    }

    #[test]
    fn a_short_last_word_is_cut() {
        let (mut long, mut short) = ([0; 24], [0; 21]);
        fill(&mut long, 7, 8, 9);
        fill(&mut short, 7, 8, 9);
        assert_eq!(long[..21], short);
        assert!(matches(&short, 7, 8, 9));
    }

    #[test]
    fn seed_place_and_generation_all_matter() {
        let mut sector = [0; SECTOR];
        fill(&mut sector, 1, 1, 1);
        for (seed, place, generation) in [(2, 1, 1), (1, 2, 1), (1, 1, 2)] {
            assert!(!matches(&sector, seed, place, generation));
        }
        sector[511] ^= 1;
        assert!(!matches(&sector, 1, 1, 1));
    }
}
