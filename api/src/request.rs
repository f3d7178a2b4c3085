// SPDX-License-Identifier: Apache-2.0
//! What a client can ask for, and who answers.

use serde::Serialize;
use serde_json::Value;
use tokio::sync::oneshot;

use crate::balloon::BalloonRequest;
use crate::config::{
    Balloon, BootSource, CpuConfig, Drive, DrivePatch, Entropy, Logger, MachineConfig,
    MachineConfigPatch, MetricsConfig, MmdsConfig, NetworkInterface, NetworkInterfacePatch, Serial,
    Vsock,
};
use crate::fault::Fault;
use crate::memory::MemoryRequest;
use crate::migration::MigrationRequest;
use crate::snapshot::{CreateSnapshot, LoadSnapshot};

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
    /// GET /metrics
    GetMetrics,
    /// GET /openapi.json
    GetOpenApi,
    /// GET /mmds
    GetMmds,
    /// PUT /mmds: replaces the data of the metadata service.
    PutMmds(Value),
    /// PATCH /mmds: merges into the data of the metadata service (RFC 7396).
    PatchMmds(Value),
    /// A change of the configuration, before the start.
    Configure(Box<Section>),
    /// PATCH /drives/{id}
    PatchDrive(DrivePatch),
    /// PATCH /network-interfaces/{id}
    PatchNetworkInterface(NetworkInterfacePatch),
    /// PUT /actions with `FlushMetrics`.
    FlushMetrics,
    /// PUT /actions with `SendCtrlAltDel`.
    SendCtrlAltDel,
    /// What goes to the balloon.
    Balloon(BalloonRequest),
    /// What is about the guest's memory.
    Memory(MemoryRequest),
    /// What is about moving the machine to another process.
    Migration(MigrationRequest),
    /// PUT /snapshot/create
    CreateSnapshot(CreateSnapshot),
    /// PUT /snapshot/load
    LoadSnapshot(Box<LoadSnapshot>),
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
    /// PUT /cpu-config
    Cpu(CpuConfig),
    /// PUT /drives/{id}
    Drive(Drive),
    /// PUT /network-interfaces/{id}
    NetworkInterface(NetworkInterface),
    /// PUT /balloon
    Balloon(Balloon),
    /// PUT /entropy
    Entropy(Entropy),
    /// PUT /vsock
    Vsock(Vsock),
    /// PUT /mmds/config
    Mmds(MmdsConfig),
    /// PUT /serial
    Serial(Serial),
    /// PUT /logger
    Logger(Logger),
    /// PUT /metrics
    Metrics(MetricsConfig),
}

/// What a request that succeeds is answered with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Nothing (status 204).
    Nothing,
    /// A JSON text (status 200).
    Json(String),
    /// Metrics in the text form of Prometheus (status 200).
    Metrics(String),
}

impl Answer {
    /// Done, and nothing to say (status 204).
    pub const fn done() -> Self {
        Self::Nothing
    }

    /// `value` as JSON (status 200).
    ///
    /// # Errors
    ///
    /// The value has no JSON form.
    pub fn json(value: &impl Serialize) -> Result<Self, Fault> {
        let text = serde_json::to_string(value).map_err(|error| Fault::from_error(&error))?;
        Ok(Self::Json(text))
    }
}

/// The way to answer a request, from any thread. A client whose request is dropped without an
/// answer is told that the machine has ended.
#[derive(Debug)]
pub struct Reply(oneshot::Sender<Result<Answer, Fault>>);

impl Reply {
    /// A way to answer, and where the answer arrives.
    pub(crate) fn new() -> (Self, oneshot::Receiver<Result<Answer, Fault>>) {
        let (sender, receiver) = oneshot::channel();
        (Self(sender), receiver)
    }

    /// The same, for who asks from within the process.
    pub fn pending() -> (Self, Pending) {
        let (reply, answer) = Self::new();
        (reply, Pending(answer))
    }

    /// Answers.
    pub fn send(self, result: Result<Answer, Fault>) {
        // Whoever asked may have gone.
        let _ = self.0.send(result);
    }
}

/// An answer that is on its way.
#[derive(Debug)]
pub struct Pending(oneshot::Receiver<Result<Answer, Fault>>);

impl Pending {
    /// The answer, once, if it is there; nobody waits for it.
    pub fn poll(&mut self) -> Option<Result<Answer, Fault>> {
        match self.0.try_recv() {
            Ok(answer) => Some(answer),
            Err(oneshot::error::TryRecvError::Empty) => None,
            Err(oneshot::error::TryRecvError::Closed) => {
                Some(Err(Fault::new("The machine has ended.")))
            }
        }
    }
}

/// Carries out requests.
pub trait Controller: Send {
    /// Has `request` carried out and answered, and does not wait for it: the server's thread has
    /// other clients.
    fn call(&self, request: Request, reply: Reply);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_there_when_it_was_sent_or_can_come_no_more() {
        let (reply, mut pending) = Reply::pending();
        assert_eq!(pending.poll(), None);
        reply.send(Ok(Answer::done()));
        assert_eq!(pending.poll(), Some(Ok(Answer::Nothing)));
        let (reply, mut pending) = Reply::pending();
        drop(reply);
        assert!(matches!(pending.poll(), Some(Err(_))));
    }
}
