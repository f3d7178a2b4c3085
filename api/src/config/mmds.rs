// SPDX-License-Identifier: Apache-2.0
//! The metadata service.

use std::net::Ipv4Addr;

use serde::{Deserialize, Deserializer, Serialize};
use thiserror::Error;
use utoipa::ToSchema;

use super::NetworkInterface;

/// Where the guest finds the service if nobody says otherwise.
const DEFAULT_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// How a guest gets at the data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum MmdsVersion {
    /// By asking for it; deprecated.
    #[default]
    V1,
    /// With a session token.
    V2,
}

/// The metadata service, as the guest sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MmdsConfig {
    /// Whether a guest needs a token.
    #[serde(default)]
    pub version: MmdsVersion,
    /// The interfaces on which the guest finds the service, by their ids.
    #[schema(min_items = 1)]
    pub network_interfaces: Vec<String>,
    /// Its address there, a link-local one.
    #[serde(default = "default_address", deserialize_with = "address_or_default")]
    #[schema(value_type = Option<String>, format = Ipv4)]
    pub ipv4_address: Ipv4Addr,
    /// Whether answers have the form of EC2's service whatever the guest asks for.
    #[serde(default)]
    pub imds_compat: bool,
}

/// A metadata service that cannot be. The texts are Firecracker's.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum MmdsConfigError {
    /// It would be nowhere.
    #[error("The list of network interface IDs that allow forwarding MMDS requests is empty.")]
    NoInterface,
    /// It would be on an interface that there is not.
    #[error(
        "The list of network interface IDs provided contains at least one ID that does not correspond to any existing network interface."
    )]
    UnknownInterface,
    /// It would be in the way of another host.
    #[error("The MMDS IPv4 address is not link local.")]
    Address,
}

impl MmdsConfig {
    /// Checks the service against the machine's `interfaces`.
    ///
    /// # Errors
    ///
    /// Its address is not link-local, or its interfaces are not there.
    pub fn validate(&self, interfaces: &[NetworkInterface]) -> Result<(), MmdsConfigError> {
        // The first and the last 256 addresses are reserved (RFC 3927, section 2.1).
        if !matches!(self.ipv4_address.octets(), [169, 254, 1..=254, _]) {
            return Err(MmdsConfigError::Address);
        }
        if self.network_interfaces.is_empty() {
            return Err(MmdsConfigError::NoInterface);
        }
        let exists = |id: &String| interfaces.iter().any(|net| net.iface_id == *id);
        if !self.network_interfaces.iter().all(exists) {
            return Err(MmdsConfigError::UnknownInterface);
        }
        Ok(())
    }

    /// Whether the guest finds the service on the interface `id`.
    pub fn is_on(&self, id: &str) -> bool {
        self.network_interfaces.iter().any(|name| name == id)
    }
}

fn default_address() -> Ipv4Addr {
    DEFAULT_ADDRESS
}

/// `null` stands for what is left out.
fn address_or_default<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Ipv4Addr, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(DEFAULT_ADDRESS))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::VmConfig;
    use super::*;
    use crate::request::Section;

    fn config(json: &str) -> MmdsConfig {
        serde_json::from_str(json).unwrap()
    }

    fn interfaces() -> Vec<NetworkInterface> {
        let interface = |id: &str| NetworkInterface {
            iface_id: id.into(),
            host_dev_name: Some(id.into()),
            ..NetworkInterface::default()
        };
        vec![interface("eth0"), interface("eth1")]
    }

    #[test]
    fn what_is_left_out_has_firecrackers_defaults() {
        for text in [
            r#"{"network_interfaces": ["eth0"]}"#,
            r#"{"network_interfaces": ["eth0"], "ipv4_address": null}"#,
        ] {
            assert_eq!(
                serde_json::to_value(config(text)).unwrap(),
                json!({"version": "V1", "network_interfaces": ["eth0"],
                    "ipv4_address": "169.254.169.254", "imds_compat": false})
            );
        }
    }

    #[test]
    fn wrong_values_are_named() {
        for (text, expected) in [
            ("{}", "missing field `network_interfaces`"),
            (
                r#"{"network_interfaces": [], "version": "foo"}"#,
                "unknown variant `foo`, expected `V1` or `V2`",
            ),
            (
                r#"{"network_interfaces": [], "ipv4_address": "1.2"}"#,
                "invalid IPv4 address syntax",
            ),
            (r#"{"network_interfaces": [], "x": 1}"#, "unknown field `x`"),
        ] {
            let error = serde_json::from_str::<MmdsConfig>(text).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
    }

    #[test]
    fn addresses_are_link_local() {
        for (address, good) in [
            ("169.254.1.0", true),
            ("169.254.254.255", true),
            ("169.254.0.255", false),
            ("169.254.255.0", false),
            ("169.255.1.1", false),
            ("10.0.0.1", false),
        ] {
            let text =
                format!(r#"{{"network_interfaces": ["eth0"], "ipv4_address": "{address}"}}"#);
            let expected = if good {
                Ok(())
            } else {
                Err(MmdsConfigError::Address)
            };
            assert_eq!(config(&text).validate(&interfaces()), expected, "{address}");
        }
    }

    #[test]
    fn interfaces_have_to_be_there() {
        for (ids, expected) in [
            (r#"["eth0", "eth1"]"#, Ok(())),
            ("[]", Err(MmdsConfigError::NoInterface)),
            (
                r#"["eth0", "eth2"]"#,
                Err(MmdsConfigError::UnknownInterface),
            ),
        ] {
            let mmds = config(&format!(r#"{{"network_interfaces": {ids}}}"#));
            assert_eq!(mmds.validate(&interfaces()), expected, "{ids}");
        }
    }

    #[test]
    fn it_is_part_of_a_machine() {
        let mut machine = VmConfig {
            network_interfaces: interfaces(),
            ..VmConfig::default()
        };
        assert_eq!(machine.to_full_json().unwrap()["mmds-config"], json!(null));
        let good = config(r#"{"network_interfaces": ["eth1"], "version": "V2"}"#);
        machine.apply(Section::Mmds(good.clone())).unwrap();
        let bad = config(r#"{"network_interfaces": ["eth2"]}"#);
        machine.apply(Section::Mmds(bad)).unwrap_err();
        assert_eq!(machine.mmds_config, Some(good));
        let shown = machine.to_full_json().unwrap();
        assert_eq!(shown["mmds-config"]["version"], "V2");
        assert_eq!(shown["mmds-config"]["ipv4_address"], "169.254.169.254");
    }
}
