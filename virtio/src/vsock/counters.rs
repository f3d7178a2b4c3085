// SPDX-License-Identifier: Apache-2.0
//! What a vsock device counts. The worker alone writes; anybody may read at any time.

use brume_devices::Counter;

/// The running counters of a device.
#[derive(Debug, Default)]
pub(super) struct VsockCounters {
    pub(super) rx_packets: Counter,
    pub(super) rx_bytes: Counter,
    pub(super) tx_packets: Counter,
    pub(super) tx_bytes: Counter,
    pub(super) bad_chains: Counter,
    pub(super) bad_packets: Counter,
    pub(super) connections_added: Counter,
    pub(super) connections_removed: Counter,
    pub(super) connections_refused: Counter,
    pub(super) connections_killed: Counter,
}

/// The values of the counters since the device was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VsockCounts {
    /// Packets given to the guest.
    pub rx_packets: u64,
    /// Their payload, in bytes.
    pub rx_bytes: u64,
    /// Packets taken from the guest.
    pub tx_packets: u64,
    /// Their payload, in bytes.
    pub tx_bytes: u64,
    /// Buffers that no packet can be read from or put in.
    pub bad_chains: u64,
    /// Packets that belong to no connection, or may not be sent on theirs.
    pub bad_packets: u64,
    /// Connections made, from either side.
    pub connections_added: u64,
    /// Connections that are gone, however that came.
    pub connections_removed: u64,
    /// Connections that were asked for and not made.
    pub connections_refused: u64,
    /// Connections that ended because nobody answered in time.
    pub connections_killed: u64,
}

impl VsockCounters {
    /// The values at this moment; they need not be of the same instant.
    pub(super) fn get(&self) -> VsockCounts {
        VsockCounts {
            rx_packets: self.rx_packets.get(),
            rx_bytes: self.rx_bytes.get(),
            tx_packets: self.tx_packets.get(),
            tx_bytes: self.tx_bytes.get(),
            bad_chains: self.bad_chains.get(),
            bad_packets: self.bad_packets.get(),
            connections_added: self.connections_added.get(),
            connections_removed: self.connections_removed.get(),
            connections_refused: self.connections_refused.get(),
            connections_killed: self.connections_killed.get(),
        }
    }
}
