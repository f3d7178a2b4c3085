// SPDX-License-Identifier: Apache-2.0
//! Joining a TAP to a bridge of the host.

use std::io;

use thiserror::Error;

use super::interface::{Control, is_valid_name};
use super::tap::Tap;

/// Why a TAP did not join a bridge.
#[derive(Debug, Error)]
pub enum BridgeError {
    /// No interface can be called that.
    #[error("{0:?} cannot be the name of a bridge: 1 to 15 bytes without '/', ':', '%' or blanks")]
    Name(String),
    /// There is no such interface.
    #[error("there is no bridge {name}: create it with `ip link add {name} type bridge`")]
    Missing {
        /// The name that was asked for.
        name: String,
    },
    /// The interface is of another kind.
    #[error("{name} is not a bridge, but another kind of interface")]
    NotABridge {
        /// Its name.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// It takes more than we may do.
    #[error("no permission to join TAP {tap} to bridge {name}: it takes CAP_NET_ADMIN")]
    Permission {
        /// The bridge's name.
        name: String,
        /// The TAP's name.
        tap: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The TAP has a bridge.
    #[error("TAP {tap} cannot join bridge {name}: it is in a bridge already")]
    Joined {
        /// The bridge's name.
        name: String,
        /// The TAP's name.
        tap: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Something else was refused.
    #[error("TAP {tap} cannot join bridge {name}")]
    Refused {
        /// The bridge's name.
        name: String,
        /// The TAP's name.
        tap: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Makes `tap` a port of the bridge called `bridge`, until the TAP is removed.
///
/// # Errors
///
/// There is no such bridge, or it does not take the TAP.
pub fn join_bridge(bridge: &str, tap: &Tap) -> Result<(), BridgeError> {
    if !is_valid_name(bridge) {
        return Err(BridgeError::Name(bridge.to_owned()));
    }
    let names = || (bridge.to_owned(), tap.name().to_owned());
    let refused = |source| {
        let (name, tap) = names();
        BridgeError::Refused { name, tap, source }
    };
    let control = Control::new().map_err(refused)?;
    if control.index(bridge).is_err() {
        let name = bridge.to_owned();
        return Err(BridgeError::Missing { name });
    }
    let index = control.index(tap.name()).map_err(refused)?;
    control.add_to_bridge(bridge, index).map_err(|source| {
        let (name, tap) = names();
        match source.raw_os_error() {
            // Which of these it is depends on what the interface is instead.
            Some(libc::EOPNOTSUPP | libc::ENOPKG | libc::ENOTTY | libc::EINVAL) => {
                BridgeError::NotABridge { name, source }
            }
            Some(libc::EPERM | libc::EACCES) => BridgeError::Permission { name, tap, source },
            Some(libc::EBUSY) => BridgeError::Joined { name, tap, source },
            _ => BridgeError::Refused { name, tap, source },
        }
    })
}
