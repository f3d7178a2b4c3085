// SPDX-License-Identifier: Apache-2.0
//! The host's calls on a disk image that std does not have.
//!
//! This is a module with unsafe code: system calls on raw addresses of guest memory.

#![allow(unsafe_code)]

use std::ffi::c_int;
use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use libc::{iovec, off_t};

use crate::memory::IoBuffers;

/// The most vectors that one call takes (UIO_MAXIOV of the kernel).
pub(super) const MAX_VECTORS: usize = 1024;

// ioctls of block devices (linux/fs.h).
const BLKSSZGET: libc::Ioctl = 0x1268;
const BLKPBSZGET: libc::Ioctl = 0x127b;
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;
const BLKDISCARD: libc::Ioctl = 0x1277;

/// Which way data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// From the image to guest memory.
    Read,
    /// From guest memory to the image.
    Write,
}

/// Moves all of `buffers` from or to `offset` in the image, but for the first `done` bytes, which
/// were moved before; a `durable` write is on the host's disk when it returns. Returns how many
/// bytes of guest memory were written altogether, which are marked, and why it were not all.
pub(super) fn transfer(
    file: &File,
    direction: Direction,
    buffers: &IoBuffers,
    offset: u64,
    done: usize,
    durable: bool,
) -> (u32, io::Result<()>) {
    let (done, result) = transfer_rest(file, direction, buffers, offset, done, durable);
    if direction == Direction::Write {
        return (0, result);
    }
    buffers.mark_written(done);
    (u32::try_from(done).unwrap_or(u32::MAX), result)
}

fn transfer_rest(
    file: &File,
    direction: Direction,
    buffers: &IoBuffers,
    offset: u64,
    mut done: usize,
    durable: bool,
) -> (usize, io::Result<()>) {
    while done < buffers.len() {
        let at = offset + done as u64;
        let moved = if done == 0 {
            transfer_some(file, direction, buffers.as_iovecs(), at, durable)
        } else {
            transfer_some(file, direction, &vectors_after(buffers, done), at, durable)
        };
        match moved {
            Ok(0) => return (done, Err(end_of_image(direction))),
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (done, Err(error)),
        }
    }
    (done, Ok(()))
}

/// The image ended although it was large enough when it was opened.
fn end_of_image(direction: Direction) -> io::Error {
    match direction {
        Direction::Read => io::ErrorKind::UnexpectedEof.into(),
        Direction::Write => io::ErrorKind::WriteZero.into(),
    }
}

/// The vectors of `buffers` without their first `skip` bytes, to go on after a part was moved.
fn vectors_after(buffers: &IoBuffers, skip: usize) -> Vec<iovec> {
    let mut skip = skip;
    let rest = buffers.as_iovecs().iter().filter_map(|vector| {
        let cut = skip.min(vector.iov_len);
        skip -= cut;
        (cut < vector.iov_len).then(|| iovec {
            iov_base: vector.iov_base.wrapping_byte_add(cut),
            iov_len: vector.iov_len - cut,
        })
    });
    rest.collect()
}

fn transfer_some(
    file: &File,
    direction: Direction,
    vectors: &[iovec],
    offset: u64,
    durable: bool,
) -> io::Result<usize> {
    let fd = file.as_raw_fd();
    let offset = off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    let vectors = vectors.get(..MAX_VECTORS).unwrap_or(vectors);
    let count = c_int::try_from(vectors.len()).unwrap_or(0);
    let list = vectors.as_ptr();
    let moved = match (direction, vectors) {
        // One vector is the common case, and these calls are a little cheaper.
        (Direction::Read, [one]) => {
            // SAFETY: the vector lies in guest memory, which stays mapped while `buffers` lives,
            // and which nobody holds a reference into.
            unsafe { libc::pread(fd, one.iov_base, one.iov_len, offset) }
        }
        (Direction::Write, [one]) if !durable => {
            // SAFETY: as above; it is only read from.
            unsafe { libc::pwrite(fd, one.iov_base, one.iov_len, offset) }
        }
        (Direction::Read, _) => {
            // SAFETY: `list` has `count` vectors, each as above.
            unsafe { libc::preadv(fd, list, count, offset) }
        }
        (Direction::Write, _) => {
            let flags = if durable { libc::RWF_DSYNC } else { 0 };
            // SAFETY: `list` has `count` vectors, each as above.
            unsafe { libc::pwritev2(fd, list, count, offset, flags) }
        }
    };
    usize::try_from(moved).map_err(|_| io::Error::last_os_error())
}

/// `fallocate`, which keeps the size of the image in any case.
pub(super) fn fallocate(file: &File, mode: c_int, offset: u64, len: u64) -> io::Result<()> {
    let (offset, len) = (off_t::try_from(offset), off_t::try_from(len));
    let (Ok(offset), Ok(len)) = (offset, len) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: no memory is handed over.
    let result = unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) };
    check(result)
}

/// Writes zeroes, where the host has no better way.
pub(super) fn write_zeroes(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let zeroes = [0; 64 << 10];
    let end = offset.saturating_add(len);
    let mut at = offset;
    while at < end {
        let count = usize::try_from(end - at).unwrap_or(usize::MAX);
        let part = zeroes.get(..count).unwrap_or(&zeroes);
        file.write_all_at(part, at)?;
        at += part.len() as u64;
    }
    Ok(())
}

/// Discards a range of a block device of the host.
pub(super) fn discard_block_device(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: BLKDISCARD reads two 64-bit numbers.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, range.as_ptr()) };
    check(result)
}

/// Size, logical and physical block size of a block device, in bytes.
pub(super) fn block_device_geometry(file: &File) -> io::Result<(u64, u64, u64)> {
    let fd = file.as_raw_fd();
    let (mut size, mut logical, mut physical) = (0_u64, 0 as c_int, 0_u32);
    // SAFETY: BLKGETSIZE64 writes a 64-bit number.
    check(unsafe { libc::ioctl(fd, BLKGETSIZE64, &raw mut size) })?;
    // SAFETY: BLKSSZGET writes an int.
    check(unsafe { libc::ioctl(fd, BLKSSZGET, &raw mut logical) })?;
    // SAFETY: BLKPBSZGET writes an unsigned int.
    check(unsafe { libc::ioctl(fd, BLKPBSZGET, &raw mut physical) })?;
    Ok((
        size,
        u64::try_from(logical).unwrap_or(0),
        u64::from(physical),
    ))
}

/// Takes a lock on the whole file that lasts as long as the opened file does; `false` if another
/// one is in its way. It is advisory: it keeps those apart that ask for it.
pub(super) fn try_lock(file: &File, exclusive: bool) -> io::Result<bool> {
    // SAFETY: all zero is a valid `flock`: from the start of the file to its end.
    let mut lock: libc::flock = unsafe { mem::zeroed() };
    let kind = if exclusive {
        libc::F_WRLCK
    } else {
        libc::F_RDLCK
    };
    // Constants of 0 to 2, and SEEK_SET is 0 as it is.
    lock.l_type = libc::c_short::try_from(kind).unwrap_or_default();
    // Of the opened file and not of the process, whose other descriptors would drop it.
    // SAFETY: F_OFD_SETLK reads a `flock`.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    match check(result) {
        Ok(()) => Ok(true),
        Err(error) => match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => Ok(false),
            _ => Err(error),
        },
    }
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
