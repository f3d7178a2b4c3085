// SPDX-License-Identifier: Apache-2.0
//! What the source may do next, and what may become of it.

use super::*;

impl World {
    pub(super) fn source_next(&self, setting: &Setting, must: &mut Next, extra: &mut Next) {
        if self.budget.crashes > 0 {
            self.source_crash(setting, extra);
        }
        if let Some(action) = self.source_todo.first() {
            let mut world = self.clone();
            world.source_todo.remove(0);
            world.act_source(*action, setting, must);
            return;
        }
        let state = self.source.state();
        if state == SourceState::Sending {
            let mut world = self.clone();
            world.source_runs = false;
            let memory_follows = setting.memory_follows;
            world.step_source(SourceEvent::AllSent { memory_follows }, setting.flaw);
            must.push(("all sent", world));
        }
        if state == SourceState::Offered && !self.sent {
            let mut world = self.clone();
            world.sent = true;
            world.up.push(Wire::Sent);
            must.push(("Sent", world));
        }
        self.source_reads(setting, must, extra);
        if self.wants_return && self.target_lives && self.budget.returns > 0 {
            must.push(("the source returns", self.returned(setting)));
        }
        if matches!(state, SourceState::Kept | SourceState::Gone) && self.down.end != End::Seen {
            let mut left = self.clone();
            left.down.leave();
            left.source_left = true;
            left.wants_return = false;
            for world in left.ended(setting, |world| &mut world.up) {
                extra.push(("the source closes", world));
            }
        }
        if self.budget.timeouts > 0 {
            let mut world = self.clone();
            world.budget.timeouts -= 1;
            world.impatient |= state == SourceState::Committed;
            world.step_source(SourceEvent::TimedOut, setting.flaw);
            extra.push(("the source waits no longer", world));
        }
        if self.budget.cancels > 0 {
            let mut world = self.clone();
            world.budget.cancels -= 1;
            world.step_source(SourceEvent::CancelRequested, setting.flaw);
            extra.push(("cancel is asked for", world));
        }
        if self.budget.decisions > 0 {
            for decision in [Decision::Run, Decision::Abandon] {
                let mut world = self.clone();
                world.budget.decisions -= 1;
                world.step_source(SourceEvent::Decision(decision), setting.flaw);
                let taken = world.source.state() != state;
                world.overruled |= taken
                    && state != SourceState::InDoubt
                    && (state, decision) != (SourceState::Serving, Decision::Abandon);
                world.decided |= taken && decision == Decision::Run;
                world.given_up |= taken && decision == Decision::Abandon;
                extra.push(("the source is told", world));
            }
        }
    }

    pub(super) fn source_reads(&self, setting: &Setting, must: &mut Next, extra: &mut Next) {
        let mut world = self.clone();
        if let Some(wire) = self.down.wires.first() {
            let event = match wire {
                Wire::Ready => SourceEvent::Ready,
                Wire::TakenOver => SourceEvent::TakenOver,
                Wire::Complete => SourceEvent::Complete,
                Wire::Failed => SourceEvent::Failed,
                Wire::Standing(standing) => SourceEvent::Standing(*standing),
                Wire::Sent | Wire::Commit | Wire::Cancel | Wire::Return => SourceEvent::Unexpected,
            };
            if self.budget.repeats > 0 {
                let mut world = self.clone();
                world.budget.repeats -= 1;
                world.step_source(event, setting.flaw);
                extra.push(("the source reads, and will again", world));
            }
            world.down.wires.remove(0);
            world.step_source(event, setting.flaw);
            must.push(("the source reads", world));
            return;
        }
        let event = match self.down.end {
            End::Open | End::Seen => return,
            End::Closed => SourceEvent::LinkClosed,
            End::Lost => SourceEvent::LinkLost,
        };
        world.down.end = End::Seen;
        world.step_source(event, setting.flaw);
        must.push(("the source finds the end", world));
    }

    /// The action has been taken off the list of `self`.
    pub(super) fn act_source(mut self, action: SourceAction, setting: &Setting, must: &mut Next) {
        match action {
            SourceAction::SendCommit | SourceAction::SendCancel => {
                let commit = action == SourceAction::SendCommit;
                if self.down.end != End::Seen {
                    self.up
                        .push(if commit { Wire::Commit } else { Wire::Cancel });
                }
                must.push((if commit { "Commit" } else { "Cancel" }, self));
            }
            SourceAction::ResumeGuest => {
                self.source_resumed |= !self.source_runs;
                self.source_runs = true;
                must.push(("the source resumes", self));
            }
            SourceAction::StopGuest => {
                self.source_runs = false;
                must.push(("the source stops", self));
            }
            SourceAction::Reconnect => {
                self.wants_return = true;
                self.down.leave();
                for world in self.ended(setting, |world| &mut world.up) {
                    must.push(("the source leaves the connection", world));
                }
            }
            SourceAction::Refuse(_) => must.push(("refused", self)),
        }
    }

    pub(super) fn returned(&self, setting: &Setting) -> Self {
        let mut world = self.clone();
        world.wants_return = false;
        world.budget.returns -= 1;
        if world.up.end != End::Seen {
            let pipe = world.up.clone();
            world.old.push(pipe);
        }
        world.up = Pipe::open();
        world.up.push(Wire::Return);
        world.down = Pipe::open();
        world.step_source(SourceEvent::Returned, setting.flaw);
        world
    }

    pub(super) fn source_crash(&self, setting: &Setting, extra: &mut Next) {
        let mut world = self.clone();
        world.budget.crashes -= 1;
        world.source_lives = false;
        world.source_runs = false;
        world.source_must_run = false;
        world.source_todo.clear();
        world.wants_return = false;
        world.down.leave();
        world.target_must_run = setting.unix
            && !setting.memory_follows
            && matches!(
                self.source.state(),
                SourceState::Offered | SourceState::Committed
            )
            && self.target_lives
            && self.target.state() == TargetState::Loaded;
        for world in world.ended(setting, |world| &mut world.up) {
            extra.push(("the source dies", world));
        }
    }

    pub(super) fn target_crash(&self, setting: &Setting, extra: &mut Next) {
        let mut world = self.clone();
        world.budget.crashes -= 1;
        world.target_lives = false;
        world.target_runs = false;
        world.target_must_run = false;
        world.target_todo.clear();
        world.old.clear();
        world.up.leave();
        world.source_must_run = setting.unix
            && self.source_lives
            && !self.impatient
            && !self.target_ran
            && self.target.state() != TargetState::Running;
        for world in world.ended(setting, |world| &mut world.down) {
            extra.push(("the target dies", world));
        }
    }
}
