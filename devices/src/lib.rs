// SPDX-License-Identifier: Apache-2.0
//! Buses, interrupt lines and the chipset devices of the machine.
//!
//! Nothing here knows KVM or virtio. A vCPU thread that leaves the guest on an I/O access looks
//! the address up in a [`Bus`] and calls the device it finds; a device raises its line through an
//! [`Interrupt`] and asks for the machine to be reset or powered off through an [`EventSink`].

#![forbid(unsafe_code)]

mod boot_timer;
mod bus;
mod counter;
mod event;
mod i8042;
mod interrupt;
mod power;
mod pvpanic;
mod serial;
mod state;

pub use boot_timer::{BOOT_TIMER_MAGIC, BootTimer};
pub use bus::{Bus, BusDevice, BusError, SharedDevice};
pub use counter::{Counter, LATENCY_BOUNDS_US, Latency, LatencyCounter};
pub use event::{EventSink, GuestEvent};
pub use i8042::{I8042, I8042Counters};
pub use interrupt::Interrupt;
pub use power::{AcpiPower, RESET_VALUE, S5_SLEEP_TYPE};
pub use pvpanic::PvPanic;
pub use serial::{Serial, SerialCounters};
pub use state::{I8042Expects, I8042State, PvPanicState, SerialState, StateError};
