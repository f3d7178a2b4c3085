// SPDX-License-Identifier: Apache-2.0
//! What can be changed on the devices of a running machine.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{ConfigError, Drive, NetworkInterface, RateLimiter};

/// Changes of a drive; what is left out stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DrivePatch {
    /// Which drive.
    #[schema(pattern = "^[A-Za-z0-9_]+$")]
    pub drive_id: String,
    /// Another image, or the same one after its size has changed.
    #[serde(default)]
    #[schema(value_type = Option<String>, min_length = 1)]
    pub path_on_host: Option<PathBuf>,
    /// Other limits.
    #[serde(default, deserialize_with = "super::object::object")]
    pub rate_limiter: Option<RateLimiter>,
}

impl DrivePatch {
    /// Makes the changes in a drive's description.
    ///
    /// # Errors
    ///
    /// The drive cannot be as it would be described then; it stays as it was.
    pub fn apply(&self, drive: &mut Drive) -> Result<(), ConfigError> {
        let mut next = drive.clone();
        if let Some(path) = &self.path_on_host {
            next.path_on_host = Some(path.clone());
        }
        if let Some(patch) = self.rate_limiter {
            next.rate_limiter = RateLimiter::patched(next.rate_limiter, patch);
        }
        next.validate()?;
        *drive = next;
        Ok(())
    }
}

/// Changes of a network interface; what is left out stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterfacePatch {
    /// Which interface.
    #[schema(pattern = "^[A-Za-z0-9_]+$")]
    pub iface_id: String,
    /// Other limits on what the guest receives.
    #[serde(default, deserialize_with = "super::object::object")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Other limits on what the guest sends.
    #[serde(default, deserialize_with = "super::object::object")]
    pub tx_rate_limiter: Option<RateLimiter>,
}

impl NetworkInterfacePatch {
    /// Makes the changes in an interface's description.
    pub fn apply(&self, interface: &mut NetworkInterface) {
        let change = |current: &mut Option<RateLimiter>, patch: Option<RateLimiter>| {
            if let Some(patch) = patch {
                *current = RateLimiter::patched(*current, patch);
            }
        };
        change(&mut interface.rx_rate_limiter, self.rx_rate_limiter);
        change(&mut interface.tx_rate_limiter, self.tx_rate_limiter);
    }
}
