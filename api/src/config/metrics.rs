// SPDX-License-Identifier: Apache-2.0
//! Where metrics go.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A file or named pipe that takes the metrics, a line of JSON each minute and at the end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MetricsConfig {
    /// The file or named pipe.
    #[schema(value_type = String)]
    pub metrics_path: PathBuf,
    /// Whether each line names the machine.
    #[serde(default)]
    pub emit_id: bool,
    /// What each line repeats, for whoever collects the lines of many machines.
    #[serde(default)]
    pub properties: BTreeMap<String, String>,
}
