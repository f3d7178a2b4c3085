// SPDX-License-Identifier: Apache-2.0
//! Whole guests, loaded from small kernels made by hand.
