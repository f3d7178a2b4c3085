// SPDX-License-Identifier: Apache-2.0
//! The image behind a block device: opening it, locking it, and what it is like.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::host;

/// Bytes in a sector, the unit of addresses and lengths in the protocol.
pub(super) const SECTOR_SIZE: u32 = 512;
/// The granularity we tell the guest where the host does not say a usable one.
const DEFAULT_BLOCK: u32 = 4096;

/// Why a disk cannot be used.
#[derive(Debug, Error)]
pub enum BlockError {
    /// The image cannot be opened.
    #[error("cannot open disk image {path} for {access}; check the path and its permissions")]
    Open {
        /// The image.
        path: PathBuf,
        /// What it was to be opened for.
        access: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// The image is neither a regular file nor a block device.
    #[error("disk image {path} is a {kind}; give a regular file or a block device")]
    Kind {
        /// The image.
        path: PathBuf,
        /// What it is instead.
        kind: &'static str,
    },
    /// The size of the image cannot be found out.
    #[error("cannot find the size of disk image {path}")]
    Size {
        /// The image.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// Somebody else holds the image's lock.
    #[error(
        "disk image {path} is in use by another machine; stop that one, or attach the image \
         read-only to both, or turn the lock off"
    )]
    InUse {
        /// The image.
        path: PathBuf,
    },
    /// The image cannot be locked at all.
    #[error("cannot lock disk image {path}; if its file system has no locks, turn the lock off")]
    Lock {
        /// The image.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// What the guest has written cannot be made durable, or what was read not be forgotten.
    #[error("cannot flush disk image {path} or what the host has cached of it")]
    Flush {
        /// The image.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// There is no io_uring for us.
    #[error(
        "the Async engine of disk image {path} needs io_uring, which this host does not give; \
         allow it (sysctl kernel.io_uring_disabled, seccomp policy), or use the Sync engine"
    )]
    Ring {
        /// The image.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// There are no more file descriptors.
    #[error("the host gives no event or timer for a disk")]
    Events(#[source] io::Error),
}

/// An opened image. If it is locked, it stays so until it is unlocked or dropped.
#[derive(Debug)]
pub(super) struct Disk {
    /// Where it was opened.
    pub(super) path: PathBuf,
    pub(super) file: File,
    pub(super) read_only: bool,
    /// A block device of the host, not a regular file.
    pub(super) is_block_device: bool,
    /// Size in sectors, a last part of one left out.
    pub(super) sectors: u64,
    /// The smallest unit that can be addressed, in bytes: a power of two from 512.
    pub(super) logical_block: u32,
    /// The smallest unit that is written without reading first, in bytes: a power of two, at
    /// least `logical_block`.
    pub(super) physical_block: u32,
}

impl Disk {
    pub(super) fn open(path: &Path, read_only: bool, lock: bool) -> Result<Self, BlockError> {
        let file = open_image(path, read_only)?;
        let disk = Self::of_file(file, path, read_only);
        let disk = disk.map_err(|source| BlockError::Size {
            path: path.into(),
            source,
        })?;
        if lock {
            disk.lock()?;
        }
        Ok(disk)
    }

    /// Locks the image against other machines: shared if it is read-only, else exclusive.
    pub(super) fn lock(&self) -> Result<(), BlockError> {
        let path = || self.path.clone();
        match host::try_lock(&self.file, !self.read_only) {
            Ok(true) => Ok(()),
            Ok(false) => Err(BlockError::InUse { path: path() }),
            Err(source) => Err(BlockError::Lock {
                path: path(),
                source,
            }),
        }
    }

    pub(super) fn unlock(&self) -> Result<(), BlockError> {
        host::unlock(&self.file).map_err(|source| BlockError::Lock {
            path: self.path.clone(),
            source,
        })
    }

    /// Makes what was written durable.
    pub(super) fn flush(&self) -> Result<(), BlockError> {
        if self.read_only {
            return Ok(());
        }
        self.file.sync_data().map_err(|source| BlockError::Flush {
            path: self.path.clone(),
            source,
        })
    }

    /// Lets the host forget what it has cached.
    pub(super) fn drop_cache(&self) -> Result<(), BlockError> {
        host::drop_cache(&self.file).map_err(|source| BlockError::Flush {
            path: self.path.clone(),
            source,
        })
    }

    /// Its size in bytes, as the guest sees it.
    pub(super) fn bytes(&self) -> u64 {
        self.sectors.saturating_mul(u64::from(SECTOR_SIZE))
    }

    /// The image again, as large as it is now, if `path` leads to this one. It keeps its lock,
    /// which a second opening would not get.
    pub(super) fn reopened(&self, path: &Path) -> Option<Result<Self, BlockError>> {
        if !self.is_at(path) {
            return None;
        }
        let again = self.file.try_clone();
        let disk = again.and_then(|file| Self::of_file(file, path, self.read_only));
        Some(disk.map_err(|source| BlockError::Size {
            path: path.into(),
            source,
        }))
    }

    /// Whether `path` leads to it.
    pub(super) fn is_at(&self, path: &Path) -> bool {
        match (self.file.metadata(), path.metadata()) {
            (Ok(here), Ok(there)) => (here.dev(), here.ino()) == (there.dev(), there.ino()),
            _ => false,
        }
    }

    fn of_file(file: File, path: &Path, read_only: bool) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let is_block_device = metadata.file_type().is_block_device();
        let (bytes, logical, physical) = if is_block_device {
            host::block_device_geometry(&file)?
        } else {
            (metadata.len(), SECTOR_SIZE.into(), metadata.blksize())
        };
        let name = path.display();
        let (sectors, tail) = (
            bytes / u64::from(SECTOR_SIZE),
            bytes % u64::from(SECTOR_SIZE),
        );
        if tail != 0 {
            tracing::warn!(
                "disk image {name} is not a whole number of {SECTOR_SIZE}-byte sectors; the guest \
                 does not see its last {tail} bytes"
            );
        }
        if sectors == 0 {
            // Not an error: a drive may be attached as a placeholder, to be given an image later.
            tracing::warn!("disk image {name} holds no sector; the guest gets an empty disk");
        }
        let logical_block = block_size(logical, SECTOR_SIZE);
        Ok(Self {
            path: path.into(),
            file,
            read_only,
            is_block_device,
            sectors,
            logical_block,
            physical_block: block_size(physical, DEFAULT_BLOCK).max(logical_block),
        })
    }
}

/// The size of the image at `path` in bytes, with a last part of a sector. What cannot be an image is
/// not opened.
///
/// # Errors
///
/// It is missing, of the wrong kind, or cannot be read.
pub fn image_size(path: &Path) -> Result<u64, BlockError> {
    end_of(&open_image(path, true)?, path)
}

/// The size of an image in bytes.
pub(super) fn end_of(mut file: &File, path: &Path) -> Result<u64, BlockError> {
    // A block device has its size at its end only.
    file.seek(SeekFrom::End(0))
        .map_err(|source| BlockError::Size {
            path: path.into(),
            source,
        })
}

fn open_image(path: &Path, read_only: bool) -> Result<File, BlockError> {
    let access = if read_only { "reading" } else { "writing" };
    let open_error = |source| BlockError::Open {
        path: path.into(),
        access,
        source,
    };
    // Looked at before it is opened: opening a FIFO can wait and opening a device can act.
    let file_type = path.metadata().map_err(open_error)?.file_type();
    let kind = match () {
        () if file_type.is_dir() => Some("directory"),
        () if file_type.is_fifo() => Some("FIFO"),
        () if file_type.is_char_device() => Some("character device"),
        () if file_type.is_socket() => Some("socket"),
        () => None,
    };
    if let Some(kind) = kind {
        return Err(BlockError::Kind {
            path: path.into(),
            kind,
        });
    }
    OpenOptions::new()
        .read(true)
        .write(!read_only)
        .open(path)
        .map_err(open_error)
}

/// `size` as far as it can be a block size of a disk, or else `default`.
fn block_size(size: u64, default: u32) -> u32 {
    match u32::try_from(size) {
        Ok(size) if size.is_power_of_two() && (SECTOR_SIZE..=1 << 20).contains(&size) => size,
        _ => default,
    }
}

#[cfg(test)]
mod tests;
