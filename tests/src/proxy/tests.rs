// SPDX-License-Identifier: Apache-2.0

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use super::*;
use crate::vm::SOON;

/// A proxy before an echo, and a connection to it.
fn echo() -> (Proxy, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = Address::Tcp(listener.local_addr().unwrap());
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || io::copy(&mut &stream, &mut &stream));
        }
    });
    let proxy = Proxy::new(to, Path::new("/nowhere"));
    let Address::Tcp(address) = proxy.address() else {
        unreachable!()
    };
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    (proxy, stream)
}

fn there_and_back(mut stream: &TcpStream, bytes: &[u8]) -> io::Result<Vec<u8>> {
    stream.write_all(bytes)?;
    let mut back = vec![0; bytes.len()];
    stream.read_exact(&mut back)?;
    Ok(back)
}

#[test]
fn one_bit_is_flipped_on_the_way_that_was_said_and_no_other() {
    let (proxy, stream) = echo();
    for (way, at) in [(Way::There, 2), (Way::Back, 5)] {
        proxy.inject(Fault {
            connection: 0,
            way,
            at,
            harm: Harm::Flip,
        });
    }
    let back = there_and_back(&stream, &[0; 4]).unwrap();
    assert_eq!(back, [0, 0, 4, 0]);
    let back = there_and_back(&stream, &[0; 4]).unwrap();
    assert_eq!(back, [0, 4, 0, 0]);
    assert_eq!(there_and_back(&stream, &[0; 4]).unwrap(), [0; 4]);
    assert_eq!((proxy.bytes(Way::There), proxy.connections()), (12, 1));
}

#[test]
fn a_cut_comes_after_so_many_bytes() {
    let (proxy, mut stream) = echo();
    let (connection, way) = (0, Way::There);
    proxy.inject(Fault {
        connection,
        way,
        at: 3,
        harm: Harm::Cut,
    });
    stream.write_all(&[7; 10]).unwrap();
    let mut back = Vec::new();
    let _ = stream.read_to_end(&mut back);
    assert!(back.len() <= 3, "{back:?}");
    assert!(there_and_back(&stream, &[1]).is_err());
}

#[test]
fn what_was_stalled_comes_whole_when_it_goes_on() {
    let (proxy, mut stream) = echo();
    let (connection, way) = (0, Way::There);
    proxy.inject(Fault {
        connection,
        way,
        at: 2,
        harm: Harm::Stall,
    });
    stream.write_all(&[1, 2, 3, 4]).unwrap();
    let little = std::time::Duration::from_millis(100);
    stream.set_read_timeout(Some(little)).unwrap();
    let mut back = [0; 4];
    let come = stream.read(&mut back).unwrap_or(0);
    assert!(come <= 2, "{back:?}");
    proxy.go_on();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.read_exact(&mut back[come..]).unwrap();
    assert_eq!(back, [1, 2, 3, 4]);
}

#[test]
fn one_of_several_connections_is_lost_and_a_cut_refuses_new_ones() {
    let (proxy, first) = echo();
    let Address::Tcp(address) = proxy.address() else {
        unreachable!()
    };
    let second = TcpStream::connect(address).unwrap();
    there_and_back(&first, &[1]).unwrap();
    there_and_back(&second, &[1]).unwrap();
    proxy.drop_connection(0);
    assert!(there_and_back(&first, &[2; 4]).is_err());
    assert_eq!(there_and_back(&second, &[2; 4]).unwrap(), [2; 4]);
    proxy.cut();
    let third = TcpStream::connect(address).unwrap();
    assert!(there_and_back(&third, &[3]).is_err());
    proxy.mend();
    let fourth = TcpStream::connect(address).unwrap();
    assert_eq!(there_and_back(&fourth, &[4]).unwrap(), [4]);
}
