// SPDX-License-Identifier: Apache-2.0
//! The configuration space, byte for byte.

use std::io::Write;

use tempfile::NamedTempFile;

use super::*;

#[test]
fn each_field_is_where_the_standard_has_it() {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(&[0; 4096 + 512 + 100]).unwrap();
    let mut disk = Disk::open(file.path(), true, false).unwrap();
    (disk.logical_block, disk.physical_block) = (512, 4096);
    let space = config_space(&disk);
    let field = |offset: usize, len: usize| {
        let mut bytes = [0; 8];
        bytes[..len].copy_from_slice(&space[offset..offset + len]);
        u64::from_le_bytes(bytes)
    };
    assert_eq!(field(0, 8), 9, "capacity");
    assert_eq!(field(8, 4), 0, "size_max");
    assert_eq!(field(12, 4), 254, "seg_max");
    assert_eq!(field(16, 4), 0, "geometry");
    assert_eq!(field(20, 4), 512, "blk_size");
    assert_eq!(field(24, 1), 3, "physical_block_exp");
    assert_eq!(field(25, 1), 0, "alignment_offset");
    assert_eq!(field(26, 2), 8, "min_io_size");
    assert_eq!(field(28, 4), 0, "opt_io_size");
    assert_eq!(field(32, 2), 0, "writeback");
    assert_eq!(field(34, 2), 1, "num_queues");
    assert_eq!(field(36, 4), 1 << 22, "max_discard_sectors");
    assert_eq!(field(40, 4), 1, "max_discard_seg");
    assert_eq!(field(44, 4), 8, "discard_sector_alignment");
    assert_eq!(field(48, 4), 1 << 18, "max_write_zeroes_sectors");
    assert_eq!(field(52, 4), 1, "max_write_zeroes_seg");
    assert_eq!(field(56, 1), 1, "write_zeroes_may_unmap");
    assert_eq!(field(57, 3), 0, "padding");
}
