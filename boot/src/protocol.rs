// SPDX-License-Identifier: Apache-2.0
//! The ways to enter a kernel, and their names on a command line.

use std::fmt;
use std::str::FromStr;

/// How the kernel is entered and what it is handed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelProtocol {
    /// An ELF file, entered in long mode as "The Linux/x86 Boot Protocol" says for 64-bit
    /// ("64-bit boot protocol").
    Linux64,
    /// An ELF file, entered in 32-bit protected mode by the Xen project's "x86/HVM direct boot
    /// ABI".
    Pvh,
    /// A bzImage, entered at its 64-bit entry point.
    BzImage,
}

/// A protocol name that is none of `elf64`, `pvh` and `bzimage`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown kernel protocol \"{0}\": use elf64, pvh or bzimage")]
pub struct UnknownProtocol(pub String);

impl KernelProtocol {
    /// Every protocol.
    pub const ALL: [Self; 3] = [Self::Linux64, Self::Pvh, Self::BzImage];

    /// The name on a command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Linux64 => "elf64",
            Self::Pvh => "pvh",
            Self::BzImage => "bzimage",
        }
    }
}

impl fmt::Display for KernelProtocol {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(self.as_str())
    }
}

impl FromStr for KernelProtocol {
    type Err = UnknownProtocol;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|protocol| protocol.as_str() == name)
            .ok_or_else(|| UnknownProtocol(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back_as_the_protocol_they_name() {
        for protocol in KernelProtocol::ALL {
            assert_eq!(protocol.to_string().parse(), Ok(protocol));
        }
        let error = "uefi".parse::<KernelProtocol>().unwrap_err();
        assert!(error.to_string().contains("\"uefi\""), "{error}");
    }
}
