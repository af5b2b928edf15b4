//! One connection, one task: read, append, acknowledge, deliver, until it ends.
//!
//! Idle it holds no buffer: reads go into a buffer of the thread, and only a
//! packet that is not whole is kept. There is one timer, for keep alive, and it
//! is not touched by traffic.

use std::cell::RefCell;
use std::future::{pending, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use rmqtt_codec::v5::{
    DisconnectReasonCode, RetainHandling, SubscribeAck, SubscribeAckReason, SubscriptionOptions,
    UnsubscribeAck, UnsubscribeAckReason,
};
use rmqtt_codec::{v3, v5};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until, timeout};
use tokio_util::codec::Encoder;

use super::Broker;
use super::auth::{self, Again};
use super::clients;
use super::fanout::SendRetained;
use super::handshake::{self, Opened};
use super::inbound::{Inbound, Next, Trouble};
use super::outbound::{Loaded, Loader, Peer, Waits};
use super::session::{Change, KEPT_FILTER_BYTES_MAX, Session, subscription_key};
use super::subscriptions::{FILTER_LEVELS_MAX, Filter, Options};
use super::transport::{Place, Remote};
use super::will;
use super::wire::{self, Fault, Packet, Version};
use crate::stream::Ticket;

/// One read takes at most this much.
const READ_BYTES_MAX: usize = 64 << 10;
/// While a stream has no room, this much is read on, for PINGREQ.
const STALLED_READ_BYTES_MAX: usize = 16 << 10;
/// Deliveries are added to the write buffer up to this size.
const WRITE_BYTES_MAX: usize = 64 << 10;
/// With this much unwritten the client is not read: it does not read us.
const WRITE_PAUSE_BYTES: usize = 256 << 10;
/// For the last packet, when the connection ends.
const LAST_WRITE_MAX: Duration = Duration::from_secs(1);
/// Where there is no keep alive the timer sleeps so long.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3_600);

thread_local! {
    /// What the last read of this thread gave. Taken out before the next await.
    static READ: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BYTES_MAX].into());
}

struct Connection<'b, S> {
    broker: &'b Broker,
    io: S,
    session: Arc<Session>,
    peer: Peer,
    /// Where CONNECT named an authentication method.
    auth: Option<Again<'b>>,
    inbound: Inbound,
    /// A packet that is not whole, or what waits for room.
    input: BytesMut,
    stopped_at: Next,
    out: BytesMut,
    last_read: Instant,
    keep_alive: Option<Duration>,
    /// What keeps deliveries back.
    outward: Option<Box<Outward>>,
    /// The host stops: nothing more is read, waiting acks may go out until then.
    drain_until: Option<Instant>,
}

/// Why a connection ended.
#[derive(Debug)]
enum End {
    Disconnect { keep_will: bool, expiry_s: Option<u32> },
    Lost,
    Fault(Fault),
    TakenOver,
    KeepAlive,
    Slow,
    Kicked,
    Stopped,
    Shutdown,
}

enum Io {
    Read(usize),
    Wrote,
    Lost,
}

impl From<Trouble> for End {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Fault(fault) => Self::Fault(fault),
            Trouble::Stopped => Self::Stopped,
        }
    }
}

/// Serves one client from CONNECT to its end.
/// `place`: of `connections_max`; a will that waits holds none.
pub async fn serve<S>(broker: Arc<Broker>, mut io: S, remote: Remote, mut place: Place)
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let mut input = BytesMut::new();
    let accepted =
        timeout(broker.config.connect_timeout.0, handshake::accept(&broker, &mut io, &mut input, &remote));
    let accepted = tokio::select! {
        accepted = accepted => accepted,
        () = broker.shutdown.cancelled() => return,
    };
    let opened = match accepted {
        Ok(Ok(opened)) => opened,
        Ok(Err(refused)) => {
            broker.counters.refused_connect(refused.cause);
            if refused.cause != "lost" {
                broker.failures.report(
                    &format!("mqtt: connect refused: {}", refused.cause),
                    1,
                    &refused.detail,
                    "",
                );
            }
            return;
        }
        Err(_) => {
            broker.counters.refused_connect("timeout");
            return;
        }
    };
    place.handshake_ended();
    let Opened { session, turn, peer, keep_alive_s, rights, user_place, will, auth, answer } = opened;
    broker.client_connected(1);
    session.connected(clients::Connection {
        version: clients::Connection::version_text(peer.version).into(),
        address: remote.address.to_string(),
        user: rights.identity.name.as_deref().map(Into::into),
        since_us: super::now_us(),
        keep_alive_s,
    });
    let mut connection = Connection {
        broker: &broker,
        io,
        session: session.clone(),
        peer,
        auth: auth.map(|(method, username)| Again { method, username, remote: &remote, running: None }),
        inbound: Inbound::new(&broker, peer.version, session.clone(), rights),
        input,
        stopped_at: Next::Bytes,
        out: answer,
        last_read: Instant::now(),
        keep_alive: (keep_alive_s > 0).then(|| Duration::from_millis(u64::from(keep_alive_s) * 1_500)),
        outward: None,
        drain_until: None,
    };
    session.outbox().resume();
    let end = connection.run().await;
    connection.say_goodbye(&end, &remote).await;
    drop(connection);
    let expiry_s = if let End::Disconnect { expiry_s, .. } = end { expiry_s } else { None };
    let keep_will = !matches!(end, End::Disconnect { keep_will: false, .. });
    let (connects, epoch) = (session.connects.load(Ordering::Acquire), session.epoch());
    drop(user_place);
    broker.sessions.close(&broker, &session, turn, expiry_s);
    broker.client_connected(-1);
    drop(place);
    match will {
        Some(will) if keep_will => will::lost(&broker, &session, connects, epoch, will).await,
        Some(will) => will.forget(&broker),
        None => {}
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<'_, S> {
    async fn run(&mut self) -> End {
        // Cancelled before this session could be told.
        if self.broker.shutdown.is_cancelled() {
            self.session.wake.notify_one();
        }
        let mut timer = Box::pin(tokio::time::sleep(self.keep_alive.unwrap_or(FOREVER)));
        loop {
            if let Err(end) = self.work().await {
                return end;
            }
            if let Some(end) = self.has_ended() {
                return end;
            }
            let event = self.next_event(timer.as_mut()).await;
            let done = match event {
                Event::Io(Io::Read(len)) => {
                    self.last_read = Instant::now();
                    READ.with_borrow(|read| self.take_fresh(&read[..len]))
                }
                Event::Io(Io::Wrote) | Event::Paid => Ok(()),
                Event::Io(Io::Lost) => Err(End::Lost),
                Event::Durable(moved) => moved.map_err(|_| End::Stopped),
                Event::Writable => self.inbound.retry(self.broker).map_err(End::from),
                Event::Outward(moved) => self.moved(moved),
                Event::AuthDeadline => Err(End::Fault(auth::failed(self.broker, &self.session.client_id))),
                Event::Wake => self.woken(timer.as_mut()),
                Event::Timer => self.timer_fired(timer.as_mut()),
            };
            if let Err(end) = done {
                return end;
            }
        }
    }

    /// Everything that can be done without waiting (but for SUBSCRIBE, which
    /// waits until a persistent session's subscription is durable).
    async fn work(&mut self) -> Result<(), End> {
        while !self.input.is_empty() && self.drain_until.is_none() {
            let (used, next) = self.inbound.take(self.broker, &self.input, &mut self.out)?;
            self.input.advance(used);
            self.stopped_at = next;
            if self.stopped_at != Next::Packet {
                break;
            }
            self.packet().await?;
        }
        if self.input.is_empty() {
            self.stopped_at = Next::Bytes;
            self.input = BytesMut::new();
        }
        self.inbound.write_acks(self.broker, &mut self.out);
        if self.out.len() < WRITE_BYTES_MAX && self.drain_until.is_none() {
            let broker = self.broker;
            let mut outbox = self.session.outbox();
            outbox.settle(&*broker.broker);
            let filled = outbox.fill(self.peer, WRITE_BYTES_MAX, &mut self.out);
            let positions = || broker.live.positions(&broker.streams);
            outbox.record(&*broker.broker, positions, broker.note_bytes_max());
            let waits = outbox.waits(self.peer);
            drop(outbox);
            Outward::set(&mut self.outward, waits);
            let counters = &self.broker.counters;
            for (counter, count) in [
                (&counters.deliveries, filled.sent),
                (&counters.expired, filled.expired),
                (&counters.packet_too_large, filled.too_large),
            ] {
                if count > 0 {
                    counter.increment(count);
                }
            }
        }
        Ok(())
    }

    /// Bytes straight from the read buffer: only what is left over is copied.
    fn take_fresh(&mut self, fresh: &[u8]) -> Result<(), End> {
        let mut used = 0;
        if self.input.is_empty() {
            (used, self.stopped_at) = self.inbound.take(self.broker, fresh, &mut self.out)?;
        }
        self.input.extend_from_slice(&fresh[used..]);
        Ok(())
    }

    async fn next_event(&mut self, timer: Pin<&mut Sleep>) -> Event {
        let input_max = if self.stopped_at == Next::Room { STALLED_READ_BYTES_MAX } else { usize::MAX };
        let read =
            self.drain_until.is_none() && self.out.len() < WRITE_PAUSE_BYTES && self.input.len() < input_max;
        let (io, out) = (&mut self.io, &mut self.out);
        let stalled = self.inbound.is_stalled();
        let pause = (self.stopped_at == Next::Room).then(|| self.inbound.pause(self.broker)).flatten();
        let auth_until = self.auth.as_ref().and_then(Again::deadline);
        let (acks, writable) = self.inbound.waits(self.broker);
        tokio::select! {
            biased;
            event = poll_fn(|cx| poll_io(io, out, read, cx)) => Event::Io(event),
            moved = acks.moved() => Event::Durable(moved),
            () = writable, if stalled => Event::Writable,
            () = tokio::time::sleep(pause.unwrap_or_default()), if pause.is_some() => Event::Paid,
            moved = outward(self.broker, &mut self.outward) => Event::Outward(moved),
            () = sleep_until(auth_until.unwrap_or_else(Instant::now)), if auth_until.is_some() => Event::AuthDeadline,
            () = self.session.wake.notified() => Event::Wake,
            () = timer => Event::Timer,
        }
    }

    /// Deliveries may go on.
    fn moved(&mut self, moved: Moved) -> Result<(), End> {
        match moved {
            Moved::Again => {}
            Moved::Loaded(loaded) => {
                self.outward = None;
                let policy = &self.inbound.rights().policy;
                let may_see = |topic: &str| {
                    policy.is_everything()
                        || Filter::parse(topic).is_some_and(|it| policy.may_subscribe(it.topics()))
                };
                let gone = self.session.outbox().loaded(&loaded, may_see);
                if gone > 0 {
                    self.broker.counters.gap.increment(gone);
                    let detail = format!("client {}", self.session.client_id);
                    let kind = "mqtt: messages went from their stream before their subscriber came";
                    self.broker.failures.report(kind, gone, &detail, "");
                }
            }
            Moved::Stopped => return Err(End::Stopped),
        }
        Ok(())
    }

    fn woken(&mut self, mut timer: Pin<&mut Sleep>) -> Result<(), End> {
        if self.session.is_wanted() {
            return Err(End::TakenOver);
        }
        if self.session.overflow.load(Ordering::Acquire) {
            return Err(End::Slow);
        }
        if self.session.kicked.load(Ordering::Acquire) {
            return Err(End::Kicked);
        }
        if self.broker.shutdown.is_cancelled() && self.drain_until.is_none() {
            let until = Instant::now() + self.broker.config.drain_timeout.0;
            self.drain_until = Some(until);
            timer.as_mut().reset(until);
        }
        Ok(())
    }

    /// Keep alive is 1.5 times what the client said (MQTT 5.0, 3.1.2.10). A
    /// client that we do not read is not held to it.
    fn timer_fired(&mut self, mut timer: Pin<&mut Sleep>) -> Result<(), End> {
        if self.drain_until.is_some() {
            return Err(End::Shutdown);
        }
        let Some(keep_alive) = self.keep_alive else {
            timer.as_mut().reset(Instant::now() + FOREVER);
            return Ok(());
        };
        let due = self.last_read + keep_alive;
        let now = Instant::now();
        if due <= now && self.stopped_at != Next::Room {
            return Err(End::KeepAlive);
        }
        timer.as_mut().reset(due.max(now + Duration::from_millis(100)));
        Ok(())
    }

    fn has_ended(&self) -> Option<End> {
        let drained = self.drain_until.is_some() && !self.inbound.is_waiting() && self.out.is_empty();
        drained.then_some(End::Shutdown)
    }

    /// The packets that are not on the hot path.
    async fn packet(&mut self) -> Result<(), End> {
        let frame = wire::frame(&self.input, self.broker.packet_bytes_max).map_err(End::Fault)?;
        let len = frame.expect("take stopped at a whole packet").len;
        let whole = self.input.split_to(len);
        let packet = wire::decode(self.peer.version, &whole).map_err(End::Fault)?;
        match packet {
            Packet::V3(v3::Packet::Subscribe { packet_id, topic_filters }) => {
                let filters = topic_filters.iter().map(|(filter, qos)| {
                    (&**filter, SubscriptionOptions { qos: *qos, ..SubscriptionOptions::default() })
                });
                let status = self.subscribe(filters, 0).await?;
                let status = status.into_iter().map(|reason| match u8::from(reason) {
                    qos @ 0..=2 => v3::SubscribeReturnCode::Success(
                        v3::QoS::try_from(qos).expect("0, 1 and 2 are QoS levels"),
                    ),
                    _ => v3::SubscribeReturnCode::Failure,
                });
                self.send_v3(v3::Packet::SubscribeAck { packet_id, status: status.collect() })
            }
            Packet::V5(v5::Packet::Subscribe(subscribe)) => {
                let id = subscribe.id.map_or(0, |id| id.get());
                let filters = subscribe.topic_filters.iter().map(|(filter, options)| (&**filter, *options));
                let status = self.subscribe(filters, id).await?;
                self.send_v5(v5::Packet::SubscribeAck(SubscribeAck {
                    packet_id: subscribe.packet_id,
                    properties: Vec::new(),
                    reason_string: None,
                    status,
                }))
            }
            Packet::V3(v3::Packet::Unsubscribe { packet_id, topic_filters }) => {
                self.unsubscribe(topic_filters.iter().map(|filter| &**filter)).await?;
                self.send_v3(v3::Packet::UnsubscribeAck { packet_id })
            }
            Packet::V5(v5::Packet::Unsubscribe(unsubscribe)) => {
                let status =
                    self.unsubscribe(unsubscribe.topic_filters.iter().map(|filter| &**filter)).await?;
                self.send_v5(v5::Packet::UnsubscribeAck(UnsubscribeAck {
                    packet_id: unsubscribe.packet_id,
                    properties: Vec::new(),
                    reason_string: None,
                    status,
                }))
            }
            Packet::V3(v3::Packet::Disconnect) => Err(End::Disconnect { keep_will: false, expiry_s: None }),
            Packet::V5(v5::Packet::Disconnect(disconnect)) => {
                let max =
                    u32::try_from(self.broker.config.session_expiry_max.0.as_secs()).unwrap_or(u32::MAX);
                let expiry_s = disconnect.session_expiry_interval_secs.map(|seconds| seconds.min(max));
                if expiry_s.is_some_and(|seconds| seconds > 0) && self.session.expiry_s() == 0 {
                    return Err(End::Fault(Fault::protocol(
                        "DISCONNECT must not revive a session that ends",
                    )));
                }
                let keep_will = disconnect.reason_code != DisconnectReasonCode::NormalDisconnection;
                Err(End::Disconnect { keep_will, expiry_s })
            }
            Packet::V5(v5::Packet::Auth(packet)) => {
                let forbidden = Fault::protocol("AUTH without a method in CONNECT");
                let again = self.auth.as_mut().ok_or(End::Fault(forbidden))?;
                let max = self.peer.packet_bytes_max;
                let taken = again.take(self.broker, packet, &mut self.inbound, max, &mut self.out);
                taken.await.map_err(End::Fault)
            }
            _ => Err(End::Fault(Fault::protocol("a packet that a client must not send now"))),
        }
    }

    async fn subscribe(
        &mut self,
        filters: impl Iterator<Item = (&str, SubscriptionOptions)>,
        id: u32,
    ) -> Result<Vec<SubscribeAckReason>, End> {
        let epoch = self.session.persistent_epoch();
        let mut changes: Vec<Change> = Vec::new();
        let mut granted = Vec::new();
        let mut status = Vec::new();
        let mut new = 0;
        for (text, asked) in filters {
            let filter = match self.check_filter(text, epoch.is_some(), &mut new) {
                Ok(filter) => filter,
                Err(reason) => {
                    status.push(reason);
                    continue;
                }
            };
            if filter.is_shared() && asked.no_local {
                // MQTT 5.0, 3.8.3.1.
                return Err(End::Fault(Fault::protocol("no local on a shared subscription")));
            }
            let options = Options {
                qos: asked.qos.value(),
                no_local: asked.no_local,
                retain_as_published: asked.retain_as_published,
                id,
            };
            if let Some(epoch) = epoch {
                changes.push((subscription_key(epoch, text), Some(options.to_bytes().into())));
            }
            let retained = match asked.retain_handling {
                RetainHandling::AtSubscribe => SendRetained::Always,
                RetainHandling::AtSubscribeNew => SendRetained::IfNew,
                RetainHandling::NoAtSubscribe => SendRetained::Never,
            };
            granted.push((filter, options, retained));
            status.push(match options.qos {
                0 => SubscribeAckReason::GrantedQos0,
                1 => SubscribeAckReason::GrantedQos1,
                _ => SubscribeAckReason::GrantedQos2,
            });
        }
        for (filter, options, retained) in granted {
            self.broker.live.subscribe(self.broker, &self.session, &filter, options, retained);
        }
        self.keep(changes).await?;
        Ok(status)
    }

    /// Changed subscriptions of a persistent session are durable before they are
    /// acknowledged, and with them what they are not meant for: the past.
    async fn keep(&mut self, mut changes: Vec<Change>) -> Result<(), End> {
        if changes.is_empty() {
            return Ok(());
        }
        let broker = self.broker;
        let positions = broker.live.positions(&broker.streams);
        changes.extend(self.session.outbox().note(&positions, broker.note_bytes_max()));
        broker.append_durable(&*broker.broker, &changes).await.map_err(|_| End::Stopped)
    }

    /// `new`: filters of this SUBSCRIBE that the session did not have.
    fn check_filter(&self, text: &str, kept: bool, new: &mut usize) -> Result<Filter, SubscribeAckReason> {
        let deep = text.split('/').nth(FILTER_LEVELS_MAX).is_some();
        if deep || (kept && text.len() > KEPT_FILTER_BYTES_MAX) {
            return Err(SubscribeAckReason::TopicFilterInvalid);
        }
        let filter = Filter::parse(text).ok_or(SubscribeAckReason::TopicFilterInvalid)?;
        if !self.inbound.rights().policy.may_subscribe(filter.topics()) {
            self.broker.counters.refused_subscribe.increment(1);
            let detail = format!("client {}, filter {text}", self.session.client_id);
            self.broker.failures.report("mqtt: subscribe refused by the access rules", 1, &detail, "");
            return Err(SubscribeAckReason::NotAuthorized);
        }
        if !self.session.has_filter(text) {
            let max = self.broker.config.subscriptions_per_client_max as usize;
            if self.session.filters() + *new >= max {
                return Err(SubscribeAckReason::QuotaExceeded);
            }
            *new += 1;
        }
        Ok(filter)
    }

    async fn unsubscribe(
        &mut self,
        filters: impl Iterator<Item = &str>,
    ) -> Result<Vec<UnsubscribeAckReason>, End> {
        let epoch = self.session.persistent_epoch();
        let mut changes: Vec<Change> = Vec::new();
        let mut status = Vec::new();
        for filter in filters {
            let had = self.broker.live.unsubscribe(self.broker, &self.session, filter);
            if let (true, Some(epoch)) = (had, epoch) {
                changes.push((subscription_key(epoch, filter), None));
            }
            status.push(match had {
                true => UnsubscribeAckReason::Success,
                false => UnsubscribeAckReason::NoSubscriptionExisted,
            });
        }
        self.keep(changes).await?;
        Ok(status)
    }

    fn send_v3(&mut self, packet: v3::Packet) -> Result<(), End> {
        let encoded = v3::Codec::new(0).encode(packet, &mut self.out);
        encoded.map_err(|_| End::Fault(Fault::protocol("the answer would be too large")))
    }

    fn send_v5(&mut self, packet: v5::Packet) -> Result<(), End> {
        let before = self.out.len();
        let encoded = v5::Codec::new(0, 0).encode(packet, &mut self.out);
        encoded.map_err(|_| End::Fault(Fault::protocol("the answer would be too large")))?;
        if self.out.len() - before > self.peer.packet_bytes_max {
            self.out.truncate(before);
            let code = DisconnectReasonCode::PacketTooLarge;
            let what = "asks for an answer over its own maximum packet size";
            return Err(End::Fault(Fault { code, what }));
        }
        Ok(())
    }

    /// Counts, reports what a person may want to know, sends the last packet.
    async fn say_goodbye(&mut self, end: &End, remote: &Remote) {
        let (cause, code) = match end {
            End::Disconnect { .. } => ("client", None),
            End::Lost => ("lost", None),
            End::Fault(fault) if fault.is_refusal() => ("refused", Some(fault.code)),
            End::Fault(fault) => ("malformed", Some(fault.code)),
            End::TakenOver => ("taken_over", Some(DisconnectReasonCode::SessionTakenOver)),
            End::KeepAlive => ("keep_alive", Some(DisconnectReasonCode::KeepAliveTimeout)),
            End::Slow => ("slow", Some(DisconnectReasonCode::QuotaExceeded)),
            End::Kicked => ("kicked", Some(DisconnectReasonCode::AdministrativeAction)),
            End::Stopped => ("stopped", Some(DisconnectReasonCode::ServerShuttingDown)),
            End::Shutdown => ("shutdown", Some(DisconnectReasonCode::ServerShuttingDown)),
        };
        self.broker.counters.disconnected(cause);
        let client_id = &self.session.client_id;
        let failures = &self.broker.failures;
        match end {
            End::Fault(fault) if !fault.is_refusal() => {
                let kind = format!("mqtt: client broke the protocol: {}", fault.what);
                failures.report(&kind, 1, &format!("client {client_id} at {remote}"), "");
            }
            End::Slow => {
                let detail = format!("client {client_id} at {remote}: its queue is full");
                failures.report("mqtt: slow subscriber disconnected", 1, &detail, "");
            }
            _ => {}
        }
        self.inbound.write_acks(self.broker, &mut self.out);
        if let Some(code) = code
            && self.peer.version == Version::V5
        {
            wire::put_disconnect(&mut self.out, code);
        }
        if !matches!(end, End::Lost) {
            // The client may be gone, or not read: then it does not hear this.
            let _ = timeout(LAST_WRITE_MAX, async {
                self.io.write_all_buf(&mut self.out).await?;
                self.io.shutdown().await
            })
            .await;
        }
    }
}

enum Event {
    Io(Io),
    Durable(Result<(), super::acks::Stopped>),
    Writable,
    Outward(Moved),
    /// What the client sent too fast is paid for.
    Paid,
    AuthDeadline,
    Wake,
    Timer,
}

/// What an outbox waits for.
struct Outward {
    durable: Option<Ticket>,
    room: bool,
    loader: Option<Loader>,
}

enum Moved {
    Again,
    Loaded(Loaded),
    /// The broker stream or the messages' has stopped.
    Stopped,
}

impl Outward {
    /// A read that is under way goes on.
    fn set(outward: &mut Option<Box<Self>>, waits: Waits) {
        if waits.is_none() {
            *outward = None;
            return;
        }
        let Waits { durable, room, load } = waits;
        let under_way = outward.take().and_then(|outward| outward.loader);
        let loader = (!load.is_empty()).then(|| under_way.unwrap_or_else(|| Loader::new(load)));
        *outward = Some(Box::new(Self { durable, room, loader }));
    }
}

/// Pending where nothing is waited for. Safe to drop.
async fn outward(broker: &Broker, waiting: &mut Option<Box<Outward>>) -> Moved {
    let Some(waiting) = waiting else { return pending().await };
    let Outward { durable, room, loader } = &mut **waiting;
    let (durable, room) = (*durable, *room);
    // Boxed: a connection that waits for nothing does not carry it.
    Box::pin(async move {
        let durable = async {
            let Some(ticket) = durable else { return pending().await };
            match broker.broker.durable().wait_for(|durable| *durable >= ticket).await {
                Ok(_) => Moved::Again,
                Err(_) => Moved::Stopped,
            }
        };
        let load = async {
            let Some(loader) = loader else { return pending().await };
            loader.run(&broker.streams).await.map_or(Moved::Stopped, Moved::Loaded)
        };
        tokio::select! {
            biased;
            moved = durable => moved,
            moved = load => moved,
            () = broker.broker.writable(), if room => Moved::Again,
        }
    })
    .await
}

/// Writes what there is, and reads into the thread's buffer.
fn poll_io<S: AsyncRead + AsyncWrite + Unpin>(
    io: &mut S,
    out: &mut BytesMut,
    read: bool,
    cx: &mut std::task::Context<'_>,
) -> Poll<Io> {
    if !out.is_empty() {
        match Pin::new(&mut *io).poll_write(cx, out) {
            Poll::Ready(Ok(len @ 1..)) => {
                out.advance(len);
                if out.is_empty() {
                    *out = BytesMut::new();
                }
                return Poll::Ready(Io::Wrote);
            }
            Poll::Ready(_) => return Poll::Ready(Io::Lost),
            Poll::Pending => {}
        }
    }
    // TLS keeps records of its own until the socket takes them.
    if let Poll::Ready(Err(_)) = Pin::new(&mut *io).poll_flush(cx) {
        return Poll::Ready(Io::Lost);
    }
    if !read {
        return Poll::Pending;
    }
    READ.with_borrow_mut(|buffer| {
        let mut buffer = ReadBuf::new(buffer);
        match Pin::new(io).poll_read(cx, &mut buffer) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Ok(())) if !buffer.filled().is_empty() => {
                Poll::Ready(Io::Read(buffer.filled().len()))
            }
            Poll::Ready(_) => Poll::Ready(Io::Lost),
        }
    })
}
