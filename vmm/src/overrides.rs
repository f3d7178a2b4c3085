// SPDX-License-Identifier: Apache-2.0
//! What a machine that comes from elsewhere, from files or from another process, has otherwise here.

use brume_api::config::VmConfig;
use brume_api::{DriveOverride, NetworkOverride, VsockOverride};

/// What a client wants to be otherwise.
pub(crate) struct Overrides<'a> {
    pub(crate) network: &'a [NetworkOverride],
    pub(crate) vsock: Option<&'a VsockOverride>,
    pub(crate) drives: &'a [DriveOverride],
}

/// A part that is to be otherwise and that the machine does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Unknown {
    /// A network interface, by its id.
    Interface(String),
    /// The socket device.
    Vsock,
    /// A drive, by its id.
    Drive(String),
}

impl Overrides<'_> {
    /// Changes `config`; what it has no part for.
    pub(crate) fn apply(&self, config: &mut VmConfig) -> Vec<Unknown> {
        let mut unknown = Vec::new();
        for change in self.network {
            let mut interfaces = config.network_interfaces.iter_mut();
            match interfaces.find(|interface| interface.iface_id == change.iface_id) {
                Some(interface) => interface.host_dev_name = Some(change.host_dev_name.clone()),
                None => unknown.push(Unknown::Interface(change.iface_id.clone())),
            }
        }
        if let Some(change) = self.vsock {
            match &mut config.vsock {
                Some(vsock) => vsock.uds_path.clone_from(&change.uds_path),
                None => unknown.push(Unknown::Vsock),
            }
        }
        for change in self.drives {
            let mut drives = config.drives.iter_mut();
            match drives.find(|drive| drive.drive_id == change.drive_id) {
                Some(drive) => drive.path_on_host = Some(change.path_on_host.clone()),
                None => unknown.push(Unknown::Drive(change.drive_id.clone())),
            }
        }
        unknown
    }
}
