// SPDX-License-Identifier: Apache-2.0
//! An image that is filled from elsewhere before a device uses it.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::disk::{BlockError, Disk, end_of};
use super::host;

/// An image that a copy of another one is written into. It is locked against other machines, also
/// if the device that is to have it does without, until it is unlocked or dropped.
#[derive(Debug)]
pub struct CopiedImage {
    disk: Disk,
    size: u64,
}

impl CopiedImage {
    /// Opens and locks the image at `path`, and changes nothing about it.
    ///
    /// # Errors
    ///
    /// It is missing, of the wrong kind, in use, or cannot be locked or written.
    pub fn open(path: &Path) -> Result<Self, BlockError> {
        let disk = Disk::open(path, false, true)?;
        let size = end_of(&disk.file, path)?;
        Ok(Self { disk, size })
    }

    /// Its size in bytes, with a last part of a sector.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether `path` leads to it still.
    pub fn is_at(&self, path: &Path) -> bool {
        self.disk.is_at(path)
    }

    /// Writes `bytes` at `offset`.
    ///
    /// # Errors
    ///
    /// They are not all inside of it, or the host refuses it.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.check(offset, bytes.len() as u64)?;
        self.disk.file.write_all_at(bytes, offset)
    }

    /// Makes `length` bytes from `offset` on zeros, without storage where the host can do that.
    ///
    /// # Errors
    ///
    /// They are not all inside of it, or the host refuses it.
    pub fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check(offset, length)?;
        if length == 0 {
            return Ok(());
        }
        let mode = libc::FALLOC_FL_PUNCH_HOLE;
        host::fallocate(&self.disk.file, mode, offset, length)
            .or_else(|_| host::write_zeroes(&self.disk.file, offset, length))
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    ///
    /// The host cannot.
    pub fn flush(&self) -> Result<(), BlockError> {
        self.disk.flush()
    }

    /// Gives its lock up, for the device that is to have it.
    ///
    /// # Errors
    ///
    /// The host refuses it.
    pub fn unlock(&self) -> Result<(), BlockError> {
        self.disk.unlock()
    }

    fn check(&self, offset: u64, length: u64) -> io::Result<()> {
        match offset.checked_add(length) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn what_is_not_inside_is_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        fs::write(&path, [7; 4096]).unwrap();
        let image = CopiedImage::open(&path).unwrap();
        assert_eq!(image.size(), 4096);
        image.write(4095, &[1]).unwrap();
        image.zero(0, 512).unwrap();
        image.zero(4096, 0).unwrap();
        for (offset, length) in [(4096, 1), (4090, 7), (u64::MAX, 1), (u64::MAX, 2)] {
            image.zero(offset, length).unwrap_err();
            let bytes = vec![9; usize::try_from(length).unwrap()];
            image.write(offset, &bytes).unwrap_err();
        }
        let mut expected = [7; 4096];
        expected[..512].fill(0);
        expected[4095] = 1;
        assert!(fs::read(&path).unwrap() == expected);
    }

    #[test]
    fn zeros_take_no_room() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        fs::write(&path, vec![7; 1 << 20]).unwrap();
        let image = CopiedImage::open(&path).unwrap();
        image.zero(0, 1 << 20).unwrap();
        image.flush().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().blocks(), 0);
        assert!(fs::read(&path).unwrap() == [0; 1 << 20]);
    }

    #[test]
    fn one_has_it_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        fs::write(&path, [7; 512]).unwrap();
        let image = CopiedImage::open(&path).unwrap();
        let second = CopiedImage::open(&path).unwrap_err();
        assert!(matches!(second, BlockError::InUse { .. }), "{second}");
        image.unlock().unwrap();
        CopiedImage::open(&path).unwrap();
        assert!(image.is_at(&path));
        fs::rename(&path, folder.path().join("other")).unwrap();
        fs::write(&path, [7; 512]).unwrap();
        assert!(!image.is_at(&path));
    }
}
