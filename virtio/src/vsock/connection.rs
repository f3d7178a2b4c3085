// SPDX-License-Identifier: Apache-2.0
//! One connection: a stream socket in the guest, a unix socket on the host, and what passes
//! between them (virtio 1.3, sections 5.10.6.3 to 5.10.6.6).
//!
//! ```text
//!   host connects:   Requested --RESPONSE--> Open --both sides are done, or RST--> gone
//!   guest connects:                          Open
//! ```
//!
//! Bytes for the guest wait in the host's socket until the guest has credit and buffers for them.
//! Bytes for the host are written at once; what its socket does not take waits here, and never is
//! more than the credit that the guest was given.

use std::io;
use std::num::Wrapping;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::packet::{Header, NO_MORE, NO_RECEIVE, NO_SEND, op};
use super::socket;
use super::unsent::{Payload, Unsent};

/// How long the guest may take to answer a request or the end of a connection, and the host to
/// take bytes that are left over at the end.
const PATIENCE: Duration = Duration::from_secs(2);

/// The most packets that one read from the host's socket fills.
const MAX_BURST: usize = 32;

/// What a connection has to tell the guest, beside data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    Request = 1,
    Response = 2,
    Shutdown = 4,
    Credit = 8,
}

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It goes on.
    Keep,
    /// It ends, and the guest is told so.
    Reset,
    /// It ends, as the guest knows already, or never hears of it.
    Forget,
}

/// The next packet for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Speech {
    /// One without payload.
    Control {
        op: u16,
        flags: u32,
    },
    /// What the host's socket has, up to `limit` bytes in up to `packets` packets.
    Data {
        limit: u32,
        packets: usize,
    },
    Silence,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    /// Whether both ends have agreed to it.
    open: bool,
    /// The words that are to be said.
    words: u8,
    /// Whether the host's socket may have something to be read.
    readable: bool,
    /// Whether the host sends nothing more.
    ended: bool,
    /// What the guest has said in SHUTDOWN packets.
    guest_shutdown: u32,
    /// What the guest was told, or will be, in SHUTDOWN packets.
    host_shutdown: u32,
    unsent: Unsent,
    credit: Credit,
    /// How many packets the next read may fill: a guest's buffers are not gathered for nothing.
    burst: usize,
    /// When it ends if nothing happens.
    deadline: Option<Instant>,
    /// Whether it is in the muxer's list of those with something to say.
    pub(super) listed: bool,
    /// Whether the muxer watches for the host's socket to take more.
    pub(super) watched_for_room: bool,
}

/// Flow control (section 5.10.6.3). The counters are modulo 2^32.
#[derive(Debug)]
struct Credit {
    /// The room that the guest was promised, in bytes.
    buf_alloc: u32,
    /// What the host's side took of the guest's bytes.
    forwarded: Wrapping<u32>,
    /// `forwarded`, as the guest has heard it last.
    told: Wrapping<u32>,
    /// What was sent to the guest.
    sent: Wrapping<u32>,
    guest_buf_alloc: u32,
    guest_forwarded: Wrapping<u32>,
    /// Whether the guest was asked for credit since it had none.
    asked: bool,
}

impl Credit {
    /// How much may be sent to the guest.
    fn left(&self) -> u32 {
        let in_flight = (self.sent - self.guest_forwarded).0;
        self.guest_buf_alloc.saturating_sub(in_flight)
    }

    /// Whether the guest should hear that there is room again: when half of it is news.
    fn is_news(&self) -> bool {
        (self.forwarded - self.told).0 >= self.buf_alloc / 2
    }

    fn forward(&mut self, count: usize) {
        // At most the guest's credit, 32 bits.
        self.forwarded += Wrapping(u32::try_from(count).unwrap_or(u32::MAX));
    }
}

impl Connection {
    /// A connection that the host asks for.
    pub(super) fn requested(stream: UnixStream, buf_alloc: u32) -> Self {
        Self::new(stream, buf_alloc, Word::Request)
    }

    /// A connection that the guest asked for with `request`.
    pub(super) fn accepted(stream: UnixStream, buf_alloc: u32, request: &Header) -> Self {
        let mut connection = Self::new(stream, buf_alloc, Word::Response);
        connection.open = true;
        connection.hear_credit(request);
        connection
    }

    fn new(stream: UnixStream, buf_alloc: u32, word: Word) -> Self {
        Self {
            stream,
            open: false,
            words: word as u8,
            readable: true,
            ended: false,
            guest_shutdown: 0,
            host_shutdown: 0,
            unsent: Unsent::default(),
            credit: Credit {
                buf_alloc,
                forwarded: Wrapping(0),
                told: Wrapping(0),
                sent: Wrapping(0),
                guest_buf_alloc: 0,
                guest_forwarded: Wrapping(0),
                asked: false,
            },
            burst: 1,
            deadline: None,
            listed: false,
            watched_for_room: false,
        }
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Whether there are bytes that wait for the host's socket to take them.
    pub(super) fn waits_for_room(&self) -> bool {
        !self.unsent.is_empty()
    }

    fn say(&mut self, word: Word) {
        self.words |= word as u8;
    }

    fn take_word(&mut self, word: Word) -> bool {
        let there = self.words & word as u8 != 0;
        self.words &= !(word as u8);
        there
    }

    // ---- From the guest ----

    /// Takes a packet from the guest. `local_port` is the host's, for the answer to a client.
    pub(super) fn receive(
        &mut self,
        header: &Header,
        payload: &mut Payload<'_>,
        local_port: u32,
    ) -> Fate {
        self.hear_credit(header);
        match (self.open, header.op) {
            (_, op::RST) => Fate::Forget,
            (false, op::RESPONSE) if self.words & Word::Request as u8 == 0 => {
                self.confirm(local_port)
            }
            (true, op::RW) if self.guest_shutdown & NO_SEND == 0 => self.forward(payload),
            (true, op::SHUTDOWN) => self.hear_shutdown(header.flags),
            (true, op::CREDIT_UPDATE) => Fate::Keep,
            (true, op::CREDIT_REQUEST) => {
                self.say(Word::Credit);
                Fate::Keep
            }
            _ => Fate::Reset,
        }
    }

    fn hear_credit(&mut self, header: &Header) {
        let credit = &mut self.credit;
        credit.guest_buf_alloc = header.buf_alloc;
        credit.guest_forwarded = Wrapping(header.fwd_cnt);
        if credit.left() > 0 {
            credit.asked = false;
        }
    }

    /// The guest has taken the host's request.
    fn confirm(&mut self, local_port: u32) -> Fate {
        self.open = true;
        self.deadline = None;
        let line = format!("OK {local_port}\n");
        // Nothing was sent yet, so that there is room unless the client has gone.
        match socket::send_bytes(&self.stream, line.as_bytes()) {
            Ok(sent) if sent == line.len() => Fate::Keep,
            _ => Fate::Reset,
        }
    }

    /// Passes bytes on to the host.
    fn forward(&mut self, payload: &mut Payload<'_>) -> Fate {
        let len = payload.len as usize;
        let room = (self.credit.buf_alloc as usize).saturating_sub(self.unsent.len());
        if len > room {
            return Fate::Reset;
        }
        let mut sent = 0;
        if self.host_shutdown & NO_RECEIVE != 0 {
            // Nobody wants it, as the guest was told.
            sent = len;
        } else if self.unsent.is_empty() && len > 0 {
            match payload.send(&self.stream) {
                Ok(count) => sent = count,
                Err(error) if is_for_later(&error) => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                    self.host_takes_no_more();
                    sent = len;
                }
                Err(_) => return Fate::Reset,
            }
        }
        if sent < len && !self.unsent.append(payload, sent) {
            return Fate::Reset;
        }
        self.credit.forward(sent);
        self.offer_credit();
        Fate::Keep
    }

    /// Sends what waits, now that the host's socket takes more.
    fn flush(&mut self) -> Fate {
        match self.unsent.send(&self.stream) {
            Ok(count) => {
                self.credit.forward(count);
                if count > 0 && self.deadline.is_some() && self.guest_shutdown == NO_MORE {
                    self.deadline = Some(Instant::now() + PATIENCE);
                }
            }
            Err(error) if is_for_later(&error) => {}
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => self.host_takes_no_more(),
            Err(_) => return Fate::Reset,
        }
        self.offer_credit();
        if self.unsent.is_empty() {
            return self.pass_shutdown_on();
        }
        Fate::Keep
    }

    fn offer_credit(&mut self) {
        if self.credit.is_news() && self.guest_shutdown & NO_SEND == 0 {
            self.say(Word::Credit);
        }
    }

    fn hear_shutdown(&mut self, flags: u32) -> Fate {
        let before = self.guest_shutdown;
        self.guest_shutdown |= flags & NO_MORE;
        if self.guest_shutdown & !before & NO_RECEIVE != 0 {
            // It fails if the host has gone already, which is as good.
            let _ = self.stream.shutdown(std::net::Shutdown::Read);
        }
        if self.unsent.is_empty() {
            return self.pass_shutdown_on();
        }
        if self.guest_shutdown == NO_MORE {
            self.deadline = Some(Instant::now() + PATIENCE);
        }
        Fate::Keep
    }

    /// Tells the host that the guest is done, after all that it sent.
    fn pass_shutdown_on(&mut self) -> Fate {
        if self.guest_shutdown == NO_MORE {
            return Fate::Reset;
        }
        if self.guest_shutdown & NO_SEND != 0 {
            let _ = self.stream.shutdown(std::net::Shutdown::Write);
        }
        Fate::Keep
    }

    // ---- From the host ----

    /// Takes the news that the host's socket has something to be read, or hung up.
    pub(super) fn host_spoke(&mut self, hung_up: bool) {
        self.readable = true;
        let nothing_to_read = self.ended || self.guest_shutdown & NO_RECEIVE != 0;
        if hung_up && nothing_to_read {
            self.host_is_gone();
        }
    }

    /// Takes the news that the host's socket takes more.
    pub(super) fn host_has_room(&mut self) -> Fate {
        if self.unsent.is_empty() {
            return Fate::Keep;
        }
        self.flush()
    }

    fn host_takes_no_more(&mut self) {
        let lost = self.unsent.discard();
        self.credit.forward(lost);
        self.shut(NO_RECEIVE);
    }

    fn host_is_gone(&mut self) {
        self.host_takes_no_more();
        self.shut(NO_SEND);
    }

    fn shut(&mut self, flags: u32) {
        if self.host_shutdown & flags != flags {
            self.host_shutdown |= flags;
            self.say(Word::Shutdown);
        }
    }

    // ---- To the guest ----

    fn may_read(&self) -> bool {
        self.open && self.readable && !self.ended && self.guest_shutdown & NO_RECEIVE == 0
    }

    /// Whether there may be something to tell the guest.
    pub(super) fn has_something_to_say(&self) -> bool {
        let can_send = || !self.credit.asked || self.credit.left() > 0;
        self.words != 0 || self.may_read() && can_send()
    }

    /// Whether the guest has never heard of the connection.
    pub(super) fn is_unheard(&self) -> bool {
        self.words & Word::Request as u8 != 0
    }

    /// What to say next; it counts as said.
    pub(super) fn speak(&mut self) -> Speech {
        let control = |op| Speech::Control { op, flags: 0 };
        if self.take_word(Word::Request) {
            self.deadline = Some(Instant::now() + PATIENCE);
            return control(op::REQUEST);
        }
        if self.take_word(Word::Response) {
            return control(op::RESPONSE);
        }
        if self.may_read() {
            match self.credit.left() {
                0 if self.credit.asked => {}
                0 => {
                    self.credit.asked = true;
                    return control(op::CREDIT_REQUEST);
                }
                limit => {
                    return Speech::Data {
                        limit,
                        packets: self.burst,
                    };
                }
            }
        }
        if self.take_word(Word::Shutdown) {
            if self.host_shutdown == NO_MORE {
                self.deadline = Some(Instant::now() + PATIENCE);
            }
            return Speech::Control {
                op: op::SHUTDOWN,
                flags: self.host_shutdown,
            };
        }
        if self.take_word(Word::Credit) {
            return control(op::CREDIT_UPDATE);
        }
        Speech::Silence
    }

    /// Takes the outcome of a read for [`Speech::Data`], for which there was `room`.
    pub(super) fn has_read(&mut self, result: io::Result<usize>, room: usize) -> Fate {
        match result {
            Ok(0) => {
                self.ended = true;
                if socket::is_hung_up(&self.stream) {
                    self.host_is_gone();
                } else {
                    self.shut(NO_SEND);
                }
            }
            Ok(count) => {
                self.burst = if count < room {
                    (self.burst / 2).max(1)
                } else {
                    (self.burst * 2).min(MAX_BURST)
                };
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
            Err(error) if is_for_later(&error) => {}
            Err(_) => return Fate::Reset,
        }
        Fate::Keep
    }

    /// Puts what every packet says of flow control into `header`, and counts its payload.
    pub(super) fn stamp(&mut self, header: &mut Header) {
        let credit = &mut self.credit;
        header.buf_alloc = credit.buf_alloc;
        header.fwd_cnt = credit.forwarded.0;
        credit.told = credit.forwarded;
        credit.sent += Wrapping(header.len);
        self.take_word(Word::Credit);
    }
}

/// Whether the call would have had to wait, or is to be made again.
fn is_for_later(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
