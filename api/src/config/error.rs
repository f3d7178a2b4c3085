// SPDX-License-Identifier: Apache-2.0
//! What can be wrong with a configuration.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::{CpuTemplate, MAX_VCPUS, MmdsConfigError};

/// A configuration that cannot become a machine.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// Not the JSON that was expected; the source says where.
    #[error("the configuration cannot be understood")]
    Json(#[from] serde_json::Error),
    /// More or fewer vCPUs than a machine can have.
    #[error(
        "Machine config error: The number of vCPUs must be greater than 0, less than 32 and must be 1 or an even number if SMT is enabled. {0} were asked for; 1 to {MAX_VCPUS} are possible."
    )]
    VcpuCount(u8),
    /// An odd number of vCPUs cannot be paired to cores.
    #[error(
        "Machine config error: The number of vCPUs must be greater than 0, less than 32 and must be 1 or an even number if SMT is enabled. {0} were asked for."
    )]
    OddSmt(u8),
    /// No memory, or a size beyond all limits.
    #[error(
        "Machine config error: The memory size (MiB) is either 0, or not a multiple of the configured page size."
    )]
    MemorySize,
    /// Memory that is shared and of reserved huge pages.
    #[error(
        "Machine config error: `shared_memory` does not go with reserved huge pages: use \
         `huge_pages` None or Transparent"
    )]
    SharedHugePages,
    /// A static CPU template.
    #[error(
        "the CPU template {0:?} is not supported by this version of brume: leave `cpu_template` \
         out, or set what it changes by `cpu-config`"
    )]
    CpuTemplate(CpuTemplate),
    /// A balloon that is larger than the memory.
    #[error("Balloon config error: Amount of pages requested is too large.")]
    BalloonAmount,
    /// Less memory than the balloon is to take.
    #[error(
        "Machine config error: The memory size (MiB) is smaller than the previously set balloon device target size."
    )]
    MemoryBelowBalloon,
    /// Two drives want to be the root.
    #[error("Drive config error: A root block device already exists!")]
    TwoRoots,
    /// Two devices of a kind have one id.
    #[error("`{field}` \"{id}\" is used twice")]
    IdInUse {
        /// The field.
        field: &'static str,
        /// The id.
        id: String,
    },
    /// An id with characters that ids do not have.
    #[error("`{field}` \"{id}\" is not an id: use letters, digits and `_`")]
    BadId {
        /// The field.
        field: &'static str,
        /// The id.
        id: String,
    },
    /// A drive without a file.
    #[error(
        "Drive config error: Unable to create the virtio block device: Invalid block config. Drive \"{0}\" names no file: set `path_on_host`"
    )]
    NoDrivePath(String),
    /// A partition id that is none.
    #[error("drive \"{drive}\" has the partition id \"{partuuid}\", which is not a UUID")]
    PartUuid {
        /// The drive.
        drive: String,
        /// What was given.
        partuuid: String,
    },
    /// A network interface without a host side, or with two.
    #[error("network interface \"{0}\" needs either `host_dev_name` or `bridge`")]
    NetworkBackend(String),
    /// Not a MAC address.
    #[error(
        "The provided MAC address is invalid. Network interface \"{iface}\" has \"{mac}\": six pairs of hexadecimal digits with colons are wanted, and no multicast address"
    )]
    Mac {
        /// The interface.
        iface: String,
        /// What was given.
        mac: String,
    },
    /// Two network interfaces have one MAC address.
    #[error("Network config error: The MAC address is already in use: {0}")]
    MacInUse(String),
    /// An MTU that no interface has.
    #[error(
        "Network config error: Could not create the network device: MTU {mtu} is out of range [68, 65535] (interface \"{iface}\")"
    )]
    Mtu {
        /// The interface.
        iface: String,
        /// What was given.
        mtu: u16,
    },
    /// A CID that no guest has.
    #[error("Vsock config error: `guest_cid` is {0}; 3 to 4294967294 is possible")]
    GuestCid(u32),
    /// A metadata service that cannot be. Firecracker spells it so.
    #[error("MMMDS config error: {0}")]
    Mmds(#[from] MmdsConfigError),
    /// Something Firecracker has and this version has not.
    #[error("`{0}` is not supported by this version of brume; leave it out")]
    Unsupported(&'static str),
}

/// A configuration file that cannot be used.
#[derive(Debug, Error)]
pub enum ConfigFileError {
    /// It cannot be read.
    #[error("the configuration file {} cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is too large to be one.
    #[error("the configuration file {} has more than {limit} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The limit in bytes.
        limit: u64,
    },
    /// What it says is wrong.
    #[error("the configuration file {} is not valid", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ConfigError,
    },
}
