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

/// A transfer between the image and guest memory.
#[derive(Clone, Copy)]
pub(super) struct Transfer<'a> {
    pub(super) file: &'a File,
    pub(super) direction: Direction,
    /// Offset in the image, in bytes.
    pub(super) offset: u64,
    /// Flags of `preadv2` and `pwritev2`, such as `RWF_DSYNC`.
    pub(super) flags: c_int,
}

impl Transfer<'_> {
    /// Moves all of `buffers`, but for the first `done` bytes, which were moved before. Returns how
    /// many bytes of guest memory were written altogether, which are marked, and why it were not
    /// all.
    pub(super) fn run(&self, buffers: &IoBuffers, done: usize) -> (u32, io::Result<()>) {
        let (done, result) = self.run_from(buffers, done);
        match self.direction {
            Direction::Read => {
                if result.is_err() {
                    // What failed may have begun.
                    buffers.mark_written(buffers.len());
                }
                (written(buffers, done), result)
            }
            Direction::Write => (0, result),
        }
    }

    fn run_from(&self, buffers: &IoBuffers, mut done: usize) -> (usize, io::Result<()>) {
        while done < buffers.len() {
            let moved = if done == 0 {
                self.call(buffers.as_iovecs(), self.offset)
            } else {
                self.call(&vectors_after(buffers, done), self.offset + done as u64)
            };
            match moved {
                // The image ended, although it was large enough when it was opened.
                Ok(0) => return (done, Err(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return (done, Err(error)),
            }
        }
        (done, Ok(()))
    }

    /// Moves all of `buffers` at once, or nothing that counts. Returns how many bytes of guest
    /// memory were written.
    ///
    /// # Errors
    ///
    /// Not everything was moved; `WouldBlock` if only because of that.
    pub(super) fn try_at_once(&self, buffers: &IoBuffers) -> io::Result<u32> {
        let moved = self.call(buffers.as_iovecs(), self.offset)?;
        let count = match self.direction {
            // What was moved is there even if it does not count.
            Direction::Read => written(buffers, moved),
            Direction::Write => 0,
        };
        if moved < buffers.len() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(count)
    }

    /// One system call on the first of `vectors`.
    ///
    /// It is made directly: the functions of libc are points of cancellation, which costs.
    fn call(&self, vectors: &[iovec], offset: u64) -> io::Result<usize> {
        let fd = self.file.as_raw_fd();
        let offset = off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let moved = if let ([one], 0) = (vectors, self.flags) {
            // The common case, for which there are cheaper calls.
            let number = match self.direction {
                Direction::Read => libc::SYS_pread64,
                Direction::Write => libc::SYS_pwrite64,
            };
            let (base, len) = (one.iov_base, one.iov_len);
            // SAFETY: the vector lies in guest memory, which stays mapped while its list lives,
            // and which nobody holds a reference into.
            unsafe { libc::syscall(number, fd, base, len, offset) }
        } else {
            let number = match self.direction {
                Direction::Read => libc::SYS_preadv2,
                Direction::Write => libc::SYS_pwritev2,
            };
            let (list, count) = (vectors.as_ptr(), vectors.len().min(MAX_VECTORS));
            // The high half of the offset is for hosts of 32 bits.
            let (high, flags) = (0_usize, self.flags);
            // SAFETY: `list` has at least `count` vectors, each as above.
            unsafe { libc::syscall(number, fd, list, count, offset, high, flags) }
        };
        usize::try_from(moved).map_err(|_| io::Error::last_os_error())
    }
}

/// Marks the first `count` bytes of `buffers` as written; the number as the used ring has it.
fn written(buffers: &IoBuffers, count: usize) -> u32 {
    buffers.mark_written(count);
    u32::try_from(count).unwrap_or(u32::MAX)
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
    let kind = if exclusive {
        libc::F_WRLCK
    } else {
        libc::F_RDLCK
    };
    match set_lock(file, kind) {
        Ok(()) => Ok(true),
        Err(error) => match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => Ok(false),
            _ => Err(error),
        },
    }
}

/// Gives the lock up.
pub(super) fn unlock(file: &File) -> io::Result<()> {
    set_lock(file, libc::F_UNLCK)
}

fn set_lock(file: &File, kind: c_int) -> io::Result<()> {
    // SAFETY: all zero is a valid `flock`: from the start of the file to its end.
    let mut lock: libc::flock = unsafe { mem::zeroed() };
    // Constants of 0 to 2, and SEEK_SET is 0 as it is.
    lock.l_type = libc::c_short::try_from(kind).unwrap_or_default();
    // Of the opened file and not of the process, whose other descriptors would drop it.
    // SAFETY: F_OFD_SETLK reads a `flock`.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) })
}

/// Lets the host forget what it has cached of the file and is not about to write.
pub(super) fn drop_cache(file: &File) -> io::Result<()> {
    // SAFETY: takes no pointer.
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
