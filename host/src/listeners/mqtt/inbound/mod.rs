//! From the socket into the streams, the hot path: all whole packets of one
//! read are decoded in place, each stream gets them in one append, and their
//! acks wait for its ticket ([`append`]). A message's bytes are copied once, by
//! the stream.
//!
//! A stream with no room stalls the connection: what it did not take is kept
//! ([`stalled`]), and nothing more is taken in but acks and PINGREQ ([`ahead`]).
//! So it is while a packet waits for an answer of the access plugin ([`allowed`]),
//! a QoS 2 publish for its packet id ([`withheld`]), or a SUBSCRIBE for its end.

mod ahead;
mod allowed;
mod append;
mod memory;
mod stalled;
mod withheld;

use std::cell::RefCell;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use rmqtt_codec::v5::DisconnectReasonCode;

use self::ahead::Ahead;
use self::allowed::Refusal;
use self::append::undo;
pub use self::append::{push_sender, taken_in};
use self::memory::Memory;
use self::stalled::{Stalled, room};
use self::withheld::Withheld;
use super::Broker;
use super::acks::{Ack, Acks};
use super::config::Config;
use super::metrics::Few;
use super::open_ids::{Content, Known, Received};
use super::session::Session;
use super::wire::{self, Fault, Frame, Property, Publish, Version};
use crate::access::{Access, Admitted, Allowance};
use crate::batch::flags;
use crate::hints::Hint;
use crate::ingest::{Place, facts};
use crate::properties::{PROPERTIES_BYTES_MAX, facts as names};
use crate::stream::{NewMessage, StateChange, Ticket};

/// Packets that are taken in on one turn, in which this thread serves nobody else:
/// so many, and more while they take no longer.
const TAKEN_LEAST: usize = 64;
const TAKEN_TIME: Duration = Duration::from_micros(100);
/// A client over its rate is looked at no more often.
const PAUSE_MIN: Duration = Duration::from_millis(5);

/// What a connection sends in.
pub struct Inbound {
    version: Version,
    /// The configuration when the client connected.
    config: Arc<Config>,
    session: Arc<Session>,
    rights: Admitted,
    /// The packet at the front waits for an answer to what it asks.
    asks: bool,
    /// A SUBSCRIBE or UNSUBSCRIBE is under way; whether PINGREQ is answered meanwhile.
    held: Option<bool>,
    /// The topic of the last publish that the rules allowed.
    allowed_topic: String,
    allowance: Option<Box<Allowance>>,
    /// Epoch of a session that outlives the connection: its QoS 2 ids are durable.
    epoch: Option<u64>,
    pub memory: Memory,
    acks: Acks,
    /// QoS 1 and 2 publishes that are not finished, for Receive Maximum.
    unfinished: u32,
    stalled: Vec<Stalled>,
    /// What the QoS 2 publish at the front waits for.
    withheld: Withheld,
    /// So far into the read buffer PUBRELs were taken in ahead of it.
    released_to: usize,
    ahead: Ahead,
}

/// What `take` stopped at.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// The rest is not a whole packet.
    Bytes,
    /// The packet at the front is not one of the hot path.
    Packet,
    /// It is the turn of others: the rest is taken in on the next.
    Turn,
    /// Acks must go out, a stream take what it refused, a question be
    /// answered, or a SUBSCRIBE be done, before more is taken in.
    Room,
}

#[derive(Debug)]
pub enum Trouble {
    Fault(Fault),
    /// A stream stopped: nothing more will be acknowledged.
    Stopped,
}

impl From<Fault> for Trouble {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

struct Decoded<'a> {
    topic: Topic<'a>,
    payload: &'a [u8],
    /// Into the scratch's properties.
    properties: Range<usize>,
    /// Within the topic; `None`: the client's own.
    device: Option<Range<usize>>,
    stream: usize,
    flags: u16,
}

/// What became of a publish.
enum Published<'a> {
    Taken,
    /// Nothing of it is taken in before there is an answer for its topic.
    Unanswered(Topic<'a>),
    /// Nothing of it is taken in before a release of its packet id is durable.
    Withheld,
}

enum Topic<'a> {
    Sent(&'a str),
    Alias(Arc<str>),
}

impl Topic<'_> {
    fn as_str(&self) -> &str {
        match self {
            Self::Sent(topic) => topic,
            Self::Alias(topic) => topic,
        }
    }
}

/// An ack to come, and what its append does to the packet ids in flight.
#[derive(Clone, Copy)]
struct Owed {
    stream: usize,
    packet_id: u16,
    /// `None` where only the packet id changes.
    ack: Option<Ack>,
    change: IdChange,
    /// Durable no earlier than this, whatever the append.
    least: Ticket,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum IdChange {
    None,
    /// Opens the id. `before` is what was known of it.
    Receive {
        content: Content,
        before: Option<Known>,
    },
    /// Releases the id, of which this was known.
    Release(Known),
}

/// Reused by all connections of a thread, so that an idle one holds nothing.
#[derive(Default)]
struct Scratch {
    decoded: Vec<Decoded<'static>>,
    owed: Vec<Owed>,
    properties: Vec<u8>,
    messages: Vec<NewMessage<'static>>,
    keys: Vec<([u8; 12], IdChange)>,
    changes: Vec<StateChange<'static>>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Inbound {
    /// `tells_reasons`: the client takes reason strings in its acks.
    pub fn new(
        broker: &Broker,
        (version, config): (Version, Arc<Config>),
        session: Arc<Session>,
        rights: Admitted,
        tells_reasons: bool,
    ) -> Self {
        Self {
            version,
            config,
            epoch: session.persistent_epoch(),
            session,
            allowance: rights.access().allowance(),
            rights,
            asks: false,
            held: None,
            allowed_topic: String::new(),
            memory: Memory::of(&broker.rooms.connections),
            acks: Acks::new(tells_reasons),
            unfinished: 0,
            stalled: Vec::new(),
            withheld: Withheld::Nothing,
            released_to: 0,
            ahead: Ahead::default(),
        }
    }

    /// What the connection waits for beside its socket: acks that may go, room in
    /// a stream that stalled it or for a packet id (pending while it waits for
    /// none), and answers of the access plugin, after which comes [`Inbound::go_on`]. Safe to drop.
    pub fn waits<'a>(
        &'a mut self,
        broker: &'a Broker,
    ) -> (&'a mut Acks, impl Future<Output = ()> + 'a, impl Future<Output = ()> + 'a) {
        (&mut self.acks, room(&self.stalled, self.withheld, &self.session, broker), self.rights.answered())
    }

    pub fn rights(&self) -> &Admitted {
        &self.rights
    }

    pub fn session(&self) -> &Arc<Session> {
        &self.session
    }

    pub fn config(&self) -> &Arc<Config> {
        &self.config
    }

    /// Returns the number of pending acknowledgements at which the connection is no longer read. MQTT 5
    /// clients are told their bound and are disconnected beyond it, so this bound is out of their reach.
    #[inline]
    fn waiting_acks_max(&self) -> usize {
        match self.version {
            Version::V31 | Version::V3 => self.config.inflight_max.into(),
            Version::V5 => usize::from(u16::MAX) * 2,
        }
    }

    /// Replaces the rights by those that a reload leaves the client, whose standing stays.
    pub fn succeed(&mut self, mut rights: Admitted) {
        rights.succeed(&mut self.rights);
        self.renew(rights);
    }

    /// Makes the rights those of another version of access control, which has the same rules.
    pub fn belong_to(&mut self, access: Arc<Access>) {
        self.rights.belong_to(access);
    }

    /// What the client may do from now on.
    pub fn renew(&mut self, rights: Admitted) {
        self.rights = rights;
        self.asks = false;
        self.allowed_topic.clear();
    }

    /// How long the client is not read for its rate; `None` while it is within.
    pub fn pause(&self) -> Option<Duration> {
        let all = self.rights.access().publishes().map(|all| lock(all).wait()).unwrap_or_default();
        let own = self.allowance.as_ref().map(|own| own.wait()).unwrap_or_default();
        let wait = all.max(own);
        (!wait.is_zero()).then_some(wait.max(PAUSE_MIN))
    }

    pub fn is_stalled(&self) -> bool {
        !self.stalled.is_empty() || self.withheld != Withheld::Nothing
    }

    /// Whether the packet at the front waits for an answer of the access plugin.
    pub fn is_asking(&self) -> bool {
        self.asks
    }

    /// Nothing is taken in until [`Self::hold_no_more`], but for PINGREQ where that may take long.
    pub fn hold(&mut self, takes_long: bool) {
        self.held = Some(takes_long);
    }

    pub fn hold_no_more(&mut self) {
        self.held = None;
    }

    /// Nothing more is taken in: what is withheld waits for nothing.
    pub fn drain(&mut self) {
        self.withheld = Withheld::Nothing;
    }

    /// Whether anything taken in is still to be acknowledged.
    pub fn is_waiting(&self) -> bool {
        self.acks.waiting() > 0 || !self.stalled.is_empty()
    }

    pub fn acks_waiting(&self) -> usize {
        self.acks.waiting()
    }

    pub fn write_acks(&mut self, broker: &Broker, out: &mut BytesMut) {
        let mut received = None;
        let written = self.acks.write_durable(out, |ack, stream, durable| {
            if ack.first == wire::PUBCOMP {
                let received = received.get_or_insert_with(|| self.session.received());
                received.released(ack.packet_id, stream, durable);
            }
        });
        drop(received);
        if written.acks > 0 {
            self.unfinished = self.unfinished.saturating_sub(written.finished);
            broker.counters.acks.increment(written.acks.into());
        }
    }

    /// Decodes and appends the whole packets of `bytes`; returns how many bytes
    /// they were. Never waits. Before a fault, what stood in front of it is appended.
    pub fn take(
        &mut self,
        broker: &Broker,
        bytes: &[u8],
        out: &mut BytesMut,
    ) -> Result<(usize, Next), Trouble> {
        match self.withheld {
            Withheld::Room if self.stalled.is_empty() => self.release_ahead(broker, bytes, out)?,
            Withheld::Release(packet_id) if self.is_released(broker, packet_id)? => {
                self.withheld = Withheld::Nothing;
            }
            _ => {}
        }
        if self.is_full() || self.is_over_rate(broker) {
            self.take_acks_ahead(bytes, out);
            if self.held != Some(false) {
                self.answer_pings(bytes, out);
            }
            return Ok((0, Next::Room));
        }
        if bytes.is_empty() {
            return Ok((0, Next::Bytes));
        }
        let (decoded, appended) =
            self.gather(broker, |inbound, work| inbound.decode(broker, bytes, out, work));
        let (used, next) = decoded?;
        appended?;
        self.passed(used);
        Ok((used, if self.stalled.is_empty() { next } else { Next::Room }))
    }

    /// What `decode` gathers is appended, whatever it returns.
    fn gather<'a, T>(
        &mut self,
        broker: &Broker,
        decode: impl FnOnce(&mut Self, &mut Work<'a>) -> T,
    ) -> (T, Result<(), Trouble>) {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut work = Work {
                decoded: recycle(std::mem::take(&mut scratch.decoded)),
                owed: std::mem::take(&mut scratch.owed),
                properties: std::mem::take(&mut scratch.properties),
                now_us: super::now_us(),
                packets: Few::default(),
            };
            let decoded = decode(self, &mut work);
            broker.counters.received.add(&work.packets);
            let appended = if work.owed.is_empty() && work.decoded.is_empty() {
                Ok(())
            } else {
                self.append(broker, &work, scratch)
            };
            work.owed.clear();
            work.properties.clear();
            (scratch.owed, scratch.properties) = (work.owed, work.properties);
            scratch.decoded = recycle(work.decoded);
            (decoded, appended)
        })
    }

    /// So many bytes are gone from the front of what was read.
    pub fn passed(&mut self, len: usize) {
        self.ahead.passed(len);
        self.released_to = self.released_to.saturating_sub(len);
    }

    fn is_full(&self) -> bool {
        self.asks || self.held.is_some() || self.is_stalled() || self.has_all_acks()
    }

    fn has_all_acks(&self) -> bool {
        self.acks.waiting() >= self.waiting_acks_max()
    }

    /// Whether more is taken in as soon as acks may go.
    pub fn waits_for_acks(&self) -> bool {
        self.has_all_acks() && !self.is_stalled()
    }

    /// Rates are looked at once a read for all clients, and here for the one: no
    /// clock is asked for a message.
    fn is_over_rate(&mut self, broker: &Broker) -> bool {
        if self.allowance.is_none() && self.rights.access().publishes().is_none() {
            return false;
        }
        let now = Instant::now();
        let own = self.allowance.as_mut().is_some_and(|own| {
            own.fill(now);
            own.is_spent()
        });
        let all = self.rights.access().publishes().is_some_and(|all| {
            let mut all = lock(all);
            all.fill(now);
            all.is_spent()
        });
        if own || all {
            broker.counters.throttles.increment(1);
            self.session.activity().throttled();
        }
        if own {
            let client_id = &*self.session.client_id;
            broker.failures.report_by(
                "mqtt: a client publishes more than mqtt.limits.client_messages_per_s, and is read slower",
                client_id,
                1,
                &format!("client {client_id}"),
                &broker.failures.hint(Hint::ClientsShow(client_id)),
            );
        } else if all {
            broker.failures.report(
                "mqtt: all clients together publish more than mqtt.limits.messages_per_s, and are read slower",
                1,
                "",
                &broker.failures.hint(Hint::ClientsPublished),
            );
        }
        own || all
    }

    fn decode<'a>(
        &mut self,
        broker: &Broker,
        bytes: &'a [u8],
        out: &mut BytesMut,
        work: &mut Work<'a>,
    ) -> Result<(usize, Next), Fault> {
        let (mut used, mut taken, begun) = (0, 0, Instant::now());
        loop {
            let Some(mut frame) = wire::frame(&bytes[used..], self.config.packet_bytes_max())? else {
                return Ok((used, Next::Bytes));
            };
            frame.first = self.version.first(frame.first);
            if taken == TAKEN_LEAST && begun.elapsed() >= TAKEN_TIME {
                return Ok((used, Next::Turn));
            }
            taken = taken % TAKEN_LEAST + 1;
            match frame.first {
                first if first & 0xf0 == wire::PUBLISH => {
                    if self.acks.waiting() + work.owed.len() >= self.waiting_acks_max() {
                        return Ok((used, Next::Room));
                    }
                    if self.allowance.as_ref().is_some_and(|own| own.is_spent()) {
                        return Ok((used, Next::Room));
                    }
                    if self.withholds(broker, &frame)? {
                        return Ok((used, Next::Room));
                    }
                    match self.publish(broker, &frame, work)? {
                        Published::Taken => {}
                        Published::Unanswered(topic) => {
                            self.ask_to_publish(topic.as_str(), &bytes[used + frame.len..]);
                            return Ok((used, Next::Room));
                        }
                        // Looked at again once what is gathered is appended.
                        Published::Withheld => return Ok((used, Next::Turn)),
                    }
                    self.spend(frame.len as u64);
                }
                wire::PUBREL if used < self.released_to => {}
                wire::PUBREL => self.release(&frame, out, work)?,
                wire::PUBACK | wire::PUBREC | wire::PUBCOMP if self.ahead.has_ack(used) => {}
                wire::PUBACK | wire::PUBREC | wire::PUBCOMP => self.acked(frame, out)?,
                wire::PINGREQ if frame.body.is_empty() => {
                    if !self.ahead.has_ping(used) {
                        wire::put_pingresp(out);
                    }
                }
                wire::PINGREQ => return Err(Fault::malformed("PINGREQ with a body")),
                _ => return Ok((used, Next::Packet)),
            }
            work.packets[usize::from(frame.first >> 4)] += 1;
            used += frame.len;
        }
    }

    /// Takes in a publish, or says what it waits for.
    fn publish<'a>(
        &mut self,
        broker: &Broker,
        frame: &Frame<'a>,
        work: &mut Work<'a>,
    ) -> Result<Published<'a>, Fault> {
        let publish = wire::publish(self.version, frame)?;
        let mut alias = None;
        let begin = work.properties.len();
        let mut flags = u16::from(publish.qos);
        if !publish.properties.is_empty() {
            wire::properties(publish.properties, |property| match property {
                Property::TopicAlias(value) => alias = Some(value),
                Property::Utf8(utf8) => flags |= if utf8 { flags::UTF8 } else { 0 },
                _ => push_property(&mut work.properties, property),
            })?;
        }
        let topic = self.topic(&publish, alias)?;
        if let Some(refusal) = self.refusal(topic.as_str()) {
            work.properties.truncate(begin);
            if refusal == Refusal::Unanswered {
                return Ok(Published::Unanswered(topic));
            }
            self.refuse(broker, &publish, topic.as_str(), refusal, work)?;
            return Ok(Published::Taken);
        }
        if publish.retain {
            flags |= flags::RETAIN;
        }
        if publish.dup {
            flags |= flags::DUP;
        }
        let Place { stream, mut device } = {
            let place = broker.ingest.place(topic.as_str());
            flags |= place.flags();
            place
        };
        if self.rights.identity.device.is_some() {
            device = None;
        }
        // What the client itself says of the message.
        let content = (publish.qos == 2)
            .then(|| Content::of(topic.as_str(), publish.payload, &work.properties[begin..], flags));
        let client_id = &self.session.client_id;
        let sender = &self.rights.identity;
        push_sender(&mut work.properties, (broker, &self.config), client_id, device.is_some(), sender);
        let properties = begin..work.properties.len();
        if properties.len() > PROPERTIES_BYTES_MAX {
            return Err(Fault {
                code: DisconnectReasonCode::PacketTooLarge,
                what: "properties over 65535 bytes",
            });
        }
        if publish.qos > 0 {
            let Some(owed) = self.owe(broker, stream, &publish, content, work)? else {
                work.properties.truncate(begin);
                return Ok(Published::Withheld);
            };
            let repeated = publish.qos == 2 && owed.change == IdChange::None;
            work.owed.push(owed);
            if repeated {
                work.properties.truncate(begin);
                return Ok(Published::Taken);
            }
        }
        work.decoded.push(Decoded { topic, payload: publish.payload, properties, device, stream, flags });
        Ok(Published::Taken)
    }

    /// Returns the ack for a QoS 1 or 2 publish. A QoS 2 message whose packet id is open is only
    /// acknowledged again (MQTT 5.0, 4.3.3), unless it is another message: that of a device that lost
    /// its store. DUP does not tell them apart: it says that the client sent the message before, not
    /// that it arrived. `None`: the publish waits until a release of its packet id is durable in
    /// another stream. A crash would open the id again there, with a message that the client no
    /// longer has, and what equals that message would be taken for it.
    fn owe(
        &mut self,
        broker: &Broker,
        stream: usize,
        publish: &Publish<'_>,
        content: Option<Content>,
        work: &mut Work<'_>,
    ) -> Result<Option<Owed>, Fault> {
        let first = if publish.qos == 1 { wire::PUBACK } else { wire::PUBREC };
        let packet_id = publish.packet_id;
        let ack = Some(Ack { first, packet_id, code: 0 });
        let known = content.and_then(|_| self.session.received().known(packet_id));
        // Only a session that outlives its connection has records.
        let is_elsewhere = |known: &Received| known.stream != stream && self.epoch.is_some();
        match known {
            Some(Known::Open(known)) if known.content.is_none() || known.content == content => {
                broker.counters.duplicates.increment(1);
                let change = IdChange::None;
                return Ok(Some(Owed { stream: known.stream, packet_id, ack, change, least: known.least() }));
            }
            Some(Known::Open(known)) => {
                let kind =
                    "mqtt: a QoS 2 packet id that was not released came with another message, taken as new";
                let client_id = &*self.session.client_id;
                let detail = format!("client {client_id}, packet id {packet_id}");
                broker.failures.report_client(kind, client_id, 1, &detail, "");
                if is_elsewhere(&known) {
                    self.give_up(packet_id, known, work);
                    return Ok(None);
                }
            }
            Some(Known::Releasing(known))
                if is_elsewhere(&known)
                    && !known.is_durable(*broker.streams[known.stream].durable().borrow()) =>
            {
                self.withheld = Withheld::Release(packet_id);
                return Ok(None);
            }
            Some(Known::Releasing(_)) | None => self.unfinished += 1,
        }
        if self.version == Version::V5 && self.unfinished > u32::from(self.config.receive_maximum) {
            return Err(Fault {
                code: DisconnectReasonCode::ReceiveMaximumExceeded,
                what: "more publishes in flight than Receive Maximum",
            });
        }
        let Some(content) = content else {
            return Ok(Some(Owed { stream, packet_id, ack, change: IdChange::None, least: Ticket(0) }));
        };
        // The ticket comes with the append.
        let received = Received { stream, ticket: None, content: Some(content) };
        let before = self.session.received().open(packet_id, received);
        Ok(Some(Owed {
            stream,
            packet_id,
            ack,
            change: IdChange::Receive { content, before },
            least: Ticket(0),
        }))
    }

    fn topic<'a>(&mut self, publish: &Publish<'a>, alias: Option<u16>) -> Result<Topic<'a>, Fault> {
        let Some(alias) = alias else {
            if publish.topic.is_empty() {
                return Err(Fault::protocol("neither a topic nor a topic alias"));
            }
            return Ok(Topic::Sent(publish.topic));
        };
        if alias == 0 || alias > self.config.topic_alias_maximum {
            return Err(Fault {
                code: DisconnectReasonCode::TopicAliasInvalid,
                what: "topic alias out of range",
            });
        }
        if publish.topic.is_empty() {
            let known = self.memory.alias(alias).cloned();
            return known.map(Topic::Alias).ok_or(Fault::protocol("a topic alias that was not set"));
        }
        self.memory.set_alias(alias, publish.topic)?;
        Ok(Topic::Sent(publish.topic))
    }

    fn count_stalled(&mut self) {
        self.memory.set_stalled(self.stalled.iter().map(Stalled::bytes).sum());
    }

    fn spend(&mut self, bytes: u64) {
        if let Some(own) = &mut self.allowance {
            own.spend(1, bytes);
        }
        if let Some(all) = self.rights.access().publishes() {
            lock(all).spend(1, bytes);
        }
    }

    fn release(&mut self, frame: &Frame<'_>, out: &mut BytesMut, work: &mut Work<'_>) -> Result<(), Fault> {
        let (packet_id, _) = wire::ack(self.version, frame)?;
        let mut received = self.session.received();
        let (known, change, code) = match received.known(packet_id) {
            Some(Known::Open(known)) => {
                received.release(packet_id);
                (known, IdChange::Release(Known::Open(known)), 0)
            }
            // One that is sent again is answered no sooner than the first.
            Some(Known::Releasing(known)) => {
                let code = if self.version == Version::V5 { wire::NOT_FOUND } else { 0 };
                (known, IdChange::None, code)
            }
            None => {
                wire::put_ack_with(out, self.version, wire::PUBCOMP, packet_id, wire::NOT_FOUND);
                return Ok(());
            }
        };
        let ack = Some(Ack { first: wire::PUBCOMP, packet_id, code });
        work.owed.push(Owed { stream: known.stream, packet_id, ack, change, least: known.least() });
        Ok(())
    }
}

/// What no stream took is not in flight.
impl Drop for Inbound {
    fn drop(&mut self) {
        for stalled in &self.stalled {
            undo(&self.session, stalled.owed.iter());
        }
    }
}

struct Work<'a> {
    decoded: Vec<Decoded<'a>>,
    owed: Vec<Owed>,
    properties: Vec<u8>,
    now_us: u64,
    packets: Few,
}

fn push_property(out: &mut Vec<u8>, property: Property<'_>) {
    match property {
        Property::ContentType(value) => facts::push(out, names::CONTENT_TYPE, value.as_bytes()),
        Property::ResponseTopic(value) => facts::push(out, names::RESPONSE_TOPIC, value.as_bytes()),
        Property::CorrelationData(value) => facts::push(out, names::CORRELATION_DATA, value),
        Property::ExpirySeconds(value) => facts::push(out, names::EXPIRY_S, value.to_string().as_bytes()),
        Property::User(name, value) => facts::push_user(out, name, value.as_bytes()),
        Property::TopicAlias(_) | Property::Utf8(_) => {}
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The same allocation for elements of another lifetime.
fn recycle<A, B>(mut used: Vec<A>) -> Vec<B> {
    used.clear();
    used.into_iter().map(|_| unreachable!("the vector is empty")).collect()
}
