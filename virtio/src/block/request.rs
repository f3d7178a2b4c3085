// SPDX-License-Identifier: Apache-2.0
//! Block requests (virtio 1.3, section 5.2.6): from a descriptor chain to what is asked for.
//!
//! A chain is taken as two runs of bytes, however they are cut into descriptors: what the device
//! reads (a header of 16 bytes, then data) and what it writes (data, then a status byte).

use thiserror::Error;
use vm_memory::GuestMemoryError;

use super::disk;
use crate::memory::GuestMemory;
use crate::queue::Chain;

/// `VIRTIO_BLK_F_SEG_MAX`: the configuration space says how many data buffers a request may have.
pub(super) const F_SEG_MAX: u64 = 1 << 2;
/// `VIRTIO_BLK_F_RO`: the disk is read-only.
pub(super) const F_RO: u64 = 1 << 5;
/// `VIRTIO_BLK_F_BLK_SIZE`: the configuration space has the block size.
pub(super) const F_BLK_SIZE: u64 = 1 << 6;
/// `VIRTIO_BLK_F_FLUSH`: there is a cache that can be flushed.
pub(super) const F_FLUSH: u64 = 1 << 9;
/// `VIRTIO_BLK_F_TOPOLOGY`: the configuration space has the physical block size.
pub(super) const F_TOPOLOGY: u64 = 1 << 10;
/// `VIRTIO_BLK_F_DISCARD`.
pub(super) const F_DISCARD: u64 = 1 << 13;
/// `VIRTIO_BLK_F_WRITE_ZEROES`.
pub(super) const F_WRITE_ZEROES: u64 = 1 << 14;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// Request status: done.
pub(super) const S_OK: u8 = 0;
/// Request status: failed.
pub(super) const S_IOERR: u8 = 1;
/// Request status: not a request of this device.
pub(super) const S_UNSUPP: u8 = 2;

const SECTOR_SIZE: u64 = disk::SECTOR_SIZE as u64;

/// Length of the header in bytes.
pub(super) const HEADER_SIZE: u64 = 16;
/// Length of the serial id that `VIRTIO_BLK_T_GET_ID` asks for.
pub(super) const ID_SIZE: u8 = 20;
/// Length of the one range of a discard or write-zeroes request.
const RANGE_SIZE: u64 = 16;
/// The range's flag that lets the device give the space back.
const RANGE_UNMAP: u32 = 1;

/// The most sectors that one discard may cover: 2 GiB, to keep a request from being endless.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// The most sectors that one write-zeroes may cover: 128 MiB, as they may have to be written.
pub(super) const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 18;

/// What a request asks for, checked against the disk. Offsets and lengths are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// Data from the image.
    Read { offset: u64, len: u64 },
    /// Data to the image.
    Write { offset: u64, len: u64 },
    /// All that was written to be made durable.
    Flush,
    /// The serial id.
    GetId,
    /// A range that the guest does not need any more.
    Discard { offset: u64, len: u64 },
    /// A range that has to read as zeroes; with `unmap` it may be given back.
    WriteZeroes { offset: u64, len: u64, unmap: bool },
}

impl Request {
    /// Where what it is about begins in the image, in bytes.
    pub(super) fn offset(&self) -> u64 {
        match *self {
            Self::Read { offset, .. }
            | Self::Write { offset, .. }
            | Self::Discard { offset, .. }
            | Self::WriteZeroes { offset, .. } => offset,
            Self::Flush | Self::GetId => 0,
        }
    }

    /// How many bytes of the image it is about.
    pub(super) fn len(&self) -> u64 {
        match *self {
            Self::Read { len, .. }
            | Self::Write { len, .. }
            | Self::Discard { len, .. }
            | Self::WriteZeroes { len, .. } => len,
            Self::Flush | Self::GetId => 0,
        }
    }
}

/// Why a request is refused.
#[derive(Debug, Error)]
pub(super) enum Refusal {
    #[error("a request is {0}")]
    Malformed(&'static str),
    #[error("a request reaches past the end of the disk, at sector {sector}")]
    Range { sector: u64 },
    #[error("a request would write to a read-only disk")]
    ReadOnly,
    #[error("requests of type {0} with these flags are not supported")]
    Unsupported(u32),
    #[error("a request has a buffer outside of guest memory")]
    Memory(#[from] GuestMemoryError),
}

impl Refusal {
    /// The status byte that says so.
    pub(super) fn status(&self) -> u8 {
        match self {
            Self::Unsupported(_) => S_UNSUPP,
            _ => S_IOERR,
        }
    }
}

/// What requests are checked against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Size of the disk.
    pub(super) sectors: u64,
    /// The features that were agreed on.
    pub(super) features: u64,
    /// Whether the disk is read-only, which holds whether or not the driver knows.
    pub(super) read_only: bool,
}

impl Limits {
    /// Reads the request in `chain`, which has room for a status byte.
    pub(super) fn parse(&self, chain: &Chain, memory: &GuestMemory) -> Result<Request, Refusal> {
        let mut header = [0; 16];
        if chain.readable().read_at(memory, 0, &mut header)? < header.len() {
            return Err(Refusal::Malformed("shorter than its header"));
        }
        // struct virtio_blk_req: le32 type, le32 reserved, le64 sector.
        let (first, sector) = halves(header);
        let (kind, _) = words(first);
        let data_in = chain.readable().len() - HEADER_SIZE;
        let data_out = chain.writable().len().saturating_sub(1);
        match kind {
            T_IN | T_GET_ID if data_in != 0 => {
                Err(Refusal::Malformed("a read that brings data along"))
            }
            T_OUT | T_DISCARD | T_WRITE_ZEROES if data_out != 0 => {
                Err(Refusal::Malformed("a write with room for data"))
            }
            T_IN => {
                let (offset, len) = self.data_range(sector, data_out)?;
                Ok(Request::Read { offset, len })
            }
            T_OUT if self.read_only => Err(Refusal::ReadOnly),
            T_OUT => {
                let (offset, len) = self.data_range(sector, data_in)?;
                Ok(Request::Write { offset, len })
            }
            T_FLUSH if self.features & F_FLUSH != 0 => Ok(Request::Flush),
            T_GET_ID if data_out < u64::from(ID_SIZE) => Err(Refusal::Malformed(
                "one for the serial id without room for it",
            )),
            T_GET_ID => Ok(Request::GetId),
            T_DISCARD if self.features & F_DISCARD != 0 => {
                let (offset, len, unmap) =
                    self.segment(chain, memory, kind, MAX_DISCARD_SECTORS)?;
                if unmap {
                    return Err(Refusal::Unsupported(kind));
                }
                Ok(Request::Discard { offset, len })
            }
            T_WRITE_ZEROES if self.features & F_WRITE_ZEROES != 0 => {
                let (offset, len, unmap) =
                    self.segment(chain, memory, kind, MAX_WRITE_ZEROES_SECTORS)?;
                Ok(Request::WriteZeroes { offset, len, unmap })
            }
            _ => Err(Refusal::Unsupported(kind)),
        }
    }

    /// Checks `len` bytes of data at `sector`; the range in bytes.
    fn data_range(&self, sector: u64, len: u64) -> Result<(u64, u64), Refusal> {
        if !len.is_multiple_of(SECTOR_SIZE) {
            return Err(Refusal::Malformed("not a whole number of sectors long"));
        }
        // The used length, with the status byte, has 32 bits.
        if len >= u64::from(u32::MAX) {
            return Err(Refusal::Malformed("longer than a used length can say"));
        }
        self.byte_range(sector, len / SECTOR_SIZE)
    }

    /// Checks `count` sectors from `sector` on; the range in bytes.
    fn byte_range(&self, sector: u64, count: u64) -> Result<(u64, u64), Refusal> {
        match sector.checked_add(count) {
            // In range: the disk has no more bytes than a file can have.
            Some(end) if end <= self.sectors => Ok((sector * SECTOR_SIZE, count * SECTOR_SIZE)),
            _ => Err(Refusal::Range { sector }),
        }
    }

    /// Reads the range of a discard or write-zeroes request: in bytes, and its unmap flag.
    fn segment(
        &self,
        chain: &Chain,
        memory: &GuestMemory,
        kind: u32,
        max_sectors: u32,
    ) -> Result<(u64, u64, bool), Refusal> {
        if self.read_only {
            return Err(Refusal::ReadOnly);
        }
        // One range and no more, as the configuration space says.
        if chain.readable().len() != HEADER_SIZE + RANGE_SIZE {
            return Err(Refusal::Malformed(
                "one for ranges without exactly one range",
            ));
        }
        let mut range = [0; 16];
        chain.readable().read_at(memory, HEADER_SIZE, &mut range)?;
        // struct virtio_blk_discard_write_zeroes: le64 sector, le32 num_sectors, le32 flags.
        let (sector, rest) = halves(range);
        let (count, flags) = words(rest);
        if flags & !RANGE_UNMAP != 0 {
            return Err(Refusal::Unsupported(kind));
        }
        if count > max_sectors {
            return Err(Refusal::Malformed("over more sectors than offered"));
        }
        let (offset, len) = self.byte_range(sector, u64::from(count))?;
        Ok((offset, len, flags & RANGE_UNMAP != 0))
    }
}

/// The two little-endian halves of `bytes`.
#[expect(clippy::cast_possible_truncation, reason = "the halves of a number")]
fn halves(bytes: [u8; 16]) -> (u64, u64) {
    let value = u128::from_le_bytes(bytes);
    (value as u64, (value >> 64) as u64)
}

/// The low and the high half of `value`.
#[expect(clippy::cast_possible_truncation, reason = "the halves of a number")]
fn words(value: u64) -> (u32, u32) {
    (value as u32, (value >> 32) as u32)
}

#[cfg(test)]
mod tests;
