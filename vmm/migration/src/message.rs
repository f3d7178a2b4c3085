// SPDX-License-Identifier: Apache-2.0
//! What the two sides tell each other, apart from memory and state.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A number that one move, and each of its connections, is known by: 32 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct Session(String);

impl TryFrom<String> for Session {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let is_number = text.bytes().all(|digit| digit.is_ascii_hexdigit());
        if is_number && text.len() == 32 {
            Ok(Self(text))
        } else {
            Err("a session is 32 hexadecimal digits")
        }
    }
}

impl Session {
    /// A session that no other move has.
    ///
    /// # Errors
    ///
    /// The host gives no random bytes.
    pub fn new() -> Result<Self, getrandom::Error> {
        Ok(Self(format!(
            "{:016x}{:016x}",
            getrandom::u64()?,
            getrandom::u64()?
        )))
    }
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// The first one of a move: messages, state, and memory.
    Control,
    /// Memory, on one more connection; they are numbered from 1.
    Pages {
        /// Its number.
        index: u8,
    },
    /// Pages that the guest waits for at the target, as the target asks for them.
    Faults,
    /// The first connection after all of them were lost.
    Return,
}

/// The first thing that is said on a connection, by the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The newest version of the protocol that it speaks.
    pub protocol: u32,
    /// The oldest version of the protocol that it speaks.
    pub oldest: u32,
    /// Its own version, for people.
    pub brume: String,
    /// Which move this belongs to.
    pub session: Session,
    /// What the connection is for.
    pub purpose: Purpose,
}

/// A message.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "message", deny_unknown_fields)]
pub enum Message {
    /// Source: who is there, and why.
    Hello(Hello),
    /// Target: it may go on.
    Welcome {
        /// The version of the protocol that both will speak.
        protocol: u32,
        /// Its own version, for people.
        brume: String,
    },
    /// Target: it will not do. The end of the connection.
    Refused {
        /// What does not fit, each in a sentence for people.
        reasons: Vec<String>,
    },
    /// Source: what the machine is.
    Offer(Value),
    /// Target: it can run here. Memory may come.
    Accepted(Value),
    /// Source, on each connection that carries memory: all pages of this pass have been sent on it.
    PassEnded {
        /// The number of the pass, from 1.
        pass: u32,
        /// How many pages were sent on this connection since it was opened.
        pages: u64,
        /// How many pages of zeros were left out of this pass on this connection, because the target
        /// has zeros there.
        #[serde(default)]
        zeros: u64,
    },
    /// Target: all connections have come to the end of the pass, and its pages are in memory.
    PassTaken {
        /// The number of the pass.
        pass: u32,
    },
    /// Source, before the guest stops: what has come of the missing pages that were told of until
    /// now is old; they follow the guest.
    Stale,
    /// Target: it has forgotten them.
    Forgotten,
    /// Source: all blocks of a pass over the disks have been sent.
    DisksEnded {
        /// Whether the guest is paused, so that there will be no more.
        last: bool,
    },
    /// Target: the disks have the blocks of this pass, durably. After the last pass, `Ready` says
    /// so.
    DisksTaken,
    /// Source, with the guest paused: its state was sent, and all memory that it is to have at once.
    Sent {
        /// How long the guest's clocks have stood still so far, in microseconds: since they were
        /// read for the state. They run on while the guest is paused.
        paused_us: u64,
        /// The source's time of day, in nanoseconds since 1970.
        unix_ns: u64,
    },
    /// Target: everything was taken on, and the guest can go on here.
    Ready {
        /// How long that took since the last message, in microseconds.
        load_us: u64,
    },
    /// Source: it is yours. From here on the source does not go on with the guest.
    Commit,
    /// Target, before the guest goes on: it is mine.
    TakenOver,
    /// Target: the guest goes on.
    Running {
        /// How long it took since the commit, in microseconds.
        resume_us: u64,
        /// For how long it has run already, in microseconds.
        since_us: u64,
    },
    /// Source: all memory was sent, after the guest had gone on at the target.
    MemorySent,
    /// Target: it has all memory and needs the source no more.
    Complete,
    /// Source: it is called off; the target may forget it.
    Cancel {
        /// Why, for people.
        why: String,
    },
    /// Target: it cannot be done; the source may go on with the guest.
    Failed {
        /// Why, for people.
        why: String,
    },
    /// Target, to who has returned: where it stands.
    Standing(Standing),
    /// Either side: it is still there.
    KeepAlive,
}

/// What a target knows about a move whose connections were lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Standing {
    /// It has everything, and no word that it is its.
    WaitsForCommit,
    /// The guest is its. It may wait for memory still.
    HasTakenOver,
    /// It has given up what it had, and will not run the guest.
    HasDropped,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_a_number_and_nothing_else() {
        let session = Session::new().unwrap();
        let text = serde_json::to_string(&session).unwrap();
        assert_eq!(serde_json::from_str::<Session>(&text).unwrap(), session);
        // "ä" has two bytes.
        let digit = |with: &str| format!("\"{}{with}\"", "0".repeat(31));
        serde_json::from_str::<Session>(&digit("f")).unwrap();
        for bad in ["", "ff", "g", "-", "ä"] {
            assert!(
                serde_json::from_str::<Session>(&digit(bad)).is_err(),
                "{bad}"
            );
        }
        assert!(serde_json::from_str::<Session>(&format!("\"{}\"", "0".repeat(65_536))).is_err());
    }
}
