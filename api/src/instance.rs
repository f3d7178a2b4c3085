// SPDX-License-Identifier: Apache-2.0
//! What a machine says of itself.

use serde::Serialize;
use utoipa::ToSchema;

/// The answer to GET /.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct InstanceInfo {
    /// The program that clients take it for: `Firecracker`.
    pub app_name: &'static str,
    /// The machine's name.
    pub id: String,
    /// What the machine is doing: `Not started`, `Running`, `Paused` or `Stopped`.
    #[schema(pattern = "^(Not started|Running|Paused|Stopped)$")]
    pub state: &'static str,
    /// The version of Firecracker whose interface this is.
    pub vmm_version: &'static str,
}

/// The answer to GET /version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct VersionInfo {
    /// The version of Firecracker whose interface this is.
    pub firecracker_version: &'static str,
}
