// SPDX-License-Identifier: Apache-2.0
//! What a machine that comes from elsewhere is to have otherwise here: the arguments that
//! `brume restore`, `brume clone` and `brume receive` share.

use std::str::FromStr;

use brume_api::{DriveOverride, NetworkOverride, VsockOverride};
use clap::Args;

use crate::exit::Failure;

/// What a name that was given stands for.
pub(crate) type Rename<'a> = &'a dyn Fn(&str) -> Result<String, Failure>;

/// Other TAPs, sockets and files than those that the machine had.
#[derive(Args)]
pub(crate) struct OverrideArgs {
    /// The TAP of a network interface, if it is not to be the one that it had; may be given
    /// several times
    #[arg(long, value_name = "ID=TAP")]
    net: Vec<Named>,
    /// The unix socket of the socket device, if it is not to be the one that it had
    #[arg(long, value_name = "PATH")]
    vsock: Option<String>,
    /// The file of a disk, if it is not to be the one that it had: it has to hold the same, unless
    /// its contents come along; may be given several times
    #[arg(long, value_name = "ID=FILE")]
    disk: Vec<Named>,
}

/// The same, in the words of the API.
pub(crate) struct Overrides {
    pub(crate) network: Vec<NetworkOverride>,
    pub(crate) vsock: Option<VsockOverride>,
    pub(crate) drives: Vec<DriveOverride>,
}

impl OverrideArgs {
    /// Names that must be others in each machine go through `own`, those that machines can share
    /// through `shared`.
    ///
    /// # Errors
    ///
    /// An id is there twice, or a name is refused.
    pub(crate) fn named(&self, own: Rename<'_>, shared: Rename<'_>) -> Result<Overrides, Failure> {
        differ("--net", &self.net)?;
        differ("--disk", &self.disk)?;
        let network = self.net.iter().map(|net| {
            Ok(NetworkOverride {
                iface_id: net.id.clone(),
                host_dev_name: own(&net.value)?,
            })
        });
        let drives = self.disk.iter().map(|disk| {
            Ok(DriveOverride {
                drive_id: disk.id.clone(),
                path_on_host: shared(&disk.value)?.into(),
            })
        });
        let vsock = self.vsock.as_deref().map(own).transpose()?;
        Ok(Overrides {
            network: network.collect::<Result<_, Failure>>()?,
            vsock: vsock.map(|path| VsockOverride {
                uds_path: path.into(),
            }),
            drives: drives.collect::<Result<_, Failure>>()?,
        })
    }
}

/// What belongs to a device, as `ID=VALUE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Named {
    id: String,
    value: String,
}

impl FromStr for Named {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('=') {
            Some((id, value)) if !id.is_empty() && !value.is_empty() => Ok(Self {
                id: id.into(),
                value: value.into(),
            }),
            _ => Err("write the id of the device, `=`, and what is to be behind it"),
        }
    }
}

/// Sees to it that no id is there twice.
fn differ(flag: &str, all: &[Named]) -> Result<(), Failure> {
    for (index, named) in all.iter().enumerate() {
        if all.iter().skip(index + 1).any(|other| other.id == named.id) {
            let text = format!("{flag} names `{}` twice", named.id);
            return Err(Failure::Arguments(text));
        }
    }
    Ok(())
}
