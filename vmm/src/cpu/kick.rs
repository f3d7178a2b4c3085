// SPDX-License-Identifier: Apache-2.0
//! Getting a vCPU thread out of the guest.
//!
//! A signal interrupts KVM_RUN. One that arrives just before KVM_RUN would be lost, so its handler,
//! which runs on the vCPU's own thread, also sets `immediate_exit` in the shared run page, which
//! makes the next KVM_RUN return at once. The thread clears it again when it is out. As only that
//! thread touches the page, nothing races; as the pointer is a thread-local of that thread, a
//! signal that goes astray does nothing.
//!
//! This is a module with unsafe code: a signal handler and a raw pointer to the run page.

#![allow(unsafe_code)]

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::Once;
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;
use libc::siginfo_t;
use std::os::unix::thread::JoinHandleExt;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn on_kick(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    IMMEDIATE_EXIT.with(|flag| {
        let flag = flag.get();
        if !flag.is_null() {
            // SAFETY: the pointer is set by the `Kickable` of this very thread, which outlives no
            // run page and clears it on drop; the page is shared with the kernel, so volatile.
            unsafe { flag.write_volatile(1) };
        }
    });
}

/// Makes the process ready for kicks. It has to come before the first thread that may get one.
pub(super) fn install_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if let Err(error) = register_signal_handler(SIGRTMIN(), on_kick) {
            // It fails for a bad signal number only.
            tracing::error!("vCPUs cannot be interrupted: {error}");
        }
    });
}

/// A vCPU on its own thread, which can be kicked as long as this exists.
pub(super) struct Kickable {
    pub(super) vcpu: VcpuFd,
}

impl Kickable {
    /// Takes the vCPU over to the calling thread.
    pub(super) fn on_this_thread(mut vcpu: VcpuFd) -> Self {
        let flag = ptr::addr_of_mut!(vcpu.get_kvm_run().immediate_exit);
        IMMEDIATE_EXIT.with(|cell| cell.set(flag));
        Self { vcpu }
    }

    /// Sets or clears what makes KVM_RUN return at once.
    pub(super) fn set_immediate_exit(&mut self, on: bool) {
        self.vcpu.set_kvm_immediate_exit(u8::from(on));
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.with(|cell| cell.set(ptr::null_mut()));
    }
}

/// Gets the thread out of the guest, or keeps it from going in once.
pub(super) fn kick<T>(thread: &JoinHandle<T>) {
    // SAFETY: the handle has not been joined, so the thread's id is valid, also if it has ended.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGRTMIN()) };
}
