// SPDX-License-Identifier: Apache-2.0
//! A line that carries nothing for half a minute, and then all that it has held back. Each side has
//! given up waiting by then, or is about to.

use std::panic::resume_unwind;
use std::thread;
use std::time::{Duration, Instant};

use brume_api::MigrationPhase;
use brume_tests::migration::{Link, Pair, Setup, Side};
use brume_tests::proxy::{Fault, Harm, Place, Way};
use serde_json::{Value, json};

use crate::migration::{LIMIT, WRITES, assert_settled};
use crate::migration_faults::{assert_goes_on, kept, proxy, sprung, waits_again};

/// How long the line stalls, which is as long as a target waits.
const STALL: Duration = Duration::from_secs(30);

/// Where the line stalls.
#[derive(Clone, Copy)]
enum Where {
    /// After so many bytes of the first connection.
    Bytes(u64),
    /// When this message is on its way.
    Message(Way, &'static str),
}

/// What is so while the line stalls.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Meanwhile {
    /// The source gives it up.
    Kept,
    /// The source does not know whether the target runs the machine, which does not.
    Nowhere,
    /// The source does not know it, and the target does.
    There,
    /// The guest is at the target, and waits for its memory.
    Waits,
}

/// A move over a line that stalls.
struct Stall {
    name: &'static str,
    link: Link,
    mode: &'static str,
    place: Where,
    meanwhile: Meanwhile,
}

impl Stall {
    /// Moves a machine, and sees to it until it is found where it belongs.
    fn ride_out(&self) {
        let mut pair = Pair::start(&Setup {
            args: WRITES,
            link: self.link,
            proxied: true,
            ..Setup::default()
        });
        pair.assert_runs_on(Side::Source);
        let runs = pair.watch_runs();
        self.arm(&pair);
        pair.send(&self.request());
        sprung(&pair);
        let end = Instant::now() + STALL;
        self.check_meanwhile(&mut pair);
        thread::sleep(end.saturating_duration_since(Instant::now()));
        proxy(&pair).go_on();
        if self.meanwhile == Meanwhile::Kept {
            assert_goes_on(&mut pair);
            waits_again(&pair);
            pair.moved(&json!({"connections": 2}), LIMIT);
        } else {
            for side in [Side::Source, Side::Target] {
                pair.wait(side, &[MigrationPhase::Completed], LIMIT);
            }
        }
        assert_settled(&mut pair);
        runs.end();
    }

    fn arm(&self, pair: &Pair) {
        match self.place {
            Where::Bytes(at) => proxy(pair).inject(Fault {
                connection: 0,
                way: Way::There,
                at,
                harm: Harm::Stall,
            }),
            Where::Message(way, message) => {
                proxy(pair).trap(way, Place::Before, message, Harm::Stall);
            }
        }
    }

    fn request(&self) -> Value {
        // So that a byte on the line is a byte of a page.
        json!({"mode": self.mode, "compression": "None"})
    }

    /// Checks what is so while nothing is carried, as soon as the source has noticed.
    fn check_meanwhile(&self, pair: &mut Pair) {
        let noticed = match self.meanwhile {
            Meanwhile::Kept => {
                kept(pair, MigrationPhase::Failed);
                return assert_goes_on(pair);
            }
            Meanwhile::Nowhere | Meanwhile::There => MigrationPhase::InDoubt,
            Meanwhile::Waits => MigrationPhase::PostCopyInterrupted,
        };
        pair.wait(Side::Source, &[noticed], LIMIT);
        let refused = pair.cancel(Side::Source);
        assert_eq!(refused.status, 400, "{}", refused.body);
        match self.meanwhile {
            Meanwhile::There => drop(pair.assert_runs_on(Side::Target)),
            Meanwhile::Nowhere => pair.assert_runs_nowhere(Duration::from_millis(300)),
            // Its guest may need nothing of what is missing yet.
            Meanwhile::Waits | Meanwhile::Kept => {}
        }
    }
}

#[test]
fn a_line_that_stalls_for_half_a_minute_leaves_the_machine_on_one_side() {
    use Meanwhile::{Kept, Nowhere, There, Waits};
    use Where::{Bytes, Message};
    let stalls = [
        ("in the first pass", Link::Tcp, Bytes(4 << 20), Kept),
        ("before Sent", Link::Tcp, Message(Way::There, "Sent"), Kept),
        (
            "before Sent, unix",
            Link::Unix,
            Message(Way::There, "Sent"),
            Kept,
        ),
        ("before Ready", Link::Tcp, Message(Way::Back, "Ready"), Kept),
        (
            "before Commit",
            Link::Tcp,
            Message(Way::There, "Commit"),
            Nowhere,
        ),
        (
            "before Commit, unix",
            Link::Unix,
            Message(Way::There, "Commit"),
            Nowhere,
        ),
        (
            "before TakenOver",
            Link::Tcp,
            Message(Way::Back, "TakenOver"),
            There,
        ),
        ("in post-copy", Link::Tcp, Bytes(8 << 20), Waits),
    ]
    .map(|(name, link, place, meanwhile)| Stall {
        name,
        link,
        mode: if meanwhile == Waits {
            "PostCopy"
        } else {
            "PreCopy"
        },
        place,
        meanwhile,
    });
    thread::scope(|scope| {
        // Side by side: nearly all of it is waiting.
        let threads: Vec<_> = stalls
            .iter()
            .map(|stall| {
                let thread = thread::Builder::new().name(stall.name.into());
                thread.spawn_scoped(scope, || stall.ride_out()).unwrap()
            })
            .collect();
        for thread in threads {
            if let Err(panic) = thread.join() {
                resume_unwind(panic);
            }
        }
    });
}
