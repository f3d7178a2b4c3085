// SPDX-License-Identifier: Apache-2.0
//! The memory files of snapshots: merged, and compared page by page.

use std::fs;
use std::path::Path;

use crate::vm::brume;

const PAGE: usize = 4096;
/// What begins the bytes that differ from snapshot to snapshot, and how many they are.
const MARK: &[u8] = b"BRUMEMRK";
const MARK_BYTES: usize = 40;

/// Merges a diff into a base, to a new file.
///
/// # Panics
///
/// `brume rebase` fails.
#[track_caller]
pub fn merge(base: &Path, diff: &Path, output: &Path) {
    let mut command = brume();
    command.arg("rebase").arg(base).arg(diff);
    let done = command.arg("--output").arg(output).output().expect("brume");
    assert!(done.status.success(), "{done:?}");
}

/// The pages, by number, in which two memory files differ in more than their marks.
///
/// # Panics
///
/// They are not there, or not of one size.
#[track_caller]
pub fn differing_pages(first: &Path, second: &Path) -> Vec<usize> {
    let [first, second] = [first, second].map(|path| fs::read(path).expect("a memory file"));
    assert_eq!(first.len(), second.len());
    let pages = first.chunks(PAGE).zip(second.chunks(PAGE)).enumerate();
    let differing =
        pages.filter(|(_, (a, b))| a != b && (unmarked(a).is_none() || unmarked(a) != unmarked(b)));
    differing.map(|(number, _)| number).collect()
}

/// Checks that two memory files hold the same but for their marks.
///
/// # Panics
///
/// They do not.
#[track_caller]
pub fn assert_same_memory(first: &Path, second: &Path) {
    let pages = differing_pages(first, second);
    let count = pages.len();
    let first: Vec<_> = pages.into_iter().take(16).collect();
    assert!(count == 0, "{count} pages differ, the first are {first:?}");
}

/// What is before and behind the mark in a page that has one.
fn unmarked(page: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = page.windows(MARK.len()).position(|bytes| bytes == MARK)?;
    let (before, rest) = page.split_at(at);
    Some((before, rest.get(MARK_BYTES..)?))
}
