// SPDX-License-Identifier: Apache-2.0
//! The engine that has many requests in flight, by io_uring.
//!
//! Requests are put into the submission ring as they come and handed over together, with one
//! system call for each look at the queue; answers are found in the completion ring without one.
//! What the page cache has is read within that call.
//!
//! Some things are better done on the worker's thread, at once:
//!
//! - a read with nothing else in flight, if the page cache has it: the ring would add its cost and
//!   save no call;
//! - a write to the page cache. Few file systems can say that it would have to wait; for the
//!   others io_uring gives each write to a thread of the kernel, which takes twice as long or
//!   more and gains nothing, since writes to one file wait for each other;
//! - what io_uring did only in part or refused, and what takes more than one step.
//!
//! This is a module with unsafe code: the kernel works on raw addresses of guest memory for as
//! long as a request is in flight.

#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use io_uring::{IoUring, opcode, squeue, types};
use libc::{FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, RWF_NOWAIT};

use super::disk::Disk;
use super::engine::{Done, Engine, Image, Ticket, is_refused};
use super::host::{Direction, MAX_VECTORS, Transfer};
use super::request::Request;
use crate::memory::{GuestMemory, IoBuffers};

/// The most requests in flight; a power of two.
const DEPTH: u16 = 128;
/// How often the kernel is asked again while it has no memory for requests, and the pause before.
const RETRIES: u32 = 1000;
const RETRY_PAUSE: Duration = Duration::from_millis(1);

/// An io_uring.
///
/// The image is not registered with it: that saves little, and the kernel closes what is
/// registered, and drops its locks, only some time after the ring is gone.
pub(super) struct Ring(IoUring);

impl Ring {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(IoUring::new(DEPTH.into())?))
    }
}

/// A request in flight. The kernel has the address of its buffers: they are not touched.
struct InFlight {
    request: Request,
    ticket: Ticket,
    buffers: IoBuffers,
}

/// Requests in flight on a [`Ring`].
pub(super) struct AsyncEngine {
    ring: Ring,
    image: Image,
    memory: GuestMemory,
    /// The buffers of the next request.
    buffers: IoBuffers,
    /// Lists to be used again.
    spare: Vec<IoBuffers>,
    /// What is in flight, at the index that the kernel has as its user data.
    slots: Vec<Option<InFlight>>,
    /// The indices with nothing in flight.
    free: Vec<u16>,
    /// Whether the file system takes `RWF_NOWAIT` for reads.
    reads_now: bool,
    /// Whether the file system takes `RWF_NOWAIT` for writes.
    writes_now: bool,
}

impl AsyncEngine {
    pub(super) fn new(ring: Ring, image: Image, memory: GuestMemory) -> Self {
        Self {
            ring,
            image,
            buffers: IoBuffers::new(memory.clone()),
            spare: Vec::new(),
            slots: (0..DEPTH).map(|_| None).collect(),
            free: (0..DEPTH).collect(),
            memory,
            reads_now: true,
            writes_now: true,
        }
    }

    fn has_in_flight(&self) -> bool {
        self.free.len() < self.slots.len()
    }

    fn file(&self) -> types::Fd {
        types::Fd(self.image.disk.file.as_raw_fd())
    }

    /// What io_uring has to do for `request`; `None` if it is not one for io_uring.
    fn entry(&self, request: Request) -> Option<squeue::Entry> {
        let entry = match request {
            Request::Read { offset, .. } => self.transfer_entry(Direction::Read, offset)?,
            Request::Write { offset, .. } => self.transfer_entry(Direction::Write, offset)?,
            Request::Flush => opcode::Fsync::new(self.file())
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            // These take more than one step.
            Request::Discard { .. } if self.image.disk.is_block_device => return None,
            Request::Discard { .. } | Request::WriteZeroes { .. } if self.image.durable => {
                return None;
            }
            Request::Discard { offset, len } => {
                self.fallocate_entry(FALLOC_FL_PUNCH_HOLE, offset, len)?
            }
            Request::WriteZeroes { offset, len, unmap } => {
                let mode = if unmap {
                    FALLOC_FL_PUNCH_HOLE
                } else {
                    FALLOC_FL_ZERO_RANGE
                };
                self.fallocate_entry(mode, offset, len)?
            }
            Request::GetId => return None,
        };
        Some(entry)
    }

    fn transfer_entry(&self, direction: Direction, offset: u64) -> Option<squeue::Entry> {
        let flags = self.image.transfer(direction, offset).flags;
        let vectors = self.buffers.as_iovecs();
        let entry = match (direction, vectors) {
            (_, []) => return None,
            // One vector is the common case and a little cheaper.
            (Direction::Read, [one]) => {
                let len = u32::try_from(one.iov_len).ok()?;
                opcode::Read::new(self.file(), one.iov_base.cast(), len)
                    .offset(offset)
                    .build()
            }
            (Direction::Write, [one]) => {
                let len = u32::try_from(one.iov_len).ok()?;
                let write = opcode::Write::new(self.file(), one.iov_base.cast_const().cast(), len);
                write.offset(offset).rw_flags(flags).build()
            }
            _ if vectors.len() > MAX_VECTORS => return None,
            (Direction::Read, _) => {
                let len = u32::try_from(vectors.len()).ok()?;
                opcode::Readv::new(self.file(), vectors.as_ptr(), len)
                    .offset(offset)
                    .build()
            }
            (Direction::Write, _) => {
                let len = u32::try_from(vectors.len()).ok()?;
                let write = opcode::Writev::new(self.file(), vectors.as_ptr(), len);
                write.offset(offset).rw_flags(flags).build()
            }
        };
        Some(entry)
    }

    fn fallocate_entry(&self, mode: i32, offset: u64, len: u64) -> Option<squeue::Entry> {
        let fallocate = opcode::Fallocate::new(self.file(), len).offset(offset);
        (len > 0).then(|| fallocate.mode(mode | FALLOC_FL_KEEP_SIZE).build())
    }

    /// Puts `entry` into the submission ring, with the buffers that were filled for it; `false`
    /// if it does not fit.
    fn push(&mut self, entry: squeue::Entry, request: Request, ticket: Ticket) -> bool {
        let Some(index) = self.free.pop() else {
            return false;
        };
        let Some(slot) = self.slots.get_mut(usize::from(index)) else {
            return false;
        };
        let entry = entry.user_data(index.into());
        // SAFETY: the buffers of the entry go to the slot below, which keeps list and guest
        // memory as they are until the completion is seen. The image is open as long as `self` lives.
        if unsafe { self.ring.0.submission().push(&entry) }.is_err() {
            self.free.push(index);
            return false;
        }
        let next = self.spare.pop();
        let next = next.unwrap_or_else(|| IoBuffers::new(self.memory.clone()));
        let buffers = mem::replace(&mut self.buffers, next);
        *slot = Some(InFlight {
            request,
            ticket,
            buffers,
        });
        true
    }

    /// Ends a request for which io_uring gave `result`.
    fn complete(
        &self,
        request: Request,
        buffers: &IoBuffers,
        result: i32,
    ) -> (u32, io::Result<()>) {
        let moved = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
        let image = &self.image;
        match (request, moved) {
            (_, Err(error)) if wants_another_try(&error, request) => {
                image.execute(request, buffers)
            }
            (_, Err(error)) => {
                if let Request::Read { .. } = request {
                    // What failed may have begun.
                    buffers.mark_written(buffers.len());
                }
                (0, Err(error))
            }
            // What is left of a transfer is done here.
            (Request::Read { offset, .. }, Ok(done)) => {
                image.transfer(Direction::Read, offset).run(buffers, done)
            }
            (Request::Write { offset, .. }, Ok(done)) => {
                image.transfer(Direction::Write, offset).run(buffers, done)
            }
            (_, Ok(_)) => (0, Ok(())),
        }
    }

    /// Carries `request` out on this thread, if that is the better way; see the module's text.
    fn try_here(&mut self, request: Request) -> Option<(u32, io::Result<()>)> {
        match request {
            Request::Read { offset, .. } if self.reads_now && !self.has_in_flight() => {
                let result = self.try_now(Direction::Read, offset);
                self.reads_now = !result.as_ref().is_err_and(is_refused);
                result.ok().map(|written| (written, Ok(())))
            }
            Request::Write { offset, .. } if !self.image.durable => {
                if self.writes_now {
                    let result = self.try_now(Direction::Write, offset);
                    self.writes_now = !result.as_ref().is_err_and(is_refused);
                    if self.writes_now {
                        return result.ok().map(|written| (written, Ok(())));
                    }
                }
                // What is there to read need not wait. An error comes again with the next call.
                let _ = self.submit();
                Some(self.image.execute(request, &self.buffers))
            }
            _ => None,
        }
    }

    fn try_now(&self, direction: Direction, offset: u64) -> io::Result<u32> {
        let transfer = Transfer {
            flags: RWF_NOWAIT,
            ..self.image.transfer(direction, offset)
        };
        transfer.try_at_once(&self.buffers)
    }

    /// Hands the submission ring over and waits for `want` completions.
    fn enter(&self, want: usize) -> io::Result<()> {
        let mut retries = 0;
        loop {
            match self.ring.0.submit_and_wait(want) {
                Ok(_) => return Ok(()),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN | libc::EBUSY) if retries < RETRIES => {
                        retries += 1;
                        thread::sleep(RETRY_PAUSE);
                    }
                    _ => return Err(error),
                },
            }
        }
    }
}

impl Engine for AsyncEngine {
    fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    fn buffers(&mut self) -> &mut IoBuffers {
        self.buffers.clear();
        &mut self.buffers
    }

    fn start(&mut self, request: Request, ticket: Ticket) -> Option<Done> {
        let answer = self.try_here(request);
        if answer.is_none() {
            let entry = self.entry(request);
            if entry.is_some_and(|entry| self.push(entry, request, ticket)) {
                return None;
            }
        }
        let (written, result) =
            answer.unwrap_or_else(|| self.image.execute(request, &self.buffers));
        Some(Done {
            ticket,
            written,
            result,
        })
    }

    fn submit(&mut self) -> io::Result<()> {
        if self.ring.0.submission().is_empty() {
            return Ok(());
        }
        self.enter(0)
    }

    fn next_done(&mut self) -> Option<Done> {
        if !self.has_in_flight() {
            return None;
        }
        let completion = self.ring.0.completion().next()?;
        let index = u16::try_from(completion.user_data()).ok()?;
        let slot = self.slots.get_mut(usize::from(index))?;
        let InFlight {
            request,
            ticket,
            buffers,
        } = slot.take()?;
        self.free.push(index);
        let (written, result) = self.complete(request, &buffers, completion.result());
        self.spare.push(buffers);
        Some(Done {
            ticket,
            written,
            result,
        })
    }

    fn wait(&mut self) -> io::Result<bool> {
        if self.has_in_flight() {
            self.enter(1)?;
        }
        Ok(self.has_in_flight())
    }

    fn set_disk(&mut self, disk: Arc<Disk>) {
        self.image.disk = disk;
        // It may be on another file system.
        (self.reads_now, self.writes_now) = (true, true);
    }

    fn wake_fd(&self) -> Option<RawFd> {
        // A ring is readable while it has completions, and an edge comes with each.
        Some(self.ring.0.as_raw_fd())
    }
}

impl Drop for AsyncEngine {
    fn drop(&mut self) {
        while self.has_in_flight() {
            if self.enter(1).is_err() {
                // The kernel may go on to use the lists, so they are never freed.
                mem::forget(mem::take(&mut self.slots));
                return;
            }
            while self.next_done().is_some() {}
        }
    }
}

/// Whether io_uring or its way failed, and not the image.
fn wants_another_try(error: &io::Error, request: Request) -> bool {
    match request {
        Request::Discard { .. } | Request::WriteZeroes { .. } if is_refused(error) => true,
        _ => matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)),
    }
}
