// SPDX-License-Identifier: Apache-2.0
//! Session tokens: what a guest has to show to read the data with version 2 of the service.
//!
//! A token is `number ‖ expiry ‖ tag` in hexadecimal digits, the tag being a keyed hash
//! (HMAC-SHA-256, 128 bits of it) of the rest. So nothing has to be kept for a token, and a guest
//! may ask for as many as it likes. The key is made when the first one is asked for and never
//! leaves the process: a machine that is restored elsewhere has to ask for new tokens.

use std::fmt;
use std::time::{Duration, Instant};

use hmac::{Hmac, Mac};
use sha2::Sha256;
use thiserror::Error;

/// Bounds of the lifetime in seconds.
const MIN_TTL: u32 = 1;
const MAX_TTL: u32 = 21600;

/// Bytes of the number and of the expiry.
const CLAIM_LEN: usize = 16;
/// Bytes of the tag.
const TAG_LEN: usize = 16;

/// Why there is no token.
#[derive(Debug, Error)]
pub(crate) enum TokenError {
    /// The lifetime is out of bounds.
    #[error(
        "Invalid time to live value provided for token: {0}. Please provide a value between {MIN_TTL} and {MAX_TTL}."
    )]
    Ttl(u32),
    /// The host has no random numbers.
    #[error("Failed to generate a key")]
    Random(#[from] getrandom::Error),
}

/// Issues tokens and knows them again.
pub(crate) struct Tokens {
    key: Option<[u8; 32]>,
    /// How many were issued, so that no two are alike.
    issued: u64,
    /// What expiries are counted from.
    epoch: Instant,
}

impl Default for Tokens {
    fn default() -> Self {
        Self {
            key: None,
            issued: 0,
            epoch: Instant::now(),
        }
    }
}

impl fmt::Debug for Tokens {
    /// Without the key, which is nobody's business.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokens")
            .field("issued", &self.issued)
            .finish_non_exhaustive()
    }
}

impl Tokens {
    /// A token that is good for `ttl` seconds from now.
    pub(crate) fn issue(&mut self, ttl: u32) -> Result<String, TokenError> {
        self.issue_at(self.epoch.elapsed(), ttl)
    }

    /// Whether `token` is one of ours and not expired.
    pub(crate) fn is_valid(&self, token: &str) -> bool {
        self.is_valid_at(self.epoch.elapsed(), token)
    }

    fn issue_at(&mut self, now: Duration, ttl: u32) -> Result<String, TokenError> {
        if !(MIN_TTL..=MAX_TTL).contains(&ttl) {
            return Err(TokenError::Ttl(ttl));
        }
        let key = match self.key {
            Some(key) => key,
            None => {
                let mut key = [0; 32];
                getrandom::fill(&mut key)?;
                *self.key.insert(key)
            }
        };
        let expiry = millis(now).saturating_add(u64::from(ttl) * 1000);
        let claim = (u128::from(self.issued) << 64 | u128::from(expiry)).to_be_bytes();
        self.issued = self.issued.wrapping_add(1);
        let tag = hasher(&key, &claim).finalize().into_bytes();
        let bytes = claim.iter().chain(tag.iter().take(TAG_LEN));
        Ok(bytes.map(|byte| format!("{byte:02x}")).collect())
    }

    fn is_valid_at(&self, now: Duration, token: &str) -> bool {
        let (Some(key), Some(bytes)) = (&self.key, from_hex(token)) else {
            return false;
        };
        let (claim, tag) = bytes.split_at(CLAIM_LEN);
        // The comparison takes the same time wherever they differ.
        if hasher(key, claim).verify_truncated_left(tag).is_err() {
            return false;
        }
        let expiry = claim
            .last_chunk()
            .map_or(0, |bytes| u64::from_be_bytes(*bytes));
        millis(now) < expiry
    }
}

#[expect(clippy::expect_used, reason = "a key of any length will do for HMAC")]
fn hasher(key: &[u8; 32], claim: &[u8]) -> Hmac<Sha256> {
    let mut hasher: Hmac<Sha256> = Mac::new_from_slice(key).expect("any length will do");
    hasher.update(claim);
    hasher
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// The bytes of a token, if it has the length and the digits of one.
fn from_hex(token: &str) -> Option<[u8; CLAIM_LEN + TAG_LEN]> {
    let mut bytes = [0; CLAIM_LEN + TAG_LEN];
    let (pairs, rest) = token.as_bytes().as_chunks::<2>();
    if pairs.len() != bytes.len() || !rest.is_empty() {
        return None;
    }
    let digit = |c: u8| match c {
        b'0'..=b'9' => Some(c - b'0'),
        // One way to write a token, and no other.
        b'a'..=b'f' => Some(c - b'a' + 10),
        _ => None,
    };
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_token_is_good_until_it_expires() {
        let mut tokens = Tokens::default();
        let token = tokens.issue_at(5 * SECOND, 60).unwrap();
        assert!(tokens.is_valid_at(5 * SECOND, &token));
        assert!(tokens.is_valid_at(65 * SECOND - Duration::from_millis(1), &token));
        assert!(!tokens.is_valid_at(65 * SECOND, &token));
    }

    #[test]
    fn lifetimes_have_bounds() {
        let mut tokens = Tokens::default();
        for ttl in [0, 21601, u32::MAX] {
            assert!(
                matches!(tokens.issue(ttl), Err(TokenError::Ttl(same)) if same == ttl),
                "{ttl}"
            );
        }
        for ttl in [1, 21600] {
            let token = tokens.issue(ttl).unwrap();
            assert!(tokens.is_valid(&token), "{ttl}");
        }
    }

    #[test]
    fn what_was_not_issued_is_refused() {
        let mut tokens = Tokens::default();
        assert!(!tokens.is_valid(&"0".repeat(64)), "before there is a key");
        let token = tokens.issue(60).unwrap();
        for at in 0..token.len() {
            let digit = if token.as_bytes()[at] == b'0' {
                "1"
            } else {
                "0"
            };
            let mut forged = token.clone();
            forged.replace_range(at..=at, digit);
            assert!(!tokens.is_valid(&forged), "digit {at}");
        }
        for forged in [
            "",
            "foo",
            &token[1..],
            &token.to_uppercase(),
            &format!("{token}00"),
            &"é".repeat(32),
        ] {
            assert!(!tokens.is_valid(forged), "{forged}");
        }
        let mut others = Tokens::default();
        others.issue(60).unwrap();
        assert!(!others.is_valid(&token), "another key");
    }

    #[test]
    fn no_two_are_alike() {
        let mut tokens = Tokens::default();
        let [a, b] = [(); 2].map(|()| tokens.issue_at(SECOND, 1).unwrap());
        assert_ne!(a, b);
    }
}
