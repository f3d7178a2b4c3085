// SPDX-License-Identifier: Apache-2.0
//! What is shown is what is there, and nothing that a terminal would act upon.

use serde::{Deserialize, Serialize};

use super::*;
use crate::{Saved, StateWriter};

#[derive(Serialize, Deserialize)]
#[serde(transparent)]
struct Any(Value);

impl Saved for Any {
    const KIND: &'static str = "machine";
    const VERSION: u32 = 1;
}

fn file(values: &[Value]) -> Vec<u8> {
    let mut writer = StateWriter::new();
    for (id, value) in (0..).zip(values) {
        writer.push(id, &Any(value.clone())).unwrap();
    }
    writer.finish()
}

fn text(value: Value) -> String {
    Inspection::of(&file(&[value])).unwrap().to_text()
}

#[test]
fn a_file_is_shown_to_a_person() {
    let text = text(json!({
        "cpu": {"rip": 4096, "halted": false, "none": {}, "registers": [1, 2]},
        "memory_mib": 128,
        "drives": [{"id": "root"}, {"id": "data"}],
    }));
    let (header, content) = text.split_once("\n\n").unwrap();
    assert!(header.starts_with("format version  1\narchitecture    x86_64\nlength          "));
    let expected = "\
SECTION                  ID  VERSION      BYTES
machine                   0        1        119

machine 0
  cpu
    halted     false
    none       {}
    registers  [1, 2]
    rip        4096
  drives
    [0]
      id  root
    [1]
      id  data
  memory_mib  128
";
    assert_eq!(content, expected);
}

#[test]
fn long_things_are_cut_short() {
    let text = text(json!({
        "page": "0a".repeat(4096),
        "short": "0a".repeat(16),
        "text": "é".repeat(300),
        "list": vec![7; 40],
        "msrs": vec![json!({"index": 1}); 20],
    }));
    let hex = "0a".repeat(16);
    assert!(text.contains(&format!("page   {hex}… (4096 bytes)\n")));
    assert!(text.contains(&format!("short  {hex}\n")));
    assert!(text.contains(&format!("{}… (600 bytes)\n", "é".repeat(200))));
    let list = ["7"; 16].join(", ");
    assert!(text.contains(&format!("list   [{list}, … (40 in all)]\n")));
    assert!(text.contains("    [7]\n      index  1\n    … (20 in all)\n"));
}

#[test]
fn nothing_reaches_the_terminal_as_it_is() {
    let bad = "\x1b[2J\u{9b}31m\r\u{7f}\u{202e}";
    let text = text(json!({"value": bad, bad: 1, "list": [bad], "nested": {bad: [{bad: bad}]}}));
    let odd = |c: &char| c.is_control() && *c != '\n' || *c == '\u{202e}';
    assert_eq!(text.chars().find(odd), None);
}

#[test]
fn a_script_gets_all_of_it() {
    let content = json!({"list": vec![7; 40], "page": "0a".repeat(4096)});
    let bytes = file(&[content.clone(), json!(null)]);
    let inspection = Inspection::of(&bytes).unwrap();
    let value = inspection.to_json();
    assert_eq!(value["format_version"], 1);
    assert_eq!(value["architecture"], "x86_64");
    assert_eq!(value["length"], bytes.len());
    assert_eq!(value["checksum"], hex(&bytes[32..64]));
    let sections = value["sections"].as_array().unwrap();
    assert_eq!(sections.len(), 2);
    let first = json!({
        "kind": "machine", "id": 0, "version": 1,
        "length": content.to_string().len(), "content": content,
    });
    assert_eq!(sections[0], first);
    assert!(inspection.into_damage().is_none());
}

#[test]
fn of_a_damaged_file_the_rest_is_shown() {
    let whole = file(&[json!({"a": 1}), json!({"b": 2})]);
    // Another digit, and the checksum is wrong.
    let mut changed = whole.clone();
    let digit = changed.len() - 2;
    changed[digit] = b'3';
    let inspection = Inspection::of(&changed).unwrap();
    assert!(inspection.to_text().ends_with("machine 1\n  b  3\n"));
    let damage = inspection.into_damage();
    assert!(matches!(damage, Some(StateError::Checksum { .. })));
    // A brace, and the section is no JSON either.
    changed[digit + 1] = b']';
    let inspection = Inspection::of(&changed).unwrap();
    assert!(inspection.to_text().ends_with("machine 1  (not JSON)\n"));
    assert_eq!(inspection.to_json()["sections"][1]["content"], Value::Null);
    // Cut within the second section, the first is there.
    let inspection = Inspection::of(&whole[..whole.len() - 1]).unwrap();
    assert!(inspection.to_text().ends_with("machine 0\n  a  1\n"));
    let damage = inspection.into_damage();
    assert!(matches!(damage, Some(StateError::Cut { .. })));
    // Of another format only the header is known.
    let mut future = whole;
    future[8] = 2;
    let inspection = Inspection::of(&future).unwrap();
    assert!(!inspection.to_text().contains("SECTION"));
    let damage = inspection.into_damage();
    assert!(matches!(damage, Some(StateError::FormatVersion(2))));
    assert!(Inspection::of(&[0; 64]).is_err());
}
