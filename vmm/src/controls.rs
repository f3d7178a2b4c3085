// SPDX-License-Identifier: Apache-2.0
//! The handles on a machine's devices: what can be changed on them while they are used, and what
//! they count.

use std::sync::{Arc, Mutex, PoisonError};

use brume_api::Fault;
use brume_api::config::{DrivePatch, NetworkInterfacePatch, VmConfig};
use brume_devices::{I8042, I8042Counters, SerialCounters};
use brume_virtio::balloon::BalloonControl;
use brume_virtio::block::{BlockControl, BlockError};
use brume_virtio::net::NetControl;
use brume_virtio::rng::RngControl;
use brume_virtio::vsock::VsockControl;

use crate::attach::limits;

/// A handle on each device.
#[derive(Default)]
pub(crate) struct Controls {
    /// By the id of the drive.
    pub(crate) drives: Vec<(String, BlockControl)>,
    /// By the id of the interface.
    pub(crate) interfaces: Vec<(String, NetControl)>,
    pub(crate) balloon: Option<BalloonControl>,
    pub(crate) entropy: Option<RngControl>,
    pub(crate) vsock: Option<VsockControl>,
    pub(crate) keyboard: Option<Arc<Mutex<I8042>>>,
    pub(crate) keyboard_counters: Arc<I8042Counters>,
    pub(crate) serial: Arc<SerialCounters>,
}

impl Controls {
    /// Changes a drive, and its description.
    pub(crate) fn patch_drive(
        &self,
        config: &mut VmConfig,
        patch: &DrivePatch,
    ) -> Result<(), Fault> {
        let id = &patch.drive_id;
        let drive = config.drives.iter_mut().find(|drive| drive.drive_id == *id);
        let (Some(drive), Some(control)) = (drive, find(&self.drives, id)) else {
            return Err(patch_fault(
                "Failed perform action on device: Device not found",
            ));
        };
        if patch.path_on_host.is_none() && patch.rate_limiter.is_none() {
            // In Firecracker's words: there is nothing in it that a file-backed disk takes.
            return Err(patch_fault(
                "Block: Running method expected different backend.",
            ));
        }
        let mut next = drive.clone();
        patch
            .apply(&mut next)
            .map_err(|error| Fault::from_error(&error))?;
        if let Some(path) = &patch.path_on_host {
            control.set_image(path).map_err(|error| match &error {
                // The words that Firecracker's clients look for.
                BlockError::Open { source, path, .. } => patch_fault(&format!(
                    "Block: Virtio backend error: Error manipulating the backing file: \
                     {source} {}",
                    path.display()
                )),
                _ => Fault::from_error(&error),
            })?;
        }
        if patch.rate_limiter.is_some() {
            control.limit(limits(patch.rate_limiter));
        }
        *drive = next;
        Ok(())
    }

    /// Changes the limits of a network interface, and its description.
    pub(crate) fn patch_interface(
        &self,
        config: &mut VmConfig,
        patch: &NetworkInterfacePatch,
    ) -> Result<(), Fault> {
        let id = &patch.iface_id;
        let mut interfaces = config.network_interfaces.iter_mut();
        let interface = interfaces.find(|interface| interface.iface_id == *id);
        let (Some(interface), Some(control)) = (interface, find(&self.interfaces, id)) else {
            return Err(Fault::new(
                "Network config error: Unable to update the net device: Failed perform action on \
                 device: Device not found",
            ));
        };
        control.limit(limits(patch.rx_rate_limiter), limits(patch.tx_rate_limiter));
        patch.apply(interface);
        Ok(())
    }

    /// The balloon's; `prefix` begins the fault if there is none.
    pub(crate) fn balloon(&self, prefix: &str) -> Result<&BalloonControl, Fault> {
        self.balloon.as_ref().ok_or_else(|| {
            Fault::new(format!(
                "{prefix}: Failed perform action on device: Device not found"
            ))
        })
    }

    /// Presses the keys by which a guest is asked to shut down.
    pub(crate) fn press_ctrl_alt_del(&self) -> Result<(), Fault> {
        let pressed = self.keyboard.as_ref().is_some_and(|keyboard| {
            let mut keyboard = keyboard.lock().unwrap_or_else(PoisonError::into_inner);
            keyboard.press_ctrl_alt_del()
        });
        if pressed {
            return Ok(());
        }
        Err(Fault::new(
            "The guest does not read its keyboard, so Ctrl+Alt+Del cannot be sent.",
        ))
    }
}

/// Why a drive stays as it is.
fn patch_fault(why: &str) -> Fault {
    Fault::new(format!(
        "Drive config error: Unable to patch the block device: {why} Please verify the request \
         arguments."
    ))
}

fn find<'a, T>(all: &'a [(String, T)], id: &str) -> Option<&'a T> {
    let found = all.iter().find(|(other, _)| other == id);
    found.map(|(_, control)| control)
}
