// SPDX-License-Identifier: Apache-2.0
//! `brume ctl`: a client of the control API for people and scripts.

mod memory;
mod migrate;

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;

use brume_api::{Client, ClientError};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use self::memory::MemoryCommand;
use self::migrate::MigrateArgs;
use crate::exit::Failure;

/// Arguments of `brume ctl`.
#[derive(Args)]
pub(crate) struct CtlArgs {
    /// Unix socket of the machine's API
    #[arg(long, value_name = "PATH", env = "BRUME_API_SOCK", global = true)]
    api_sock: Option<PathBuf>,
    /// Print the answer as JSON, as it came
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: CtlCommand,
}

#[derive(Subcommand)]
enum CtlCommand {
    /// Show what the machine is and how it does
    Info,
    /// Show the machine's configuration
    Config,
    /// Start a machine that has been configured
    Start,
    /// Hold the vCPUs and stop the devices
    Pause,
    /// Let a paused machine go on
    Resume,
    /// End the machine and its process at once
    Stop,
    /// Press Ctrl+Alt+Del, by which most guests are asked to shut down
    CtrlAltDel,
    /// Show metrics, in the text form of Prometheus
    Metrics,
    /// Write a line to the metrics file now
    FlushMetrics,
    /// Follow what happens to the machine, until it ends
    Events,
    /// Change the file behind a drive, or tell the guest that the file has another size
    Drive {
        /// Id of the drive
        id: String,
        /// The file; the one that it has, to look at its size again
        path: PathBuf,
    },
    /// Which pages of the guest's memory were written, and where they are
    #[command(subcommand)]
    Memory(MemoryCommand),
    /// Move the machine to another process, on this host or on another one, while the guest runs
    ///
    /// The other process is `brume receive`. This command, and then the machine's process here, end
    /// when the guest and its memory are there.
    #[command(after_help = migrate::EXAMPLES)]
    Migrate(Box<MigrateArgs>),
    /// Send any request: METHOD PATH [BODY]
    Request {
        /// GET, PUT, PATCH or DELETE
        #[arg(value_parser = ["GET", "PUT", "PATCH", "DELETE"])]
        method: String,
        /// The path, such as /vm/config
        path: String,
        /// The body, in JSON
        #[arg(default_value = "")]
        body: String,
    },
}

/// Sends what was asked for and prints the answer.
///
/// # Errors
///
/// There is no machine behind the socket, or it refuses.
pub(crate) fn run(args: CtlArgs) -> Result<ExitCode, Failure> {
    let Some(socket) = args.api_sock else {
        let text = "which machine? Give --api-sock PATH, or set BRUME_API_SOCK";
        return Err(Failure::Arguments(text.into()));
    };
    let ctl = Ctl {
        client: Client::new(&socket)?,
        json: args.json,
    };
    ctl.carry_out(args.command)
}

struct Ctl {
    client: Client,
    json: bool,
}

impl Ctl {
    fn carry_out(&self, command: CtlCommand) -> Result<ExitCode, Failure> {
        let done = match command {
            CtlCommand::Info => self.info(),
            CtlCommand::Config => self.print("GET", "/vm/config", None),
            CtlCommand::Start => self.action("InstanceStart"),
            CtlCommand::Pause => self.state("Paused"),
            CtlCommand::Resume => self.state("Resumed"),
            CtlCommand::Stop => self.state("Stopped"),
            CtlCommand::CtrlAltDel => self.action("SendCtrlAltDel"),
            CtlCommand::Metrics => self.print("GET", "/metrics", None),
            CtlCommand::FlushMetrics => self.action("FlushMetrics"),
            CtlCommand::Events => self.events(),
            CtlCommand::Drive { id, path } => {
                let body = json!({"drive_id": id, "path_on_host": path});
                self.print("PATCH", &format!("/drives/{id}"), Some(&body))
            }
            CtlCommand::Memory(command) => self.memory(command),
            // Not every move succeeds.
            CtlCommand::Migrate(args) => return self.migrate(&args),
            CtlCommand::Request { method, path, body } => {
                let reply = self.client.send(&method, &path, &body)?.success()?;
                self.show(&reply.body)
            }
        };
        done.map(|()| ExitCode::SUCCESS)
    }

    fn state(&self, state: &str) -> Result<(), Failure> {
        self.print("PATCH", "/vm", Some(&json!({ "state": state })))
    }

    fn action(&self, action: &str) -> Result<(), Failure> {
        self.print("PUT", "/actions", Some(&json!({ "action_type": action })))
    }

    fn print(&self, method: &str, path: &str, body: Option<&Value>) -> Result<(), Failure> {
        let body = body.map(Value::to_string).unwrap_or_default();
        let reply = self.client.send(method, path, &body)?.success()?;
        self.show(&reply.body)
    }

    /// Prints an answer: JSON in lines for people, as it came for programs.
    fn show(&self, body: &str) -> Result<(), Failure> {
        if body.is_empty() {
            return Ok(());
        }
        match serde_json::from_str::<Value>(body) {
            Ok(value) if !self.json => print(&format!("{value:#}")),
            _ => print(body.trim_end()),
        }
    }

    fn get(&self, path: &str) -> Result<Value, Failure> {
        let reply = self.client.send("GET", path, "")?.success()?;
        serde_json::from_str(&reply.body)
            .map_err(|error| Failure::Client(ClientError::Body(error.to_string())))
    }

    fn info(&self) -> Result<(), Failure> {
        let instance = self.get("/")?;
        let config = self.get("/vm/config")?;
        if self.json {
            let both = json!({ "instance": instance, "config": config });
            return print(&both.to_string());
        }
        print(&table(&instance, &config))
    }

    fn events(&self) -> Result<(), Failure> {
        let mut result = Ok(());
        self.client.stream("/events", |line| {
            let Some(data) = line.strip_prefix("data: ") else {
                return ControlFlow::Continue(());
            };
            result = if self.json {
                print(data)
            } else {
                print(&event_line(data))
            };
            match result {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        })?;
        result
    }
}

/// An event for people: the time of day in UTC, what it is, and what belongs to it.
fn event_line(data: &str) -> String {
    let Ok(Value::Object(mut event)) = serde_json::from_str(data) else {
        return data.to_owned();
    };
    let ms = event.remove("time_ms").and_then(|time| time.as_u64());
    let ms = ms.unwrap_or(0) % 86_400_000;
    let (seconds, ms) = (ms / 1000, ms % 1000);
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    let name = event.remove("event").unwrap_or_default();
    let name = name.as_str().unwrap_or_default().replace('_', " ");
    let mut line = format!(
        "{hours:02}:{minutes:02}:{:02}.{ms:03}  {name}",
        seconds % 60
    );
    for (key, value) in event {
        match value {
            Value::String(text) => line.push_str(&format!("  {key}: {text}")),
            value => line.push_str(&format!("  {key}: {value}")),
        }
    }
    line
}

/// What a machine is, a line for each part.
fn table(instance: &Value, config: &Value) -> String {
    let text = |value: &Value| match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let machine = &config["machine-config"];
    let mut rows = vec![
        ("id".to_owned(), text(&instance["id"])),
        ("state".to_owned(), text(&instance["state"])),
        ("vCPUs".to_owned(), text(&machine["vcpu_count"])),
        (
            "memory".to_owned(),
            format!("{} MiB", text(&machine["mem_size_mib"])),
        ),
        (
            "kernel".to_owned(),
            text(
                config
                    .pointer("/boot-source/kernel_image_path")
                    .unwrap_or(&Value::Null),
            ),
        ),
    ];
    for drive in config["drives"].as_array().into_iter().flatten() {
        let access = if drive["is_read_only"] == true {
            ", read-only"
        } else {
            ""
        };
        rows.push((
            format!("drive {}", text(&drive["drive_id"])),
            format!("{}{access}", text(&drive["path_on_host"])),
        ));
    }
    let interfaces = config["network-interfaces"].as_array();
    for interface in interfaces.into_iter().flatten() {
        let host = match &interface["host_dev_name"] {
            Value::Null => format!("bridge {}", text(&interface["bridge"])),
            name => format!("TAP {}", text(name)),
        };
        rows.push((
            format!("interface {}", text(&interface["iface_id"])),
            format!("{host}, MAC {}", text(&interface["guest_mac"])),
        ));
    }
    aligned(&rows)
}

/// Names and values, a line for each.
fn aligned(rows: &[(String, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let lines = rows
        .iter()
        .map(|(name, value)| format!("{name:width$}  {value}"));
    lines.collect::<Vec<_>>().join("\n")
}

/// Prints a line; whoever does not want it may close the pipe.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    writeln!(io::stdout().lock(), "{text}").map_err(Failure::Output)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line_for_people() {
        let data = r#"{"time_ms": 3723004, "event": "power_off", "device": "eth0"}"#;
        assert_eq!(event_line(data), "01:02:03.004  power off  device: eth0");
        assert_eq!(event_line("none"), "none");
    }

    #[test]
    fn the_table_has_a_line_for_each_device() {
        let config = json!({
            "boot-source": {"kernel_image_path": "/k"},
            "machine-config": {"vcpu_count": 2, "mem_size_mib": 256},
            "drives": [{"drive_id": "root", "path_on_host": "/d", "is_read_only": true}],
            "network-interfaces": [{"iface_id": "eth0", "host_dev_name": "tap0"}],
        });
        let table = table(&json!({"id": "vm", "state": "Running"}), &config);
        let lines: Vec<_> = table.lines().collect();
        assert_eq!(lines.len(), 7);
        assert_eq!(lines[3], "memory          256 MiB");
        assert_eq!(lines[5], "drive root      /d, read-only");
        assert_eq!(lines[6], "interface eth0  TAP tap0, MAC -");
    }
}
