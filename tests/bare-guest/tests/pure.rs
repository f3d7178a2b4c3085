// SPDX-License-Identifier: Apache-2.0
//! The parts of the guest that need no machine, tested on the host.

#![allow(dead_code)]

#[path = "../src/cmdline.rs"]
mod cmdline;
#[path = "../src/frame.rs"]
mod frame;
#[path = "../src/pattern.rs"]
mod pattern;
#[path = "../src/plan.rs"]
mod plan;
#[path = "../src/rng.rs"]
mod rng;
