// SPDX-License-Identifier: Apache-2.0
//! Tests of the whole device, with its worker: a driver on one side, unix sockets on the other.

// Sizes and numbers here are small by construction.
#![allow(clippy::cast_possible_truncation)]

mod guest;
mod hostile;
mod lifecycle;
mod restore;
mod streams;
