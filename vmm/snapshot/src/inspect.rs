// SPDX-License-Identifier: Apache-2.0
//! What is in a state file, for a person and for a script.
//!
//! It knows no kind of section: each is shown as the JSON that it is, so that files of older and
//! newer versions can be looked at too. Of a damaged file it shows all that can be found. What
//! comes from the file is escaped before it goes to a terminal.

use std::fmt::Write;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::error::StateError;
use crate::layout::{FORMAT_VERSION, Header, architecture_name};
use crate::state::{Scan, Section, hex, read_limited};

/// Numbers and the like that are shown of a list.
const SHOWN_VALUES: usize = 16;
/// Objects that are shown of a list.
const SHOWN_OBJECTS: usize = 8;
/// Bytes that are shown of a string of hexadecimal digits.
const SHOWN_BYTES: usize = 16;
/// Characters that are shown of any other string.
const SHOWN_CHARS: usize = 200;
/// Keys that are longer are not aligned with the others.
const KEY_COLUMN: usize = 28;

/// All that can be found in a state file, damaged or not.
#[derive(Debug)]
pub struct Inspection {
    header: Header,
    sections: Vec<Section>,
    damage: Option<StateError>,
}

impl Inspection {
    /// Looks at a file of at most 64 MiB.
    ///
    /// # Errors
    ///
    /// It cannot be read, or is no state file.
    pub fn read(path: &Path) -> Result<Self, StateError> {
        Self::of(&read_limited(path)?)
    }

    /// Looks at the bytes of a file.
    ///
    /// # Errors
    ///
    /// They are no state file.
    pub fn of(bytes: &[u8]) -> Result<Self, StateError> {
        let scan = Scan::of(bytes);
        let sections = scan.sections;
        let damage = scan.damage.or_else(|| content_damage(&sections));
        match scan.header {
            Some(header) => Ok(Self {
                header,
                sections,
                damage,
            }),
            None => Err(damage.unwrap_or(StateError::NotASnapshot)),
        }
    }

    /// The first thing that is wrong with the file, if there is one; the rest of it may be true.
    #[must_use]
    pub fn into_damage(self) -> Option<StateError> {
        self.damage
    }

    /// As an object: `format_version`, `architecture`, `length`, `checksum` and `sections`, each
    /// with `kind`, `id`, `version`, `length` and `content`, which is null if it is not JSON.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let section = |section: &Section| {
            json!({
                "kind": section.kind(),
                "id": section.id(),
                "version": section.version(),
                "length": section.length(),
                "content": section.content().ok(),
            })
        };
        json!({
            "format_version": self.header.format_version.get(),
            "architecture": architecture_name(self.header.architecture.get()),
            "length": self.header.length.get(),
            "checksum": hex(&self.header.checksum),
            "sections": self.sections.iter().map(section).collect::<Vec<_>>(),
        })
    }

    /// As lines for a person: the header, a table of the sections, and what is in them, with long
    /// lists and strings cut short.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        let header = &self.header;
        let facts = [
            ("format version", header.format_version.to_string()),
            ("architecture", architecture_name(header.architecture.get())),
            ("length", format!("{} bytes", header.length)),
            ("SHA-256", hex(&header.checksum)),
        ];
        for (name, value) in facts {
            line(&mut text, 0, &format!("{name:<16}{value}"));
        }
        if header.format_version.get() != FORMAT_VERSION {
            return text;
        }
        let head = row("SECTION", "ID", "VERSION", "BYTES");
        line(&mut text, 0, &format!("\n{head}"));
        for section in &self.sections {
            let [id, version] = [section.id(), section.version()].map(|n| n.to_string());
            let length = section.length().to_string();
            line(&mut text, 0, &row(section.kind(), &id, &version, &length));
        }
        for section in &self.sections {
            let title = format!("\n{} {}", section.kind(), section.id());
            match section.content() {
                Ok(Value::Object(fields)) => {
                    line(&mut text, 0, &title);
                    write_fields(&mut text, 1, &fields);
                }
                Ok(value) => write_value(&mut text, 0, &title, &value),
                Err(_) => line(&mut text, 0, &format!("{title}  (not JSON)")),
            }
        }
        text
    }
}

/// What is wrong with the first section that is not JSON.
fn content_damage(sections: &[Section]) -> Option<StateError> {
    sections.iter().find_map(|section| section.content().err())
}

fn row(kind: &str, id: &str, version: &str, bytes: &str) -> String {
    format!("{kind:<16} {id:>10} {version:>8} {bytes:>10}")
}

fn line(text: &mut String, depth: usize, content: &str) {
    // Writing to a string does not fail.
    let _ = writeln!(text, "{:indent$}{content}", "", indent = depth * 2);
}

/// Writes the fields of an object, with their values in one column.
fn write_fields(text: &mut String, depth: usize, fields: &Map<String, Value>) {
    let keys = fields.iter().filter(|(_, value)| one_line(value).is_some());
    let width = keys.map(|(key, _)| key.len()).max().unwrap_or(0);
    let width = width.min(KEY_COLUMN);
    for (key, value) in fields {
        let key = format!("{:width$}", cut(key));
        write_value(text, depth, &key, value);
    }
}

/// Writes a value under its name, on as many lines as it takes.
fn write_value(text: &mut String, depth: usize, name: &str, value: &Value) {
    if let Some(value) = one_line(value) {
        return line(text, depth, &format!("{name}  {value}"));
    }
    line(text, depth, name.trim_end());
    match value {
        Value::Object(fields) => write_fields(text, depth + 1, fields),
        Value::Array(items) => {
            for (index, item) in items.iter().take(SHOWN_OBJECTS).enumerate() {
                write_value(text, depth + 1, &format!("[{index}]"), item);
            }
            if items.len() > SHOWN_OBJECTS {
                line(text, depth + 1, &format!("… ({} in all)", items.len()));
            }
        }
        _ => {}
    }
}

/// A value that has nothing to be indented in it.
fn one_line(value: &Value) -> Option<String> {
    match value {
        Value::Array(items) => {
            if items.iter().any(|item| item.is_array() || item.is_object()) {
                return None;
            }
            let shown = items.iter().take(SHOWN_VALUES).filter_map(one_line);
            let mut list = shown.collect::<Vec<_>>().join(", ");
            if items.len() > SHOWN_VALUES {
                let _ = write!(list, ", … ({} in all)", items.len());
            }
            Some(format!("[{list}]"))
        }
        Value::Object(fields) => fields.is_empty().then(|| "{}".to_owned()),
        Value::String(string) => Some(cut(string)),
        Value::Null | Value::Bool(_) | Value::Number(_) => Some(value.to_string()),
    }
}

/// A string as a terminal can bear it: not too long, and without control characters.
fn cut(string: &str) -> String {
    let is_hex =
        string.len().is_multiple_of(2) && string.bytes().all(|byte| byte.is_ascii_hexdigit());
    let (limit, bytes) = match is_hex {
        true => (2 * SHOWN_BYTES, string.len() / 2),
        false => (SHOWN_CHARS, string.len()),
    };
    let escaped = string.chars().take(limit).flat_map(char::escape_debug);
    let mut text = escaped.collect::<String>();
    if string.chars().nth(limit).is_some() {
        let _ = write!(text, "… ({bytes} bytes)");
    }
    text
}

#[cfg(test)]
mod tests;
