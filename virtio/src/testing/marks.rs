// SPDX-License-Identifier: Apache-2.0
//! The places where a device writes to guest memory, each of which has to mark what it wrote; and
//! guest memory in which the marks of one place can be made to fail, so that a test can show that
//! it would see it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use vm_memory::bitmap::Bitmap;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
};

use super::MEMORY_END;
use crate::memory::GuestMemory;

const PAGE: u64 = 4096;

/// Where guest memory is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Site {
    /// What the host's kernel has filled: `IoBuffers::mark_written`.
    HostIo,
    /// What a balloon has given back to the host.
    GivenBack,
    /// What is copied to a chain's buffers: `Buffers::write_at`.
    Copy,
    /// The status byte of a block request.
    Status,
    /// An element of the used ring.
    UsedElement,
    /// The index of the used ring.
    UsedIndex,
    /// The flags of the used ring.
    UsedFlags,
    /// The event index behind the used ring.
    AvailEvent,
}

pub(crate) const SITES: [Site; 8] = [
    Site::HostIo,
    Site::GivenBack,
    Site::Copy,
    Site::Status,
    Site::UsedElement,
    Site::UsedIndex,
    Site::UsedFlags,
    Site::AvailEvent,
];

#[derive(Default)]
struct Watch {
    /// Where marks fail.
    fails: Option<Site>,
    seen: BTreeSet<Site>,
    /// Pages that were marked by places where marks do not fail.
    marked: BTreeSet<u64>,
}

/// By where the memory is mapped.
static WATCHED: Mutex<BTreeMap<usize, Watch>> = Mutex::new(BTreeMap::new());
static COUNT: AtomicUsize = AtomicUsize::new(0);

fn id(memory: &GuestMemory) -> usize {
    memory.get_host_address(GuestAddress(0)).unwrap() as usize
}

/// Has to be called where marks are made, after that.
pub(crate) fn made(site: Site, memory: &GuestMemory, address: GuestAddress, len: usize) {
    if COUNT.load(Ordering::SeqCst) == 0 || len == 0 {
        return;
    }
    let mut watched = WATCHED.lock().unwrap();
    let Some(watch) = watched.get_mut(&id(memory)) else {
        return;
    };
    watch.seen.insert(site);
    let last = address.0 + len as u64 - 1;
    for page in address.0 / PAGE..=last / PAGE {
        if watch.fails != Some(site) {
            watch.marked.insert(page);
        } else if !watch.marked.contains(&page) {
            let region = memory.find_region(GuestAddress(page * PAGE)).unwrap();
            let offset = (page * PAGE - region.start_addr().0) as usize;
            (**region).bitmap().reset_addr_range(offset, 1);
        }
    }
}

/// Guest memory, once as devices have it and once as the guest has it, whose writes mark nothing
/// that devices see.
pub(crate) struct Watched {
    pub(crate) device: GuestMemory,
    pub(crate) guest: GuestMemory,
    before: Vec<u8>,
}

impl Watched {
    /// Memory in which the marks that are made at `fails` fail.
    pub(crate) fn new(fails: Option<Site>) -> Self {
        // In memory, where holes can be made on any host.
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(MEMORY_END).unwrap();
        let len = MEMORY_END as usize;
        let [device, guest] = [(); 2].map(|()| {
            let place = FileOffset::new(file.try_clone().unwrap(), 0);
            let region = GuestRegionMmap::from_range(GuestAddress(0), len, Some(place));
            GuestMemory::from_regions(vec![region.unwrap()]).unwrap()
        });
        let watch = Watch {
            fails,
            ..Watch::default()
        };
        WATCHED.lock().unwrap().insert(id(&device), watch);
        COUNT.fetch_add(1, Ordering::SeqCst);
        Self {
            device,
            guest,
            before: Vec::new(),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; MEMORY_END as usize];
        self.guest.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }

    /// What comes from now on is the work that is looked at.
    pub(crate) fn begin(&mut self) {
        self.before = self.bytes();
        for memory in [&self.device, &self.guest] {
            for region in memory.iter() {
                (**region).bitmap().reset();
            }
        }
        let mut watched = WATCHED.lock().unwrap();
        let watch = watched.get_mut(&id(&self.device)).unwrap();
        (watch.seen, watch.marked) = Default::default();
    }

    /// The addresses of pages that have changed, that the guest has not written, and that are not
    /// marked; and where marks were made.
    pub(crate) fn unmarked(&self) -> (Vec<u64>, BTreeSet<Site>) {
        let after = self.bytes();
        let marked = |memory: &GuestMemory, address: u64| {
            let region = memory.find_region(GuestAddress(address)).unwrap();
            region.bitmap().dirty_at(address as usize)
        };
        let pages = self
            .before
            .chunks(PAGE as usize)
            .zip(after.chunks(PAGE as usize));
        let changed = (0..).step_by(PAGE as usize).zip(pages);
        let unmarked = changed.filter(|&(address, (before, after))| {
            before != after
                && ![&self.device, &self.guest]
                    .iter()
                    .any(|m| marked(m, address))
        });
        let seen = WATCHED.lock().unwrap()[&id(&self.device)].seen.clone();
        (unmarked.map(|(address, _)| address).collect(), seen)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        WATCHED.lock().unwrap().remove(&id(&self.device));
        COUNT.fetch_sub(1, Ordering::SeqCst);
    }
}
