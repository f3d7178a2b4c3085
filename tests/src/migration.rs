// SPDX-License-Identifier: Apache-2.0
//! A machine that moves: the bare guest's step `live` in one process, and another process that
//! waits for it.

use std::fs;
use std::mem;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use brume_api::{MigrationPhase, MigrationStatus, Response};
use serde_json::{Value, json};

use crate::api::{ApiVm, eventually, with};
use crate::host;
use crate::lan::Lan;
use crate::live::{Live, Status};
use crate::proxy::{Address, Proxy};
use crate::runs::{RUNS, Runs, vcpu_time};
use crate::vm::{self, SOON, brume};

/// How often a side is asked how far it is.
const POLL: Duration = Duration::from_millis(2);
/// What a vCPU that is held may still use to say so.
const HELD: Duration = Duration::from_millis(1);
/// The port between two hosts.
const PORT: u16 = 7000;
/// The number of the socket that a process was started with.
const PASSED: i32 = 100;

/// One side of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Where the machine was first.
    Source,
    /// Where it goes to.
    Target,
}

impl Side {
    /// The other one.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Source => Self::Target,
            Self::Target => Self::Source,
        }
    }
}

/// What joins both sides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Link {
    /// A unix socket.
    #[default]
    Unix,
    /// TCP on one host.
    Tcp,
    /// TCP between two hosts on one network.
    TwoHosts,
    /// A socket that both processes were started with.
    Passed,
}

/// How a pair begins. The rest is as usual by `..Setup::default()`.
pub struct Setup<'a> {
    /// Words for the guest, whose step is `live`.
    pub args: &'a str,
    /// What the source is told before it starts: path and body of requests.
    pub parts: &'a [(&'a str, Value)],
    /// What joins both sides.
    pub link: Link,
    /// Whether a [`Proxy`] stands between; not between two hosts.
    pub proxied: bool,
    /// Members of the request to receive, besides where to.
    pub receive: Value,
    /// Whether the target is `brume receive` with these words, instead of a fresh process that is
    /// asked to receive.
    pub command: Option<&'a [&'a str]>,
    /// The target's program, if it is another.
    pub target: Option<PathBuf>,
}

impl Default for Setup<'_> {
    fn default() -> Self {
        Self {
            args: "",
            parts: &[],
            link: Link::default(),
            proxied: false,
            receive: json!({}),
            command: None,
            target: None,
        }
    }
}

/// Both processes. They, their files and their network go when this is dropped.
pub struct Pair {
    source: Live,
    target: Live,
    /// Between both, if that was asked for.
    pub proxy: Option<Proxy>,
    /// The network, if both are hosts of their own. It goes last.
    pub lan: Option<Lan>,
    /// The number of the target's host, if there are two.
    host: usize,
    listen: Address,
    /// How the guest was when it was asked last.
    last: Option<Status>,
}

impl Pair {
    /// Starts a guest with `args` and a process that waits for it on a unix socket.
    ///
    /// # Panics
    ///
    /// A request is refused, or the guest is not ready in time.
    #[track_caller]
    pub fn new(args: &str) -> Self {
        Self::start(&Setup {
            args,
            ..Setup::default()
        })
    }

    /// The same on two hosts.
    ///
    /// # Panics
    ///
    /// As [`Pair::new`], or it is not allowed to make a network.
    #[track_caller]
    pub fn in_two_hosts(args: &str) -> Self {
        Self::start(&Setup {
            args,
            link: Link::TwoHosts,
            ..Setup::default()
        })
    }

    /// Starts both sides: the guest runs, and the target listens.
    ///
    /// # Panics
    ///
    /// As [`Pair::in_two_hosts`].
    #[track_caller]
    pub fn start(setup: &Setup<'_>) -> Self {
        // The last word counts; the rate of the clock is what the guest's times come from.
        let args = format!("{} bare.tsc_khz={}", setup.args, host::tsc_khz());
        Self::start_with(setup, |source| Live::start_in(source, &args, setup.parts))
    }

    /// The same with the machine that `source` makes in a program, in the place of one with the
    /// arguments and parts of `setup`.
    ///
    /// # Panics
    ///
    /// As [`Pair::in_two_hosts`].
    #[track_caller]
    pub fn start_with(setup: &Setup<'_>, source: impl FnOnce(ApiVm) -> Live) -> Self {
        let lan = (setup.link == Link::TwoHosts).then(Lan::new);
        let (near, far) = match setup.link {
            Link::Passed => UnixStream::pair().map(|(near, far)| (Some(near), Some(far))),
            _ => Ok((None, None)),
        }
        .expect("two sockets");
        let program = |command| on_host(lan.as_ref(), 0, passed(command, near));
        let source = source(ApiVm::start_with(brume(), program));
        let folder = source.api.folder().to_owned();
        let host = 1;
        let listen = address(setup.link, &folder, host);
        let (target, listen) = receive(setup, lan.as_ref(), host, &listen, far);
        let proxy = setup.proxied.then(|| Proxy::new(listen.clone(), &folder));
        Self {
            source,
            target: Live { api: target },
            proxy,
            lan,
            host,
            listen,
            last: None,
        }
    }

    /// How the process of one side ends, which it has to do by itself: its status.
    ///
    /// # Panics
    ///
    /// It does not end in time.
    #[track_caller]
    pub fn end_of(&mut self, side: Side) -> i32 {
        self.live(side).api.vm.status(SOON)
    }

    /// One side's process.
    pub fn api(&self, side: Side) -> &ApiVm {
        match side {
            Side::Source => &self.source.api,
            Side::Target => &self.target.api,
        }
    }

    /// The machine on one side. What is typed to one that has none yet, its guest gets later.
    pub fn live(&mut self, side: Side) -> &mut Live {
        match side {
            Side::Source => &mut self.source,
            Side::Target => &mut self.target,
        }
    }

    /// Where the source sends to.
    pub fn destination(&self) -> String {
        let address = self.proxy.as_ref().map(Proxy::address);
        address.unwrap_or(&self.listen).to_string()
    }

    /// Where the target listens, behind what stands between.
    pub fn listens_at(&self) -> &Address {
        &self.listen
    }

    /// Watches from now on that the machine does not run twice.
    pub fn watch_runs(&self) -> Runs {
        let [source, target] = [Side::Source, Side::Target].map(|side| self.api(side).vm.pid());
        Runs::watch(source, target)
    }

    /// Asks the source to send, with the members of `body` besides or instead; the answer.
    ///
    /// # Panics
    ///
    /// `body` is not an object, or there is no answer.
    #[track_caller]
    pub fn try_send(&self, body: &Value) -> Response {
        let body = with(json!({"destination": self.destination()}), body);
        let api = self.api(Side::Source);
        api.send("PUT", "/migration/send", &body.to_string())
    }

    /// The same, which has to be accepted.
    ///
    /// # Panics
    ///
    /// It is not.
    #[track_caller]
    pub fn send(&self, body: &Value) {
        let reply = self.try_send(body);
        assert_eq!((reply.status, &*reply.body), (204, ""), "send {body}");
    }

    /// Changes limits, or whatever else PATCH /migration does.
    ///
    /// # Panics
    ///
    /// It is refused.
    #[track_caller]
    pub fn patch(&self, side: Side, body: &Value) {
        self.api(side).done("PATCH", "/migration", body);
    }

    /// Calls the move off; the answer.
    ///
    /// # Panics
    ///
    /// There is none.
    #[track_caller]
    pub fn cancel(&self, side: Side) -> Response {
        self.api(side).send("DELETE", "/migration", "")
    }

    /// How far one side is.
    ///
    /// # Panics
    ///
    /// It does not say.
    #[track_caller]
    pub fn progress(&self, side: Side) -> MigrationStatus {
        let status = self.api(side).get("/migration");
        serde_json::from_value(status.clone()).unwrap_or_else(|error| panic!("{error}: {status}"))
    }

    /// Waits until one side is in one of `phases`; how far it is then.
    ///
    /// # Panics
    ///
    /// It is not in time, or is over in another way.
    #[track_caller]
    pub fn wait(&self, side: Side, phases: &[MigrationPhase], limit: Duration) -> MigrationStatus {
        self.wait_until(side, limit, |status| phases.contains(&status.phase))
    }

    /// Waits until `condition` holds of one side.
    ///
    /// # Panics
    ///
    /// As [`Pair::wait`].
    #[track_caller]
    pub fn wait_until(
        &self,
        side: Side,
        limit: Duration,
        condition: impl Fn(&MigrationStatus) -> bool,
    ) -> MigrationStatus {
        let begun = Instant::now();
        loop {
            let status = self.progress(side);
            if condition(&status) {
                return status;
            }
            assert!(
                !status.phase.is_over() && begun.elapsed() < limit,
                "{side:?} after {:?}: {status:#?}\nsource's log:\n{}\ntarget's log:\n{}",
                begun.elapsed(),
                self.api(Side::Source).log(),
                self.api(Side::Target).log()
            );
            thread::sleep(POLL);
        }
    }

    /// Sends and waits until both sides say that the machine has moved, and it runs; how it went,
    /// as the source says.
    ///
    /// # Panics
    ///
    /// It goes wrong, or is not over in time.
    #[track_caller]
    pub fn moved(&mut self, body: &Value, limit: Duration) -> MigrationStatus {
        self.send(body);
        let status = self.arrived(limit);
        self.assert_runs_on(Side::Target);
        status
    }

    /// Waits until both sides say that the machine has moved; how it went, as the source says.
    ///
    /// # Panics
    ///
    /// It goes wrong, or is not over in time.
    #[track_caller]
    pub fn arrived(&self, limit: Duration) -> MigrationStatus {
        let done = [MigrationPhase::Completed];
        let status = self.wait(Side::Source, &done, limit);
        self.wait(Side::Target, &done, limit);
        status
    }

    /// Goes on after a move: what was the target is the source, and a new process waits for the
    /// machine, on the other host if there are two. What was the source is ended.
    ///
    /// # Panics
    ///
    /// The new one does not listen.
    #[track_caller]
    pub fn again(&mut self, setup: &Setup<'_>) {
        self.host = 1 - self.host;
        let folder = self.target.api.folder().to_owned();
        let listen = address(setup.link, &folder, self.host);
        let (target, listen) = receive(setup, self.lan.as_ref(), self.host, &listen, None);
        self.listen = listen;
        let source = mem::replace(&mut self.target, Live { api: target });
        self.source = source;
        let proxied = setup.proxied;
        self.proxy = proxied.then(|| Proxy::new(self.listen.clone(), &folder));
    }

    /// Another machine to be sent, in the place of one that is gone.
    pub fn replace_source(&mut self, source: Live) {
        self.source = source;
        self.last = None;
    }

    /// A new process that waits where the last target did, which has ended or is ended now.
    ///
    /// # Panics
    ///
    /// It does not listen.
    #[track_caller]
    pub fn replace_target(&mut self, setup: &Setup<'_>) {
        self.target.api.vm.signal(libc::SIGKILL);
        if let Address::Unix(path) = &self.listen {
            // One that was killed leaves its socket behind.
            let _ = fs::remove_file(path);
        }
        let (target, _) = receive(setup, self.lan.as_ref(), self.host, &self.listen, None);
        self.target = Live { api: target };
    }

    /// The side on which the machine runs.
    ///
    /// # Panics
    ///
    /// It runs on none or on both.
    #[track_caller]
    pub fn runs_on(&self) -> Side {
        let before = self.cpu_times();
        let begun = Instant::now();
        loop {
            thread::sleep(POLL);
            let [source, target] = grown(before, self.cpu_times());
            match (source >= RUNS, target >= RUNS) {
                (true, false) if target < HELD => return Side::Source,
                (false, true) if source < HELD => return Side::Target,
                (false, false) => {}
                _ => panic!("vCPUs ran on both sides, for {source:?} and {target:?}"),
            }
            let late = begun.elapsed() > SOON;
            assert!(!late, "the machine runs nowhere: {source:?}, {target:?}");
        }
    }

    /// Checks that the machine runs on `side` and there alone, that its guest answers there, and
    /// that it has lost nothing since it was asked last; how it is.
    ///
    /// # Panics
    ///
    /// That is not so.
    #[track_caller]
    pub fn assert_runs_on(&mut self, side: Side) -> Status {
        assert_eq!(self.runs_on(), side);
        let now = self.live(side).status();
        if let Some(last) = self.last.replace(now.clone()) {
            let newer = now.tick > last.tick && now.writes >= last.writes;
            assert!(newer, "older than it was: {last:?}, then {now:?}");
        }
        now
    }

    /// Checks that the machine runs on neither side for `time`.
    ///
    /// # Panics
    ///
    /// It does.
    #[track_caller]
    pub fn assert_runs_nowhere(&self, time: Duration) {
        let before = self.cpu_times();
        thread::sleep(time);
        let ran = grown(before, self.cpu_times());
        assert!(ran.iter().all(|&time| time < HELD), "vCPUs ran: {ran:?}");
    }

    /// How long the vCPUs of each side have run. A process that has ended has none.
    fn cpu_times(&self) -> [Duration; 2] {
        [Side::Source, Side::Target].map(|side| vcpu_time(self.api(side).vm.pid()))
    }
}

fn grown(before: [Duration; 2], now: [Duration; 2]) -> [Duration; 2] {
    let [source, target] = before;
    let [source_now, target_now] = now;
    [
        source_now.saturating_sub(source),
        target_now.saturating_sub(target),
    ]
}

/// Starts a process that waits for a machine, on host `number` if there are two; and where it
/// listens, if that was left to the host.
#[track_caller]
fn receive(
    setup: &Setup<'_>,
    lan: Option<&Lan>,
    number: usize,
    listen: &Address,
    socket: Option<UnixStream>,
) -> (ApiVm, Address) {
    let mut program = setup.target.as_ref().map_or_else(brume, Command::new);
    let body = with(json!({"listen": listen.to_string()}), &setup.receive);
    let on_host = |command| on_host(lan, number, passed(command, socket));
    let target = if let Some(words) = setup.command {
        program.args(["receive", "--listen", &listen.to_string()]);
        program.args(words);
        ApiVm::start_command(program, on_host)
    } else {
        let target = ApiVm::start_with(program, on_host);
        target.done("PUT", "/migration/receive", &body);
        target
    };
    eventually("the target listens", || {
        target.get("/migration").get("phase") == Some(&json!("Listening"))
    });
    let listen = match listen {
        Address::Tcp(_) => tcp_address(&target),
        other => other.clone(),
    };
    (target, listen)
}

/// Where a target listens that has not met anybody yet.
#[track_caller]
fn tcp_address(target: &ApiVm) -> Address {
    let status = target.get("/migration");
    let peer = status.get("peer").and_then(Value::as_str);
    let address = peer.and_then(|peer| peer.strip_prefix("tcp:")?.parse().ok());
    Address::Tcp(address.expect("an address"))
}

/// Where the target on host `number` listens; `folder` is for a socket.
fn address(link: Link, folder: &Path, number: usize) -> Address {
    match link {
        Link::Unix => Address::Unix(folder.join("migration.sock")),
        Link::Tcp => Address::Tcp(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0)),
        Link::TwoHosts => {
            let address = Lan::address(number).parse().expect("an address");
            Address::Tcp(SocketAddr::new(address, PORT))
        }
        Link::Passed => Address::Passed(PASSED),
    }
}

/// `command` with a socket of its own, if there is one.
fn passed(mut command: Command, socket: Option<UnixStream>) -> Command {
    if let Some(socket) = socket {
        vm::pass(&mut command, socket.into(), PASSED);
    }
    command
}

/// `command` on a host of its own, if there are two.
fn on_host(lan: Option<&Lan>, number: usize, command: Command) -> Command {
    let host = lan.and_then(|lan| lan.hosts.get(number));
    match host {
        Some(host) => host.wrap(&command),
        None => command,
    }
}
