//! What is still read of a connection whose client has come back by another one: the client may have said
//! goodbye behind all that it sent, which decides about its will.
//!
//! The new connection waits meanwhile, and all clients may come back at once. So a connection has a bound of
//! bytes, a lower one once a time has passed, and one of what it may hold to be written. Its turns are those of
//! any connection. The client of a connection that lost its network has nothing there, and is
//! hardly waited for.

#[cfg(test)]
mod tests;

use std::future::poll_fn;
use std::task::Poll;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::coop::unconstrained;
use tokio::time::{Instant, sleep_until};

use super::renewing::held;
use super::{Connection, Event, Io, WRITE_PAUSE_BYTES, poll_io};

/// Bytes that are read, whatever time they take.
pub const LAST_BYTES_LEAST: u32 = 256 << 10;
/// Bytes that are read within [`LAST_TIME_MAX`]: more than the payload that fits into a receive buffer which
/// Linux let grow (`net.ipv4.tcp_rmem`, 6 MiB in most kernels, of which about half is payload), and into what TLS
/// and WebSocket hold beside it.
pub const LAST_BYTES_MAX: u32 = 4 << 20;
/// Time from the first such read. Much less than `mqtt.connect_timeout`, within which the new connection waits. A busy
/// machine makes no test fail.
pub const LAST_TIME_MAX: Duration = Duration::from_secs(if cfg!(test) { 60 } else { 1 });
/// What a read counts as beside its bytes: a frame of a WebSocket, or a record of TLS, may hold few.
pub const LAST_READ_BYTES: u32 = 64;
/// Unwritten bytes, answers to what is read among them, with which no more is read.
pub const LAST_OUT_MAX: usize = 2 * WRITE_PAUSE_BYTES;

/// Time that is given to what is on its way from a client that has sent something: what its kernel holds comes once
/// there is room here.
const LAST_PAUSE: Duration = Duration::from_millis(200);
/// The same where nothing was read: the runtime may not have been told yet what has come.
const LAST_PAUSE_LEAST: Duration = Duration::from_millis(10);

/// How far the last reads of a connection have come.
pub struct LastReads {
    bytes: u32,
    has_read: bool,
    until: Instant,
}

impl LastReads {
    pub fn new(now: Instant) -> Self {
        Self { bytes: 0, has_read: false, until: now + LAST_TIME_MAX }
    }

    /// Begins a read; returns false where there is to be none.
    pub fn begin_read(&mut self, now: Instant) -> bool {
        let max = if now < self.until { LAST_BYTES_MAX } else { LAST_BYTES_LEAST };
        let begins = self.bytes < max;
        if begins {
            self.bytes += LAST_READ_BYTES;
        }
        begins
    }

    pub fn add(&mut self, len: usize) {
        self.bytes = self.bytes.saturating_add(len as u32);
        self.has_read = true;
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<'_, S> {
    /// Returns the next event of a connection that is to end: what its client sent before it came back by
    /// another one, or [`Event::Called`] where there is nothing more to wait for.
    pub(super) async fn last_event(&mut self) -> Event {
        if !self.session.is_wanted() || self.out.len() >= LAST_OUT_MAX {
            return Event::Called;
        }
        let now = Instant::now();
        let last = self.last.get_or_insert_with(|| Box::new(LastReads::new(now)));
        let event =
            if self.has_left || last.begin_read(now) { self.last_read(now).await } else { Event::Called };
        if let (Event::Io(Io::Read(len)), Some(last)) = (&event, &mut self.last) {
            last.add(*len);
        }
        event
    }

    async fn last_read(&mut self, now: Instant) -> Event {
        if !self.has_left
            && let Some(io) = self.read_now().await
        {
            return Event::Io(io);
        }
        let read_max = if self.has_left { 0 } else { self.read_max() };
        let Some(last) = &self.last else { return Event::Called };
        let until = match () {
            // What was read waits for what comes by itself, and a goodbye may lie in it.
            () if self.waits_briefly() => last.until,
            () if read_max > 0 => {
                last.until.min(now + if last.has_read { LAST_PAUSE } else { LAST_PAUSE_LEAST })
            }
            () => return Event::Called,
        };
        let (io, mut nothing) = (&mut self.io, BytesMut::new());
        let (acks, _, answered) = self.inbound.waits(self.broker);
        tokio::select! {
            biased;
            () = answered => Event::Answered,
            event = held(self.changing.as_deref_mut(), self.renewing.as_deref_mut()) => event,
            io = poll_fn(|cx| poll_io(io, &mut nothing, read_max, cx)), if read_max > 0 => Event::Io(io),
            moved = acks.moved() => Event::Durable(moved),
            () = self.broker.shutdown.cancelled() => Event::Called,
            () = sleep_until(until) => Event::Called,
        }
    }

    /// Reads what there is. Without a budget: else it may seem that there is nothing. Nothing is written to a
    /// client that has gone.
    async fn read_now(&mut self) -> Option<Io> {
        let (read_max, io) = (self.read_max(), &mut self.io);
        unconstrained(poll_fn(|cx| {
            Poll::Ready(match poll_io(io, &mut BytesMut::new(), read_max, cx) {
                Poll::Ready(io) => Some(io),
                Poll::Pending => None,
            })
        }))
        .await
    }
}
