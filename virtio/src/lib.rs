// SPDX-License-Identifier: Apache-2.0
//! Virtio devices and what carries them to the guest.
//!
//! From the guest inwards: a [`transport`] decodes register accesses and keeps the device status;
//! at DRIVER_OK it hands frozen [`Queue`]s to a [`VirtioDevice`]; the device moves them to a
//! worker thread of its own, which serves them until the device is stopped and gives their state
//! back. Pause, reset and snapshot are all that one stop.
//!
//! All of it takes the guest to be hostile: what is read from guest memory is checked where it is
//! read, and a ring that makes no sense stops its device and nothing else.

pub mod balloon;
pub mod block;
mod device;
mod limiter;
mod log_limit;
mod memory;
pub mod net;
mod queue;
pub mod rng;
mod signals;
#[cfg(test)]
mod testing;
pub mod transport;
pub mod vsock;
mod worker;

pub use device::{
    RestoreContext, StartContext, StartError, StartedQueue, StateError, VirtioDevice, feature,
};
pub use limiter::{
    BucketLimits, BucketState, BucketUpdate, Limiter, LimiterState, LimiterUpdate, TokenBucket,
};
pub use memory::{GuestMemory, IoBuffers};
pub use queue::{Buffer, Buffers, Chain, Queue, QueueError, QueueState};
pub use signals::DeviceSignals;
pub use worker::{Backend, Worker};
