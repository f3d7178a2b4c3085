// SPDX-License-Identifier: Apache-2.0

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use rustls::{ClientConnection, StreamOwned};
use tempfile::TempDir;

use super::*;
use crate::channel::{Channel, ChannelError, Received};
use crate::host;
use crate::message::Message;
use crate::pages::{MOST_PAGES, PAGE, PageBatch, Zeros};
use crate::{Link, Listener};

/// An authority, and a directory for what it signs.
pub(crate) struct Authority {
    files: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(crate) fn new() -> Self {
        Self::named("ours")
    }

    fn named(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let files = TempDir::new().unwrap();
        let ca = params.self_signed(&key).unwrap();
        fs::write(files.path().join("ca.pem"), ca.pem()).unwrap();
        let issuer = Issuer::new(params, key);
        Self { files, issuer }
    }

    /// The files of a side that is called `name` and has a certificate for it.
    fn sign(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> TlsFiles {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        change(&mut params);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let write = |what: &str, text: String| {
            let path = self.files.path().join(format!("{name}.{what}"));
            fs::write(&path, text).unwrap();
            path
        };
        TlsFiles {
            ca: self.files.path().join("ca.pem"),
            certificate: write("crt", certificate.pem()),
            key: write("key", key.serialize_pem()),
            server_name: None,
        }
    }

    pub(crate) fn tls(&self, name: &str) -> Tls {
        Tls::load(&self.sign(name, |_| ())).unwrap()
    }
}

fn links() -> (Link, Link) {
    let (one, other) = UnixStream::pair().unwrap();
    let link = |stream| {
        let mut link = Link::from_unix(stream).unwrap();
        link.set_limit(Duration::from_secs(20)).unwrap();
        link
    };
    (link(one), link(other))
}

fn here() -> Address {
    Address::Fd(0)
}

/// What comes of a handshake, at the client and at the server.
fn meet(client: &Tls, server: &Tls) -> (Result<Link, TlsError>, Result<Link, TlsError>) {
    let (one, other) = links();
    thread::scope(|scope| {
        let server = scope.spawn(|| other.secured_as_server(server));
        let client = one.secured_as_client(client, &here());
        (client, server.join().unwrap())
    })
}

/// The same for a pair that is to fail, as texts.
fn part(client: &Tls, server: &Tls) -> (String, String) {
    let (client, server) = meet(client, server);
    (
        client.unwrap_err().to_string(),
        server.unwrap_err().to_string(),
    )
}

pub(crate) fn secured_pair() -> (Link, Link) {
    let authority = Authority::new();
    let (client, server) = meet(&authority.tls("source"), &authority.tls("localhost"));
    (client.unwrap(), server.unwrap())
}

/// Sends 4 MiB of pages.
fn send(channel: &mut Channel) {
    let mut batch = PageBatch::new();
    let pages = u32::try_from(MOST_PAGES).unwrap();
    batch.push_run(5, pages, Zeros::Told, fill);
    for _ in 0..8 {
        channel.send_pages(&batch).unwrap();
    }
    channel.send(&Message::KeepAlive).unwrap();
}

/// Waits for what [`send`] sends.
fn receive(channel: &mut Channel) {
    let mut expected = vec![0; MOST_PAGES * PAGE];
    fill(&mut expected);
    for _ in 0..8 {
        assert!(channel.wait(Duration::from_secs(20)).unwrap());
        match channel.receive().unwrap() {
            Received::Pages(pages) => {
                let runs: Vec<_> = pages.runs().collect();
                assert!(matches!(runs[..], [(_, Some(bytes))] if bytes == expected));
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(channel.receive_message().unwrap(), Message::KeepAlive);
}

fn fill(bytes: &mut [u8]) {
    let numbers = bytes.chunks_exact_mut(4).zip(1_u32..);
    numbers.for_each(|(bytes, number)| bytes.copy_from_slice(&number.to_le_bytes()));
}

#[test]
fn megabytes_go_through_both_ways() {
    let authority = Authority::new();
    let directory = TempDir::new().unwrap();
    let unix = Address::Unix(directory.path().join("a.sock"));
    for (address, name) in [
        (unix, "localhost"),
        ("tcp:127.0.0.1:0".parse().unwrap(), "127.0.0.1"),
    ] {
        let listener = Listener::bind(&address).unwrap();
        let (client, server) = (authority.tls("source"), authority.tls(name));
        let limit = Duration::from_secs(20);
        let address = listener.address();
        let source = thread::spawn(move || {
            let mut link = Link::connect(&address, limit).unwrap();
            link.set_limit(limit).unwrap();
            let mut channel = Channel::new(link.secured_as_client(&client, &address).unwrap());
            send(&mut channel);
            receive(&mut channel);
        });
        let mut link = listener.accept(limit).unwrap().unwrap();
        link.set_limit(limit).unwrap();
        let link = link.secured_as_server(&server).unwrap();
        assert!(link.is_secured() && !link.is_local());
        let mut channel = Channel::new(link);
        receive(&mut channel);
        send(&mut channel);
        assert!(matches!(channel.receive(), Err(ChannelError::Closed)));
        source.join().unwrap();
    }
}

#[test]
fn who_is_not_accepted_learns_why() {
    let (ours, theirs) = (Authority::new(), Authority::named("theirs"));
    let source = ours.tls("source");
    let target = ours.tls("localhost");
    let with = |name: &str, change: fn(&mut CertificateParams)| {
        Tls::load(&ours.sign(name, change)).unwrap()
    };
    let old = |params: &mut CertificateParams| params.not_after = date_time_ymd(2001, 1, 1);
    let new = |params: &mut CertificateParams| params.not_before = date_time_ymd(4000, 1, 1);
    let expired = "our certificate has expired, or is not valid yet there";
    // A client with the right authority in its file, whose certificate is of another one.
    let mixed = Tls::load(&TlsFiles {
        ca: ours.files.path().join("ca.pem"),
        ..theirs.sign("source", |_| ())
    })
    .unwrap();
    for (client, server, at_client, at_server) in [
        (
            &source,
            &theirs.tls("localhost"),
            "our authority has not signed it",
            "its authority has not signed our certificate",
        ),
        (
            &source,
            &Authority::new().tls("localhost"),
            "our authority has not signed it",
            "a signature of ours does not fit",
        ),
        (
            &mixed,
            &target,
            "its authority has not signed our certificate",
            "our authority has not signed it",
        ),
        (&source, &with("localhost", old), "it has expired", expired),
        (&with("old", old), &target, expired, "it has expired"),
        (&with("new", new), &target, expired, "it is not valid yet"),
        (
            &source,
            &ours.tls("elsewhere"),
            "it is not for the name \"localhost\"",
            "is not for the name by which it knows us",
        ),
    ] {
        let (client, server) = part(client, server);
        assert!(client.contains(at_client), "{client}");
        assert!(server.contains(at_server), "{server}");
    }
    // The name that is told counts, not the address.
    let mut files = ours.sign("source", |_| ());
    files.server_name = Some("elsewhere".into());
    let named = Tls::load(&files).unwrap();
    let (client, server) = meet(&named, &ours.tls("elsewhere"));
    assert!(client.is_ok() && server.is_ok());
}

#[test]
fn a_client_needs_a_certificate() {
    let authority = Authority::new();
    let target = authority.tls("localhost");
    let roots = authorities(&authority.files.path().join("ca.pem")).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let client = ClientConnection::new(Arc::new(config), name("localhost").unwrap()).unwrap();
    let (one, other) = UnixStream::pair().unwrap();
    let server = thread::spawn(move || {
        let link = Link::from_unix(other).unwrap();
        link.secured_as_server(&target).unwrap_err().to_string()
    });
    let error = StreamOwned::new(client, one).read(&mut [0]).unwrap_err();
    assert!(error.to_string().contains("CertificateRequired"), "{error}");
    let error = server.join().unwrap();
    assert!(error.contains("has no certificate"), "{error}");
    let told = told(AlertDescription::CertificateRequired);
    assert_eq!(told, "it wants a certificate");
}

type Handshake = fn(Link, &Tls) -> Result<Link, TlsError>;

/// For who does not.
const LITTLE: Duration = Duration::from_millis(200);
/// Long enough for who answers.
const SOON: Duration = Duration::from_secs(20);

/// Does a handshake with somebody else, within `limit`.
fn with_stranger(handshake: Handshake, limit: Duration, stranger: fn(&mut UnixStream)) -> TlsError {
    let tls = Authority::new().tls("localhost");
    let (one, mut other) = UnixStream::pair().unwrap();
    let mut link = Link::from_unix(one).unwrap();
    link.set_limit(limit).unwrap();
    let stranger = thread::spawn(move || stranger(&mut other));
    let start = Instant::now();
    let error = handshake(link, &tls).unwrap_err();
    assert!(start.elapsed() < limit + SOON, "{error:?}");
    stranger.join().unwrap();
    error
}

#[test]
fn who_does_not_speak_tls_is_not_waited_for() {
    let handshakes: [Handshake; 2] = [
        |link, tls| link.secured_as_server(tls),
        |link, tls| link.secured_as_client(tls, &here()),
    ];
    for handshake in handshakes {
        let silent = with_stranger(handshake, LITTLE, |stranger| {
            // Until we have gone.
            while stranger.read(&mut [0; 4096]).unwrap_or(0) > 0 {}
        });
        assert!(matches!(silent, TlsError::TimedOut), "{silent:?}");
        // Something moves all the time.
        let slow = with_stranger(handshake, LITTLE, |stranger| {
            for byte in [0x16, 3, 3, 0x40, 0].into_iter().chain([1; 1000]) {
                thread::sleep(Duration::from_millis(5));
                if stranger.write_all(&[byte]).is_err() {
                    break;
                }
            }
            while stranger.read(&mut [0; 4096]).unwrap_or(0) > 0 {}
        });
        assert!(matches!(slow, TlsError::TimedOut), "{slow:?}");
        let plain = with_stranger(handshake, SOON, |stranger| {
            stranger.write_all(b"BRMG and whatever follows it").unwrap();
            while stranger.read(&mut [0; 4096]).unwrap_or(0) > 0 {}
        });
        assert!(matches!(plain, TlsError::NotTls), "{plain:?}");
        let gone = with_stranger(handshake, SOON, |_| ());
        assert!(matches!(gone, TlsError::Ended), "{gone:?}");
    }
}

#[test]
fn an_end_is_in_order_only_if_it_is_announced() {
    let (source, target) = secured_pair();
    let (mut source, mut target) = (Channel::new(source), Channel::new(target));
    source.send(&Message::KeepAlive).unwrap();
    drop(source);
    assert_eq!(target.receive_message().unwrap(), Message::KeepAlive);
    assert!(target.wait(Duration::from_secs(9)).unwrap());
    assert!(matches!(target.receive(), Err(ChannelError::Closed)));

    let (source, target) = secured_pair();
    let mut target = Channel::new(target);
    // As if the source was killed, or somebody between the two had cut the line.
    source.closer().unwrap().close();
    assert!(target.wait(Duration::from_secs(9)).unwrap());
    assert!(matches!(target.receive(), Err(ChannelError::Lost(_))));
}

/// The socket below a link.
fn stream_below(link: &Link) -> UnixStream {
    let (socket, _) = host::stream_socket(link.as_raw_fd()).unwrap();
    socket.into()
}

#[test]
fn a_change_on_the_way_is_found() {
    let (source, target) = secured_pair();
    let mut target = Channel::new(target);
    let mut below = stream_below(&source);
    // A record of data that nobody with the keys has made.
    below.write_all(&[0x17, 3, 3, 0, 32]).unwrap();
    below.write_all(&[7; 32]).unwrap();
    match target.receive() {
        Err(ChannelError::Lost(error)) => {
            assert!(error.to_string().contains("decrypt"), "{error}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn several_frames_in_a_record_are_all_told() {
    let (mut source, target) = secured_pair();
    let mut bytes = Vec::new();
    for _ in 0..2 {
        let (one, mut other) = UnixStream::pair().unwrap();
        let mut plain = Channel::new(Link::from_unix(one).unwrap());
        plain.send(&Message::KeepAlive).unwrap();
        drop(plain);
        other.read_to_end(&mut bytes).unwrap();
    }
    source.write_all(&bytes).unwrap();
    let mut target = Channel::new(target);
    for _ in 0..2 {
        assert!(target.wait(Duration::from_secs(9)).unwrap());
        assert_eq!(target.receive_message().unwrap(), Message::KeepAlive);
    }
    assert!(!target.wait(Duration::from_millis(20)).unwrap());
}

#[test]
fn who_does_not_read_holds_nobody_up() {
    let (mut source, target) = secured_pair();
    source.set_limit(Duration::from_millis(50)).unwrap();
    let error = loop {
        if let Err(error) = source.write(&[1; 65536]) {
            break error;
        }
    };
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    let start = Instant::now();
    drop(source);
    assert!(start.elapsed() < Duration::from_secs(1));
    drop(target);
}

#[test]
fn files_that_do_not_do_are_named() {
    let authority = Authority::new();
    let good = authority.sign("localhost", |_| ());
    let other = authority.sign("other", |_| ());
    let directory = TempDir::new().unwrap();
    let write = |name: &str, text: &str| {
        let path = directory.path().join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let with = |change: &dyn Fn(&mut TlsFiles)| {
        let mut files = good.clone();
        change(&mut files);
        Tls::load(&files).unwrap_err().to_string()
    };
    for (error, texts) in [
        (
            with(&|files| files.ca = "/nowhere/ca.pem".into()),
            ["/nowhere/ca.pem", "cannot be read"],
        ),
        (
            with(&|files| files.ca = write("empty", "hello")),
            ["no certificate in", "empty"],
        ),
        (
            with(&|files| files.certificate = good.key.clone()),
            ["no certificate in", "localhost.key"],
        ),
        (
            with(&|files| files.key = good.certificate.clone()),
            ["no private key in", "localhost.crt"],
        ),
        (
            with(&|files| files.key = write("cut", "-----BEGIN PRIVATE KEY-----\nAAAA\n")),
            ["cut", "is not in PEM form"],
        ),
        (
            with(&|files| {
                let text = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
                files.ca = write("odd", text);
            }),
            ["odd", "cannot be used"],
        ),
        (
            with(&|files| files.key = other.key.clone()),
            ["other.key is not the private key", "localhost.crt"],
        ),
        (
            with(&|files| files.server_name = Some("a b".into())),
            ["\"a b\"", "is no name"],
        ),
    ] {
        for text in texts {
            assert!(error.contains(text), "{error}");
        }
    }
    assert!(!format!("{:?}", Tls::load(&good).unwrap()).contains("key"));
}
