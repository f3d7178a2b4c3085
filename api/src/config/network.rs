// SPDX-License-Identifier: Apache-2.0
//! A network interface.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{ConfigError, RateLimiter, check_id};

/// The smallest MTU that IPv4 allows.
const MIN_MTU: u16 = 68;

/// A virtio network device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// Its name.
    #[schema(pattern = "^[A-Za-z0-9_]+$")]
    pub iface_id: String,
    /// The TAP device on the host.
    #[serde(default)]
    pub host_dev_name: Option<String>,
    /// brume only: instead of a TAP that exists, make one for the life of the machine and join it
    /// to this bridge.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bridge: Option<String>,
    /// The MAC address; the guest makes one up if left out.
    #[serde(default)]
    #[schema(pattern = "^[0-9A-Fa-f][02468ACEace](:[0-9A-Fa-f]{2}){5}$")]
    pub guest_mac: Option<String>,
    /// The MTU that the guest is told, in bytes.
    #[serde(default)]
    #[schema(minimum = 68, maximum = 65_535)]
    pub mtu: Option<u16>,
    /// Limits on what the guest receives.
    #[serde(default, deserialize_with = "super::object::object")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Limits on what the guest sends.
    #[serde(default, deserialize_with = "super::object::object")]
    pub tx_rate_limiter: Option<RateLimiter>,
}

impl NetworkInterface {
    /// Checks the interface by itself.
    ///
    /// # Errors
    ///
    /// It has no host side, or a bad id, MAC or MTU, or asks for what is not there yet.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check_id("iface_id", &self.iface_id)?;
        if self.host_dev_name.is_some() == self.bridge.is_some() {
            return Err(ConfigError::NetworkBackend(self.iface_id.clone()));
        }
        if let Some(mtu) = self.mtu.filter(|&mtu| mtu < MIN_MTU) {
            return Err(ConfigError::Mtu {
                iface: self.iface_id.clone(),
                mtu,
            });
        }
        match &self.guest_mac {
            Some(mac) if parse_mac(mac).is_none_or(|[first, ..]| first & 1 != 0) => {
                Err(ConfigError::Mac {
                    iface: self.iface_id.clone(),
                    mac: mac.clone(),
                })
            }
            _ => Ok(()),
        }
    }

    /// The MAC address in bytes, if there is one.
    pub fn mac(&self) -> Option<[u8; 6]> {
        parse_mac(self.guest_mac.as_deref()?)
    }
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2)?;
        // `from_str_radix` would take a sign.
        part.chars().all(|c| c.is_ascii_hexdigit()).then_some(())?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}
