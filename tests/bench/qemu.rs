// SPDX-License-Identifier: Apache-2.0
//! QEMU's machine `microvm` with the bare guest, driven over QMP (qemu-qmp-ref(7)).

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::program::{Programs, Running};

/// Until it takes commands, and until it answers one.
const SOON: Duration = Duration::from_secs(60);

/// A machine; it ends with this.
pub(crate) struct Qemu {
    /// Its process, and the guest's console.
    pub(crate) monitor: Running,
    commands: BufReader<UnixStream>,
}

impl Qemu {
    /// Starts one with so much memory whose guest is told `args`. As `incoming` it waits for what
    /// its guest is to be.
    ///
    /// # Errors
    ///
    /// It does not start.
    pub(crate) fn start(
        programs: &Programs,
        name: &str,
        mib: u64,
        args: &str,
        incoming: bool,
    ) -> io::Result<Self> {
        let socket = programs.folder().join(format!("{name}.qmp"));
        let _ = fs::remove_file(&socket);
        let mut command = Command::new(programs.qemu()?);
        command.args([
            "-M",
            "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=on",
        ]);
        command.args(["-accel", "kvm", "-cpu", "host", "-smp", "1", "-nodefaults"]);
        command.args(["-no-user-config", "-display", "none", "-serial", "stdio"]);
        command.args(["-m", &format!("{mib}M"), "-qmp"]);
        command.arg(format!("unix:{},server=on,wait=off", socket.display()));
        command.arg("-kernel").arg(programs.guest());
        command.args(["-append", &programs.guest_args(args)]);
        if incoming {
            command.args(["-incoming", "defer"]);
        }
        let monitor = Running::spawn_typed(command)?;
        let begun = Instant::now();
        let stream = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(error) if begun.elapsed() > SOON => return Err(error),
                Err(_) => std::hint::spin_loop(),
            }
        };
        stream.set_read_timeout(Some(SOON))?;
        let mut qemu = Self {
            monitor,
            commands: BufReader::new(stream),
        };
        qemu.read()?;
        qemu.ask("qmp_capabilities", &json!({}))?;
        Ok(qemu)
    }

    /// Carries out a command; what it returns.
    ///
    /// # Errors
    ///
    /// It is refused: then the kind is [`io::ErrorKind::InvalidInput`].
    pub(crate) fn ask(&mut self, command: &str, arguments: &Value) -> io::Result<Value> {
        let text = json!({"execute": command, "arguments": arguments}).to_string();
        self.commands.get_mut().write_all(text.as_bytes())?;
        loop {
            let answer = self.read()?;
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = answer.get("error") {
                let text = format!("{command}: {error}");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
            // Whatever else comes is an event.
        }
    }

    fn read(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        if self.commands.read_line(&mut line)? == 0 {
            return Err(io::Error::other("QEMU has ended"));
        }
        Ok(serde_json::from_str(&line)?)
    }
}
