// SPDX-License-Identifier: Apache-2.0
//! Where the other side is.

use std::fmt::{self, Display, Formatter};
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;

use thiserror::Error;

/// Where a source finds its target, and where a target waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A unix socket, on one host.
    Unix(PathBuf),
    /// TCP.
    Tcp {
        /// A name or an address.
        host: String,
        /// The port.
        port: u16,
    },
    /// A connected socket that the process was started with.
    Fd(RawFd),
}

/// A text that is no address.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "\"{0}\" is no place to move a machine to: write unix:PATH, tcp:HOST:PORT (an IPv6 address in \
     brackets), or fd:NUMBER"
)]
pub struct AddressError(String);

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let error = || AddressError(text.into());
        let (kind, rest) = text.split_once(':').ok_or_else(error)?;
        match kind {
            "unix" if !rest.is_empty() => Ok(Self::Unix(rest.into())),
            "tcp" => {
                let (host, port) = rest.rsplit_once(':').ok_or_else(error)?;
                let bare = host
                    .strip_prefix('[')
                    .and_then(|host| host.strip_suffix(']'));
                let host = bare.unwrap_or(host);
                if host.is_empty() || (bare.is_none() && host.contains(':')) {
                    return Err(error());
                }
                Ok(Self::Tcp {
                    host: host.into(),
                    port: port.parse().map_err(|_| error())?,
                })
            }
            "fd" => match rest.parse() {
                Ok(fd @ 0..) => Ok(Self::Fd(fd)),
                _ => Err(error()),
            },
            _ => Err(error()),
        }
    }
}

impl Display for Address {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(formatter, "unix:{}", path.display()),
            Self::Tcp { host, port } if host.contains(':') => {
                write!(formatter, "tcp:[{host}]:{port}")
            }
            Self::Tcp { host, port } => write!(formatter, "tcp:{host}:{port}"),
            Self::Fd(fd) => write!(formatter, "fd:{fd}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        for text in [
            "unix:/run/a.sock",
            "tcp:hostb:7000",
            "tcp:[::1]:7000",
            "fd:7",
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "unix:",
            "tcp:a",
            "tcp::1",
            "tcp:::1:7",
            "tcp:a:99999",
            "fd:-1",
            "x:y",
        ] {
            assert_eq!(text.parse::<Address>(), Err(AddressError(text.into())));
        }
    }
}
