// SPDX-License-Identifier: Apache-2.0
//! An interrupt line, as a device sees it.

use std::fmt;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// An edge-triggered interrupt line.
///
/// A device only ever raises it; whether that ends in an irqfd, an MSI or a closure of a test is
/// none of its business. Clones raise the same line.
#[derive(Clone)]
pub struct Interrupt(Line);

#[derive(Clone)]
enum Line {
    Event(Arc<EventFd>),
    Call(Arc<dyn Fn() + Send + Sync>),
}

impl Interrupt {
    /// A line that is raised by writing to `event`, as an irqfd wants it.
    pub fn from_event(event: Arc<EventFd>) -> Self {
        Self(Line::Event(event))
    }

    /// A line that is raised by calling `raise`.
    pub fn from_fn(raise: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Line::Call(Arc::new(raise)))
    }

    /// Raises the line once.
    pub fn raise(&self) {
        match &self.0 {
            Line::Event(event) => {
                // The only failure of a write of 1 is a counter at its end: a raise is pending
                // already, and an edge that has not been taken swallows the next one.
                let _ = event.write(1);
            }
            Line::Call(raise) => raise(),
        }
    }
}

impl fmt::Debug for Interrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Line::Event(_) => "Interrupt(event)",
            Line::Call(_) => "Interrupt(call)",
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    #[test]
    fn each_raise_reaches_the_event() {
        let event = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let line = Interrupt::from_event(event.clone());
        line.raise();
        line.clone().raise();
        assert_eq!(event.read().unwrap(), 2);
    }

    #[test]
    fn a_full_event_does_not_block_or_fail() {
        let event = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        event.write(u64::MAX - 1).unwrap();
        Interrupt::from_event(event).raise();
    }

    #[test]
    fn each_raise_calls_the_closure() {
        let count = Arc::new(AtomicU32::new(0));
        let seen = count.clone();
        let line = Interrupt::from_fn(move || {
            seen.fetch_add(1, Ordering::Relaxed);
        });
        line.raise();
        line.raise();
        assert_eq!(count.load(Ordering::Relaxed), 2);
    }
}
