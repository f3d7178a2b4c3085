// SPDX-License-Identifier: Apache-2.0
//! The block device (virtio 1.3, section 5.2).
