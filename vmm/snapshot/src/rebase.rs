// SPDX-License-Identifier: Apache-2.0
//! Merging the memory file of a diff into that of the snapshot before it.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::memory_file::{Copier, CopyMethod, clone_file, data_ranges, punch_hole};
use crate::new_file::{NewFile, NewFileError};

/// Why two memory files were not merged.
#[derive(Debug, Error)]
pub enum RebaseError {
    /// A file is not there or may not be used.
    #[error("the memory file {} cannot be opened", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A folder, a pipe or a device.
    #[error("the memory file {} is not a regular file", .0.display())]
    NotAFile(PathBuf),
    /// Both are one.
    #[error("base and diff are one file, {}", .0.display())]
    SameFile(PathBuf),
    /// They are not of one machine.
    #[error(
        "the base has {base} bytes and the diff {diff}: they are not of one machine, or one of \
         them is cut off or is no memory file"
    )]
    Sizes {
        /// Length of the base, in bytes.
        base: u64,
        /// Length of the diff, in bytes.
        diff: u64,
    },
    /// The base may have a part of the diff by now.
    #[error(
        "the diff was not merged to its end into {}; run it again when the cause is gone, and do \
         not load the base until then", base.display()
    )]
    Merge {
        /// The base.
        base: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A new file was not written to its end, and is gone.
    #[error("{} cannot be written; base and diff are as they were", path.display())]
    Output {
        /// The new file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The new file cannot be made, or not put in its place.
    #[error(transparent)]
    NewFile(#[from] NewFileError),
}

/// What a merge has done.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RebaseSummary {
    /// Ranges that the diff consisted of.
    pub ranges: usize,
    /// How much they are, in bytes.
    pub bytes: u64,
    /// Length of the memory, in bytes.
    pub length: u64,
    /// How the last of them was copied.
    pub method: CopyMethod,
}

/// Merges the data of `diff` into `base`, in place. It is on disk when this returns.
///
/// A merge that was interrupted has left a base with a part of the diff, which is of no moment in
/// the machine's life; the same merge run again completes it, however often. A machine that was
/// restored from the base and still runs must be gone before: it reads the pages that it has not
/// touched from that file. [`rebase_to`] does without either.
///
/// # Errors
///
/// The files are not two memory files of one size, or the base could not be written.
pub fn rebase(base: &Path, diff: &Path) -> Result<RebaseSummary, RebaseError> {
    let pair = Pair::open(base, diff, true)?;
    let merged = pair.merge_into(&pair.base);
    let synced = merged.and_then(|summary| pair.base.sync_all().map(|()| summary));
    synced.map_err(|source| RebaseError::Merge {
        base: base.to_owned(),
        source,
    })
}

/// Makes `out` of `base` and the data of `diff`, both of which stay as they are. `out` is there
/// whole or not at all, and may be the path of either.
///
/// # Errors
///
/// The files are not two memory files of one size, or the new one could not be written.
pub fn rebase_to(base: &Path, diff: &Path, out: &Path) -> Result<RebaseSummary, RebaseError> {
    let pair = Pair::open(base, diff, false)?;
    let new = NewFile::create(out)?;
    let summary = clone_file(&pair.base, new.file(), pair.length)
        .and_then(|_| pair.merge_into(new.file()))
        .map_err(|source| RebaseError::Output {
            path: out.to_owned(),
            source,
        })?;
    new.commit()?;
    Ok(summary)
}

/// Where the mark is in a memory file by which its state knows it, in bytes. It is the last that is
/// merged, so that a merge that was cut short is not taken for a whole one.
pub const MARK_PAGE: Range<u64> = 0xee000..0xef000;

/// Two memory files of one length.
struct Pair {
    base: File,
    diff: File,
    /// Of each, in bytes.
    length: u64,
}

impl Pair {
    fn open(base: &Path, diff: &Path, write: bool) -> Result<Self, RebaseError> {
        let (base_file, base_id, base_length) = open(base, write)?;
        let (diff_file, diff_id, diff_length) = open(diff, false)?;
        if base_id == diff_id {
            return Err(RebaseError::SameFile(base.to_owned()));
        }
        if base_length != diff_length {
            return Err(RebaseError::Sizes {
                base: base_length,
                diff: diff_length,
            });
        }
        Ok(Self {
            base: base_file,
            diff: diff_file,
            length: base_length,
        })
    }

    fn merge_into(&self, to: &File) -> io::Result<RebaseSummary> {
        let ranges = data_ranges(&self.diff, self.length)?;
        let mut summary = RebaseSummary {
            ranges: ranges.len(),
            bytes: 0,
            length: self.length,
            method: CopyMethod::Clone,
        };
        let mut copier = Copier::new(&self.diff, to);
        let marked = ranges.iter().any(|range| range.contains(&MARK_PAGE.start));
        if marked {
            // Until all is there, no state is to find its mark.
            punch_hole(to, &MARK_PAGE)?;
            to.sync_data()?;
        }
        for range in ranges {
            summary.bytes = summary.bytes.saturating_add(range.end - range.start);
            let before = range.start..range.end.min(MARK_PAGE.start);
            let after = range.start.max(MARK_PAGE.end)..range.end;
            for part in [before, after] {
                if !part.is_empty() {
                    copier.copy(part)?;
                }
            }
        }
        if marked {
            to.sync_data()?;
            copier.copy(MARK_PAGE)?;
        }
        summary.method = copier.method;
        Ok(summary)
    }
}

/// Opens a regular file; says which it is, and how long.
fn open(path: &Path, write: bool) -> Result<(File, (u64, u64), u64), RebaseError> {
    let failed = |source| RebaseError::Open {
        path: path.to_owned(),
        source,
    };
    // Opening a pipe would wait for its other end.
    let mut options = OpenOptions::new();
    options.read(true).write(write);
    let file = options
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(RebaseError::NotAFile(path.to_owned()));
    }
    Ok((file, (metadata.dev(), metadata.ino()), metadata.len()))
}

#[cfg(test)]
mod tests;
