// SPDX-License-Identifier: Apache-2.0
//! A machine whose memory another program serves, when that program does not.
//!
//! A vCPU or a device that waits for a page cannot always be called back. So the owner waits for
//! them with a limit, and leaves them behind at the end: they go with the process. What must not
//! happen is that they get zeros for the page that they wait for, and write those to a disk.
//!
//! Two threads are started here, each for as long as it takes: `pause` has the devices stopped, and
//! `stop` the vCPUs and the devices ended. They take the lock of one transport at a time.

use std::sync::PoisonError;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use brume_api::MachineEvent;
use brume_virtio::transport::{RunningQueues, TransportCore};
use event_manager::MutEventSubscriber;
use thiserror::Error;

use super::{Machine, RunError};
use crate::attach::NamedTransport;
use crate::lifecycle::IllegalTransition;

/// How long a pause may take.
const PAUSE_LIMIT: Duration = Duration::from_secs(5);
/// How long vCPUs and devices have to end.
const STOP_LIMIT: Duration = Duration::from_secs(1);

/// A machine that was not paused.
#[derive(Debug, Error)]
pub enum PauseError {
    /// It does not run.
    #[error(transparent)]
    State(#[from] IllegalTransition),
    /// Its devices may have to wait for memory that is not here, and what brings it may be held up.
    #[error(
        "Some of the machine's memory is still where it came from: ask again when all of it is here."
    )]
    Follows,
    /// Its memory does not come.
    #[error(
        "a vCPU or a device waits for a page of the guest's memory, which the program that serves \
         it does not bring; the machine can only be stopped, unless that program goes on"
    )]
    Memory,
}

impl Machine {
    /// What the event loop has to watch for the program that serves the memory, if one does.
    pub(super) fn memory_watch(&self) -> Option<Box<dyn MutEventSubscriber>> {
        let handler = self.memory.handler.as_ref()?;
        Some(handler.watch(self.sender.clone()))
    }

    pub(super) fn memory_handler_gone(&self) {
        tracing::error!(
            "the program that serves the guest's memory has ended: the guest stops at the next \
             page that it has not touched yet"
        );
        self.tell(MachineEvent::MemoryHandlerGone);
    }

    /// Waits until all vCPUs have said that they are held.
    pub(super) fn wait_held(&self, held: Vec<Receiver<()>>) -> Result<(), PauseError> {
        let deadline = Instant::now() + PAUSE_LIMIT;
        for held in held {
            if !self.memory.may_wait() {
                // An error says that the vCPU has ended, which its event will tell.
                let _ = held.recv();
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if held.recv_timeout(left) == Err(RecvTimeoutError::Timeout) {
                // Also for those that are not held yet: they find both commands, one after the
                // other.
                self.vcpus.iter().for_each(crate::cpu::VcpuHandle::proceed);
                return Err(PauseError::Memory);
            }
        }
        Ok(())
    }

    /// Stops the devices; what they had in hand. If they do not stop, the machine ends.
    pub(super) fn pause_devices(&mut self) -> Result<Vec<RunningQueues>, PauseError> {
        if !self.memory.may_wait() {
            return Ok(self.each_transport(TransportCore::pause));
        }
        let (sender, paused) = channel();
        let transports = self.transports.clone();
        let pause = move || {
            let queues: Vec<_> = transports.iter().map(pause_one).collect();
            let _ = sender.send(queues);
        };
        let started = thread::Builder::new().name("pause".into()).spawn(pause);
        let result = paused.recv_timeout(PAUSE_LIMIT);
        if started.is_err() || result.is_err() {
            self.stop(Err(RunError::Memory));
        }
        result.map_err(|_| PauseError::Memory)
    }

    /// Ends the vCPUs, then the devices.
    pub(super) fn tear_down(&mut self) {
        if !self.memory.may_wait() {
            self.vcpus.clear();
            self.each_transport(|core| drop(core.pause()));
            return;
        }
        let (sender, ended) = channel::<()>();
        let vcpus = std::mem::take(&mut self.vcpus);
        let transports = self.transports.clone();
        let end = move || {
            drop(vcpus);
            transports.iter().for_each(|named| drop(pause_one(named)));
            drop(sender);
        };
        let started = thread::Builder::new().name("stop".into()).spawn(end);
        let waits = ended.recv_timeout(STOP_LIMIT) == Err(RecvTimeoutError::Timeout);
        if started.is_err() || waits {
            tracing::error!(
                "a vCPU or a device still waits for a page of the guest's memory; it is left behind"
            );
            // For as long as this process lives.
            std::mem::forget(self.memory.guest.clone());
            std::mem::forget(self.memory.handler.clone());
        }
    }
}

fn pause_one(named: &NamedTransport) -> RunningQueues {
    let mut transport = named
        .transport
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    transport.core().pause()
}
