// SPDX-License-Identifier: Apache-2.0
//! The serial port COM1 (16550), polled, and the ports in general.

use core::arch::asm;
use core::fmt;

const COM1: u16 = 0x3f8;
const LINE_STATUS: u16 = COM1 + 5;
const DATA_READY: u8 = 1;

/// Writes a byte to an I/O port.
pub fn outb(port: u16, value: u8) {
    // SAFETY: the TSS opens the ports, and this guest owns every device behind a port.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) };
}

/// Writes a 16-bit word to an I/O port.
pub fn outw(port: u16, value: u16) {
    // SAFETY: as in `outb`.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack)) };
}

/// Reads a byte from an I/O port.
pub fn inb(port: u16) -> u8 {
    let value: u8;
    // SAFETY: as in `outb`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) };
    value
}

/// The byte that the host typed, if there is one.
pub fn read_byte() -> Option<u8> {
    (inb(LINE_STATUS) & DATA_READY != 0).then(|| inb(COM1))
}

/// Says a single byte, a dot: the shortest sign of life.
pub fn beat() {
    outb(COM1, b'.');
}

/// COM1 as a writer. It does not wait for room: every write is an exit, and a VMM's transmitter is
/// always empty.
pub struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            outb(COM1, byte);
        }
        Ok(())
    }
}

/// Prints one result line, `bare: ` and the formatted text.
macro_rules! say {
    ($($arg:tt)*) => {{
        use core::fmt::Write as _;
        // The console's `write_str` cannot fail.
        let _ = writeln!($crate::console::Console, "bare: {}", format_args!($($arg)*));
    }};
}
pub(crate) use say;
