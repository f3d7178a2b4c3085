// SPDX-License-Identifier: Apache-2.0
//! A machine with an API socket, and a client of it.

use std::ffi::OsStr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use brume_api::{Client, Response};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::artefacts;
use crate::vm::{SOON, Vm, brume};

/// What the API socket is called.
const SOCKET: &str = "api.sock";

/// The program behind an API socket; its socket and its files go with it.
pub struct ApiVm {
    /// The program.
    pub vm: Vm,
    /// Where it takes requests.
    pub socket: PathBuf,
    // The last to go: the program uses what is in it.
    folder: TempDir,
}

impl ApiVm {
    /// Starts brume and waits until it takes requests.
    ///
    /// # Panics
    ///
    /// It does not.
    pub fn new() -> Self {
        Self::start_with(brume(), |command| command)
    }

    /// Starts `program`, brume or Firecracker, as `wrap` says how.
    ///
    /// # Panics
    ///
    /// It does not take requests.
    pub fn start_with(program: Command, wrap: impl FnOnce(Command) -> Command) -> Self {
        Self::start_in(|folder| {
            let log = folder.join("log");
            // Firecracker wants it to be there.
            std::fs::write(&log, "").expect("a log");
            let mut command = program;
            command
                .args(["--id", "vm", "--api-sock"])
                .arg(folder.join(SOCKET));
            // On stdout it would be between the guest's words.
            command.arg("--log-path").arg(log);
            wrap(command)
        })
    }

    /// Starts a command of brume's that has an API besides and logs on stderr, as `wrap` says how.
    ///
    /// # Panics
    ///
    /// It does not take requests.
    pub fn start_command(command: Command, wrap: impl FnOnce(Command) -> Command) -> Self {
        Self::start_in(|folder| {
            let mut command = command;
            command.arg("--api-sock").arg(folder.join(SOCKET));
            wrap(command)
        })
    }

    /// Starts what `command` makes of a new folder, and waits for the socket in it.
    fn start_in(command: impl FnOnce(&Path) -> Command) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join(SOCKET);
        let vm = Vm::spawn(command(folder.path()));
        eventually("the API socket is there", || {
            UnixStream::connect(&socket).is_ok()
        });
        Self { vm, socket, folder }
    }

    /// A place for the machine's files.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// What the program logged, to its file or on stderr.
    pub fn log(&self) -> String {
        let log = std::fs::read_to_string(self.folder().join("log"));
        log.unwrap_or_else(|_| self.vm.stderr())
    }

    /// A connection for what [`Client`] would never send. It gives up after a while.
    ///
    /// # Panics
    ///
    /// There is none to be had.
    pub fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).expect("a connection");
        stream.set_read_timeout(Some(SOON)).expect("a limit");
        stream.set_write_timeout(Some(SOON)).expect("a limit");
        stream
    }

    /// Sends a request.
    ///
    /// # Panics
    ///
    /// There is no answer.
    #[track_caller]
    pub fn send(&self, method: &str, path: &str, body: &str) -> Response {
        // A new one each time: it keeps its connection for as long as it lives, and there are few.
        let client = Client::new(&self.socket).expect("a client");
        let reply = client.send(method, path, body);
        reply.unwrap_or_else(|error| {
            let why = brume_api::with_causes(&error);
            panic!("{method} {path}: {why}; the log:\n{}", self.log())
        })
    }

    /// Sends a request that has to be carried out, without an answer.
    ///
    /// # Panics
    ///
    /// It is not.
    #[track_caller]
    pub fn done(&self, method: &str, path: &str, body: &Value) {
        let reply = self.send(method, path, &body.to_string());
        assert_eq!(
            (reply.status, &*reply.body),
            (204, ""),
            "{method} {path} {body}"
        );
    }

    /// Gets a JSON value.
    ///
    /// # Panics
    ///
    /// There is none.
    #[track_caller]
    pub fn get(&self, path: &str) -> Value {
        let reply = self.send("GET", path, "");
        assert_eq!(reply.status, 200, "{path}: {}", reply.body);
        serde_json::from_str(&reply.body).expect("JSON")
    }

    /// Starts a machine of the bare guest, told `args`, with these parts besides.
    ///
    /// # Panics
    ///
    /// A request is refused.
    #[track_caller]
    pub fn start_bare(&self, args: &str, parts: &[(&str, Value)]) {
        let boot_args = format!("bare.tsc_khz=2000000 {args}");
        let boot = json!({"kernel_image_path": artefacts::bare(), "boot_args": boot_args});
        self.done("PUT", "/boot-source", &boot);
        for (path, body) in parts {
            self.done("PUT", path, body);
        }
        self.done("PUT", "/actions", &json!({"action_type": "InstanceStart"}));
    }

    /// `brume ctl` for this machine.
    pub fn ctl<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = brume();
        command.arg("ctl").arg("--api-sock").arg(&self.socket);
        command.args(args);
        command
    }

    /// Checks that the machine is in `state` and answers, as one that waits for something does not.
    ///
    /// # Panics
    ///
    /// It is not, or does not.
    #[track_caller]
    pub fn assert_alive(&self, state: &str) {
        let begun = Instant::now();
        assert_eq!(self.get("/").get("state"), Some(&Value::from(state)));
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(10), "GET / took {took:?}");
    }
}

impl Default for ApiVm {
    fn default() -> Self {
        Self::new()
    }
}

/// Waits until `condition` holds.
///
/// # Panics
///
/// It does not in time.
#[track_caller]
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < SOON, "not so: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// `body` with the members of `more` besides or instead.
///
/// # Panics
///
/// `more` is not an object.
#[must_use]
pub fn with(mut body: Value, more: &Value) -> Value {
    if let Some(body) = body.as_object_mut() {
        body.extend(more.as_object().expect("an object").clone());
    }
    body
}
