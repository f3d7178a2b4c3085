// SPDX-License-Identifier: Apache-2.0
//! MAC addresses, as people write them.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// An Ethernet address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct MacAddr([u8; 6]);

/// A text that is no MAC address.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{0:?} is not a MAC address like 06:00:ac:10:00:02")]
pub struct ParseMacError(String);

impl MacAddr {
    /// The address with these bytes, first on the wire first.
    pub const fn new(octets: [u8; 6]) -> Self {
        Self(octets)
    }

    /// Its bytes, first on the wire first.
    pub const fn octets(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for MacAddr {
    type Err = ParseMacError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseMacError(text.to_owned());
        let mut parts = text.split(':');
        let mut octets = [0; 6];
        for octet in &mut octets {
            let part = parts.next().ok_or_else(error)?;
            // `from_str_radix` alone takes a sign, and one digit.
            if part.len() != 2 || !part.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                return Err(error());
            }
            *octet = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        match parts.next() {
            None => Ok(Self(octets)),
            Some(_) => Err(error()),
        }
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_is_what_is_written() {
        let mac: MacAddr = "06:00:AC:10:00:0f".parse().unwrap();
        assert_eq!(mac.octets(), [6, 0, 0xac, 0x10, 0, 0x0f]);
        assert_eq!(mac.to_string(), "06:00:ac:10:00:0f");
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in [
            "",
            "06",
            "06:00:ac:10:00",
            "06:00:ac:10:00:02:03",
            "06:00:ac:10:00:02:",
            "6:00:ac:10:00:02",
            "+6:00:ac:10:00:02",
            "06-00-ac-10-00-02",
            "06:00:ac:10:00:0g",
            "06:00:ac:10:00:é",
        ] {
            assert!(text.parse::<MacAddr>().is_err(), "{text:?}");
        }
    }
}
