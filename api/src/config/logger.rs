// SPDX-License-Identifier: Apache-2.0
//! Where the log goes and what it holds.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How much is logged: everything up to the level.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub enum Level {
    /// Nothing.
    Off,
    /// What ended the machine or a device.
    Error,
    /// What went wrong and was survived.
    Warning,
    /// What happened.
    #[default]
    Info,
    /// What a developer wants to know.
    Debug,
    /// Everything.
    Trace,
}

impl Level {
    /// The level of that name; case does not matter, and `warn` is `warning`.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name.to_ascii_lowercase().as_str() {
            "off" => Self::Off,
            "error" => Self::Error,
            "warning" | "warn" => Self::Warning,
            "info" => Self::Info,
            "debug" => Self::Debug,
            "trace" => Self::Trace,
            _ => return None,
        })
    }
}

impl<'de> Deserialize<'de> for Level {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        let names = &["Off", "Trace", "Debug", "Info", "Warning", "Error"];
        Self::from_name(&name).ok_or_else(|| serde::de::Error::unknown_variant(&name, names))
    }
}

/// The log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Logger {
    /// The file or named pipe it is written to.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub log_path: Option<PathBuf>,
    /// How much is written.
    #[serde(default)]
    pub level: Option<Level>,
    /// Whether each line names its level.
    #[serde(default)]
    pub show_level: Option<bool>,
    /// Whether each line names the file and line it comes from.
    #[serde(default)]
    pub show_log_origin: Option<bool>,
    /// Only lines from this module are written.
    #[serde(default)]
    pub module: Option<String>,
}
