// SPDX-License-Identifier: Apache-2.0
//! The configuration of one machine, and the file that holds it.

mod apply;
mod balloon;
mod boot_source;
mod cpu;
mod drive;
mod entropy;
mod error;
mod logger;
mod machine;
mod metrics;
mod mmds;
mod network;
mod object;
mod patch;
mod rate_limiter;
mod serial;
mod vsock;

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

pub use balloon::Balloon;
pub use boot_source::BootSource;
pub use cpu::{
    BitMask, CpuConfig, CpuidModifier, CpuidRegister, KvmCapability, MsrModifier, RegisterModifier,
};
pub use drive::{CacheType, Drive, IoEngine};
pub use entropy::Entropy;
pub use error::{ConfigError, ConfigFileError};
pub use logger::{Level, Logger};
pub use machine::{CpuTemplate, HugePages, MAX_VCPUS, MachineConfig, MachineConfigPatch};
pub use metrics::MetricsConfig;
pub use mmds::{MmdsConfig, MmdsConfigError, MmdsVersion};
pub use network::NetworkInterface;
pub use patch::{DrivePatch, NetworkInterfacePatch};
pub use rate_limiter::{RateLimiter, TokenBucket};
pub use serial::Serial;
pub use vsock::Vsock;

pub(crate) use object::{object, objects};

/// The largest configuration file that is read, in bytes.
const FILE_LIMIT: u64 = 1 << 20;

/// Everything a machine is made from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct VmConfig {
    /// Kernel, initrd and command line.
    #[schema(value_type = Option<BootSource>)]
    pub boot_source: BootSource,
    /// Disks, in the order in which the guest finds them; a root disk comes first.
    pub drives: Vec<Drive>,
    /// vCPUs and memory.
    #[serde(default)]
    pub machine_config: MachineConfig,
    /// What the guest sees of its CPUs.
    #[serde(default, deserialize_with = "cpu::inline_or_path")]
    pub cpu_config: Option<CpuConfig>,
    /// Network interfaces.
    #[serde(default, deserialize_with = "null_as_default")]
    pub network_interfaces: Vec<NetworkInterface>,
    /// A balloon for memory.
    #[serde(default)]
    pub balloon: Option<Balloon>,
    /// A source of random bytes.
    #[serde(default)]
    pub entropy: Option<Entropy>,
    /// The socket device.
    #[serde(default)]
    pub vsock: Option<Vsock>,
    /// The metadata service.
    #[serde(default)]
    pub mmds_config: Option<MmdsConfig>,
    /// Where the log goes.
    #[serde(default)]
    pub logger: Option<Logger>,
    /// Where metrics go.
    #[serde(default)]
    pub metrics: Option<MetricsConfig>,
    /// Where the serial output goes; no key of the file.
    #[serde(skip)]
    pub serial: Option<Serial>,
    /// Keys at the top of the file that mean nothing; Firecracker ignores them too.
    #[serde(skip)]
    pub unknown_keys: Vec<String>,
}

/// Keys of a configuration file that are the fields above.
const KNOWN: [&str; 11] = [
    "balloon",
    "boot-source",
    "cpu-config",
    "drives",
    "entropy",
    "logger",
    "machine-config",
    "metrics",
    "mmds-config",
    "network-interfaces",
    "vsock",
];

/// Keys of a Firecracker configuration file that stand for something which is not there yet.
const UNSUPPORTED: [&str; 2] = ["memory-hotplug", "pmem"];

impl VmConfig {
    /// Reads the file at `path` and checks it.
    ///
    /// # Errors
    ///
    /// The file cannot be read, is no JSON of this form, or describes a machine that cannot be.
    pub fn from_file(path: &Path) -> Result<Self, ConfigFileError> {
        let mut text = String::new();
        File::open(path)
            .and_then(|file| file.take(FILE_LIMIT + 1).read_to_string(&mut text))
            .map_err(|source| ConfigFileError::Read {
                path: path.into(),
                source,
            })?;
        if text.len() as u64 > FILE_LIMIT {
            return Err(ConfigFileError::TooLarge {
                path: path.into(),
                limit: FILE_LIMIT,
            });
        }
        Self::from_json(&text).map_err(|source| ConfigFileError::Content {
            path: path.into(),
            source,
        })
    }

    /// Reads a configuration from JSON and checks it.
    ///
    /// # Errors
    ///
    /// It is no JSON of this form, or describes a machine that cannot be.
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        // Typed straight from the text, so that an error can say in which line it is.
        let mut config: Self = serde_json::from_str(text)?;
        let parts: serde_json::Map<String, Value> = serde_json::from_str(text)?;
        for (key, value) in parts {
            match UNSUPPORTED.iter().find(|&&name| name == key) {
                Some(name) if !is_absent(&value) => return Err(ConfigError::Unsupported(name)),
                None if !KNOWN.contains(&key.as_str()) => config.unknown_keys.push(key),
                _ => {}
            }
        }
        config.validate()?;
        Ok(config)
    }

    /// Checks every part, and the parts against each other.
    ///
    /// # Errors
    ///
    /// The machine cannot be made as it is described.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.machine_config.validate()?;
        if let Some(balloon) = &self.balloon {
            balloon.validate(self.machine_config.mem_size_mib)?;
        }
        self.drives.iter().try_for_each(Drive::validate)?;
        self.network_interfaces
            .iter()
            .try_for_each(NetworkInterface::validate)?;
        self.vsock.as_ref().map_or(Ok(()), Vsock::validate)?;
        if let Some(mmds) = &self.mmds_config {
            mmds.validate(&self.network_interfaces)?;
        }
        if self
            .drives
            .iter()
            .filter(|drive| drive.is_root_device)
            .count()
            > 1
        {
            return Err(ConfigError::TwoRoots);
        }
        unique("drive_id", self.drives.iter().map(|drive| &drive.drive_id))?;
        unique(
            "iface_id",
            self.network_interfaces.iter().map(|net| &net.iface_id),
        )?;
        let macs = self
            .network_interfaces
            .iter()
            .filter_map(|net| net.guest_mac.as_ref());
        let mut macs: Vec<_> = macs.map(|mac| mac.to_ascii_lowercase()).collect();
        macs.sort();
        match macs.iter().zip(macs.iter().skip(1)).find(|(a, b)| a == b) {
            Some((mac, _)) => Err(ConfigError::MacInUse(mac.clone())),
            None => Ok(()),
        }
    }
}

/// Whether a part of a configuration file is as good as left out.
fn is_absent(value: &Value) -> bool {
    value.is_null() || value.as_array().is_some_and(Vec::is_empty)
}

fn unique<'a>(
    field: &'static str,
    ids: impl Iterator<Item = &'a String>,
) -> Result<(), ConfigError> {
    let mut seen = Vec::new();
    for id in ids {
        if seen.contains(&id) {
            return Err(ConfigError::IdInUse {
                field,
                id: id.clone(),
            });
        }
        seen.push(id);
    }
    Ok(())
}

/// Ids are what paths and sockets are named after: letters, digits and `_`.
fn check_id(field: &'static str, id: &str) -> Result<(), ConfigError> {
    let good = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if id.is_empty() || !id.chars().all(good) {
        return Err(ConfigError::BadId {
            field,
            id: id.into(),
        });
    }
    Ok(())
}

/// `null` stands for what is left out.
fn null_as_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests;
