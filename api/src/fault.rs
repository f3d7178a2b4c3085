// SPDX-License-Identifier: Apache-2.0
//! What a client is told when its request fails.

use std::error::Error;

use serde::Serialize;
use thiserror::Error;
use utoipa::ToSchema;

/// A request that failed: a status and a text for the client.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{message}")]
pub struct Fault {
    /// The HTTP status.
    pub status: u16,
    /// What is wrong, in one line.
    pub message: String,
}

/// The body of every answer that is a refusal.
#[derive(Serialize, ToSchema)]
#[schema(as = Fault)]
pub(crate) struct FaultBody<'a> {
    /// What is wrong, in one line.
    fault_message: &'a str,
}

/// The longest text of an error, in bytes.
const MAX_TEXT: usize = 8192;

/// `error` and its causes on one line; what a cause repeats of its effect is left out. What is in
/// it of a file's or a guest's making does nothing to a terminal: of control characters, only the
/// line breaks of reports are left, and of what is longer than any report, the beginning.
pub fn with_causes(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let cause = source.to_string();
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
        next = source.source();
    }
    if text.len() > MAX_TEXT {
        text.truncate(text.floor_char_boundary(MAX_TEXT));
        text.push('…');
    }
    let odd = |c: char| c != '\n' && (c.is_control() || is_direction(c));
    if !text.contains(odd) {
        return text;
    }
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if odd(c) {
            shown.extend(c.escape_unicode());
        } else {
            shown.push(c);
        }
    }
    shown
}

/// Whether a character has text run the other way.
fn is_direction(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

impl Fault {
    /// The request is bad, or comes at the wrong time (status 400).
    pub fn new(message: impl Into<String>) -> Self {
        Self {
            status: 400,
            message: message.into(),
        }
    }

    /// The body is larger than `limit` bytes, by how much if that was said (status 413).
    pub fn too_large(size: Option<u64>, limit: usize) -> Self {
        let size = size.map_or(String::new(), |size| format!(" with size {size}"));
        Self::over_limit(format!(
            "Request payload{size} is larger than the limit of {limit} allowed by server."
        ))
    }

    /// What is to be kept is larger than it may be (status 413).
    pub fn over_limit(message: impl Into<String>) -> Self {
        Self {
            status: 413,
            ..Self::new(message)
        }
    }

    /// `error` with all its causes; what a cause repeats of its effect is left out.
    pub fn from_error(error: &(dyn Error + 'static)) -> Self {
        Self::new(with_causes(error))
    }

    /// The body that carries it.
    pub(crate) fn body(&self) -> String {
        let fault_message = &self.message;
        // A string always has a JSON form.
        serde_json::to_string(&FaultBody { fault_message }).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_does_nothing_to_a_terminal() {
        let error = std::io::Error::other("a\u{1b}[2J\u{202e}\u{0}é\nb");
        assert_eq!(with_causes(&error), "a\\u{1b}[2J\\u{202e}\\u{0}é\nb");
        let long = with_causes(&std::io::Error::other("é".repeat(1 << 20)));
        assert!(long.ends_with('…') && long.len() < MAX_TEXT + 4);
        let plain = std::io::Error::other("plain: é");
        assert_eq!(Fault::from_error(&plain).message, "plain: é");
    }
}
