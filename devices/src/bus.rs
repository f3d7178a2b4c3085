// SPDX-License-Identifier: Apache-2.0
//! An address space of devices: port I/O or memory-mapped I/O.
//!
//! A bus is filled while the machine is built and shared unchanged by the vCPU threads after
//! that, so a look-up takes no lock; only the device that is found is locked.

use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;

/// A device that answers accesses to a range of a bus.
///
/// Offsets are relative to the start of the range. `data` has 1 to 8 bytes and lies inside the
/// range, but its length and alignment are the guest's choice. Values are little-endian.
pub trait BusDevice: Send {
    /// Fills `data` with what the guest reads at `offset`.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Takes what the guest wrote at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device as a bus holds it.
pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

/// A range that cannot be put on a bus.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BusError {
    /// The range holds no address.
    #[error("the bus range at {base:#x} is empty")]
    Empty {
        /// First address of the range.
        base: u64,
    },
    /// The range goes past the end of the address space.
    #[error("the bus range of {len:#x} bytes at {base:#x} passes the end of the address space")]
    Overflow {
        /// First address of the range.
        base: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// Another device is there already.
    #[error("the bus range of {len:#x} bytes at {base:#x} overlaps the one at {other:#x}")]
    Overlap {
        /// First address of the range.
        base: u64,
        /// Its length in bytes.
        len: u64,
        /// First address of the range that is there.
        other: u64,
    },
}

struct Slot {
    base: u64,
    /// The last address, so that a range may end where the address space does.
    last: u64,
    device: SharedDevice,
}

/// An address space with devices in it.
#[derive(Default)]
pub struct Bus {
    /// Sorted by address; no two overlap.
    slots: Vec<Slot>,
}

impl Bus {
    /// A bus with nothing on it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at the `len` addresses from `base`.
    ///
    /// # Errors
    ///
    /// The range is empty, passes the end of the address space, or overlaps another one.
    pub fn insert(&mut self, base: u64, len: u64, device: SharedDevice) -> Result<(), BusError> {
        let Some(extent) = len.checked_sub(1) else {
            return Err(BusError::Empty { base });
        };
        let last = base
            .checked_add(extent)
            .ok_or(BusError::Overflow { base, len })?;
        let at = self.slots.partition_point(|slot| slot.last < base);
        if let Some(next) = self.slots.get(at)
            && next.base <= last
        {
            return Err(BusError::Overlap {
                base,
                len,
                other: next.base,
            });
        }
        self.slots.insert(at, Slot { base, last, device });
        Ok(())
    }

    /// Reads `data.len()` bytes at `address`.
    ///
    /// Where no device answers the whole access the guest sees all ones, as on a bus that
    /// nothing drives; the result is `false` then.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        let Some((slot, offset)) = self.find(address, data.len()) else {
            data.fill(0xff);
            return false;
        };
        let mut device = slot.device.lock().unwrap_or_else(PoisonError::into_inner);
        device.read(offset, data);
        true
    }

    /// Writes `data` at `address`.
    ///
    /// Where no device answers the whole access nothing happens; the result is `false` then.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let Some((slot, offset)) = self.find(address, data.len()) else {
            return false;
        };
        let mut device = slot.device.lock().unwrap_or_else(PoisonError::into_inner);
        device.write(offset, data);
        true
    }

    /// The slot that holds all `len` bytes at `address`, and the offset in it.
    fn find(&self, address: u64, len: usize) -> Option<(&Slot, u64)> {
        let last = address.checked_add(u64::try_from(len).ok()?.checked_sub(1)?)?;
        let slot = self
            .slots
            .get(self.slots.partition_point(|slot| slot.last < address))?;
        (slot.base <= address && last <= slot.last).then(|| (slot, address - slot.base))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Answers each byte with its own tag and remembers the last access.
    struct Probe {
        tag: u8,
        seen: Option<(u64, usize)>,
    }

    impl BusDevice for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            self.seen = Some((offset, data.len()));
            data.fill(self.tag);
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.seen = Some((offset, data.len()));
        }
    }

    fn probe(tag: u8) -> Arc<Mutex<Probe>> {
        Arc::new(Mutex::new(Probe { tag, seen: None }))
    }

    #[test]
    fn the_device_of_the_range_answers_with_its_own_offset() {
        let mut bus = Bus::new();
        let device = probe(7);
        bus.insert(0x1000, 0x100, device.clone()).unwrap();
        let mut data = [0; 4];
        assert!(bus.read(0x10fc, &mut data));
        assert_eq!(data, [7; 4]);
        assert_eq!(device.lock().unwrap().seen, Some((0xfc, 4)));
        assert!(bus.write(0x1000, &[1]));
        assert_eq!(device.lock().unwrap().seen, Some((0, 1)));
    }

    #[test]
    fn an_access_that_no_device_answers_reads_as_ones() {
        let mut bus = Bus::new();
        bus.insert(0x1000, 0x100, probe(7)).unwrap();
        for address in [0, 0xfff, 0x10fd, 0x1100, u64::MAX - 3, u64::MAX] {
            let mut data = [0; 4];
            assert!(!bus.read(address, &mut data), "{address:#x}");
            assert_eq!(data, [0xff; 4]);
            assert!(!bus.write(address, &data));
        }
    }

    #[test]
    fn bad_ranges_are_refused() {
        let mut bus = Bus::new();
        assert_eq!(bus.insert(8, 0, probe(0)), Err(BusError::Empty { base: 8 }));
        assert_eq!(
            bus.insert(u64::MAX, 2, probe(0)),
            Err(BusError::Overflow {
                base: u64::MAX,
                len: 2
            })
        );
        bus.insert(u64::MAX, 1, probe(0)).unwrap();
        bus.insert(0x10, 0x10, probe(0)).unwrap();
        for (base, len) in [(0x10, 1), (0x1f, 1), (0, 0x11), (0, 0x100), (0x18, 4)] {
            assert_eq!(
                bus.insert(base, len, probe(0)),
                Err(BusError::Overlap {
                    base,
                    len,
                    other: 0x10
                })
            );
        }
    }

    proptest! {
        /// Whatever is put on a bus in whatever order, every address is answered by the device
        /// that a plain search finds.
        #[test]
        fn look_up_agrees_with_a_plain_search(
            ranges in prop::collection::vec((0u64..64, 1u64..12), 0..12),
            accesses in prop::collection::vec((0u64..80, 1usize..9), 1..40),
        ) {
            let mut bus = Bus::new();
            let mut model: Vec<(u64, u64, u8)> = Vec::new();
            for (tag, (base, len)) in ranges.into_iter().enumerate() {
                let tag = u8::try_from(tag).unwrap();
                let clash = model.iter().any(|&(b, l, _)| base < b + l && b < base + len);
                prop_assert_eq!(bus.insert(base, len, probe(tag)).is_err(), clash);
                if !clash {
                    model.push((base, len, tag));
                }
            }
            for (address, len) in accesses {
                let end = address + len as u64;
                let expected = model.iter().find(|&&(b, l, _)| b <= address && end <= b + l);
                let mut data = vec![0xee; len];
                prop_assert_eq!(bus.read(address, &mut data), expected.is_some());
                let byte = expected.map_or(0xff, |&(_, _, tag)| tag);
                prop_assert!(data.iter().all(|&b| b == byte));
            }
        }
    }
}
