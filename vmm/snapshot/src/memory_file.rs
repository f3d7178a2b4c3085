// SPDX-License-Identifier: Apache-2.0
//! Memory files: raw, as long as the memory, with holes for what is not there.
//!
//! In a full memory file a hole is zeros; in that of a diff it is a page that did not change. So a
//! copy has to keep holes: of a diff whose holes were filled up with zeros (by a copy over the
//! network, or by a file system without holes) nothing tells it from one with zeros in all pages.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::host;

/// How much is copied at once when nothing better than reading and writing works, in bytes.
const BUFFER_BYTES: usize = 1 << 20;

/// Where in the first `len` bytes of a file there is data, in order, in units of the file system's
/// blocks. All the rest is holes. Moves the file's position.
///
/// # Errors
///
/// The file cannot be searched.
pub fn data_ranges(file: &File, len: u64) -> io::Result<Vec<Range<u64>>> {
    let mut ranges = Vec::new();
    let mut offset = 0;
    while offset < len {
        let Some(start) = host::seek_data(file, offset)?.filter(|&start| start < len) else {
            break;
        };
        let end = host::seek_hole(file, start)?.min(len);
        if end <= start {
            // The file is being changed by someone else.
            return Err(io::Error::other("the file changed while it was searched"));
        }
        ranges.push(start..end);
        offset = end;
    }
    Ok(ranges)
}

/// Gives back the storage of a range, which reads as zeros from then on. The file's length stays.
///
/// # Errors
///
/// The range is empty, the file system has no holes, or the file cannot be written.
pub fn punch_hole(file: &File, range: &Range<u64>) -> io::Result<()> {
    host::punch_hole(file, range)
}

/// Whether a range has no storage at all.
///
/// # Errors
///
/// The file cannot be searched.
pub fn is_hole(file: &File, range: &Range<u64>) -> io::Result<bool> {
    let data = host::seek_data(file, range.start)?;
    Ok(data.is_none_or(|data| data >= range.end))
}

/// Makes an empty file a copy of the first `len` bytes of another one, holes and all. The two
/// share their storage where the file system can do that.
///
/// # Errors
///
/// `from` is shorter than `len`, the disk is full, or the files cannot be read or written.
pub fn clone_file(from: &File, to: &File, len: u64) -> io::Result<CopyMethod> {
    if from.metadata()?.len() < len {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    match host::clone_whole(from, to) {
        Ok(()) => {
            to.set_len(len)?;
            return Ok(CopyMethod::Clone);
        }
        Err(error) if !is_unsupported(&error) => return Err(error),
        Err(_) => {}
    }
    to.set_len(len)?;
    let mut copier = Copier::new(from, to);
    for range in data_ranges(from, len)? {
        copier.copy(range)?;
    }
    Ok(copier.method)
}

/// How bytes get from one file into another.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CopyMethod {
    /// They do not: both files have the same blocks until one is written.
    Clone,
    /// Inside the kernel.
    CopyRange,
    /// Through this process.
    ReadWrite,
}

/// Copies ranges to the same places of another file, in the best way that works between the two.
pub(crate) struct Copier<'a> {
    from: &'a File,
    to: &'a File,
    /// The best way that has not failed so far.
    pub(crate) method: CopyMethod,
}

impl<'a> Copier<'a> {
    pub(crate) fn new(from: &'a File, to: &'a File) -> Self {
        let method = CopyMethod::Clone;
        Self { from, to, method }
    }

    /// Copies one range, which is in both files.
    ///
    /// # Errors
    ///
    /// The disk is full, or the files cannot be read or written.
    pub(crate) fn copy(&mut self, mut range: Range<u64>) -> io::Result<()> {
        while !range.is_empty() {
            let copied = match self.method {
                CopyMethod::Clone => {
                    let length = range.end - range.start;
                    host::clone_range(self.from, self.to, &range).map(|()| length)
                }
                CopyMethod::CopyRange => host::copy_range(self.from, self.to, &range),
                CopyMethod::ReadWrite => return read_write(self.from, self.to, range),
            };
            match copied {
                // Reading says what the matter is.
                Ok(0) => self.method = CopyMethod::ReadWrite,
                Ok(copied) => range.start = range.start.saturating_add(copied),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_unsupported(&error) => self.method = self.method.next_best(),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl CopyMethod {
    fn next_best(self) -> Self {
        match self {
            Self::Clone => Self::CopyRange,
            Self::CopyRange | Self::ReadWrite => Self::ReadWrite,
        }
    }
}

/// Whether the system cannot do a thing at all, for these files or at this offset.
fn is_unsupported(error: &io::Error) -> bool {
    let number = error.raw_os_error();
    number.is_some_and(|number| {
        [
            libc::EINVAL,
            libc::ENOSYS,
            libc::ENOTTY,
            libc::EOPNOTSUPP,
            // A filter of system calls.
            libc::EPERM,
            libc::EXDEV,
        ]
        .contains(&number)
    })
}

fn read_write(from: &File, to: &File, mut range: Range<u64>) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    while !range.is_empty() {
        let left = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        let chunk = buffer.get_mut(..left.min(BUFFER_BYTES)).unwrap_or_default();
        from.read_exact_at(chunk, range.start)?;
        to.write_all_at(chunk, range.start)?;
        range.start = range.start.saturating_add(chunk.len() as u64);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
