//! The task of one connection: it reads, appends, acknowledges and delivers until the connection ends.
//!
//! An idle connection holds no buffer: data is read into a buffer of the thread, and only incomplete
//! packets are kept. The only timer is for keep alive, and traffic does not reset it.

mod changing;
mod delivering;
mod ending;
mod last;
mod packets;
mod renewing;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::future::{pending, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use rmqtt_codec::v5::DisconnectReasonCode;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::coop::consume_budget;
use tokio::task::yield_now;
use tokio::time::{Instant, Sleep, sleep_until, timeout};

use self::changing::Changing;
use self::delivering::{Moved, Outward, outward};
use self::ending::{End, Leaving, linger};
use self::last::LastReads;
use self::renewing::{Renewed, Renewing, held};
use super::Broker;
use super::acks::Stopped;
use super::aliases::Aliases;
use super::auth::{self, Again, Looked};
use super::clients::Connected;
use super::handshake::{self, Opened};
use super::inbound::{Inbound, Next};
use super::metrics::{Part, RECEIVED, SENT};
use super::outbound::Peer;
use super::session::Session;
use super::will::Will;
use super::wire::{self, Fault, Packet};
use crate::listeners::permits::{FREE_BYTES, Permit, TooSlow};
use crate::listeners::transport::{self, Place, Remote, closing};
use crate::threads::{SHORT_TURN, offer_core};

/// Most bytes of one read.
const READ_BYTES_MAX: usize = 64 << 10;
/// Bytes that are read ahead for PINGREQ while earlier input waits.
const STALLED_READ_BYTES_MAX: usize = 16 << 10;
/// Deliveries are added to the write buffer up to this size.
const WRITE_BYTES_MAX: usize = 64 << 10;
/// Size of the write buffer up to which deliveries are added when the memory of all connections is used
/// up.
const WRITE_BYTES_LEAST: usize = 4 << 10;
/// Unwritten bytes at which the client's socket is no longer read, because the client does not read
/// either.
const WRITE_PAUSE_BYTES: usize = 256 << 10;
/// Duration of the timer if there is no keep alive.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3_600);

thread_local! {
    /// Data of this thread's last read. It is taken before the next await.
    static READ: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BYTES_MAX].into());
}

struct Connection<'b, S> {
    broker: &'b Arc<Broker>,
    io: S,
    remote: Arc<Remote>,
    session: Arc<Session>,
    peer: Peer,
    /// Re-authentication, if CONNECT named an authentication method.
    auth: Option<Box<Again>>,
    aliases: Aliases,
    inbound: Inbound,
    /// The SUBSCRIBE or UNSUBSCRIBE that is being processed.
    changing: Option<Box<Changing>>,
    /// The will of the client.
    will: Option<Box<Will>>,
    is_bridge: bool,
    is_id_assigned: bool,
    tells_reasons: bool,
    /// The renewal of the client's rights, while one is under way.
    renewing: Option<Box<Renewing>>,
    /// An incomplete packet, or input that waits for room.
    input: BytesMut,
    stopped_at: Next,
    /// Permit for the large incomplete packet at the front of the input.
    partial: Option<Box<Permit>>,
    out: BytesMut,
    /// Number of bytes at the front of `out` that are counted in the metrics.
    counted: usize,
    acks_waiting: Part<'b>,
    last_read: Instant,
    /// Keep alive of the client in seconds, if it has one.
    keep_alive_s: Option<u16>,
    /// What deliveries wait for.
    outward: Option<Box<Outward>>,
    /// The host stops, or the listener's address is closed: nothing more is read, waiting acks may go out until the timer fires.
    drains: bool,
    /// The client has left. What it sent before is still taken in.
    has_left: bool,
    /// Its client has come back by another one.
    last: Option<Box<LastReads>>,
}

enum Io {
    Read(usize),
    Wrote(usize),
    Lost,
}

/// Serves one client from CONNECT to its end. The size of this future is the memory of a connection:
/// everything but the idle state is boxed, so that it takes memory only while it is used. `place` counts
/// for `connections_max`; a pending will holds none.
pub async fn serve<S>(broker: Arc<Broker>, io: S, remote: Remote, mut place: Place)
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let Some((mut connection, leaving)) = Box::pin(open(&broker, io, Arc::new(remote), &mut place)).await
    else {
        return;
    };
    let end = connection.run().await;
    Box::pin(connection.leave(end, place, leaving)).await;
}

/// Handles CONNECT, and makes durable what its CONNACK promises. Returns `None` if the client is
/// refused, which is reported.
async fn open<'b, S>(
    broker: &'b Arc<Broker>,
    mut io: S,
    remote: Arc<Remote>,
    place: &mut Place,
) -> Option<(Connection<'b, S>, Leaving)>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let mut input = BytesMut::new();
    let accepted = timeout(
        broker.config().connect_timeout.0,
        handshake::accept(broker, &mut io, &mut input, &remote, place),
    );
    let accepted = tokio::select! {
        accepted = accepted => accepted,
        () = place.gives_way() => {
            transport::gave_way(&**broker, &remote);
            return None;
        }
        () = broker.shutdown.cancelled() => return None,
        () = remote.closing.closed() => return None,
    };
    let opened = match accepted {
        Ok(Ok(opened)) => opened,
        Ok(Err(refused)) => {
            refused.report(broker, &remote.address);
            place.handshake_ended();
            if let Some((version, mut answer)) = refused.answer() {
                broker.counters.sending(version, &answer);
                let sent = closing::say_last(&mut io, &mut answer).await;
                broker.counters.bytes[SENT].increment(sent as u64);
                linger(broker, &mut io).await;
            }
            return None;
        }
        Err(_) => {
            broker.counters.refused_connect("timeout");
            return None;
        }
    };
    place.handshake_ended();
    let Opened { session, turn, peer, aliases, keep_alive_s, rights, user_place, will, auth, answer, .. } =
        opened;
    let config = opened.config;
    tracing::debug!(client = &*session.client_id, %remote, version = ?peer.version, "client connected");
    broker.client_connected(1);
    session.connected(Connected {
        version: peer.version,
        remote: remote.clone(),
        user: rights.identity.name.clone(),
        since_us: super::now_us(),
        keep_alive_s,
    });
    broker.live.resume(&session);
    let connection = Connection {
        broker,
        io,
        session: session.clone(),
        peer,
        aliases,
        auth: auth.map(|(method, username)| Box::new(Again::new(method, username, remote.clone()))),
        remote,
        inbound: Inbound::new(broker, (peer.version, config), session, rights, opened.tells_reasons),
        changing: None,
        will: will.map(Box::new),
        is_bridge: opened.is_bridge,
        is_id_assigned: opened.assigned,
        renewing: None,
        tells_reasons: opened.tells_reasons,
        input,
        stopped_at: Next::Bytes,
        partial: None,
        out: answer,
        counted: 0,
        acks_waiting: Part::of(&broker.counters.acks_waiting),
        last_read: Instant::now(),
        keep_alive_s: Some(keep_alive_s).filter(|s| *s > 0),
        outward: None,
        drains: false,
        has_left: false,
        last: None,
    };
    Some((connection, Leaving { turn, user_place }))
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<'_, S> {
    async fn run(&mut self) -> End {
        // Cancelled before this session could be told.
        if self.broker.shutdown.is_cancelled() {
            self.session.wake.notify_one();
        }
        let mut timer = Box::pin(tokio::time::sleep(self.keep_alive().unwrap_or(FOREVER)));
        loop {
            if let Err(end) = self.work().await {
                return end;
            }
            if let Some(end) = self.has_ended() {
                return end;
            }
            // Whatever wakes it again and again, the others on this thread have their turn.
            consume_budget().await;
            // What an event carries is not kept over the next wait.
            let has_more = {
                let event = self.next_event(timer.as_mut()).await;
                let has_more = matches!(event, Event::Io(Io::Read(READ_BYTES_MAX)));
                if let Err(end) = self.happened(event, timer.as_mut()) {
                    return end;
                }
                has_more
            };
            if has_more {
                // It is the turn of others.
                yield_now().await;
            }
        }
    }

    fn happened(&mut self, event: Event, timer: Pin<&mut Sleep>) -> Result<(), End> {
        match event {
            Event::Io(Io::Read(len)) => {
                self.last_read = Instant::now();
                self.session.activity().read(self.last_read.into_std());
                self.broker.counters.bytes[RECEIVED].increment(len as u64);
                if let Some(partial) = &mut self.partial {
                    partial.add(len);
                }
                READ.with_borrow(|read| self.take_fresh(&read[..len]))
            }
            Event::Io(Io::Wrote(len)) => {
                self.wrote(len);
                Ok(())
            }
            Event::Paid => Ok(()),
            Event::Answered => {
                self.inbound.go_on();
                Ok(())
            }
            Event::Changed(answer) => self.changed(answer),
            Event::Renewed(renewed) => self.renewed(renewed),
            Event::Io(Io::Lost) if self.waits_briefly() => {
                self.has_left = true;
                Ok(())
            }
            Event::Io(Io::Lost) => Err(End::Lost),
            Event::Partial(Ok(())) => {
                // From now on it may send.
                self.last_read = Instant::now();
                Ok(())
            }
            Event::Partial(Err(TooSlow)) => Err(End::Fault(Fault {
                code: DisconnectReasonCode::QuotaExceeded,
                what: "a large packet that comes too slowly while others wait for its room",
            })),
            Event::Durable(moved) => moved.map_err(|_| End::Stopped),
            Event::Writable => self.inbound.retry(self.broker).map_err(End::from),
            Event::Outward(moved) => self.moved(moved),
            Event::Looked(looked) => {
                let Some(again) = &mut self.auth else { return Ok(()) };
                let (inbound, will, out) = (&mut self.inbound, &mut self.will, &mut self.out);
                let max = self.peer.packet_bytes_max;
                again.looked(self.broker, *looked, inbound, will, max, out).map_err(End::from)
            }
            Event::AuthDeadline => {
                let why = auth::over(self.auth.as_deref(), self.inbound.rights());
                Err(End::Fault(auth::failed(self.broker, &self.session.client_id, why)))
            }
            // Whether it is called is looked at before the next event.
            Event::Wake => Ok(()),
            Event::Called => self.called(timer),
            Event::Timer => self.timer_fired(timer),
        }
    }

    /// Does everything that can be done without waiting.
    async fn work(&mut self) -> Result<(), End> {
        self.keep_up()?;
        if self.changing.is_some() {
            self.inbound.hold(!self.answers_first());
        }
        loop {
            while !self.input.is_empty() && !self.drains {
                let (used, next) =
                    self.inbound.take(self.broker, &self.input, &mut self.out).map_err(|trouble| {
                        End::of(trouble, &self.input, self.inbound.config().packet_bytes_max())
                    })?;
                self.input.advance(used);
                self.stopped_at = next;
                match self.stopped_at {
                    Next::Packet => {
                        Box::pin(self.packet()).await?;
                        // A read may be full of them.
                        consume_budget().await;
                    }
                    Next::Turn => {
                        offer_core(SHORT_TURN);
                        yield_now().await;
                    }
                    Next::Bytes | Next::Room => break,
                }
            }
            // The acknowledgements that go out now may be what the rest of the input waits for.
            let waits = self.stopped_at == Next::Room && self.inbound.waits_for_acks();
            self.inbound.write_acks(self.broker, &mut self.out);
            if !waits || self.drains || self.inbound.waits_for_acks() {
                break;
            }
            consume_budget().await;
        }
        if self.input.is_empty() {
            self.stopped_at = Next::Bytes;
            self.input = BytesMut::new();
        }
        let awaited = if self.stopped_at == Next::Bytes { wire::packet_len(&self.input) } else { None };
        Permit::set(&mut self.partial, awaited, &self.broker.incoming_permits);
        self.deliver();
        self.broker.counters.sending(self.peer.version, &self.out[self.counted..]);
        self.counted = self.out.len();
        self.acks_waiting.set(self.inbound.acks_waiting());
        self.count_memory();
        Ok(())
    }

    /// Returns whether the waiting input will be processed soon.
    fn waits_briefly(&self) -> bool {
        let waits_for_acks = self.stopped_at == Next::Room && self.inbound.waits_for_acks();
        let is_held = self.answers_first() || self.renewing.is_some();
        waits_for_acks || is_held || self.inbound.is_asking()
    }

    /// Returns whether deliveries wait for a SUBACK, as most clients expect. They do not wait while the
    /// broker's stream has no room for the change, which may take hours.
    fn answers_first(&self) -> bool {
        self.changing.is_some() && !self.session.outbox().is_note_refused()
    }

    /// Counts the memory of the buffers. An incomplete packet has a budget of its own.
    fn count_memory(&mut self) {
        let input = if self.partial.is_none() { self.input.capacity() } else { 0 };
        self.inbound.memory.set_buffers(input + self.out.capacity());
    }

    /// Processes bytes in the read buffer, and copies only the rest into the input.
    fn take_fresh(&mut self, fresh: &[u8]) -> Result<(), End> {
        self.keep_up()?;
        let mut used = 0;
        if self.input.is_empty() {
            (used, self.stopped_at) = self
                .inbound
                .take(self.broker, fresh, &mut self.out)
                .map_err(|trouble| End::of(trouble, fresh, self.inbound.config().packet_bytes_max()))?;
        }
        self.input.extend_from_slice(&fresh[used..]);
        Ok(())
    }

    fn wrote(&mut self, len: usize) {
        self.counted -= len;
        self.outward.iter_mut().for_each(|outward| outward.wrote(len));
        self.broker.counters.bytes[SENT].increment(len as u64);
        if self.out.len() + len >= WRITE_PAUSE_BYTES {
            // It is not read meanwhile, and shows by what it takes that it is there.
            self.last_read = Instant::now();
        }
    }

    async fn next_event(&mut self, timer: Pin<&mut Sleep>) -> Event {
        // Looked at first: a socket that always has something comes first below.
        if self.is_called() {
            return Box::pin(self.last_event()).await;
        }
        let read_max = if self.out.len() < WRITE_PAUSE_BYTES { self.read_max() } else { 0 };
        let (io, out) = (&mut self.io, &mut self.out);
        let stalled = self.inbound.is_stalled();
        let pause = (self.stopped_at == Next::Room).then(|| self.inbound.pause()).flatten();
        let pause = pause.map(|pause| Box::pin(tokio::time::sleep(pause)));
        let paid = async {
            match pause {
                Some(pause) => pause.await,
                None => pending().await,
            }
        };
        let auth_until = auth::deadline(self.auth.as_deref(), self.inbound.rights());
        if auth_until.is_some_and(|until| until <= Instant::now()) {
            return Event::AuthDeadline;
        }
        let auth_until = auth_until.map(|until| Box::pin(sleep_until(until)));
        let auth_over = async {
            match auth_until {
                Some(until) => until.await,
                None => pending().await,
            }
        };
        let (acks, writable, answered) = self.inbound.waits(self.broker);
        tokio::select! {
            biased;
            () = answered => Event::Answered,
            event = held(self.changing.as_deref_mut(), self.renewing.as_deref_mut()) => event,
            looked = auth::look(self.auth.as_deref_mut()) => Event::Looked(Box::new(looked)),
            event = poll_fn(|cx| poll_io(io, out, read_max, cx)), if !self.has_left => Event::Io(event),
            moved = acks.moved() => Event::Durable(moved),
            () = writable, if stalled => Event::Writable,
            progress = Permit::changed(self.partial.as_deref_mut()) => Event::Partial(progress),
            () = paid => Event::Paid,
            moved = outward(self.broker, &mut self.outward) => Event::Outward(moved),
            () = auth_over => Event::AuthDeadline,
            () = self.session.wake.notified() => Event::Wake,
            () = timer => Event::Timer,
        }
    }

    fn read_max(&self) -> usize {
        let read = !self.drains && self.has_room();
        let room = &self.broker.incoming_permits;
        let is_scarce = room.is_wanted() || !self.inbound.memory.has_room(READ_BYTES_MAX);
        match (read, is_scarce && self.partial.is_none()) {
            (false, _) => 0,
            (true, false) => READ_BYTES_MAX,
            (true, true) => FREE_BYTES,
        }
    }

    /// Whether [`Self::called`] has something to say.
    fn is_called(&self) -> bool {
        self.session.kicked.load(Ordering::Acquire)
            || self.session.is_wanted()
            || self.session.overflow.load(Ordering::Acquire)
            || !self.drains && self.is_to_drain()
    }

    /// Returns whether the host stops, or the listener's address is closed.
    fn is_to_drain(&self) -> bool {
        self.remote.closing.is_closed() || self.broker.shutdown.is_cancelled()
    }

    /// Returns the end of a connection that has drained.
    fn drained(&self) -> End {
        if self.broker.shutdown.is_cancelled() { End::Shutdown } else { End::ListenerClosed }
    }

    fn called(&mut self, mut timer: Pin<&mut Sleep>) -> Result<(), End> {
        if self.session.kicked.load(Ordering::Acquire) {
            return Err(End::Kicked);
        }
        if self.session.is_wanted() {
            return Err(if self.has_left { End::Lost } else { End::TakenOver });
        }
        if self.session.overflow.load(Ordering::Acquire) {
            return Err(End::Slow);
        }
        if !self.drains && self.is_to_drain() {
            let until = Instant::now() + self.broker.config().drain_timeout.0;
            self.drains = true;
            self.inbound.drain();
            timer.as_mut().reset(until);
        }
        Ok(())
    }

    /// Returns the longest silence of the client: 1.5 times its interval (MQTT 5.0, 3.1.2.10).
    fn keep_alive(&self) -> Option<Duration> {
        self.keep_alive_s.map(|s| Duration::from_millis(u64::from(s) * 1_500))
    }

    /// Checks keep alive, which does not apply while the client's socket is not read.
    fn timer_fired(&mut self, mut timer: Pin<&mut Sleep>) -> Result<(), End> {
        if self.drains {
            return Err(self.drained());
        }
        let Some(keep_alive) = self.keep_alive() else {
            timer.as_mut().reset(Instant::now() + FOREVER);
            return Ok(());
        };
        let due = self.last_read + keep_alive;
        let now = Instant::now();
        if due <= now && self.has_room() {
            return Err(End::KeepAlive);
        }
        timer.as_mut().reset(due.max(now + Duration::from_millis(100)));
        Ok(())
    }

    /// Returns whether there is room for the client's input.
    fn has_room(&self) -> bool {
        let is_full = self.stopped_at == Next::Room && self.input.len() >= STALLED_READ_BYTES_MAX;
        !is_full && self.partial.as_ref().is_none_or(|permit| permit.is_given())
    }

    fn has_ended(&self) -> Option<End> {
        if self.has_left && !self.waits_briefly() {
            return Some(End::Lost);
        }
        let is_waiting = self.inbound.is_waiting() || self.changing.is_some();
        let drained = self.drains && !is_waiting && self.out.is_empty();
        drained.then(|| self.drained())
    }
}

enum Event {
    Io(Io),
    /// A permit for a large packet was given, or the client makes too little progress.
    Partial(Result<(), TooSlow>),
    Durable(Result<(), super::acks::Stopped>),
    Writable,
    Outward(Moved),
    /// The client may publish again after it exceeded its rate.
    Paid,
    /// The access plugin has answered.
    Answered,
    /// A SUBSCRIBE or UNSUBSCRIBE is complete.
    Changed(Result<Box<Packet>, Stopped>),
    /// The client's rights are renewed after a reload.
    Renewed(Renewed),
    /// The check of the client's re-authentication is complete.
    Looked(Box<Looked>),
    AuthDeadline,
    /// Deliveries may wait, or the connection is called.
    Wake,
    /// The connection is to end, and nothing is left to be read before it does.
    Called,
    Timer,
}

/// Writes what there is, and reads at most `read_max` into the thread's buffer. What came from a peer that takes
/// nothing more is read first: it may have said goodbye before it closed its socket.
fn poll_io<S: AsyncRead + AsyncWrite + Unpin>(
    io: &mut S,
    out: &mut BytesMut,
    read_max: usize,
    cx: &mut std::task::Context<'_>,
) -> Poll<Io> {
    let mut is_closed = false;
    if !out.is_empty() {
        match Pin::new(&mut *io).poll_write(cx, out) {
            Poll::Ready(Ok(len @ 1..)) => {
                out.advance(len);
                if out.is_empty() {
                    *out = BytesMut::new();
                }
                return Poll::Ready(Io::Wrote(len));
            }
            Poll::Ready(_) => is_closed = true,
            Poll::Pending => {}
        }
    }
    // TLS keeps records of its own until the socket takes them.
    is_closed |= matches!(Pin::new(&mut *io).poll_flush(cx), Poll::Ready(Err(_)));
    let read = if read_max == 0 { Poll::Pending } else { poll_read(io, read_max, cx) };
    if is_closed && read.is_pending() { Poll::Ready(Io::Lost) } else { read }
}

fn poll_read<S: AsyncRead + Unpin>(io: &mut S, read_max: usize, cx: &mut std::task::Context<'_>) -> Poll<Io> {
    READ.with_borrow_mut(|buffer| {
        let mut buffer = ReadBuf::new(&mut buffer[..read_max]);
        match Pin::new(io).poll_read(cx, &mut buffer) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Ok(())) if !buffer.filled().is_empty() => {
                Poll::Ready(Io::Read(buffer.filled().len()))
            }
            Poll::Ready(_) => Poll::Ready(Io::Lost),
        }
    })
}
