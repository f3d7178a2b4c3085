// SPDX-License-Identifier: Apache-2.0
//! The `brume` program.

fn main() {}
