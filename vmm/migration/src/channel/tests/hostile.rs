// SPDX-License-Identifier: Apache-2.0
//! A peer that says anything: the receiver faces a network.

use proptest::prelude::*;

use super::*;
use crate::frame::Header;

/// A channel that is to receive `bytes`, after which comes the end.
fn receiver(bytes: &[u8]) -> Channel {
    let (mut peer, ours) = UnixStream::pair().unwrap();
    // What does not fit at once is written as it is read.
    peer.set_nonblocking(true).unwrap();
    let written = peer.write(bytes).unwrap();
    if written < bytes.len() {
        peer.set_nonblocking(false).unwrap();
        let rest = bytes[written..].to_vec();
        thread::spawn(move || {
            // It may be hung up on.
            let _ = peer.write_all(&rest);
        });
    }
    Channel::new(Link::from_unix(ours).unwrap())
}

fn frame(kind: Kind, count: u32, argument: u64, payload: &[u8]) -> Vec<u8> {
    packed(kind, 0, count, argument, payload)
}

fn packed(kind: Kind, codec: u8, count: u32, argument: u64, payload: &[u8]) -> Vec<u8> {
    let header = Header {
        kind,
        codec,
        length: u32::try_from(payload.len()).unwrap(),
        count,
        argument,
    };
    [&header.encode([payload, &[]])[..], payload].concat()
}

fn refused(bytes: &[u8]) -> ChannelError {
    receiver(bytes).receive().map(|_| ()).unwrap_err()
}

/// Receives to the end, and looks at everything; how many frames were understood.
fn drain(channel: &mut Channel) -> usize {
    let mut frames = 0;
    loop {
        match channel.receive() {
            Ok(Received::Pages(pages)) => {
                for (run, bytes) in pages.runs() {
                    // Neither can overflow.
                    let end = (run.first + u64::from(run.pages)) * PAGE as u64;
                    assert!(end > run.first * PAGE as u64);
                    let length = bytes.map_or(0, <[u8]>::len);
                    assert!(run.zeros || length == run.pages as usize * PAGE);
                }
            }
            Ok(Received::Need { first, pages }) => {
                assert!(
                    (first + u64::from(pages))
                        .checked_mul(PAGE as u64)
                        .is_some()
                );
            }
            Ok(Received::Missing { first_word, bytes }) => {
                let pages = (first_word + bytes.len() as u64 / 8) * 64;
                assert!(pages.checked_mul(PAGE as u64).is_some());
            }
            Ok(Received::Disk { offset, bytes, .. }) => {
                assert!(offset.checked_add(bytes.len() as u64).is_some());
            }
            Ok(Received::DiskZeros { offset, length, .. }) => {
                assert!(offset.checked_add(length).is_some());
            }
            Ok(Received::State { offset, bytes, .. }) => {
                assert!(offset + bytes.len() as u64 <= MOST_STATE as u64);
            }
            Ok(Received::Message(_)) => {}
            Err(_) => return frames,
        }
        frames += 1;
        // However long they say they are.
        assert!(channel.payload.capacity() <= (4 << 20) + STEP);
        assert!(channel.unpacker.capacity() <= MOST_PAGES * PAGE);
    }
}

fn kinds() -> impl Strategy<Value = Kind> {
    prop::sample::select(vec![
        Kind::Message,
        Kind::Pages,
        Kind::State,
        Kind::Missing,
        Kind::Need,
        Kind::Disk,
    ])
}

/// Tables of pages that are nearly good.
fn tables() -> impl Strategy<Value = (u32, Vec<u8>)> {
    let run = (
        prop_oneof![0..99_u64, any::<u64>()],
        prop_oneof![0..4_u32, any::<u32>()],
        prop_oneof![3 => 0..2_u32, 1 => any::<u32>()],
    );
    prop::collection::vec(run, 0..6).prop_map(|runs| {
        let mut bytes = Vec::new();
        let mut pages = 0_usize;
        for (first, count, flags) in &runs {
            bytes.extend_from_slice(&first.to_le_bytes());
            bytes.extend_from_slice(&count.to_le_bytes());
            bytes.extend_from_slice(&flags.to_le_bytes());
            if *flags == 0 {
                pages += *count as usize % 8;
            }
        }
        bytes.resize(bytes.len() + pages * PAGE, 1);
        (u32::try_from(runs.len()).unwrap(), bytes)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(3000) })]

    #[test]
    fn noise_is_refused(bytes in prop::collection::vec(any::<u8>(), 1..300)) {
        prop_assert_eq!(drain(&mut receiver(&bytes)), 0);
    }

    #[test]
    fn frames_with_a_good_checksum_may_say_anything(
        kind in kinds(),
        count in prop_oneof![0..9_u32, any::<u32>()],
        argument in prop_oneof![0..99_u64, any::<u64>()],
        payload in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        drain(&mut receiver(&frame(kind, count, argument, &payload)));
    }

    #[test]
    fn tables_of_pages_may_say_anything((count, payload) in tables(), lie in 0..20_u32) {
        let count = if lie == 0 { count + 1 } else { count };
        drain(&mut receiver(&frame(Kind::Pages, count, 0, &payload)));
    }

    #[test]
    fn compressed_pages_may_be_anything(
        codec in 1..4_u8,
        pages in 0..140_u32,
        length in 0..5 * PAGE,
        change in prop::option::of((any::<prop::sample::Index>(), any::<u8>())),
        (kind, noise) in (kinds(), any::<bool>()),
    ) {
        let bytes = vec![3; length];
        let mut data = match (noise, codec) {
            (false, 1) => lz4_flex::block::compress(&bytes),
            (false, 2) => zstd::bulk::compress(&bytes, 1).unwrap(),
            _ => bytes,
        };
        if let Some((at, byte)) = change && !data.is_empty() {
            let at = at.index(data.len());
            data[at] = byte;
        }
        let table = [&7_u64.to_le_bytes()[..], &pages.to_le_bytes(), &[0; 4]].concat();
        let payload = [table, data].concat();
        for kind in [Kind::Pages, kind] {
            drain(&mut receiver(&packed(kind, codec, 1, 0, &payload)));
        }
    }

    #[test]
    fn a_change_anywhere_is_found_and_a_cut_is_a_loss(
        at in any::<prop::sample::Index>(),
        bit in 0..8_u8,
        cut in any::<bool>(),
    ) {
        let good = frame(Kind::Disk, 1, 4096, &[5; 100]);
        let mut bytes = [good.clone(), good].concat();
        let at = at.index(bytes.len());
        let frames = at / (bytes.len() / 2);
        if cut {
            bytes.truncate(at);
        } else {
            bytes[at] ^= 1 << bit;
        }
        prop_assert_eq!(drain(&mut receiver(&bytes)), frames);
    }

    #[test]
    fn messages_may_say_anything(text in r#"\{"message":"(Hello|Offer|Refused|Ready|x)","?[a-z":,\[\]{}0-9]{0,60}"#) {
        drain(&mut receiver(&frame(Kind::Message, 0, 0, text.as_bytes())));
    }
}

#[test]
fn every_changed_bit_of_a_frame_is_found() {
    let good = frame(Kind::Need, 3, 9, &[]);
    for bit in 0..good.len() * 8 {
        let mut bytes = good.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        refused(&bytes);
    }
}

#[test]
fn room_is_made_for_what_comes_and_not_for_what_is_announced() {
    let mut bytes = frame(Kind::Message, 0, 0, &[]);
    bytes[8..12].copy_from_slice(&(4_u32 << 20).to_le_bytes());
    let mut channel = receiver(&bytes);
    assert!(matches!(channel.receive(), Err(ChannelError::Lost(_))));
    assert!(channel.payload.capacity() <= STEP);
    // Before it is known who is there, not even that.
    let mut channel = receiver(&bytes);
    assert!(matches!(channel.meet(), Err(ChannelError::TooLong { .. })));
    assert_eq!(channel.payload.capacity(), 0);
}

#[test]
fn text_that_grows_when_it_is_read_is_refused() {
    let small = r#"{"":0},"#.repeat(200_000);
    let text = format!(r#"{{"message":"Offer","cpus":[{small}{{}}]}}"#);
    let mut channel = receiver(&frame(Kind::Message, 0, 0, text.as_bytes()));
    match channel.receive() {
        Err(ChannelError::Malformed(what)) => assert_eq!(what, "a message of too many parts"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn numbers_that_do_not_fit_are_refused() {
    for bytes in [
        frame(Kind::Need, 0, 1, &[]),
        frame(Kind::Need, 1, u64::MAX, &[]),
        frame(Kind::Missing, 0, u64::MAX / 64, &[0; 8]),
        frame(Kind::Missing, 0, 0, &[0; 7]),
        frame(Kind::State, 0, MOST_STATE as u64, &[0]),
        frame(Kind::State, 2, 0, &[0]),
        frame(Kind::State, 0, u64::MAX, &[0]),
        frame(Kind::Disk, 0, u64::MAX, &[0]),
        frame(Kind::Disk, DISK_ZEROS, 1, &u64::MAX.to_le_bytes()),
        frame(Kind::Disk, DISK_ZEROS, 0, &[0; 7]),
    ] {
        let error = refused(&bytes);
        assert!(matches!(error, ChannelError::Malformed(_)), "{error:?}");
    }
}

#[test]
fn what_the_other_side_would_refuse_is_not_sent() {
    let (mut source, mut target) = pair();
    let too_large = |result: Result<u64, ChannelError>| {
        assert!(
            matches!(result, Err(ChannelError::TooLarge { .. })),
            "{result:?}"
        );
    };
    too_large(source.send_disk(0, 0, &vec![0; (1 << 20) + 1]));
    too_large(source.send_state(&vec![0; MOST_STATE + 1]));
    let why = "x".repeat(5 << 20);
    too_large(source.send(&Message::Failed { why }));
    let mut batch = PageBatch::new();
    batch.push_run(0, 129, Zeros::Told, |place| place.fill(1));
    too_large(source.send_pages(&batch));
    // Nothing of them was.
    source.send(&Message::KeepAlive).unwrap();
    assert_eq!(target.receive_message().unwrap(), Message::KeepAlive);
}

#[test]
fn a_state_with_nothing_in_it_comes_too() {
    let (mut source, mut target) = pair();
    source.send_state(&[]).unwrap();
    source.send_disk_zeros(3, 512, 1 << 40).unwrap();
    assert!(matches!(
        target.receive().unwrap(),
        Received::State {
            offset: 0,
            last: true,
            bytes: []
        }
    ));
    assert!(matches!(
        target.receive().unwrap(),
        Received::DiskZeros {
            drive: 3,
            offset: 512,
            length: 0x100_0000_0000
        }
    ));
}

#[test]
fn frames_come_in_whatever_pieces() {
    let (mut peer, ours) = UnixStream::pair().unwrap();
    let mut channel = Channel::new(Link::from_unix(ours).unwrap());
    let bytes = frame(Kind::Disk, 7, 512, b"blocks");
    let writer = thread::spawn(move || {
        for byte in bytes {
            peer.write_all(&[byte]).unwrap();
            thread::yield_now();
        }
    });
    assert!(matches!(
        channel.receive().unwrap(),
        Received::Disk {
            drive: 7,
            offset: 512,
            bytes: b"blocks"
        }
    ));
    writer.join().unwrap();
}
