// SPDX-License-Identifier: Apache-2.0
//! What the guest boots.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Kernel, initrd and command line.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// The kernel: an ELF vmlinux or a bzImage.
    #[schema(value_type = String)]
    pub kernel_image_path: PathBuf,
    /// The initial RAM disk.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub initrd_path: Option<PathBuf>,
    /// The kernel's command line; Firecracker's if left out.
    #[serde(default)]
    pub boot_args: Option<String>,
    /// brume only: how to enter the kernel (`elf64`, `pvh`, `bzimage`); the file decides if left
    /// out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^(elf64|pvh|bzimage)$")]
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
