// SPDX-License-Identifier: Apache-2.0
//! What can go wrong on a connection.

use std::io;

use thiserror::Error;

/// A connection that does not carry what it should.
#[derive(Debug, Error)]
pub enum ChannelError {
    /// The other side has closed it, and everything that it had sent has been read.
    #[error("the other side has closed the connection")]
    Closed,
    /// It broke. What the other side has sent may be lost.
    #[error("the connection broke")]
    Lost(#[source] io::Error),
    /// Nothing has moved for too long.
    #[error("the other side has neither sent nor taken anything for too long")]
    TimedOut,
    /// It was changed on its way.
    #[error("what came is not what was sent: the checksum is wrong")]
    Checksum,
    /// It is somebody else.
    #[error("the other side does not speak brume's migration protocol")]
    Magic,
    /// It makes no sense.
    #[error("the other side has sent {0}")]
    Malformed(&'static str),
    /// What is to be sent is more than the other side takes.
    #[error("{length} bytes do not fit where there may be {most}")]
    TooLarge {
        /// What is to be sent, in bytes.
        length: usize,
        /// What may be, in bytes.
        most: usize,
    },
    /// It is more than it may be.
    #[error("the other side has announced {length} bytes where there may be {most}")]
    TooLong {
        /// What it has announced.
        length: u32,
        /// What it may.
        most: u32,
    },
    /// A message that is none.
    #[error("the other side has sent a message that is not understood")]
    Message(#[source] serde_json::Error),
    /// It does not want us.
    #[error("the other side refuses: {}", .0.join("; "))]
    Refused(Vec<String>),
    /// It is not what comes now.
    #[error("the other side has sent {0} out of turn")]
    OutOfTurn(&'static str),
}
