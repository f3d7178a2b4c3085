// SPDX-License-Identifier: Apache-2.0
//! Working sets: which pages a guest has used, in a file, so that a machine that is made from a
//! snapshot of that guest gets them before it touches them one by one.
//!
//! The file is JSON: `{"version":1,"page_size":4096,"memory_size":BYTES,"ranges":[[FIRST,COUNT]..]}`
//! with pages numbered as in a memory file. It is a hint, and wrong pages cost time only; but it
//! may come from anywhere, so it is read with a limit.
//!
//! One thread, `prefetch`, is started here; it brings pages in while the machine starts. It owns
//! what it needs and takes no lock.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::thread;

use brume_snapshot::{NewFile, NewFileError};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::MachineMemory;
use super::pagemap::{self, Wanted};
use super::populate::Pages;
use crate::page_set::{PAGE_SIZE, PageSet};

const VERSION: u32 = 1;
/// The most bytes of a file beside its ranges.
const HEAD_LEN: u64 = 4096;
/// The most bytes of a file for each page of the memory: every other page is a range, and the
/// largest range of the largest memory has fewer than twice as many.
const LEN_PER_PAGE: u64 = 12;

/// A working set that cannot be written or read.
#[derive(Debug, Error)]
pub enum WorkingSetError {
    /// The host does not tell which pages it holds.
    #[error("the host does not tell which pages of the guest's memory are in use")]
    Pagemap(#[source] io::Error),
    /// The file cannot be made.
    #[error(transparent)]
    File(#[from] NewFileError),
    /// The file cannot be written.
    #[error("the working set cannot be written to {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file cannot be read.
    #[error("the working set cannot be read from {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no such file.
    #[error(
        "{} is no working set, as `brume ctl memory working-set FILE` writes it", path.display()
    )]
    Form {
        /// The file.
        path: PathBuf,
        /// Where it is wrong.
        source: serde_json::Error,
    },
    /// It is one that is not for this machine.
    #[error("the working set in {} cannot be used: {why}", path.display())]
    Misfit {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    version: u32,
    /// In bytes.
    page_size: u64,
    /// In bytes.
    memory_size: u64,
    /// The first page and how many.
    ranges: Vec<[u64; 2]>,
}

/// Writes the pages of `memory` that are mapped now to a new file at `path`; how many they are.
///
/// # Errors
///
/// The host does not tell them, or there can be no such file. What was at `path` is there then.
pub(crate) fn save(memory: &MachineMemory, path: &Path) -> Result<u64, WorkingSetError> {
    let pages = pagemap::find(&memory.regions, memory.size, Wanted::Mapped);
    let pages = pages.map_err(WorkingSetError::Pagemap)?;
    let content = Content {
        version: VERSION,
        page_size: PAGE_SIZE,
        memory_size: memory.size,
        ranges: pages
            .ranges()
            .map(|range| [range.start, range.end - range.start])
            .collect(),
    };
    let file = NewFile::create(path)?;
    let text = serde_json::to_vec(&content).map_err(io::Error::from);
    text.and_then(|text| file.file().write_all(&text))
        .map_err(|source| WorkingSetError::Write {
            path: path.into(),
            source,
        })?;
    file.commit()?;
    Ok(pages.count())
}

/// Reads the file at `path`, which has to be of a machine with `size` bytes of memory.
///
/// # Errors
///
/// It cannot be read, or is not of such a machine.
pub(crate) fn load(path: &Path, size: u64) -> Result<PageSet, WorkingSetError> {
    let fail = |source| WorkingSetError::Read {
        path: path.into(),
        source,
    };
    let misfit = |why: String| WorkingSetError::Misfit {
        path: path.into(),
        why,
    };
    let text = read(path, size).map_err(fail)?;
    let text = text.ok_or_else(|| misfit("it is too long for a machine of that size".into()))?;
    let content: Content =
        serde_json::from_slice(&text).map_err(|source| WorkingSetError::Form {
            path: path.into(),
            source,
        })?;
    content.pages(size).map_err(misfit)
}

/// What is in the file; `None` if that is more than a working set can be.
fn read(path: &Path, size: u64) -> io::Result<Option<Vec<u8>>> {
    if !path.metadata()?.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is not a regular file",
        ));
    }
    let limit = HEAD_LEN + size / PAGE_SIZE * LEN_PER_PAGE;
    let mut text = Vec::new();
    File::open(path)?.take(limit + 1).read_to_end(&mut text)?;
    Ok((text.len() as u64 <= limit).then_some(text))
}

impl Content {
    fn pages(&self, size: u64) -> Result<PageSet, String> {
        if self.version != VERSION {
            let version = self.version;
            return Err(format!(
                "it is of version {version}, and this brume knows {VERSION}"
            ));
        }
        if self.page_size != PAGE_SIZE {
            let found = self.page_size;
            return Err(format!("its pages have {found} bytes and not {PAGE_SIZE}"));
        }
        if self.memory_size != size {
            let found = self.memory_size;
            return Err(format!(
                "it is of a machine with {found} bytes of memory, and this one has {size}"
            ));
        }
        let mut pages = PageSet::empty(size);
        // In order and apart, or a file could name the same pages without end.
        let mut next = 0;
        for &[first, count] in &self.ranges {
            if first < next {
                return Err(format!(
                    "page {first} does not follow what was named before it"
                ));
            }
            let end = first.checked_add(count);
            let end = end.filter(|end| *end <= size / PAGE_SIZE);
            let end = end.ok_or_else(|| {
                format!("it names {count} pages from page {first} on, which are not all there")
            })?;
            pages.insert_range(first..end);
            next = end;
        }
        Ok(pages)
    }
}

/// Brings `pages` in while others go on.
pub(crate) fn prefetch(memory: &MachineMemory, pages: PageSet) {
    let source = Pages::of(memory);
    let bring = move || {
        // All at once, so that a disk has much to do at a time.
        source.read_ahead(&pages);
        if let Err(error) = source.read_in(&pages, || true) {
            tracing::warn!("not all of the working set was read: {error}");
        }
    };
    let started = thread::Builder::new().name("prefetch".into()).spawn(bring);
    if let Err(error) = started {
        tracing::warn!("the working set is not read: the host gives no thread: {error}");
    }
}

#[cfg(test)]
mod tests;
