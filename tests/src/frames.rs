// SPDX-License-Identifier: Apache-2.0
//! The frames of a migration as somebody between its two sides sees them, and as somebody writes
//! them who only says to be brume.

use std::mem;
use std::ops::Range;

/// The size of a header in bytes.
const HEADER: usize = 32;
const MAGIC: &[u8] = b"BRMG";
/// The kind of a frame that is a message.
const MESSAGE: u8 = 0;
/// What the other kinds are, from the next one on.
const KINDS: [&str; 5] = ["Pages", "State", "Missing", "Need", "Disk"];
/// How much of a message is looked at; its name comes first.
const LOOK: usize = 64;

/// Follows the frames that go one way.
#[derive(Default)]
pub struct Frames {
    /// What has come and was not handed on.
    held: Vec<u8>,
    /// How much is left of the present frame.
    left: u64,
    /// Whether something has come that is no frame.
    lost: bool,
}

impl Frames {
    /// What may be handed on now that `bytes` have come, which are none at the end; and the
    /// frames that begin in it, each with its name, which is that of a message or its kind, and its
    /// range.
    pub fn take(&mut self, bytes: &[u8]) -> (Vec<u8>, Vec<(String, Range<u64>)>) {
        self.held.extend_from_slice(bytes);
        let mut frames = Vec::new();
        let mut at = 0;
        while !self.lost && !bytes.is_empty() && at < self.held.len() {
            let rest = self.held.get(at..).unwrap_or_default();
            if self.left > 0 {
                let step = rest
                    .len()
                    .min(usize::try_from(self.left).unwrap_or(usize::MAX));
                self.left -= step as u64;
                at += step;
                continue;
            }
            let Some((header, payload)) = rest.split_at_checked(HEADER) else {
                self.lost = !MAGIC.starts_with(rest.get(..4).unwrap_or(rest));
                break;
            };
            self.lost = !header.starts_with(MAGIC);
            let length = length_of(header);
            let name = match header.get(4) {
                Some(&MESSAGE) => {
                    let Some(text) = payload.get(..length.min(LOOK)) else {
                        break;
                    };
                    name_of(text)
                }
                Some(&kind) => KINDS
                    .get(usize::from(kind) - 1)
                    .map(|&name| name.to_owned()),
                None => None,
            };
            let range = at as u64..(at + HEADER + length) as u64;
            frames.extend(name.map(|name| (name, range)));
            self.left = (HEADER + length) as u64;
        }
        let rest = if self.lost || bytes.is_empty() {
            Vec::new()
        } else {
            self.held.split_off(at)
        };
        (mem::replace(&mut self.held, rest), frames)
    }
}

fn length_of(header: &[u8]) -> usize {
    let bytes = header.get(8..12).and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, |bytes| u32::from_le_bytes(bytes) as usize)
}

fn name_of(text: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(text);
    let name = text.strip_prefix("{\"message\":\"")?.split('"').next()?;
    Some(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend([kind, 0, 0, 0]);
        bytes.extend(u32::try_from(payload.len()).unwrap().to_le_bytes());
        bytes.extend([0; 20]);
        bytes.extend(payload);
        bytes
    }

    #[test]
    fn frames_are_found_wherever_the_bytes_are_parted() {
        let pages = frame(1, &[b'{'; 300]);
        let sent = frame(
            0,
            br#"{"message":"Sent","paused_us":5,"unix_ns":1234567890123456789}"#,
        );
        let commit = frame(0, br#"{"message":"Commit"}"#);
        let all = [&*pages, &sent, &commit].concat();
        for part in [1, 7, 33, 100, 10_000] {
            let mut frames = Frames::default();
            let (mut out, mut found) = (Vec::new(), Vec::new());
            for bytes in all.chunks(part).chain([&[][..]]) {
                let (more, named) = frames.take(bytes);
                let begin = out.len() as u64;
                let place = |range: Range<u64>| range.start + begin..range.end + begin;
                found.extend(named.into_iter().map(|(name, range)| (name, place(range))));
                out.extend(more);
            }
            assert_eq!(out, all, "{part}");
            let [first, second] = [pages.len(), pages.len() + sent.len()].map(|at| at as u64);
            let expected = [
                ("Pages".to_owned(), 0..first),
                ("Sent".to_owned(), first..second),
                ("Commit".to_owned(), second..all.len() as u64),
            ];
            assert_eq!(found, expected, "{part}");
        }
    }

    #[test]
    fn what_is_no_frame_is_handed_on_at_once() {
        let mut frames = Frames::default();
        assert_eq!(frames.take(b"hello").0, b"hello");
        assert_eq!(frames.take(b"BR").0, b"BR");
    }
}
