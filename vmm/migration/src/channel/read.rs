// SPDX-License-Identifier: Apache-2.0
//! Reading from a connection, and what its errors mean.

use std::io::{self, ErrorKind, Read};

use super::ChannelError;

/// Bytes that have not come.
#[derive(Debug)]
pub(super) enum ReadError {
    /// The end came in place of the first of them.
    End,
    /// An error came in place of the first of them.
    Failed(io::Error),
    /// An error, or the end, came after some of them.
    Inside(io::Error),
}

/// Fills `buffer`. Only if it is the begin of a frame can there be a [`ReadError::End`] that is in
/// order, and an error after which reading can go on.
pub(super) fn read_exact(
    from: &mut impl Read,
    buffer: &mut [u8],
    begins: bool,
) -> Result<(), ReadError> {
    let mut rest = buffer;
    let mut nothing_yet = begins;
    while !rest.is_empty() {
        let error = match from.read(rest) {
            Ok(0) if nothing_yet => return Err(ReadError::End),
            Ok(0) => ErrorKind::UnexpectedEof.into(),
            Ok(count) => {
                nothing_yet = false;
                rest = rest.get_mut(count..).unwrap_or_default();
                continue;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => error,
        };
        return Err(if nothing_yet {
            ReadError::Failed(error)
        } else {
            ReadError::Inside(error)
        });
    }
    Ok(())
}

/// What an error inside of a frame means.
pub(super) fn inside(error: io::Error) -> ChannelError {
    if is_timeout(&error) {
        ChannelError::TimedOut
    } else {
        ChannelError::Lost(error)
    }
}

/// Whether our own limit has passed. The kernel's own, after which a TCP connection is dead, is
/// another one.
pub(super) fn is_timeout(error: &io::Error) -> bool {
    match error.kind() {
        ErrorKind::WouldBlock => true,
        ErrorKind::TimedOut => error.raw_os_error() != Some(libc::ETIMEDOUT),
        _ => false,
    }
}
