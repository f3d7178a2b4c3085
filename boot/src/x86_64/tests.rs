// SPDX-License-Identifier: Apache-2.0
//! Whole guests, loaded from small kernels made by hand.

use std::fs::File;

use proptest::prelude::*;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::layout;
use super::testing::*;
use crate::{
    BootError, BootRequest, CommandLineError, DeviceArguments, InitrdError, KernelError,
    KernelProtocol, MmioDevice,
};

#[test]
fn the_zero_page_tells_an_elf_kernel_everything() {
    let (memory, kernel, initrd) = (memory(32), file(&elf(false)), file(b"initrd"));
    let request = BootRequest {
        initrd: Some(&initrd),
        ..request(&kernel)
    };
    let state = crate::load(&memory, &request).unwrap();

    assert_eq!(state.registers.rsi, layout::ZERO_PAGE);
    let page = bytes_at(&memory, layout::ZERO_PAGE, 4096);
    assert_eq!(u64_at(&page, 0x070), layout::ACPI_START);
    assert_eq!(page[0x1ef], 0, "sentinel");
    assert_eq!(&page[0x202..0x206], b"HdrS");
    assert_eq!(page[0x210], 0xff, "type_of_loader");
    let initrd = state.initrd.unwrap();
    assert_eq!(u64::from(u32_at(&page, 0x218)), initrd.start);
    assert_eq!(u32_at(&page, 0x21c), 6);
    assert_eq!(bytes_at(&memory, initrd.start, 6), b"initrd");
    let cmdline = bytes_at(&memory, u32_at(&page, 0x228).into(), 14);
    assert_eq!(cmdline, b"console=ttyS0\0");
    assert_eq!(page[0x1e8], 4, "e820 entries");
    assert_eq!(u64_at(&page, 0x2d0 + 3 * 20), layout::HIGH_MEMORY_START);
    assert_eq!(u64_at(&page, 0x2d0 + 3 * 20 + 8), 31 << 20);
    assert_eq!(u32_at(&page, 0x2d0 + 3 * 20 + 16), 1);
}

#[test]
fn a_bzimage_gets_its_own_setup_header_back() {
    let (memory, kernel, initrd) = (memory(32), file(&bzimage()), file(b"initrd"));
    let request = BootRequest {
        initrd: Some(&initrd),
        ..request(&kernel)
    };
    crate::load(&memory, &request).unwrap();
    let page = bytes_at(&memory, layout::ZERO_PAGE, 4096);
    assert_eq!(u64_at(&page, 0x258), KERNEL);
    assert_eq!(u32_at(&page, 0x260), low(BZIMAGE_MEMORY));
    assert_eq!(u32_at(&page, 0x228), low(layout::CMDLINE_START));
    assert_eq!((page[0x210], page[0x211]), (0xff, 1));
    assert_eq!(bytes_at(&memory, KERNEL, CODE.len()), CODE);
}

#[test]
fn the_start_info_tells_a_pvh_kernel_everything() {
    let (memory, kernel, initrd) = (memory(32), file(&elf(true)), file(b"initrd"));
    let request = BootRequest {
        initrd: Some(&initrd),
        ..request(&kernel)
    };
    let state = crate::load(&memory, &request).unwrap();

    let info = bytes_at(&memory, state.registers.rbx, 56);
    assert_eq!(u32_at(&info, 0), 0x336e_c578);
    assert_eq!(u32_at(&info, 4), 1, "version");
    assert_eq!(u32_at(&info, 12), 1, "modules");
    assert_eq!(u64_at(&info, 32), layout::ACPI_START);
    let module = bytes_at(&memory, u64_at(&info, 16), 16);
    assert_eq!(
        (u64_at(&module, 0), u64_at(&module, 8)),
        (state.initrd.unwrap().start, 6)
    );
    assert_eq!(bytes_at(&memory, u64_at(&info, 24), 14), b"console=ttyS0\0");
    assert_eq!(u32_at(&info, 48), 4, "memory map entries");
    let entry = bytes_at(&memory, u64_at(&info, 40) + 3 * 24, 24);
    assert_eq!(
        (u64_at(&entry, 0), u64_at(&entry, 8)),
        (layout::HIGH_MEMORY_START, 31 << 20)
    );
    assert_eq!(u32_at(&entry, 16), 1);
}

#[test]
fn the_segment_is_loaded_and_its_bss_left_alone() {
    let (memory, kernel) = (memory(32), file(&elf(false)));
    let state = crate::load(&memory, &request(&kernel)).unwrap();
    assert_eq!(state.kernel, KERNEL..KERNEL + ELF_MEMORY);
    assert_eq!(bytes_at(&memory, KERNEL, CODE.len()), CODE);
    assert_eq!(bytes_at(&memory, KERNEL + CODE.len() as u64, 16), [0; 16]);
}

#[test]
fn a_guest_above_3_gib_has_its_memory_in_the_map_and_its_initrd_below_the_hole() {
    let regions = layout::memory_regions(5 << 30).unwrap();
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&regions).unwrap();
    let (elf_kernel, bz_kernel, initrd) = (file(&elf(false)), file(&bzimage()), file(b"initrd"));
    let load = |kernel: &File| {
        let request = BootRequest {
            initrd: Some(&initrd),
            ..request(kernel)
        };
        crate::load(&memory, &request).unwrap()
    };
    let state = load(&elf_kernel);
    assert_eq!(state.initrd.unwrap().start, 0xc000_0000 - 4096);
    let page = bytes_at(&memory, layout::ZERO_PAGE, 4096);
    assert_eq!(page[0x1e8], 5, "e820 entries");
    assert_eq!(u64_at(&page, 0x2d0 + 4 * 20), 1 << 32);
    assert_eq!(u64_at(&page, 0x2d0 + 4 * 20 + 8), 2 << 30);
    // A bzImage reaches no further than it says.
    assert_eq!(load(&bz_kernel).initrd.unwrap().start, 0x8000_0000 - 4096);
}

#[test]
fn devices_are_in_the_tables_always_and_on_the_command_line_without_acpi() {
    let kernel = file(&elf(false));
    let devices = [layout::virtio_mmio_device(0).unwrap()];
    let cmdline = |cmdline, device_arguments| {
        let request = BootRequest {
            cmdline,
            devices: &devices,
            device_arguments,
            ..request(&kernel)
        };
        crate::load(&memory(32), &request).unwrap().cmdline
    };
    assert_eq!(cmdline("quiet", DeviceArguments::WithoutAcpi), "quiet");
    let argument = "virtio_mmio.device=4K@0xc0001000:5";
    assert_eq!(
        cmdline("acpi=off", DeviceArguments::WithoutAcpi),
        format!("acpi=off {argument}")
    );
    assert_eq!(
        cmdline("quiet", DeviceArguments::Always),
        format!("quiet {argument}")
    );
}

#[test]
fn a_command_line_may_be_as_long_as_the_kernel_takes_and_no_longer() {
    let mut small = bzimage();
    patch(&mut small, 0x238, &255u32.to_le_bytes()); // cmdline_size
    let mut boundless = bzimage();
    patch(&mut boundless, 0x238, &u32::MAX.to_le_bytes());
    for (contents, limit) in [(elf(false), 2047), (small, 255), (boundless, 2047)] {
        let kernel = file(&contents);
        let load = |cmdline: &str| {
            crate::load(
                &memory(32),
                &BootRequest {
                    cmdline,
                    ..request(&kernel)
                },
            )
        };
        assert!(load(&"a".repeat(limit)).is_ok());
        let error = load(&"a".repeat(limit + 1)).unwrap_err();
        assert!(matches!(
            error,
            BootError::CommandLine(CommandLineError::TooLong { limit: l, .. }) if l == limit
        ));
    }
}

#[test]
fn files_that_are_no_kernels_are_refused_with_advice() {
    let text = "This is a text file, as long as one likes.\n".repeat(100);
    for (contents, word) in [
        ("", "empty"),
        ("x", "not a kernel"),
        (&text, "not a kernel"),
    ] {
        let error = boot(contents.as_bytes(), None).unwrap_err();
        assert!(message(&error).contains(word), "{error}");
        assert!(message(&error).contains("vmlinux"), "{error}");
    }
    let directory = File::open("/").unwrap();
    let error = crate::load(&memory(32), &request(&directory)).unwrap_err();
    assert!(message(&error).contains("directory"), "{}", message(&error));
}

#[test]
fn a_protocol_that_the_file_cannot_have_is_refused() {
    for (contents, asked) in [
        (elf(true), KernelProtocol::BzImage),
        (bzimage(), KernelProtocol::Pvh),
        (bzimage(), KernelProtocol::Linux64),
    ] {
        let error = boot(&contents, Some(asked)).unwrap_err();
        assert!(
            matches!(error, BootError::Kernel(KernelError::WrongFormat { asked: a, .. }) if a == asked),
            "{error}"
        );
    }
}

#[test]
fn an_initrd_larger_than_memory_is_refused() {
    let (kernel, initrd) = (file(&elf(false)), file(b""));
    initrd.set_len(1 << 40).unwrap();
    let request = BootRequest {
        initrd: Some(&initrd),
        ..request(&kernel)
    };
    let error = crate::load(&memory(32), &request).unwrap_err();
    let BootError::Initrd(InitrdError::TooLarge { size, room }) = error else {
        panic!("{error}");
    };
    assert_eq!((size, room), (1 << 40, (32 << 20) - KERNEL - ELF_MEMORY));
}

#[test]
fn machines_that_the_tables_cannot_describe_are_refused() {
    let kernel = file(&elf(false));
    let load = |request: &BootRequest<'_>| crate::load(&memory(32), request);
    for vcpus in [0, 33] {
        let error = load(&BootRequest {
            vcpus,
            ..request(&kernel)
        })
        .unwrap_err();
        assert!(matches!(error, BootError::VcpuCount(count) if count == vcpus));
    }
    let good = layout::virtio_mmio_device(0).unwrap();
    let devices = [good; 20];
    let error = load(&BootRequest {
        devices: &devices,
        ..request(&kernel)
    })
    .unwrap_err();
    assert!(matches!(error, BootError::DeviceCount(20)));
    for bad in [
        MmioDevice {
            address: 0x1000,
            ..good
        },
        MmioDevice {
            address: u64::MAX,
            ..good
        },
        MmioDevice {
            address: layout::BOOT_TIMER_ADDRESS,
            ..good
        },
        MmioDevice { size: 0, ..good },
        MmioDevice {
            size: 1 << 32,
            ..good
        },
        MmioDevice { gsi: 4, ..good },
        MmioDevice { gsi: 24, ..good },
    ] {
        let devices = [bad];
        let error = load(&BootRequest {
            devices: &devices,
            ..request(&kernel)
        })
        .unwrap_err();
        assert!(matches!(error, BootError::DevicePlace { .. }), "{bad:?}");
    }
}

#[test]
fn too_little_memory_is_refused_before_anything_is_written() {
    let kernel = file(&elf(false));
    let memory = memory(1);
    let error = crate::load(&memory, &request(&kernel)).unwrap_err();
    assert!(matches!(
        error,
        BootError::MemoryTooSmall { size: 0x10_0000 }
    ));
    let elsewhere: GuestMemoryMmap =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(1 << 32), 32 << 20)]).unwrap();
    let error = crate::load(&elsewhere, &request(&kernel)).unwrap_err();
    assert!(matches!(error, BootError::MemoryTooSmall { size: 0 }));
}

/// A change to a kernel file.
#[derive(Clone, Debug)]
enum Damage {
    Flip { position: usize, bit: u8 },
    Field { position: usize, value: u64 },
    Truncate { size: usize },
}

fn damage() -> impl Strategy<Value = Damage> {
    // Headers lie in the first 0x300 bytes of both formats.
    let value = prop_oneof![
        any::<u64>(),
        (0u32..64).prop_map(|shift| 1 << shift),
        (0u32..64).prop_map(|shift| u64::MAX << shift),
        0u64..0x200_0000,
    ];
    prop_oneof![
        4 => (0usize..0x300, 0u8..8).prop_map(|(position, bit)| Damage::Flip { position, bit }),
        4 => (0usize..0x300, value).prop_map(|(position, value)| Damage::Field { position, value }),
        1 => (0usize..0x2000).prop_map(|size| Damage::Truncate { size }),
    ]
}

fn apply(contents: &mut Vec<u8>, damage: &Damage) {
    match *damage {
        Damage::Flip { position, bit } => {
            if let Some(byte) = contents.get_mut(position) {
                *byte ^= 1 << bit;
            }
        }
        Damage::Field { position, value } => {
            for (offset, byte) in value.to_le_bytes().into_iter().enumerate() {
                if let Some(target) = contents.get_mut(position + offset) {
                    *target = byte;
                }
            }
        }
        Damage::Truncate { size } => contents.truncate(size),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever a file says, loading it ends, and what is accepted lies in RAM above the tables.
    #[test]
    fn a_damaged_kernel_is_refused_or_loaded_within_ram(
        bz in any::<bool>(),
        asked in prop_oneof![Just(None), proptest::sample::select(&KernelProtocol::ALL[..]).prop_map(Some)],
        damages in proptest::collection::vec(damage(), 1..4),
    ) {
        let mut contents = if bz { bzimage() } else { elf(true) };
        for damage in &damages {
            apply(&mut contents, damage);
        }
        if let Ok(state) = boot(&contents, asked) {
            prop_assert!(state.kernel.start >= layout::HIGH_MEMORY_START);
            prop_assert!(state.kernel.end <= 32 << 20);
            prop_assert!(state.kernel.contains(&state.registers.rip));
        }
    }
}
