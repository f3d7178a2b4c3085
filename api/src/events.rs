// SPDX-License-Identifier: Apache-2.0
//! The machine's life as a stream of events, for whoever wants to watch.

use std::fmt::Write;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{SystemTime, UNIX_EPOCH};

use hyper::body::{Body, Bytes, Frame};
use serde::Serialize;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use utoipa::ToSchema;

use crate::migration::{MigrationPass, MigrationPhase, MigrationRole};
use crate::snapshot::SnapshotType;

/// How many events a client may be behind before it is left alone.
const BACKLOG: usize = 256;

/// Something that happened to a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum MachineEvent {
    /// The machine is in another state: `Not started`, `Running`, `Paused` or `Stopped`. The first
    /// event of each stream is one of these.
    State {
        /// The state, in the words of GET /.
        state: &'static str,
    },
    /// The guest asked to be restarted, which ends the machine.
    Reset,
    /// The guest powered itself off.
    PowerOff,
    /// The guest's kernel panicked. What follows, an end or an idle guest, is its own choice.
    GuestPanicked,
    /// A vCPU shut down (a triple fault).
    Shutdown,
    /// A vCPU failed, which ends the machine.
    VcpuFailed {
        /// What happened, in one line.
        error: String,
    },
    /// A virtio device cannot go on until its driver resets it.
    DeviceNeedsReset {
        /// The device: its id, or what it is.
        device: String,
    },
    /// A device was given other limits, another disk or another size.
    DeviceChanged {
        /// The device: its id, or what it is.
        device: String,
    },
    /// The machine was written to files.
    SnapshotCreated {
        /// The file with the state.
        #[schema(value_type = String)]
        snapshot_path: PathBuf,
        /// The file with the memory, if it was written.
        #[schema(value_type = Option<String>)]
        mem_file_path: Option<PathBuf>,
        /// What the file with the memory holds.
        snapshot_type: SnapshotType,
    },
    /// The program that serves the memory has ended: the guest stops at the next page that it has
    /// not touched yet.
    MemoryHandlerGone,
    /// A move to another process is in another phase.
    Migration {
        /// Which side this is.
        role: MigrationRole,
        /// How far it is.
        phase: MigrationPhase,
        /// How long the guest stood still, in microseconds, once it has moved.
        #[serde(skip_serializing_if = "Option::is_none")]
        downtime_us: Option<u64>,
        /// Why it went wrong.
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    /// A pass over the memory of a machine that moves is over.
    MigrationPassed(MigrationPass),
    /// The machine was made from the files of another.
    SnapshotLoaded {
        /// The file with the state.
        #[schema(value_type = String)]
        snapshot_path: PathBuf,
    },
}

impl MachineEvent {
    fn name(&self) -> &'static str {
        match self {
            Self::State { .. } => "state",
            Self::Reset => "reset",
            Self::PowerOff => "power_off",
            Self::GuestPanicked => "guest_panicked",
            Self::Shutdown => "shutdown",
            Self::VcpuFailed { .. } => "vcpu_failed",
            Self::DeviceNeedsReset { .. } => "device_needs_reset",
            Self::DeviceChanged { .. } => "device_changed",
            Self::SnapshotCreated { .. } => "snapshot_created",
            Self::MemoryHandlerGone => "memory_handler_gone",
            Self::Migration { .. } => "migration",
            Self::MigrationPassed(_) => "migration_passed",
            Self::SnapshotLoaded { .. } => "snapshot_loaded",
        }
    }
}

/// The data of a server-sent event.
#[derive(Serialize, ToSchema)]
#[schema(as = Event)]
pub(crate) struct Stamped<'a> {
    /// Unix time in milliseconds.
    pub(crate) time_ms: u64,
    #[serde(flatten)]
    pub(crate) event: &'a MachineEvent,
}

#[derive(Default)]
struct Shared {
    watchers: Mutex<Watchers>,
    next_id: AtomicU64,
}

#[derive(Default)]
struct Watchers {
    all: Vec<Sender<Bytes>>,
    /// The last state that was told, for whoever comes later.
    state: Option<MachineEvent>,
    /// Whether all has been told.
    closed: bool,
}

/// Where events are told, and from where they are watched. Clones are the same hub.
#[derive(Clone, Default)]
pub struct EventHub(Arc<Shared>);

impl EventHub {
    /// Tells all who watch; whether anybody does. Nobody is waited for: who reads too slowly is cut
    /// off.
    pub fn publish(&self, event: MachineEvent) -> bool {
        let mut watchers = self.lock();
        if !watchers.all.is_empty() {
            let text = self.format(&event);
            watchers
                .all
                .retain(|watcher| watcher.try_send(text.clone()).is_ok());
        }
        if matches!(event, MachineEvent::State { .. }) {
            watchers.state = Some(event);
        }
        !watchers.all.is_empty()
    }

    /// Nothing more is told: the streams end after what was told so far.
    pub(crate) fn close(&self) {
        let mut watchers = self.lock();
        watchers.closed = true;
        watchers.all.clear();
    }

    /// The body of an answer that goes on for as long as there are events.
    pub(crate) fn watch(&self) -> EventBody {
        let (sender, receiver) = channel(BACKLOG);
        let mut watchers = self.lock();
        if let Some(state) = &watchers.state {
            // The channel is empty.
            let _ = sender.try_send(self.format(state));
        }
        if !watchers.closed {
            watchers.all.push(sender);
        }
        EventBody(receiver)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Watchers> {
        self.0
            .watchers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// A server-sent event.
    fn format(&self, event: &MachineEvent) -> Bytes {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let time_ms = since.map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(0));
        let mut text = String::new();
        let id = self.0.next_id.fetch_add(1, Ordering::Relaxed);
        // An event always has a JSON form, and a string takes all that is written to it.
        let data = serde_json::to_string(&Stamped { time_ms, event }).unwrap_or_default();
        let _ = write!(text, "id: {id}\nevent: {}\ndata: {data}\n\n", event.name());
        text.into()
    }
}

/// Events as the body of an answer.
pub(crate) struct EventBody(Receiver<Bytes>);

impl Body for EventBody {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let next = self.0.poll_recv(context);
        next.map(|event| event.map(|text| Ok(Frame::data(text))))
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc::error::TryRecvError;

    use super::*;

    fn next(body: &mut EventBody) -> Option<String> {
        let bytes = body.0.try_recv().ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    #[test]
    fn who_comes_late_is_told_the_state() {
        let hub = EventHub::default();
        hub.publish(MachineEvent::State { state: "Running" });
        hub.publish(MachineEvent::Reset);
        let mut body = hub.watch();
        let first = next(&mut body).unwrap();
        assert!(first.contains("event: state\n"), "{first}");
        assert!(first.contains(r#""state":"Running""#), "{first}");
        assert!(first.ends_with("\n\n"), "{first}");
        assert_eq!(next(&mut body), None);
        hub.publish(MachineEvent::PowerOff);
        assert!(next(&mut body).unwrap().contains("event: power_off"));
        hub.publish(MachineEvent::GuestPanicked);
        let panicked = next(&mut body).unwrap();
        assert!(panicked.contains("event: guest_panicked\n"), "{panicked}");
        assert!(
            panicked.contains(r#""event":"guest_panicked""#),
            "{panicked}"
        );
    }

    #[test]
    fn who_does_not_read_is_cut_off_and_costs_no_memory() {
        let hub = EventHub::default();
        let mut body = hub.watch();
        for _ in 0..=BACKLOG {
            hub.publish(MachineEvent::Reset);
        }
        assert!(hub.lock().all.is_empty());
        let events = std::iter::from_fn(|| next(&mut body)).count();
        assert_eq!(events, BACKLOG);
    }

    #[test]
    fn streams_end_after_what_was_told() {
        let hub = EventHub::default();
        let mut body = hub.watch();
        hub.publish(MachineEvent::Reset);
        hub.close();
        hub.publish(MachineEvent::PowerOff);
        assert!(next(&mut body).unwrap().contains("event: reset\n"));
        for mut body in [body, hub.watch()] {
            assert_eq!(body.0.try_recv(), Err(TryRecvError::Disconnected));
        }
    }
}
