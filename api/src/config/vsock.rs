// SPDX-License-Identifier: Apache-2.0
//! The socket device.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ConfigError;

/// CIDs below this one, and the highest, stand for something else than a guest.
const MIN_GUEST_CID: u32 = 3;

/// A virtio socket device, whose host side is unix sockets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// Deprecated: there is one device, and its name means nothing.
    #[serde(default, skip_serializing_if = "hidden")]
    #[schema(deprecated)]
    pub vsock_id: Option<String>,
    /// The guest's address: 3 to 2^32 - 2.
    #[schema(format = Int64, minimum = 3, maximum = 4_294_967_294u32)]
    pub guest_cid: u32,
    /// The unix socket that programs on the host connect to; nothing may be there yet. The guest's
    /// connections to port P go to this path with `_P` behind it.
    #[schema(value_type = String)]
    pub uds_path: PathBuf,
}

/// Firecracker does not show the name either.
fn hidden(_: &Option<String>) -> bool {
    true
}

impl Vsock {
    /// Checks the device by itself.
    ///
    /// # Errors
    ///
    /// The CID is none for a guest.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if (MIN_GUEST_CID..u32::MAX).contains(&self.guest_cid) {
            return Ok(());
        }
        Err(ConfigError::GuestCid(self.guest_cid))
    }
}
