// SPDX-License-Identifier: Apache-2.0
//! The metadata service at a network device: frames between its stack and guest memory, and a timer
//! that wakes the worker when the stack has something to do by itself.

use std::os::fd::{AsRawFd, RawFd};

use brume_mmds::{MAX_FRAME, Stack};
use vmm_sys_util::timerfd::TimerFd;

use super::HEADER_LEN;
use super::tap::Frame;
use crate::device::StartError;
use crate::memory::GuestMemory;
use crate::queue::Buffers;

/// Bytes of a frame that tell whom it is for.
const HEAD: usize = 42;

/// A stack and its timer.
pub(super) struct Metadata {
    stack: Stack,
    timer: TimerFd,
}

impl Metadata {
    pub(super) fn new(stack: Stack) -> std::io::Result<Self> {
        let timer = TimerFd::new()?;
        Ok(Self { stack, timer })
    }

    /// Takes what is in `buffers`, a virtio header and a frame of `len` bytes, if the frame is for
    /// the service; whether it was.
    pub(super) fn take(&mut self, memory: &GuestMemory, buffers: &Buffers, len: u64) -> bool {
        let header = u64::from(HEADER_LEN);
        let mut head = [0; HEAD];
        let count = buffers.read_at(memory, header, &mut head).unwrap_or(0);
        let head = head.get(..count).unwrap_or_default();
        if !self.stack.is_addressee(head) {
            return false;
        }
        // One that is too large, or that the guest takes away from under us, is lost.
        if let Ok(len @ ..=MAX_FRAME) = usize::try_from(len) {
            let mut frame = vec![0; len];
            if buffers.read_at(memory, header, &mut frame).is_ok() {
                self.stack.receive(frame);
            }
        }
        true
    }

    /// Puts the service's next frame, with a virtio header, into `spill`.
    pub(super) fn give(&mut self, spill: &mut [u8]) -> Option<Frame> {
        let frame = self.stack.transmit()?;
        let header = usize::from(HEADER_LEN);
        let len = header + frame.len();
        let (head, rest) = spill.get_mut(..len)?.split_at_mut(header);
        // Whole, and with its checksums.
        head.fill(0);
        rest.copy_from_slice(&frame);
        Some(Frame { len, direct: 0 })
    }

    /// Does what is due; whether there was anything.
    pub(super) fn advance(&mut self) -> bool {
        self.stack.advance()
    }

    /// Sets the timer, before the worker sleeps; `true` if there is something to do already.
    pub(super) fn arm(&mut self) -> Result<bool, StartError> {
        match self.stack.due() {
            Some(time) if time.is_zero() => Ok(true),
            Some(time) => {
                self.timer.reset(time, None)?;
                Ok(false)
            }
            // A timer that is still set wakes the worker once for nothing.
            None => Ok(false),
        }
    }
}

impl AsRawFd for Metadata {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}
