// SPDX-License-Identifier: Apache-2.0
//! What carries a device to its driver: the part that every transport shares, and MMIO.

mod core;
mod mmio;
mod state;

pub use self::core::{RunningQueues, TransportCore};
pub use mmio::{MMIO_SIZE, MmioTransport, QUEUE_NOTIFY};
pub use state::{RestoreError, TransportState};
