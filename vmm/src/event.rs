// SPDX-License-Identifier: Apache-2.0
//! The one queue through which everything reaches the owner of a machine, and the handles that
//! others put things into it with.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use brume_devices::{EventSink, GuestEvent, Serial};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::cpu::VcpuEnd;
use crate::instance::ApiCall;
use crate::lifecycle::{IllegalTransition, VmState};
use crate::machine::{Pass, PauseError, PreCopied};
use crate::migration::{IncomingEvent, SourceEvent};

/// Why a machine was told to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The person at the console asked for it.
    Console,
    /// A signal of that number.
    Signal(i32),
    /// A client of the control API asked for it.
    Api,
}

/// What reaches the owner.
pub(crate) enum Event {
    /// The guest asked for something.
    Guest(GuestEvent),
    /// A vCPU has run for the last time.
    Vcpu(VcpuEnd),
    /// Somebody outside wants something.
    Request(Request),
    /// A virtio device cannot go on; its id or what it is.
    DeviceFailed(String),
    /// It is time to write metrics.
    MetricsDue,
    /// The time is over in which written pages are counted.
    RateDue,
    /// Pages of a snapshot are written, while the machine runs.
    Copied(Box<Pass>),
    /// A snapshot that was written while the machine ran is on the disk, or is not.
    Saved(Box<PreCopied>),
    /// It is time to slow the vCPUs again.
    NapDue,
    /// It is time to try again to take the locks of the disks.
    LocksDue,
    /// It is time to look whether a stop that waits still has to.
    StopDue,
    /// What the thread wants that moves the machine away.
    Migration(SourceEvent),
    /// What the thread wants that receives a machine.
    Incoming(IncomingEvent),
    /// The program that serves the guest's memory has ended.
    MemoryHandlerGone,
}

/// A request from outside, with the way to answer it.
pub(crate) enum Request {
    Pause(Sender<Result<(), PauseError>>),
    Resume(Sender<Result<(), IllegalTransition>>),
    State(Sender<VmState>),
    Stop(StopReason),
    Api(ApiCall),
}

/// A request that got no answer.
#[derive(Debug, Error)]
pub enum RequestError {
    /// The machine is gone.
    #[error("the machine has ended")]
    Ended,
    /// The machine's state does not allow it.
    #[error(transparent)]
    State(#[from] IllegalTransition),
    /// The guest's memory does not come.
    #[error(transparent)]
    Pause(PauseError),
}

impl From<PauseError> for RequestError {
    fn from(error: PauseError) -> Self {
        match error {
            PauseError::State(error) => Self::State(error),
            error @ (PauseError::Follows | PauseError::Memory) => Self::Pause(error),
        }
    }
}

/// The sending end of the queue.
#[derive(Clone)]
pub(crate) struct EventSender {
    sender: Sender<Event>,
    wake: Arc<EventFd>,
}

/// The receiving end of the queue.
pub(crate) struct EventQueue {
    receiver: Receiver<Event>,
    wake: Arc<EventFd>,
}

/// Makes a queue.
pub(crate) fn event_queue() -> io::Result<(EventSender, EventQueue)> {
    let (sender, receiver) = channel();
    let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
    Ok((
        EventSender {
            sender,
            wake: wake.clone(),
        },
        EventQueue { receiver, wake },
    ))
}

impl EventSender {
    /// Queues `event`; whether anybody is there to take it.
    pub(crate) fn send(&self, event: Event) -> bool {
        let sent = self.sender.send(event).is_ok();
        // A counter at its end means that a wake-up is pending already.
        let _ = self.wake.write(1);
        sent
    }

    /// Queues `event` after `time`, from a thread of its own.
    ///
    /// # Errors
    ///
    /// The host gives no thread.
    pub(crate) fn send_after(&self, time: Duration, event: Event) -> io::Result<()> {
        let sender = self.clone();
        let wait = move || {
            thread::sleep(time);
            sender.send(event);
        };
        thread::Builder::new()
            .name("later".into())
            .stack_size(64 * 1024)
            .spawn(wait)
            .map(drop)
    }

    /// The same where nobody could do anything about an error but tell it.
    pub(crate) fn remind_after(&self, time: Duration, event: Event) {
        if let Err(error) = self.send_after(time, event) {
            tracing::error!("what has to be done later is not: {error}");
        }
    }

    /// What devices report to.
    pub(crate) fn guest_events(&self) -> EventSink {
        let sender = self.clone();
        EventSink::new(move |event| {
            sender.send(Event::Guest(event));
        })
    }
}

impl EventQueue {
    /// The event that is written when something was queued.
    pub(crate) fn wake(&self) -> Arc<EventFd> {
        self.wake.clone()
    }

    /// The next thing in the queue, if there is one.
    pub(crate) fn next(&self) -> Option<Event> {
        self.receiver.try_recv().ok()
    }
}

/// A way to ask a running machine for something, from any thread but its owner's.
#[derive(Clone)]
pub struct MachineHandle {
    events: EventSender,
}

impl MachineHandle {
    pub(crate) fn new(events: EventSender) -> Self {
        Self { events }
    }

    /// Asks the machine to stop, and does not wait for it. May be called from the owner's thread.
    pub fn stop(&self, reason: StopReason) {
        self.events.send(Event::Request(Request::Stop(reason)));
    }

    /// Pauses the machine: vCPUs held, devices stopped with nothing in flight.
    ///
    /// # Errors
    ///
    /// It does not run, or its memory does not come.
    pub fn pause(&self) -> Result<(), RequestError> {
        Ok(self.ask(Request::Pause)??)
    }

    /// Lets a paused machine go on.
    ///
    /// # Errors
    ///
    /// It is not paused.
    pub fn resume(&self) -> Result<(), RequestError> {
        Ok(self.ask(Request::Resume)??)
    }

    /// What the machine is doing.
    ///
    /// # Errors
    ///
    /// It has ended.
    pub fn state(&self) -> Result<VmState, RequestError> {
        self.ask(Request::State)
    }

    fn ask<T>(&self, request: impl FnOnce(Sender<T>) -> Request) -> Result<T, RequestError> {
        let (reply, answer) = channel();
        if !self.events.send(Event::Request(request(reply))) {
            return Err(RequestError::Ended);
        }
        answer.recv().map_err(|_| RequestError::Ended)
    }
}

/// The input side of the guest's serial console.
#[derive(Clone)]
pub struct Console {
    serial: Arc<Mutex<Serial>>,
    room: Arc<EventFd>,
}

impl Console {
    pub(crate) fn new(serial: Arc<Mutex<Serial>>, room: Arc<EventFd>) -> Self {
        Self { serial, room }
    }

    /// The port.
    pub(crate) fn serial(&self) -> &Arc<Mutex<Serial>> {
        &self.serial
    }

    /// Types `input`; how many bytes of it were taken. The rest is for when
    /// [`Console::room`] was written.
    pub fn push(&self, input: &[u8]) -> usize {
        self.serial
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_input(input)
    }

    /// Written when input that was refused can be offered again.
    pub fn room(&self) -> &EventFd {
        &self.room
    }
}
