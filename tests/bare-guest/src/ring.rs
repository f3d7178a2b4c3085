// SPDX-License-Identifier: Apache-2.0
//! A split virtqueue for many requests in flight: virtio-drivers' `VirtQueue`, and around it what
//! that leaves out.
//!
//! * One notification for a batch. `VirtQueue::should_notify` compares the available index with
//!   `avail_event` as plain numbers, which goes wrong when the index wraps while the device lags;
//!   here it is the specification's `vring_need_event` over the whole batch.
//! * No interrupts. With EVENT_IDX the crate asks for one after every completion; a guest that
//!   polls does not want them, and `used_event` is put out of reach instead. `bare.irq=1` leaves
//!   them on.

use crate::memory::BareHal;
use crate::mmio::{EVENT_IDX, INDIRECT_DESC, Mmio};
use crate::params;
use core::sync::atomic::{AtomicU16, Ordering, fence};
use virtio_drivers::Result;
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::Transport;

/// Half the index space ahead: no completion reaches it.
const NEVER: u16 = 0x8000;

/// The most buffers in one request.
pub const MAX_PIECES: usize = 64;

const PIECES: [&[u8]; MAX_PIECES] = [&[0]; MAX_PIECES];

/// A queue of `N` descriptors and its place in the device.
pub struct Ring<const N: usize> {
    queue: VirtQueue<BareHal, N>,
    index: u16,
    event_idx: bool,
    interrupts: bool,
    used_flags: &'static AtomicU16,
    avail_event: &'static AtomicU16,
    used_event: &'static AtomicU16,
    added: u16,
    notified: u16,
    popped: u16,
}

impl<const N: usize> Ring<N> {
    /// Sets up queue `index` of a device that is past feature negotiation.
    pub fn new(transport: &mut Mmio, index: u16) -> Result<Self> {
        let event_idx = transport.negotiated & EVENT_IDX != 0;
        let indirect = transport.negotiated & INDIRECT_DESC != 0;
        let mut queue = VirtQueue::new(transport, index, indirect, event_idx)?;
        let places = transport.rings[usize::from(index)];
        let interrupts = params::number("bare.irq", 0) != 0;
        // SAFETY: these are fields of the rings that were just set up (virtio 1.2, 2.7.6 and
        // 2.7.8), which are never freed.
        let (used_flags, avail_event, used_event) = unsafe {
            let field = |address: u64| &*(address as *const AtomicU16);
            (
                field(places.device),
                field(places.device + 4 + 8 * N as u64),
                field(places.driver + 4 + 2 * N as u64),
            )
        };
        if !interrupts {
            queue.set_dev_notify(false);
            used_event.store(NEVER, Ordering::Release);
        }
        Ok(Self {
            queue,
            index,
            event_idx,
            interrupts,
            used_flags,
            avail_event,
            used_event,
            added: 0,
            notified: 0,
            popped: 0,
        })
    }

    /// Makes a request available without notifying the device. Returns its token.
    ///
    /// # Safety
    ///
    /// The buffers must stay valid and untouched until [`Self::pop`] has returned the token's.
    pub unsafe fn add<'a>(
        &mut self,
        inputs: &[&'a [u8]],
        outputs: &mut [&'a mut [u8]],
    ) -> Result<u16> {
        // SAFETY: the caller's promise.
        let token = unsafe { self.queue.add(inputs, outputs) }?;
        self.added = self.added.wrapping_add(1);
        Ok(token)
    }

    /// Notifies the device of all that was added since the last time, unless it said that it will
    /// look by itself.
    pub fn kick(&mut self, transport: &mut Mmio) {
        let (old, new) = (self.notified, self.added);
        if old == new {
            return;
        }
        self.notified = new;
        // The index must be visible before the device's wish is read.
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = self.avail_event.load(Ordering::Acquire);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.used_flags.load(Ordering::Acquire) & 1 == 0
        };
        if wanted {
            transport.notify(self.index);
        }
    }

    /// The token of the next completed request.
    pub fn peek(&self) -> Option<u16> {
        self.queue.peek_used()
    }

    /// Takes the next completed request, whose token [`Self::peek`] gave and which was added with
    /// so many `pieces`. Returns the bytes that the device says it wrote.
    pub fn pop(&mut self, token: u16, pieces: usize) -> Result<u32> {
        // SAFETY: the queue counts the buffers and hands each to `BareHal::unshare`, which does
        // nothing: with memory mapped one to one, there is nothing to undo that it would need them
        // for.
        let len = unsafe { self.queue.pop_used(token, &PIECES[..pieces], &mut []) }?;
        self.popped = self.popped.wrapping_add(1);
        if self.event_idx && !self.interrupts {
            self.used_event
                .store(self.popped.wrapping_add(NEVER), Ordering::Release);
        }
        Ok(len)
    }
}
