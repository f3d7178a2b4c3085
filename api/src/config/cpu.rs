// SPDX-License-Identifier: Apache-2.0
//! Changes to what the guest sees of its CPUs: Firecracker's custom CPU templates for x86-64.

mod bits;

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

pub use bits::BitMask;

use super::FILE_LIMIT;

/// A CPU template.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    /// Capabilities that KVM must have, or need not have.
    #[serde(default)]
    #[schema(value_type = Option<Vec<String>>)]
    pub kvm_capabilities: Vec<KvmCapability>,
    /// Changes to CPUID leaves.
    #[serde(default)]
    pub cpuid_modifiers: Vec<CpuidModifier>,
    /// Changes to model-specific registers.
    #[serde(default)]
    pub msr_modifiers: Vec<MsrModifier>,
}

impl CpuConfig {
    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A capability of KVM, by its number; with a `!` before it, it is not asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvmCapability {
    /// It must be there.
    Add(u32),
    /// It need not be there.
    Remove(u32),
}

/// Changes to a CPUID leaf.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CpuidModifier {
    /// EAX of the request.
    #[serde(with = "bits::number")]
    #[schema(value_type = String, pattern = "^0[bx][0-9a-fA-F]+$")]
    pub leaf: u32,
    /// ECX of the request.
    #[serde(with = "bits::number")]
    #[schema(value_type = String, pattern = "^0[bx][0-9a-fA-F]+$")]
    pub subleaf: u32,
    /// The leaf's `KVM_CPUID_FLAG_`s.
    pub flags: u32,
    /// What changes.
    pub modifiers: Vec<RegisterModifier>,
}

/// Changes to a register of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RegisterModifier {
    /// The register.
    #[serde(deserialize_with = "register")]
    pub register: CpuidRegister,
    /// Its bits.
    #[schema(value_type = String, pattern = "^(0b)?[01x_]*$")]
    pub bitmap: BitMask<u32>,
}

/// A register of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "they are called so")]
pub enum CpuidRegister {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Changes to a model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MsrModifier {
    /// Which one.
    #[serde(with = "bits::number")]
    #[schema(value_type = String, pattern = "^0[bx][0-9a-fA-F]+$")]
    pub addr: u32,
    /// Its bits.
    #[schema(value_type = String, pattern = "^(0b)?[01x_]*$")]
    pub bitmap: BitMask<u64>,
}

impl Serialize for KvmCapability {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Add(number) => serializer.collect_str(number),
            Self::Remove(number) => serializer.collect_str(&format_args!("!{number}")),
        }
    }
}

impl<'de> Deserialize<'de> for KvmCapability {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let (number, make): (_, fn(u32) -> Self) = match text.strip_prefix('!') {
            Some(number) => (number, Self::Remove),
            None => (text.as_str(), Self::Add),
        };
        number.parse().map(make).map_err(|error| {
            D::Error::custom(format!(
                "Failed to parse string [{text}] as a kvm capability - can not convert to \
                 numeric: {error}"
            ))
        })
    }
}

fn register<'de, D: Deserializer<'de>>(deserializer: D) -> Result<CpuidRegister, D::Error> {
    match String::deserialize(deserializer)?.as_str() {
        "eax" => Ok(CpuidRegister::Eax),
        "ebx" => Ok(CpuidRegister::Ebx),
        "ecx" => Ok(CpuidRegister::Ecx),
        "edx" => Ok(CpuidRegister::Edx),
        _ => Err(D::Error::custom(
            "Invalid CPUID register. Must be one of [eax, ebx, ecx, edx]",
        )),
    }
}

/// Reads a template from a configuration file, which has it inline or names a file that has it.
pub(super) fn inline_or_path<'de, D>(deserializer: D) -> Result<Option<CpuConfig>, D::Error>
where
    D: Deserializer<'de>,
{
    struct Template;

    impl<'de> Visitor<'de> for Template {
        type Value = Option<CpuConfig>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a CPU template or the path of one")
        }

        fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_str<E: Error>(self, path: &str) -> Result<Self::Value, E> {
            let read = read(Path::new(path)).and_then(|text| Ok(serde_json::from_str(&text)?));
            read.map(Some)
                .map_err(|error| E::custom(format!("the CPU template {path}: {error}")))
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
            CpuConfig::deserialize(MapAccessDeserializer::new(map)).map(Some)
        }
    }

    deserializer.deserialize_any(Template)
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    if !path.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    File::open(path)?
        .take(FILE_LIMIT)
        .read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests;
