// SPDX-License-Identifier: Apache-2.0
//! States as text, and devices that take them on.
