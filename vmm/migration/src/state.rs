// SPDX-License-Identifier: Apache-2.0
//! A machine's state, which comes in parts.

use crate::channel::ChannelError;

/// The most that a state may have, in bytes.
pub const MOST_STATE: usize = 64 << 20;

/// A state of which parts have come.
#[derive(Debug, Default)]
pub struct StateParts(Vec<u8>);

impl StateParts {
    /// A state of which nothing has come.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the part at `offset`, which comes after all others; the whole state with the last one.
    ///
    /// # Errors
    ///
    /// It is another part, or there is more than [`MOST_STATE`].
    pub fn add(
        &mut self,
        offset: u64,
        last: bool,
        bytes: &[u8],
    ) -> Result<Option<Vec<u8>>, ChannelError> {
        if offset != self.0.len() as u64 {
            return Err(ChannelError::Malformed("parts of a state that do not join"));
        }
        if bytes.is_empty() && !last {
            return Err(ChannelError::Malformed(
                "a part of a state without any of it",
            ));
        }
        if self.0.len().saturating_add(bytes.len()) > MOST_STATE {
            return Err(ChannelError::Malformed("a state that is too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(last.then(|| std::mem::take(&mut self.0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_join_or_are_refused() {
        let mut parts = StateParts::new();
        assert_eq!(parts.add(0, false, b"ab").unwrap(), None);
        parts.add(1, false, b"x").unwrap_err();
        parts.add(3, true, b"x").unwrap_err();
        parts.add(2, false, b"").unwrap_err();
        assert_eq!(parts.add(2, true, b"c").unwrap().unwrap(), b"abc");
        // The next one is a state of its own, and may have nothing in it.
        assert_eq!(parts.add(0, true, b"").unwrap().unwrap(), b"");
    }

    #[test]
    fn a_state_is_not_collected_without_end() {
        let mut parts = StateParts::new();
        let part = vec![1; 1 << 20];
        for number in 0..64 {
            parts.add(number << 20, false, &part).unwrap();
        }
        parts.add(64 << 20, true, &[1]).unwrap_err();
        assert_eq!(
            parts.add(64 << 20, true, &[]).unwrap().unwrap().len(),
            MOST_STATE
        );
    }
}
