// SPDX-License-Identifier: Apache-2.0
//! Memory whose pages another program gives, as they are touched for the first time.
//!
//! The memory is an ordinary mapping that is registered with a userfaultfd. That descriptor goes to
//! the program that listens at a unix socket, with a description of the mapping, and from then on
//! the program answers the faults. It is the protocol of Firecracker, whose handlers serve brume as
//! they are:
//!
//! ```text
//! brume --- connect -------------------------------------------------> handler
//!       --- [{"base_host_virt_addr":..,"size":..,"offset":..,
//!             "page_size":..,"page_size_kib":..}, ..] + SCM_RIGHTS --->
//!       <== UFFDIO_COPY, .. on the descriptor, for each fault =======
//!       === UFFD_EVENT_REMOVE, for memory that the balloon gave back =>
//! ```
//!
//! We keep the descriptor too. If the handler dies, a fault waits for ever then; without our copy
//! the kernel would take the registration back, and the guest would go on with pages of zeros.
//!
//! This is a module with unsafe code: calls and ioctls that no library has.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use brume_api::config::HugePages;
use serde::Serialize;
use thiserror::Error;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iowr_nr};

use super::handler::Handler;
use super::{Backing, HUGE_PAGE, MachineMemory, MemoryError, map};
use crate::page_set::{PAGE, PAGE_SIZE, Region};

/// A way to a userfaultfd for processes that may not make the call; whoever may open it may have
/// one that sees all faults.
const DEVICE: &str = "/dev/userfaultfd";

/// How long a handler may take to accept us.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// `UFFD_API`, the version of the interface.
const API: u64 = 0xaa;
/// Memory that is given back is told to the handler, which would else not know that it has to
/// serve it again.
const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
const REGISTER_MODE_MISSING: u64 = 1;

/// `struct uffdio_api` of linux/userfaultfd.h
#[repr(C)]
struct Handshake {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range` of linux/userfaultfd.h
#[repr(C)]
struct AddressRange {
    start: u64,
    len: u64,
}

/// `struct uffdio_register` of linux/userfaultfd.h
#[repr(C)]
struct Register {
    range: AddressRange,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_copy` of linux/userfaultfd.h
#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

/// `struct uffdio_zeropage` of linux/userfaultfd.h
#[repr(C)]
struct ZeroPage {
    range: AddressRange,
    mode: u64,
    zeroed: i64,
}

/// What the kernel tells of a fault: `struct uffd_msg` of linux/userfaultfd.h
#[repr(C)]
#[derive(Default)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    rest: u64,
}

const EVENT_PAGEFAULT: u8 = 0x12;

const _: () = assert!(size_of::<Copy>() == 40);
const _: () = assert!(size_of::<ZeroPage>() == 32);
const _: () = assert!(size_of::<Message>() == 32);
const _: () = assert!(size_of::<Handshake>() == 24);
const _: () = assert!(size_of::<AddressRange>() == 16);
const _: () = assert!(size_of::<Register>() == 32);

ioctl_io_nr!(USERFAULTFD_IOC_NEW, 0xaa, 0x00);
ioctl_iowr_nr!(UFFDIO_API, 0xaa, 0x3f, Handshake);
ioctl_iowr_nr!(UFFDIO_REGISTER, 0xaa, 0x00, Register);
ioctl_ior_nr!(UFFDIO_WAKE, 0xaa, 0x02, AddressRange);
ioctl_iowr_nr!(UFFDIO_COPY, 0xaa, 0x03, Copy);
ioctl_iowr_nr!(UFFDIO_ZEROPAGE, 0xaa, 0x04, ZeroPage);
ioctl_ior_nr!(UFFDIO_UNREGISTER, 0xaa, 0x01, AddressRange);

/// Memory that no handler serves. The words are Firecracker's where it has some.
#[derive(Debug, Error)]
pub enum UffdError {
    /// The memory itself.
    #[error("Failed to restore guest memory")]
    Map(#[from] MemoryError),
    /// There is no userfaultfd to be had.
    #[error(
        "Failed to UFFD object: the host gives no userfaultfd that sees the faults of KVM: run \
         with CAP_SYS_PTRACE, or let this user open /dev/userfaultfd, or allow it to all with \
         `sysctl vm.unprivileged_userfaultfd=1`"
    )]
    Create(#[source] io::Error),
    /// The kernel has not got what is needed.
    #[error("Failed to UFFD object: the host's kernel does not tell of memory that is given back")]
    Features(#[source] io::Error),
    /// The memory cannot be watched.
    #[error("Failed to register memory address range with the userfaultfd object")]
    Register(#[source] io::Error),
    /// Nobody is there.
    #[error("Failed to connect to UDS Unix stream")]
    Connect(#[source] io::Error),
    /// The handler does not take the descriptor.
    #[error("Failed to sends file descriptor")]
    Send(#[source] io::Error),
    /// The handler has ended.
    #[error(
        "the program that is to serve the guest's memory at {} has ended; look at what it says",
        .0.display()
    )]
    Gone(PathBuf),
    /// The handler does not answer.
    #[error(
        "the program that is to serve the guest's memory at {} has not answered a page fault \
         for {limit:?}", path.display()
    )]
    Silent {
        /// Its socket.
        path: PathBuf,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The host gives no thread to watch over the handler.
    #[error("the host gives no thread to wait for the guest's memory with")]
    Thread(#[source] io::Error),
    /// The pages cannot be had.
    #[error("the guest's memory cannot be read in")]
    ReadIn(#[source] io::Error),
}

/// Maps `size` bytes of memory of such `pages`, and lets the program at the socket `path` serve it.
///
/// # Errors
///
/// As for [`map`], or the host does not allow it, or nobody is there.
pub(crate) fn map_served(
    size: u64,
    pages: HugePages,
    path: &Path,
) -> Result<MachineMemory, UffdError> {
    let guest = map(size, pages)?;
    let mut memory = MachineMemory::new(guest, Backing::Uffd);
    let uffd = Uffd::new(pages)?;
    for region in &memory.regions {
        uffd.register(region).map_err(UffdError::Register)?;
    }
    let socket = connect(path)?;
    let parts = Part::all(&memory.regions, pages);
    let parts = serde_json::to_vec(&parts).map_err(|error| UffdError::Send(error.into()))?;
    socket
        .send_with_fd(&*parts, uffd.0.as_raw_fd())
        .map_err(|error| UffdError::Send(error.into()))?;
    let handler = Handler::new(uffd, socket, path, memory.regions.clone());
    memory.handler = Some(Arc::new(handler));
    Ok(memory)
}

/// Connects to the handler, which may let us wait.
fn connect(path: &Path) -> Result<UnixStream, UffdError> {
    let (sender, connected) = channel();
    let path = path.to_owned();
    let connect = move || drop(sender.send(UnixStream::connect(path)));
    thread::Builder::new()
        .name("uffd_connect".into())
        .spawn(connect)
        .map_err(UffdError::Thread)?;
    let result = connected.recv_timeout(CONNECT_LIMIT);
    result
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        .map_err(UffdError::Connect)
}

/// A part of the guest's memory, as a handler is told of it.
#[derive(Serialize)]
struct Part {
    /// Where it is in this process.
    base_host_virt_addr: u64,
    /// In bytes.
    size: u64,
    /// Where the memory file has it, in bytes.
    offset: u64,
    /// In bytes.
    page_size: u64,
    /// The same, also in bytes: an old name, which handlers may still go by.
    page_size_kib: u64,
}

impl Part {
    fn all(regions: &[Region], pages: HugePages) -> Vec<Self> {
        let page_size = match pages {
            HugePages::Size2M => HUGE_PAGE,
            HugePages::None | HugePages::Transparent => PAGE_SIZE,
        };
        let part = |region: &Region| Self {
            base_host_virt_addr: region.host_address as u64,
            size: region.size,
            offset: region.offset,
            page_size,
            page_size_kib: page_size,
        };
        regions.iter().map(part).collect()
    }
}

/// A userfaultfd.
pub(super) struct Uffd(OwnedFd);

impl Uffd {
    fn new(pages: HugePages) -> Result<Self, UffdError> {
        let huge = match pages {
            HugePages::Size2M => FEATURE_MISSING_HUGETLBFS,
            HugePages::None | HugePages::Transparent => 0,
        };
        Self::with_features(FEATURE_EVENT_REMOVE | huge)
    }

    /// One for memory of ordinary pages that this process serves itself, all of `regions`.
    pub(super) fn over(regions: &[Region]) -> Result<Self, UffdError> {
        let uffd = Self::with_features(0)?;
        for region in regions {
            uffd.register(region).map_err(UffdError::Register)?;
        }
        Ok(uffd)
    }

    fn with_features(features: u64) -> Result<Self, UffdError> {
        let uffd = Self(open().map_err(UffdError::Create)?);
        let mut handshake = Handshake {
            api: API,
            features,
            ioctls: 0,
        };
        // SAFETY: the structure is the one that the kernel reads and writes by this number.
        let result = unsafe { ioctl_with_mut_ref(&uffd, UFFDIO_API(), &mut handshake) };
        check(result).map_err(UffdError::Features)?;
        Ok(uffd)
    }

    pub(super) fn register(&self, region: &Region) -> io::Result<()> {
        let mut register = Register {
            range: range(region),
            mode: REGISTER_MODE_MISSING,
            ioctls: 0,
        };
        // SAFETY: the structure is the one that the kernel reads and writes by this number. The
        // range is a mapping of guest memory, whose first touches may wait from now on.
        check(unsafe { ioctl_with_mut_ref(self, UFFDIO_REGISTER(), &mut register) })
    }

    /// Gives pages their bytes, from `address` on, and lets those go on who wait for them. Of each
    /// page that is there already `is_there` is told where in `bytes` it is.
    ///
    /// # Errors
    ///
    /// Those of `is_there`; or the host has no memory, or `ENOENT`: the memory is not registered.
    pub(super) fn copy(
        &self,
        address: u64,
        bytes: &[u8],
        mut is_there: impl FnMut(Range<usize>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut done = 0;
        while let Some(rest @ [_, ..]) = bytes.get(done..) {
            let mut copy = Copy {
                to: address + done as u64,
                from: rest.as_ptr() as u64,
                len: rest.len() as u64,
                mode: 0,
                copied: 0,
            };
            // SAFETY: the structure is the one that the kernel reads and writes by this number. It
            // reads `len` bytes at `from`, which are `rest`, and writes only to registered memory.
            let result = unsafe { ioctl_with_mut_ref(self, UFFDIO_COPY(), &mut copy) };
            let Err(error) = check(result) else {
                break;
            };
            match error.raw_os_error() {
                Some(libc::EEXIST) => {
                    let page = done..done + PAGE;
                    is_there(page.clone())?;
                    done = page.end;
                }
                // As far as the first that is there, if it has copied any.
                Some(libc::EAGAIN) => done += usize::try_from(copy.copied).unwrap_or(0),
                Some(libc::EINTR) => {}
                _ => return Err(error),
            }
        }
        Ok(())
    }

    /// Gives the page at `address` zeros, and lets those go on who wait for it; unless it is there,
    /// which `is_there` is told.
    ///
    /// # Errors
    ///
    /// As for [`Uffd::copy`].
    pub(super) fn zero(
        &self,
        address: u64,
        is_there: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let mut zero = ZeroPage {
            range: AddressRange {
                start: address,
                len: PAGE_SIZE,
            },
            mode: 0,
            zeroed: 0,
        };
        loop {
            // SAFETY: the structure is the one that the kernel reads and writes by this number; it
            // writes only to registered memory.
            let result = unsafe { ioctl_with_mut_ref(self, UFFDIO_ZEROPAGE(), &mut zero) };
            let Err(error) = check(result) else {
                return Ok(());
            };
            match error.raw_os_error() {
                Some(libc::EEXIST) => return is_there(),
                Some(libc::EAGAIN | libc::EINTR) => {}
                _ => return Err(error),
            }
        }
    }

    /// Lets those go on who wait for pages that are there.
    pub(super) fn wake(&self, address: u64, len: u64) -> io::Result<()> {
        let range = AddressRange {
            start: address,
            len,
        };
        // SAFETY: the structure is the one that the kernel reads by this number; it writes nothing.
        check(unsafe { ioctl_with_ref(self, UFFDIO_WAKE(), &range) })
    }

    /// The address of the next fault; `None` if there is none now.
    pub(super) fn fault(&self) -> io::Result<Option<u64>> {
        loop {
            let mut message = Message::default();
            let len = size_of::<Message>();
            // SAFETY: the kernel writes at most `len` bytes to `message`, which may be any bytes.
            let read = unsafe { libc::read(self.as_raw_fd(), (&raw mut message).cast(), len) };
            if read < 0 {
                let error = io::Error::last_os_error();
                match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(None),
                    io::ErrorKind::Interrupted => continue,
                    _ => return Err(error),
                }
            }
            if usize::try_from(read) == Ok(len) && message.event == EVENT_PAGEFAULT {
                return Ok(Some(message.address));
            }
        }
    }

    /// Gives up `region`: who waits for a page of it finds zeros, as will all who come after. So
    /// the guest must not run any more, or yet.
    pub(super) fn unregister(&self, region: &Region) -> io::Result<()> {
        // SAFETY: the structure is the one that the kernel reads by this number; it writes nothing.
        check(unsafe { ioctl_with_ref(self, UFFDIO_UNREGISTER(), &range(region)) })
    }
}

impl AsRawFd for Uffd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn range(region: &Region) -> AddressRange {
    AddressRange {
        start: region.host_address as u64,
        len: region.size,
    }
}

/// A new userfaultfd, for faults of the kernel too: KVM's are among them.
fn open() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the call takes no pointer.
    let mut fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    if fd < 0 {
        let refused = io::Error::last_os_error();
        // What the call said is what can be mended most often.
        let device = File::open(DEVICE).map_err(|_| refused)?;
        let flags = libc::c_ulong::from(flags.cast_unsigned());
        // SAFETY: it takes flags by value, and no pointer.
        fd = unsafe { ioctl_with_val(&device, USERFAULTFD_IOC_NEW(), flags) }.into();
    }
    match RawFd::try_from(fd) {
        // SAFETY: the descriptor is new and nobody else has it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests;
