// SPDX-License-Identifier: Apache-2.0
//! What is kept of the chipset devices when a machine is saved.
//!
//! Each device has a type here that holds all the guest could miss, and nothing that belongs to
//! the host. A state comes from a file and is not trusted: a device checks what it takes on.
//!
//! The ACPI ports and the boot timer have no state: what is written to them is an event.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Why a device does not take on a state.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum StateError {
    /// More bytes than the device can hold.
    #[error("the {buffer} has {len} bytes, and the device holds {max}; the state is damaged")]
    TooLong {
        /// What holds them.
        buffer: &'static str,
        /// How many there are.
        len: usize,
        /// How many there can be.
        max: usize,
    },
}

impl StateError {
    /// Checks the length of a buffer.
    pub(crate) fn check(buffer: &'static str, bytes: &[u8], max: usize) -> Result<(), Self> {
        let len = bytes.len();
        if len > max {
            return Err(Self::TooLong { buffer, len, max });
        }
        Ok(())
    }
}

/// The state of a serial port: the registers of a 16550A, and input that the guest has not read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialState {
    /// Divisor latch, low byte.
    pub baud_divisor_low: u8,
    /// Divisor latch, high byte.
    pub baud_divisor_high: u8,
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register.
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Line status register.
    pub line_status: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Modem status register.
    pub modem_status: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Bytes in the receive FIFO, the oldest first; at most 64.
    pub fifo: Vec<u8>,
    /// Bytes of input behind those in the FIFO, the oldest first; at most 4096.
    pub waiting: Vec<u8>,
}

/// What the next byte at the data port of a keyboard controller is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum I8042Expects {
    /// The keyboard: a command.
    KeyboardCommand,
    /// The keyboard: the argument of a command.
    KeyboardArgument,
    /// The controller: its configuration.
    Configuration,
    /// The controller: lines that lead nowhere here.
    OutputPort,
}

/// The state of a keyboard controller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct I8042State {
    /// The configuration byte.
    pub configuration: u8,
    /// What the next byte at the data port is for.
    pub expects: I8042Expects,
    /// Bytes that the guest has not read, the oldest first; at most 32.
    pub waiting: Vec<u8>,
    /// The byte that was read last, which stays at the data port.
    pub last: u8,
}

/// The state of a pvpanic device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PvPanicState {
    /// Whether the guest has said that it panicked.
    pub reported: bool,
}

#[cfg(test)]
mod tests;
