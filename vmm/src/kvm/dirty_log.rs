// SPDX-License-Identifier: Apache-2.0
//! KVM's log of the pages that the guest has written (KVM API, 4.8, 4.117, 7.18).
//!
//! This is a module with unsafe code: one call that `kvm-ioctls` does not have.

#![allow(unsafe_code)]

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVMIO, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_enable_cap,
};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iowr_nr;

use super::{KvmError, Vm, failed};

ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// How pages leave the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LogMode {
    /// By being read: the only way that old hosts have.
    ClearedByRead,
    /// When they are cleared; reading changes nothing. A log that is switched on has all pages in
    /// it, so that switching it on costs nothing.
    ClearedByHand,
}

impl Vm {
    /// Chooses the best mode that the host has. To be called before a log is switched on.
    pub(super) fn choose_log_mode(&self) -> LogMode {
        let wanted = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
        let offered = self
            .fd
            .check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
        if u32::try_from(offered).unwrap_or(0) & wanted != wanted {
            return LogMode::ClearedByRead;
        }
        let capability = kvm_enable_cap {
            cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
            args: [wanted.into(), 0, 0, 0],
            ..Default::default()
        };
        match self.fd.enable_cap(&capability) {
            Ok(()) => LogMode::ClearedByHand,
            Err(_) => LogMode::ClearedByRead,
        }
    }

    /// The pages of memory region `slot` in the log, one bit each, `size` bytes long.
    pub(crate) fn dirty_log(&self, slot: u32, size: usize) -> Result<Vec<u64>, KvmError> {
        self.fd
            .get_dirty_log(slot, size)
            .map_err(failed("show the pages that the guest has written"))
    }

    /// Takes the pages in `words`, whose first bit is page `first_page`, a multiple of 64, out of
    /// the log; their next write enters them again. `pages` is how many the words are for: a
    /// multiple of 64, or up to the end of the region.
    pub(crate) fn clear_dirty_log(
        &self,
        slot: u32,
        first_page: u64,
        pages: u32,
        words: &[u64],
    ) -> Result<(), KvmError> {
        if u64::from(pages).div_ceil(64) > words.len() as u64 {
            return Err(failed("clear more pages than were named")(
                kvm_ioctls::Error::new(libc::EINVAL),
            ));
        }
        let request = kvm_clear_dirty_log {
            slot,
            num_pages: pages,
            first_page,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: words.as_ptr().cast_mut().cast(),
            },
        };
        // SAFETY: KVM reads one bit for each of the pages, which are not more than `words` has, and
        // writes nothing.
        let result = unsafe { ioctl_with_ref(&self.fd, KVM_CLEAR_DIRTY_LOG(), &request) };
        if result < 0 {
            return Err(failed("clear its log of written pages")(
                errno::Error::last(),
            ));
        }
        Ok(())
    }
}
