// SPDX-License-Identifier: Apache-2.0
//! What is on the way, one way.

use crate::Standing;

/// What is on the way between the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Wire {
    Sent,
    Ready,
    Commit,
    TakenOver,
    Complete,
    Cancel,
    Failed,
    Standing(Standing),
    Return,
}

/// What a side finds once it has read what is on the way to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum End {
    Open,
    Closed,
    Lost,
    /// It was found, or nobody is there to find it.
    Seen,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Pipe {
    pub(super) wires: Vec<Wire>,
    pub(super) end: End,
}

impl Pipe {
    pub(super) const fn open() -> Self {
        Self {
            wires: Vec::new(),
            end: End::Open,
        }
    }

    /// No more will be read from it.
    pub(super) fn leave(&mut self) {
        self.wires.clear();
        self.end = End::Seen;
    }

    pub(super) fn lose(&mut self) {
        if self.end != End::Seen {
            self.wires.clear();
            self.end = End::Lost;
        }
    }

    pub(super) const fn close(&mut self) {
        if matches!(self.end, End::Open) {
            self.end = End::Closed;
        }
    }

    pub(super) fn push(&mut self, wire: Wire) {
        if self.end == End::Open {
            self.wires.push(wire);
        }
    }
}
