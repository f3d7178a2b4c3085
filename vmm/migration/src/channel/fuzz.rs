// SPDX-License-Identifier: Apache-2.0
//! Peers that send anything: there is an error or a frame that can be, and never a panic or much
//! memory. What comes is made from seeds, so a failure comes again.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;

use super::*;
use crate::compress::tests::text;
use crate::frame::seal;
use crate::pages::{MOST_PAGES, PAGE, Run, Zeros};

/// Numbers from a seed (xorshift64*).
struct Dice(u64);

impl Dice {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next()).unwrap() % end.max(1)
    }

    /// A number that is likelier than others to be wrong somewhere.
    fn odd(&mut self) -> u32 {
        let near = |number: u32| number.wrapping_sub(1);
        match self.below(8) {
            0 => 0,
            1 => u32::MAX,
            2 => near(1 << self.below(32)),
            3 => 1 << self.below(32),
            4 => self.below(600).try_into().unwrap(),
            _ => u32::try_from(self.next() & 0xffff_ffff).unwrap(),
        }
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        let length = self.below(most);
        (0..length).map(|_| self.next().to_le_bytes()[0]).collect()
    }
}

/// A frame of each kind, and pages in each form.
fn frames() -> Vec<Vec<u8>> {
    let sends: [fn(&mut Channel) -> u64; 10] = [
        |channel| {
            channel
                .send(&Message::Offer(serde_json::json!({"cpus": [1, 2]})))
                .unwrap()
        },
        |channel| channel.send(&Message::KeepAlive).unwrap(),
        |channel| send_pages(channel, Choice::None),
        |channel| send_pages(channel, Choice::Lz4),
        |channel| send_pages(channel, Choice::Zstd),
        |channel| channel.send_state(b"a state").unwrap(),
        |channel| channel.send_missing(&[1, 2, 3]).unwrap(),
        |channel| channel.send_need(7, 1).unwrap(),
        |channel| channel.send_disk(1, 4096, &[1; 512]).unwrap(),
        |channel| {
            let mut batch = PageBatch::new();
            batch.push_run(1 << 40, 100, Zeros::Told, |_| ());
            channel.send_pages(&batch).unwrap()
        },
    ];
    let frame = |send: fn(&mut Channel) -> u64| {
        let (one, mut other) = UnixStream::pair().unwrap();
        let mut channel = Channel::new(Link::from_unix(one).unwrap());
        send(&mut channel);
        drop(channel);
        let mut bytes = Vec::new();
        other.read_to_end(&mut bytes).unwrap();
        bytes
    };
    sends.into_iter().map(frame).collect()
}

fn send_pages(channel: &mut Channel, choice: Choice) -> u64 {
    let text = text(3 * PAGE);
    let mut batch = PageBatch::new();
    batch.push_run(3, 3, Zeros::Told, |bytes| bytes.copy_from_slice(&text));
    batch.push_run(9, 2, Zeros::Told, |_| ());
    channel.set_compression(choice);
    channel.send_pages(&batch).unwrap()
}

/// Lets a channel read `bytes`, and how many frames there were before the error.
fn feed(bytes: &[u8]) -> (usize, ChannelError) {
    let (one, other) = UnixStream::pair().unwrap();
    (&one).write_all(bytes).unwrap();
    one.shutdown(Shutdown::Write).unwrap();
    let mut channel = Channel::new(Link::from_unix(other).unwrap());
    let mut frames = 0;
    let error = loop {
        match channel.receive() {
            Ok(received) => {
                look_at(&received);
                frames += 1;
            }
            Err(error) => break error,
        }
    };
    // No more than has come, and what is read at once; and the pages of a frame.
    assert!(channel.payload.capacity() <= bytes.len() + STEP);
    assert!(channel.unpacker.capacity() <= MOST_PAGES * PAGE);
    (frames, error)
}

fn look_at(received: &Received<'_>) {
    match received {
        Received::Pages(pages) => {
            let mut all = 0;
            for (Run { first, pages, .. }, bytes) in pages.runs() {
                assert!(pages > 0 && first.checked_add(pages.into()).is_some());
                if let Some(bytes) = bytes {
                    assert_eq!(bytes.len(), pages as usize * PAGE);
                    all += bytes.len();
                }
            }
            assert!(all <= MOST_PAGES * PAGE);
        }
        Received::State { bytes, .. }
        | Received::Missing { bytes, .. }
        | Received::Disk { bytes, .. } => assert!(bytes.len() <= STEP),
        Received::Message(_) | Received::Need { .. } | Received::DiskZeros { .. } => {}
    }
}

/// Changes something about a frame.
fn mutate(frame: &mut Vec<u8>, dice: &mut Dice) {
    let length = frame.len();
    match dice.below(7) {
        0 => {
            let at = dice.below(length);
            frame[at] ^= 1 << dice.below(8);
        }
        1 => {
            let at = dice.below(length);
            frame[at] = dice.next().to_le_bytes()[0];
        }
        // A field of the header, of the table, or anywhere.
        2 => put(frame, [5, 8, 12, 16, 20][dice.below(5)], dice.odd()),
        3 => put(frame, HEADER + 4 * dice.below(12), dice.odd()),
        4 => put(frame, dice.below(length), dice.odd()),
        5 => frame.truncate(dice.below(length)),
        _ => {
            let more = dice.bytes(64);
            let at = dice.below(length + 1);
            frame.splice(at..at, more);
        }
    }
}

fn put(frame: &mut [u8], at: usize, number: u32) {
    if let Some(place) = frame.get_mut(at..at + 4) {
        place.copy_from_slice(&number.to_le_bytes());
    }
}

#[test]
fn whatever_comes_is_an_error_or_a_frame() {
    let frames = frames();
    let (count, error) = feed(&frames.concat());
    assert_eq!(count, frames.len());
    assert!(matches!(error, ChannelError::Closed));
    let mut kinds = std::collections::BTreeMap::new();
    let (mut good, mut bad) = (0, 0);
    for seed in 0..6000 {
        let mut dice = Dice::new(seed);
        let mut stream = Vec::new();
        for _ in 0..=dice.below(4) {
            // In any order, some twice, some left out.
            let mut frame = frames[dice.below(frames.len())].clone();
            for _ in 0..dice.below(4) {
                mutate(&mut frame, &mut dice);
                if frame.len() < HEADER {
                    break;
                }
            }
            // Most get a length and a checksum that are right, so that what is behind is reached.
            if dice.below(4) > 0 && frame.len() >= HEADER {
                if dice.below(8) > 0 {
                    let length = u32::try_from(frame.len() - HEADER).unwrap();
                    put(&mut frame, 8, length);
                }
                seal(&mut frame);
            }
            stream.extend_from_slice(&frame);
        }
        let (count, error) = feed(&stream);
        good += count;
        bad += usize::from(!matches!(error, ChannelError::Closed));
        let text = format!("{error:?}");
        let name = match error {
            ChannelError::Malformed(what) => what.to_owned(),
            _ => text.chars().take_while(|c| c.is_alphanumeric()).collect(),
        };
        *kinds.entry(name).or_insert(0) += 1;
    }
    // All checks were reached.
    assert!(good > 3000 && bad > 3000, "{good} {bad}");
    assert!(kinds.len() >= 14, "{kinds:#?}");
}

#[test]
fn noise_is_no_frame() {
    for seed in 0..1000 {
        let mut dice = Dice::new(seed);
        let mut bytes = dice.bytes(2000);
        if seed % 2 == 0 {
            bytes.splice(..0, *b"BRMG");
        }
        let (count, error) = feed(&bytes);
        assert!(count == 0, "{seed}: {error}");
    }
}

#[test]
fn little_that_becomes_much_is_refused() {
    let header = |codec, length| Header {
        kind: Kind::Pages,
        codec,
        length,
        count: 1,
        argument: 0,
    };
    let mut table = [0; 16];
    table[8] = 128;
    for (codec, bomb) in [
        (Codec::Zstd, zstd::bulk::compress(&vec![0; 64 << 20], 1)),
        (
            Codec::Lz4,
            Ok(lz4_flex::block::compress(&vec![0; 64 << 20])),
        ),
    ] {
        let bomb = bomb.unwrap();
        let length = u32::try_from(16 + bomb.len()).unwrap();
        let parts = [&table[..], &bomb];
        let header = header(codec.number(), length).encode(parts);
        let frame = [&header[..], &table, &bomb].concat();
        let sent = frame.clone();
        let (one, other) = UnixStream::pair().unwrap();
        let sender = thread::spawn(move || drop((&one).write_all(&sent)));
        let mut channel = Channel::new(Link::from_unix(other).unwrap());
        let error = channel.receive().map(|_| ()).unwrap_err();
        // The one of LZ4 is longer than any frame.
        let refused = matches!(
            error,
            ChannelError::Malformed("compressed pages that cannot be decompressed")
                | ChannelError::TooLong { .. }
        );
        assert!(refused, "{error}");
        assert!(channel.unpacker.capacity() <= MOST_PAGES * PAGE);
        drop(channel);
        sender.join().unwrap();
    }
}

#[test]
fn who_has_not_said_its_name_is_not_listened_to_for_long() {
    let (one, other) = UnixStream::pair().unwrap();
    let header = Header {
        kind: Kind::Message,
        codec: 0,
        length: 1 << 20,
        count: 0,
        argument: 0,
    };
    (&one).write_all(&header.encode([&[], &[]])).unwrap();
    let mut channel = Channel::new(Link::from_unix(other).unwrap());
    assert!(matches!(channel.meet(), Err(ChannelError::TooLong { .. })));
    assert_eq!(channel.payload.capacity(), 0);
}
