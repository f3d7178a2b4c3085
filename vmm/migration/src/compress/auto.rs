// SPDX-License-Identifier: Apache-2.0
//! Which codec moves most pages in a second, by what is measured.
//!
//! One thread compresses and writes, so what counts for a byte of a page is the time to compress
//! it, and then the time that the wire takes for what is left of it.
//!
//! The wire cannot be measured with a clock around a write: the kernel takes some megabytes at
//! once, and what is compressed slowly finds room whenever it comes. But over a while, the wire
//! takes no longer for a byte than passes from the end of one write to the end of the next, and no
//! less than is waited in writes. So what is known of it is kept within those two.

use std::time::{Duration, Instant};

use super::{Codec, Packer};

/// After how many bytes of pages a sample is taken: 64 full frames.
const INTERVAL: u64 = 32 << 20;
/// How many of the first frames are sampled, whatever they have.
const FIRST: u64 = 4;
/// The least of a sample in bytes.
const SAMPLE: usize = 16 << 10;
/// The part of the time that samples may take if the wire allows for more.
const SAMPLING: f64 = 0.01;
/// What a sample counts against all that were before.
const WEIGHT: f64 = 0.25;
/// How much better, as a part of the time, another codec has to be.
const BETTER: f64 = 0.95;
/// How long the wire is watched before it is judged: so long, or for so many bytes.
const WATCHED: Duration = Duration::from_millis(50);
const WATCHED_BYTES: u64 = 8 << 20;

/// What a codec does to pages.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Cost {
    /// Nanoseconds for a byte of a page.
    nanos: f64,
    /// Bytes that are left of one.
    ratio: f64,
}

impl Cost {
    /// Nanoseconds for a byte of a page until it is away.
    fn total(self, wire: f64) -> f64 {
        self.nanos + self.ratio * wire
    }

    fn average(self, sample: Self) -> Self {
        Self {
            nanos: mix(self.nanos, sample.nanos),
            ratio: mix(self.ratio, sample.ratio),
        }
    }
}

fn mix(before: f64, sample: f64) -> f64 {
    before + WEIGHT * (sample - before)
}

/// The best codec for a wire that takes `wire` nanoseconds for a byte, if `now` is used now.
fn best(now: Codec, wire: f64, lz4: Cost, zstd: Cost) -> Codec {
    let total = |codec| match codec {
        Codec::None => wire,
        Codec::Lz4 => lz4.total(wire),
        Codec::Zstd => zstd.total(wire),
    };
    let all = [Codec::None, Codec::Lz4, Codec::Zstd];
    let best = all
        .into_iter()
        .min_by(|a, b| total(*a).total_cmp(&total(*b)));
    match best {
        Some(best) if total(best) < total(now) * BETTER => best,
        _ => now,
    }
}

/// How much of a frame of `length` bytes a sample may have.
fn sample_length(length: usize, wire: f64, lz4: Cost, zstd: Cost) -> usize {
    let allowed = wire * f64_of(INTERVAL) * SAMPLING / (lz4.nanos + zstd.nanos);
    if allowed >= f64_of(length as u64) {
        length
    } else {
        SAMPLE.min(length)
    }
}

/// What is known of the wire.
#[derive(Debug, Default)]
struct Wire {
    /// Nanoseconds for a byte.
    nanos: Option<f64>,
    last_end: Option<Instant>,
    /// Since it was judged last: bytes, the time in writes, the time in all.
    bytes: u64,
    waited: Duration,
    passed: Duration,
}

impl Wire {
    fn written(&mut self, bytes: u64, begin: Instant, end: Instant) {
        let since = self.last_end.unwrap_or(begin);
        self.last_end = Some(end);
        self.bytes += bytes;
        self.waited += end.saturating_duration_since(begin);
        self.passed += end.saturating_duration_since(since);
        let per_byte = |time: Duration| time.as_secs_f64() * 1e9 / f64_of(self.bytes.max(1));
        let (least, most) = (per_byte(self.waited), per_byte(self.passed));
        let Some(known) = self.nanos else {
            self.nanos = Some(least);
            return;
        };
        if self.passed >= WATCHED || self.bytes >= WATCHED_BYTES {
            self.nanos = Some(known.min(most).max(least));
            (self.bytes, self.waited, self.passed) = Default::default();
        }
    }
}

/// Finds the best codec.
#[derive(Debug)]
pub(super) struct Auto {
    now: Codec,
    wire: Wire,
    /// Nanoseconds for a byte at the rate that is allowed.
    least_wire: f64,
    lz4: Option<Cost>,
    zstd: Option<Cost>,
    frames: u64,
    /// Bytes until the next sample.
    until_sample: u64,
}

impl Default for Auto {
    fn default() -> Self {
        Self {
            now: Codec::None,
            wire: Wire::default(),
            least_wire: 0.0,
            lz4: None,
            zstd: None,
            frames: 0,
            until_sample: 0,
        }
    }
}

impl Auto {
    pub(super) fn set_wire_rate(&mut self, rate: u64) {
        self.least_wire = if rate == 0 { 0.0 } else { 1e9 / f64_of(rate) };
    }

    fn wire(&self) -> f64 {
        self.wire.nanos.unwrap_or(0.0).max(self.least_wire)
    }

    /// The best codec by what is known.
    pub(super) fn codec(&self) -> Codec {
        self.now
    }

    /// Finds out about `pages` what it takes to choose.
    pub(super) fn learn(&mut self, pages: &[u8], packer: &mut Packer) {
        let length = pages.len() as u64;
        if self.frames < FIRST || self.until_sample < length {
            self.sample(pages, packer);
            self.until_sample = INTERVAL;
        }
        self.until_sample = self.until_sample.saturating_sub(length);
        self.frames += 1;
        if let (Some(lz4), Some(zstd)) = (self.lz4, self.zstd) {
            self.now = best(self.now, self.wire(), lz4, zstd);
        }
    }

    /// Compresses a part of `pages` with each codec.
    fn sample(&mut self, pages: &[u8], packer: &mut Packer) {
        if pages.is_empty() {
            return;
        }
        let length = match (self.lz4, self.zstd) {
            (Some(lz4), Some(zstd)) => sample_length(pages.len(), self.wire(), lz4, zstd),
            _ => SAMPLE.min(pages.len()),
        };
        // Not always the same part of a frame.
        let parts = pages.len() / length;
        let part = usize::try_from(self.frames).unwrap_or(0) % parts;
        let bytes = pages.get(part * length..).unwrap_or_default();
        let bytes = bytes.get(..length).unwrap_or_default();
        for codec in [Codec::Lz4, Codec::Zstd] {
            let begin = Instant::now();
            let left = packer.pack(codec, bytes).map_or(length, <[u8]>::len);
            self.packed(codec, length, left, begin.elapsed());
        }
    }

    /// Takes note of what a codec has done to `length` bytes.
    pub(super) fn packed(&mut self, codec: Codec, length: usize, left: usize, time: Duration) {
        if length == 0 {
            return;
        }
        let sample = Cost {
            nanos: time.as_secs_f64() * 1e9 / f64_of(length as u64),
            ratio: f64_of(left as u64) / f64_of(length as u64),
        };
        let cost = match codec {
            Codec::None => return,
            Codec::Lz4 => &mut self.lz4,
            Codec::Zstd => &mut self.zstd,
        };
        *cost = Some(cost.map_or(sample, |before| before.average(sample)));
    }

    pub(super) fn written(&mut self, bytes: u64, begin: Instant, end: Instant) {
        self.wire.written(bytes, begin, end);
    }
}

/// Close enough for what is only weighed.
#[allow(clippy::cast_precision_loss)]
fn f64_of(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compress::tests::{noise, text};

    const FRAME: usize = 128 * 4096;

    fn cost(nanos: f64, ratio: f64) -> Cost {
        Cost { nanos, ratio }
    }

    #[test]
    fn the_codec_that_moves_most_pages_wins() {
        let text = [cost(1.4, 0.5), cost(2.5, 0.3)];
        let noise = [cost(0.3, 1.0), cost(0.7, 1.0)];
        for (wire, [lz4, zstd], expected) in [
            // A unix socket takes 3 GB/s.
            (0.3, text, Codec::None),
            (0.3, noise, Codec::None),
            // 400, 300, 100 and 10 MB/s.
            (2.5, text, Codec::None),
            (3.3, text, Codec::Lz4),
            (10.0, text, Codec::Zstd),
            (100.0, text, Codec::Zstd),
            (10.0, noise, Codec::None),
            (100.0, noise, Codec::None),
            // Nothing is gained by the slower one.
            (10.0, [cost(1.0, 0.1), cost(2.0, 0.09)], Codec::Lz4),
        ] {
            assert_eq!(best(Codec::None, wire, lz4, zstd), expected, "{wire}");
        }
        let [lz4, zstd] = noise;
        assert_eq!(best(Codec::Zstd, 10.0, lz4, zstd), Codec::None);
        // What is about as good is not worth a change.
        let (lz4, zstd) = (cost(1.0, 0.50), cost(1.5, 0.44));
        assert_eq!(best(Codec::Lz4, 10.0, lz4, zstd), Codec::Lz4);
        assert_eq!(best(Codec::Zstd, 10.0, lz4, zstd), Codec::Zstd);
    }

    #[test]
    fn samples_cost_little() {
        for (wire, [lz4, zstd]) in [
            (0.3, [cost(1.4, 0.5), cost(2.5, 0.3)]),
            (0.3, [cost(0.3, 1.0), cost(0.7, 1.0)]),
            (10.0, [cost(1.4, 0.5), cost(2.5, 0.3)]),
            (2.0, [cost(5.0, 0.5), cost(9.0, 0.3)]),
        ] {
            let length = sample_length(FRAME, wire, lz4, zstd);
            let time = f64_of(length as u64) * (lz4.nanos + zstd.nanos);
            assert!(time < 0.02 * wire * f64_of(INTERVAL), "{wire}: {length}");
        }
        assert_eq!(
            sample_length(FRAME, 10.0, cost(1.4, 0.5), cost(2.5, 0.3)),
            FRAME
        );
    }

    /// A connection: the kernel takes bytes into a buffer, which the wire empties.
    struct Line {
        now: Instant,
        nanos: f64,
        buffer: f64,
        held: f64,
    }

    impl Line {
        fn pass(&mut self, nanos: f64) {
            self.held = (self.held - nanos / self.nanos).max(0.0);
            self.now += Duration::from_secs_f64(nanos / 1e9);
        }

        /// Writes a frame; how that went.
        fn write(&mut self, bytes: u64) -> (u64, Instant, Instant) {
            let begin = self.now;
            // The copy.
            self.pass(f64_of(bytes) * 0.2);
            let over = self.held + f64_of(bytes) - self.buffer;
            if over > 0.0 {
                self.pass(over * self.nanos);
            }
            self.held += f64_of(bytes);
            (bytes, begin, self.now)
        }
    }

    impl Line {
        fn new(nanos: f64) -> Self {
            Self {
                now: Instant::now(),
                nanos,
                buffer: 4e6,
                held: 0.0,
            }
        }

        /// Writes 200 frames, each after as many nanoseconds of other work as `busy` says.
        fn write_many(&mut self, wire: &mut Wire, busy: f64) {
            for _ in 0..200 {
                self.pass(busy);
                let (bytes, begin, end) = self.write(FRAME as u64);
                wire.written(bytes, begin, end);
            }
        }
    }

    #[test]
    fn a_wire_is_judged_right_though_the_kernel_takes_megabytes_at_once() {
        let about = |wire: &Wire, nanos: f64| {
            let found = wire.nanos.unwrap();
            assert!((found / nanos - 1.0).abs() < 0.4, "{nanos}: {found}");
        };
        for nanos in [0.8, 10.0, 100.0] {
            let mut line = Line::new(nanos);
            let mut wire = Wire::default();
            line.write_many(&mut wire, 0.0);
            about(&wire, nanos);
            // With work between the frames, writes hardly wait; the wire is as slow as it was.
            line.write_many(&mut wire, 0.8 * nanos * f64_of(FRAME as u64));
            about(&wire, nanos);
            // And it may become another one.
            for nanos in [nanos * 5.0, nanos] {
                line.nanos = nanos;
                line.write_many(&mut wire, 0.0);
                about(&wire, nanos);
            }
        }
        // One that never fills is fast, and is not thought slow because there is little to send.
        let mut wire = Wire::default();
        Line::new(0.2).write_many(&mut wire, 1e7);
        assert!(wire.nanos.unwrap() < 0.5);
    }

    /// The codec that is in use after many frames like `pages` over a simulated line.
    fn used(nanos: f64, pages: &[u8]) -> Codec {
        let mut auto = Auto::default();
        let mut packer = Packer::default();
        let mut line = Line::new(nanos);
        let mut codec = Codec::None;
        for _ in 0..100 {
            auto.learn(pages, &mut packer);
            codec = auto.codec();
            let begin = Instant::now();
            let left = packer.pack(codec, pages).map_or(pages.len(), <[u8]>::len);
            let time = begin.elapsed();
            auto.packed(codec, pages.len(), left, time);
            line.pass(time.as_secs_f64() * 1e9);
            let (bytes, begin, end) = line.write(left as u64);
            auto.written(bytes, begin, end);
        }
        codec
    }

    #[test]
    fn real_pages_are_compressed_where_that_helps() {
        let (text, noise) = (text(FRAME), noise(FRAME));
        assert_eq!(used(0.05, &text), Codec::None);
        assert_ne!(used(100.0, &text), Codec::None);
        assert_eq!(used(100.0, &noise), Codec::None);
        // A rate that is not to be exceeded is a slow wire.
        let mut auto = Auto::default();
        auto.set_wire_rate(10_000_000);
        let mut packer = Packer::default();
        assert_eq!(auto.codec(), Codec::None);
        auto.learn(&text, &mut packer);
        assert_ne!(auto.codec(), Codec::None);
    }
}
