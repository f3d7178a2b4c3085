// SPDX-License-Identifier: Apache-2.0
//! The first words on a connection. They come within the limit, all together: whoever sends a byte
//! now and then does not keep the place of a source.

use std::time::Instant;

use super::{Channel, ChannelError};
use crate::message::{Hello, Message, Purpose, Session};
use crate::{OLDEST_PROTOCOL, PROTOCOL};

/// The most that is read of somebody who has not said who it is, in bytes. A message takes some
/// times as much memory as it has bytes.
const MOST: u32 = 64 << 10;

impl Channel {
    /// Does `work` within the limit.
    fn in_time<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, ChannelError>,
    ) -> Result<T, ChannelError> {
        let before = self.link.deadline();
        let limit = self.link.limit();
        let end = limit.and_then(|limit| Instant::now().checked_add(limit));
        self.set_deadline(before.into_iter().chain(end).min())?;
        let done = work(self);
        self.set_deadline(before)?;
        done
    }

    /// Says who we are and what this connection is for, to the target.
    ///
    /// # Errors
    ///
    /// It is somebody else, of another version, or does not want us.
    pub fn greet(&mut self, session: &Session, purpose: Purpose) -> Result<(), ChannelError> {
        let hello = Message::Hello(Hello {
            protocol: PROTOCOL,
            oldest: OLDEST_PROTOCOL,
            brume: env!("CARGO_PKG_VERSION").into(),
            session: session.clone(),
            purpose,
        });
        let answer = self.in_time(|channel| {
            channel.send(&hello)?;
            channel.receive_at_most(MOST)?.message()
        })?;
        match answer {
            Message::Welcome { protocol, .. }
                if (OLDEST_PROTOCOL..=PROTOCOL).contains(&protocol) =>
            {
                Ok(())
            }
            Message::Refused { reasons } => Err(ChannelError::Refused(reasons)),
            _ => Err(ChannelError::OutOfTurn("another message than a welcome")),
        }
    }

    /// Hears who a source is. It is to be answered with [`Channel::welcome`] or with a refusal.
    ///
    /// # Errors
    ///
    /// It is somebody else, or of another version, which it is told.
    pub fn meet(&mut self) -> Result<Hello, ChannelError> {
        let Message::Hello(hello) =
            self.in_time(|channel| channel.receive_at_most(MOST)?.message())?
        else {
            return Err(ChannelError::OutOfTurn("another message than a greeting"));
        };
        if hello.oldest > PROTOCOL || hello.protocol < OLDEST_PROTOCOL {
            let reason = format!(
                "the source (brume {}) speaks versions {} to {} of the migration protocol, the \
                 target (brume {}) versions {OLDEST_PROTOCOL} to {PROTOCOL}",
                hello.brume,
                hello.oldest,
                hello.protocol,
                env!("CARGO_PKG_VERSION")
            );
            return Err(self.refuse(vec![reason]));
        }
        Ok(hello)
    }

    /// Lets a source go on.
    ///
    /// # Errors
    ///
    /// It has gone.
    pub fn welcome(&mut self, hello: &Hello) -> Result<(), ChannelError> {
        let welcome = Message::Welcome {
            protocol: hello.protocol.min(PROTOCOL),
            brume: env!("CARGO_PKG_VERSION").into(),
        };
        self.in_time(|channel| channel.send(&welcome))?;
        Ok(())
    }

    /// Sends a source away; the error that says so here.
    pub fn refuse(&mut self, reasons: Vec<String>) -> ChannelError {
        let refusal = Message::Refused {
            reasons: reasons.clone(),
        };
        let refused = self.in_time(|channel| channel.send(&refusal));
        // Nothing was agreed on: how this connection ends means nothing.
        self.is_behind = false;
        refused.map_or_else(|error| error, |_| ChannelError::Refused(reasons))
    }
}
