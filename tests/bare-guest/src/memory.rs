// SPDX-License-Identifier: Apache-2.0
//! Memory above the image: a bump allocator for DMA, small objects, and the `Hal` of the drivers.
//!
//! Physical and virtual addresses are the same.

use crate::boot_info::{MemoryMap, RAM};
use alloc::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr::{self, NonNull};
use core::slice;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

unsafe extern "C" {
    static image_end: u8;
    /// The page directory pointer table, 512 entries of 1 GiB; boot.s fills the first four.
    static mut pdpt: [u64; 512];
}

const GIB: u64 = 1 << 30;
/// Present, writable, user, accessed.
const TABLE: u64 = 0x27;
/// The same, dirty, and 2 MiB large.
const LARGE_PAGE: u64 = 0xe7;

static NEXT: AtomicU64 = AtomicU64::new(0);
static END: AtomicU64 = AtomicU64::new(0);

/// Takes the rest of the memory region that holds the image.
pub fn init(map: &MemoryMap) {
    let start = &raw const image_end as u64;
    let region = map
        .regions()
        .iter()
        .find(|r| r.kind == RAM && r.start <= start && start < r.start + r.len);
    // Without a map, or without the image in it, two MiB are all that can be hoped for.
    let end = region.map_or(start + (2 << 20), |r| r.start + r.len);
    NEXT.store(start, Ordering::Relaxed);
    END.store(end.min(1 << 32), Ordering::Relaxed);
}

/// Maps what a memory region has above 4 GiB, up to 512 GiB, one to one. What is mapped already
/// stays so.
pub fn map_high(start: u64, len: u64) {
    let end = (start + len).min(512 * GIB);
    for slot in (start.max(4 * GIB) / GIB)..end.div_ceil(GIB) {
        let entry = (&raw mut pdpt).cast::<u64>().wrapping_add(slot as usize);
        // SAFETY: `slot` is below 512; the table is boot.s's, and there is one thread. An entry
        // that was not present is in no TLB.
        unsafe {
            if entry.read_volatile() == 0 {
                let directory = take(PAGE_SIZE, PAGE_SIZE);
                for (page, bytes) in (0..).zip(directory.chunks_mut(8)) {
                    let large: u64 = slot * GIB + (page << 21) + LARGE_PAGE;
                    bytes.copy_from_slice(&large.to_le_bytes());
                }
                entry.write_volatile(directory.as_ptr() as u64 + TABLE);
            }
        }
    }
}

/// The range of free memory, first and last+1 byte.
pub fn free() -> (u64, u64) {
    (NEXT.load(Ordering::Relaxed), END.load(Ordering::Relaxed))
}

/// Takes `len` bytes, zeroed, at a multiple of `align` (a power of two). They are never given back
/// but by [`release`].
///
/// # Panics
///
/// When memory has run out: the VM was given too little for its step.
pub fn take(len: usize, align: usize) -> &'static mut [u8] {
    let mask = align as u64 - 1;
    let start = (NEXT.load(Ordering::Relaxed) + mask) & !mask;
    let end = start + len as u64;
    assert!(
        end <= END.load(Ordering::Relaxed),
        "no memory for {len} more bytes"
    );
    NEXT.store(end, Ordering::Relaxed);
    // SAFETY: the range is RAM, mapped, and handed out once.
    let bytes = unsafe { slice::from_raw_parts_mut(start as *mut u8, len) };
    bytes.fill(0);
    bytes
}

/// Where [`take`] stands now.
pub fn mark() -> u64 {
    NEXT.load(Ordering::Relaxed)
}

/// Takes back all that was taken since `mark`.
///
/// # Safety
///
/// Nothing taken since may be used any more, by this guest or by a device.
pub unsafe fn release(mark: u64) {
    NEXT.store(mark, Ordering::Relaxed);
}

/// The drivers' view of memory: identity.
pub struct BareHal;

// SAFETY: `take` hands out each page once, zeroed and mapped.
unsafe impl Hal for BareHal {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let bytes = NonNull::from(take(pages * PAGE_SIZE, PAGE_SIZE)).cast();
        (bytes.as_ptr() as u64, bytes)
    }

    unsafe fn dma_dealloc(_: PhysAddr, _: NonNull<u8>, _: usize) -> i32 {
        0
    }

    unsafe fn mmio_phys_to_virt(address: PhysAddr, _: usize) -> NonNull<u8> {
        NonNull::new(address as *mut u8).unwrap_or(NonNull::dangling())
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        buffer.as_ptr().cast::<u8>() as u64
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}

/// Room for small objects: lists of slots, and the queues' indirect descriptor tables.
const HEAP_SIZE: usize = 256 * 1024;
const CLASSES: usize = 17;

/// The heap: one free list for each power of two up to 64 KiB, filled from a fixed arena.
struct Heap {
    arena: UnsafeCell<[u8; HEAP_SIZE]>,
    used: AtomicUsize,
    free: [AtomicUsize; CLASSES],
}

// SAFETY: there is one thread.
unsafe impl Sync for Heap {}

#[global_allocator]
static HEAP: Heap = Heap {
    arena: UnsafeCell::new([0; HEAP_SIZE]),
    used: AtomicUsize::new(0),
    free: [const { AtomicUsize::new(0) }; CLASSES],
};

fn class(layout: Layout) -> usize {
    layout
        .size()
        .max(layout.align())
        .max(16)
        .next_power_of_two()
        .trailing_zeros() as usize
}

// SAFETY: a block is on a free list or with one owner, never both; there is one thread.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some(list) = self.free.get(class(layout)) else {
            return ptr::null_mut();
        };
        let head = list.load(Ordering::Relaxed);
        if head != 0 {
            // SAFETY: a block on the list holds the address of the next.
            list.store(unsafe { (head as *const usize).read() }, Ordering::Relaxed);
            return head as *mut u8;
        }
        let size = 1 << class(layout);
        let base = self.arena.get() as usize;
        let start = (base + self.used.load(Ordering::Relaxed)).next_multiple_of(size);
        if start + size > base + HEAP_SIZE {
            return ptr::null_mut();
        }
        self.used.store(start + size - base, Ordering::Relaxed);
        start as *mut u8
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if let Some(list) = self.free.get(class(layout)) {
            // SAFETY: the block is free and at least 16 bytes long.
            unsafe { block.cast::<usize>().write(list.load(Ordering::Relaxed)) };
            list.store(block as usize, Ordering::Relaxed);
        }
    }
}
