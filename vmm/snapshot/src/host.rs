// SPDX-License-Identifier: Apache-2.0
//! The system calls on files that the standard library does not have.
//!
//! This is the module with unsafe code: each block is one call with plain numbers and descriptors
//! that are borrowed for as long as it takes.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// Where the first data at or after `offset` begins, or `None` if only a hole follows.
///
/// # Errors
///
/// The file cannot be searched.
pub(crate) fn seek_data(file: &File, offset: u64) -> io::Result<Option<u64>> {
    match seek(file, offset, libc::SEEK_DATA) {
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        found => found.map(Some),
    }
}

/// Where the first hole at or after `offset`, which is in the file, begins; its end is one.
///
/// # Errors
///
/// The file cannot be searched, or ends before `offset`.
pub(crate) fn seek_hole(file: &File, offset: u64) -> io::Result<u64> {
    seek(file, offset, libc::SEEK_HOLE)
}

fn seek(file: &File, offset: u64, whence: libc::c_int) -> io::Result<u64> {
    let offset = signed(offset)?;
    // SAFETY: the descriptor is open while `file` is borrowed, and no memory is passed.
    let found = unsafe { libc::lseek64(file.as_raw_fd(), offset, whence) };
    u64::try_from(found).map_err(|_| io::Error::last_os_error())
}

/// Gives back the storage of a range, which reads as zeros from then on. The length stays.
///
/// # Errors
///
/// The file system has no holes, or the file cannot be written.
pub(crate) fn punch_hole(file: &File, range: &Range<u64>) -> io::Result<()> {
    let (offset, length) = (signed(range.start)?, signed(length(range))?);
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: the descriptor is open while `file` is borrowed, and no memory is passed.
    done(unsafe { libc::fallocate64(file.as_raw_fd(), mode, offset, length) })
}

/// Makes all of `to` share the storage of `from` until one of them is written.
///
/// # Errors
///
/// The file systems are not one that can share.
pub(crate) fn clone_whole(from: &File, to: &File) -> io::Result<()> {
    // SAFETY: the request takes a descriptor as its argument; both are open while borrowed.
    done(unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONE, from.as_raw_fd()) })
}

/// Makes a range of `to` share the storage of the same range of `from`.
///
/// # Errors
///
/// The file systems are not one that can share, or the range is not of whole blocks.
pub(crate) fn clone_range(from: &File, to: &File, range: &Range<u64>) -> io::Result<()> {
    let request = libc::file_clone_range {
        src_fd: from.as_raw_fd().into(),
        src_offset: range.start,
        src_length: length(range),
        dest_offset: range.start,
    };
    // SAFETY: the request only reads the structure, which outlives the call; both descriptors are
    // open while borrowed.
    done(unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONERANGE, &raw const request) })
}

/// Copies the beginning of a range to the same place of `to`, in the kernel; says how much, in
/// bytes, which is 0 at the end of `from`.
///
/// # Errors
///
/// The kernel cannot copy between the two, or the disk is full.
pub(crate) fn copy_range(from: &File, to: &File, range: &Range<u64>) -> io::Result<u64> {
    let (mut read_at, mut write_at) = (signed(range.start)?, signed(range.start)?);
    // More at once is less often a place to be interrupted at.
    let length = usize::try_from(length(range).min(1 << 30)).unwrap_or(1 << 30);
    // SAFETY: the two offsets outlive the call; both descriptors are open while borrowed.
    let copied = unsafe {
        libc::copy_file_range(
            from.as_raw_fd(),
            &raw mut read_at,
            to.as_raw_fd(),
            &raw mut write_at,
            length,
            0,
        )
    };
    u64::try_from(copied).map_err(|_| io::Error::last_os_error())
}

fn length(range: &Range<u64>) -> u64 {
    range.end.saturating_sub(range.start)
}

/// As an offset of the kernel's.
fn signed(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn done(result: libc::c_int) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
