// SPDX-License-Identifier: Apache-2.0
//! The stack's network card: a place for the frame that comes in, and a bounded queue of those
//! that go out.

use std::collections::VecDeque;

use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;

/// The largest frame that the stack sends, in bytes: an MTU of 1500.
const FRAME_OUT: usize = 1514;
/// The most frames that wait for the guest to have room.
const MAX_OUTGOING: usize = 64;

/// Between the stack and the guest.
#[derive(Debug, Default)]
pub(crate) struct Port {
    pub(crate) incoming: Option<Vec<u8>>,
    outgoing: VecDeque<Vec<u8>>,
    /// Whether the stack had more to send than there was room for.
    starved: bool,
}

impl Port {
    /// Takes the next frame for the guest; whether the stack waits for that is said too.
    pub(crate) fn take(&mut self) -> Option<(Vec<u8>, bool)> {
        let frame = self.outgoing.pop_front()?;
        Some((frame, std::mem::take(&mut self.starved)))
    }

    /// Whether there is nothing for the guest.
    pub(crate) fn is_empty(&self) -> bool {
        self.outgoing.is_empty()
    }

    /// Whether the stack has to wait until the guest takes frames.
    pub(crate) fn is_starved(&self) -> bool {
        self.starved
    }

    fn has_room(&mut self) -> bool {
        self.starved |= self.outgoing.len() >= MAX_OUTGOING;
        !self.starved
    }
}

impl Device for Port {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Incoming, Outgoing<'_>)> {
        // A frame that cannot be answered is dropped, and will come again.
        let frame = self.incoming.take()?;
        self.has_room()
            .then_some((Incoming(frame), Outgoing(&mut self.outgoing)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Outgoing<'_>> {
        self.has_room().then_some(Outgoing(&mut self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME_OUT;
        // The guest may leave checksums to its card, and there is no wire that could break a frame.
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities
    }
}

/// The frame that came in.
pub(crate) struct Incoming(Vec<u8>);

impl RxToken for Incoming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

/// Room for a frame.
pub(crate) struct Outgoing<'a>(&'a mut VecDeque<Vec<u8>>);

impl TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}
