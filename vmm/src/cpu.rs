// SPDX-License-Identifier: Apache-2.0
//! vCPUs: their first state, their threads, and what is reported when one fails.

mod counters;
mod cpuid;
mod exit;
mod kick;
mod place;
mod registers;
mod report;
mod setup;
mod state;
mod template;
mod thread;

pub(crate) use counters::VcpuCounts;
pub(crate) use cpuid::missing_features;
pub(crate) use place::Place;
pub use report::{FailureReport, VcpuFailure};
pub(crate) use setup::{CpuPlan, set_up};
pub use state::VcpuRestoreError;
pub(crate) use state::{Known, VcpuState, tsc_rates_fit};
pub use template::CpuError;
pub(crate) use template::{change_cpuid, check_capabilities};
pub(crate) use thread::{VcpuBuses, VcpuEnd, VcpuHandle, VcpuOutcome};
