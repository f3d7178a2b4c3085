// SPDX-License-Identifier: Apache-2.0
//! The line that shows that a guest is starting, until it says something itself.
//!
//! It is on stderr and only there if that is a terminal.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

const TICK: Duration = Duration::from_millis(200);
const ERASE: &[u8] = b"\r\x1b[K";

/// What is on the line; `None` when there is no line (any more).
#[derive(Clone)]
pub(crate) struct Progress(Arc<Mutex<Option<Line>>>);

struct Line {
    text: String,
    started: Instant,
    /// Whether keys go to the guest, and only some of them mean something to us.
    console: bool,
}

impl Progress {
    /// Shows `text` and how long it has been there, if there is a text and somebody can see it.
    pub(crate) fn show(text: Option<String>, started: Instant) -> Self {
        let line = text
            .filter(|_| io::stderr().is_terminal())
            .map(|text| Line {
                text,
                started,
                console: false,
            });
        Self(Arc::new(Mutex::new(line)))
    }

    /// Shows another text, if the line is still there.
    pub(crate) fn change(&self, text: String) {
        if let Some(line) = &mut *self.lock() {
            line.text = text;
        }
    }

    /// Keys go to the guest from now on.
    pub(crate) fn in_console(&self) {
        if let Some(line) = &mut *self.lock() {
            line.console = true;
        }
    }

    /// Takes the line away; `false` if it was not there any more.
    pub(crate) fn end(&self) -> bool {
        let was_there = self.lock().take().is_some();
        if was_there {
            let _ = io::stderr().write_all(ERASE);
        }
        was_there
    }

    fn lock(&self) -> MutexGuard<'_, Option<Line>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Draws the line; `false` if it is not there any more.
    pub(crate) fn draw(&self) -> bool {
        let line = self.lock();
        let Some(line) = &*line else {
            return false;
        };
        let seconds = line.started.elapsed().as_secs_f32();
        let key = if line.console { "Ctrl-A x" } else { "Ctrl-C" };
        // The erase comes first, so that a shorter line leaves nothing of a longer one. What the
        // terminal has no room for is cut off: a second line could not be erased.
        let _ = write!(
            io::stderr(),
            "\r\x1b[K\x1b[?7l{} … {seconds:.1} s ({key} ends it)\x1b[?7h",
            line.text
        );
        true
    }

    /// What redraws the line; `None` if nobody can see it.
    pub(crate) fn ticker(&self) -> io::Result<Option<Box<dyn MutEventSubscriber>>> {
        if self.lock().is_none() {
            return Ok(None);
        }
        let mut timer = TimerFd::new()?;
        timer.reset(TICK, Some(TICK))?;
        Ok(Some(Box::new(Ticker {
            timer,
            progress: self.clone(),
        })))
    }

    /// Stdout for the guest's serial port; the first byte takes the line away.
    pub(crate) fn output(&self) -> io::Result<Box<dyn Write + Send>> {
        let stdout = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        Ok(Box::new(Output {
            stdout,
            progress: Some(self.clone()),
        }))
    }
}

struct Ticker {
    timer: TimerFd,
    progress: Progress,
}

impl MutEventSubscriber for Ticker {
    fn process(&mut self, _events: Events, ops: &mut EventOps<'_>) {
        let _ = self.timer.wait();
        if !self.progress.draw() {
            // The timer is done with; a failure would mean one more tick.
            let _ = ops.remove(Events::new(&self.timer, EventSet::IN));
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.progress.draw();
        // Without its ticks the line stands still, which is no harm.
        let _ = ops.add(Events::new(&self.timer, EventSet::IN));
    }
}

/// Stdout without a buffer: what the guest prints is there at once.
struct Output {
    stdout: File,
    progress: Option<Progress>,
}

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if let Some(progress) = self.progress.take() {
            progress.end();
        }
        self.stdout.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
