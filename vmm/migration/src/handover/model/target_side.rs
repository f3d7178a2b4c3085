// SPDX-License-Identifier: Apache-2.0
//! What the target may do next, and what may become of it.

use super::*;

impl World {
    pub(super) fn target_next(&self, setting: &Setting, must: &mut Next, extra: &mut Next) {
        if self.budget.crashes > 0 {
            self.target_crash(setting, extra);
        }
        if let Some(action) = self.target_todo.first() {
            let mut world = self.clone();
            world.target_todo.remove(0);
            world.act_target(*action);
            must.push(("the target acts", world));
            return;
        }
        self.target_reads(setting, must, extra);
        let state = self.target.state();
        if state == TargetState::Running
            && self.target.memory_missing()
            && self.source.state() == SourceState::Serving
            && self.up == Pipe::open()
            && self.down.end == End::Open
        {
            let mut world = self.clone();
            world.step_target(TargetEvent::MemoryComplete, setting.flaw);
            must.push(("all memory is there", world));
        }
        let done = state == TargetState::Running && !self.target.memory_missing();
        if (done || state == TargetState::Dropped)
            && self.up.end != End::Seen
            && !self.up.wires.contains(&Wire::Return)
        {
            let mut left = self.clone();
            left.up.leave();
            for world in left.ended(setting, |world| &mut world.down) {
                extra.push(("the target closes", world));
            }
        }
        if self.budget.decisions > 0 {
            for decision in [Decision::Run, Decision::Abandon] {
                let mut world = self.clone();
                world.budget.decisions -= 1;
                world.step_target(TargetEvent::Decision(decision), setting.flaw);
                let taken = world.target.state() != state;
                world.overruled |= taken && state != TargetState::InDoubt;
                world.decided |= taken && decision == Decision::Run;
                world.given_up |= taken && decision == Decision::Abandon;
                extra.push(("the target is told", world));
            }
        }
    }

    pub(super) fn target_reads(&self, setting: &Setting, must: &mut Next, extra: &mut Next) {
        if let Some(pipe) = self.old.first() {
            let mut world = self.clone();
            if let Some(wire) = pipe.wires.first() {
                if let Some(pipe) = world.old.first_mut() {
                    pipe.wires.remove(0);
                }
                world.read_by_target(*wire, setting, must);
            } else {
                world.old.remove(0);
                let event = if pipe.end == End::Lost {
                    TargetEvent::LinkLost
                } else {
                    TargetEvent::LinkClosed
                };
                world.step_target(event, setting.flaw);
                must.push(("the target finds an old end", world));
            }
        }
        // The first thing on a new connection, which may come before the end of an older one.
        let (Some(wire), readable) = (
            self.up.wires.first(),
            self.old.is_empty() || self.up.wires.first() == Some(&Wire::Return),
        ) else {
            return self.target_finds_end(setting, must);
        };
        if !readable {
            return;
        }
        if self.budget.repeats > 0 && !matches!(wire, Wire::Return | Wire::Sent) {
            let mut world = self.clone();
            world.budget.repeats -= 1;
            world.read_by_target(*wire, setting, extra);
        }
        let mut world = self.clone();
        world.up.wires.remove(0);
        world.read_by_target(*wire, setting, must);
    }

    pub(super) fn target_finds_end(&self, setting: &Setting, must: &mut Next) {
        let event = match self.up.end {
            End::Open | End::Seen => return,
            End::Closed => TargetEvent::LinkClosed,
            End::Lost => TargetEvent::LinkLost,
        };
        let mut world = self.clone();
        world.up.end = End::Seen;
        world.step_target(event, setting.flaw);
        must.push(("the target finds the end", world));
    }

    /// The message has been taken off the connection of `self`.
    pub(super) fn read_by_target(mut self, wire: Wire, setting: &Setting, must: &mut Next) {
        let can_run = matches!(
            self.target.state(),
            TargetState::Receiving
                | TargetState::Loaded
                | TargetState::InDoubt
                | TargetState::Asked
        );
        if can_run && matches!(wire, Wire::Sent | Wire::Commit) {
            let mut world = self.clone();
            world.step_target(TargetEvent::LoadFailed, setting.flaw);
            world.target_must_run = false;
            must.push(("the target cannot", world));
        }
        let event = match wire {
            Wire::Sent => TargetEvent::StateLoaded {
                memory_follows: setting.memory_follows,
            },
            Wire::Commit => TargetEvent::Commit,
            Wire::Cancel => TargetEvent::Cancel,
            Wire::Return => {
                self.old.clear();
                TargetEvent::Returned
            }
            _ => TargetEvent::Unexpected,
        };
        self.step_target(event, setting.flaw);
        must.push(("the target reads", self));
    }

    pub(super) fn act_target(&mut self, action: TargetAction) {
        let wire = match action {
            TargetAction::SendReady => Wire::Ready,
            TargetAction::SendTakenOver => Wire::TakenOver,
            TargetAction::SendComplete => Wire::Complete,
            TargetAction::SendFailed => Wire::Failed,
            TargetAction::SendStanding(standing) => Wire::Standing(standing),
            TargetAction::RunGuest => {
                self.target_runs = true;
                self.target_ran = true;
                return;
            }
            TargetAction::DropGuest | TargetAction::Refuse(_) => return,
        };
        // It has not seen the newest connection yet: what it writes goes nowhere.
        if !self.up.wires.contains(&Wire::Return) && self.up.end != End::Seen {
            self.down.push(wire);
        }
    }
}
