// SPDX-License-Identifier: Apache-2.0
//! Registers as text that people know them by.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A number that is written as `0x` and hexadecimal digits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Hex(pub(crate) u64);

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{:#x}", self.0))
    }
}

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(HexText)
    }
}

struct HexText;

impl Visitor<'_> for HexText {
    type Value = Hex;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("0x and 1 to 16 hexadecimal digits")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Hex, E> {
        // A sign is no digit, though `from_str_radix` takes one.
        let digits = text
            .strip_prefix("0x")
            .filter(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
        let number = digits.and_then(|digits| u64::from_str_radix(digits, 16).ok());
        number
            .map(Hex)
            .ok_or_else(|| E::invalid_value(Unexpected::Str(text), &self))
    }
}

/// Registers by their numbers, both as [`Hex`].
pub(crate) mod by_number {
    use super::*;

    pub(crate) fn serialize<S: Serializer>(
        registers: &BTreeMap<u32, u64>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_map(
            registers
                .iter()
                .map(|(&number, &value)| (Hex(number.into()), Hex(value))),
        )
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<BTreeMap<u32, u64>, D::Error> {
        let registers = BTreeMap::<Hex, Hex>::deserialize(deserializer)?;
        let registers = registers.into_iter().map(|(Hex(number), Hex(value))| {
            let number = u32::try_from(number);
            let number = number.map_err(|_| D::Error::custom("a register number has 32 bits"))?;
            Ok((number, value))
        });
        registers.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Msrs {
        #[serde(with = "by_number")]
        msrs: BTreeMap<u32, u64>,
    }

    #[test]
    fn registers_are_the_same_after_their_way_through_text() {
        let msrs = Msrs {
            msrs: [(0x10, u64::MAX), (0xc000_0080, 0)].into(),
        };
        let text = serde_json::to_string(&msrs).unwrap();
        assert_eq!(
            text,
            r#"{"msrs":{"0x10":"0xffffffffffffffff","0xc0000080":"0x0"}}"#
        );
        assert_eq!(serde_json::from_str::<Msrs>(&text).unwrap(), msrs);
    }

    #[test]
    fn what_is_no_number_or_too_large_is_refused() {
        for text in ["10", "0x", "0x+1", "0xg", "0x10000000000000000", ""] {
            let json = format!("\"{text}\"");
            assert!(serde_json::from_str::<Hex>(&json).is_err(), "{text}");
        }
        let wide = r#"{"msrs":{"0x100000000":"0x0"}}"#;
        assert!(serde_json::from_str::<Msrs>(wide).is_err());
    }
}
