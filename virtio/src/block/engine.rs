// SPDX-License-Identifier: Apache-2.0
//! What carries requests out on the image: the seam between the queue and the host's I/O.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Instant;

use libc::{FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, RWF_DSYNC};
use vm_memory::GuestAddress;

use super::counters::Kind;
use super::disk::Disk;
use super::host::{self, Direction, Transfer};
use super::request::Request;
use crate::memory::IoBuffers;

/// Where the answer to a request goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ticket {
    /// The head of its chain.
    pub(super) head: u16,
    /// The address of its status byte.
    pub(super) status: GuestAddress,
    /// What it is counted as.
    pub(super) kind: Kind,
    /// Where on the disk, in bytes, what it is about begins.
    pub(super) offset: u64,
    /// How many bytes on the disk it is about.
    pub(super) bytes: u64,
    /// When it was taken from the queue.
    pub(super) begun: Instant,
}

/// A request that came to its end.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) ticket: Ticket,
    /// How many bytes of guest memory were written.
    pub(super) written: u32,
    pub(super) result: io::Result<()>,
}

/// Carries out requests, at once or later and then in any order.
pub(super) trait Engine: Send {
    /// Whether one more request can be started.
    fn has_room(&self) -> bool;

    /// The empty list of buffers for the request that is started next.
    fn buffers(&mut self) -> &mut IoBuffers;

    /// Starts a request on the image; returned at once if it is done already. There must be room.
    fn start(&mut self, request: Request, ticket: Ticket) -> Option<Done>;

    /// Hands what was started to the host.
    ///
    /// # Errors
    ///
    /// The host takes no requests any more.
    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Takes a request that was started before and is done now.
    fn next_done(&mut self) -> Option<Done> {
        None
    }

    /// Waits until a request is done; `false` if none was in flight.
    ///
    /// # Errors
    ///
    /// The host cannot say.
    fn wait(&mut self) -> io::Result<bool> {
        Ok(false)
    }

    /// Goes on with another disk. Nothing may be in flight.
    fn set_disk(&mut self, disk: Arc<Disk>);

    /// What becomes readable when a request is done.
    fn wake_fd(&self) -> Option<RawFd> {
        None
    }
}

/// The image, as it is used from a start of the device to its stop.
pub(super) struct Image {
    pub(super) disk: Arc<Disk>,
    /// Whether each change has to be durable before it is answered.
    pub(super) durable: bool,
}

impl Image {
    /// A transfer of data at `offset`.
    pub(super) fn transfer(&self, direction: Direction, offset: u64) -> Transfer<'_> {
        let durable = self.durable && direction == Direction::Write;
        Transfer {
            file: &self.disk.file,
            direction,
            offset,
            flags: if durable { RWF_DSYNC } else { 0 },
        }
    }

    /// Carries out a request on this thread. Returns how many bytes of guest memory were written.
    pub(super) fn execute(&self, request: Request, buffers: &IoBuffers) -> (u32, io::Result<()>) {
        let result = match request {
            Request::Read { offset, .. } => {
                return self.transfer(Direction::Read, offset).run(buffers, 0);
            }
            Request::Write { offset, .. } => {
                return self.transfer(Direction::Write, offset).run(buffers, 0);
            }
            Request::Flush => self.disk.file.sync_data(),
            Request::Discard { offset, len } => discard(&self.disk, offset, len),
            Request::WriteZeroes { offset, len, unmap } => {
                write_zeroes(&self.disk, offset, len, unmap)
            }
            Request::GetId => Ok(()),
        };
        if self.durable && result.is_ok() {
            return (0, self.disk.file.sync_data());
        }
        (0, result)
    }
}

/// Discarding is advice: where the host cannot do it, nothing is done.
fn discard(disk: &Disk, offset: u64, len: u64) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    let result = if disk.is_block_device {
        host::discard_block_device(&disk.file, offset, len)
    } else {
        host::fallocate(&disk.file, FALLOC_FL_PUNCH_HOLE, offset, len)
    };
    match result {
        Err(error) if is_refused(&error) => Ok(()),
        result => result,
    }
}

fn write_zeroes(disk: &Disk, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    let punch = unmap.then_some(FALLOC_FL_PUNCH_HOLE);
    for mode in punch.into_iter().chain([FALLOC_FL_ZERO_RANGE]) {
        match host::fallocate(&disk.file, mode, offset, len) {
            Err(error) if is_refused(&error) => {}
            result => return result,
        }
    }
    host::write_zeroes(&disk.file, offset, len)
}

/// The file system or device cannot do this, or not at this alignment.
pub(super) fn is_refused(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL | libc::ENOTTY)
    )
}
