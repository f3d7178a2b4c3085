// SPDX-License-Identifier: Apache-2.0
//! The port by which a guest's kernel says that it has panicked: QEMU's pvpanic device, whose
//! driver Linux has.
//!
//! A read tells which events the device takes, a write reports some. Of those that are known, only
//! the panic is offered; a kernel that is about to dump itself then keeps that to itself.

use crate::bus::BusDevice;
use crate::event::{EventSink, GuestEvent};
use crate::state::PvPanicState;

/// The event: the kernel has panicked.
const PANICKED: u8 = 1;

/// The device behind the port.
#[derive(Debug)]
pub struct PvPanic {
    events: EventSink,
    /// A kernel panics once; more is not worth anybody's time.
    reported: bool,
}

impl PvPanic {
    /// How many ports the device takes.
    pub const PORTS: u64 = 1;

    /// A device that reports to `events`.
    pub fn new(events: EventSink) -> Self {
        Self {
            events,
            reported: false,
        }
    }

    /// What is to be known of the device.
    pub fn save(&self) -> PvPanicState {
        PvPanicState {
            reported: self.reported,
        }
    }

    /// Takes on a state.
    pub fn restore(&mut self, state: &PvPanicState) {
        self.reported = state.reported;
    }
}

impl BusDevice for PvPanic {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let [byte] = data {
            *byte = PANICKED;
        }
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if let &[event] = data
            && event & PANICKED != 0
            && !std::mem::replace(&mut self.reported, true)
        {
            self.events.report(GuestEvent::Panicked);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn device() -> (PvPanic, Arc<AtomicU32>) {
        let count = Arc::<AtomicU32>::default();
        let reported = count.clone();
        let events = EventSink::new(move |event| {
            assert_eq!(event, GuestEvent::Panicked);
            reported.fetch_add(1, Ordering::Relaxed);
        });
        (PvPanic::new(events), count)
    }

    #[test]
    fn a_panic_is_offered_and_reported_once() {
        let (mut device, count) = device();
        let mut events = [0];
        device.read(0, &mut events);
        assert_eq!(events, [PANICKED]);
        for _ in 0..1000 {
            device.write(0, &[0xff]);
        }
        assert_eq!(count.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn other_events_and_absurd_accesses_are_ignored() {
        let (mut device, count) = device();
        for data in [&[0][..], &[2], &[0xfe], &[], &[1, 0], &[1, 0, 0, 0]] {
            device.write(0, data);
        }
        let mut wide = [0xff; 4];
        device.read(0, &mut wide);
        assert_eq!(wide, [0; 4]);
        device.read(0, &mut []);
        assert_eq!(count.load(Ordering::Relaxed), 0);
    }
}
