// SPDX-License-Identifier: Apache-2.0
//! What a client can ask for, and who answers.

use serde::Serialize;
use serde_json::Value;

use crate::config::{
    BootSource, Drive, Logger, MachineConfig, MachineConfigPatch, MmdsConfig, NetworkInterface,
};
use crate::fault::Fault;

/// A request that was understood.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// GET /
    GetInstance,
    /// GET /version
    GetVersion,
    /// GET /vm/config
    GetConfig,
    /// GET /machine-config
    GetMachineConfig,
    /// GET /mmds
    GetMmds,
    /// PUT /mmds: replaces the data of the metadata service.
    PutMmds(Value),
    /// PATCH /mmds: merges into the data of the metadata service (RFC 7396).
    PatchMmds(Value),
    /// A change of the configuration, before the start.
    Configure(Box<Section>),
    /// PUT /actions with `InstanceStart`.
    Start,
    /// PATCH /vm with `Paused`.
    Pause,
    /// PATCH /vm with `Resumed`.
    Resume,
    /// PATCH /vm with `Stopped`: ends the machine and its process.
    Stop,
}

/// A part of the configuration, as a client sets it.
#[derive(Clone, Debug, PartialEq)]
pub enum Section {
    /// PUT /boot-source
    BootSource(BootSource),
    /// PUT /machine-config
    MachineConfig(MachineConfig),
    /// PATCH /machine-config
    MachineConfigPatch(MachineConfigPatch),
    /// PUT /drives/{id}
    Drive(Drive),
    /// PUT /network-interfaces/{id}
    NetworkInterface(NetworkInterface),
    /// PUT /mmds/config
    Mmds(MmdsConfig),
    /// PUT /logger
    Logger(Logger),
}

/// What a request that succeeds is answered with: JSON, or nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer(pub(crate) Option<String>);

impl Answer {
    /// Done, and nothing to say (status 204).
    pub const fn done() -> Self {
        Self(None)
    }

    /// `value` as JSON (status 200).
    ///
    /// # Errors
    ///
    /// The value has no JSON form.
    pub fn json(value: &impl Serialize) -> Result<Self, Fault> {
        let text = serde_json::to_string(value).map_err(|error| Fault::from_error(&error))?;
        Ok(Self(Some(text)))
    }
}

/// Carries out requests. It is called for one at a time, from the server's thread.
pub trait Controller: Send {
    /// Carries out `request` and answers it.
    ///
    /// # Errors
    ///
    /// What the client is told if it fails.
    fn call(&self, request: Request) -> Result<Answer, Fault>;
}
