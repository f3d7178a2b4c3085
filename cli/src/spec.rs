// SPDX-License-Identifier: Apache-2.0
//! `--disk` and `--net`: a device in one argument, as `VALUE,KEY=VALUE,FLAG`.

use std::path::PathBuf;
use std::str::FromStr;

use brume_api::config::{CacheType, Drive, IoEngine, NetworkInterface};

/// A disk, its id still open.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct DiskSpec(Drive);

/// A network interface, its id still open.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct NetSpec(NetworkInterface);

impl DiskSpec {
    /// Whether the kernel mounts it as root.
    pub(crate) fn is_root(&self) -> bool {
        self.0.is_root_device
    }

    /// The drive, called `disk{index}` if it was not given a name.
    pub(crate) fn into_drive(mut self, index: usize) -> Drive {
        name(&mut self.0.drive_id, "disk", index);
        self.0
    }
}

impl NetSpec {
    /// The interface, called `eth{index}` if it was not given a name.
    pub(crate) fn into_interface(mut self, index: usize) -> NetworkInterface {
        name(&mut self.0.iface_id, "eth", index);
        self.0
    }
}

fn name(id: &mut String, kind: &str, index: usize) {
    if id.is_empty() {
        *id = format!("{kind}{index}");
    }
}

impl FromStr for DiskSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.split(',');
        let path = parts
            .next()
            .filter(|path| !path.is_empty())
            .ok_or("the file is missing")?;
        let mut drive = Drive {
            path_on_host: Some(PathBuf::from(path)),
            // What a person at the command line expects of a disk.
            cache_type: CacheType::Writeback,
            lock: Some(true),
            ..Drive::default()
        };
        for part in parts {
            match part.split_once('=').unwrap_or((part, "")) {
                ("root", "") => drive.is_root_device = true,
                ("ro", "") => drive.is_read_only = true,
                ("nolock", "") => drive.lock = Some(false),
                ("engine", "sync") => drive.io_engine = IoEngine::Sync,
                ("engine", "async") => drive.io_engine = IoEngine::Async,
                ("cache", "writeback") => drive.cache_type = CacheType::Writeback,
                ("cache", "unsafe") => drive.cache_type = CacheType::Unsafe,
                ("id", id) if !id.is_empty() => drive.drive_id = id.into(),
                ("partuuid", uuid) if !uuid.is_empty() => drive.partuuid = Some(uuid.into()),
                _ => return Err(unknown(part)),
            }
        }
        Ok(Self(drive))
    }
}

impl FromStr for NetSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut net = NetworkInterface::default();
        for part in text.split(',') {
            match part.split_once('=').unwrap_or((part, "")) {
                (_, "") => return Err(unknown(part)),
                ("tap", tap) => net.host_dev_name = Some(tap.into()),
                ("bridge", bridge) => net.bridge = Some(bridge.into()),
                ("mac", mac) => net.guest_mac = Some(mac.into()),
                ("mtu", mtu) => net.mtu = Some(mtu.parse().map_err(|_| unknown(part))?),
                ("id", id) => net.iface_id = id.into(),
                _ => return Err(unknown(part)),
            }
        }
        if net.host_dev_name.is_some() == net.bridge.is_some() {
            return Err("give either tap=NAME or bridge=NAME".into());
        }
        Ok(Self(net))
    }
}

fn unknown(part: &str) -> String {
    format!("`{part}` is not understood")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_what_was_written() {
        let disk: DiskSpec = "a.img,root,ro,engine=async,cache=unsafe,id=x,nolock"
            .parse()
            .unwrap();
        let drive = disk.into_drive(3);
        assert_eq!(drive.path_on_host, Some("a.img".into()));
        assert!(drive.is_root_device && drive.is_read_only);
        assert_eq!(
            (drive.io_engine, drive.cache_type),
            (IoEngine::Async, CacheType::Unsafe)
        );
        assert_eq!((drive.drive_id.as_str(), drive.lock), ("x", Some(false)));
    }

    #[test]
    fn a_plain_disk_is_safe_and_numbered() {
        let drive = "a.img".parse::<DiskSpec>().unwrap().into_drive(3);
        assert_eq!(
            (drive.cache_type, drive.lock),
            (CacheType::Writeback, Some(true))
        );
        assert_eq!(drive.drive_id, "disk3");
        drive.validate().unwrap();
    }

    #[test]
    fn an_interface_is_what_was_written() {
        let net: NetSpec = "bridge=br0,mac=06:00:00:00:00:01,mtu=1400".parse().unwrap();
        let net = net.into_interface(0);
        assert_eq!((net.bridge.as_deref(), net.mtu), (Some("br0"), Some(1400)));
        assert_eq!(net.iface_id, "eth0");
        net.validate().unwrap();
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for text in ["", ",root", "a,roots", "a,root=1", "a,engine=fast", "a,id="] {
            assert!(text.parse::<DiskSpec>().is_err(), "{text}");
        }
        for text in [
            "",
            "br0",
            "tap=",
            "tap=a,bridge=b",
            "mac=06:00:00:00:00:01",
            "tap=a,mtu=x",
        ] {
            assert!(text.parse::<NetSpec>().is_err(), "{text}");
        }
        assert!(
            "a,roots"
                .parse::<DiskSpec>()
                .unwrap_err()
                .contains("`roots`")
        );
    }
}
