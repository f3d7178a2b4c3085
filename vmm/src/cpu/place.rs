// SPDX-License-Identifier: Apache-2.0
//! Where a vCPU is: what it will touch first when it goes on, be it elsewhere.
//!
//! The page tables are those of Intel's manual, volume 3, chapter 5, "Paging", for 64-bit mode. A
//! guest in another mode needs few pages, and is not looked for.

use std::iter;

use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;

use crate::kvm::{KvmError, failed};

/// `CR0.PG`: paging is on.
const PAGING: u64 = 1 << 31;
/// `CR4.LA57`: page tables of five levels.
const FIVE_LEVELS: u64 = 1 << 12;
/// `EFER.LMA`: 64-bit mode.
const LONG_MODE: u64 = 1 << 10;
/// In an entry of a page table: it is in use.
const PRESENT: u64 = 1;
/// In an entry of a page table: it is of a large page.
const LARGE: u64 = 1 << 7;
/// In an entry of a page table, and `CR3`: the guest-physical address.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Where a vCPU is.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// The guest-physical address of its first page table.
    root: u64,
    levels: Levels,
    /// Linear addresses.
    touched: Vec<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Levels {
    /// Linear addresses are guest-physical ones.
    None,
    Four,
    Five,
    /// Of another kind.
    Other,
}

impl Place {
    /// The place of a vCPU that is held.
    ///
    /// # Errors
    ///
    /// KVM does not show it.
    pub(crate) fn of(vcpu: &VcpuFd) -> Result<Self, KvmError> {
        let regs = vcpu.get_regs().map_err(failed("show registers"))?;
        let sregs = vcpu.get_sregs().map_err(failed("show control registers"))?;
        Ok(Self::new(&regs, &sregs))
    }

    fn new(regs: &kvm_regs, sregs: &kvm_sregs) -> Self {
        let levels = match (sregs.cr0 & PAGING, sregs.efer & LONG_MODE) {
            (0, _) => Levels::None,
            (_, 0) => Levels::Other,
            _ if sregs.cr4 & FIVE_LEVELS == 0 => Levels::Four,
            _ => Levels::Five,
        };
        Self {
            root: sregs.cr3 & ADDRESS,
            levels,
            touched: vec![
                sregs.cs.base.wrapping_add(regs.rip),
                sregs.ss.base.wrapping_add(regs.rsp),
                // The next interrupt needs these.
                sregs.idt.base,
                sregs.gdt.base,
                sregs.tr.base,
                // Kernels keep what belongs to a CPU at one, programs what belongs to a thread.
                sregs.gs.base,
                sregs.fs.base,
            ],
        }
    }

    /// The guest-physical addresses of what it touches, page tables among them, the first one
    /// first. `read` gives the eight bytes at such an address, if there is memory.
    pub(crate) fn addresses(&self, read: impl Fn(u64) -> Option<u64>) -> Vec<u64> {
        let levels = match self.levels {
            Levels::None => return self.touched.clone(),
            Levels::Other => return Vec::new(),
            Levels::Four => 4,
            Levels::Five => 5,
        };
        let walks = self.touched.iter();
        walks
            .flat_map(|&linear| walk(self.root, levels, linear, &read))
            .collect()
    }
}

/// The tables that the walk to `linear` goes through, and where it ends, if it does.
fn walk(
    root: u64,
    levels: u32,
    linear: u64,
    read: &impl Fn(u64) -> Option<u64>,
) -> impl Iterator<Item = u64> {
    let mut level = levels;
    let step = move |&at: &u64| {
        level = level.checked_sub(1)?;
        let shift = 12 + 9 * level;
        let entry = read(at + (linear >> shift & 0x1ff) * 8)?;
        if entry & PRESENT == 0 {
            return None;
        }
        if level > 0 && entry & LARGE == 0 {
            return Some(entry & ADDRESS);
        }
        level = 0;
        let within = (1 << shift) - 1;
        Some((entry & ADDRESS & !within) | (linear & within))
    };
    iter::successors(Some(root), step)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn place(cr0: u64, cr4: u64, efer: u64) -> Place {
        let regs = kvm_regs {
            rip: 0x40_1234,
            rsp: 0xffff_8000_0020_0ff8,
            ..kvm_regs::default()
        };
        let sregs = kvm_sregs {
            cr0,
            cr3: 0x1018,
            cr4,
            efer,
            ..kvm_sregs::default()
        };
        let mut place = Place::new(&regs, &sregs);
        place.touched.truncate(2);
        place
    }

    #[test]
    fn walks_go_through_tables_to_small_and_large_pages() {
        // What entries have beside addresses: no-execute, dirty, accessed, a key.
        const MORE: u64 = 0xf800_0000_0000_0067;
        let four = BTreeMap::from([
            (0x1000, 0x2000 | MORE),
            (0x2000, 0x3000 | MORE),
            (0x3000 + 2 * 8, 0x4000 | MORE),
            (0x4000 + 8, 0x77_7000 | MORE),
            (0x1000 + 256 * 8, 0x5000 | MORE),
            (0x5000, 0x6000 | MORE),
            (0x6000 + 8, 0x80_0000 | LARGE | MORE),
        ]);
        let read = |at: u64| Some(four.get(&at).copied().unwrap_or(0));
        let addresses = place(PAGING, 0, LONG_MODE).addresses(read);
        let code = [0x1000, 0x2000, 0x3000, 0x4000, 0x77_7234];
        let stack = [0x1000, 0x5000, 0x6000, 0x80_0ff8];
        assert_eq!(addresses, [&code[..], &stack].concat());
        // One table more, whose second entry leads nowhere.
        let five = |at: u64| match at {
            0x1000 => Some(0x1000 | PRESENT),
            _ => read(at),
        };
        let addresses = place(PAGING, FIVE_LEVELS, LONG_MODE).addresses(five);
        assert_eq!(addresses.first(), Some(&0x1000));
        assert_eq!(addresses.last(), Some(&0x1000));
    }

    #[test]
    fn walks_end_where_a_guest_has_made_no_tables() {
        let place = place(PAGING, 0, LONG_MODE);
        assert_eq!(place.addresses(|_| None), [0x1000; 2]);
        assert_eq!(place.addresses(|_| Some(0)), [0x1000; 2]);
        // Each table is its own next one, at the end of all memory.
        let last = ADDRESS | PRESENT;
        let addresses = place.addresses(|_| Some(last));
        assert_eq!(addresses.len(), 10);
        assert_eq!(addresses.get(1), Some(&ADDRESS));
    }

    #[test]
    fn without_paging_addresses_are_what_they_are() {
        let nothing = |_| None;
        let addresses = place(0, 0, 0).addresses(nothing);
        assert_eq!(addresses, [0x40_1234, 0xffff_8000_0020_0ff8]);
        assert!(place(PAGING, 0, 0).addresses(nothing).is_empty());
    }
}
