// SPDX-License-Identifier: Apache-2.0
//! The programs that are measured, and running them on the bare guest.

use std::env;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::iter;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use brume_tests::{host, pty};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Cloud Hypervisor in the table.
pub(crate) const CLOUD_HYPERVISOR: &str = "cloud-hypervisor";
/// QEMU in the table.
pub(crate) const QEMU: &str = "qemu";

/// Memory of every guest that is measured, in MiB.
pub(crate) const MEMORY_MIB: u64 = 128;

/// The programs and the guest.
pub(crate) struct Programs {
    brume: PathBuf,
    firecracker: Option<PathBuf>,
    cloud_hypervisor: Option<PathBuf>,
    qemu: Option<PathBuf>,
    guest: PathBuf,
    /// The bare C program, built here.
    first_byte: PathBuf,
    folder: TempDir,
    tsc_khz: u64,
}

impl Programs {
    /// Finds what there is.
    ///
    /// # Errors
    ///
    /// brume, its guest or a C compiler is missing.
    pub(crate) fn find() -> io::Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let brume =
            env::var_os("BRUME_BIN").map_or(root.join("target/release/brume"), PathBuf::from);
        let guest = root.join("target/guest/bare.elf");
        let peer = |name| env::var_os(name).map(PathBuf::from);
        let [firecracker, cloud_hypervisor, qemu] =
            ["FIRECRACKER", "CLOUD_HYPERVISOR", "QEMU"].map(peer);
        let peers = [&firecracker, &cloud_hypervisor, &qemu];
        let files = peers.into_iter().flatten().chain([&brume, &guest]);
        for file in files {
            if !file.is_file() {
                let text = format!("{} is missing; run `make build bare`", file.display());
                return Err(io::Error::new(io::ErrorKind::NotFound, text));
            }
        }
        // Beside the build, so that the disk is on a real file system.
        let folder = tempfile::tempdir_in(root.join("target"))?;
        let first_byte = folder.path().join("first_byte");
        let source = root.join("tests/baseline/first_byte.c");
        let built = Command::new("cc")
            .arg("-O2")
            .arg("-o")
            .arg(&first_byte)
            .arg(source)
            .status()?;
        if !built.success() {
            return Err(io::Error::other("the bare C program cannot be compiled"));
        }
        let tsc_khz = host::tsc_khz();
        Ok(Self {
            brume,
            firecracker,
            cloud_hypervisor,
            qemu,
            guest,
            first_byte,
            folder,
            tsc_khz,
        })
    }

    /// A folder that goes when the measuring is over.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The monitors to compare.
    pub(crate) fn monitors(&self) -> Vec<&'static str> {
        let mut names = vec!["brume"];
        if self.firecracker.is_some() {
            names.push("firecracker");
        }
        names
    }

    /// Those that can move a machine.
    pub(crate) fn movers(&self) -> Vec<&'static str> {
        let peers = [
            (CLOUD_HYPERVISOR, &self.cloud_hypervisor),
            (QEMU, &self.qemu),
        ];
        let given = peers.into_iter().filter(|(_, path)| path.is_some());
        iter::once("brume")
            .chain(given.map(|(name, _)| name))
            .collect()
    }

    /// QEMU's binary.
    ///
    /// # Errors
    ///
    /// None was given.
    pub(crate) fn qemu(&self) -> io::Result<&Path> {
        let path = self.qemu.as_deref();
        path.ok_or_else(|| io::Error::other("QEMU names no binary"))
    }

    /// A command that runs the bare guest with `args` under the monitor `name`, with the parts of
    /// a configuration in `parts`. "bare C" takes no parts.
    ///
    /// # Errors
    ///
    /// The configuration cannot be written.
    pub(crate) fn command(&self, name: &str, args: &str, parts: &Value) -> io::Result<Command> {
        let args = self.guest_args(args);
        let mut command = match (name, &self.firecracker) {
            ("bare C", _) => {
                let mut command = Command::new(&self.first_byte);
                command.arg(&self.guest).arg(args);
                return Ok(command);
            }
            ("firecracker", Some(path)) => Command::new(path),
            _ => Command::new(&self.brume),
        };
        let mut config = json!({
            "boot-source": {"kernel_image_path": self.guest, "boot_args": args},
            "machine-config": {"vcpu_count": 1, "mem_size_mib": MEMORY_MIB},
            "drives": [],
        });
        if let (Some(config), Some(parts)) = (config.as_object_mut(), parts.as_object()) {
            config.extend(parts.clone());
        }
        let file = self.folder().join(format!("{name}.json"));
        fs::write(&file, config.to_string())?;
        let log = self.folder().join("log");
        fs::write(&log, "")?;
        command
            .args(["--no-api", "--no-seccomp", "--config-file"])
            .arg(file);
        command.arg("--log-path").arg(log);
        Ok(command)
    }

    /// A command that runs the monitor `name` with its API at `socket`.
    ///
    /// # Errors
    ///
    /// The log cannot be made.
    pub(crate) fn api_command(&self, name: &str, socket: &Path) -> io::Result<Command> {
        if let (CLOUD_HYPERVISOR, Some(path)) = (name, &self.cloud_hypervisor) {
            let mut command = Command::new(path);
            command.arg("--api-socket").arg(socket);
            command.args(["--seccomp", "false"]);
            return Ok(command);
        }
        let log = self.folder().join("log");
        fs::write(&log, "")?;
        let program = match (name, &self.firecracker) {
            ("firecracker", Some(path)) => path,
            _ => &self.brume,
        };
        let mut command = Command::new(program);
        command.arg("--api-sock").arg(socket).arg("--no-seccomp");
        command.args(["--level", "Error", "--log-path"]).arg(log);
        Ok(command)
    }

    /// The guest's command line with `args`.
    pub(crate) fn guest_args(&self, args: &str) -> String {
        format!("bare.tsc_khz={} {args}", self.tsc_khz)
    }

    /// The bare guest.
    pub(crate) fn guest(&self) -> &Path {
        &self.guest
    }

    /// Runs a guest to its end and returns the figure after `key` in the line of `step`.
    ///
    /// # Errors
    ///
    /// The program fails, or the guest does not say what it should.
    pub(crate) fn figure(&self, name: &str, args: &str, parts: &Value) -> io::Result<Output> {
        let child = Running::spawn(self.command(name, args, parts)?)?;
        child.finish()
    }
}

/// What a guest has printed.
pub(crate) struct Output(String);

impl Output {
    /// The number after `key=` in the line that begins with `bare: STEP `.
    ///
    /// # Errors
    ///
    /// There is no such line or key.
    pub(crate) fn number(&self, step: &str, key: &str) -> io::Result<f64> {
        let start = format!("bare: {step} ");
        let lines = self.0.lines().filter_map(|line| line.strip_prefix(&start));
        let mut words = lines.flat_map(str::split_whitespace);
        let value = words.find_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse().ok());
        value.ok_or_else(|| io::Error::other(format!("no `{key}` of {step} in:\n{}", self.0)))
    }

    /// Operations a second, after a check that there were no errors.
    ///
    /// # Errors
    ///
    /// The guest met errors, or does not say what it should.
    pub(crate) fn rate(&self, step: &str, key: &str) -> io::Result<f64> {
        Ok(self.number(step, key)? * 1e9 / self.number(step, "ns")?)
    }
}

/// A monitor at work, killed if it is given up.
pub(crate) struct Running {
    child: Child,
    /// Its terminal, if it takes the guest's input from one alone.
    terminal: Option<File>,
}

impl Running {
    /// Starts it with its output captured.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub(crate) fn spawn(command: Command) -> io::Result<Self> {
        Self::spawn_with(command, Stdio::null())
    }

    /// Starts it with its output captured and a pipe to the guest's serial port.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub(crate) fn spawn_typed(command: Command) -> io::Result<Self> {
        Self::spawn_with(command, Stdio::piped())
    }

    fn spawn_with(mut command: Command, stdin: Stdio) -> io::Result<Self> {
        command
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        Ok(Self {
            child: command.spawn()?,
            terminal: None,
        })
    }

    /// The same with a terminal as its input.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub(crate) fn spawn_on_terminal(command: Command) -> io::Result<Self> {
        let (person, terminal) = pty::raw()?;
        let mut running = Self::spawn_with(command, terminal.into())?;
        running.terminal = Some(person);
        Ok(running)
    }

    /// Types `text`.
    ///
    /// # Errors
    ///
    /// It was not started to be typed to, or it has ended.
    pub(crate) fn send(&mut self, text: &[u8]) -> io::Result<()> {
        if let Some(terminal) = &mut self.terminal {
            return terminal.write_all(text);
        }
        let stdin = self.child.stdin.as_mut();
        stdin
            .ok_or_else(|| io::Error::other("there is no input"))?
            .write_all(text)
    }

    /// Its output.
    pub(crate) fn stdout(&mut self) -> io::Result<&mut std::process::ChildStdout> {
        self.child
            .stdout
            .as_mut()
            .ok_or_else(|| io::Error::other("the output is gone"))
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end and returns what it printed.
    ///
    /// # Errors
    ///
    /// It cannot be read or waited for.
    pub(crate) fn finish(mut self) -> io::Result<Output> {
        let text = io::read_to_string(self.stdout()?)?;
        self.child.wait()?;
        Ok(Output(text))
    }

    /// Whether it has ended.
    ///
    /// # Errors
    ///
    /// It cannot be waited for.
    pub(crate) fn has_ended(&mut self) -> io::Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Reads what the guest says up to the end of a line with `start` in it; what follows it.
    ///
    /// # Errors
    ///
    /// The monitor has ended.
    pub(crate) fn line(&mut self, start: &str) -> io::Result<String> {
        let stdout = self.stdout()?;
        let (mut line, mut byte) = (String::new(), [0]);
        loop {
            stdout.read_exact(&mut byte)?;
            match byte {
                [b'\n'] => match line.split_once(start) {
                    Some((_, rest)) => return Ok(rest.trim_end().to_owned()),
                    None => line.clear(),
                },
                [other] => line.push(other.into()),
            }
        }
    }

    /// Types `command`, and waits for the answer that begins with `word`; what follows that.
    ///
    /// # Errors
    ///
    /// There is none.
    pub(crate) fn answer(&mut self, command: u8, word: &str) -> io::Result<String> {
        self.send(&[command])?;
        self.line(&format!("bare: {word} "))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // One that has ended is not killed, only waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
