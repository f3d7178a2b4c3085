// SPDX-License-Identifier: Apache-2.0
//! The configuration space of a block device (virtio 1.3, section 5.2.4).

use super::disk::{Disk, SECTOR_SIZE};
use super::request::{MAX_DISCARD_SECTORS, MAX_WRITE_ZEROES_SECTORS};

/// Up to the end of `write_zeroes_may_unmap` and its padding.
const SIZE: usize = 60;

/// The most data buffers of a request: a queue's descriptors less those of header and status.
pub(super) const SEG_MAX: u32 = 254;

/// `struct virtio_blk_config` for `disk`.
pub(super) fn config_space(disk: &Disk) -> [u8; SIZE] {
    let mut space = [0; SIZE];
    let mut put = |offset: usize, bytes: &[u8]| {
        for (to, from) in space.iter_mut().skip(offset).zip(bytes) {
            *to = *from;
        }
    };
    // Both are powers of two, and the second is not the smaller.
    let exponent = disk.physical_block.trailing_zeros() - disk.logical_block.trailing_zeros();
    let alignment = disk.physical_block.div_ceil(SECTOR_SIZE);
    put(0, &disk.sectors.to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &disk.logical_block.to_le_bytes());
    // Topology: log2 of logical blocks in a physical one, offset of the first aligned block (0),
    // smallest good I/O size in logical blocks, best size (0: none).
    put(24, &[u8::try_from(exponent).unwrap_or(0)]);
    put(
        26,
        &u16::try_from(1_u32 << exponent).unwrap_or(1).to_le_bytes(),
    );
    // num_queues
    put(34, &1_u16.to_le_bytes());
    // Discard: sectors in all, ranges, alignment in sectors.
    put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
    put(40, &1_u32.to_le_bytes());
    put(44, &alignment.to_le_bytes());
    // Write zeroes: sectors in all, ranges, whether space may be given back.
    put(48, &MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
    put(52, &1_u32.to_le_bytes());
    put(56, &[1]);
    space
}

#[cfg(test)]
mod tests;
