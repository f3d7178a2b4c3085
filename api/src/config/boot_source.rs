// SPDX-License-Identifier: Apache-2.0
//! What the guest boots.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Kernel, initrd and command line.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// The kernel: an ELF vmlinux or a bzImage.
    pub kernel_image_path: PathBuf,
    /// The initial RAM disk.
    #[serde(default)]
    pub initrd_path: Option<PathBuf>,
    /// The kernel's command line; [`BootSource::DEFAULT_ARGS`] if left out.
    #[serde(default)]
    pub boot_args: Option<String>,
    /// brume only: how to enter the kernel (`elf64`, `pvh`, `bzimage`); the file decides if left
    /// out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_protocol: Option<String>,
}

impl BootSource {
    /// The command line of a kernel that is given none: restart by the keyboard controller at once
    /// after a panic, so that the process ends, and do not look for hardware that is not there.
    pub const DEFAULT_ARGS: &str = "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux \
                                    i8042.nomux i8042.dumbkbd swiotlb=noforce";

    /// The command line to boot with.
    pub fn args(&self) -> &str {
        self.boot_args.as_deref().unwrap_or(Self::DEFAULT_ARGS)
    }
}
