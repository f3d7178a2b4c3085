// SPDX-License-Identifier: Apache-2.0

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;

use super::*;
use crate::compress::tests::{noise, text};
use crate::message::{Hello, Purpose, Session};
use crate::pages::{MOST_PAGES, PAGE, Zeros};
use crate::{Address, Listener, PROTOCOL};

mod ends;
mod hostile;

const SENT: Message = Message::Sent {
    paused_us: 1,
    unix_ns: 2,
};

fn pair() -> (Channel, Channel) {
    let (one, other) = UnixStream::pair().unwrap();
    let channel = |stream| Channel::new(Link::from_unix(stream).unwrap());
    (channel(one), channel(other))
}

#[test]
fn what_is_sent_comes() {
    let (mut source, mut target) = pair();
    let state: Vec<u8> = (0..=250).cycle().take(STATE_PART + 9).collect();
    let sent = state.clone();
    let sender = thread::spawn(move || {
        let mut batch = PageBatch::new();
        let pages = u32::try_from(MOST_PAGES).unwrap();
        batch.push_run(5, pages, Zeros::Told, |bytes| bytes.fill(7));
        source.send(&SENT).unwrap();
        source.send_pages(&batch).unwrap();
        source.send_state(&sent).unwrap();
        source.send_missing(&[1, 2]).unwrap();
        source.send_need(9, 1).unwrap();
        source.send_disk(2, 8192, b"block").unwrap();
        source.bytes_sent()
    });
    assert_eq!(target.receive_message().unwrap(), SENT);
    match target.receive().unwrap() {
        Received::Pages(pages) => {
            let runs: Vec<_> = pages.runs().collect();
            let [(run, Some(bytes))] = runs[..] else {
                panic!("{runs:?}");
            };
            assert_eq!((run.first, run.pages), (5, 128));
            assert!(bytes.len() == MOST_PAGES * PAGE && bytes.iter().all(|&byte| byte == 7));
        }
        other => panic!("{other:?}"),
    }
    let mut come = Vec::new();
    loop {
        match target.receive().unwrap() {
            Received::State {
                offset,
                last,
                bytes,
            } => {
                assert_eq!(offset, come.len() as u64);
                come.extend_from_slice(bytes);
                if last {
                    break;
                }
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(come == state);
    assert!(matches!(
        target.receive().unwrap(),
        Received::Missing {
            first_word: 0,
            bytes: [1, 0, .., 0]
        }
    ));
    assert!(matches!(
        target.receive().unwrap(),
        Received::Need { first: 9, pages: 1 }
    ));
    assert!(matches!(
        target.receive().unwrap(),
        Received::Disk {
            drive: 2,
            offset: 8192,
            bytes: b"block"
        }
    ));
    assert_eq!(sender.join().unwrap(), target.bytes_received());
    assert!(matches!(target.receive(), Err(ChannelError::Closed)));
}

#[test]
fn an_end_inside_of_a_frame_is_a_loss() {
    let (one, other) = UnixStream::pair().unwrap();
    let mut target = Channel::new(Link::from_unix(other).unwrap());
    (&one).write_all(b"BRMG").unwrap();
    drop(one);
    assert!(matches!(target.receive(), Err(ChannelError::Lost(_))));
}

#[test]
fn who_says_nothing_is_not_waited_for() {
    let (mut source, mut target) = pair();
    target.set_limit(Duration::from_millis(20)).unwrap();
    assert!(!target.wait(Duration::from_millis(5)).unwrap());
    assert!(matches!(target.receive(), Err(ChannelError::TimedOut)));
    source.send(&Message::KeepAlive).unwrap();
    assert!(target.wait(Duration::from_secs(9)).unwrap());
}

#[test]
fn an_end_is_seen_before_what_was_said_is_read() {
    let (mut source, mut target) = pair();
    source.send(&SENT).unwrap();
    assert!(!target.link().has_ended().unwrap());
    drop(source);
    assert!(target.link().has_ended().unwrap());
    assert_eq!(target.receive_message().unwrap(), SENT);
}

#[test]
fn both_sides_agree_on_a_version_or_say_why_not() {
    let (mut source, mut target) = pair();
    let session = Session::new().unwrap();
    let expected = session.clone();
    let greeting = thread::spawn(move || source.greet(&session, Purpose::Control).map(|()| source));
    let hello = target.meet().unwrap();
    assert_eq!(
        (hello.session.clone(), hello.purpose),
        (expected, Purpose::Control)
    );
    target.welcome(&hello).unwrap();
    let mut source = greeting.join().unwrap().unwrap();
    let future = Hello {
        oldest: PROTOCOL + 1,
        protocol: PROTOCOL + 2,
        ..hello
    };
    source.send(&Message::Hello(future)).unwrap();
    assert!(matches!(target.meet(), Err(ChannelError::Refused(_))));
    match source.receive_message().unwrap() {
        Message::Refused { reasons } => {
            let versions = format!("speaks versions {} to {}", PROTOCOL + 1, PROTOCOL + 2);
            assert!(reasons[0].contains(&versions), "{reasons:?}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn strangers_are_told_from_sources() {
    let (one, other) = UnixStream::pair().unwrap();
    let mut target = Channel::new(Link::from_unix(other).unwrap());
    (&one)
        .write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .unwrap();
    assert!(matches!(target.meet(), Err(ChannelError::Magic)));
}

#[test]
fn compressed_pages_come_as_they_were() {
    for (choice, fewer) in [
        (Choice::None, false),
        (Choice::Lz4, true),
        (Choice::Zstd, true),
        (Choice::Auto, false),
    ] {
        let (mut source, mut target) = pair();
        let text = text(MOST_PAGES * PAGE);
        let noise = noise(3 * PAGE);
        let (sent_text, sent_noise) = (text.clone(), noise.clone());
        let sender = thread::spawn(move || {
            source.set_compression(choice);
            for bytes in [&sent_text, &sent_noise, &sent_text] {
                let mut batch = PageBatch::new();
                let pages = u32::try_from(bytes.len() / PAGE).unwrap();
                batch.push_run(9, pages, Zeros::Told, |place| place.copy_from_slice(bytes));
                batch.push_run(900, 1, Zeros::Told, |_| ());
                source.send_pages(&batch).unwrap();
            }
            (source.compressed(), source.bytes_sent())
        });
        for bytes in [&text, &noise, &text] {
            match target.receive().unwrap() {
                Received::Pages(pages) => {
                    let runs: Vec<_> = pages.runs().collect();
                    let [(_, Some(come)), (zeros, None)] = runs[..] else {
                        panic!("{runs:?}");
                    };
                    assert!(come == bytes && zeros.first == 900);
                }
                other => panic!("{other:?}"),
            }
        }
        let ((before, after), sent) = sender.join().unwrap();
        assert_eq!(before, 2 * text.len() as u64 + noise.len() as u64);
        assert_eq!(sent, target.bytes_received());
        assert_eq!(sent, after + 3 * (HEADER as u64 + 2 * 16));
        assert!(!fewer || after < before / 2, "{choice:?}: {after}");
    }
}

#[test]
fn a_greeting_comes_within_the_limit_or_not_at_all() {
    let (one, other) = UnixStream::pair().unwrap();
    let mut target = Channel::new(Link::from_unix(other).unwrap());
    target.set_limit(Duration::from_millis(100)).unwrap();
    let slow = thread::spawn(move || {
        let mut frame = Vec::from(
            Header {
                kind: Kind::Message,
                codec: 0,
                length: 4000,
                count: 0,
                argument: 0,
            }
            .encode([&[b' '; 4000], &[]]),
        );
        frame.resize(HEADER + 4000, b' ');
        for byte in frame {
            if (&one).write_all(&[byte]).is_err() {
                break;
            }
            thread::sleep(Duration::from_millis(20));
        }
    });
    let start = Instant::now();
    assert!(matches!(target.meet(), Err(ChannelError::TimedOut)));
    assert!(start.elapsed() < Duration::from_secs(2));
    assert!(target.link.deadline().is_none());
    drop(target);
    slow.join().unwrap();
}

#[test]
fn a_deadline_passes_however_much_comes() {
    let (one, other) = UnixStream::pair().unwrap();
    let mut target = Channel::new(Link::from_unix(other).unwrap());
    target.set_limit(Duration::from_secs(9)).unwrap();
    let slow = thread::spawn(move || {
        while (&one).write_all(b"BRMG").is_ok() {
            thread::sleep(Duration::from_millis(20));
        }
    });
    target
        .set_deadline(Some(Instant::now() + Duration::from_millis(50)))
        .unwrap();
    let start = Instant::now();
    let error = target.receive().map(|_| ());
    assert!(matches!(error, Err(ChannelError::TimedOut)), "{error:?}");
    assert!(start.elapsed() < Duration::from_secs(2));
    drop(target);
    slow.join().unwrap();
}

#[test]
fn a_descriptor_goes_between_two_frames() {
    let (mut source, mut target) = pair();
    target.set_limit(Duration::from_millis(50)).unwrap();
    source.send(&SENT).unwrap();
    source.send_fd(std::io::stdin().as_fd()).unwrap();
    source.send(&Message::KeepAlive).unwrap();
    assert_eq!(target.receive_message().unwrap(), SENT);
    target.receive_fd().unwrap();
    assert!(matches!(
        target.receive_fd(),
        Err(ChannelError::OutOfTurn(_))
    ));
    let (_source, mut target) = pair();
    target.set_limit(Duration::from_millis(50)).unwrap();
    assert!(matches!(target.receive_fd(), Err(ChannelError::TimedOut)));
    let (secured, _other) = crate::tls::tests::secured_pair();
    let mut secured = Channel::new(secured);
    assert!(matches!(secured.receive_fd(), Err(ChannelError::Lost(_))));
}
