// SPDX-License-Identifier: Apache-2.0
//! What a machine is asked to be: the types of the control API, which are also those of the
//! configuration file and of the command line; and the server that clients of the API talk to.
//!
//! Names, defaults and limits are Firecracker's, so that its files can be used as they are. What
//! brume adds is optional and marked so. Each type checks itself once, in its `validate`, wherever
//! it came from.

#![forbid(unsafe_code)]

mod balloon;
mod client;
pub mod config;
mod events;
mod fault;
mod instance;
mod memory;
mod metrics;
mod migration;
#[cfg(test)]
mod openapi;
mod request;
mod route;
mod server;
mod snapshot;

pub use balloon::{
    BalloonHinting, BalloonPatch, BalloonRequest, BalloonStatistics, BalloonStatisticsPatch,
    HintingStart,
};
pub use client::{Client, ClientError, Response};
pub use events::{EventHub, MachineEvent};
pub use fault::{Fault, with_causes};
pub use instance::{InstanceInfo, VersionInfo};
pub use memory::{
    DirtyForm, DirtyPages, DirtyRate, DirtyRegion, Mapping, Mappings, MemoryRequest, ResidentPages,
    Tracking,
};
pub use metrics::{ApiCounts, ApiMetrics, LATENCY_BOUNDS_US, RequestCount};
pub use migration::{
    MigrationCompression, MigrationDecision, MigrationDowntime, MigrationMode, MigrationPass,
    MigrationPatch, MigrationPhase, MigrationRequest, MigrationRole, MigrationStatus, MigrationTls,
    OnTimeout, ReceiveMigration, SendMigration,
};
pub use request::{Answer, Controller, Pending, Reply, Request, Section};
pub use server::{Server, ServerError, Serving};
pub use snapshot::{
    BackendType, CreateSnapshot, DriveOverride, LoadSnapshot, MemBackend, NetworkOverride,
    SnapshotHugePages, SnapshotType, VsockOverride,
};
