// SPDX-License-Identifier: Apache-2.0
//! The host's random numbers.
//!
//! This is a module with unsafe code: the system call takes a plain pointer.

#![allow(unsafe_code)]

use std::io;

/// Fills `data` from the kernel's generator. It waits only on a host that has just been booted
/// and has not seeded it yet.
pub(super) fn fill(data: &mut [u8]) -> io::Result<()> {
    let mut rest = data;
    while !rest.is_empty() {
        // SAFETY: pointer and length are those of a slice that is ours to write.
        let result = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(result) {
            // Long requests are cut short by signals.
            Ok(count) => rest = rest.get_mut(count..).unwrap_or_default(),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}
