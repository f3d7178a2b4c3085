// SPDX-License-Identifier: Apache-2.0
//! A disk.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{ConfigError, RateLimiter, check_id};

/// What becomes of a guest's flush.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum CacheType {
    /// There is none: what the guest wrote may be lost if the host fails.
    #[default]
    Unsafe,
    /// What was written before it is on the disk when it ends.
    Writeback,
}

/// How the host's file is read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum IoEngine {
    /// Many at a time, by io_uring.
    Async,
    /// One request after the other.
    #[default]
    Sync,
}

/// A virtio block device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Its name; also the serial number that the guest sees.
    #[schema(pattern = "^[A-Za-z0-9_]+$")]
    pub drive_id: String,
    /// The UUID of the partition that holds the root file system, if it is not the whole disk.
    #[serde(default)]
    #[schema(pattern = "^[0-9A-Fa-f-]+$")]
    pub partuuid: Option<String>,
    /// Whether the kernel mounts it as root.
    pub is_root_device: bool,
    /// What becomes of flushes.
    #[serde(default, deserialize_with = "super::null_as_default")]
    #[schema(value_type = Option<CacheType>)]
    pub cache_type: CacheType,
    /// Whether the guest can write to it.
    #[serde(default, deserialize_with = "super::null_as_default")]
    #[schema(value_type = Option<bool>)]
    pub is_read_only: bool,
    /// The file or block device behind it.
    #[serde(default)]
    #[schema(value_type = Option<String>, min_length = 1)]
    pub path_on_host: Option<PathBuf>,
    /// Limits on the traffic.
    #[serde(default, deserialize_with = "super::object::object")]
    pub rate_limiter: Option<RateLimiter>,
    /// How the file is accessed.
    #[serde(default, deserialize_with = "super::null_as_default")]
    #[schema(value_type = Option<IoEngine>)]
    pub io_engine: IoEngine,
    /// The socket of a vhost-user back end; not supported yet.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub socket: Option<PathBuf>,
    /// brume only: lock the file, so that no two machines write it at a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lock: Option<bool>,
}

impl Drive {
    /// Checks the drive by itself.
    ///
    /// # Errors
    ///
    /// It names no file, has a bad id, or asks for what is not there yet.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check_id("drive_id", &self.drive_id)?;
        if self.socket.is_some() {
            return Err(ConfigError::Unsupported("socket"));
        }
        if self
            .path_on_host
            .as_ref()
            .is_none_or(|path| path.as_os_str().is_empty())
        {
            return Err(ConfigError::NoDrivePath(self.drive_id.clone()));
        }
        // It goes to the kernel's command line, where a space would begin another argument.
        let is_uuid = |text: &str| text.chars().all(|c| c.is_ascii_hexdigit() || c == '-');
        match &self.partuuid {
            Some(partuuid) if partuuid.is_empty() || !is_uuid(partuuid) => {
                let (drive, partuuid) = (self.drive_id.clone(), partuuid.clone());
                Err(ConfigError::PartUuid { drive, partuuid })
            }
            _ => Ok(()),
        }
    }
}
