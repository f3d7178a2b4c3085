// SPDX-License-Identifier: Apache-2.0
//! What a client can do to a move that is under way: change its limits, call it off, decide.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use brume_api::{Fault, MigrationDecision, MigrationPatch, OnTimeout, SendMigration};
use brume_migration::{Closer, Decision, Link, RateLimit};

use crate::memory::peer;

/// What may be changed meanwhile.
#[derive(Clone, Debug)]
pub(super) struct Limits {
    /// How long the guest may stand still.
    pub(super) max_downtime: Duration,
    /// When something else has to happen, if ever.
    pub(super) deadline: Option<Instant>,
    pub(super) on_timeout: OnTimeout,
    pub(super) auto_converge: bool,
}

/// The client's side of a move. Clones are of the same move.
#[derive(Clone)]
pub(crate) struct Control(Arc<Inner>);

struct Inner {
    begun: Instant,
    /// The most bytes per second.
    rate: RateLimit,
    cancelled: AtomicBool,
    /// Whether the process is about to end.
    ends: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    limits: Limits,
    connections: Connections,
    sharer: Sharer,
    decision: Option<MigrationDecision>,
    resume: Option<String>,
}

/// Who else has the machine's memory, not a copy of it.
enum Sharer {
    Nobody,
    /// This process, a pidfd.
    Process(OwnedFd),
    /// Some process that cannot be seen from here.
    Unseen,
}

/// What becomes of connections when the move is called off.
enum Connections {
    /// They are closed, so that nobody waits in them.
    Open(Vec<Closer>),
    /// Nothing: how they end means something now.
    Guarded,
    /// Nothing: the guest runs at the target, and it is too late to call it off.
    Past,
}

impl Control {
    /// For a machine that is sent.
    pub(crate) fn sending(request: &SendMigration) -> Self {
        let begun = Instant::now();
        Self::new(
            begun,
            request.bandwidth_limit,
            Limits {
                max_downtime: Duration::from_millis(request.max_downtime_ms.into()),
                deadline: deadline(begun, request.timeout_s),
                on_timeout: request.on_timeout,
                auto_converge: request.auto_converge,
            },
        )
    }

    /// For a machine that is awaited.
    pub(crate) fn receiving() -> Self {
        let limits = Limits {
            max_downtime: Duration::ZERO,
            deadline: None,
            on_timeout: OnTimeout::Cancel,
            auto_converge: false,
        };
        Self::new(Instant::now(), 0, limits)
    }

    fn new(begun: Instant, bandwidth: u64, limits: Limits) -> Self {
        Self(Arc::new(Inner {
            begun,
            rate: RateLimit::new(bandwidth),
            cancelled: AtomicBool::new(false),
            ends: AtomicBool::new(false),
            state: Mutex::new(State {
                limits,
                connections: Connections::Open(Vec::new()),
                sharer: Sharer::Nobody,
                decision: None,
                resume: None,
            }),
            changed: Condvar::new(),
        }))
    }

    /// Changes what `patch` names. The limit on bytes per second is for the time that the guest runs
    /// here: later it changes nothing.
    pub(crate) fn patch(&self, patch: &MigrationPatch) {
        let mut state = self.lock();
        if let Some(bandwidth) = patch.bandwidth_limit
            && matches!(state.connections, Connections::Open(_))
        {
            self.0.rate.set(bandwidth);
        }
        let limits = &mut state.limits;
        if let Some(downtime) = patch.max_downtime_ms {
            limits.max_downtime = Duration::from_millis(downtime.into());
        }
        if let Some(timeout) = patch.timeout_s {
            limits.deadline = deadline(self.0.begun, timeout);
        }
        if let Some(on_timeout) = patch.on_timeout {
            limits.on_timeout = on_timeout;
        }
        if let Some(converge) = patch.auto_converge {
            limits.auto_converge = converge;
        }
        if patch.resume.is_some() {
            state.resume.clone_from(&patch.resume);
        }
        if patch.decision.is_some() {
            state.decision = patch.decision;
        }
        self.0.changed.notify_all();
    }

    /// Calls it off, as soon as that can be, and unless it is too late.
    pub(crate) fn cancel(&self) {
        let state = self.lock();
        if matches!(state.connections, Connections::Past) {
            return;
        }
        // First, so that whoever finds a connection closed finds why.
        self.0.cancelled.store(true, Ordering::Release);
        if let Connections::Open(closers) = &state.connections {
            closers.iter().for_each(Closer::close);
        }
        self.0.changed.notify_all();
    }

    /// The process is about to end: what was received goes with it, at whatever point it is.
    pub(crate) fn end(&self) {
        self.0.ends.store(true, Ordering::Release);
        self.cancel();
    }

    /// Whether the process is about to end.
    pub(super) fn ends(&self) -> bool {
        self.0.ends.load(Ordering::Acquire)
    }

    /// Whether it was called off.
    pub(super) fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Acquire)
    }

    /// The limits as they are now.
    pub(super) fn limits(&self) -> Limits {
        self.lock().limits.clone()
    }

    /// The limit on bytes per second.
    pub(super) fn rate(&self) -> &RateLimit {
        &self.0.rate
    }

    /// Has `closer` called if the move is called off.
    pub(super) fn watch(&self, closer: Closer) {
        let mut state = self.lock();
        if let Connections::Open(closers) = &mut state.connections {
            if self.is_cancelled() {
                closer.close();
            }
            closers.push(closer);
        }
    }

    /// What a client wants of a move that is late, if this one is and the guest still runs here.
    pub(super) fn late(&self) -> Option<OnTimeout> {
        let state = self.lock();
        let runs = matches!(state.connections, Connections::Open(_));
        let late = state
            .limits
            .deadline
            .is_some_and(|end| Instant::now() >= end);
        (runs && late).then_some(state.limits.on_timeout)
    }

    /// From now on a connection's end means something, so that it must not come of a cancel.
    pub(super) fn guard_connections(&self) {
        self.lock().connections = Connections::Guarded;
    }

    /// From now on it cannot be called off, and is not if it was: the guest runs at the target. What
    /// was decided while nobody knew that is void.
    pub(super) fn pass(&self) {
        let mut state = self.lock();
        state.decision = None;
        state.connections = Connections::Past;
        self.0.cancelled.store(false, Ordering::Release);
    }

    /// Connections may be closed again, nobody has the memory of the next machine, and nothing was
    /// decided about it.
    pub(super) fn forget_connections(&self) {
        let mut state = self.lock();
        state.connections = Connections::Open(Vec::new());
        state.sharer = Sharer::Nobody;
        state.decision = None;
    }

    /// The other side of `link` has the machine's memory, too.
    pub(super) fn share_memory(&self, link: &Link) {
        let process = match link.was_passed() {
            true => None,
            false => peer::process(link),
        };
        self.lock().sharer = process.map_or(Sharer::Unseen, Sharer::Process);
    }

    /// Whether a person may decide so.
    ///
    /// # Errors
    ///
    /// Two guests might run in one memory.
    pub(crate) fn check(&self, decision: MigrationDecision) -> Result<(), Fault> {
        if decision != MigrationDecision::Run {
            return Ok(());
        }
        match &self.lock().sharer {
            Sharer::Process(process) if !peer::has_ended(process) => Err(Fault::new(
                "The process on the other side is there still, and has the memory of this machine: \
                 two guests would run in it. End that process first, or let the two sides find \
                 each other.",
            )),
            Sharer::Unseen => {
                tracing::warn!(
                    "the machine is to run here by a person's decision; its memory was shared with \
                     a process that cannot be seen from here: if that runs it, too, both are lost"
                );
                Ok(())
            }
            Sharer::Process(_) | Sharer::Nobody => Ok(()),
        }
    }

    /// What a person has decided, once; waits so long for that, or for a word on where it goes on.
    pub(super) fn decision(&self, limit: Duration) -> Option<Decision> {
        let state = self.lock();
        let waited = self.0.changed.wait_timeout_while(state, limit, |state| {
            state.decision.is_none() && state.resume.is_none()
        });
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.decision.take().map(|decision| match decision {
            MigrationDecision::Run => Decision::Run,
            MigrationDecision::Abandon => Decision::Abandon,
        })
    }

    /// Where a person wants it to go on, once.
    pub(super) fn resume(&self) -> Option<String> {
        self.lock().resume.take()
    }

    /// Waits so long, or until it is called off, or `rate` is not the limit any more.
    pub(super) fn sleep(&self, time: Duration, rate: u64) {
        let state = self.lock();
        let waited = self.0.changed.wait_timeout_while(state, time, |_| {
            !self.is_cancelled() && self.0.rate.get() == rate
        });
        drop(waited);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn deadline(begun: Instant, timeout_s: u32) -> Option<Instant> {
    (timeout_s > 0).then(|| begun + Duration::from_secs(timeout_s.into()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::process::Command;

    use super::*;

    #[test]
    fn nobody_decides_that_two_guests_run_in_one_memory() {
        let control = Control::receiving();
        let run = || control.check(MigrationDecision::Run);
        run().unwrap();
        // The kernel knows who is at the other side: this process.
        let (end, _other) = UnixStream::pair().unwrap();
        control.share_memory(&Link::from_unix(end).unwrap());
        run().unwrap_err();
        control.check(MigrationDecision::Abandon).unwrap();
        control.forget_connections();
        run().unwrap();

        let mut other = Command::new("sleep").arg("60").spawn().unwrap();
        let process = peer::open(other.id().try_into().unwrap()).unwrap();
        control.lock().sharer = Sharer::Process(process);
        run().unwrap_err();
        other.kill().unwrap();
        other.wait().unwrap();
        run().unwrap();
        control.lock().sharer = Sharer::Unseen;
        run().unwrap();
    }

    #[test]
    fn a_limit_is_for_the_time_before_the_hand_over() {
        let control = Control::receiving();
        let limit = |bandwidth| MigrationPatch {
            bandwidth_limit: Some(bandwidth),
            ..MigrationPatch::default()
        };
        control.patch(&limit(1000));
        assert_eq!(control.rate().get(), 1000);
        control.guard_connections();
        control.rate().set(0);
        // The guest stands still by now.
        control.patch(&limit(1000));
        assert_eq!(control.rate().get(), 0);
    }
}
