// SPDX-License-Identifier: Apache-2.0
//! Files that appear whole or not at all.
//!
//! What is written goes to another name in the folder of the target, and takes the target's name
//! when it is safe on disk. A process that is killed before that leaves the other name behind:
//! `.NAME.PID.NUMBER.brume-tmp`. It holds a lock (`flock`) on it while it lives, so whoever next
//! writes the same target sees which of those are nobody's, and removes them.
//!
//! Two files cannot take their names at one moment. Of a snapshot, the memory takes its name first,
//! when the state is on disk under its other name: that moment is when the new snapshot replaces
//! the old one. A crash before the state takes its name too leaves new memory and an old state,
//! and whoever loads them sees by the mark in both that they do not fit. The state that fits is
//! among the [`left_behind`] then. So what is left of a state is removed only when a later pair is
//! in place, which is why a state is begun with [`NewFile::create_keeping`].
//!
//! ```text
//!   memory  state  .state...brume-tmp
//!   old     old    being written      the old snapshot
//!   new     old    new, on disk       the new snapshot, its state under the other name
//!   new     new                       the new snapshot
//! ```

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata, OpenOptions, Permissions, TryLockError};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use thiserror::Error;

/// How the names of unfinished files end.
const SUFFIX: &str = ".brume-tmp";
/// How much of the target's name is in that of the unfinished file, in bytes: names have 255.
const MAX_NAME: usize = 200;
/// As many as the kernel follows.
const MAX_LINKS: usize = 40;
const MAX_ATTEMPTS: usize = 100;

/// Why a file was not written. The target is as it was, unless the text says otherwise.
#[derive(Debug, Error)]
pub enum NewFileError {
    /// The target is something else than a file.
    #[error("{} is {kind}; name a file, or one that is not there yet", path.display())]
    NotAFile {
        /// The target.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// The path is of no file: it is empty, or ends with `/` or `..`.
    #[error("{} names no file", .0.display())]
    NoName(PathBuf),
    /// One file cannot be both the memory and the state.
    #[error("{} cannot be both the memory and the state; name two files", .0.display())]
    SameTarget(PathBuf),
    /// There can be no file in the folder.
    #[error("{} cannot be created", path.display())]
    Create {
        /// The target.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The contents did not get to the disk.
    #[error("{} cannot be written to disk", path.display())]
    Sync {
        /// The target.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The contents are on the disk, but the name cannot be given to them.
    #[error("{} cannot be replaced", path.display())]
    Rename {
        /// The target.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The new file is in place, but might not be after a failure of power.
    #[error("{} is written, but its folder cannot be synced", path.display())]
    SyncFolder {
        /// The target.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A file that is being written, and has no name of its own until it is committed. Dropped before
/// that, nothing is left of it.
#[derive(Debug)]
pub struct NewFile {
    file: File,
    target: PathBuf,
    temporary: Option<PathBuf>,
}

impl NewFile {
    /// Begins a file that is going to be `target`. A symbolic link is followed: what it points to
    /// is replaced. A file that is there keeps its owner (as far as this process may give files
    /// away) and permissions; a new one has those of the umask.
    ///
    /// # Errors
    ///
    /// The target is not a file, or there can be none in that folder.
    pub fn create(target: &Path) -> Result<Self, NewFileError> {
        let new = Self::create_keeping(target)?;
        new.remove_left_behind();
        Ok(new)
    }

    /// Begins a file as [`NewFile::create`] does, but keeps until the commit what killed processes
    /// have left of the target: for the state of a snapshot.
    ///
    /// # Errors
    ///
    /// As for [`NewFile::create`].
    pub fn create_keeping(target: &Path) -> Result<Self, NewFileError> {
        let failed = |source| NewFileError::Create {
            path: target.to_owned(),
            source,
        };
        if target.as_os_str().as_bytes().ends_with(b"/") {
            return Err(NewFileError::NoName(target.to_owned()));
        }
        let path = follow_links(target).map_err(failed)?;
        let old = replaceable(&path)?;
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(NewFileError::NoName(path));
        };
        let mode = old.as_ref().map_or(0o666, |old| old.mode() & 0o777);
        let (file, temporary) = open_temporary(folder, name, mode).map_err(failed)?;
        let new = Self {
            file,
            target: path,
            temporary: Some(temporary),
        };
        if let Some(old) = old {
            // Only root may give a file away, and may have to, as a jailed machine owns its files.
            let _ = fchown(&new.file, Some(old.uid()), Some(old.gid()));
            let permissions = Permissions::from_mode(old.mode() & 0o777);
            new.file.set_permissions(permissions).map_err(failed)?;
        }
        Ok(new)
    }

    /// The file, open for reading and writing.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// What the file is going to be: an absolute path, no symbolic link.
    #[must_use]
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Puts the file in its place. When this returns, it is on disk.
    ///
    /// # Errors
    ///
    /// The disk is full or failed, or the target cannot be replaced.
    pub fn commit(mut self) -> Result<(), NewFileError> {
        self.sync()?;
        self.rename()?;
        self.sync_folder()?;
        self.remove_left_behind();
        Ok(())
    }

    fn sync(&self) -> Result<(), NewFileError> {
        self.file.sync_all().map_err(|source| NewFileError::Sync {
            path: self.target.clone(),
            source,
        })
    }

    fn rename(&mut self) -> Result<(), NewFileError> {
        let Some(temporary) = &self.temporary else {
            return Ok(());
        };
        let replaced = File::open(&self.target).ok();
        let renamed = fs::rename(temporary, &self.target);
        free_beside(replaced);
        renamed.map_err(|source| NewFileError::Rename {
            path: self.target.clone(),
            source,
        })?;
        self.temporary = None;
        Ok(())
    }

    /// Removes what processes that are gone have left of the target. A file that cannot be removed
    /// is in nobody's way.
    fn remove_left_behind(&self) {
        for path in temporaries(&self.target) {
            let _ = remove_if_unlocked(&path);
        }
    }

    fn sync_folder(&self) -> Result<(), NewFileError> {
        let folder = self.target.parent().unwrap_or(Path::new("/"));
        let synced = File::open(folder).and_then(|folder| folder.sync_all());
        synced.map_err(|source| NewFileError::SyncFolder {
            path: self.target.clone(),
            source,
        })
    }
}

/// Closes the file that was replaced, in a thread of its own: its last user frees its blocks, which
/// takes a second for each GiB on some disks.
fn free_beside(replaced: Option<File>) {
    if let Some(file) = replaced {
        // Without a thread it is closed here.
        drop(thread::Builder::new().spawn(move || drop(file)));
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            // If it stays, the next one to write the target removes it.
            let _ = fs::remove_file(temporary);
        }
    }
}

/// Puts the two files of a snapshot in their places, the state last: both are on disk before
/// either has its name. After a crash between the two names, the state is among the
/// [`left_behind`].
///
/// # Errors
///
/// They are one file, the disk is full or failed, or a target cannot be replaced. If that is the
/// state's, which was a file when it was begun, the memory is replaced already.
pub fn commit_pair(mut memory: NewFile, mut state: NewFile) -> Result<(), NewFileError> {
    if memory.target == state.target {
        return Err(NewFileError::SameTarget(state.target.clone()));
    }
    // Side by side, so that a file system with a journal has one wait for both.
    thread::scope(|scope| {
        let other = thread::Builder::new().spawn_scoped(scope, || state.sync());
        memory.sync()?;
        match other {
            Ok(other) => other.join().unwrap_or_else(|panic| resume_unwind(panic)),
            // No thread to be had.
            Err(_) => state.sync(),
        }
    })?;
    // The new memory is of no use without the state, under whatever name.
    state.sync_folder()?;
    memory.rename()?;
    if memory.target.parent() != state.target.parent() {
        memory.sync_folder()?;
    }
    state.rename()?;
    state.sync_folder()?;
    state.remove_left_behind();
    Ok(())
}

/// What was written for `target` and never took its name, whole or not: its writer was killed, or
/// is about to give it the name.
#[must_use]
pub fn left_behind(target: &Path) -> Vec<PathBuf> {
    follow_links(target).map_or_else(|_| Vec::new(), |target| temporaries(&target))
}

/// Where the file is, or is going to be: an absolute path whose last part is no link.
fn follow_links(path: &Path) -> io::Result<PathBuf> {
    let mut path = std::path::absolute(path)?;
    for _ in 0..MAX_LINKS {
        let is_link = fs::symlink_metadata(&path).is_ok_and(|found| found.is_symlink());
        if !is_link {
            // So that two names of a folder are seen to be one.
            return match (path.parent(), path.file_name()) {
                (Some(folder), Some(name)) => Ok(folder.canonicalize()?.join(name)),
                _ => Ok(path),
            };
        }
        let to = fs::read_link(&path)?;
        path = path.parent().unwrap_or(Path::new("/")).join(to);
    }
    Err(io::Error::from_raw_os_error(libc::ELOOP))
}

/// The file that is in the way, if any.
fn replaceable(path: &Path) -> Result<Option<Metadata>, NewFileError> {
    let old = match fs::symlink_metadata(path) {
        Ok(old) => old,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            let path = path.to_owned();
            return Err(NewFileError::Create { path, source });
        }
    };
    let found = old.file_type();
    let kind = match () {
        () if found.is_file() => return Ok(Some(old)),
        () if found.is_dir() => "a folder",
        () if found.is_fifo() => "a named pipe",
        () if found.is_socket() => "a socket",
        () => "a device",
    };
    let path = path.to_owned();
    Err(NewFileError::NotAFile { path, kind })
}

/// How the names of all unfinished files of a target begin.
fn prefix(name: &OsStr) -> OsString {
    let name = name.as_bytes();
    let name = name.get(..MAX_NAME).unwrap_or(name);
    let mut prefix = OsString::from(".");
    prefix.push(OsStr::from_bytes(name));
    prefix.push(".");
    prefix
}

/// Makes a locked file of a name that nobody has.
fn open_temporary(folder: &Path, name: &OsStr, mode: u32) -> io::Result<(File, PathBuf)> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    for _ in 0..MAX_ATTEMPTS {
        let mut own = prefix(name);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        own.push(format!("{:x}.{number:x}{SUFFIX}", std::process::id()));
        let path = folder.join(own);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(mode);
        let file = match options.open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            Err(error) => return Err(error),
        };
        // Someone may take it for a left one until it is locked. Where there are no locks, it
        // cannot be taken for one.
        let taken = matches!(file.try_lock(), Err(TryLockError::WouldBlock));
        if !taken && file.metadata()?.nlink() > 0 {
            return Ok((file, path));
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

/// The unfinished files of a target.
fn temporaries(target: &Path) -> Vec<PathBuf> {
    let (Some(folder), Some(name)) = (target.parent(), target.file_name()) else {
        return Vec::new();
    };
    let prefix = prefix(name);
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter(|entry| is_temporary(&entry.file_name(), &prefix))
        .map(|entry| entry.path())
        .collect()
}

/// Whether a name is PREFIX, then two numbers, then the suffix.
fn is_temporary(name: &OsStr, prefix: &OsStr) -> bool {
    let rest = name.as_bytes().strip_prefix(prefix.as_bytes());
    let Some(numbers) = rest.and_then(|rest| rest.strip_suffix(SUFFIX.as_bytes())) else {
        return false;
    };
    let mut parts = numbers.split(|&byte| byte == b'.');
    let mut is_number = || {
        let part = parts.next().unwrap_or_default();
        !part.is_empty() && part.iter().all(u8::is_ascii_hexdigit)
    };
    is_number() && is_number() && parts.next().is_none()
}

fn remove_if_unlocked(path: &Path) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let file = options.open(path)?;
    if file.metadata()?.is_file() && file.try_lock().is_ok() {
        fs::remove_file(path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
