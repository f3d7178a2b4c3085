// SPDX-License-Identifier: Apache-2.0
//! The commands for the files of a snapshot, as they are called.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "what does not work is a failed test"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

const STATE: &[u8] = include_bytes!("../../vmm/snapshot/testdata/state-v1-x86_64.bin");

fn brume(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_brume"));
    command.args(args).output().unwrap()
}

fn write(folder: &TempDir, name: &str, content: &[u8]) -> PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, content).unwrap();
    path
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn inspect_shows_a_file_in_both_forms() {
    let folder = TempDir::new().unwrap();
    let state = write(&folder, "state", STATE);
    let shown = brume(&["inspect", text(&state)]);
    assert!(shown.status.success(), "{shown:?}");
    assert!(stdout(&shown).contains("\nmachine 0\n  memory_mib  128\n"));
    let json = brume(&["inspect", "--json", text(&state)]);
    let json: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json["sections"][0]["content"]["memory_mib"], 128);
}

#[test]
fn inspect_shows_what_a_damaged_file_has_and_fails() {
    let folder = TempDir::new().unwrap();
    let cut = write(&folder, "cut", &STATE[..250]);
    let shown = brume(&["inspect", text(&cut)]);
    assert_eq!(shown.status.code(), Some(1));
    assert!(stdout(&shown).contains("\nmachine 0\n  memory_mib  128\n"));
    let expected = "cannot be used: it is cut off: 53 bytes are missing of 303\n";
    assert!(stderr(&shown).ends_with(expected), "{shown:?}");
    let other = write(&folder, "other", &[0; 100]);
    let shown = brume(&["inspect", text(&other)]);
    assert_eq!(shown.status.code(), Some(1));
    assert!(shown.stdout.is_empty());
}

#[test]
fn firecrackers_flags_tell_the_version_of_the_form() {
    let folder = TempDir::new().unwrap();
    let state = write(&folder, "state", STATE);
    assert_eq!(stdout(&brume(&["--snapshot-version"])), "v1.0.0\n");
    let described = brume(&["--describe-snapshot", text(&state)]);
    assert!(described.status.success());
    assert_eq!(stdout(&described), "v1.0.0\n");
    let short = write(&folder, "short", b"");
    let described = brume(&["--describe-snapshot", text(&short)]);
    assert_eq!(described.status.code(), Some(1));
    assert!(described.stdout.is_empty());
    let expected = "IO Error: File too short to contain CRC";
    assert!(stderr(&described).contains(expected), "{described:?}");
}

#[test]
fn rebase_merges_in_place_or_into_another_file() {
    let folder = TempDir::new().unwrap();
    let base = write(&folder, "base", &[1; 8192]);
    let diff = write(&folder, "diff", &[2; 4096]);
    let lengths = brume(&["rebase", text(&base), text(&diff)]);
    assert_eq!(lengths.status.code(), Some(1));
    assert!(stderr(&lengths).contains("the base has 8192 bytes and the diff 4096"));
    let file = fs::File::options().write(true).open(&diff).unwrap();
    file.set_len(8192).unwrap();
    let merged = [[2; 4096], [1; 4096]].concat();
    let out = folder.path().join("out");
    let apart = brume(&["rebase", text(&base), text(&diff), "--output", text(&out)]);
    let expected = format!("merged 4 KiB of 8 KiB into {}\n", text(&out));
    assert_eq!(stdout(&apart), expected, "{apart:?}");
    assert_eq!(fs::read(&base).unwrap(), [1; 8192]);
    assert_eq!(fs::read(&out).unwrap(), merged);
    assert!(
        brume(&["rebase", text(&base), text(&diff)])
            .status
            .success()
    );
    assert_eq!(fs::read(&base).unwrap(), merged);
}
