// SPDX-License-Identifier: Apache-2.0
//! The machine: everything that knows KVM.
//!
//! [`Machine::build`] makes a machine from a configuration, [`Machine::run`] runs it to its end.
//! The thread that calls `run` owns the machine; everything that happens to it, be it a guest that
//! powers off, a vCPU that fails or a request from outside through a [`MachineHandle`], reaches
//! that thread through one queue. [`Instance`] is the machine before that, while clients of the
//! control API still describe it.

mod assemble;
mod attach;
mod balloon;
mod build;
mod chipset;
mod controls;
mod cpu;
mod dirty;
mod event;
mod generation;
mod instance;
mod kvm;
mod lifecycle;
mod machine;
mod memory;
mod metrics;
mod migration;
mod mmds;
mod overrides;
mod page_set;
mod serial;
mod snapshot;
mod telemetry;

pub use attach::AttachError;
pub use build::{BuildError, BuildOptions};
pub use cpu::{CpuError, FailureReport, VcpuFailure, VcpuRestoreError};
pub use event::{Console, MachineHandle, RequestError, StopReason};
pub use generation::GenerationError;
pub use instance::{
    ApiController, Description, FIRECRACKER_VERSION, Instance, MakeOptions, Outcome, SetLogger,
};
pub use kvm::{KvmError, VmRestoreError};
pub use lifecycle::{IllegalTransition, VmEvent, VmState};
pub use machine::{Ending, Machine, PauseError, RunError};
pub use memory::{MemoryError, UffdError, WorkingSetError};
pub use serial::SerialError;
pub use snapshot::{CreateError, LoadError};
pub use telemetry::{MetricsError, open_lines};
