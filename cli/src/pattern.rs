// SPDX-License-Identifier: Apache-2.0
//! Names with a number in them, as `vm{}.sock` or `tap{:03}`, for machines that are made by the
//! hundred.

use std::fmt::Write;
use std::str::FromStr;

/// A name with places for a number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pattern(Vec<Part>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    /// The number, with zeros in front up to this many digits.
    Number(usize),
}

impl Pattern {
    /// The name for `number`.
    pub(crate) fn fill(&self, number: u32) -> String {
        let mut name = String::new();
        for part in &self.0 {
            match part {
                Part::Text(text) => name.push_str(text),
                Part::Number(width) => {
                    // A string takes all that is written to it.
                    let _ = write!(name, "{number:0width$}");
                }
            }
        }
        name
    }

    /// Whether each number has a name of its own.
    pub(crate) fn is_numbered(&self) -> bool {
        self.0.iter().any(|part| matches!(part, Part::Number(_)))
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            let Some((place, after)) = after.split_once('}') else {
                return Err(format!("`{text}` has a `{{` without a `}}`"));
            };
            let width = match place.as_bytes() {
                [] => 0,
                [b':', b'0', digit @ b'1'..=b'9'] => usize::from(digit - b'0'),
                _ => {
                    return Err(format!(
                        "`{{{place}}}` is not understood: write {{}} for the number, or {{:03}} \
                         for three digits"
                    ));
                }
            };
            parts.push(Part::Text(before.into()));
            parts.push(Part::Number(width));
            rest = after;
        }
        parts.push(Part::Text(rest.into()));
        Ok(Self(parts))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_place_takes_the_number() {
        for (text, number, expected) in [
            ("vm{}.sock", 0, "vm0.sock"),
            ("vm{}.sock", 1234, "vm1234.sock"),
            ("{:03}", 7, "007"),
            ("{:03}", 1234, "1234"),
            ("d{}/vm{:02}", 5, "d5/vm05"),
            ("plain}", 5, "plain}"),
            ("ü{}ö", 1, "ü1ö"),
            ("", 1, ""),
        ] {
            let pattern: Pattern = text.parse().unwrap();
            assert_eq!(pattern.fill(number), expected, "{text}");
            assert_eq!(pattern.is_numbered(), text.contains('{'), "{text}");
        }
    }

    #[test]
    fn other_places_are_refused() {
        for text in [
            "vm{", "vm{}{", "{n}", "{:3}", "{:00}", "{:010}", "{:0x}", "{{}}",
        ] {
            assert!(text.parse::<Pattern>().is_err(), "{text}");
        }
    }
}
