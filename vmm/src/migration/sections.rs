// SPDX-License-Identifier: Apache-2.0
//! What moves with a machine and is not in a snapshot.

use std::sync::PoisonError;

use brume_mmds::SharedMmds;
use brume_snapshot::Saved;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The data of the metadata service.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MetadataSection {
    /// `None` if a client has never set any.
    pub(super) data: Option<Value>,
}

impl Saved for MetadataSection {
    const KIND: &'static str = "mmds";
    const VERSION: u32 = 1;
}

impl MetadataSection {
    /// What `mmds` has now.
    pub(crate) fn of(mmds: &SharedMmds) -> Self {
        Self {
            data: mmds
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .data()
                .cloned(),
        }
    }

    /// Gives it to the service of the machine that arrives.
    ///
    /// # Errors
    ///
    /// It is more than the service takes here.
    pub(super) fn restore(self, mmds: &SharedMmds) -> Result<(), brume_mmds::MmdsError> {
        match self.data {
            Some(data) => mmds
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .put(data),
            None => Ok(()),
        }
    }
}
