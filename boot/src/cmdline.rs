// SPDX-License-Identifier: Apache-2.0
//! The kernel's command line: checked, and completed with the arguments that describe devices.
//!
//! # Devices on the command line and in ACPI
//!
//! Linux learns of virtio-mmio devices from the ACPI tables (`LNRO0005`) or from
//! `virtio_mmio.device=SIZE@ADDRESS:GSI` arguments (`CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES`). A kernel
//! that understands both registers each device twice. The ACPI one is probed first and works; the
//! other finds its registers taken (`EBUSY`), and is left without a driver. No harm is done, but
//! the kernel says so with an error line for each device, even on a `quiet` console (Linux 6.1:
//! `virtio-mmio virtio-mmio.0: can't request region for resource`). [`DeviceArguments`] chooses
//! between that noise and guests that have no ACPI at all.

use std::fmt::Write;

use crate::MmioDevice;

/// When devices get `virtio_mmio.device=` arguments. The ACPI tables describe them always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceArguments {
    /// Only if the command line turns ACPI off (`acpi=off`). Right for kernels with ACPI; one that
    /// was built without it has to be told `acpi=off`, which it otherwise ignores.
    #[default]
    WithoutAcpi,
    /// On every command line, as Firecracker does: kernels built without ACPI find their devices
    /// too, and kernels that know both ways complain about each device once.
    Always,
}

/// Why a command line cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandLineError {
    /// More bytes than the kernel takes.
    #[error(
        "the kernel command line is too long: {length} bytes with the arguments for {devices} \
         devices, and this kernel takes {limit}; shorten it"
    )]
    TooLong {
        /// Its length in bytes, without the terminating NUL.
        length: usize,
        /// Devices that were described on it.
        devices: usize,
        /// Most bytes that the kernel takes.
        limit: usize,
    },
    /// Something that is not printable ASCII: a newline that was read along with it, for example.
    #[error(
        "the kernel command line has the byte {byte:#04x} at position {position}: only printable \
         ASCII characters can be in it"
    )]
    NotPrintable {
        /// The byte.
        byte: u8,
        /// Its offset.
        position: usize,
    },
}

/// Checks `cmdline` and adds `devices` to it if `arguments` asks for it. The result has at most
/// `limit` bytes.
pub(crate) fn build(
    cmdline: &str,
    devices: &[MmioDevice],
    arguments: DeviceArguments,
    limit: usize,
) -> Result<String, CommandLineError> {
    let unprintable = |byte: &u8| !(b' '..=b'~').contains(byte);
    if let Some((position, &byte)) = cmdline
        .as_bytes()
        .iter()
        .enumerate()
        .find(|(_, byte)| unprintable(byte))
    {
        return Err(CommandLineError::NotPrintable { byte, position });
    }

    let kernel_part = kernel_arguments(cmdline);
    let wanted = match arguments {
        DeviceArguments::Always => true,
        DeviceArguments::WithoutAcpi => Words::of(kernel_part).any(|word| word == "acpi=off"),
    };
    let devices = if wanted { devices } else { &[] };
    let complete = insert_devices(cmdline, kernel_part.len(), devices);
    if complete.len() > limit {
        return Err(CommandLineError::TooLong {
            length: complete.len(),
            devices: devices.len(),
            limit,
        });
    }
    Ok(complete)
}

/// Puts an argument for each of `devices` at byte `position` of `cmdline`, set off by spaces.
fn insert_devices(cmdline: &str, position: usize, devices: &[MmioDevice]) -> String {
    if devices.is_empty() {
        return cmdline.to_owned();
    }
    let (kernel, init) = cmdline.split_at_checked(position).unwrap_or((cmdline, ""));
    let mut complete = kernel.trim_end().to_owned();
    for device in devices {
        if !complete.is_empty() {
            complete.push(' ');
        }
        let MmioDevice { address, size, gsi } = device;
        // Writing to a string cannot fail.
        let _ = if size.is_multiple_of(1024) {
            write!(
                complete,
                "virtio_mmio.device={}K@{address:#x}:{gsi}",
                size / 1024
            )
        } else {
            write!(complete, "virtio_mmio.device={size}@{address:#x}:{gsi}")
        };
    }
    if !init.is_empty() {
        complete.push(' ');
        complete.push_str(init);
    }
    complete
}

/// The part of `cmdline` that is for the kernel: what follows a lone `--` goes to init.
fn kernel_arguments(cmdline: &str) -> &str {
    let mut words = Words::of(cmdline);
    loop {
        let before = words.rest;
        match words.next() {
            Some("--") => {
                let length = cmdline.len() - before.trim_start_matches(' ').len();
                return cmdline.get(..length).unwrap_or(cmdline);
            }
            Some(_) => {}
            None => return cmdline,
        }
    }
}

/// Splits a command line the way Linux does: at spaces that are not between double quotes.
struct Words<'a> {
    rest: &'a str,
}

impl<'a> Words<'a> {
    fn of(cmdline: &'a str) -> Self {
        Self { rest: cmdline }
    }
}

impl<'a> Iterator for Words<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let text = self.rest.trim_start_matches(' ');
        if text.is_empty() {
            return None;
        }
        let mut quoted = false;
        let end = text
            .find(|character| {
                quoted ^= character == '"';
                character == ' ' && !quoted
            })
            .unwrap_or(text.len());
        let (word, rest) = text.split_at_checked(end)?;
        self.rest = rest;
        Some(word)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMIT: usize = 2047;

    fn device(index: u32) -> MmioDevice {
        MmioDevice {
            address: 0xc000_1000 + u64::from(index) * 0x1000,
            size: 4096,
            gsi: 5 + index,
        }
    }

    fn always(cmdline: &str, devices: &[MmioDevice]) -> String {
        build(cmdline, devices, DeviceArguments::Always, LIMIT).unwrap()
    }

    #[test]
    fn each_device_gets_an_argument_with_size_address_and_gsi() {
        assert_eq!(
            always("console=ttyS0", &[device(0), device(1)]),
            "console=ttyS0 virtio_mmio.device=4K@0xc0001000:5 virtio_mmio.device=4K@0xc0002000:6"
        );
        assert_eq!(
            always("", &[device(0)]),
            "virtio_mmio.device=4K@0xc0001000:5"
        );
        let odd = MmioDevice {
            size: 512,
            ..device(0)
        };
        assert_eq!(always("", &[odd]), "virtio_mmio.device=512@0xc0001000:5");
    }

    #[test]
    fn device_arguments_come_before_those_for_init() {
        assert_eq!(
            always("quiet -- --verbose acpi=off", &[device(0)]),
            "quiet virtio_mmio.device=4K@0xc0001000:5 -- --verbose acpi=off"
        );
        assert_eq!(
            always("--", &[device(0)]),
            "virtio_mmio.device=4K@0xc0001000:5 --"
        );
        assert_eq!(
            always("a=\"x -- y\" b", &[device(0)]),
            "a=\"x -- y\" b virtio_mmio.device=4K@0xc0001000:5"
        );
    }

    #[test]
    fn with_acpi_on_the_tables_are_enough() {
        let build = |cmdline| build(cmdline, &[device(0)], DeviceArguments::WithoutAcpi, LIMIT);
        for cmdline in [
            "",
            "quiet",
            "quiet -- acpi=off",
            "x=\"acpi=off \"",
            "acpi=offline",
        ] {
            assert_eq!(build(cmdline).as_deref(), Ok(cmdline));
        }
        assert_eq!(
            build("acpi=off quiet").as_deref(),
            Ok("acpi=off quiet virtio_mmio.device=4K@0xc0001000:5")
        );
    }

    #[test]
    fn the_limit_counts_the_arguments_for_devices() {
        let argument = always("", &[device(0)]).len();
        let fits = "a".repeat(LIMIT - argument - 1);
        assert_eq!(always(&fits, &[device(0)]).len(), LIMIT);
        assert_eq!(
            build(
                &format!("{fits}a"),
                &[device(0)],
                DeviceArguments::Always,
                LIMIT
            ),
            Err(CommandLineError::TooLong {
                length: LIMIT + 1,
                devices: 1,
                limit: LIMIT
            })
        );
    }

    #[test]
    fn bytes_that_a_kernel_cannot_read_are_refused() {
        for (cmdline, byte, position) in [("a\0b", 0, 1), ("quiet\n", b'\n', 5), ("ä", 0xc3, 0)] {
            assert_eq!(
                build(cmdline, &[], DeviceArguments::Always, LIMIT),
                Err(CommandLineError::NotPrintable { byte, position })
            );
        }
    }

    proptest! {
        #[test]
        fn what_was_given_is_kept_whatever_is_inserted(cmdline in "[ a\"=-]{0,40}") {
            let complete = always(&cmdline, &[device(0)]);
            let rest = complete.replacen("virtio_mmio.device=4K@0xc0001000:5", "", 1);
            let squeeze = |text: &str| text.replace(' ', "");
            prop_assert_eq!(squeeze(&rest), squeeze(&cmdline));
            prop_assert_eq!(build(&cmdline, &[], DeviceArguments::Always, LIMIT), Ok(cmdline));
        }
    }
}
