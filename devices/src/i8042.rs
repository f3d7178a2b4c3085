// SPDX-License-Identifier: Apache-2.0
//! The keyboard controller, of which guests use one thing: its CPU reset line.

use std::io;

use vm_superio::{I8042Device, Trigger};

use crate::bus::BusDevice;
use crate::event::{EventSink, GuestEvent};

struct ResetLine(EventSink);

impl Trigger for ResetLine {
    type E = io::Error;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.report(GuestEvent::Reset);
        Ok(())
    }
}

/// The i8042 at ports 0x60 to 0x64.
pub struct I8042 {
    controller: I8042Device<ResetLine>,
}

impl I8042 {
    /// How many ports the device takes.
    pub const PORTS: u64 = 5;

    /// A controller that reports a reset to `events`.
    pub fn new(events: EventSink) -> Self {
        Self {
            controller: I8042Device::new(ResetLine(events)),
        }
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.controller.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (&[byte], Ok(offset)) = (data, u8::try_from(offset)) {
            // The trigger above cannot fail.
            let _ = self.controller.write(offset, byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn only_the_reset_command_resets() {
        let resets = Arc::new(AtomicU32::new(0));
        let count = resets.clone();
        let mut i8042 = I8042::new(EventSink::new(move |event| {
            assert_eq!(event, GuestEvent::Reset);
            count.fetch_add(1, Ordering::Relaxed);
        }));
        i8042.write(0, &[0xfe]);
        i8042.write(4, &[0xff]);
        i8042.write(4, &[0xfe, 0xfe]);
        i8042.write(u64::MAX, &[0xfe]);
        assert_eq!(resets.load(Ordering::Relaxed), 0);
        i8042.write(4, &[0xfe]);
        assert_eq!(resets.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn the_controller_is_never_busy() {
        // Linux waits for the input buffer to drain before it sends the reset command.
        let mut i8042 = I8042::new(EventSink::new(|_| {}));
        let mut status = [0xff];
        i8042.read(4, &mut status);
        assert_eq!(status, [0]);
    }
}
