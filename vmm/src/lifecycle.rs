// SPDX-License-Identifier: Apache-2.0
//! The states of a machine and what leads from one to the next.
//!
//! ```text
//! NotStarted --Start--> Running --Pause--> Paused --Resume--> Running
//!      |    \              |               ^  ^  | \
//!      |     +---Restore---|---------------+  |  |  +--Depart--> MigratingOut
//!      |                   |                  +--|-----Return--------+  |
//!      +-------Stop--------+------Stop-----------+--------Stop----------+--> Stopped
//! ```

use thiserror::Error;

/// What a machine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmState {
    /// Built; no vCPU has run.
    NotStarted,
    /// vCPUs and devices run.
    Running,
    /// vCPUs are held between two instructions, devices are stopped with their queues handed back.
    Paused,
    /// As paused, and on its way to another process, which may run it from some moment on.
    MigratingOut,
    /// Over. No vCPU or device runs, and none will.
    Stopped,
}

/// What can happen to a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmEvent {
    /// The first start.
    Start,
    /// The state of another machine was taken on.
    Restore,
    /// A pause.
    Pause,
    /// The end of a pause.
    Resume,
    /// The state is given to another process.
    Depart,
    /// The other process does not take it.
    Return,
    /// The end, by the guest, by request or by a failure.
    Stop,
}

/// A request that does not fit the state.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("a machine that is {state:?} cannot {event:?}")]
pub struct IllegalTransition {
    /// The state the machine is in, and stays in.
    pub state: VmState,
    /// What was to happen.
    pub event: VmEvent,
}

impl VmState {
    /// The state in the words of the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::NotStarted => "Not started",
            Self::Running => "Running",
            // In the words of Firecracker, which has no others for it.
            Self::Paused | Self::MigratingOut => "Paused",
            Self::Stopped => "Stopped",
        }
    }

    /// The state after `event`.
    ///
    /// # Errors
    ///
    /// The event cannot happen in this state.
    pub fn next(self, event: VmEvent) -> Result<Self, IllegalTransition> {
        match (self, event) {
            (Self::NotStarted, VmEvent::Start) | (Self::Paused, VmEvent::Resume) => {
                Ok(Self::Running)
            }
            (Self::Running, VmEvent::Pause)
            | (Self::NotStarted, VmEvent::Restore)
            | (Self::MigratingOut, VmEvent::Return) => Ok(Self::Paused),
            (Self::Paused, VmEvent::Depart) => Ok(Self::MigratingOut),
            (
                Self::NotStarted | Self::Running | Self::Paused | Self::MigratingOut,
                VmEvent::Stop,
            ) => Ok(Self::Stopped),
            (state, event) => Err(IllegalTransition { state, event }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::VmEvent::*;
    use super::VmState::*;
    use super::*;

    #[test]
    fn every_state_by_every_event() {
        let none = [None; 7];
        let row = |changes: &[(usize, VmState)]| {
            let mut row = none;
            for (event, state) in changes {
                row[*event] = Some(*state);
            }
            row
        };
        let events = [Start, Restore, Pause, Resume, Depart, Return, Stop];
        let table = [
            (NotStarted, row(&[(0, Running), (1, Paused), (6, Stopped)])),
            (Running, row(&[(2, Paused), (6, Stopped)])),
            (
                Paused,
                row(&[(3, Running), (4, MigratingOut), (6, Stopped)]),
            ),
            (MigratingOut, row(&[(5, Paused), (6, Stopped)])),
            (Stopped, none),
        ];
        for (state, row) in table {
            for (event, expected) in events.into_iter().zip(row) {
                let expected = expected.ok_or(IllegalTransition { state, event });
                assert_eq!(state.next(event), expected, "{state:?} by {event:?}");
            }
        }
    }
}
