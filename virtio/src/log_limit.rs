// SPDX-License-Identifier: Apache-2.0
//! Keeps a guest from filling the log. One limit serves a device for all its life, since a guest can
//! reset the device as often as it likes.

use std::time::{Duration, Instant};

/// Between two messages of one device.
const PAUSE: Duration = Duration::from_secs(5);

/// Decides which messages are written.
#[derive(Debug, Default)]
pub(crate) struct LogLimit {
    last: Option<Instant>,
    held_back: u64,
}

impl LogLimit {
    /// Whether a message may be written at `now`: how many were held back since the last, if so.
    pub(crate) fn admit(&mut self, now: Instant) -> Option<u64> {
        if self
            .last
            .is_some_and(|last| now.duration_since(last) < PAUSE)
        {
            self.held_back += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.held_back))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_message_per_pause_and_the_rest_is_counted() {
        let mut limit = LogLimit::default();
        let start = Instant::now();
        assert_eq!(limit.admit(start), Some(0));
        for _ in 0..1000 {
            assert_eq!(limit.admit(start + PAUSE / 2), None);
        }
        assert_eq!(limit.admit(start + PAUSE), Some(1000));
        assert_eq!(limit.admit(start + PAUSE), None);
        assert_eq!(limit.admit(start + 2 * PAUSE), Some(1));
    }
}
