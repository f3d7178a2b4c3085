// SPDX-License-Identifier: Apache-2.0
//! Memory that another process can map: a file without a name (memfd), as large as the memory. A
//! machine that moves to another process of its host hands the file over, and no page is copied.
//!
//! The file's size is sealed. A process that touches a mapping beyond the end of its file is killed,
//! so no file is mapped that whoever handed it over could make shorter.
//!
//! This is a module with unsafe code: calls that no library has.

#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use brume_api::config::{HugePages, MachineConfig};
use thiserror::Error;

use super::{Backing, MachineMemory, MemoryError, map_whole};
use crate::page_set::{PAGE_SIZE, PageSet};

/// What /proc shows of it.
const NAME: &CStr = c"guest-memory";

/// Nobody can make it shorter or longer, or take that back.
const SEALS: libc::c_int = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;

/// Memory that was handed over and cannot be used.
#[derive(Debug, Error)]
pub(crate) enum HandedError {
    /// It may be any file, or it could be made shorter while it is in use.
    #[error("the memory that was handed over is no memfd that is sealed against shrinking")]
    NotSealed,
    /// It is of reserved huge pages, whose lack would end the process.
    #[error("the memory that was handed over is not of ordinary pages")]
    NotOrdinary,
    /// It is another machine's.
    #[error("the memory that was handed over has {found} bytes and the machine {size}")]
    Size {
        /// What it has, in bytes.
        found: u64,
        /// What it must have.
        size: u64,
    },
    /// The host does not tell what it is.
    #[error("the memory that was handed over cannot be looked at")]
    Look(#[source] io::Error),
    /// It cannot be mapped.
    #[error(transparent)]
    Map(#[from] MemoryError),
}

/// Makes memory of zeros for `machine`.
///
/// # Errors
///
/// No machine has that size, or the host has not got the memory.
pub(super) fn create(machine: &MachineConfig) -> Result<MachineMemory, MemoryError> {
    let size = machine.memory_bytes();
    let file = sealed(size).map_err(|error| MemoryError::Map(error.to_string()))?;
    map(size, file, machine.huge_pages)
}

/// Maps what another process has handed over as the memory of `machine`.
///
/// # Errors
///
/// It is not such memory. Nothing of it was touched then.
pub(crate) fn adopt(machine: &MachineConfig, fd: OwnedFd) -> Result<MachineMemory, HandedError> {
    let size = machine.memory_bytes();
    let file = File::from(fd);
    check(&file, size)?;
    Ok(map(size, file, machine.huge_pages)?)
}

fn map(size: u64, file: File, pages: HugePages) -> Result<MachineMemory, MemoryError> {
    let own = file
        .try_clone()
        .map_err(|error| MemoryError::Map(error.to_string()))?;
    let guest = map_whole(size, file, libc::MAP_SHARED, pages)?;
    Ok(MachineMemory::new(guest, Backing::Shared(own)))
}

fn sealed(size: u64) -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    let file = match memfd(flags | libc::MFD_NOEXEC_SEAL) {
        // A kernel before 6.3.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => memfd(flags)?,
        file => file?,
    };
    file.set_len(size)?;
    // SAFETY: the call takes no pointer.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, SEALS) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

fn memfd(flags: libc::c_uint) -> io::Result<File> {
    // SAFETY: the name ends with a zero byte, and is only read.
    let fd: RawFd = unsafe { libc::memfd_create(NAME.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else has it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Sees to it that `file` is of `size` bytes for as long as it is there.
fn check(file: &File, size: u64) -> Result<(), HandedError> {
    // First of all, because it is answered for any file without whoever is behind it.
    // SAFETY: the call takes no pointer.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 {
        return Err(HandedError::NotSealed);
    }
    if !is_ordinary(file).map_err(HandedError::Look)? {
        return Err(HandedError::NotOrdinary);
    }
    let found = file.metadata().map_err(HandedError::Look)?.len();
    if found != size {
        return Err(HandedError::Size { found, size });
    }
    Ok(())
}

/// Whether `file` is of pages that need no reservation.
fn is_ordinary(file: &File) -> io::Result<bool> {
    let mut system = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the kernel writes one structure of that type to where there is room for one.
    let result = unsafe { libc::fstatfs(file.as_raw_fd(), system.as_mut_ptr()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has succeeded, so all of it was written.
    let system = unsafe { system.assume_init() };
    Ok(system.f_type == libc::TMPFS_MAGIC)
}

/// The pages in the bytes `part` of `file` that something was written to, numbered from the first of
/// `part`. All others are zeros. What is written meanwhile may be among them or not.
///
/// # Errors
///
/// The host does not tell.
pub(crate) fn written_pages(file: &File, part: Range<u64>) -> io::Result<PageSet> {
    let mut pages = PageSet::empty(part.end.saturating_sub(part.start));
    let mut place = part.start;
    while let Some(start) = seek(file, place, libc::SEEK_DATA)?.filter(|&at| at < part.end) {
        // Pages that are given back between both looks end where they begin.
        let hole = seek(file, start, libc::SEEK_HOLE)?.unwrap_or(part.end);
        let end = hole.min(part.end);
        let page = |at: u64| (at - part.start) / PAGE_SIZE;
        pages.insert_range(page(start)..page(end));
        place = end.max(start + PAGE_SIZE);
        if place >= part.end {
            break;
        }
    }
    Ok(pages)
}

/// The first place from `from` on where there is data or a hole; `None` if there is none. The
/// position of the file, which both processes have in common, is of no use to anybody.
fn seek(file: &File, from: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    let from = libc::off_t::try_from(from).map_err(io::Error::other)?;
    // SAFETY: the call takes no pointer.
    let place = unsafe { libc::lseek(file.as_raw_fd(), from, whence) };
    if let Ok(place) = u64::try_from(place) {
        return Ok(Some(place));
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        error => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    use super::*;

    const MIB: u64 = 4;
    const SIZE: u64 = MIB << 20;

    fn machine() -> MachineConfig {
        MachineConfig {
            mem_size_mib: MIB,
            shared_memory: true,
            ..MachineConfig::default()
        }
    }

    fn file_of(memory: &MachineMemory) -> File {
        match &memory.backing {
            Backing::Shared(file) => file.try_clone().unwrap(),
            _ => panic!("not shared"),
        }
    }

    fn at(page: u64) -> GuestAddress {
        GuestAddress(page * PAGE_SIZE)
    }

    fn plain(size: u64) -> File {
        let file = memfd(libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING).unwrap();
        file.set_len(size).unwrap();
        file
    }

    #[test]
    fn who_is_handed_the_memory_has_the_same_pages() {
        let first = create(&machine()).unwrap();
        first.guest.write_obj(7_u8, at(5)).unwrap();
        let second = adopt(&machine(), file_of(&first).into()).unwrap();
        assert_eq!(second.size, SIZE);
        assert_eq!(second.guest.read_obj::<u8>(at(5)).unwrap(), 7);
        second.guest.write_obj(8_u8, at(5)).unwrap();
        assert_eq!(first.guest.read_obj::<u8>(at(5)).unwrap(), 8);
        // It can be handed on.
        drop(first);
        let third = adopt(&machine(), file_of(&second).into()).unwrap();
        assert_eq!(third.guest.read_obj::<u8>(at(5)).unwrap(), 8);
    }

    #[test]
    fn its_size_stays() {
        let file = file_of(&create(&machine()).unwrap());
        for size in [0, SIZE - 4096, SIZE + 4096] {
            let error = file.set_len(size).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{size}");
        }
        assert!(file.write_all_at(&[1], SIZE).is_err());
    }

    #[test]
    fn what_could_become_shorter_is_not_mapped() {
        let disk = tempfile::tempfile().unwrap();
        disk.set_len(SIZE).unwrap();
        let null = File::open("/dev/null").unwrap();
        let (pipe, _other) = io::pipe().unwrap();
        for fd in [plain(SIZE).into(), disk.into(), null.into(), pipe.into()] {
            let result = adopt(&machine(), fd);
            assert!(matches!(result, Err(HandedError::NotSealed)));
        }
        let grows = plain(SIZE);
        // SAFETY: the call takes no pointer.
        unsafe { libc::fcntl(grows.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_GROW) };
        let result = adopt(&machine(), grows.into());
        assert!(matches!(result, Err(HandedError::NotSealed)));
    }

    #[test]
    fn only_memory_of_the_right_size_is_mapped() {
        for size in [0, SIZE - 4096, SIZE + 4096] {
            let result = adopt(&machine(), sealed(size).unwrap().into());
            assert!(matches!(result, Err(HandedError::Size { found, .. }) if found == size));
        }
    }

    #[test]
    fn memory_that_cannot_be_written_is_not_mapped() {
        let file = sealed(SIZE).unwrap();
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let result = adopt(&machine(), File::open(path).unwrap().into());
        assert!(matches!(result, Err(HandedError::Map(_))));
    }

    #[test]
    fn reserved_huge_pages_are_not_mapped() {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        let file = memfd(flags | libc::MFD_HUGETLB | libc::MFD_HUGE_2MB).unwrap();
        file.set_len(SIZE).unwrap();
        // SAFETY: the call takes no pointer.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, SEALS) };
        let result = adopt(&machine(), file.into());
        assert!(matches!(result, Err(HandedError::NotOrdinary)));
    }

    #[test]
    fn pages_count_as_written_whoever_wrote_them() {
        let first = create(&machine()).unwrap();
        let second = adopt(&machine(), file_of(&first).into()).unwrap();
        assert_eq!(second.written_pages().unwrap().count(), 0);
        for page in [3, 4, 700, 1023] {
            first.guest.write_obj(1_u8, at(page)).unwrap();
        }
        let written = |memory: &MachineMemory| -> Vec<u64> {
            let pages = memory.written_pages().unwrap();
            pages.ranges().flatten().collect()
        };
        assert_eq!(written(&second), [3, 4, 700, 1023]);
        let file = file_of(&first);
        let part = written_pages(&file, 4 * PAGE_SIZE..701 * PAGE_SIZE).unwrap();
        assert_eq!(part.ranges().flatten().collect::<Vec<_>>(), [0, 696]);
        // What is given back is zeros for both.
        let slice = first.guest.get_slice(at(4), 4096).unwrap();
        let place = slice.ptr_guard_mut().as_ptr();
        // SAFETY: the page is within the mapping of the memory that was just made.
        let result = unsafe { libc::madvise(place.cast(), 4096, libc::MADV_REMOVE) };
        assert_eq!(result, 0);
        assert_eq!(second.guest.read_obj::<u8>(at(3)).unwrap(), 1);
        assert_eq!(written(&second), [3, 700, 1023]);
        assert_eq!(second.guest.read_obj::<u8>(at(4)).unwrap(), 0);
    }
}
