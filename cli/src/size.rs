// SPDX-License-Identifier: Apache-2.0
//! Sizes as people write them.

use std::str::FromStr;

/// An amount of memory, in MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemorySize(pub(crate) u64);

impl FromStr for MemorySize {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const WANTED: &str = "write whole MiB, as 256, 256M or 2G";
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let factor = match text.get(digits.len()..).unwrap_or_default() {
            "" | "M" | "m" | "MiB" => 1,
            "G" | "g" | "GiB" => 1024,
            "T" | "t" | "TiB" => 1024 * 1024,
            _ => return Err(WANTED),
        };
        let count: u64 = digits.parse().map_err(|_| WANTED)?;
        count.checked_mul(factor).map(Self).ok_or(WANTED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_understood() {
        for (text, mib) in [
            ("128", 128),
            ("256M", 256),
            ("2G", 2048),
            ("1GiB", 1024),
            ("0", 0),
        ] {
            assert_eq!(text.parse(), Ok(MemorySize(mib)), "{text}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            "M",
            "1K",
            "1.5G",
            "-1",
            "1 G",
            "99999999999999999999",
            "18446744073709551615G",
        ] {
            assert!(text.parse::<MemorySize>().is_err(), "{text}");
        }
    }
}
