// SPDX-License-Identifier: Apache-2.0

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;

use super::*;
use crate::message::{Hello, Purpose, Session};
use crate::pages::{MOST_PAGES, PAGE, Zeros};
use crate::{Address, Listener, PROTOCOL};

mod ends;
mod hostile;

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
        source.send(&Message::Sent).unwrap();
        source.send_pages(&batch).unwrap();
        source.send_state(&sent).unwrap();
        source.send_missing(&[1, 2]).unwrap();
        source.send_need(9, 1).unwrap();
        source.send_disk(2, 8192, b"block").unwrap();
        source.bytes_sent()
    });
    assert_eq!(target.receive_message().unwrap(), Message::Sent);
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
            assert!(reasons[0].contains("speaks versions 2 to 3"), "{reasons:?}");
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
