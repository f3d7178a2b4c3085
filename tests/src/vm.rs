// SPDX-License-Identifier: Apache-2.0
//! Running brume and talking to its guest.
//!
//! This is a module with unsafe code: a child that has to die with its parent, and signals.

#![allow(unsafe_code)]

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::artefacts;

/// Enough for whatever a bare guest does on a busy machine.
pub const SOON: Duration = Duration::from_secs(60);
/// Enough for Linux, whose kernel may run emulated.
pub const LINUX: Duration = Duration::from_secs(400);

/// brume itself.
pub fn brume() -> Command {
    Command::new(artefacts::brume())
}

/// `brume run` with the bare guest, told `args`.
pub fn run_bare(args: &str) -> Command {
    let mut command = brume();
    command.arg("run").arg("--kernel").arg(artefacts::bare());
    command
        .arg("--cmdline")
        .arg(format!("bare.tsc_khz=2000000 {args}"));
    command
}

/// `brume run` with the Linux guest by the kernel `kernel`, told `args`, from its initramfs.
pub fn run_linux(kernel: &Path, args: &str) -> Command {
    let mut command = brume();
    command
        .args(["run", "--memory", "256M", "--kernel"])
        .arg(kernel);
    command.arg("--initrd").arg(artefacts::initramfs());
    command
        .arg("--cmdline")
        .arg(format!("{} quiet {args}", artefacts::linux_args()));
    command
}

/// `program` with the arguments of `command`, for running it inside something else.
pub fn inside(program: &str, args: &[&str], command: &Command) -> Command {
    let mut outer = Command::new(program);
    outer
        .args(args)
        .arg(command.get_program())
        .args(command.get_args());
    outer
}

/// Lets the kernel kill the program if the tests are killed.
pub(crate) fn die_with_us(command: &mut Command) {
    let ask = || {
        // SAFETY: it takes no pointer.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        Ok(())
    };
    // SAFETY: the closure makes one system call and touches no memory.
    unsafe { command.pre_exec(ask) };
}

/// Has the program start with `file` as its descriptor `number`.
pub fn pass(command: &mut Command, file: OwnedFd, number: i32) {
    let give = move || {
        // SAFETY: it takes no pointer.
        match unsafe { libc::dup2(file.as_raw_fd(), number) } {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        }
    };
    // SAFETY: the closure makes one system call and touches no memory.
    unsafe { command.pre_exec(give) };
}

/// What a stream has carried so far.
#[derive(Clone, Default)]
struct Stream(Arc<Shared>);

#[derive(Default)]
struct Shared {
    content: Mutex<Content>,
    changed: Condvar,
}

#[derive(Default)]
struct Content {
    bytes: Vec<u8>,
    ended: bool,
}

impl Stream {
    fn collect(mut source: impl Read + Send + 'static) -> (Self, JoinHandle<()>) {
        let stream = Self::default();
        let shared = stream.clone();
        let thread = thread::spawn(move || {
            let mut chunk = [0; 4096];
            loop {
                let count = source.read(&mut chunk).unwrap_or(0);
                let mut content = shared.lock();
                content
                    .bytes
                    .extend_from_slice(chunk.get(..count).unwrap_or_default());
                content.ended = count == 0;
                shared.0.changed.notify_all();
                if count == 0 {
                    return;
                }
            }
        });
        (stream, thread)
    }

    fn lock(&self) -> MutexGuard<'_, Content> {
        self.0
            .content
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.lock().bytes).into_owned()
    }

    /// Waits until the stream has `text`, it ends, or the time is up; whether it has it.
    fn wait_for(&self, text: &str, time: Duration) -> bool {
        let found = self.find(0, time, |content| content.contains(text).then_some(()));
        found.is_some()
    }

    /// Waits until `find` finds something in what comes after the first `from` bytes, the stream
    /// ends, or the time is up.
    fn find<T>(&self, from: usize, time: Duration, find: impl Fn(&str) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + time;
        let mut content = self.lock();
        loop {
            let bytes = content.bytes.get(from..).unwrap_or_default();
            if let Some(found) = find(&String::from_utf8_lossy(bytes)) {
                return Some(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if content.ended || left.is_zero() {
                return None;
            }
            let waited = self.0.changed.wait_timeout(content, left);
            content = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// How a program ended and what it said.
#[derive(Debug)]
pub struct Outcome {
    /// Its exit status; 128 and the number if a signal ended it.
    pub status: i32,
    /// What it wrote to stdout: the guest's console.
    pub stdout: String,
    /// What it wrote to stderr.
    pub stderr: String,
}

impl Outcome {
    /// The line of stdout that begins with `start`.
    ///
    /// # Panics
    ///
    /// There is none.
    pub fn line(&self, start: &str) -> &str {
        let line = self.stdout.lines().find(|line| line.starts_with(start));
        line.unwrap_or_else(|| panic!("no line begins with `{start}`: {self:#?}"))
    }

    /// Checks that the program ended with status 0 and said nothing on stderr.
    ///
    /// # Panics
    ///
    /// It did not.
    #[track_caller]
    pub fn assert_clean(&self) -> &Self {
        assert!(
            self.status == 0 && self.stderr.is_empty(),
            "not a clean end: {self:#?}"
        );
        self
    }
}

/// A running program, killed when this is dropped.
pub struct Vm {
    child: Child,
    stdout: Stream,
    stderr: Stream,
    /// Whether its end was seen, after which its id may be another's.
    ended: bool,
    readers: Vec<JoinHandle<()>>,
}

impl Vm {
    /// Starts `command` with its stdin open and its output collected.
    ///
    /// # Panics
    ///
    /// It cannot be started.
    pub fn spawn(mut command: Command) -> Self {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        die_with_us(&mut command);
        let mut child = command
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let (stdout, out) = Stream::collect(child.stdout.take().expect("stdout"));
        let (stderr, err) = Stream::collect(child.stderr.take().expect("stderr"));
        Self {
            child,
            stdout,
            stderr,
            ended: false,
            readers: vec![out, err],
        }
    }

    /// Waits for `text` on stdout.
    ///
    /// # Panics
    ///
    /// It does not come in time.
    #[track_caller]
    pub fn wait_for(&self, text: &str, time: Duration) {
        if !self.stdout.wait_for(text, time) {
            let (out, err) = (self.stdout.text(), self.stderr.text());
            panic!("`{text}` did not come; stdout:\n{out}\nstderr:\n{err}");
        }
    }

    /// Waits for a whole line with `start` in it on stdout after its first `from` bytes; the rest
    /// of the line after `start`.
    ///
    /// # Panics
    ///
    /// It does not come in time.
    #[track_caller]
    pub fn line_after(&self, from: usize, start: &str, time: Duration) -> String {
        let line = self.stdout.find(from, time, |text| {
            let rest = text.split_once(start)?.1;
            Some(rest.split_once('\n')?.0.trim_end().to_owned())
        });
        line.unwrap_or_else(|| {
            let (out, err) = (self.stdout.text(), self.stderr.text());
            panic!("no line with `{start}` came; stdout:\n{out}\nstderr:\n{err}")
        })
    }

    /// What has come on stdout so far.
    pub fn stdout(&self) -> String {
        self.stdout.text()
    }

    /// What has come on stderr so far.
    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// Types `text` on the console.
    ///
    /// # Panics
    ///
    /// The program does not read it.
    pub fn send(&mut self, text: &[u8]) {
        self.child
            .stdin
            .as_mut()
            .expect("stdin")
            .write_all(text)
            .expect("typing");
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Memory that the whole process has, in MiB.
    ///
    /// # Panics
    ///
    /// It has ended.
    pub fn resident_mib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()));
        let status = status.expect("a process");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
        let kib: u64 = kib.expect("a size").parse().expect("a number");
        kib >> 10
    }

    /// Sends it a signal, if it was not seen to end.
    pub fn signal(&self, signal: i32) {
        if self.ended {
            return;
        }
        // SAFETY: it takes no pointer; the child has not been waited for, so the id is its own.
        unsafe { libc::kill(self.pid(), signal) };
    }

    /// Waits for its end; its exit status, 128 and the number if a signal ended it.
    ///
    /// # Panics
    ///
    /// It does not end in time.
    #[track_caller]
    pub fn status(&mut self, time: Duration) -> i32 {
        let deadline = Instant::now() + time;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("waiting") {
                self.ended = true;
                break status;
            }
            if Instant::now() > deadline {
                let (out, err) = (self.stdout.text(), self.stderr.text());
                panic!("it does not end; stdout:\n{out}\nstderr:\n{err}");
            }
            thread::sleep(Duration::from_millis(5));
        };
        status
            .code()
            .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
    }

    /// Waits for its end.
    ///
    /// # Panics
    ///
    /// It does not end in time.
    #[track_caller]
    pub fn wait(mut self, time: Duration) -> Outcome {
        let status = self.status(time);
        for reader in self.readers.drain(..) {
            reader.join().expect("a reader");
        }
        Outcome {
            status,
            stdout: self.stdout.text().replace('\r', ""),
            stderr: self.stderr.text(),
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // One that has ended is not killed, only waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs `command` to its end.
///
/// # Panics
///
/// It cannot be started or does not end in time.
#[track_caller]
pub fn outcome(command: Command, time: Duration) -> Outcome {
    Vm::spawn(command).wait(time)
}

/// What `program` prints on stdout.
///
/// # Panics
///
/// It cannot be started.
pub fn output_of(program: impl AsRef<OsStr>, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .output()
        .expect("a helper program");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
