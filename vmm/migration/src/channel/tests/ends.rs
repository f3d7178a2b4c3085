// SPDX-License-Identifier: Apache-2.0
//! How a connection ends: who may run the guest depends on it.

use std::os::fd::{AsRawFd, IntoRawFd};
use std::time::Instant;

use super::*;
use crate::link::LinkError;

const SOON: Duration = Duration::from_secs(9);

fn tcp_pair() -> (Channel, Channel) {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let source = Link::connect(&listener.address(), SOON).unwrap();
    let target = listener.accept(SOON).unwrap().unwrap();
    (Channel::new(source), Channel::new(target))
}

/// Both kinds of connection.
fn pairs() -> [(Channel, Channel); 2] {
    [pair(), tcp_pair()]
}

#[allow(clippy::needless_pass_by_value, reason = "it is made in the call")]
fn assert_closed(result: Result<Received<'_>, ChannelError>) {
    assert!(matches!(result, Err(ChannelError::Closed)), "{result:?}");
}

#[allow(clippy::needless_pass_by_value, reason = "it is made in the call")]
fn assert_lost(result: Result<Received<'_>, ChannelError>) {
    assert!(matches!(result, Err(ChannelError::Lost(_))), "{result:?}");
}

#[test]
fn what_was_said_before_an_end_is_heard_and_then_the_end() {
    for (mut source, mut target) in pairs() {
        source.send(&Message::Commit).unwrap();
        drop(source);
        assert_eq!(target.receive_message().unwrap(), Message::Commit);
        assert_closed(target.receive());
        assert_closed(target.receive());
    }
}

#[test]
fn a_unix_socket_left_with_something_unread_is_closed() {
    let (mut source, mut target) = pair();
    target.send(&Message::KeepAlive).unwrap();
    source.send(&SENT).unwrap();
    // That leaves the target's message unread.
    drop(source);
    assert_eq!(target.receive_message().unwrap(), SENT);
    assert_closed(target.receive());
    // So it is if a write has met the error first.
    let (mut source, mut target) = pair();
    target.send(&Message::KeepAlive).unwrap();
    source.send(&SENT).unwrap();
    drop(source);
    assert!(matches!(
        target.send(&Message::KeepAlive),
        Err(ChannelError::Lost(_))
    ));
    assert_eq!(target.receive_message().unwrap(), SENT);
    assert_closed(target.receive());
}

#[test]
fn a_tcp_reset_is_a_loss_whoever_meets_it_first() {
    let (mut source, mut target) = tcp_pair();
    source.link.reset();
    drop(source);
    assert_lost(target.receive());
    // After a reset was told the kernel speaks of an end in order.
    assert_lost(target.receive());

    let (mut source, mut target) = tcp_pair();
    source.link.reset();
    drop(source);
    let end = Instant::now() + SOON;
    while target.send(&Message::KeepAlive).is_ok() {
        assert!(Instant::now() < end);
    }
    assert_lost(target.receive());
    assert_lost(target.receive());

    // Something unread makes a reset of a close.
    let (source, mut target) = tcp_pair();
    target.send(&Message::KeepAlive).unwrap();
    assert!(host_has_something(&source));
    drop(source);
    assert_lost(target.receive());
}

fn host_has_something(channel: &Channel) -> bool {
    crate::host::wait_readable(&[channel.link.as_raw_fd()], SOON).unwrap() == Some(0)
}

#[test]
fn a_tcp_end_is_in_order_even_if_a_write_has_met_it() {
    let (mut source, mut target) = tcp_pair();
    source.send(&SENT).unwrap();
    drop(source);
    let end = Instant::now() + SOON;
    // The first is answered with a reset.
    while target.send(&Message::KeepAlive).is_ok() {
        assert!(Instant::now() < end);
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(target.receive_message().unwrap(), SENT);
    assert_closed(target.receive());
}

#[test]
fn a_unix_connection_that_is_reset_does_not_end() {
    let (mut source, mut target) = pair();
    source.link.reset();
    drop(source);
    target.set_limit(Duration::from_millis(20)).unwrap();
    assert!(matches!(target.receive(), Err(ChannelError::TimedOut)));
}

#[test]
fn every_end_inside_of_a_frame_is_a_loss() {
    let (mut source, other) = UnixStream::pair().unwrap();
    Channel::new(Link::from_unix(other).unwrap())
        .send(&Message::KeepAlive)
        .unwrap();
    let mut frame = Vec::new();
    source.read_to_end(&mut frame).unwrap();
    for length in 1..frame.len() {
        let (mut source, other) = UnixStream::pair().unwrap();
        let mut target = Channel::new(Link::from_unix(other).unwrap());
        source.write_all(&frame[..length]).unwrap();
        drop(source);
        assert_lost(target.receive());
        // The next read is not one between frames.
        assert_lost(target.receive());
    }
}

#[test]
fn a_limit_that_passes_inside_of_a_frame_ends_it() {
    let (mut source, other) = UnixStream::pair().unwrap();
    let mut target = Channel::new(Link::from_unix(other).unwrap());
    target.set_limit(Duration::from_millis(5)).unwrap();
    assert!(matches!(target.receive(), Err(ChannelError::TimedOut)));
    source.write_all(b"BRMG").unwrap();
    assert!(matches!(target.receive(), Err(ChannelError::TimedOut)));
    // What comes now would be read as if it were the begin of a frame.
    assert_lost(target.receive());
}

#[test]
fn who_takes_nothing_is_not_waited_for_and_gets_no_torn_frames() {
    for (mut source, mut target) in pairs() {
        source.set_limit(Duration::from_millis(20)).unwrap();
        let block = vec![7; 1 << 20];
        let failed = loop {
            match source.send_disk(0, 0, &block) {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        assert!(matches!(failed, ChannelError::TimedOut), "{failed:?}");
        let sent = source.bytes_sent();
        let failed = source.send(&Message::Commit).unwrap_err();
        assert!(matches!(failed, ChannelError::Lost(_)), "{failed:?}");
        let is_local = target.link.is_local();
        drop(source);
        target.set_limit(Duration::from_millis(100)).unwrap();
        let last = loop {
            match target.receive() {
                Ok(Received::Disk { bytes, .. }) => assert!(bytes == block),
                Ok(other) => panic!("{other:?}"),
                Err(error) => break error,
            }
        };
        // A unix socket is not reset, and stays as it was.
        let is_lost = matches!(last, ChannelError::Lost(_));
        let is_silent = matches!(last, ChannelError::TimedOut);
        assert!(if is_local { is_silent } else { is_lost }, "{last:?}");
        // A reset takes away what is on its way.
        let received = target.bytes_received();
        assert!(received == sent || (received < sent && !is_local));
    }
}

/// A source that wants to say something and cannot, for the target reads nothing.
fn unheard(source: &mut Channel) {
    source.set_limit(Duration::from_millis(20)).unwrap();
    let cancel = Message::Cancel {
        why: "x".repeat(900),
    };
    // Until there is no room for a whole one, and then none for a part.
    while source.send(&cancel).is_ok() {}
    source.send(&cancel).unwrap_err();
}

#[test]
fn an_end_after_something_unsaid_is_not_in_order() {
    let (source, target) = crate::tls::tests::secured_pair();
    let secured = (Channel::new(source), Channel::new(target));
    for (mut source, mut target) in pairs().into_iter().chain([secured]) {
        target.set_limit(Duration::from_millis(100)).unwrap();
        unheard(&mut source);
        drop(source);
        let last = loop {
            match target.receive() {
                Ok(Received::Message(Message::Cancel { .. })) => {}
                Ok(other) => panic!("{other:?}"),
                Err(error) => break error,
            }
        };
        assert!(
            matches!(last, ChannelError::Lost(_) | ChannelError::TimedOut),
            "{last:?}"
        );
    }
}

#[test]
fn tls_delivers_nothing_after_it_has_failed_to() {
    let (mut source, mut target) = crate::tls::tests::secured_pair();
    target.set_limit(SOON).unwrap();
    source.set_limit(Duration::from_millis(20)).unwrap();
    let mut sent = 0;
    while let Ok(count) = source.write(&[7; 999]) {
        sent += count;
    }
    // There is room again before it ends.
    let reader = thread::spawn(move || {
        let mut come = Vec::new();
        let end = target.read_to_end(&mut come);
        (come.len(), end.map_err(|error| error.kind()))
    });
    thread::sleep(Duration::from_millis(50));
    drop(source);
    assert_eq!(
        reader.join().unwrap(),
        (sent, Err(ErrorKind::UnexpectedEof))
    );
}

#[test]
fn what_was_said_at_last_makes_an_end_in_order() {
    for (mut source, mut target) in pairs() {
        source.set_limit(Duration::from_millis(20)).unwrap();
        let block = vec![7; 1 << 20];
        // Too large for it, which is no trouble of the connection.
        source
            .send_disk(0, 0, &[&block[..], &[1]].concat())
            .unwrap_err();
        source.send(&SENT).unwrap();
        drop(source);
        assert_eq!(target.receive_message().unwrap(), SENT);
        assert_closed(target.receive());
    }
}

#[test]
fn a_closer_wakes_a_reader_who_does_not_take_it_for_an_end() {
    for (_source, mut target) in pairs() {
        let closer = target.closer().unwrap();
        let reader = thread::spawn(move || {
            let first = target.receive().map(|_| ()).unwrap_err();
            (first, target.receive().map(|_| ()).unwrap_err())
        });
        thread::sleep(Duration::from_millis(10));
        closer.close();
        let (first, then) = reader.join().unwrap();
        assert!(matches!(first, ChannelError::Lost(_)), "{first:?}");
        assert!(matches!(then, ChannelError::Lost(_)), "{then:?}");
    }
}

#[test]
fn a_closer_wakes_a_writer() {
    for (mut source, _target) in pairs() {
        let closer = source.closer().unwrap();
        let writer = thread::spawn(move || {
            let block = vec![7; 1 << 20];
            loop {
                if let Err(error) = source.send_disk(0, 0, &block) {
                    return (error, source.receive().map(|_| ()).unwrap_err());
                }
            }
        });
        thread::sleep(Duration::from_millis(20));
        closer.close();
        let (write, read) = writer.join().unwrap();
        assert!(matches!(write, ChannelError::Lost(_)), "{write:?}");
        assert!(matches!(read, ChannelError::Lost(_)), "{read:?}");
    }
}

#[test]
fn a_closer_keeps_nothing_open() {
    for (source, mut target) in pairs() {
        let closer = source.closer().unwrap();
        drop(source);
        assert_closed(target.receive());
        closer.close();
    }
}

#[test]
fn a_passed_socket_is_used_once_it_works() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let number = ours.into_raw_fd();
    let address = Address::Fd(number);
    // Nothing was said, so the next one has it as it was.
    drop(Link::connect(&address, SOON).unwrap());
    let listener = Listener::bind(&address).unwrap();
    let mut source = Channel::new(Link::from_unix(theirs).unwrap());
    assert!(listener.accept(Duration::from_millis(5)).unwrap().is_none());
    source.send(&SENT).unwrap();
    let mut target = Channel::new(listener.accept(SOON).unwrap().unwrap());
    assert!(target.link.is_local());
    // It is one connection.
    assert!(listener.accept(Duration::from_millis(5)).unwrap().is_none());
    assert_eq!(target.receive_message().unwrap(), SENT);
    // The process has it under its first number still.
    drop(target);
    assert_closed(source.receive());
}

#[test]
fn what_is_no_connection_is_told() {
    let file = std::fs::File::open("/dev/null").unwrap();
    let listening = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let datagrams = std::os::unix::net::UnixDatagram::unbound().unwrap();
    let unconnected =
        socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    for fd in [
        file.as_raw_fd(),
        listening.as_raw_fd(),
        datagrams.as_raw_fd(),
        unconnected.as_raw_fd(),
        9999,
    ] {
        let address = Address::Fd(fd);
        let connected = Link::connect(&address, SOON);
        assert!(
            matches!(connected, Err(LinkError::NoSocket { .. })),
            "{connected:?}"
        );
        assert!(matches!(
            Listener::bind(&address),
            Err(LinkError::NoSocket { .. })
        ));
    }
}

#[test]
fn a_stopper_ends_a_wait() {
    let folder = tempfile::tempdir().unwrap();
    let unix = Address::Unix(folder.path().join("a.sock"));
    for address in [unix, "tcp:127.0.0.1:0".parse().unwrap()] {
        let listener = Listener::bind(&address).unwrap();
        let stopper = listener.stopper();
        let waiter = thread::spawn(move || listener.accept(Duration::from_secs(60)).map(|_| ()));
        thread::sleep(Duration::from_millis(5));
        stopper.stop();
        assert!(matches!(waiter.join().unwrap(), Err(LinkError::Stopped)));
    }
}

#[test]
fn a_unix_socket_is_ours_or_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.sock");
    let address = Address::Unix(path.clone());
    let listener = Listener::bind(&address).unwrap();
    assert!(matches!(Listener::bind(&address), Err(LinkError::InUse(_))));
    // Somebody has put another one there.
    std::fs::remove_file(&path).unwrap();
    let other = std::os::unix::net::UnixListener::bind(&path).unwrap();
    drop(listener);
    assert!(path.exists());
    // Its owner is gone.
    drop(other);
    drop(Listener::bind(&address).unwrap());
    assert!(!path.exists());
    std::fs::write(&path, "").unwrap();
    assert!(matches!(Listener::bind(&address), Err(LinkError::InUse(_))));
}

#[test]
fn a_listener_that_does_not_accept_does_not_hold_who_connects() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.sock");
    let listener =
        socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
    listener
        .bind(&socket2::SockAddr::unix(&path).unwrap())
        .unwrap();
    listener.listen(0).unwrap();
    let address = Address::Unix(path);
    let limit = Duration::from_millis(20);
    let links: Vec<_> = (0..3).map(|_| Link::connect(&address, limit)).collect();
    match links.last() {
        Some(Err(LinkError::Connect { source, .. })) => {
            assert_eq!(source.kind(), ErrorKind::TimedOut);
        }
        other => panic!("{other:?}"),
    }
}
