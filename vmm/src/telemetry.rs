// SPDX-License-Identifier: Apache-2.0
//! What a machine tells of itself: events, metrics to read, metrics in a file.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use brume_api::config::{MetricsConfig, VmConfig};
use brume_api::{ApiMetrics, EventHub, SnapshotType};
use thiserror::Error;

use crate::instance::Description;
use crate::lifecycle::VmState;
use crate::metrics::{Counts, Sheet, host_use, json_line};
use crate::migration::Progress;
use crate::mmds;

/// How often metrics are written without being asked for.
pub(crate) const METRICS_PERIOD: Duration = Duration::from_secs(60);

/// Why there are no metrics in a file.
#[derive(Debug, Error)]
pub enum MetricsError {
    /// The file cannot be opened.
    #[error(
        "Metrics error: Cannot initialize the metrics system due to bad user input: {source} ({})",
        path.display()
    )]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is a file already.
    #[error(
        "Metrics error: Cannot initialize the metrics system due to bad user input: \
         Reinitialization of metrics not allowed."
    )]
    Again,
    /// There is none.
    #[error("Metrics are not written: there was no PUT /metrics or --metrics-path.")]
    None,
    /// A line cannot be written.
    #[error("Failed to write metrics: {0}")]
    Write(#[source] io::Error),
}

/// The file that takes metrics, and what it has already.
struct MetricsFile {
    file: Box<dyn Write + Send>,
    config: MetricsConfig,
    last: Sheet,
}

/// What a machine tells of itself.
#[derive(Default)]
pub(crate) struct Telemetry {
    pub(crate) events: EventHub,
    pub(crate) api: Arc<ApiMetrics>,
    /// The machine's state, for whoever cannot ask the owner.
    pub(crate) state: SharedState,
    /// A move to or from another process.
    pub(crate) migration: Progress,
    /// Times that are told and not counted.
    pub(crate) times: Times,
    file: Option<MetricsFile>,
    /// Lines that could not be written.
    missed: u64,
}

/// The state of a machine, as it was told last. Clones are of the same machine.
#[derive(Clone, Default)]
pub(crate) struct SharedState(Arc<AtomicU8>);

impl SharedState {
    const ALL: [VmState; 5] = [
        VmState::NotStarted,
        VmState::Running,
        VmState::Paused,
        VmState::MigratingOut,
        VmState::Stopped,
    ];

    pub(crate) fn get(&self) -> VmState {
        let at = usize::from(self.0.load(Ordering::Acquire));
        Self::ALL.get(at).copied().unwrap_or(VmState::NotStarted)
    }

    pub(crate) fn set(&self, state: VmState) {
        let numbers = (0..).zip(Self::ALL);
        for (number, other) in numbers {
            if other == state {
                self.0.store(number, Ordering::Release);
            }
        }
    }
}

/// How long things took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Times {
    /// From the start of the process to a socket that can be connected to, and the CPU time.
    pub(crate) startup: Option<(Duration, Duration)>,
    /// The last pause.
    pub(crate) pause: Duration,
    /// The last resume.
    pub(crate) resume: Duration,
    /// The last full snapshot.
    pub(crate) full_snapshot: Duration,
    /// The last diff snapshot.
    pub(crate) diff_snapshot: Duration,
    /// How long the guest stood still for the last snapshot that was written while it ran.
    pub(crate) snapshot_pause: Duration,
    /// How long it took until the machine was there, if it was made from a snapshot.
    pub(crate) load_snapshot: Duration,
}

impl Times {
    /// Takes how long a snapshot took.
    pub(crate) fn took_snapshot(&mut self, kind: SnapshotType, time: Duration) {
        match kind {
            SnapshotType::Full => self.full_snapshot = time,
            SnapshotType::Diff => self.diff_snapshot = time,
        }
    }
}

impl Telemetry {
    /// As `config` wants it.
    ///
    /// # Errors
    ///
    /// The file for metrics cannot be opened.
    pub(crate) fn of(config: &VmConfig) -> Result<Self, MetricsError> {
        let events = EventHub::default();
        let mut telemetry = Self {
            migration: Progress::telling(events.clone()),
            events,
            ..Self::default()
        };
        if let Some(metrics) = &config.metrics {
            telemetry.open_file(metrics)?;
        }
        Ok(telemetry)
    }

    /// What was counted so far by the machine that `description` describes, without its devices.
    pub(crate) fn counts(&self, description: &Description, state: VmState) -> Counts {
        Counts {
            state,
            api: self.api.get(),
            times: self.times,
            memory_bytes: description.config.machine_config.memory_bytes(),
            vcpus: Vec::new(),
            drives: Vec::new(),
            interfaces: Vec::new(),
            balloon: None,
            vsock: None,
            entropy: None,
            mmds: mmds::counts(&description.mmds),
            serial: Arc::default(),
            keyboard: Arc::default(),
            host: host_use(),
            migration: self.migration.peek(),
        }
    }

    /// Opens the file that takes metrics.
    ///
    /// # Errors
    ///
    /// It cannot be opened, or there is one already.
    pub(crate) fn open_file(&mut self, config: &MetricsConfig) -> Result<(), MetricsError> {
        if self.file.is_some() {
            return Err(MetricsError::Again);
        }
        let file = open_lines(&config.metrics_path).map_err(|source| MetricsError::Open {
            path: config.metrics_path.clone(),
            source,
        })?;
        self.file = Some(MetricsFile {
            file: Box::new(file),
            config: config.clone(),
            last: Sheet::default(),
        });
        Ok(())
    }

    /// Whether there is a file that takes metrics.
    pub(crate) fn has_file(&self) -> bool {
        self.file.is_some()
    }

    /// Writes a line with what was counted since the last.
    ///
    /// # Errors
    ///
    /// There is no file, or it takes no more.
    pub(crate) fn write(&mut self, id: &str, counts: &Counts) -> Result<(), MetricsError> {
        let Some(MetricsFile { file, config, last }) = &mut self.file else {
            return Err(MetricsError::None);
        };
        let sheet = Sheet::of(counts, self.missed);
        let line = json_line(&sheet, last, config, id);
        match file.write_all(line.as_bytes()) {
            Ok(()) => {
                *last = sheet;
                Ok(())
            }
            Err(error) => {
                self.missed += 1;
                Err(MetricsError::Write(error))
            }
        }
    }

    /// Tells the machine's state.
    pub(crate) fn tell_state(&self, state: VmState) {
        self.state.set(state);
        let state = state.name();
        self.events
            .publish(brume_api::MachineEvent::State { state });
    }
}

/// Opens a file or named pipe to append lines to. A pipe's reader need not have opened it yet, and
/// one that is slow stops nobody: a line that there is no room for is an error.
///
/// # Errors
///
/// It cannot be opened or made.
pub fn open_lines(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        // Opening a pipe for reading too does not wait for a reader.
        .read(true)
        .append(true)
        .create(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
}

/// Measures how long `action` takes.
pub(crate) fn timed<T>(time: &mut Duration, action: impl FnOnce() -> T) -> T {
    let begun = Instant::now();
    let result = action();
    *time = begun.elapsed();
    result
}
