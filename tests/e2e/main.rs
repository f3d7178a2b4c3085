// SPDX-License-Identifier: Apache-2.0
//! End-to-end tests: the built program on real KVM, with the bare guest and with Linux.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    reason = "what does not work is a failed test"
)]

mod api;
mod bad_clients;
mod balloon;
mod bare;
mod block;
mod clones;
mod config;
mod ends;
mod hostile;
mod input;
mod limiter;
mod linux;
mod migration;
mod migration_compression;
mod migration_devices;
mod migration_disk_faults;
mod migration_disks;
mod migration_faults;
mod migration_large;
mod migration_linux;
mod migration_memfd;
mod migration_net;
mod migration_owner;
mod migration_post_copy;
mod migration_post_copy_faults;
mod migration_refusals;
mod migration_resume;
mod migration_stalls;
mod migration_strangers;
mod mmds;
mod net;
mod parts;
mod pause;
mod sdk;
mod snapshot;
mod snapshot_devices;
mod snapshot_faults;
mod snapshot_linux;
mod stall;
mod terminal;
mod uffd;
mod vsock;
