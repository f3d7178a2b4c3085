// SPDX-License-Identifier: Apache-2.0
//! Staying with a move until it is over: what a person sees of it, and how they call it off.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use brume_api::{ClientError, MigrationPhase, MigrationStatus};
use brume_vmm::{Ending, StopReason};

use super::report::Report;
use super::{PATH, Seen, text};
use crate::ctl::Ctl;
use crate::exit::{Failure, status_of};
use crate::signals::Signals;

/// How often is asked at first, for moves that are over at once.
const SOON: Duration = Duration::from_millis(20);
/// How long that is.
const AT_FIRST: Duration = Duration::from_secs(1);
/// How often is asked later.
const LATER: Duration = Duration::from_millis(100);
const ERASE: &str = "\r\x1b[K";
/// What a terminal has no room for is cut off: a second line could not be erased.
const NO_WRAP: &str = "\x1b[?7l";
const WRAP: &str = "\x1b[?7h";

/// How following came to its end.
enum Followed {
    /// The move is over.
    Over(Box<Seen>),
    /// Whoever followed does not want to any more.
    Left(libc::c_int),
}

impl Ctl {
    /// Follows the move until it is over, and says what came of it.
    ///
    /// # Errors
    ///
    /// The guest is not at the other side, or nobody can tell.
    pub(super) fn follow(
        &self,
        signals: &Receiver<libc::c_int>,
        report: Option<Report>,
    ) -> Result<ExitCode, Failure> {
        let mut view = View::new(io::stderr(), io::stderr().is_terminal());
        let followed = self.follow_to_end(signals, &mut view);
        view.erase();
        let seen = match followed? {
            Followed::Over(seen) => seen,
            Followed::Left(signal) => {
                view.say("the move goes on: `brume ctl migrate --follow` looks at it again");
                let ending = Ending::Stopped(StopReason::Signal(signal));
                return Ok(status_of(ending, false));
            }
        };
        let completed = seen.status.phase == MigrationPhase::Completed;
        // Whether it can be said or not.
        let reported = report.map(|report| report.finish(&seen.status));
        if completed || self.json {
            self.show_migration(&seen)?;
        }
        reported.transpose()?;
        if completed {
            return Ok(ExitCode::SUCCESS);
        }
        Err(Failure::NotMoved(text::why_not(&seen.status)))
    }

    fn follow_to_end<W: Write>(
        &self,
        signals: &Receiver<libc::c_int>,
        view: &mut View<W>,
    ) -> Result<Followed, Failure> {
        let begun = Instant::now();
        let mut last: Option<MigrationStatus> = None;
        let mut cancelled = false;
        loop {
            let seen = match self.migration() {
                Ok(seen) => Some(seen),
                // It lives: too many others ask.
                Err(ClientError::Refused { .. }) if last.is_some() => None,
                Err(error) => return Err(lost(last.as_ref(), error)),
            };
            if let Some(seen) = seen {
                view.update(&seen.status);
                if seen.status.phase.is_over() {
                    return Ok(Followed::Over(Box::new(seen)));
                }
                last = Some(seen.status);
            }
            let pause = if begun.elapsed() < AT_FIRST {
                SOON
            } else {
                LATER
            };
            match signals.recv_timeout(pause) {
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => thread::sleep(pause),
                Ok(libc::SIGINT) if !cancelled => {
                    cancelled = true;
                    self.call_off(view);
                }
                Ok(signal) => return Ok(Followed::Left(signal)),
            }
        }
    }

    /// Asks the machine to stay. If it is too late for that, the move goes on to its end.
    fn call_off<W: Write>(&self, view: &mut View<W>) {
        let answer = self.client.send("DELETE", PATH, "");
        match answer.and_then(|reply| reply.success().map(drop)) {
            Ok(()) => view.say("asked the machine to stay; Ctrl-C again leaves it alone"),
            Err(error) => view.say(&format!(
                "the move cannot be called off: {}; Ctrl-C again leaves it alone",
                Failure::Client(error).text()
            )),
        }
    }
}

/// The machine's process does not answer any more.
fn lost(last: Option<&MigrationStatus>, error: ClientError) -> Failure {
    let Some(last) = last else {
        return Failure::Client(error);
    };
    Failure::NotMoved(format!(
        "the machine's process has gone ({}): {}",
        Failure::Client(error).text(),
        text::where_if_lost(last)
    ))
}

/// Signals that ask this process to end, one by one.
pub(super) fn watch_signals() -> Result<Receiver<libc::c_int>, Failure> {
    let mut signals = Signals::block_to_wait().map_err(Failure::Host)?;
    let (sender, receiver) = channel();
    let watch = move || {
        while let Ok(signal) = signals.wait() {
            if sender.send(signal).is_err() {
                return;
            }
        }
    };
    let thread = thread::Builder::new().name("signals".into()).spawn(watch);
    thread.map(|_| receiver).map_err(Failure::Host)
}

/// What a person sees: a line for each pass, and below them one that is written anew.
struct View<W: Write> {
    output: W,
    live: bool,
    /// The number of the last pass that was said.
    said: u32,
    phase: MigrationPhase,
}

impl<W: Write> View<W> {
    fn new(output: W, live: bool) -> Self {
        Self {
            output,
            live,
            said: 0,
            phase: MigrationPhase::None,
        }
    }

    fn update(&mut self, status: &MigrationStatus) {
        for pass in &status.passes {
            if pass.pass > self.said {
                self.said = pass.pass;
                self.line(&text::pass(pass));
            }
        }
        if status.phase != self.phase {
            self.phase = status.phase;
            if let Some(help) = text::help(status) {
                self.say(&help);
            }
        }
        if self.live && !status.phase.is_over() {
            let line = text::live(status);
            let _ = write!(self.output, "{ERASE}{NO_WRAP}{line}{WRAP}");
            let _ = self.output.flush();
        }
    }

    /// Says something that stays.
    fn say(&mut self, text: &str) {
        self.line(&format!("brume: {text}"));
    }

    fn line(&mut self, text: &str) {
        self.erase();
        // Nobody may read it, which is no reason to end the move.
        let _ = writeln!(self.output, "{text}");
    }

    fn erase(&mut self) {
        if self.live {
            let _ = write!(self.output, "{ERASE}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use brume_api::{
        Answer, Client, Controller, EventHub, Fault, MigrationPass, MigrationRequest, Reply,
        Request, Server,
    };

    use super::*;

    /// A machine that moves in steps: with each GET, one further; the last stays.
    #[derive(Clone)]
    struct Moving {
        steps: Arc<Mutex<Vec<MigrationStatus>>>,
        cancels: Arc<Mutex<u32>>,
        can_cancel: bool,
    }

    impl Controller for Moving {
        fn call(&self, request: Request, reply: Reply) {
            let mut steps = self.steps.lock().unwrap();
            match request {
                Request::Migration(MigrationRequest::Get) => {
                    reply.send(Answer::json(&steps[0]));
                    if steps.len() > 1 {
                        steps.remove(0);
                    }
                }
                Request::Migration(MigrationRequest::Cancel) => {
                    *self.cancels.lock().unwrap() += 1;
                    if self.can_cancel {
                        *steps = vec![step(MigrationPhase::Cancelled, 1)];
                        return reply.send(Ok(Answer::done()));
                    }
                    reply.send(Err(Fault::new("It is too late.")));
                }
                // As if the process had ended.
                _ => drop(reply),
            }
        }
    }

    fn step(phase: MigrationPhase, passes: u32) -> MigrationStatus {
        MigrationStatus {
            phase,
            pass: passes + 1,
            passes: (1..=passes)
                .map(|pass| MigrationPass {
                    pass,
                    ..MigrationPass::default()
                })
                .collect(),
            ..MigrationStatus::default()
        }
    }

    struct Run {
        result: Result<Followed, String>,
        seen: String,
        cancels: u32,
    }

    fn run(
        steps: &[MigrationStatus],
        can_cancel: bool,
        signals: &[libc::c_int],
        live: bool,
    ) -> Run {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let moving = Moving {
            steps: Arc::new(Mutex::new(steps.to_vec())),
            cancels: Arc::default(),
            can_cancel,
        };
        let _serving = Server::bind(&socket, 1000)
            .unwrap()
            .spawn(
                Box::new(moving.clone()),
                EventHub::default(),
                Arc::default(),
            )
            .unwrap();
        let ctl = Ctl {
            client: Client::new(&socket).unwrap(),
            json: false,
        };
        let (sender, receiver) = channel();
        for &signal in signals {
            sender.send(signal).unwrap();
        }
        let mut view = View::new(Vec::new(), live);
        let result = ctl.follow_to_end(&receiver, &mut view);
        let cancels = *moving.cancels.lock().unwrap();
        Run {
            result: result.map_err(|failure| failure.text()),
            seen: String::from_utf8(view.output).unwrap(),
            cancels,
        }
    }

    fn moved() -> Vec<MigrationStatus> {
        use MigrationPhase as P;
        [
            (P::Connecting, 0),
            (P::PreCopy, 0),
            (P::PreCopy, 1),
            (P::PreCopy, 1),
            (P::SwitchOver, 3),
            (P::Completed, 3),
        ]
        .map(|(phase, passes)| step(phase, passes))
        .into()
    }

    #[test]
    fn each_pass_is_said_once_and_the_last_status_is_that_of_the_end() {
        let run = run(&moved(), true, &[], false);
        let Ok(Followed::Over(seen)) = run.result else {
            panic!("{}", run.seen);
        };
        assert_eq!(seen.status, step(MigrationPhase::Completed, 3));
        assert_eq!(run.seen.lines().count(), 3, "{}", run.seen);
        assert!(run.seen.starts_with("pass 1: "), "{}", run.seen);
        assert!(!run.seen.contains('\r'), "{}", run.seen);
    }

    #[test]
    fn on_a_terminal_one_line_is_written_anew() {
        let run = run(&moved(), true, &[], true);
        assert!(
            run.seen
                .contains(&format!("{ERASE}{NO_WRAP}pre-copy, pass 2"))
        );
        assert_eq!(run.seen.matches('\n').count(), 3, "{:?}", run.seen);
    }

    #[test]
    fn the_first_interrupt_calls_the_move_off_and_the_second_leaves_it() {
        let once = run(&moved(), true, &[libc::SIGINT], false);
        let Ok(Followed::Over(seen)) = once.result else {
            panic!("{}", once.seen);
        };
        assert_eq!(seen.status.phase, MigrationPhase::Cancelled);
        assert_eq!(once.cancels, 1);
        assert!(once.seen.contains("asked the machine to stay"));
        let running = [step(MigrationPhase::PreCopy, 0)];
        let twice = run(&running, false, &[libc::SIGINT, libc::SIGINT], false);
        assert!(matches!(twice.result, Ok(Followed::Left(libc::SIGINT))));
        assert_eq!(twice.cancels, 1);
        assert!(twice.seen.contains("It is too late."), "{}", twice.seen);
        let ended = run(&running, true, &[libc::SIGTERM], false);
        assert!(matches!(ended.result, Ok(Followed::Left(libc::SIGTERM))));
        assert_eq!(ended.cancels, 0);
    }

    #[test]
    fn a_process_that_goes_says_where_to_look_for_the_guest() {
        let gone = || ClientError::Body("gone".into());
        let before = lost(Some(&step(MigrationPhase::PreCopy, 1)), gone()).text();
        assert!(before.contains("the guest ended with it"), "{before}");
        let at = lost(Some(&step(MigrationPhase::SwitchOver, 1)), gone()).text();
        assert!(at.contains("ask the other side"), "{at}");
        assert!(matches!(lost(None, gone()), Failure::Client(_)));
    }
}
