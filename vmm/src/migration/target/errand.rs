// SPDX-License-Identifier: Apache-2.0
//! What somebody who comes to a target has come for, and what is said to who has not come for a move
//! that can go on.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use brume_migration::{Channel, Hello, Message, Purpose, Session, Standing};

/// How many moves that came to nothing are remembered.
const MOST_DROPPED: usize = 64;
/// How long it is listened to who comes back to a move that is over.
const LATE_WORD: Duration = Duration::from_secs(1);

/// Who has said who it is, and is still to be welcomed.
pub(super) struct Met {
    pub(super) channel: Channel,
    pub(super) hello: Hello,
    /// Where it comes from, for people.
    pub(super) peer: String,
}

/// The moves that a target knows of.
#[derive(Default)]
pub(super) struct Moves {
    /// The one that is going on: no other may begin.
    arriving: Option<Session>,
    dropped: Dropped,
}

/// Moves that came to nothing, the last [`MOST_DROPPED`] of them: anybody may begin one.
#[derive(Default)]
struct Dropped(VecDeque<Session>);

impl Dropped {
    fn note(&mut self, session: Session) {
        if self.0.contains(&session) {
            return;
        }
        if self.0.len() >= MOST_DROPPED {
            self.0.pop_front();
        }
        self.0.push_back(session);
    }
}

/// What somebody who has said who it is has come for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Errand {
    /// To begin a move, or for the one that is going on.
    Move,
    /// To begin a move while there is another.
    OtherMove,
    /// For a move that came to nothing.
    Dropped,
    /// For a move that nobody here knows.
    Unknown,
}

impl Moves {
    /// One is going on: from now on no other begins.
    pub(super) fn begin(&mut self, session: &Session) {
        self.arriving = Some(session.clone());
    }

    /// The one that was going on came to nothing.
    pub(super) fn end(&mut self) {
        if let Some(session) = self.arriving.take() {
            self.dropped.note(session);
        }
    }

    /// What somebody has come for.
    pub(super) fn errand(&self, hello: &Hello) -> Errand {
        match &self.arriving {
            Some(session) if *session == hello.session => Errand::Move,
            Some(_) if hello.purpose == Purpose::Control => Errand::OtherMove,
            None if hello.purpose == Purpose::Control => Errand::Move,
            _ if hello.purpose == Purpose::Return && self.dropped.0.contains(&hello.session) => {
                Errand::Dropped
            }
            _ => Errand::Unknown,
        }
    }
}

impl Met {
    /// Tells who has not come for a move that can go on.
    pub(super) fn turn_away(mut self, errand: Errand) {
        match errand {
            Errand::Move | Errand::OtherMove => send_away(&mut self.channel),
            Errand::Dropped => self.tell_dropped(),
            Errand::Unknown => {
                let why =
                    "the target knows nothing of this move: it was begun with another process";
                self.channel.refuse(vec![why.into()]);
            }
        }
    }

    fn tell_dropped(&mut self) {
        let channel = &mut self.channel;
        let told = channel
            .welcome(&self.hello)
            .and_then(|()| channel.send(&Message::Standing(Standing::HasDropped)));
        if told.is_ok() {
            // It may have something to say, and reads what was sent first.
            let _ = channel.set_deadline(Some(Instant::now() + LATE_WORD));
            let _ = channel.receive();
        }
    }
}

/// Refuses a connection that has no place here.
pub(super) fn send_away(channel: &mut Channel) {
    channel.refuse(vec!["the target receives another machine".into()]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(session: &Session, purpose: Purpose) -> Hello {
        Hello {
            protocol: 1,
            oldest: 1,
            brume: String::new(),
            session: session.clone(),
            purpose,
        }
    }

    #[test]
    fn one_move_goes_on_at_a_time_and_those_of_others_are_told_how_they_are() {
        let [one, two, three] = [(); 3].map(|()| Session::new().unwrap());
        let mut moves = Moves::default();
        let errand = |moves: &Moves, session, purpose| moves.errand(&hello(session, purpose));
        for purpose in [
            Purpose::Pages { index: 1 },
            Purpose::Faults,
            Purpose::Return,
        ] {
            assert_eq!(errand(&moves, &one, purpose), Errand::Unknown);
        }
        assert_eq!(errand(&moves, &one, Purpose::Control), Errand::Move);
        moves.begin(&one);
        assert_eq!(errand(&moves, &one, Purpose::Return), Errand::Move);
        assert_eq!(errand(&moves, &one, Purpose::Faults), Errand::Move);
        assert_eq!(errand(&moves, &two, Purpose::Control), Errand::OtherMove);
        assert_eq!(errand(&moves, &two, Purpose::Faults), Errand::Unknown);
        moves.end();
        assert_eq!(errand(&moves, &one, Purpose::Return), Errand::Dropped);
        assert_eq!(errand(&moves, &two, Purpose::Control), Errand::Move);
        moves.begin(&two);
        assert_eq!(errand(&moves, &one, Purpose::Return), Errand::Dropped);
        assert_eq!(errand(&moves, &three, Purpose::Return), Errand::Unknown);
    }

    #[test]
    fn the_last_moves_that_came_to_nothing_are_remembered() {
        let mut dropped = Dropped::default();
        let sessions: Vec<_> = (0..100).map(|_| Session::new().unwrap()).collect();
        for session in &sessions {
            dropped.note(session.clone());
            dropped.note(session.clone());
        }
        assert!(dropped.0.iter().eq(&sessions[100 - MOST_DROPPED..]));
    }
}
