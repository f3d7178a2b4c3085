// SPDX-License-Identifier: Apache-2.0
//! The log: Firecracker's line format for programs, a plain one for people.
//!
//! ```text
//! 2026-01-31T12:00:00.123456789 [my-vm:main:INFO:vmm/src/machine.rs:42] text
//! ```

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use brume_api::config::{Level, Logger};
use brume_vmm::open_lines;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

use crate::exit::Failure;

/// What a line of the log begins with.
pub(crate) enum Style {
    /// The level, as in a message to the person at the terminal.
    Plain,
    /// Time, machine and thread, as Firecracker has it.
    Firecracker {
        /// Name of the machine.
        id: String,
        /// Whether the level is named.
        level: bool,
        /// Whether file and line are named.
        origin: bool,
    },
}

/// The log that a machine writes.
pub(crate) struct Log {
    pub(crate) style: Style,
    pub(crate) level: Level,
    /// Only what comes from modules whose path begins so.
    pub(crate) module: Option<String>,
}

/// A log that is being written, and may be told to go on elsewhere or otherwise.
#[derive(Clone)]
pub(crate) struct RunningLog(Arc<RwLock<Settings>>);

struct Settings {
    log: Log,
    sink: Sink,
}

enum Sink {
    Stdout,
    Stderr,
    File(File),
}

impl Log {
    /// Starts to log to stderr.
    pub(crate) fn start_on_stderr(self) {
        let level = self.level;
        RunningLog::new(self, Sink::Stderr).start(level);
    }

    /// Starts to log to stdout, or to the file or named pipe at `path`.
    ///
    /// # Errors
    ///
    /// It cannot be opened.
    pub(crate) fn start(self, path: Option<&Path>) -> Result<RunningLog, Failure> {
        let sink = path.map_or(Ok(Sink::Stdout), open)?;
        let running = RunningLog::new(self, sink);
        // It may be told to log more later on.
        running.start(Level::Trace);
        Ok(running)
    }
}

fn open(path: &Path) -> Result<Sink, Failure> {
    open_lines(path)
        .map(Sink::File)
        .map_err(|source| Failure::Log {
            path: path.display().to_string(),
            source,
        })
}

impl RunningLog {
    fn new(log: Log, sink: Sink) -> Self {
        Self(Arc::new(RwLock::new(Settings { log, sink })))
    }

    fn start(&self, most: Level) {
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(filter(most))
            .with_writer(self.clone())
            .event_format(Format(self.clone()))
            .finish();
        // It fails only if there is one already, and this is called once.
        let _ = tracing::subscriber::set_global_default(subscriber);
    }

    /// Logs as `logger` says from now on; what it leaves out stays as it is.
    ///
    /// # Errors
    ///
    /// Its file cannot be opened; nothing is changed then.
    pub(crate) fn set(&self, logger: &Logger) -> Result<(), Failure> {
        let sink = logger.log_path.as_deref().map(open).transpose()?;
        let mut settings = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(sink) = sink {
            settings.sink = sink;
        }
        let log = &mut settings.log;
        log.level = logger.level.unwrap_or(log.level);
        if logger.module.is_some() {
            log.module.clone_from(&logger.module);
        }
        if let Style::Firecracker { level, origin, .. } = &mut log.style {
            *level = logger.show_level.unwrap_or(*level);
            *origin = logger.show_log_origin.unwrap_or(*origin);
        }
        Ok(())
    }

    fn settings(&self) -> RwLockReadGuard<'_, Settings> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MakeWriter<'_> for RunningLog {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

impl io::Write for RunningLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A line that nobody takes is lost. An error would be told on stderr, and if that is closed
        // too, it would be a panic.
        let _ = match &self.settings().sink {
            Sink::Stdout => io::stdout().write_all(bytes),
            Sink::Stderr => io::stderr().write_all(bytes),
            Sink::File(file) => (&*file).write_all(bytes),
        };
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn filter(level: Level) -> LevelFilter {
    match level {
        Level::Off => LevelFilter::OFF,
        Level::Error => LevelFilter::ERROR,
        Level::Warning => LevelFilter::WARN,
        Level::Info => LevelFilter::INFO,
        Level::Debug => LevelFilter::DEBUG,
        Level::Trace => LevelFilter::TRACE,
    }
}

struct Format(RunningLog);

impl<S, N> FormatEvent<S, N> for Format
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let metadata = event.metadata();
        let Settings { log, .. } = &*self.0.settings();
        let of_module = |module: &String| metadata.target().starts_with(module.as_str());
        if filter(log.level) < *metadata.level() || !log.module.as_ref().is_none_or(of_module) {
            return Ok(());
        }
        match &log.style {
            Style::Plain => {
                write!(
                    writer,
                    "brume: {}: ",
                    metadata.level().as_str().to_ascii_lowercase()
                )?;
            }
            Style::Firecracker { id, level, origin } => {
                let thread = thread::current();
                write_time(&mut writer)?;
                write!(writer, " [{id}:{}", thread.name().unwrap_or("-"))?;
                if *level {
                    write!(writer, ":{}", metadata.level())?;
                }
                if *origin {
                    let line = metadata.line().unwrap_or(0);
                    write!(writer, ":{}:{line}", metadata.file().unwrap_or("-"))?;
                }
                write!(writer, "] ")?;
            }
        }
        let mut text = Text(String::new());
        event.record(&mut text);
        writeln!(writer, "{}", text.0)
    }
}

/// The message, with other fields after it.
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a string does not fail.
        let _ = match field.name() {
            "message" => write!(self.0, "{value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}

/// Writes the time in UTC with nanoseconds.
fn write_time(writer: &mut Writer<'_>) -> fmt::Result {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let seconds = now.as_secs();
    let (year, month, day) = date_of(seconds / 86_400);
    let [hour, minute, second] = [seconds / 3600 % 24, seconds / 60 % 60, seconds % 60];
    let nanos = now.subsec_nanos();
    write!(
        writer,
        "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}"
    )
}

/// The date that many days after 1970-01-01, by counting in years that begin in March.
fn date_of(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    (era * 400 + year + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_become_dates() {
        assert_eq!(date_of(0), (1970, 1, 1));
        assert_eq!(date_of(59), (1970, 3, 1));
        assert_eq!(date_of(11_016), (2000, 2, 29));
        assert_eq!(date_of(20_454), (2026, 1, 1));
        assert_eq!(date_of(20_453), (2025, 12, 31));
    }
}
