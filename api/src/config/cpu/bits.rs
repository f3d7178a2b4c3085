// SPDX-License-Identifier: Apache-2.0
//! Numbers and bit masks as CPU templates write them.

use std::fmt::{self, Binary, Display, Formatter};
use std::ops::{BitAnd, BitOr, BitOrAssign, Not, Shl, Shr};

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Which bits of a register are changed, and to what. It is written from the highest bit down:
/// `0` and `1` set a bit, `x` keeps it, `_` is for the eye; `0b` may come first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BitMask<T> {
    /// The bits that are changed.
    pub mask: T,
    /// What they become; zero elsewhere.
    pub value: T,
}

/// The registers that masks are for.
pub trait Bits:
    Copy
    + Default
    + PartialEq
    + Binary
    + From<bool>
    + Not<Output = Self>
    + BitAnd<Output = Self>
    + BitOr<Output = Self>
    + BitOrAssign
    + Shl<u32, Output = Self>
    + Shr<u32, Output = Self>
{
    /// How many bits they have.
    const BITS: u32;
}

impl Bits for u32 {
    const BITS: u32 = Self::BITS;
}

impl Bits for u64 {
    const BITS: u32 = Self::BITS;
}

impl<T: Bits> BitMask<T> {
    /// `value` with the changes.
    pub fn apply(&self, value: T) -> T {
        (value & !self.mask) | self.value
    }

    fn parse(text: &str) -> Result<Self, String> {
        let fail = |why: String| {
            Err(format!(
                "Failed to parse string [{text}] as a bitmap - {why}"
            ))
        };
        let digits = text.strip_prefix("0b").unwrap_or(text);
        let (mut mask, mut value) = (T::default(), T::default());
        let digits = digits.bytes().rev().filter(|&digit| digit != b'_');
        for (digit, bit) in digits.zip(0..) {
            if bit == T::BITS {
                return fail("string is too long".into());
            }
            match digit {
                b'x' => {}
                b'0' | b'1' => {
                    mask |= T::from(true) << bit;
                    value |= T::from(digit == b'1') << bit;
                }
                other => return fail(format!("unknown character: {other}")),
            }
        }
        Ok(Self { mask, value })
    }
}

impl<T: Bits> Display for BitMask<T> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("0b")?;
        for bit in (0..T::BITS).rev() {
            let is_set = |bits: T| (bits >> bit) & T::from(true) == T::from(true);
            f.write_str(match (is_set(self.mask), is_set(self.value)) {
                (false, _) => "x",
                (true, false) => "0",
                (true, true) => "1",
            })?;
        }
        Ok(())
    }
}

impl<T: Bits> Serialize for BitMask<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de, T: Bits> Deserialize<'de> for BitMask<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

/// Numbers as text, hexadecimal or binary.
pub(super) mod number {
    use super::{Deserialize, Deserializer, Error, Serializer};

    pub(in super::super) fn serialize<S: Serializer>(
        number: &u32,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{number:#x}"))
    }

    pub(in super::super) fn deserialize<'de, D>(deserializer: D) -> Result<u32, D::Error>
    where
        D: Deserializer<'de>,
    {
        let text = String::deserialize(deserializer)?;
        let (digits, radix) = match (text.strip_prefix("0b"), text.strip_prefix("0x")) {
            (Some(digits), _) => (digits, 2),
            (None, Some(digits)) => (digits, 16),
            (None, None) => {
                return Err(D::Error::custom(format!(
                    "No supported number system prefix found in value [{text}]. Make sure to \
                     prefix the number with '0x' for hexadecimal numbers or '0b' for binary \
                     numbers."
                )));
            }
        };
        u32::from_str_radix(digits, radix).map_err(|error| {
            D::Error::custom(format!(
                "Failed to parse string [{text}] as a number for CPU template - {error:?}"
            ))
        })
    }
}
