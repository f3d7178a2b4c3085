// SPDX-License-Identifier: Apache-2.0
//! The sleep and reset registers of a hardware-reduced ACPI machine (ACPI 6.5, section 4.8.3.7).
//!
//! Three ports: sleep control, sleep status, reset. The FADT names them to the guest.

use crate::bus::BusDevice;
use crate::event::{EventSink, GuestEvent};

/// What the guest writes to the reset register to restart the machine.
pub const RESET_VALUE: u8 = 1;
/// The sleep type that stands for S5 (soft off), as `_S5` in the DSDT gives it.
pub const S5_SLEEP_TYPE: u8 = 5;

const SLEEP_CONTROL: u64 = 0;
const RESET: u64 = 2;

/// Bit 5 of the sleep control register starts the transition; bits 2 to 4 hold the type.
const SLEEP_CONTROL_BITS: u8 = 0b11_1100;
const ENTER_S5: u8 = (1 << 5) | (S5_SLEEP_TYPE << 2);

/// The device behind the three ports.
#[derive(Debug)]
pub struct AcpiPower {
    events: EventSink,
}

impl AcpiPower {
    /// How many ports the device takes.
    pub const PORTS: u64 = 3;

    /// A device that reports to `events`.
    pub fn new(events: EventSink) -> Self {
        Self { events }
    }
}

impl BusDevice for AcpiPower {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        // WAK_STS is never set: no sleep state but S5 exists, and nobody wakes from that.
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        match offset {
            SLEEP_CONTROL if value & SLEEP_CONTROL_BITS == ENTER_S5 => {
                self.events.report(GuestEvent::PowerOff);
            }
            RESET if value == RESET_VALUE => self.events.report(GuestEvent::Reset),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    fn events_of(writes: &[(u64, &[u8])]) -> Vec<GuestEvent> {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        let mut power = AcpiPower::new(EventSink::new(move |e| log.lock().unwrap().push(e)));
        for &(offset, data) in writes {
            power.write(offset, data);
        }
        let seen = seen.lock().unwrap();
        seen.clone()
    }

    #[test]
    fn s5_with_the_enable_bit_powers_off() {
        assert_eq!(
            events_of(&[(0, &[(5 << 2) | (1 << 5)])]),
            [GuestEvent::PowerOff]
        );
    }

    #[test]
    fn other_sleep_types_and_a_missing_enable_bit_do_nothing() {
        assert!(events_of(&[(0, &[5 << 2]), (0, &[(3 << 2) | (1 << 5)]), (1, &[0xff])]).is_empty());
    }

    #[test]
    fn the_reset_register_takes_its_one_value() {
        assert_eq!(
            events_of(&[(2, &[0]), (2, &[2]), (2, &[1])]),
            [GuestEvent::Reset]
        );
    }

    #[test]
    fn wide_accesses_are_ignored() {
        assert!(events_of(&[(0, &[0x34, 0x34]), (2, &[1, 0, 0, 0]), (0, &[])]).is_empty());
    }
}
