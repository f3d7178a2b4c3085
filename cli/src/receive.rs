// SPDX-License-Identifier: Apache-2.0
//! `brume receive`: waits for a machine that another process sends, and goes on with it, with the
//! terminal as its console.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, Instant};

use brume_api::config::Level;
use brume_api::{
    Answer, Controller, MigrationPhase, MigrationRequest, MigrationStatus, Pending,
    ReceiveMigration, Reply, Request,
};
use brume_vmm::Description;
use clap::Args;
use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use crate::amount;
use crate::args::{DEFAULT_ID, parse_level};
use crate::exit::Failure;
use crate::launch::{Launch, Origin};
use crate::log::{Log, Style};
use crate::overrides::{OverrideArgs, Overrides};
use crate::progress::Progress;
use crate::tls::TlsArgs;

const TICK: Duration = Duration::from_millis(200);

/// Arguments of `brume receive`.
#[derive(Args)]
pub(crate) struct ReceiveArgs {
    /// Where to wait: unix:PATH, tcp:HOST:PORT, or fd:N for a connected socket that this process
    /// was started with
    #[arg(long, value_name = "ADDR")]
    listen: String,
    #[command(flatten)]
    overrides: OverrideArgs,
    /// Note which pages are written from then on, for `brume snapshot --diff`
    #[arg(long)]
    track_dirty_pages: bool,
    /// Leave the machine paused when it is here, for `brume ctl resume`
    #[arg(long, requires = "api_sock")]
    paused: bool,
    #[command(flatten)]
    tls: TlsArgs,
    /// Unix socket of a control API for the machine, which must not exist yet
    #[arg(long, value_name = "PATH")]
    api_sock: Option<PathBuf>,
    /// How much to log on stderr: off, error, warning, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "warning", value_parser = parse_level)]
    log_level: Level,
}

impl ReceiveArgs {
    /// The same in the words of the API.
    fn request(&self) -> Result<ReceiveMigration, Failure> {
        let same = |text: &str| Ok(text.to_owned());
        let Overrides {
            network,
            vsock,
            drives,
        } = self.overrides.named(&same, &same)?;
        let request = ReceiveMigration {
            listen: self.listen.clone(),
            network_overrides: network,
            vsock_override: vsock,
            drive_overrides: drives,
            resume_vm: !self.paused,
            track_dirty_pages: self.track_dirty_pages,
            tls: self.tls.tls(None)?,
        };
        let checked = request.validate();
        checked.map_err(|fault| Failure::Arguments(fault.message))?;
        Ok(request)
    }
}

/// Waits for the machine and runs it to its end.
///
/// # Errors
///
/// Nobody can listen there, the machine cannot be taken over, or it came to a bad end.
pub(crate) fn run(args: &ReceiveArgs, started: Instant) -> Result<ExitCode, Failure> {
    Log {
        style: Style::Plain,
        level: args.log_level,
        module: None,
    }
    .start_on_stderr();
    let request = args.request()?;
    let launch = Launch {
        started,
        progress: Some(waiting(&request.listen)),
        clock: Rc::new(|| None),
        as_firecracker: false,
    };
    let description = Description {
        id: DEFAULT_ID.into(),
        ..Description::default()
    };
    let origin = Origin::Receive(Box::new(request));
    launch.run_with_socket(description, origin, args.api_sock.as_deref())
}

fn waiting(listen: &str) -> String {
    format!("brume: waiting for a machine at {listen}")
}

/// Keeps the line of a [`Progress`] up to date while a machine comes. The owner of the machine is
/// asked as any client would ask it, and answers when it can.
pub(crate) struct Arrival {
    timer: TimerFd,
    controller: Box<dyn Controller>,
    pending: Option<Pending>,
    progress: Progress,
    listen: String,
}

impl Arrival {
    /// Asks `controller` about the machine that was asked for at `listen`.
    ///
    /// # Errors
    ///
    /// The host gives no timer.
    pub(crate) fn watch(
        controller: Box<dyn Controller>,
        progress: Progress,
        listen: &str,
    ) -> io::Result<Self> {
        let mut timer = TimerFd::new()?;
        timer.reset(TICK, Some(TICK))?;
        Ok(Self {
            timer,
            controller,
            pending: None,
            progress,
            listen: listen.into(),
        })
    }

    /// The next answer, if it is there; asks for another one if none is on its way.
    fn ask(&mut self) -> Option<MigrationStatus> {
        let answer = self.pending.as_mut().and_then(Pending::poll);
        if answer.is_some() || self.pending.is_none() {
            let (reply, pending) = Reply::pending();
            self.pending = Some(pending);
            let request = Request::Migration(MigrationRequest::Get);
            self.controller.call(request, reply);
        }
        match answer? {
            Ok(Answer::Json(text)) => serde_json::from_str(&text).ok(),
            _ => None,
        }
    }

    /// Draws what is known; `false` when there is nothing left to show.
    fn draw(&mut self) -> bool {
        let Some(status) = self.ask() else {
            return self.progress.draw();
        };
        if status.phase == MigrationPhase::Completed {
            // Nothing is said any more if the guest was first.
            if self.progress.end() && io::stderr().is_terminal() {
                let _ = writeln!(io::stderr(), "{}", arrived(&status));
            }
            return false;
        }
        self.progress.change(line(&status, &self.listen));
        self.progress.draw()
    }
}

impl MutEventSubscriber for Arrival {
    fn process(&mut self, _events: Events, ops: &mut EventOps<'_>) {
        let _ = self.timer.wait();
        if !self.draw() {
            // The timer is done with; a failure would mean one more tick.
            let _ = ops.remove(Events::new(&self.timer, EventSet::IN));
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if self.draw() {
            // Without its ticks the line stands still, which is no harm.
            let _ = ops.add(Events::new(&self.timer, EventSet::IN));
        }
    }
}

/// What is said while the machine comes.
fn line(status: &MigrationStatus, listen: &str) -> String {
    let peer = status.peer.as_deref().unwrap_or("its source");
    let moved = || {
        format!(
            "{}, {}",
            amount::bytes(status.bytes),
            amount::rate(status.bandwidth)
        )
    };
    match status.phase {
        MigrationPhase::PreCopy => format!(
            "brume: receiving from {peer}: pass {}, {}",
            status.pass,
            moved()
        ),
        MigrationPhase::Connecting | MigrationPhase::Negotiating => {
            format!("brume: receiving from {peer}: agreeing on what moves")
        }
        MigrationPhase::SwitchOver => {
            format!("brume: receiving from {peer}: the guest stands still")
        }
        MigrationPhase::PostCopy => {
            format!(
                "brume: the guest runs here, memory follows from {peer}: {}",
                moved()
            )
        }
        MigrationPhase::PostCopyInterrupted => {
            format!("brume: the connection to {peer} broke before all memory was here")
        }
        MigrationPhase::InDoubt => {
            format!("brume: lost {peer} at the hand-over: the guest stands still")
        }
        MigrationPhase::Cancelled | MigrationPhase::Failed | MigrationPhase::Lost => {
            "brume: no machine is awaited any more: PUT /migration/receive waits again".into()
        }
        MigrationPhase::None | MigrationPhase::Listening | MigrationPhase::Completed => {
            waiting(listen)
        }
    }
}

/// What is said of a machine that is here. How long it stood still the source tells.
fn arrived(status: &MigrationStatus) -> String {
    format!(
        "brume: received from {}: {} in {}",
        status.peer.as_deref().unwrap_or("its source"),
        amount::bytes(status.bytes),
        amount::seconds(status.elapsed_ms),
    )
}

#[cfg(test)]
mod tests {
    use brume_api::{DriveOverride, NetworkOverride, VsockOverride};
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: ReceiveArgs,
    }

    fn request(arguments: &str) -> Result<ReceiveMigration, String> {
        let arguments = arguments.split_whitespace();
        let cli = Cli::try_parse_from(["brume"].into_iter().chain(arguments));
        let cli = cli.map_err(|error| error.to_string())?;
        cli.args.request().map_err(|failure| failure.text())
    }

    #[test]
    fn arguments_become_a_request() {
        let plain = request("--listen tcp:0.0.0.0:4444").unwrap();
        assert_eq!(plain.listen, "tcp:0.0.0.0:4444");
        assert!(plain.resume_vm && !plain.track_dirty_pages);
        assert_eq!(plain.tls, None);
        let full = request(
            "--listen unix:m.sock --net eth0=tap1 --vsock v --disk root=d --paused --api-sock a \
             --track-dirty-pages --tls-ca /ca --tls-cert /cert --tls-key /key",
        )
        .unwrap();
        let expected = ReceiveMigration {
            listen: "unix:m.sock".into(),
            network_overrides: vec![NetworkOverride {
                iface_id: "eth0".into(),
                host_dev_name: "tap1".into(),
            }],
            vsock_override: Some(VsockOverride {
                uds_path: "v".into(),
            }),
            drive_overrides: vec![DriveOverride {
                drive_id: "root".into(),
                path_on_host: "d".into(),
            }],
            resume_vm: false,
            track_dirty_pages: true,
            tls: Some(brume_api::MigrationTls {
                ca: "/ca".into(),
                certificate: "/cert".into(),
                key: "/key".into(),
                server_name: None,
            }),
        };
        assert_eq!(full, expected);
    }

    #[test]
    fn what_cannot_be_is_refused_before_anybody_listens() {
        for (arguments, text) in [
            ("", "--listen"),
            ("--listen here", "`listen` is `here`"),
            ("--listen fd:3 --paused", "--api-sock"),
            ("--listen fd:3 --tls-ca a", "--tls-cert"),
            ("--listen fd:3 --net a=x --net a=y", "--net names `a` twice"),
            ("--listen fd:3 --disk a/b=x", "alphanumeric"),
        ] {
            let refusal = request(arguments).unwrap_err();
            assert!(refusal.contains(text), "{arguments}: {refusal}");
        }
    }

    #[test]
    fn the_line_says_how_far_it_is() {
        let mut status = MigrationStatus {
            phase: MigrationPhase::Listening,
            ..MigrationStatus::default()
        };
        assert_eq!(
            line(&status, "tcp:h:1"),
            "brume: waiting for a machine at tcp:h:1"
        );
        status = MigrationStatus {
            phase: MigrationPhase::PreCopy,
            peer: Some("tcp:host1:55".into()),
            pass: 2,
            bytes: 312 << 20,
            bandwidth: 1_234_567_890,
            ..MigrationStatus::default()
        };
        assert_eq!(
            line(&status, ""),
            "brume: receiving from tcp:host1:55: pass 2, 312.0 MiB, 1.2 GB/s"
        );
        status.elapsed_ms = 3210;
        assert_eq!(
            arrived(&status),
            "brume: received from tcp:host1:55: 312.0 MiB in 3.21 s"
        );
    }
}
