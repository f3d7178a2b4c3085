// SPDX-License-Identifier: Apache-2.0
//! The test frames on the wire: Ethernet, type 0x88b5 (IEEE 802, local experimental).
//!
//! | bytes | what |
//! |---|---|
//! | 0..6 | destination MAC |
//! | 6..12 | source MAC |
//! | 12..14 | 0x88b5, big-endian |
//! | 14 | kind: [`DATA`] or [`STOP`] |
//! | 15 | 0 |
//! | 16..24 | sequence number, little-endian |
//! | 24.. | `pattern::fill(seed, sequence, 0)` |
//!
//! Pure: the host's tests include this file by `#[path]`, beside `pattern.rs`.

use super::pattern;

/// The Ethernet type.
pub const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
/// A frame that counts.
pub const DATA: u8 = 0;
/// The sender has ended.
pub const STOP: u8 = 1;
/// Length of all before the pattern.
pub const HEADER: usize = 24;
/// The shortest frame, without its checksum.
pub const MIN: usize = 60;
/// The longest frame at an MTU of 1500.
pub const MAX: usize = 1514;

/// Writes a frame that fills `to`, which has room for at least [`MIN`] bytes.
pub fn build(
    to: &mut [u8],
    destination: [u8; 6],
    source: [u8; 6],
    kind: u8,
    sequence: u64,
    seed: u64,
) {
    to[..6].copy_from_slice(&destination);
    to[6..12].copy_from_slice(&source);
    to[12..14].copy_from_slice(&ETHERTYPE);
    to[14] = kind;
    to[15] = 0;
    to[16..24].copy_from_slice(&sequence.to_le_bytes());
    pattern::fill(&mut to[HEADER..], seed, sequence, 0);
}

/// Kind and sequence number, if it is a test frame.
pub fn parse(frame: &[u8]) -> Option<(u8, u64)> {
    if frame.get(12..14)? != ETHERTYPE {
        return None;
    }
    Some((
        *frame.get(14)?,
        u64::from_le_bytes(frame.get(16..24)?.try_into().ok()?),
    ))
}

/// Whether all after the header is what [`build`] wrote.
pub fn intact(frame: &[u8], seed: u64) -> bool {
    match (parse(frame), frame.get(HEADER..)) {
        (Some((_, sequence)), Some(rest)) => pattern::matches(rest, seed, sequence, 0),
        _ => false,
    }
}

/// The length of frame `sequence` in `net-echo`: any from [`MIN`] to `max`, the two ends first.
pub fn length(seed: u64, sequence: u64, max: usize) -> usize {
    match sequence {
        0 => MIN,
        1 => max,
        _ => MIN + (pattern::mix(seed ^ pattern::mix(sequence)) % (max - MIN + 1) as u64) as usize,
    }
}

/// Exchanges destination and source.
pub fn turn_round(frame: &mut [u8]) {
    if let Some((destination, rest)) = frame.split_at_mut_checked(6)
        && let Some(source) = rest.get_mut(..6)
    {
        destination.swap_with_slice(source);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_read_as_it_was_built_and_turned_round() {
        let mut frame = [0; 100];
        build(&mut frame, [1; 6], [2; 6], DATA, 77, 5);
        assert_eq!(parse(&frame), Some((DATA, 77)));
        turn_round(&mut frame);
        assert_eq!((frame[0], frame[6]), (2, 1));
        assert!(intact(&frame, 5));
        assert!(!intact(&frame, 6));
        frame[99] ^= 1;
        assert!(!intact(&frame, 5));
    }

    #[test]
    fn short_and_foreign_frames_are_none_of_ours() {
        assert_eq!(parse(&[0; 60]), None);
        assert_eq!(parse(&[]), None);
        assert!(!intact(&[], 1));
        turn_round(&mut []);
    }

    #[test]
    fn lengths_reach_both_ends_and_no_further() {
        let lengths = || (0..1000).map(|sequence| length(3, sequence, MAX));
        assert_eq!(lengths().min(), Some(MIN));
        assert_eq!(lengths().max(), Some(MAX));
    }
}
