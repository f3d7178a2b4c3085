// SPDX-License-Identifier: Apache-2.0
//! A machine whose guest lives on (the bare guest's step `live`), driven over the API.

use std::fs;
use std::io::{self, Read};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::program::Programs;
use crate::session::Session;

/// What is left to the guest itself, in MiB: its image, and the table of its pages.
const GUEST_MIB: u64 = 16;

/// A machine.
#[derive(Clone, Copy)]
pub(crate) struct Size {
    /// Its memory in MiB.
    pub(crate) mib: u64,
    /// How much of it the guest has touched, and writes to.
    pub(crate) percent: u64,
}

impl Size {
    /// MiB that the guest touches.
    pub(crate) fn touched(self) -> u64 {
        let touched = self.mib * self.percent / 100;
        touched.clamp(1, self.mib - GUEST_MIB)
    }

    /// Its memory for a person.
    pub(crate) fn name(self) -> String {
        match self.mib {
            mib if mib % 1024 == 0 => format!("{} GiB", mib / 1024),
            mib => format!("{mib} MiB"),
        }
    }
}

/// The files of a snapshot, removed with this.
pub(crate) struct Files {
    state: PathBuf,
    memory: PathBuf,
}

impl Files {
    /// Files called after `name`, which are not there yet.
    pub(crate) fn new(programs: &Programs, name: &str) -> Self {
        let folder = programs.folder();
        Self {
            state: folder.join(format!("{name}.state")),
            memory: folder.join(format!("{name}.memory")),
        }
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.state);
        let _ = fs::remove_file(&self.memory);
    }
}

/// The machine and its guest's console.
pub(crate) struct Guest {
    /// Its monitor.
    pub(crate) session: Session,
}

impl Guest {
    /// Starts a fresh one, without waiting for what its guest says.
    ///
    /// # Errors
    ///
    /// A request is refused.
    pub(crate) fn boot(
        programs: &Programs,
        monitor: &str,
        size: Size,
        track: bool,
        args: &str,
    ) -> io::Result<Self> {
        let mut session = Session::start(programs, monitor, "api")?;
        let boot = json!({
            "kernel_image_path": programs.guest(),
            "boot_args": programs.guest_args(args),
        });
        let machine = json!({
            "vcpu_count": 1, "mem_size_mib": size.mib, "track_dirty_pages": track,
        });
        session.send(("PUT", "/boot-source", boot.to_string()))?;
        session.send(("PUT", "/machine-config", machine.to_string()))?;
        let start = json!({"action_type": "InstanceStart"});
        session.send(("PUT", "/actions", start.to_string()))?;
        Ok(Self { session })
    }

    /// Starts a fresh one whose guest lives on, and waits until it is ready.
    ///
    /// # Errors
    ///
    /// It does not start.
    pub(crate) fn live(
        programs: &Programs,
        monitor: &str,
        size: Size,
        track: bool,
        args: &str,
    ) -> io::Result<Self> {
        let args = format!("bare.do=live bare.touch={} {args}", size.touched());
        let mut guest = Self::boot(programs, monitor, size, track, &args)?;
        guest.line("bare: live ready")?;
        Ok(guest)
    }

    /// Restores one in a process with an API socket called `socket`, and lets it go on. Returns
    /// how long the request took, too.
    ///
    /// # Errors
    ///
    /// It is refused.
    pub(crate) fn restored(
        programs: &Programs,
        monitor: &str,
        socket: &str,
        files: &Files,
    ) -> io::Result<(Self, Instant)> {
        let mut session = Session::start(programs, monitor, socket)?;
        let load = json!({
            "snapshot_path": files.state,
            "mem_backend": {"backend_type": "File", "backend_path": files.memory},
            "resume_vm": true,
        });
        let asked = Instant::now();
        session.send(("PUT", "/snapshot/load", load.to_string()))?;
        Ok((Self { session }, asked))
    }

    /// Reads what the guest says up to the end of a line with `start` in it; what follows it.
    ///
    /// # Errors
    ///
    /// The monitor has ended.
    pub(crate) fn line(&mut self, start: &str) -> io::Result<String> {
        self.session.monitor.line(start)
    }

    /// Waits until the guest says `byte`.
    ///
    /// # Errors
    ///
    /// The monitor has ended.
    pub(crate) fn byte(&mut self, byte: u8) -> io::Result<()> {
        let stdout = self.session.monitor.stdout()?;
        let mut next = [0];
        while next != [byte] {
            stdout.read_exact(&mut next)?;
        }
        Ok(())
    }

    /// Types `command`, and waits for the answer that begins with `word`; the number after `key`.
    ///
    /// # Errors
    ///
    /// There is none.
    pub(crate) fn ask(&mut self, command: u8, word: &str, key: &str) -> io::Result<f64> {
        let line = self.session.monitor.answer(command, word)?;
        let mut words = line.split(' ');
        let value = words.find_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse().ok());
        value.ok_or_else(|| io::Error::other(format!("no `{key}` in {word} {line}")))
    }

    /// Pauses it, or lets it go on.
    ///
    /// # Errors
    ///
    /// It is refused.
    pub(crate) fn set_paused(&mut self, paused: bool) -> io::Result<()> {
        let state = if paused { "Paused" } else { "Resumed" };
        let body = json!({ "state": state }).to_string();
        self.session.send(("PATCH", "/vm", body)).map(drop)
    }

    /// Writes it to `files`; how long the request took.
    ///
    /// # Errors
    ///
    /// It is refused.
    pub(crate) fn create(&mut self, files: &Files, kind: &str) -> io::Result<Duration> {
        self.send_create(&json!({
            "snapshot_type": kind, "snapshot_path": files.state, "mem_file_path": files.memory,
        }))
    }

    /// Writes a diff of it to `files`, most of that while it runs; how long the request took.
    ///
    /// # Errors
    ///
    /// It is refused.
    pub(crate) fn create_pre_copied(&mut self, files: &Files) -> io::Result<Duration> {
        self.send_create(&json!({
            "snapshot_type": "Diff", "snapshot_path": files.state, "mem_file_path": files.memory,
            "pre_copy": true,
        }))
    }

    fn send_create(&mut self, body: &Value) -> io::Result<Duration> {
        let begun = Instant::now();
        self.session
            .send(("PUT", "/snapshot/create", body.to_string()))?;
        Ok(begun.elapsed())
    }
}
