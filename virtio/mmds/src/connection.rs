// SPDX-License-Identifier: Apache-2.0
//! One TCP connection of a guest: requests come in, answers go out, one after the other.

use std::time::Duration;

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};

use crate::http::{Parsed, Request, Response, parse};

/// The most bytes of a request.
const MAX_REQUEST: usize = 4096;
/// Bytes under way to the guest.
const SEND_BUFFER: usize = 8192;
/// How long a connection may be there with nothing done on it.
const IDLE: Duration = Duration::from_secs(30);

/// A socket that listens for a connection.
pub(crate) fn listener(port: u16) -> Option<Socket<'static>> {
    let mut socket = Socket::new(
        SocketBuffer::new(vec![0; MAX_REQUEST]),
        SocketBuffer::new(vec![0; SEND_BUFFER]),
    );
    socket.set_nagle_enabled(false);
    // Whoever asks waits for the answer, which carries the acknowledgement.
    socket.listen(port).ok().map(|()| socket)
}

/// A connection, or the wait for one.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) handle: SocketHandle,
    /// When something was done on it last; `None` while it only listens.
    pub(crate) since: Option<Duration>,
    answer: Vec<u8>,
    /// How much of the answer the socket has.
    sent: usize,
    closing: bool,
}

impl Connection {
    pub(crate) fn new(handle: SocketHandle) -> Self {
        Self {
            handle,
            since: None,
            answer: Vec::new(),
            sent: 0,
            closing: false,
        }
    }

    /// When the guest's patience is over, if it is under way.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        Some(self.since? + IDLE)
    }

    /// Does what can be done at the time `now`; whether there was anything.
    pub(crate) fn serve(
        &mut self,
        socket: &mut Socket<'_>,
        now: Duration,
        respond: &mut dyn FnMut(&Request<'_>) -> Response,
    ) -> bool {
        match socket.state() {
            State::Closed => return false,
            State::Listen => {
                // A guest that takes its SYN back sends the socket back to where it was.
                *self = Self::new(self.handle);
                return false;
            }
            _ => {}
        }
        let new = self.since.is_none();
        if self.deadline().is_some_and(|deadline| deadline <= now) {
            socket.abort();
            return true;
        }
        let mut progress = new;
        loop {
            let rest = self.answer.len() - self.sent;
            let left = self.send(socket);
            progress |= left < rest;
            if left > 0 || !self.receive(socket, respond) {
                break;
            }
            progress = true;
        }
        if progress {
            self.since = Some(now);
        }
        progress
    }

    /// Gives the rest of the answer to the socket; how many bytes are left.
    fn send(&mut self, socket: &mut Socket<'_>) -> usize {
        let rest = self.answer.get(self.sent..).unwrap_or_default();
        if !rest.is_empty() {
            // An error is a connection that has ended, whose socket goes away.
            self.sent += socket.send_slice(rest).unwrap_or(0);
        }
        let left = self.answer.len() - self.sent;
        if left == 0 {
            // Answers can be large, and a connection can idle for long.
            (self.answer, self.sent) = (Vec::new(), 0);
        }
        left
    }

    /// Takes the next request and answers it; whether there was any.
    fn receive(
        &mut self,
        socket: &mut Socket<'_>,
        respond: &mut dyn FnMut(&Request<'_>) -> Response,
    ) -> bool {
        if self.closing {
            socket.close();
            return false;
        }
        let mut data = [0; MAX_REQUEST];
        let len = socket.peek_slice(&mut data).unwrap_or(0);
        let (used, keep_alive) = match parse(data.get(..len).unwrap_or_default()) {
            Parsed::Request(request, used) => {
                let has_body = request.method != "HEAD";
                let response = respond(&request);
                self.answer = response.encode(request.minor, request.keep_alive, has_body);
                (used, request.keep_alive)
            }
            Parsed::Incomplete if len < MAX_REQUEST => {
                // Nothing comes any more from a guest that has closed its side.
                self.closing = socket.state() == State::CloseWait;
                return self.closing;
            }
            Parsed::Incomplete | Parsed::Bad => {
                self.answer = Response::bad_request().encode(1, false, true);
                (len, false)
            }
        };
        self.closing = !keep_alive;
        // It was there when it was looked at.
        let _ = socket.recv_slice(data.get_mut(..used).unwrap_or_default());
        true
    }
}
