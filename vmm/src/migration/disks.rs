// SPDX-License-Identifier: Apache-2.0
//! Disks that move along, at the source.
//!
//! The first pass tells everything: data as it is, holes as zeros. From before it on, each device
//! notes which blocks its guest writes, and each later pass takes these. Passes over the disks alone
//! come first, until little is left; then what was written is sent with each pass over the memory,
//! and the rest with the guest paused.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use brume_api::{MigrationPhase, OnTimeout};
use brume_migration::Message;
use brume_virtio::block::BlockControl;
use vmm_sys_util::seek_hole::SeekHole;

use super::control::Control;
use super::error::SourceError;
use super::lanes::Lanes;
use super::source::await_answer;
use super::status::Progress;
use crate::page_set::PAGE_SIZE;

/// How many bytes are sent at once.
const CHUNK: usize = 256 << 10;
/// The unit in which zeros are looked for, in bytes.
const PIECE: usize = 64 << 10;
/// The most zeros that are told at once, in bytes: a target without holes has to write them while
/// nothing else moves.
const MOST_ZEROS: u64 = 64 << 20;
/// How little has to be left for a pass with the memory, in bytes.
const LITTLE: u64 = 16 << 20;
/// The most passes over the disks alone.
const MOST_PASSES: u32 = 16;

static ZEROS: [u8; PIECE] = [0; PIECE];

/// A disk that is read while its guest writes to it.
struct Disk {
    id: String,
    control: BlockControl,
    file: File,
    /// In bytes.
    size: u64,
}

/// All disks of a machine that moves with them; none if it moves without.
#[derive(Default)]
pub(crate) struct Disks {
    disks: Vec<Disk>,
    /// Whether all of them were sent once.
    begun: bool,
    /// How many bytes on the wire the last pass took.
    sent: u64,
    buffer: Vec<u8>,
}

impl Disks {
    /// Makes them ready to be copied.
    ///
    /// # Errors
    ///
    /// The process has no more descriptors, or a size is not to be found out.
    pub(crate) fn of(drives: impl Iterator<Item = (String, BlockControl)>) -> io::Result<Self> {
        let mut all = Self::default();
        for (id, control) in drives {
            let mut file = control.image()?;
            let size = file.seek(SeekFrom::End(0))?;
            control.lock_for_copy();
            all.disks.push(Disk {
                id,
                control,
                file,
                size,
            });
        }
        Ok(all)
    }

    /// Their sizes in bytes, by the ids of the drives.
    pub(crate) fn sizes(&self) -> impl Iterator<Item = (&str, u64)> {
        self.disks.iter().map(|disk| (&*disk.id, disk.size))
    }

    /// Whether there are none, or none that move along.
    pub(super) fn is_empty(&self) -> bool {
        self.disks.is_empty()
    }

    /// How much was written since it was sent, in whole pages.
    pub(super) fn left_pages(&self) -> u64 {
        self.left().div_ceil(PAGE_SIZE)
    }

    /// How many bytes on the wire the last pass took.
    pub(super) fn sent(&self) -> u64 {
        self.sent
    }

    fn left(&self) -> u64 {
        self.disks
            .iter()
            .map(|disk| disk.control.log().bytes())
            .sum()
    }

    /// Copies them until little is left, or no less than before. The guest's memory need not be
    /// watched meanwhile.
    ///
    /// # Errors
    ///
    /// They cannot be read or sent, it was called off, or takes too long.
    pub(super) fn copy(
        &mut self,
        lanes: &mut Lanes,
        control: &Control,
        progress: &Progress,
    ) -> Result<(), SourceError> {
        if self.disks.is_empty() {
            return Ok(());
        }
        progress.enter(MigrationPhase::PreCopy);
        let mut before = u64::MAX;
        for number in 1..=MOST_PASSES {
            self.pass(lanes, progress)?;
            let left = self.left();
            tracing::debug!(
                "migration: pass {number} over the disks: {} bytes sent, {left} written meanwhile",
                self.sent
            );
            let limits = control.limits();
            let late = limits.deadline.is_some_and(|end| Instant::now() >= end);
            if late && limits.on_timeout == OnTimeout::Cancel {
                return Err(SourceError::TooSlow);
            }
            if late || left <= LITTLE || left > before / 4 * 3 {
                break;
            }
            before = left;
        }
        Ok(())
    }

    /// Sends what was written since the last pass, or everything if this is the first one, and waits
    /// until the target has it.
    ///
    /// # Errors
    ///
    /// As for [`Self::copy`].
    pub(super) fn pass(
        &mut self,
        lanes: &mut Lanes,
        progress: &Progress,
    ) -> Result<(), SourceError> {
        if self.disks.is_empty() {
            return Ok(());
        }
        self.send(lanes, progress, false)?;
        await_answer(lanes, &Message::DisksTaken)
    }

    /// Sends what is left, with the guest paused.
    ///
    /// # Errors
    ///
    /// They cannot be read or sent.
    pub(super) fn last(
        &mut self,
        lanes: &mut Lanes,
        progress: &Progress,
    ) -> Result<(), SourceError> {
        if self.disks.is_empty() {
            return Ok(());
        }
        self.send(lanes, progress, true)
    }

    fn send(
        &mut self,
        lanes: &mut Lanes,
        progress: &Progress,
        paused: bool,
    ) -> Result<(), SourceError> {
        self.sent = 0;
        let first = !self.begun;
        self.begun = true;
        self.buffer.resize(CHUNK, 0);
        for (number, disk) in (0..).zip(&mut self.disks) {
            let ranges = if first {
                // Before anything is read.
                disk.control.log().start();
                std::iter::once(0..disk.size).collect()
            } else {
                let written = disk.control.log().take();
                written.map_or_else(Vec::new, |written| written.ranges().collect())
            };
            let mut way = Way {
                number,
                lanes: &mut *lanes,
                progress,
                paused,
                sent: &mut self.sent,
            };
            for range in ranges {
                let range = range.start..range.end.min(disk.size);
                send_range(disk, range, &mut self.buffer, &mut way)?;
            }
        }
        let channel = &mut lanes.first.channel;
        channel.send(&Message::DisksEnded { last: paused })?;
        Ok(())
    }
}

impl Drop for Disks {
    fn drop(&mut self) {
        for disk in &self.disks {
            disk.control.log().stop();
            disk.control.unlock_after_copy();
        }
    }
}

/// Where the blocks of a disk go.
struct Way<'a> {
    number: u32,
    lanes: &'a mut Lanes,
    progress: &'a Progress,
    paused: bool,
    /// Bytes on the wire.
    sent: &'a mut u64,
}

impl Way<'_> {
    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<(), SourceError> {
        let channel = &mut self.lanes.first.channel;
        let sent = channel.send_disk(self.number, offset, bytes)?;
        self.sent(sent, bytes.len() as u64)
    }

    fn zeros(&mut self, range: &Range<u64>) -> Result<(), SourceError> {
        let mut offset = range.start;
        while offset < range.end {
            let length = MOST_ZEROS.min(range.end - offset);
            let channel = &mut self.lanes.first.channel;
            let sent = channel.send_disk_zeros(self.number, offset, length)?;
            self.sent(sent, 0)?;
            offset += length;
        }
        Ok(())
    }

    fn sent(&mut self, bytes: u64, data: u64) -> Result<(), SourceError> {
        *self.sent += bytes;
        self.progress.update(|status| {
            status.bytes += bytes;
            status.disk_bytes += data;
        });
        if self.paused {
            return Ok(());
        }
        Ok(self.lanes.first.wait_for_limit(bytes)?)
    }
}

fn send_range(
    disk: &mut Disk,
    range: Range<u64>,
    buffer: &mut [u8],
    way: &mut Way<'_>,
) -> Result<(), SourceError> {
    let mut at = range.start;
    while at < range.end {
        let rest = at..range.end;
        match next_data(&mut disk.file, &rest) {
            Some(data) => {
                way.zeros(&(at..data.start))?;
                at = data.end;
                send_data(disk, data, buffer, way)?;
            }
            None => return way.zeros(&rest),
        }
    }
    Ok(())
}

/// The first piece of `range` that is no hole. Whatever changes meanwhile was noted as written.
fn next_data(file: &mut File, range: &Range<u64>) -> Option<Range<u64>> {
    let start = match file.seek_data(range.start) {
        Ok(Some(start)) if start < range.end => start,
        Ok(_) => return None,
        // A file of which nothing is known but its contents.
        Err(_) => return Some(range.clone()),
    };
    let end = match file.seek_hole(start) {
        // It has become one since it was found: it is read for what it is.
        Ok(Some(end)) if end <= start => range.end.min(start + CHUNK as u64),
        Ok(Some(end)) => end.min(range.end),
        _ => range.end,
    };
    Some(start..end)
}

fn send_data(
    disk: &Disk,
    range: Range<u64>,
    buffer: &mut [u8],
    way: &mut Way<'_>,
) -> Result<(), SourceError> {
    let mut offset = range.start;
    while offset < range.end {
        let length = usize::try_from(range.end - offset).unwrap_or(usize::MAX);
        let length = length.min(buffer.len());
        let (bytes, _) = buffer.split_at_mut(length);
        let read = disk.file.read_exact_at(bytes, offset);
        read.map_err(|source| SourceError::Disk {
            id: disk.id.clone(),
            source,
        })?;
        let mut at = offset;
        for (zero, run) in runs(bytes) {
            if zero {
                way.zeros(&(at..at + run.len() as u64))?;
            } else {
                way.data(at, run)?;
            }
            at += run.len() as u64;
        }
        offset = at;
    }
    Ok(())
}

/// The pieces of `bytes` that are zeros and those that are not, neighbours of a kind together.
fn runs(bytes: &[u8]) -> Vec<(bool, &[u8])> {
    let is_zero = |piece: &[u8]| ZEROS.get(..piece.len()) == Some(piece);
    let mut runs = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let mut pieces = rest
            .chunks(PIECE)
            .map(|piece| (is_zero(piece), piece.len()));
        let Some((zero, first)) = pieces.next() else {
            break;
        };
        let same = pieces.take_while(|(next, _)| *next == zero);
        let length = first + same.map(|(_, length)| length).sum::<usize>();
        let (run, after) = rest.split_at(length);
        runs.push((zero, run));
        rest = after;
    }
    runs
}

#[cfg(test)]
mod tests;
