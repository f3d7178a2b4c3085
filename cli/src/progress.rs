// SPDX-License-Identifier: Apache-2.0
//! The line that shows that a guest is starting, until it says something itself.
//!
//! It is on stderr and only there if that is a terminal.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
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
}

impl Progress {
    /// Shows `text` and how long it has been there, if there is a text and somebody can see it.
    pub(crate) fn show(text: Option<String>, started: Instant) -> Self {
        let line = text
            .filter(|_| io::stderr().is_terminal())
            .map(|text| Line { text, started });
        Self(Arc::new(Mutex::new(line)))
    }

    /// Takes the line away.
    pub(crate) fn end(&self) {
        if self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
            .is_some()
        {
            let _ = io::stderr().write_all(ERASE);
        }
    }

    fn draw(&self) -> bool {
        let line = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Line { text, started }) = &*line else {
            return false;
        };
        let seconds = started.elapsed().as_secs_f32();
        // The erase comes first, so that a shorter line leaves nothing of a longer one.
        let _ = write!(
            io::stderr(),
            "\r\x1b[K{text} … {seconds:.1} s (Ctrl-A x ends it)"
        );
        true
    }

    /// What redraws the line; `None` if nobody can see it.
    pub(crate) fn ticker(&self) -> io::Result<Option<Box<dyn MutEventSubscriber>>> {
        if self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_none()
        {
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
