// SPDX-License-Identifier: Apache-2.0
//! The ways to running devices, for requests that come after the start.

use brume_api::Fault;
use brume_virtio::balloon::BalloonControl;

/// What the owner of a machine asks its devices by; `None` where there is no such device.
#[derive(Clone, Debug, Default)]
pub(crate) struct Controls {
    pub(crate) balloon: Option<BalloonControl>,
}

impl Controls {
    /// The balloon's; `prefix` begins the fault if there is none.
    pub(crate) fn balloon(&self, prefix: &str) -> Result<&BalloonControl, Fault> {
        self.balloon.as_ref().ok_or_else(|| {
            Fault::new(format!(
                "{prefix}: Failed perform action on device: Device not found"
            ))
        })
    }
}
