// SPDX-License-Identifier: Apache-2.0
//! Virtio over MMIO, version 2 (virtio 1.3, section 4.2).

use brume_devices::BusDevice;

use super::core::{RunningQueues, TransportCore};
use super::state::{RestoreError, TransportState};
use crate::queue::QueueState;

/// How many bytes of address space a device takes: registers, then its configuration space.
pub const MMIO_SIZE: u64 = 0x1000;
/// Offset of the register that notifies a queue, for wiring it to an event.
pub const QUEUE_NOTIFY: u64 = 0x50;

/// "virt" in little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "BRUM" in little-endian; drivers do not act on it.
const VENDOR: u32 = 0x4d55_5242;
const CONFIG: u64 = 0x100;

/// A device at a page of the MMIO space.
pub struct MmioTransport {
    core: TransportCore,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
}

impl MmioTransport {
    /// Puts `core` behind MMIO registers.
    pub fn new(core: TransportCore) -> Self {
        Self {
            core,
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
        }
    }

    /// What is behind the registers.
    pub fn core(&mut self) -> &mut TransportCore {
        &mut self.core
    }

    /// What is to be known of the transport and its device to go on elsewhere. It has to be paused,
    /// and `running` is what [`TransportCore::pause`] has returned.
    pub fn save(&mut self, running: &RunningQueues) -> TransportState {
        TransportState {
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            queue_sel: self.queue_sel,
            ..self.core.save(running)
        }
    }

    /// Takes on a state, on a transport that no driver has touched and whose device has the same
    /// configuration as the one that was saved. Guest memory has to be in place. The device does
    /// not start: [`TransportCore::resume`] with what is returned lets it go on, as after a pause.
    ///
    /// # Errors
    ///
    /// The state makes no sense, or not with this device on this host; the transport must not be
    /// used then.
    pub fn restore(&mut self, state: TransportState) -> Result<RunningQueues, RestoreError> {
        self.device_features_sel = state.device_features_sel;
        self.driver_features_sel = state.driver_features_sel;
        self.queue_sel = state.queue_sel;
        self.core.restore(state)
    }

    fn read_register(&self, offset: u64) -> u32 {
        let queue = self.core.queue(self.queue_sel);
        match offset {
            0x000 => MAGIC,
            0x004 => VERSION,
            0x008 => self.core.device().device_type(),
            0x00c => VENDOR,
            0x010 => self.core.device_features(self.device_features_sel),
            0x034 => queue.map_or(0, |queue| u32::from(queue.max_size)),
            0x044 => queue.map_or(0, |queue| u32::from(queue.ready)),
            0x060 => self.core.signals().interrupt_status(),
            0x070 => u32::from(self.core.status()),
            // No shared memory region: its length and base read as all ones (section 4.2.2).
            0x0b0..=0x0bc => u32::MAX,
            0x0fc => self.core.signals().config_generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            0x014 => self.device_features_sel = value,
            0x020 => self
                .core
                .set_driver_features(self.driver_features_sel, value),
            0x024 => self.driver_features_sel = value,
            0x030 => self.queue_sel = value,
            QUEUE_NOTIFY => self
                .core
                .notify(usize::try_from(value).unwrap_or(usize::MAX)),
            0x064 => self.core.signals().acknowledge(value),
            // The register is 32 bits wide, the status 8.
            0x070 => self.core.set_status((value & 0xff) as u8),
            _ => self.write_queue_register(offset, value),
        }
    }

    fn write_queue_register(&mut self, offset: u64, value: u32) {
        let Some(queue) = self.core.queue_mut(self.queue_sel) else {
            return;
        };
        if offset == 0x044 {
            queue.ready = value & 1 != 0;
            return;
        }
        if queue.ready {
            return;
        }
        let QueueState {
            size,
            desc_table,
            avail_ring,
            used_ring,
            ..
        } = queue;
        match offset {
            // A size that does not fit becomes one that is refused at DRIVER_OK.
            0x038 => *size = u16::try_from(value).unwrap_or(0),
            0x080 => set_low(desc_table, value),
            0x084 => set_high(desc_table, value),
            0x090 => set_low(avail_ring, value),
            0x094 => set_high(avail_ring, value),
            0x0a0 => set_low(used_ring, value),
            0x0a4 => set_high(used_ring, value),
            _ => {}
        }
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.core.read_config(offset, data);
            return;
        }
        // Registers are accessed whole and aligned; anything else reads as zero (section 4.2.2.2).
        match <&mut [u8; 4]>::try_from(&mut *data) {
            Ok(word) if offset.is_multiple_of(4) => {
                *word = self.read_register(offset).to_le_bytes();
            }
            _ => data.fill(0),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.core.write_config(offset, data);
        } else if let Ok(word) = <[u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            self.write_register(offset, u32::from_le_bytes(word));
        }
    }
}

fn set_low(value: &mut u64, low: u32) {
    *value = *value & !0xffff_ffff | u64::from(low);
}

fn set_high(value: &mut u64, high: u32) {
    *value = *value & 0xffff_ffff | u64::from(high) << 32;
}

#[cfg(test)]
mod tests;
