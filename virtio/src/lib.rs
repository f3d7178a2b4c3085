// SPDX-License-Identifier: Apache-2.0
//! Placeholder while the workspace is laid out.
