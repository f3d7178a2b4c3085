// SPDX-License-Identifier: Apache-2.0
//! What people read of a move.

use brume_api::{MigrationPass, MigrationPhase, MigrationRole, MigrationStatus};

use crate::amount;
use crate::ctl::aligned;

/// A phase, in the words of the command line.
pub(super) fn phase(phase: MigrationPhase) -> &'static str {
    match phase {
        MigrationPhase::None => "no move",
        MigrationPhase::Listening => "waiting for a source",
        MigrationPhase::Connecting => "connecting",
        MigrationPhase::Negotiating => "agreeing on what moves",
        MigrationPhase::PreCopy => "pre-copy",
        MigrationPhase::SwitchOver => "hand-over",
        MigrationPhase::PostCopy => "post-copy",
        MigrationPhase::PostCopyInterrupted => "post-copy, interrupted",
        MigrationPhase::InDoubt => "in doubt",
        MigrationPhase::Completed => "completed",
        MigrationPhase::Cancelled => "called off",
        MigrationPhase::Failed => "failed",
        MigrationPhase::Lost => "lost",
    }
}

/// Where the guest is as long as both sides live.
pub(super) fn place(status: &MigrationStatus) -> String {
    let peer = status.peer.as_deref().unwrap_or("the other side");
    let (here, there) = match status.role {
        MigrationRole::Target => (format!("at {peer}"), "here".to_owned()),
        _ => ("here".to_owned(), format!("at {peer}")),
    };
    match status.phase {
        MigrationPhase::SwitchOver => "standing still".into(),
        MigrationPhase::Lost => format!("not here any more; it was {there}"),
        MigrationPhase::InDoubt => "standing still until both sides have found each other".into(),
        MigrationPhase::PostCopy | MigrationPhase::Completed => there,
        MigrationPhase::PostCopyInterrupted => {
            format!("{there}, until it touches memory that is missing")
        }
        _ => here,
    }
}

/// The line that is written anew while the machine moves.
pub(super) fn live(status: &MigrationStatus) -> String {
    let mut parts = vec![phase(status.phase).to_owned()];
    match status.phase {
        MigrationPhase::PreCopy => {
            parts.push(format!("pass {}", status.pass));
            parts.extend(traffic(status));
            parts.push(format!("dirtied {}", amount::rate(status.dirty_rate)));
            let expected = status.expected_downtime_us;
            parts.extend(expected.map(|us| format!("downtime {}", amount::micros(us))));
            if status.throttle_percent > 0 {
                parts.push(format!("slowed by {} %", status.throttle_percent));
            }
            let left = status.time_left_ms;
            parts.extend(left.map(|ms| format!("{} left", amount::seconds(ms))));
        }
        MigrationPhase::PostCopy => {
            parts.extend(traffic(status));
            parts.push(format!("{} pages left", status.remaining_pages));
            parts.push(format!("{} faults", status.faults));
        }
        _ => {}
    }
    parts.join(", ")
}

fn traffic(status: &MigrationStatus) -> [String; 2] {
    [amount::bytes(status.bytes), amount::rate(status.bandwidth)]
}

/// The line of a pass that is over.
pub(super) fn pass(pass: &MigrationPass) -> String {
    let mut line = format!(
        "pass {}: {} pages, {} in {}, {}; {} written meanwhile",
        pass.pass,
        pass.pages,
        amount::bytes(pass.bytes),
        amount::micros(pass.duration_us),
        amount::rate(pass.bandwidth),
        pass.dirtied_pages,
    );
    if pass.skipped_pages > 0 {
        line.push_str(&format!(", {} left for the next", pass.skipped_pages));
    }
    if pass.throttle_percent > 0 {
        line.push_str(&format!(", guest slowed by {} %", pass.throttle_percent));
    }
    line
}

/// What to do about a move that does not get on by itself.
pub(super) fn help(status: &MigrationStatus) -> Option<String> {
    let peer = status.peer.as_deref().unwrap_or("the other side");
    match status.phase {
        MigrationPhase::PostCopyInterrupted if status.role == MigrationRole::Target => {
            Some(format!(
                "the connection broke while memory followed: the guest runs here until it touches \
                 what is missing. {peer}, which has that, looks for this process again and again; \
                 `brume ctl migrate --resume` there says where it is"
            ))
        }
        MigrationPhase::PostCopyInterrupted => Some(format!(
            "the connection broke while memory followed: the guest runs at {peer} until it touches \
             what is missing. This process looks for it again and again; `brume ctl migrate --resume \
             ADDR` names another address, and `--decide abandon` gives the guest up"
        )),
        MigrationPhase::InDoubt => {
            let other_way = match status.role {
                MigrationRole::Source => "; --resume ADDR tries another address",
                _ => "",
            };
            // A target without all of the memory cannot run it.
            let runs_here = status.role == MigrationRole::Source || status.remaining_pages == 0;
            let lost = if runs_here {
                "`brume ctl migrate --decide run` has it go on here"
            } else {
                "the guest is lost with the rest of its memory: `brume ctl migrate --decide abandon` \
                 gives it up"
            };
            Some(format!(
                "the connection broke at the hand-over: neither side runs the guest until both have \
                 found each other, which is tried again and again{other_way}. If {peer} is lost for \
                 good, {lost}"
            ))
        }
        _ => None,
    }
}

/// Why a move that is over did not bring the guest to the other side, and where it is.
pub(super) fn why_not(status: &MigrationStatus) -> String {
    let because = status.error.as_deref();
    let because = because
        .map(|error| format!(": {error}"))
        .unwrap_or_default();
    let (here, none) = match status.role {
        MigrationRole::Target => ("the guest is not here", "nothing moves"),
        _ => (
            "the guest is here, as before",
            "nothing moves; the guest is here",
        ),
    };
    match status.phase {
        MigrationPhase::Cancelled => format!("the move was called off{because}; {here}"),
        MigrationPhase::None => none.into(),
        MigrationPhase::Lost => format!("the guest is lost{because}"),
        _ => format!("the move failed{because}; {here}"),
    }
}

/// Where to look for a guest one of whose processes ended.
pub(super) fn where_if_lost(status: &MigrationStatus) -> &'static str {
    match status.phase {
        MigrationPhase::PostCopy
        | MigrationPhase::PostCopyInterrupted
        | MigrationPhase::Completed
            if status.role == MigrationRole::Target =>
        {
            "the guest ran here and ended with it"
        }
        MigrationPhase::SwitchOver | MigrationPhase::InDoubt => {
            "the guest stood still for its hand-over; ask the other side whether it runs there"
        }
        _ if status.role == MigrationRole::Target => {
            "the guest had not come; it is where it was before"
        }
        MigrationPhase::PostCopy | MigrationPhase::PostCopyInterrupted => {
            "the guest ran at the other side, but memory that had not followed is lost"
        }
        _ => "the guest ended with it, unless the other side says that it runs there",
    }
}

/// All that is known of a move, a line for each.
pub(super) fn summary(status: &MigrationStatus) -> String {
    if status.phase == MigrationPhase::None {
        return "nothing moves".into();
    }
    let mut rows = vec![
        ("move", phase(status.phase).to_owned()),
        ("guest", place(status)),
    ];
    if let Some(peer) = &status.peer {
        rows.push(("other side", peer.clone()));
    }
    rows.push((
        "time",
        format!(
            "{}, {} passes",
            amount::seconds(status.elapsed_ms),
            passes(status)
        ),
    ));
    rows.push((
        "memory",
        format!(
            "{}, {} on the wire, {}",
            amount::bytes(status.memory_bytes),
            amount::bytes(status.bytes),
            amount::rate(status.bandwidth)
        ),
    ));
    rows.push((
        "pages",
        format!(
            "{} sent, {} of zeros left out, {} left",
            status.pages, status.zero_pages, status.remaining_pages
        ),
    ));
    rows.extend(extras(status));
    let rows: Vec<_> = rows
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
    aligned(&rows)
}

/// What is not there for each move.
fn extras(status: &MigrationStatus) -> Vec<(&'static str, String)> {
    let mut rows = Vec::new();
    if status.compression_ratio_percent > 100 {
        let ratio = amount::ratio(status.compression_ratio_percent);
        rows.push(("compression", ratio));
    }
    if status.faults > 0 {
        rows.push(("faults", format!("{} served", status.faults)));
    }
    if let Some(downtime) = downtime(status) {
        rows.push(("downtime", downtime));
    }
    if let Some(error) = &status.error {
        rows.push(("because", error.clone()));
    }
    rows
}

/// How many passes there were.
pub(super) fn passes(status: &MigrationStatus) -> u32 {
    status.passes.last().map_or(0, |pass| pass.pass)
}

fn downtime(status: &MigrationStatus) -> Option<String> {
    let Some(downtime) = &status.downtime else {
        let expected = status.expected_downtime_us?;
        return Some(format!(
            "{} expected, {} allowed",
            amount::micros(expected),
            amount::micros(status.max_downtime_us)
        ));
    };
    Some(format!(
        "{}: pause {}, pages {}, state {}, load {}, resume {}",
        amount::micros(downtime.total_us),
        amount::micros(downtime.pause_us),
        amount::micros(downtime.pages_us),
        amount::micros(downtime.state_us),
        amount::micros(downtime.load_us),
        amount::micros(downtime.resume_us)
    ))
}

#[cfg(test)]
mod tests {
    use brume_api::MigrationDowntime;

    use super::*;

    fn moving() -> MigrationStatus {
        MigrationStatus {
            role: MigrationRole::Source,
            phase: MigrationPhase::PreCopy,
            peer: Some("tcp:host2:4444".into()),
            pass: 3,
            memory_bytes: 1 << 30,
            bytes: 312 << 20,
            pages: 79_872,
            zero_pages: 100,
            remaining_pages: 7,
            dirty_rate: 120_000_000,
            bandwidth: 1_200_000_000,
            expected_downtime_us: Some(18_000),
            max_downtime_us: 20_000,
            elapsed_ms: 1_234,
            ..MigrationStatus::default()
        }
    }

    #[test]
    fn the_live_line_says_what_decides_about_the_end() {
        assert_eq!(
            live(&moving()),
            "pre-copy, pass 3, 312.0 MiB, 1.2 GB/s, dirtied 120.0 MB/s, downtime 18.0 ms"
        );
        let slowed = MigrationStatus {
            throttle_percent: 20,
            time_left_ms: Some(4_560),
            ..moving()
        };
        assert!(live(&slowed).ends_with("slowed by 20 %, 4.56 s left"));
        let connecting = MigrationStatus {
            phase: MigrationPhase::Connecting,
            ..moving()
        };
        assert_eq!(live(&connecting), "connecting");
    }

    #[test]
    fn a_pass_is_one_line() {
        let over = MigrationPass {
            pass: 2,
            pages: 412,
            skipped_pages: 3,
            bytes: 3 << 19,
            duration_us: 1_500,
            bandwidth: 1_048_576_000,
            dirtied_pages: 20,
            throttle_percent: 10,
            ..MigrationPass::default()
        };
        assert_eq!(
            pass(&over),
            "pass 2: 412 pages, 1.5 MiB in 1.5 ms, 1.0 GB/s; 20 written meanwhile, \
             3 left for the next, guest slowed by 10 %"
        );
    }

    #[test]
    fn it_is_said_where_the_guest_is() {
        let mut status = moving();
        assert_eq!(place(&status), "here");
        status.phase = MigrationPhase::Completed;
        assert_eq!(place(&status), "at tcp:host2:4444");
        status.role = MigrationRole::Target;
        assert_eq!(place(&status), "here");
        status.phase = MigrationPhase::Failed;
        assert_eq!(place(&status), "at tcp:host2:4444");
        status.error = Some("no route".into());
        assert_eq!(
            why_not(&status),
            "the move failed: no route; the guest is not here"
        );
        assert_eq!(
            where_if_lost(&status),
            "the guest had not come; it is where it was before"
        );
        status.role = MigrationRole::Source;
        assert_eq!(
            why_not(&status),
            "the move failed: no route; the guest is here, as before"
        );
        status.phase = MigrationPhase::Lost;
        assert_eq!(why_not(&status), "the guest is lost: no route");
        assert_eq!(
            place(&status),
            "not here any more; it was at tcp:host2:4444"
        );
    }

    #[test]
    fn the_summary_breaks_the_downtime_down() {
        let status = MigrationStatus {
            phase: MigrationPhase::Completed,
            downtime: Some(MigrationDowntime {
                total_us: 15_100,
                pause_us: 100,
                pages_us: 5_000,
                state_us: 4_000,
                load_us: 3_500,
                resume_us: 2_500,
            }),
            compression_ratio_percent: 215,
            ..moving()
        };
        let expected = "\
move         completed
guest        at tcp:host2:4444
other side   tcp:host2:4444
time         1.23 s, 0 passes
memory       1024.0 MiB, 312.0 MiB on the wire, 1.2 GB/s
pages        79872 sent, 100 of zeros left out, 7 left
compression  to 1/2.15
downtime     15.1 ms: pause 0.1 ms, pages 5.0 ms, state 4.0 ms, load 3.5 ms, resume 2.5 ms";
        assert_eq!(summary(&status), expected);
        assert_eq!(summary(&MigrationStatus::default()), "nothing moves");
    }
}
