// SPDX-License-Identifier: Apache-2.0
//! `brume snapshot`: has a machine that runs written to files, by its API.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use brume_api::{Client, ClientError, CreateSnapshot, SnapshotType};
use clap::Args;
use serde_json::{Value, json};

use crate::exit::Failure;
use crate::load::{MEMORY_FILE, STATE_FILE};

/// How long it may take to write the memory.
const PATIENCE: Duration = Duration::from_secs(3600);

/// Arguments of `brume snapshot`.
#[derive(Args)]
pub(crate) struct SnapshotArgs {
    /// Unix socket of the machine's API
    #[arg(long, value_name = "PATH", env = "BRUME_API_SOCK")]
    api_sock: PathBuf,
    /// Folder for the files `state` and `memory`, which is made if it is not there
    #[arg(long, value_name = "DIR", required_unless_present = "state")]
    out: Option<PathBuf>,
    /// File for the state
    #[arg(long, value_name = "FILE", conflicts_with = "out", requires = "memory")]
    state: Option<PathBuf>,
    /// File for the memory
    #[arg(long, value_name = "FILE", conflicts_with = "out", requires = "state")]
    memory: Option<PathBuf>,
    /// Write only the pages that were written since the last snapshot; the rest of the file with
    /// the memory are holes
    #[arg(long)]
    diff: bool,
    /// Write most of the memory while the guest runs, to stop it for less time
    #[arg(long)]
    pre_copy: bool,
    /// End the machine afterwards, if all went well. Not with --pre-copy, after which the guest goes
    /// on and writes to its disks
    #[arg(long, conflicts_with = "pre_copy")]
    stop: bool,
}

/// Has the snapshot written; the machine does afterwards what it did before.
///
/// # Errors
///
/// There is no machine behind the socket, or it refuses.
pub(crate) fn run(args: &SnapshotArgs) -> Result<ExitCode, Failure> {
    let (state, memory) = files(args)?;
    let begun = Instant::now();
    let machine = Machine(Client::new(&args.api_sock)?.with_patience(PATIENCE));
    let create = CreateSnapshot {
        snapshot_type: if args.diff {
            SnapshotType::Diff
        } else {
            SnapshotType::Full
        },
        snapshot_path: state.clone(),
        mem_file_path: Some(memory.clone()),
        pre_copy: args.pre_copy,
    };
    machine.snapshot(&create, args.stop)?;
    let text = format!(
        "{} and {} written in {:.2} s",
        state.display(),
        memory.display(),
        begun.elapsed().as_secs_f32()
    );
    writeln!(io::stdout(), "{text}").map_err(Failure::Output)?;
    Ok(ExitCode::SUCCESS)
}

/// Where state and memory go, whatever the machine's own folder is.
fn files(args: &SnapshotArgs) -> Result<(PathBuf, PathBuf), Failure> {
    let (state, memory) = match (&args.out, &args.state, &args.memory) {
        (Some(folder), ..) => {
            fs::create_dir_all(folder).map_err(|source| Failure::Folder {
                path: folder.clone(),
                source,
            })?;
            (folder.join(STATE_FILE), folder.join(MEMORY_FILE))
        }
        (None, Some(state), Some(memory)) => (state.clone(), memory.clone()),
        _ => {
            let text = "where to? Give --out DIR, or --state FILE and --memory FILE";
            return Err(Failure::Arguments(text.into()));
        }
    };
    Ok((absolute(&state)?, absolute(&memory)?))
}

/// The path for a process in another folder.
///
/// # Errors
///
/// The path is empty, or this folder is gone.
pub(crate) fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(|source| Failure::Folder {
        path: path.into(),
        source,
    })
}

/// The machine behind a socket.
struct Machine(Client);

impl Machine {
    fn snapshot(&self, create: &CreateSnapshot, stop: bool) -> Result<(), Failure> {
        let was_running = self.is_running()?;
        if was_running && !create.pre_copy {
            self.set_state("Paused")?;
        }
        let created = self.put_create(create);
        let done = match created {
            Ok(()) if stop => self.set_state("Stopped"),
            // A pre-copied one may go on by itself.
            _ if was_running && !self.is_running()? => self.set_state("Resumed"),
            _ => Ok(()),
        };
        created.and(done)
    }

    fn put_create(&self, create: &CreateSnapshot) -> Result<(), Failure> {
        let body = serde_json::to_string(create).unwrap_or_default();
        self.0.send("PUT", "/snapshot/create", &body)?.success()?;
        Ok(())
    }

    fn set_state(&self, state: &str) -> Result<(), Failure> {
        let body = json!({ "state": state }).to_string();
        self.0.send("PATCH", "/vm", &body)?.success()?;
        Ok(())
    }

    fn is_running(&self) -> Result<bool, Failure> {
        Ok(state_of(&self.0)? == "Running")
    }
}

/// The state of the machine behind `client`, in the words of GET /.
///
/// # Errors
///
/// There is no answer, or one of another form.
pub(crate) fn state_of(client: &Client) -> Result<String, Failure> {
    let reply = client.send("GET", "/", "")?.success()?;
    let instance: Value =
        serde_json::from_str(&reply.body).map_err(|error| ClientError::Body(error.to_string()))?;
    let state = instance.get("state").and_then(Value::as_str);
    Ok(state.unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use brume_api::{Answer, Controller, EventHub, Fault, InstanceInfo, Reply, Request, Server};
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: SnapshotArgs,
    }

    fn parse(arguments: &str) -> Result<SnapshotArgs, clap::Error> {
        let arguments = arguments.split_whitespace();
        let cli = Cli::try_parse_from(["brume", "--api-sock", "s"].into_iter().chain(arguments));
        cli.map(|cli| cli.args)
    }

    #[test]
    fn the_files_are_said_in_one_way() {
        for good in [
            "--out d",
            "--state s --memory m --diff --pre-copy",
            "--out d --stop",
        ] {
            parse(good).unwrap();
        }
        for bad in [
            "",
            "--state s",
            "--memory m",
            "--out d --pre-copy --stop",
            "--out d --state s --memory m",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        let args = parse("--state s --memory /m").unwrap();
        let here = std::env::current_dir().unwrap();
        assert_eq!(files(&args).unwrap(), (here.join("s"), "/m".into()));
    }

    /// A machine that notes what it was asked for.
    #[derive(Clone)]
    struct Fake {
        state: Arc<Mutex<&'static str>>,
        asked: Arc<Mutex<Vec<Request>>>,
        fails: bool,
    }

    impl Controller for Fake {
        fn call(&self, request: Request, reply: Reply) {
            let mut state = self.state.lock().unwrap();
            let new = match &request {
                Request::GetInstance => {
                    return reply.send(Answer::json(&InstanceInfo {
                        app_name: "Firecracker",
                        id: "i".into(),
                        state: *state,
                        vmm_version: "1",
                    }));
                }
                Request::CreateSnapshot(_) if self.fails => None,
                Request::Pause => Some("Paused"),
                Request::Resume => Some("Running"),
                _ => Some(*state),
            };
            self.asked.lock().unwrap().push(request);
            *state = new.unwrap_or(*state);
            reply.send(new.map(|_| Answer::done()).ok_or(Fault::new("No room.")));
        }
    }

    /// What a machine in `state` is asked for, and how it ends.
    fn asked(
        state: &'static str,
        fails: bool,
        create: &CreateSnapshot,
        stop: bool,
    ) -> (Vec<Request>, Result<(), String>) {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let fake = Fake {
            state: Arc::new(Mutex::new(state)),
            asked: Arc::default(),
            fails,
        };
        let _serving = Server::bind(&socket, 1000)
            .unwrap()
            .spawn(Box::new(fake.clone()), EventHub::default(), Arc::default())
            .unwrap();
        let machine = Machine(Client::new(&socket).unwrap());
        let result = machine.snapshot(create, stop);
        let asked = fake.asked.lock().unwrap().clone();
        (asked, result.map_err(|failure| failure.text()))
    }

    #[test]
    fn the_machine_does_afterwards_what_it_did_before() {
        let full = CreateSnapshot {
            snapshot_path: "s".into(),
            mem_file_path: Some("m".into()),
            ..CreateSnapshot::default()
        };
        let create = Request::CreateSnapshot(full.clone());
        let pre_copied = CreateSnapshot {
            pre_copy: true,
            ..full.clone()
        };
        let (pause, resume) = (Request::Pause, Request::Resume);
        for (state, stop, expected) in [
            (
                "Running",
                false,
                vec![pause.clone(), create.clone(), resume.clone()],
            ),
            ("Paused", false, vec![create.clone()]),
            (
                "Running",
                true,
                vec![pause.clone(), create.clone(), Request::Stop],
            ),
            ("Paused", true, vec![create.clone(), Request::Stop]),
        ] {
            assert_eq!(
                asked(state, false, &full, stop),
                (expected, Ok(())),
                "{state}"
            );
        }
        let expected = vec![Request::CreateSnapshot(pre_copied.clone())];
        assert_eq!(
            asked("Running", false, &pre_copied, false),
            (expected, Ok(()))
        );
        // A machine is not ended for files that are not there.
        let failed = (vec![pause, create, resume], Err("No room.".to_owned()));
        assert_eq!(asked("Running", true, &full, true), failed);
    }
}
