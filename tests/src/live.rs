// SPDX-License-Identifier: Apache-2.0
//! A machine whose guest lives on (the bare guest's step `live`): asked how it is, saved, restored.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::api::{ApiVm, with};
use crate::vm::SOON;

/// What the guest says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Turns of its loop; never less than before.
    pub tick: u64,
    /// Pages that it has written since it was ready; never less than before.
    pub writes: u64,
    /// Its VM generation id in hexadecimal digits.
    pub generation_id: String,
    /// The disruption marker of its VMClock page.
    pub disruption: u64,
    /// The generation counter of its VMClock page.
    pub generation: u64,
    /// Its time-stamp counter.
    pub tsc: u64,
}

impl Status {
    fn parse(line: &str) -> Option<Self> {
        let words: HashMap<_, _> = words(line).collect();
        let number = |key| words.get(key)?.parse().ok();
        Some(Self {
            tick: number("tick")?,
            writes: number("writes")?,
            generation_id: (*words.get("gen")?).to_owned(),
            disruption: number("disruption")?,
            generation: number("generation")?,
            tsc: number("tsc")?,
        })
    }
}

/// How the guest's loop got on since it was asked last, by its own clock and without its answers.
/// The clock's rate is `bare.tsc_khz`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// The longest turn: how long it stood still, in microseconds.
    pub max_us: u64,
    /// The number of the turn that ended it, as [`Status::tick`] counts.
    pub tick: u64,
    /// Turns.
    pub turns: u64,
    /// Pages written.
    pub pages: u64,
    /// How long it was, in microseconds.
    pub us: u64,
}

impl Gap {
    /// Reads what comes after `bare: gap `.
    pub fn parse(line: &str) -> Option<Self> {
        let words: HashMap<_, _> = words(line).collect();
        let number = |key| words.get(key)?.parse().ok();
        Some(Self {
            max_us: number("max_us")?,
            tick: number("tick")?,
            turns: number("turns")?,
            pages: number("pages")?,
            us: number("us")?,
        })
    }

    /// Turns per second while it did not stand still.
    #[allow(clippy::cast_precision_loss, reason = "a rate")]
    pub fn rate(&self) -> f64 {
        self.turns as f64 * 1e6 / self.us.saturating_sub(self.max_us).max(1) as f64
    }
}

/// The `key=value` words of a line.
fn words(line: &str) -> impl Iterator<Item = (&str, &str)> {
    line.split_whitespace()
        .filter_map(|word| word.split_once('='))
}

/// The two files of a snapshot.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// All but the memory.
    pub state: PathBuf,
    /// The memory.
    pub memory: PathBuf,
}

impl Snapshot {
    /// Files called `NAME.state` and `NAME.memory` in `folder`.
    pub fn named(folder: &Path, name: &str) -> Self {
        Self {
            state: folder.join(format!("{name}.state")),
            memory: folder.join(format!("{name}.memory")),
        }
    }

    /// The body of a request to write it, `Full` or `Diff`.
    pub fn create_request(&self, kind: &str) -> Value {
        json!({"snapshot_type": kind, "snapshot_path": self.state, "mem_file_path": self.memory})
    }

    /// The body of a request to load it and go on, with the members of `extra` besides or instead.
    ///
    /// # Panics
    ///
    /// `extra` is not an object.
    pub fn load_request(&self, extra: &Value) -> Value {
        let body = json!({
            "snapshot_path": self.state,
            "mem_backend": {"backend_type": "File", "backend_path": self.memory},
            "resume_vm": true,
        });
        with(body, extra)
    }
}

/// The machine; its process and its files go with it.
pub struct Live {
    /// The program behind its API socket.
    pub api: ApiVm,
}

impl Live {
    /// Starts a fresh machine of the default size, with `args` on the guest's command line and
    /// `parts` set before, and waits until its guest is ready.
    ///
    /// # Panics
    ///
    /// A request is refused, or the guest is not ready in time.
    #[track_caller]
    pub fn start(args: &str, parts: &[(&str, Value)]) -> Self {
        Self::start_in(ApiVm::new(), args, parts)
    }

    /// The same in a program that has been started.
    ///
    /// # Panics
    ///
    /// As [`Live::start`].
    #[track_caller]
    pub fn start_in(api: ApiVm, args: &str, parts: &[(&str, Value)]) -> Self {
        api.start_bare(&format!("bare.do=live {args}"), parts);
        api.vm.wait_for("bare: live ready\n", SOON);
        Self { api }
    }

    /// Restores a machine in a new process. Unless `extra` says otherwise it goes on at once.
    ///
    /// # Panics
    ///
    /// It is refused.
    #[track_caller]
    pub fn restored(snapshot: &Snapshot, extra: &Value) -> Self {
        Self::restored_in(ApiVm::new(), snapshot, extra)
    }

    /// The same in a program that has been started.
    ///
    /// # Panics
    ///
    /// It is refused.
    #[track_caller]
    pub fn restored_in(api: ApiVm, snapshot: &Snapshot, extra: &Value) -> Self {
        api.done("PUT", "/snapshot/load", &snapshot.load_request(extra));
        Self { api }
    }

    /// Types `command` and waits for the answer, which begins with `word`; what follows it.
    ///
    /// # Panics
    ///
    /// There is none in time.
    #[track_caller]
    pub fn ask(&mut self, command: u8, word: &str) -> String {
        let before = self.api.vm.stdout().len();
        self.api.vm.send(&[command]);
        let start = format!("bare: {word} ");
        self.api.vm.line_after(before, &start, SOON)
    }

    /// How the guest is.
    ///
    /// # Panics
    ///
    /// It does not say.
    #[track_caller]
    pub fn status(&mut self) -> Status {
        let line = self.ask(b'?', "alive");
        Status::parse(&line).unwrap_or_else(|| panic!("not a status: {line}"))
    }

    /// How the guest's loop got on since the last call; a machine must not be stopped while it
    /// answers.
    ///
    /// # Panics
    ///
    /// It does not say.
    #[track_caller]
    pub fn gap(&mut self) -> Gap {
        let line = self.ask(b'd', "gap");
        Gap::parse(&line).unwrap_or_else(|| panic!("not a gap: {line}"))
    }

    /// The hash of the guest's area, every page of which is as it should be.
    ///
    /// # Panics
    ///
    /// One is not.
    #[track_caller]
    pub fn hash(&mut self) -> String {
        let line = self.ask(b'h', "hash");
        let hash = line.strip_suffix(" ok");
        hash.unwrap_or_else(|| panic!("the guest's memory: {line}"))
            .to_owned()
    }

    /// Has the guest write so many pages as its area has; how many these are.
    ///
    /// # Panics
    ///
    /// It does not.
    #[track_caller]
    pub fn write_round(&mut self) -> u64 {
        let line = self.ask(b'w', "wrote");
        let count = line.split(' ').next().and_then(|word| word.parse().ok());
        count.unwrap_or_else(|| panic!("not a number of pages: {line}"))
    }

    /// Has the guest fill every fourth page with zeroes; how many these are.
    ///
    /// # Panics
    ///
    /// It does not.
    #[track_caller]
    pub fn zero(&mut self) -> u64 {
        let line = self.ask(b'z', "zeroed");
        line.parse()
            .unwrap_or_else(|_| panic!("not a number of pages: {line}"))
    }

    /// Pauses the machine.
    ///
    /// # Panics
    ///
    /// It is refused.
    #[track_caller]
    pub fn pause(&self) {
        self.api.done("PATCH", "/vm", &json!({"state": "Paused"}));
    }

    /// Lets the machine go on.
    ///
    /// # Panics
    ///
    /// It is refused.
    #[track_caller]
    pub fn resume(&self) {
        self.api.done("PATCH", "/vm", &json!({"state": "Resumed"}));
    }

    /// Writes the machine, which is paused, to `snapshot`, as `Full` or `Diff`.
    ///
    /// # Panics
    ///
    /// It is refused.
    #[track_caller]
    pub fn save(&self, kind: &str, snapshot: &Snapshot) {
        let request = snapshot.create_request(kind);
        self.api.done("PUT", "/snapshot/create", &request);
    }
}
