// SPDX-License-Identifier: Apache-2.0
//! Waiting for a machine from another process, in one that has none yet.

use std::thread;
use std::time::{Duration, Instant};

use brume_api::{
    Answer, Fault, MigrationDecision, MigrationPatch, MigrationPhase, MigrationRequest,
    MigrationRole, MigrationStatus, ReceiveMigration,
};
use brume_migration::{Address, Listener};

use super::{Control, Door, Incoming, IncomingEvent, Instance, Next, Reception, VmState, load_tls};

/// How long the thread that waits may take to end.
const LAST_LOOK: Duration = Duration::from_millis(500);

impl Instance {
    /// Waits for a machine from now on, for which this process is there: if no machine can come any
    /// more, [`Instance::wait_for_start`] ends.
    ///
    /// # Errors
    ///
    /// There is no such place to wait at, or there is something already.
    pub fn receive_only(&mut self, request: &ReceiveMigration) -> Result<(), Fault> {
        self.only_receives = true;
        self.receive(request)
    }

    /// Waits for a machine from now on. It takes the place of one that clients describe.
    fn receive(&mut self, request: &ReceiveMigration) -> Result<(), Fault> {
        if self.described {
            return Err(Fault::new(
                "A machine is received by a process in which none was described yet.",
            ));
        }
        // It is told only after that how the last wait ended.
        let is_told = self.telemetry.migration.is_over();
        if self.incoming.is_some() || !is_told {
            return Err(Fault::new("A machine is awaited already."));
        }
        let address: Address = request
            .listen
            .parse()
            .map_err(|error| Fault::from_error(&error))?;
        let tls = load_tls(request.tls.as_ref())?;
        let listener = Listener::bind(&address).map_err(|error| Fault::from_error(&error))?;
        let peer = listener.address().to_string();
        let door = Door::open(listener, tls).map_err(|error| Fault::from_error(&error))?;
        let control = Control::receiving();
        let progress = self.telemetry.migration.clone();
        progress.begin(MigrationStatus {
            role: MigrationRole::Target,
            phase: MigrationPhase::Listening,
            peer: Some(peer),
            ..MigrationStatus::default()
        });
        let reception = Reception {
            door,
            control: control.clone(),
            progress,
            sender: self.sender.clone(),
        };
        let thread = reception.spawn();
        self.reception = Some(thread.map_err(|error| Fault::from_error(&error))?);
        let blank = self.description.clone();
        self.incoming = Some(Incoming::new(request.clone(), control, blank));
        Ok(())
    }

    pub(super) fn migration_call(&mut self, request: MigrationRequest) -> Result<Answer, Fault> {
        match request {
            MigrationRequest::Send(_) => {
                return Err(Fault::new("There is no machine yet that could be moved."));
            }
            MigrationRequest::Receive(request) => self.receive(&request)?,
            MigrationRequest::Get => return Answer::json(&self.telemetry.migration.get()),
            MigrationRequest::Patch(patch) => self.patch_reception(&patch)?,
            MigrationRequest::Cancel => self.cancel_reception()?,
        }
        Ok(Answer::done())
    }

    fn patch_reception(&self, patch: &MigrationPatch) -> Result<(), Fault> {
        let incoming = self.incoming.as_ref().ok_or_else(nothing_awaited)?;
        let Some(decision) = patch.decision else {
            let text = if patch.resume.is_some() {
                "A move is resumed at the source."
            } else {
                "The source's limits are changed at the source."
            };
            return Err(Fault::new(text));
        };
        let status = self.telemetry.migration.peek();
        if status.phase != MigrationPhase::InDoubt {
            return Err(Fault::new(
                "There is nothing to decide: the two sides have not lost each other.",
            ));
        }
        if decision == MigrationDecision::Run && status.remaining_pages > 0 {
            return Err(Fault::new(
                "A part of the memory is still at the source: the machine cannot run here before \
                 the two sides have found each other.",
            ));
        }
        incoming.control.check(decision)?;
        incoming.control.patch(patch);
        Ok(())
    }

    fn cancel_reception(&self) -> Result<(), Fault> {
        let incoming = self.incoming.as_ref().ok_or_else(nothing_awaited)?;
        match self.telemetry.migration.get().phase {
            MigrationPhase::SwitchOver | MigrationPhase::InDoubt => Err(Fault::new(
                "The machine is being handed over: only its source can call that off.",
            )),
            _ => {
                incoming.control.cancel();
                Ok(())
            }
        }
    }

    /// What the thread that receives wants.
    pub(super) fn arrival(&mut self, event: IncomingEvent) -> Option<Next> {
        let incoming = self.incoming.as_mut()?;
        // Whoever asked may have ended.
        match event {
            IncomingEvent::Prepare {
                offer,
                handed,
                reply,
            } => {
                let prepared = match (self.options)() {
                    Ok(options) => {
                        let (description, sender) = (&mut self.description, &self.sender);
                        incoming.prepare((&offer, handed), description, options, sender)
                    }
                    Err(error) => Err(vec![error.to_string()]),
                };
                let _ = reply.send(prepared);
            }
            IncomingEvent::Load {
                state,
                stopped,
                other_host,
                following,
                reply,
            } => {
                let how = (stopped, other_host);
                let loaded = incoming.load(&state, how, following, &self.description);
                let _ = reply.send(loaded);
            }
            IncomingEvent::Run(started) => {
                let state = if incoming.resumes() {
                    VmState::Running
                } else {
                    VmState::Paused
                };
                let parts = self.incoming.take()?.run(started)?;
                self.telemetry.state.set(state);
                return Some(Next::Built(parts));
            }
            IncomingEvent::Drop => incoming.forget(&mut self.description),
            IncomingEvent::Ended(broken) => {
                incoming.forget(&mut self.description);
                self.incoming = None;
                self.reception = None;
                return broken.filter(|_| self.only_receives).map(Next::NotReceived);
            }
        }
        None
    }

    /// Waits for nobody any more, so that nothing is left behind.
    pub(super) fn end_reception(&mut self) {
        if let Some(incoming) = self.incoming.take() {
            incoming.control.end();
        }
        if let Some(thread) = self.reception.take() {
            // It looks for that now and then.
            let end = Instant::now() + LAST_LOOK;
            while !thread.is_finished() && Instant::now() < end {
                thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

fn nothing_awaited() -> Fault {
    Fault::new("No machine is awaited, and none is being moved.")
}
