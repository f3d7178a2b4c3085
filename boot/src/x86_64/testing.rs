// SPDX-License-Identifier: Apache-2.0
//! Small kernels made by hand, for tests.
