// SPDX-License-Identifier: Apache-2.0
//! The network device (virtio 1.3, section 5.1).
