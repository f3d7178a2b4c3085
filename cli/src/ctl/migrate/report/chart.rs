// SPDX-License-Identifier: Apache-2.0
//! The pictures of the page, as SVG. All numbers are whole, so that none of them can become
//! something that is no number.

use std::fmt::Write;

use brume_api::{MigrationDowntime, MigrationPass};

use crate::amount;

const WIDTH: u64 = 800;
/// Of the picture of the passes.
const HEIGHT: u64 = 320;
const LEFT: u64 = 80;
const RIGHT: u64 = 88;
const TOP: u64 = 36;
const BOTTOM: u64 = 44;
const PLOT_WIDTH: u64 = WIDTH - LEFT - RIGHT;
const PLOT_HEIGHT: u64 = HEIGHT - TOP - BOTTOM;
/// How many lines a scale has above its 0.
const STEPS: u64 = 4;
/// How many passes can have their numbers below them.
const MAX_LABELS: usize = 16;

/// The top of a scale for values up to `max`: [`STEPS`] round steps.
fn top(max: u64) -> u64 {
    let least = max.div_ceil(STEPS).max(1);
    let mut magnitude: u64 = 1;
    loop {
        for factor in [1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25] {
            let step = magnitude.saturating_mul(factor);
            if step >= least {
                return step.saturating_mul(STEPS);
            }
        }
        magnitude = magnitude.saturating_mul(10);
    }
}

/// `value` on a scale that ends with `top` at `length`.
fn scaled(value: u64, top: u64, length: u64) -> u64 {
    let place = u128::from(value.min(top)) * u128::from(length) / u128::from(top.max(1));
    u64::try_from(place).unwrap_or(length)
}

/// Pages that were written, as bars, and the bandwidth, as a line, for each pass.
pub(super) fn passes(passes: &[MigrationPass]) -> String {
    let most = |value: fn(&MigrationPass) -> u64| passes.iter().map(value).max().unwrap_or(0);
    let pages_top = top(most(|pass| pass.dirtied_pages));
    let rate_top = top(most(|pass| pass.bandwidth));
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" \
         aria-label=\"Pages written and bandwidth of each pass\">\n"
    );
    legend(&mut svg);
    axes(&mut svg, pages_top, rate_top);
    let mut line = Vec::new();
    let mut dots = String::new();
    let label_each = passes.len().div_ceil(MAX_LABELS).max(1);
    for (index, pass) in passes.iter().enumerate() {
        let (from, to) = (edge(index, passes.len()), edge(index + 1, passes.len()));
        let (middle, gap) = (from.midpoint(to), (to - from) / 5);
        let high = scaled(pass.dirtied_pages, pages_top, PLOT_HEIGHT);
        let at = TOP + PLOT_HEIGHT - scaled(pass.bandwidth, rate_top, PLOT_HEIGHT);
        let rate = amount::rate(pass.bandwidth);
        // A string takes all that is written to it.
        let _ = writeln!(
            svg,
            "<rect class=\"bar\" x=\"{}\" y=\"{}\" width=\"{}\" height=\"{high}\">\
             <title>pass {}: {} pages written in {}</title></rect>",
            from + gap,
            TOP + PLOT_HEIGHT - high,
            (to - from).saturating_sub(2 * gap).max(1),
            pass.pass,
            pass.dirtied_pages,
            amount::micros(pass.duration_us),
        );
        line.push(format!("{middle},{at}"));
        let _ = writeln!(
            dots,
            "<circle class=\"dot\" cx=\"{middle}\" cy=\"{at}\" r=\"5\">\
             <title>pass {}: {rate}, {}</title></circle>",
            pass.pass,
            amount::bytes(pass.bytes),
        );
        if index % label_each == 0 {
            let _ = writeln!(
                svg,
                "<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                TOP + PLOT_HEIGHT + 18,
                pass.pass
            );
        }
    }
    let _ = writeln!(
        svg,
        "<polyline class=\"line\" points=\"{}\"/>\n{dots}</svg>",
        line.join(" ")
    );
    svg
}

/// Where the `index`th of `count` passes begins.
fn edge(index: usize, count: usize) -> u64 {
    let (index, count) = (index as u64, count as u64);
    LEFT + scaled(index, count, PLOT_WIDTH)
}

fn legend(svg: &mut String) {
    let right = WIDTH - RIGHT;
    let _ = writeln!(
        svg,
        "<rect class=\"bar\" x=\"{LEFT}\" y=\"6\" width=\"12\" height=\"12\"/>\
         <text x=\"{}\" y=\"16\">pages written during the pass (left)</text>\n\
         <line class=\"line\" x1=\"{}\" y1=\"12\" x2=\"{}\" y2=\"12\"/>\
         <text x=\"{right}\" y=\"16\" text-anchor=\"end\">bandwidth (right)</text>",
        LEFT + 18,
        right - 130,
        right - 108,
    );
}

fn axes(svg: &mut String, pages_top: u64, rate_top: u64) {
    let right = WIDTH - RIGHT;
    for step in 0..=STEPS {
        let y = TOP + PLOT_HEIGHT - scaled(step, STEPS, PLOT_HEIGHT);
        let pages = pages_top / STEPS * step;
        let rate = amount::rate(rate_top / STEPS * step);
        let _ = writeln!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{y}\" x2=\"{right}\" y2=\"{y}\"/>\
             <text x=\"{}\" y=\"{text}\" text-anchor=\"end\">{pages}</text>\
             <text x=\"{}\" y=\"{text}\">{rate}</text>",
            LEFT - 8,
            right + 8,
            text = y + 4,
        );
    }
    let _ = writeln!(
        svg,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">pass</text>",
        LEFT + PLOT_WIDTH / 2,
        HEIGHT - 6
    );
}

/// A part of the downtime: its name, what it is, and its length in microseconds.
type Part = (&'static str, &'static str, u64);

/// The parts in their order; what belongs to none of them is the last.
fn parts(downtime: &MigrationDowntime) -> Vec<Part> {
    let mut parts = vec![
        ("pause", "vCPUs held, devices stopped", downtime.pause_us),
        ("pages", "the last pages sent", downtime.pages_us),
        (
            "state",
            "state of vCPUs and devices taken and sent",
            downtime.state_us,
        ),
        (
            "load",
            "until the other side had all of it",
            downtime.load_us,
        ),
        ("resume", "handed over, until vCPUs ran", downtime.resume_us),
    ];
    let known: u64 = parts
        .iter()
        .fold(0, |sum, (_, _, us)| sum.saturating_add(*us));
    let rest = downtime.total_us.saturating_sub(known);
    if rest > 0 {
        parts.push(("rest", "none of these", rest));
    }
    parts
}

/// The parts of the downtime as a bar, and their numbers below it.
pub(super) fn downtime(downtime: &MigrationDowntime) -> String {
    let parts = parts(downtime);
    let whole = parts
        .iter()
        .fold(0_u64, |sum, (_, _, us)| sum.saturating_add(*us));
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} 36\" role=\"img\" aria-label=\"Parts of the downtime\">\n"
    );
    let mut rows = String::new();
    let mut before = 0_u64;
    for (index, (name, what, us)) in parts.iter().enumerate() {
        let from = scaled(before, whole, WIDTH);
        before = before.saturating_add(*us);
        let to = scaled(before, whole, WIDTH);
        let (time, share) = (amount::micros(*us), scaled(*us, whole, 1000));
        let share = format!("{}.{} %", share / 10, share % 10);
        let _ = writeln!(
            svg,
            "<rect class=\"part{index}\" x=\"{from}\" y=\"2\" width=\"{}\" height=\"32\">\
             <title>{name}: {time}, {share}</title></rect>",
            (to - from).saturating_sub(2).max(1),
        );
        let _ = writeln!(
            rows,
            "<tr><td><svg viewBox=\"0 0 12 12\" aria-hidden=\"true\"><rect class=\"part{index}\" \
             width=\"12\" height=\"12\"/></svg></td><td>{name}: {what}</td><td>{time}</td>\
             <td>{share}</td></tr>"
        );
    }
    svg.push_str("</svg>\n");
    format!(
        "{svg}<table class=\"parts\">\n<tr><th></th><th scope=\"col\">Part</th>\
         <th scope=\"col\">Time</th><th scope=\"col\">Share</th></tr>\n{rows}</table>\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_ends_at_a_round_number_that_is_not_less_than_the_most() {
        for (max, expected) in [
            (0, 4),
            (4, 4),
            (5, 8),
            (700, 800),
            (41_000, 48_000),
            (1_210_000_000, 1_600_000_000),
        ] {
            assert_eq!(top(max), expected, "{max}");
        }
        assert_eq!(top(u64::MAX), u64::MAX);
        assert_eq!(scaled(50, 200, 100), 25);
        assert_eq!(scaled(u64::MAX, u64::MAX, 240), 240);
        assert_eq!(scaled(300, 200, 100), 100);
        assert_eq!(scaled(1, 0, 100), 0);
    }

    #[test]
    fn bars_and_dots_are_where_their_numbers_are() {
        let pass = |pass, dirtied_pages, bandwidth| MigrationPass {
            pass,
            dirtied_pages,
            bandwidth,
            ..MigrationPass::default()
        };
        let svg = passes(&[pass(1, 400, 1_000_000_000), pass(2, 100, 2_000_000_000)]);
        // The scale ends at 400 pages and at 2 GB/s; the plot is 240 high and begins at 36, and
        // each pass has 316 of its width, of which a fifth is free on each side.
        assert!(
            svg.contains("y=\"36\" width=\"190\" height=\"240\""),
            "{svg}"
        );
        assert!(
            svg.contains("y=\"216\" width=\"190\" height=\"60\""),
            "{svg}"
        );
        assert!(svg.contains("points=\"238,156 554,36\""), "{svg}");
        assert!(
            svg.contains("<title>pass 2: 2.0 GB/s, 0.0 MiB</title>"),
            "{svg}"
        );
        assert!(svg.contains(">400</text>") && svg.contains(">2.0 GB/s</text>"));
    }

    #[test]
    fn very_many_passes_have_room_and_few_labels() {
        let all: Vec<_> = (1..=1000)
            .map(|pass| MigrationPass {
                pass,
                dirtied_pages: u64::MAX,
                bandwidth: u64::MAX,
                ..MigrationPass::default()
            })
            .collect();
        let svg = passes(&all);
        assert_eq!(svg.matches("class=\"dot\"").count(), 1000);
        let label = format!("y=\"{}\" text-anchor", TOP + PLOT_HEIGHT + 18);
        assert!(svg.matches(&label).count() <= MAX_LABELS);
    }

    #[test]
    fn the_parts_of_the_downtime_add_up() {
        let mut times = MigrationDowntime {
            total_us: 1000,
            pause_us: 100,
            pages_us: 200,
            state_us: 300,
            load_us: 150,
            resume_us: 150,
        };
        let sum =
            |times: &MigrationDowntime| -> u64 { parts(times).iter().map(|part| part.2).sum() };
        assert_eq!(sum(&times), 1000);
        assert_eq!(parts(&times).last(), Some(&("rest", "none of these", 100)));
        let bar = downtime(&times);
        assert!(
            bar.contains("<title>state: 0.3 ms, 30.0 %</title>"),
            "{bar}"
        );
        // The third begins where the first two end: at 300 of 1000, on 800 points.
        assert!(
            bar.contains("class=\"part2\" x=\"240\" y=\"2\" width=\"238\""),
            "{bar}"
        );
        times.total_us = 900;
        assert_eq!(parts(&times).len(), 5);
        let nothing = downtime(&MigrationDowntime::default());
        assert!(nothing.contains("0.0 %"), "{nothing}");
    }
}
