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
