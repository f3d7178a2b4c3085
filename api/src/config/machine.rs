// SPDX-License-Identifier: Apache-2.0
//! vCPUs and memory.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ConfigError;

/// The most vCPUs a machine can have.
pub const MAX_VCPUS: u8 = 32;

/// The largest memory in MiB: 4 TiB.
const MAX_MEMORY_MIB: u64 = 4 << 20;

/// What the guest's memory is backed with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum HugePages {
    /// Ordinary pages.
    #[default]
    None,
    /// Huge pages where the host finds some.
    Transparent,
    /// Reserved pages of 2 MiB; the host must have enough of them.
    #[serde(rename = "2M")]
    Size2M,
}

impl HugePages {
    /// What the size of the memory is a multiple of, in MiB.
    fn unit_mib(self) -> u64 {
        match self {
            Self::None => 1,
            Self::Transparent | Self::Size2M => 2,
        }
    }
}

/// Firecracker's own CPU templates for x86-64, which it has deprecated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[expect(missing_docs, reason = "they are named after machines")]
pub enum CpuTemplate {
    C3,
    T2,
    T2S,
    None,
    T2CL,
    T2A,
}

impl CpuTemplate {
    /// Whether `template` changes nothing.
    #[expect(clippy::ref_option, reason = "serde calls it so")]
    fn is_none(template: &Option<Self>) -> bool {
        matches!(template, None | Some(Self::None))
    }
}

/// The machine itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Number of vCPUs: 1 to 32.
    #[schema(minimum = 1, maximum = 32)]
    pub vcpu_count: u8,
    /// Memory in MiB; an even number with huge pages.
    #[schema(minimum = 1, maximum = 4_194_304)]
    pub mem_size_mib: u64,
    /// Whether two vCPUs are the threads of one core.
    #[serde(default, deserialize_with = "super::null_as_default")]
    #[schema(value_type = Option<bool>)]
    pub smt: bool,
    /// A CPU template; not supported yet, except for `None`.
    #[serde(default, skip_serializing_if = "CpuTemplate::is_none")]
    #[schema(deprecated)]
    pub cpu_template: Option<CpuTemplate>,
    /// Whether writes to memory are tracked from the start.
    #[serde(default, deserialize_with = "super::null_as_default")]
    #[schema(value_type = Option<bool>)]
    pub track_dirty_pages: bool,
    /// What the memory is backed with.
    #[serde(default, deserialize_with = "super::null_as_default")]
    #[schema(value_type = Option<HugePages>)]
    pub huge_pages: HugePages,
    /// brume only: whether the memory is a file without a name, which another process of this host
    /// can be given, so that a machine that moves there over a unix socket, without TLS, is not copied.
    /// Not with reserved pages.
    #[serde(
        default,
        deserialize_with = "super::null_as_default",
        skip_serializing_if = "std::ops::Not::not"
    )]
    #[schema(value_type = Option<bool>)]
    pub shared_memory: bool,
}

/// A change of the machine: what is left out stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MachineConfigPatch {
    /// Number of vCPUs: 1 to 32.
    #[schema(minimum = 1, maximum = 32)]
    pub vcpu_count: Option<u8>,
    /// Memory in MiB.
    #[schema(minimum = 1, maximum = 4_194_304)]
    pub mem_size_mib: Option<u64>,
    /// Whether two vCPUs are the threads of one core.
    pub smt: Option<bool>,
    /// A CPU template; not supported yet, except for `None`.
    #[schema(deprecated)]
    pub cpu_template: Option<CpuTemplate>,
    /// Whether writes to memory are tracked from the start.
    pub track_dirty_pages: Option<bool>,
    /// What the memory is backed with.
    pub huge_pages: Option<HugePages>,
    /// brume only: whether another process of this host can be given the memory.
    pub shared_memory: Option<bool>,
}

impl MachineConfigPatch {
    /// Makes the change.
    pub(super) fn apply(self, config: &mut MachineConfig) {
        fn set<T>(to: &mut T, from: Option<T>) {
            if let Some(value) = from {
                *to = value;
            }
        }
        set(&mut config.vcpu_count, self.vcpu_count);
        set(&mut config.mem_size_mib, self.mem_size_mib);
        set(&mut config.smt, self.smt);
        set(&mut config.track_dirty_pages, self.track_dirty_pages);
        set(&mut config.huge_pages, self.huge_pages);
        set(&mut config.shared_memory, self.shared_memory);
        if self.cpu_template.is_some() {
            config.cpu_template = self.cpu_template;
        }
    }
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            cpu_template: None,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
            shared_memory: false,
        }
    }
}

impl MachineConfig {
    /// Checks that such a machine can be.
    ///
    /// # Errors
    ///
    /// Too many or no vCPUs or MiB, or something that is not supported yet.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let vcpus = self.vcpu_count;
        if !(1..=MAX_VCPUS).contains(&vcpus) {
            return Err(ConfigError::VcpuCount(vcpus));
        }
        if self.smt && vcpus != 1 && !vcpus.is_multiple_of(2) {
            return Err(ConfigError::OddSmt(vcpus));
        }
        let whole = self.mem_size_mib.is_multiple_of(self.huge_pages.unit_mib());
        if !whole || !(1..=MAX_MEMORY_MIB).contains(&self.mem_size_mib) {
            return Err(ConfigError::MemorySize);
        }
        if self.shared_memory && self.huge_pages == HugePages::Size2M {
            return Err(ConfigError::SharedHugePages);
        }
        match self.cpu_template {
            None | Some(CpuTemplate::None) => Ok(()),
            Some(template) => Err(ConfigError::CpuTemplate(template)),
        }
    }

    /// Memory in bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.mem_size_mib << 20
    }
}
