// SPDX-License-Identifier: Apache-2.0
//! The processes of the clones: from the start of each to the end of all.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use brume_api::{Client, ClientError};

use super::plan::Plan;
use crate::exit::Failure;
use crate::signals::terminate;
use crate::snapshot::state_of;

/// How long a process may take until its socket is there.
const SOCKET_PATIENCE: Duration = Duration::from_secs(20);
/// How long the load of a snapshot may take, with all of its memory.
const LOAD_PATIENCE: Duration = Duration::from_secs(3600);
/// How long a process that was asked to end may take.
const END_PATIENCE: Duration = Duration::from_secs(5);
/// How long after its last word a process may take to end.
const LAST_WORDS_PATIENCE: Duration = Duration::from_millis(500);
/// How often to look again.
const PAUSE: Duration = Duration::from_millis(1);
/// The most that is read of what a process said before it ended, in bytes.
const LAST_WORDS: u64 = 4096;

/// A clone that answers.
#[derive(Clone, Debug)]
pub(super) struct Started {
    pub(super) number: u32,
    pub(super) pid: u32,
    pub(super) state: String,
    pub(super) socket: PathBuf,
}

/// All clones.
pub(super) struct Fleet {
    members: Vec<Member>,
    /// The next one to start.
    next: AtomicUsize,
    stopping: AtomicBool,
}

struct Member {
    plan: Plan,
    /// Its process, for as long as that was not seen to end.
    process: Mutex<Option<Child>>,
}

impl Fleet {
    pub(super) fn new(plans: Vec<Plan>) -> Self {
        let member = |plan| Member {
            plan,
            process: Mutex::new(None),
        };
        Self {
            members: plans.into_iter().map(member).collect(),
            next: AtomicUsize::new(0),
            stopping: AtomicBool::new(false),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether no process is left.
    pub(super) fn is_empty(&self) -> bool {
        self.members.iter().all(|member| member.process().is_none())
    }

    /// Starts the next clone and waits until it answers; `None` if there is none left to start.
    pub(super) fn start_next(&self) -> Option<Result<Started, Failure>> {
        if self.stopping.load(Ordering::SeqCst) {
            return None;
        }
        let member = self.members.get(self.next.fetch_add(1, Ordering::SeqCst))?;
        Some(
            member
                .start(&self.stopping)
                .map_err(|source| Failure::Clone {
                    number: member.plan.number,
                    source: Box::new(source),
                }),
        )
    }

    /// Has all that are there end, and no more be started.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        for member in &self.members {
            member
                .process()
                .as_ref()
                .inspect(|process| terminate(process));
        }
    }

    /// Looks which have ended since the last time, and cleans up behind them.
    pub(super) fn reap(&self) -> Vec<(u32, ExitStatus)> {
        let ended = |member: &Member| Some((member.plan.number, member.reap()?));
        self.members.iter().filter_map(ended).collect()
    }

    /// Ends all and waits for it; one that does not end in time is killed.
    pub(super) fn end(&self) {
        self.stop();
        let deadline = Instant::now() + END_PATIENCE;
        loop {
            self.reap();
            if self.is_empty() {
                return;
            }
            if Instant::now() > deadline {
                break;
            }
            thread::sleep(PAUSE);
        }
        for member in &self.members {
            if let Some(process) = member.process().as_mut() {
                let _ = process.kill();
                let _ = process.wait();
            }
            member.reap();
        }
    }
}

impl Member {
    fn process(&self) -> MutexGuard<'_, Option<Child>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The status of a process that has ended now; its sockets are removed.
    fn reap(&self) -> Option<ExitStatus> {
        let mut process = self.process();
        let status = process.as_mut()?.try_wait().ok()??;
        *process = None;
        for path in self.plan.sockets() {
            // It may never have been made.
            let _ = fs::remove_file(path);
        }
        Some(status)
    }

    fn start(&self, stopping: &AtomicBool) -> Result<Started, Failure> {
        let plan = &self.plan;
        let mut process = spawn(plan)?;
        let pid = process.id();
        let mut last_words = process.stderr.take();
        *self.process() = Some(process);
        if stopping.load(Ordering::SeqCst) {
            // Whoever ended the others may not have seen this one.
            self.process()
                .as_ref()
                .inspect(|process| terminate(process));
        }
        let result = self.load();
        let state = match result {
            Ok(state) => state,
            Err(failure @ Failure::Client(ClientError::Refused { .. })) => return Err(failure),
            Err(failure) => {
                let ended = self.wait_for_end();
                return Err(ended.map_or(failure, |status| {
                    let said = last_words.as_mut().map(text_of).unwrap_or_default();
                    ended_with(status, &said, plan.log.as_deref())
                }));
            }
        };
        Ok(Started {
            number: plan.number,
            pid,
            state,
            socket: plan.socket.clone(),
        })
    }

    /// The status of a process that does not answer, if it is because it ends.
    fn wait_for_end(&self) -> Option<ExitStatus> {
        let deadline = Instant::now() + LAST_WORDS_PATIENCE;
        loop {
            let status = self.reap();
            if status.is_some() || Instant::now() > deadline {
                return status;
            }
            thread::sleep(PAUSE);
        }
    }

    /// Has the process load the snapshot, as soon as it listens; its state afterwards.
    fn load(&self) -> Result<String, Failure> {
        self.wait_for_socket()?;
        let client = Client::new(&self.plan.socket)?.with_patience(LOAD_PATIENCE);
        let body = serde_json::to_string(&self.plan.load);
        let body = body.map_err(|error| Failure::Host(error.into()))?;
        client.send("PUT", "/snapshot/load", &body)?.success()?;
        state_of(&client)
    }

    fn wait_for_socket(&self) -> Result<(), Failure> {
        let deadline = Instant::now() + SOCKET_PATIENCE;
        loop {
            let Err(error) = UnixStream::connect(&self.plan.socket) else {
                return Ok(());
            };
            let ended = match self.process().as_mut() {
                Some(process) => process.try_wait().map_err(Failure::Host)?.is_some(),
                None => true,
            };
            if ended || Instant::now() > deadline {
                return Err(Failure::Host(error));
            }
            thread::sleep(PAUSE);
        }
    }
}

/// This program once more, with an API and nothing else.
fn spawn(plan: &Plan) -> Result<Child, Failure> {
    let mut socket = OsString::from("--api-sock=");
    socket.push(&plan.socket);
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("brume")
        .arg(socket)
        .args(["--id", &format!("clone-{}", plan.number)])
        .args(["--level", "Warning"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        // What the terminal sends to this process is not for it.
        .process_group(0);
    if let Some(path) = &plan.log {
        let opened = File::create(path).and_then(|log| Ok((log.try_clone()?, log)));
        let (out, err) = opened.map_err(|source| Failure::Folder {
            path: path.clone(),
            source,
        })?;
        command.stdout(out).stderr(err);
    }
    command.spawn().map_err(Failure::Host)
}

/// What a process that has ended said.
fn text_of(said: &mut impl Read) -> String {
    let mut text = Vec::new();
    // Less is told if it cannot be read.
    let _ = said.take(LAST_WORDS).read_to_end(&mut text);
    String::from_utf8_lossy(&text).into_owned()
}

/// How a process ended, in its own words if there are any.
fn ended_with(status: ExitStatus, said: &str, log: Option<&Path>) -> Failure {
    let said = said.lines().rfind(|line| !line.trim().is_empty());
    let how = match (said, log) {
        (Some(line), _) => format!("with `{}`", line.trim()),
        (None, Some(log)) => format!("with {status}: {} says more", log.display()),
        (None, None) => format!("with {status}"),
    };
    Failure::Ended { how }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use brume_api::LoadSnapshot;

    use super::*;

    #[test]
    fn the_last_line_says_how_it_ended() {
        let status = ExitStatus::from_raw(1 << 8);
        let text = |said, log| ended_with(status, said, log).text();
        assert_eq!(
            text("brume: a\nbrume: b\n\n", None),
            "it ended with `brume: b`"
        );
        assert_eq!(text(" ", None), "it ended with exit status: 1");
        let log = Some(Path::new("vm1.log"));
        assert_eq!(
            text("", log),
            "it ended with exit status: 1: vm1.log says more"
        );
    }

    /// A fleet whose processes wait for a signal.
    fn asleep(folder: &Path, count: u32) -> Fleet {
        let fleet = Fleet::new(
            (0..count)
                .map(|number| Plan {
                    number,
                    socket: folder.join(number.to_string()),
                    log: None,
                    load: LoadSnapshot::default(),
                })
                .collect(),
        );
        for member in &fleet.members {
            fs::write(&member.plan.socket, "").unwrap();
            // Nobody is to wait for one that a failed test leaves behind.
            let process = Command::new("sleep")
                .arg("20")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn();
            *member.process() = Some(process.unwrap());
        }
        fleet
    }

    #[test]
    fn the_end_of_all_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let fleet = asleep(folder.path(), 3);
        assert!(fleet.reap().is_empty() && !fleet.is_empty());
        let begun = Instant::now();
        fleet.end();
        assert!(fleet.is_empty() && begun.elapsed() < END_PATIENCE);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        assert!(fleet.start_next().is_none());
    }

    #[test]
    fn one_that_ends_is_told_once_and_cleaned_up_behind() {
        let folder = tempfile::tempdir().unwrap();
        let fleet = asleep(folder.path(), 2);
        fleet.members[1].process().as_mut().unwrap().kill().unwrap();
        let ended = loop {
            let ended = fleet.reap();
            if !ended.is_empty() {
                break ended;
            }
            thread::sleep(PAUSE);
        };
        assert_eq!(
            (ended.len(), ended[0].0, ended[0].1.signal()),
            (1, 1, Some(9))
        );
        assert!(fleet.reap().is_empty() && !fleet.is_empty());
        let left: Vec<_> = fs::read_dir(folder.path()).unwrap().collect();
        assert_eq!(left.len(), 1);
        fleet.end();
    }
}
