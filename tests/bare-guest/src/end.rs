// SPDX-License-Identifier: Apache-2.0
//! The ways to end the VM.

use crate::console::{outb, outw, say};
use crate::fault::{self, Ring0};
use crate::params;

const I8042_COMMAND: u16 = 0x64;
const I8042_RESET: u8 = 0xfe;

/// Ends as `bare.end` says, by default by [`reset`].
pub fn end() -> ! {
    match params::text("bare.end").unwrap_or("reset") {
        "reset" => reset(),
        "poweroff" => power_off(),
        "spin" => spin(),
        "halt" => fault::ring0(&Ring0::Halt),
        "triple" => fault::triple_fault(),
        "badinsn" => fault::ring0(match params::text("bare.insn").unwrap_or("popcnt") {
            "int3" => &Ring0::Int3,
            "popcnt" => &Ring0::Popcnt,
            "mmio" => &Ring0::FetchMmio,
            other => panic!("bare.insn={other} is unknown"),
        }),
        other => panic!("bare.end={other} is unknown"),
    }
}

/// The keyboard controller's reset line.
pub fn reset() -> ! {
    outb(I8042_COMMAND, I8042_RESET);
    spin()
}

/// ACPI S5. The port, the value and its width in bytes come from the command line, since this guest
/// reads no ACPI tables; the defaults are brume's sleep control register.
pub fn power_off() -> ! {
    let port = params::number("bare.s5_port", 0x600) as u16;
    let value = params::number("bare.s5_value", 0x34);
    match params::number("bare.s5_width", 1) {
        2 => outw(port, value as u16),
        _ => outb(port, value as u8),
    }
    if !crate::clock::wait(1000, || false) {
        say!("error power-off-ignored port={port:#x} value={value:#x}");
    }
    reset()
}

fn spin() -> ! {
    loop {
        core::hint::spin_loop();
    }
}
