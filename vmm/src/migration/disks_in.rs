// SPDX-License-Identifier: Apache-2.0
//! Disks that come along, at the target.
//!
//! Each image is locked while it is filled, and is made if there is none; one that was made goes
//! again unless the machine arrives. What was written is made durable beside what comes next, by a
//! thread called `migration sync` that lives for as long as that takes and has only the images.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use brume_api::config::VmConfig;
use brume_api::with_causes;
use brume_migration::{Channel, ChannelError, Message};
use brume_virtio::block::CopiedImage;

use super::offer::DriveOffer;
use super::status::Progress;

/// How often the source is told that it is still being written.
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// How often it is looked whether that is done.
const LOOK: Duration = Duration::from_millis(2);

/// An image that is filled.
struct Disk {
    id: String,
    path: PathBuf,
    image: Arc<CopiedImage>,
    /// Whether something was written since it was last made durable.
    written: bool,
    /// Whether it goes again.
    made: bool,
}

/// All disks of a machine that comes with them; none if it comes without.
#[derive(Default)]
pub(crate) struct DisksIn {
    disks: Vec<Disk>,
    sync: Option<JoinHandle<Result<(), String>>>,
}

impl DisksIn {
    /// Opens or makes a file for each of `drives`, in their order, where `config` has them.
    ///
    /// # Errors
    ///
    /// What does not fit, drive by drive; what was made is gone again.
    pub(super) fn prepare(drives: &[DriveOffer], config: &VmConfig) -> Result<Self, Vec<String>> {
        let mut all = Self::default();
        let mut reasons = Vec::new();
        for drive in drives {
            let mut here = config
                .drives
                .iter()
                .filter(|here| here.drive_id == drive.id);
            let path = here.next().and_then(|here| here.path_on_host.as_ref());
            match (path, drive.size) {
                (Some(path), Some(size)) => match Disk::prepare(&drive.id, path, size) {
                    Ok(disk) => all.disks.push(disk),
                    Err(reason) => reasons.push(reason),
                },
                _ => reasons.push(format!(
                    "the source does not tell what is behind drive \"{}\"",
                    drive.id
                )),
            }
        }
        if drives.len() != config.drives.len() {
            reasons.push("the source does not tell of the machine's drives one by one".into());
        }
        if reasons.is_empty() {
            Ok(all)
        } else {
            Err(reasons)
        }
    }

    /// Whether there are none, or none that come along.
    pub(super) fn is_empty(&self) -> bool {
        self.disks.is_empty()
    }

    /// Writes what has come of a drive.
    ///
    /// # Errors
    ///
    /// There is no such place, or the host does not take it.
    pub(super) fn write(
        &mut self,
        (drive, offset): (u32, u64),
        bytes: &[u8],
        progress: &Progress,
    ) -> Result<(), String> {
        self.change(drive, |image| image.write(offset, bytes))?;
        progress.update(|status| {
            status.bytes += bytes.len() as u64;
            status.disk_bytes += bytes.len() as u64;
        });
        Ok(())
    }

    /// Makes a piece of a drive zeros.
    ///
    /// # Errors
    ///
    /// As for [`Self::write`].
    pub(super) fn zero(&mut self, drive: u32, offset: u64, length: u64) -> Result<(), String> {
        self.change(drive, |image| image.zero(offset, length))
    }

    fn change(
        &mut self,
        drive: u32,
        change: impl FnOnce(&CopiedImage) -> io::Result<()>,
    ) -> Result<(), String> {
        let index = usize::try_from(drive).unwrap_or(usize::MAX);
        let disk = self.disks.get_mut(index);
        let disk = disk.ok_or("the source has sent blocks of a drive that is not there")?;
        disk.written = true;
        change(&disk.image).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidInput => {
                format!(
                    "the source has sent blocks behind the end of drive \"{}\"",
                    disk.id
                )
            }
            _ => {
                let path = disk.path.display();
                format!(
                    "{path} cannot be written for drive \"{}\": {error}",
                    disk.id
                )
            }
        })
    }

    /// All of a pass has come: answers when it is durable, or begins to make it so if it was the
    /// last one.
    ///
    /// # Errors
    ///
    /// It cannot be made durable, or the source is gone.
    pub(super) fn pass_ended(&mut self, last: bool, channel: &mut Channel) -> Result<(), String> {
        self.begin_sync();
        if last {
            return Ok(());
        }
        let failed = |error: ChannelError| with_causes(&error);
        let mut told = Instant::now();
        while self.sync.as_ref().is_some_and(|sync| !sync.is_finished()) {
            thread::sleep(LOOK);
            if told.elapsed() >= KEEP_ALIVE {
                channel.send(&Message::KeepAlive).map_err(failed)?;
                told = Instant::now();
            }
        }
        self.synced()?;
        channel.send(&Message::DisksTaken).map_err(failed)?;
        Ok(())
    }

    fn begin_sync(&mut self) {
        let written = self.disks.iter_mut().filter(|disk| disk.written);
        let images: Vec<_> = written
            .map(|disk| {
                disk.written = false;
                disk.image.clone()
            })
            .collect();
        if images.is_empty() {
            return;
        }
        let before = self.sync.take();
        let sync = move || {
            before.map_or(Ok(()), wait)?;
            let mut flushed = images.iter().map(|image| image.flush());
            flushed.try_for_each(|flushed| flushed.map_err(|error| with_causes(&error)))
        };
        let thread = thread::Builder::new().name("migration sync".into());
        match thread.spawn(sync) {
            Ok(thread) => self.sync = Some(thread),
            // What is not synced is still marked: `synced` does it.
            Err(_) => self.disks.iter_mut().for_each(|disk| disk.written = true),
        }
    }

    /// Waits until everything is durable.
    ///
    /// # Errors
    ///
    /// It cannot be made so.
    pub(super) fn synced(&mut self) -> Result<(), String> {
        self.sync.take().map_or(Ok(()), wait)?;
        for disk in self.disks.iter_mut().filter(|disk| disk.written) {
            disk.image.flush().map_err(|error| with_causes(&error))?;
            disk.written = false;
        }
        Ok(())
    }

    /// Gives the locks up, for the devices that are to have them.
    ///
    /// # Errors
    ///
    /// The host refuses it.
    pub(super) fn unlock(&self) -> Result<(), String> {
        let mut unlocked = self.disks.iter().map(|disk| disk.image.unlock());
        unlocked.try_for_each(|unlocked| unlocked.map_err(|error| with_causes(&error)))
    }

    /// The machine has arrived: the files stay.
    pub(super) fn keep(&mut self) {
        self.disks.iter_mut().for_each(|disk| disk.made = false);
    }
}

fn wait(sync: JoinHandle<Result<(), String>>) -> Result<(), String> {
    sync.join()
        .unwrap_or_else(|_| Err("the thread that syncs the disks has ended".into()))
}

impl Disk {
    fn prepare(id: &str, path: &Path, size: u64) -> Result<Self, String> {
        let failed = |why: String| format!("the target has no room for drive \"{id}\": {why}");
        let made = make(path, size);
        let made =
            made.map_err(|error| failed(format!("{} cannot be made: {error}", path.display())))?;
        let opened = CopiedImage::open(path).map_err(|error| failed(with_causes(&error)));
        let opened = opened.and_then(|image| {
            if image.size() == size {
                return Ok(image);
            }
            Err(format!(
                "drive \"{id}\" has {size} bytes at the source, and {} has {} at the target: give a \
                 file of the same size, which is overwritten, or none, and it is made",
                path.display(),
                image.size()
            ))
        });
        match opened {
            Ok(image) => Ok(Self {
                id: id.to_owned(),
                path: path.to_owned(),
                image: Arc::new(image),
                written: false,
                made,
            }),
            Err(reason) => {
                if made {
                    let _ = fs::remove_file(path);
                }
                Err(reason)
            }
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Not what somebody else has put there since.
        if self.made
            && self.image.is_at(&self.path)
            && let Err(error) = fs::remove_file(&self.path)
        {
            let path = self.path.display();
            tracing::warn!(
                "{path}, which was made for drive \"{}\", stays: {error}",
                self.id
            );
        }
    }
}

/// Makes a file of `size` bytes without data; `false` if there is something already.
fn make(path: &Path, size: u64) -> io::Result<bool> {
    let mut options = OpenOptions::new();
    // What a guest has on its disk is for nobody else.
    options.write(true).create_new(true).mode(0o600);
    let file = match options.open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(false),
        Err(error) => return Err(error),
    };
    let sized = file.set_len(size).and_then(|()| {
        // The name has to last as long as what is in the file.
        let folder = path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    });
    if let Err(error) = sized {
        let _ = fs::remove_file(path);
        return Err(error);
    }
    Ok(true)
}

#[cfg(test)]
mod tests;
