// SPDX-License-Identifier: Apache-2.0
//! A program that serves a guest's memory by userfaultfd, well or badly: the other side of
//! `"backend_type": "Uffd"` in tests, and an example of one.
//!
//! `uffd-handler SOCKET MEMORY HOW` listens at SOCKET and serves one machine from the memory file
//! MEMORY. HOW is `serve`; `serve-apart`, which closes the connection first; `lie`, with pages of
//! ones; `die` or `silent` at once; or `die=N` or `silent=N` after so many pages.
//!
//! This is a module with unsafe code: ioctls.

#![allow(unsafe_code)]
#![allow(missing_docs, reason = "macros make the numbers of ioctls")]
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a program for tests, which trusts its input"
)]

use std::collections::{BTreeSet, VecDeque};
use std::env;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use serde::Deserialize;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use vmm_sys_util::{ioctl_ior_nr, ioctl_iowr_nr};

/// `struct uffd_msg` of linux/userfaultfd.h
const MESSAGE_LEN: usize = 32;
const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_REMOVE: u8 = 0x15;

/// `struct uffdio_range`
#[repr(C)]
struct AddressRange {
    start: u64,
    len: u64,
}

/// `struct uffdio_copy`
#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

ioctl_iowr_nr!(UFFDIO_COPY, 0xaa, 0x03, Copy);
ioctl_ior_nr!(UFFDIO_WAKE, 0xaa, 0x02, AddressRange);

/// A part of the guest's memory.
#[derive(Deserialize)]
struct Part {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: u64,
}

/// How it serves.
struct Manner {
    /// What it does after so many pages.
    end: Option<(End, usize)>,
    lies: bool,
    apart: bool,
}

#[derive(Clone, Copy)]
enum End {
    Die,
    Silent,
}

impl Manner {
    fn of(text: &str) -> Self {
        let (name, count) = text.split_once('=').unwrap_or((text, "0"));
        let count = count.parse().expect("a number of pages");
        Self {
            end: match name {
                "die" => Some((End::Die, count)),
                "silent" => Some((End::Silent, count)),
                _ => None,
            },
            lies: name == "lie",
            apart: name == "serve-apart",
        }
    }
}

struct Handler {
    uffd: File,
    parts: Vec<Part>,
    memory: File,
    manner: Manner,
    /// Pages that the machine gave back: they are zeros from then on.
    removed: BTreeSet<u64>,
    /// Faults that are not answered yet, by address.
    faults: VecDeque<u64>,
    served: usize,
}

fn main() {
    let args: Vec<String> = env::args().collect();
    let [_, socket, memory, how] = &args[..] else {
        panic!("usage: uffd-handler SOCKET MEMORY HOW");
    };
    let listener = UnixListener::bind(socket).expect("a socket");
    let memory = File::open(memory).expect("a memory file");
    println!("listening");
    let (stream, _) = listener.accept().expect("a machine");
    let mut text = vec![0; 65536];
    let (len, uffd) = stream.recv_with_fd(&mut text).expect("a description");
    let parts = serde_json::from_slice(&text[..len]).expect("JSON");
    let mut handler = Handler {
        uffd: uffd.expect("a descriptor"),
        parts,
        memory,
        manner: Manner::of(how),
        removed: BTreeSet::new(),
        faults: VecDeque::new(),
        served: 0,
    };
    let stream = (!handler.manner.apart).then_some(stream);
    handler.run(stream.as_ref());
}

impl Handler {
    fn run(&mut self, stream: Option<&UnixStream>) {
        while wait(&self.uffd, stream) {
            if let Some((end, count)) = self.manner.end
                && self.served >= count
            {
                println!("end");
                match end {
                    End::Die => return,
                    End::Silent => loop {
                        thread::park();
                    },
                }
            }
            self.read();
            while let Some(address) = self.faults.pop_front() {
                if !self.serve(address) {
                    self.faults.push_front(address);
                    break;
                }
            }
        }
        println!("served {} removed {}", self.served, self.removed.len());
    }

    /// Takes all messages that are there. Memory that was given back has to be known before a fault
    /// is answered.
    fn read(&mut self) {
        let mut message = [0; MESSAGE_LEN];
        while (&self.uffd).read(&mut message).is_ok() {
            let word = |at: usize| u64::from_le_bytes(message[at..at + 8].try_into().unwrap());
            match message[0] {
                EVENT_PAGEFAULT => self.faults.push_back(word(16)),
                EVENT_REMOVE => {
                    let pages = (word(8)..word(16)).step_by(4096);
                    self.removed.extend(pages);
                    println!("removed");
                }
                other => panic!("event {other:#x}"),
            }
        }
    }

    /// Brings the page at `address`; whether that was possible yet.
    fn serve(&mut self, address: u64) -> bool {
        let part = self.parts.iter().find(|part| {
            (part.base_host_virt_addr..part.base_host_virt_addr + part.size).contains(&address)
        });
        let part = part.expect("a part");
        let dst = address - address % part.page_size;
        let mut page = vec![0; usize::try_from(part.page_size).unwrap()];
        if !self.removed.contains(&dst) {
            let offset = part.offset + (dst - part.base_host_virt_addr);
            self.memory
                .read_exact_at(&mut page, offset)
                .expect("a page");
        }
        if self.manner.lies {
            page.fill(0xff);
        }
        let mut copy = Copy {
            dst,
            src: page.as_ptr() as u64,
            len: part.page_size,
            mode: 0,
            copy: 0,
        };
        // SAFETY: the kernel reads `len` bytes from `src`, which has as many, and writes to memory
        // of another process, to which it belongs.
        let result = unsafe { ioctl_with_mut_ref(&self.uffd, UFFDIO_COPY(), &mut copy) };
        let error = io::Error::last_os_error();
        if result == 0 {
            self.served += 1;
            return true;
        }
        match error.raw_os_error() {
            // There is a message to be read first.
            Some(libc::EAGAIN) => false,
            // Another vCPU has asked for it too.
            Some(libc::EEXIST) => {
                let range = AddressRange {
                    start: dst,
                    len: part.page_size,
                };
                // SAFETY: the kernel reads the range, and wakes who waits for it.
                unsafe { ioctl_with_ref(&self.uffd, UFFDIO_WAKE(), &range) };
                true
            }
            // The machine has ended.
            Some(libc::ESRCH) => true,
            _ => panic!("UFFDIO_COPY: {error}"),
        }
    }
}

/// Waits for a message; whether the machine is still there.
fn wait(uffd: &File, stream: Option<&UnixStream>) -> bool {
    let fd = |fd, events| libc::pollfd {
        fd,
        events,
        revents: 0,
    };
    let stream = stream.map_or(-1, AsRawFd::as_raw_fd);
    let mut fds = [fd(uffd.as_raw_fd(), libc::POLLIN), fd(stream, 0)];
    // SAFETY: the kernel reads and writes the two structures that it is told of.
    unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) };
    (fds[0].revents | fds[1].revents) & (libc::POLLHUP | libc::POLLERR) == 0
}
