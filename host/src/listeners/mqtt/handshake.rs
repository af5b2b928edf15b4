//! CONNECT to CONNACK: finds the version, checks what the client asks for,
//! lets it prove who it is, takes its session over from an older connection, and answers only once a
//! persistent session is durable.

use std::sync::Arc;

use bytes::{Buf, Bytes, BytesMut};
use rmqtt_codec::v5::ConnectAckReason;
use rmqtt_codec::{v3, v5};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_util::codec::Encoder;

use super::Broker;
use super::acks::Stopped;
use super::aliases::Aliases;
use super::auth::{self, Denial, Method};
use super::inbound::push_sender;
use super::metrics::{RECEIVED, SENT};
use super::outbound::Peer;
use super::owner::{Owner, USER_NAME_BYTES_MAX};
use super::session::{CLIENT_ID_BYTES_MAX, Session, Turn, subscription_key};
use super::subscriptions::Filter;
use super::transport::Remote;
use super::will::{self, Will};
use super::wire::{self, Fault, Packet, Version};
use crate::access::{Act, Admitted, Credentials, Denied, UserPlace, Verdict};
use crate::batch::flags;
use crate::properties::{self, Origin};
use crate::topic;

/// A client whose CONNACK is in `answer`, not yet sent.
pub struct Opened {
    pub session: Arc<Session>,
    pub turn: Turn,
    pub peer: Peer,
    pub aliases: Aliases,
    pub keep_alive_s: u16,
    pub rights: Admitted,
    /// Of `connections_per_user_max`.
    pub user_place: Option<UserPlace>,
    pub will: Option<Will>,
    /// Where CONNECT named one, with its user name: the client may authenticate again.
    pub auth: Option<(Method, Option<Box<str>>)>,
    pub answer: BytesMut,
}

/// What CONNECT asks for, the same for all versions.
struct Asked {
    version: Version,
    client_id: String,
    assigned: bool,
    clean: bool,
    keep_alive_s: u16,
    expiry_s: u32,
    window: u16,
    packet_bytes_max: usize,
    /// Topic aliases that it takes from us.
    aliases_max: u16,
    username: Option<Box<str>>,
    password: Option<Bytes>,
    will: Option<Will>,
    /// These two once it is admitted, before an older connection gives way: who
    /// is refused takes nothing over.
    user_place: Option<UserPlace>,
    will_place: Option<will::Place>,
    auth: Option<Method>,
    /// Its last round goes out with CONNACK.
    auth_answer: Option<Bytes>,
}

/// Why there will be no connection; `None` where nothing can be said to the client.
#[derive(Debug)]
pub struct Refused {
    pub cause: &'static str,
    /// For a person.
    pub detail: String,
}

impl Refused {
    fn new(cause: &'static str, detail: impl Into<String>) -> Self {
        Self { cause, detail: detail.into() }
    }
}

/// Reads CONNECT from `io`; what came after it stays in `input`. The caller
/// bounds the time.
pub async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
    broker: &Arc<Broker>,
    io: &mut S,
    input: &mut BytesMut,
    remote: &Remote,
) -> Result<Opened, Refused> {
    let mut asked = match read_connect(broker, io, input).await {
        Ok(asked) => asked,
        Err(Unread::Lost) => return Err(Refused::new("lost", format!("{remote} left before CONNECT"))),
        Err(Unread::Fault(fault, version)) => {
            let reason =
                ConnectAckReason::try_from(u8::from(fault.code)).unwrap_or(ConnectAckReason::MalformedPacket);
            refuse(broker, io, version, reason).await;
            return Err(Refused::new("malformed", format!("{remote}: {}", fault.what)));
        }
        Err(Unread::Level(level)) => {
            refuse(broker, io, Some(Version::V3), ConnectAckReason::UnsupportedProtocolVersion).await;
            let detail = format!("{remote}: protocol level {level}, not MQTT 3.1, 3.1.1 or 5.0");
            return Err(Refused::new("malformed", detail));
        }
    };
    if let Some(reason) = asked.refusal() {
        refuse(broker, io, Some(asked.version), reason).await;
        return Err(Refused::new("invalid", format!("client {} at {remote}: {reason:?}", asked.client_id)));
    }
    let mut rights = match asked.admit(broker, io, input, remote).await {
        Ok(rights) => rights,
        Err((reason, cause)) => {
            if let Some(reason) = reason {
                refuse(broker, io, Some(asked.version), reason).await;
            }
            let user = asked.username.as_deref().unwrap_or("anonymous");
            let detail = format!("user {user}, client {} at {remote}", asked.client_id);
            return Err(Refused::new(cause, detail));
        }
    };
    let owner = Owner::of(&broker.access, &rights.identity);
    let owned_by_a_user = |session: &Session| {
        let other = session.other_owner(&owner)?;
        (!other.gives_way_to(&owner)).then(|| {
            format!(
                "client {} at {remote}: its session is of {other}, and {owner} cannot end it",
                asked.client_id
            )
        })
    };
    // Before the owner's connection is ended for this one.
    if let Some(detail) = broker.sessions.get(&asked.client_id).and_then(|session| owned_by_a_user(&session))
    {
        refuse(broker, io, Some(asked.version), ConnectAckReason::ClientIdentifierNotValid).await;
        return Err(Refused::new("session_owner", detail));
    }
    let sessions_max = broker.config.sessions_max as usize;
    let Some((session, turn)) = broker.sessions.claim(&asked.client_id, sessions_max).await else {
        refuse(broker, io, Some(asked.version), ConnectAckReason::QuotaExceeded).await;
        return Err(Refused::new("sessions_max", format!("client {} at {remote}", asked.client_id)));
    };
    if let Some(detail) = owned_by_a_user(&session) {
        broker.sessions.give_back(broker, &session, turn);
        refuse(broker, io, Some(asked.version), ConnectAckReason::ClientIdentifierNotValid).await;
        return Err(Refused::new("session_owner", detail));
    }
    if asked.expiry_s > 0 && !session.is_kept() && !broker.has_state_room() {
        broker.sessions.give_back(broker, &session, turn);
        refuse(broker, io, Some(asked.version), ConnectAckReason::QuotaExceeded).await;
        return Err(Refused::new("broker_state", format!("client {} at {remote}", asked.client_id)));
    }
    // While nobody else has the session, and before anything of it changes.
    let other = session.other_owner(&owner);
    if !asked.clean && other.is_none() && ask_for_filters(&mut rights, &session).await.is_err() {
        broker.sessions.give_back(broker, &session, turn);
        refuse(broker, io, Some(asked.version), ConnectAckReason::ServerUnavailable).await;
        return Err(Refused::new("access_unavailable", format!("client {} at {remote}", asked.client_id)));
    }
    if let Some(other) = &other {
        let detail = format!("client {} at {remote}: of {other} before, of {owner} now", asked.client_id);
        broker.failures.report(
            "mqtt: a session ended because another user took its client id",
            1,
            &detail,
            "",
        );
    }
    // Present is a session of which nothing was taken away: else the client would not
    // subscribe again, and never hear why.
    let narrowed = other.is_none() && session.filter_list().iter().any(|it| is_forbidden(&rights, it));
    if narrowed && !asked.clean {
        let detail = format!("client {} at {remote}, {owner}", asked.client_id);
        let kind = "mqtt: a session ended because its user may not have all of its subscriptions any more";
        broker.failures.report(kind, 1, &detail, "");
    }
    // It has the turn: where this connect is given up, the next one waits for its end.
    let open = {
        let (broker, session) = (broker.clone(), session.clone());
        let (owner, clean, expiry_s) = (owner.clone(), asked.clean || narrowed, asked.expiry_s);
        async move { (broker.sessions.open(&broker, &session, owner, clean, expiry_s).await, turn) }
    };
    let (resumed, turn) = broker.in_background(open).await;
    let opened = async {
        let resumed = resumed?;
        if let (Some(will), Some(place)) = (&mut asked.will, asked.will_place.take()) {
            will.keep(broker, &asked.client_id, place).await?;
        }
        Ok::<_, Stopped>(resumed)
    };
    let resumed = match opened.await {
        Ok(resumed) => resumed,
        Err(_) => {
            refuse(broker, io, Some(asked.version), ConnectAckReason::ServerUnavailable).await;
            return Err(Refused::new("stopped", "the broker stream has stopped"));
        }
    };
    broker.wills.client_is_back(broker, &asked.client_id, &owner, resumed);
    if resumed {
        leave_forbidden(broker, &session, &mut rights);
    }
    let answer = asked.connack(broker, resumed);
    let peer =
        Peer { version: asked.version, window: asked.window, packet_bytes_max: asked.packet_bytes_max };
    Ok(Opened {
        session,
        turn,
        peer,
        aliases: Aliases::new(asked.aliases_max),
        keep_alive_s: asked.keep_alive_s,
        rights,
        user_place: asked.user_place,
        will: asked.will,
        auth: asked.auth.map(|method| (method, asked.username)),
        answer,
    })
}

enum Unread {
    Lost,
    Fault(Fault, Option<Version>),
    /// MQTT, at a level that we do not know.
    Level(u8),
}

async fn read_connect<S: AsyncRead + Unpin>(
    broker: &Broker,
    io: &mut S,
    input: &mut BytesMut,
) -> Result<Asked, Unread> {
    loop {
        // Refused at once: a client that speaks something else, HTTP perhaps.
        if input.first().is_some_and(|first| *first != 0x10) {
            return Err(Unread::Fault(Fault::protocol("the first packet is not CONNECT"), None));
        }
        let frame =
            wire::frame(input, broker.packet_bytes_max).map_err(|fault| Unread::Fault(fault, None))?;
        if let Some(frame) = frame {
            broker.counters.received.add_one(frame.first);
            let version = version(frame.body)?;
            let len = frame.len;
            let header = len - frame.body.len();
            let asked = connect(broker, version, &mut input[..len], header);
            input.advance(len);
            return asked.map_err(|fault| Unread::Fault(fault, Some(version)));
        }
        match io.read_buf(input).await {
            Ok(len @ 1..) => broker.counters.bytes[RECEIVED].increment(len as u64),
            _ => return Err(Unread::Lost),
        }
    }
}

/// Protocol name and level (MQTT 5.0, 3.1.2.1 and 3.1.2.2).
fn version(body: &[u8]) -> Result<Version, Unread> {
    match body {
        [0, 4, b'M', b'Q', b'T', b'T', 5, ..] => Ok(Version::V5),
        [0, 4, b'M', b'Q', b'T', b'T', 4, ..] | [0, 6, b'M', b'Q', b'I', b's', b'd', b'p', 3, ..] => {
            Ok(Version::V3)
        }
        [0, 4, b'M', b'Q', b'T', b'T', level, ..] => Err(Unread::Level(*level)),
        _ => Err(Unread::Fault(Fault::protocol("the protocol is not MQTT"), None)),
    }
}

/// `whole` is the packet, its body beginning at `header`.
fn connect(broker: &Broker, version: Version, whole: &mut [u8], header: usize) -> Result<Asked, Fault> {
    let kept_s = u32::try_from(broker.config.session_expiry_max.0.as_secs()).unwrap_or(u32::MAX);
    wire::check_connect(version, &whole[header..])?;
    // The codec refuses an empty client id without clean start; whether it may
    // stand is for us to say.
    let name_len = usize::from(whole[header + 1]);
    let flags = &mut whole[header + 2 + name_len + 1];
    let clean = *flags & 2 != 0;
    *flags |= 2;
    match version {
        Version::V3 => {
            let Packet::V3(v3::Packet::Connect(connect)) = wire::decode(version, whole)? else {
                return Err(Fault::protocol("the first packet is not CONNECT"));
            };
            let connect = *connect;
            let will = connect.last_will.map(|will| Will {
                topic: (&*will.topic).into(),
                payload: will.message,
                properties: Vec::new(),
                flags: u16::from(will.qos.value()) | if will.retain { flags::RETAIN } else { 0 },
                delay_s: 0,
                device: None,
                record: None,
            });
            Ok(Asked::new(version, &connect.client_id, connect.username.as_deref(), will, |asked| {
                asked.password = connect.password;
                asked.clean = clean;
                asked.keep_alive_s = connect.keep_alive;
                asked.expiry_s = if clean { 0 } else { kept_s };
                asked.window = broker.config.inflight_max;
            }))
        }
        Version::V5 => {
            let Packet::V5(v5::Packet::Connect(connect)) = wire::decode(version, whole)? else {
                return Err(Fault::protocol("the first packet is not CONNECT"));
            };
            let connect = *connect;
            if connect.auth_data.is_some() && connect.auth_method.is_none() {
                return Err(Fault::protocol("authentication data without a method"));
            }
            if let Some(topic) = connect.last_will.as_ref().and_then(|will| will.response_topic.as_deref()) {
                wire::response_topic(topic)?;
            }
            let will = connect.last_will.map(will_v5);
            Ok(Asked::new(version, &connect.client_id, connect.username.as_deref(), will, |asked| {
                asked.password = connect.password;
                asked.clean = clean;
                asked.keep_alive_s = connect.keep_alive;
                asked.expiry_s = connect.session_expiry_interval_secs.min(kept_s);
                asked.window = connect
                    .receive_max
                    .map_or(broker.config.inflight_max, |max| max.get().min(broker.config.inflight_max));
                let max = connect.max_packet_size.map_or(usize::MAX, |max| max.get() as usize);
                asked.packet_bytes_max = max;
                asked.aliases_max = connect.topic_alias_max.min(broker.config.outbound_topic_alias_maximum);
                let data = connect.auth_data.unwrap_or_default();
                asked.auth = connect.auth_method.map(|name| Method { name: (&*name).into(), data });
            }))
        }
    }
}

fn will_v5(will: v5::LastWill) -> Will {
    let mut out = Vec::new();
    let mut push = |name: &str, value: &[u8]| properties::push(&mut out, Origin::Listener, name, value);
    if let Some(value) = &will.content_type {
        push("content-type", value.as_bytes());
    }
    if let Some(value) = &will.response_topic {
        push("response-topic", value.as_bytes());
    }
    if let Some(value) = &will.correlation_data {
        push("correlation-data", value);
    }
    if let Some(value) = will.message_expiry_interval {
        push("expiry-s", value.to_string().as_bytes());
    }
    for (name, value) in &will.user_properties {
        properties::push(&mut out, Origin::Device, name, value.as_bytes());
    }
    let retain = if will.retain { flags::RETAIN } else { 0 };
    let utf8 = if will.is_utf8_payload == Some(true) { flags::UTF8 } else { 0 };
    Will {
        topic: (&*will.topic).into(),
        payload: will.message,
        properties: out,
        flags: u16::from(will.qos.value()) | retain | utf8,
        delay_s: will.will_delay_interval_sec.unwrap_or(0),
        device: None,
        record: None,
    }
}

impl Asked {
    fn new(
        version: Version,
        client_id: &str,
        username: Option<&str>,
        will: Option<Will>,
        fill: impl FnOnce(&mut Self),
    ) -> Self {
        let assigned = client_id.is_empty();
        let client_id =
            if assigned { format!("auto-{}", uuid::Uuid::new_v4().simple()) } else { client_id.to_owned() };
        let mut asked = Self {
            version,
            client_id,
            assigned,
            clean: true,
            keep_alive_s: 0,
            expiry_s: 0,
            window: u16::MAX,
            packet_bytes_max: usize::MAX,
            aliases_max: 0,
            username: username.map(Into::into),
            password: None,
            will,
            user_place: None,
            will_place: None,
            auth: None,
            auth_answer: None,
        };
        fill(&mut asked);
        asked
    }

    fn refusal(&self) -> Option<ConnectAckReason> {
        if self.client_id.len() > CLIENT_ID_BYTES_MAX || self.client_id.contains('\0') {
            return Some(ConnectAckReason::ClientIdentifierNotValid);
        }
        // MQTT 5 allows it (3.1.3.1): a fresh id has no session to resume.
        if self.assigned && !self.clean && self.version == Version::V3 {
            return Some(ConnectAckReason::ClientIdentifierNotValid);
        }
        if self.username.as_ref().is_some_and(|name| name.len() > USER_NAME_BYTES_MAX) {
            return Some(ConnectAckReason::BadUserNameOrPassword);
        }
        let will = self.will.as_ref()?;
        if !topic::is_valid_name(&will.topic) || will.topic.starts_with('$') {
            return Some(ConnectAckReason::TopicNameInvalid);
        }
        None
    }

    /// Who the client is; else the CONNACK's reason and the cause that is counted.
    async fn admit<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        broker: &Broker,
        io: &mut S,
        input: &mut BytesMut,
        remote: &Remote,
    ) -> Result<Admitted, Denial> {
        self.check_size(broker)?;
        if !broker.access.may_connect() {
            return Err((Some(ConnectAckReason::ConnectionRateExceeded), "connect_rate"));
        }
        let who = Credentials {
            client_id: &self.client_id,
            username: self.username.as_deref(),
            password: self.password.as_deref(),
            certificate: remote.identity.as_deref(),
            certificates: &remote.certificates,
            ip: remote.address.ip(),
            entrance: &remote.entrance,
            allow_anonymous: remote.entrance.allow_anonymous,
        };
        let mut rights = match &self.auth {
            None => broker.access.admit(&who).await.map_err(|denied| match denied {
                Denied::BadCredentials => (Some(ConnectAckReason::BadUserNameOrPassword), "bad_credentials"),
                other => auth::denial(other),
            })?,
            Some(method) => {
                let (rights, answer) = method.admit(broker, io, input, self.packet_bytes_max, &who).await?;
                self.auth_answer = Some(answer);
                self.check_size(broker)?;
                rights
            }
        };
        if !self.assigned && !broker.access.may_have_id(&rights.identity, &self.client_id) {
            return Err((Some(ConnectAckReason::ClientIdentifierNotValid), "client_id"));
        }
        let place = broker.access.enter(&rights.identity, &self.client_id);
        self.user_place = place.ok_or((Some(ConnectAckReason::QuotaExceeded), "connections_per_user"))?;
        if let Some(will) = &mut self.will {
            self.will_place = Some(admit_will(broker, &mut rights, &self.client_id, will).await?);
        }
        Ok(rights)
    }

    /// Whether the client takes a CONNACK of ours.
    fn check_size(&self, broker: &Broker) -> Result<(), Denial> {
        if self.connack(broker, false).len() > self.packet_bytes_max {
            return Err((Some(ConnectAckReason::PacketTooLarge), "invalid"));
        }
        Ok(())
    }

    fn connack(&self, broker: &Broker, session_present: bool) -> BytesMut {
        let config = &broker.config;
        if self.version == Version::V3 {
            return [0x20, 2, u8::from(session_present), 0][..].into();
        }
        let ack = v5::ConnectAck {
            session_present,
            session_expiry_interval_secs: Some(self.expiry_s),
            receive_max: config.receive_maximum.try_into().unwrap_or(std::num::NonZeroU16::MIN),
            max_packet_size: Some(broker.packet_bytes_max as u32),
            topic_alias_max: config.topic_alias_maximum,
            assigned_client_id: self.assigned.then(|| self.client_id.clone().into()),
            auth_method: self.auth.as_ref().map(|method| (&*method.name).into()),
            auth_data: self.auth_answer.clone(),
            ..v5::ConnectAck::default()
        };
        let mut out = BytesMut::new();
        v5::Codec::new(0, 0).encode(ack.into(), &mut out).expect("a CONNACK of ours is never too large");
        out
    }
}

/// A will is held to the rules when it is left, and is a message of its client.
async fn admit_will(
    broker: &Broker,
    rights: &mut Admitted,
    client_id: &str,
    will: &mut Will,
) -> Result<will::Place, Denial> {
    if broker.access.is_too_deep(&will.topic) {
        return Err((Some(ConnectAckReason::TopicNameInvalid), "will_topic_levels"));
    }
    if rights.publish(&will.topic) == Verdict::Ask {
        rights.ask_now(Act::Publish, vec![will.topic.clone()]).await.map_err(auth::denial)?;
    }
    if rights.publish(&will.topic) != Verdict::Yes {
        return Err((Some(ConnectAckReason::NotAuthorized), "will_not_authorized"));
    }
    will.device.clone_from(&rights.identity.device);
    let names_device = will.device.is_none() && broker.namespace.device_span(&will.topic).is_some();
    push_sender(&mut will.properties, broker, client_id, names_device, &rights.identity);
    if will.properties.len() > properties::PROPERTIES_BYTES_MAX {
        return Err((Some(ConnectAckReason::PacketTooLarge), "invalid"));
    }
    let bytes = will.state_bytes(client_id);
    if bytes as u64 > broker.config.will_bytes_max.0 {
        return Err((Some(ConnectAckReason::PacketTooLarge), "will_bytes_max"));
    }
    broker.wills.enter(broker, bytes).ok_or((Some(ConnectAckReason::QuotaExceeded), "wills_bytes_max"))
}

/// Has the plugin asked for what a session is subscribed to, where the rules
/// say so, before [`leave_forbidden`]. An error: it cannot be asked.
pub async fn ask_for_filters(rights: &mut Admitted, session: &Session) -> Result<(), Denied> {
    if rights.is_everything() {
        return Ok(());
    }
    let filters = session.filter_list();
    let filters = filters.iter().filter_map(|filter| Filter::parse(filter));
    let asked = filters.filter(|it| rights.rule_for_subscribe(it.topics()) == Verdict::Ask);
    let asked = asked.map(|it| it.topics().as_str().into()).collect();
    rights.ask_now(Act::Subscribe, asked).await
}

/// A session outlives its client's rights: what it may not see any more is
/// unsubscribed, and what waits of it is dropped.
pub fn leave_forbidden(broker: &Broker, session: &Arc<Session>, rights: &mut Admitted) {
    if rights.is_everything() {
        return;
    }
    let mut changes = Vec::new();
    for filter in session.filter_list().iter().filter(|filter| is_forbidden(rights, filter)) {
        broker.live.unsubscribe(broker, session, filter);
        if let Some(epoch) = session.persistent_epoch() {
            changes.push((subscription_key(epoch, filter), None));
        }
    }
    rights.narrow();
    // Also where all filters stay: what waits may be of one that is gone.
    let may_see = may_see(rights, session);
    session.outbox().keep_only(may_see);
    // Not awaited: what a crash brings back is removed at the next connect.
    super::append_unawaited(&*broker.broker, &changes);
}

fn is_forbidden(rights: &Admitted, filter: &str) -> bool {
    Filter::parse(filter).is_none_or(|it| rights.subscribe(it.topics()) != Verdict::Yes)
}

/// Whether what waits of a topic may still be sent; of the subscriptions as they are now.
pub fn may_see<'r>(rights: &'r Admitted, session: &Session) -> impl Fn(&str) -> bool + use<'r> {
    let filters = if rights.is_narrowed() { session.filter_list() } else { Vec::new() };
    let filters: Vec<Filter> = filters.iter().filter_map(|filter| Filter::parse(filter)).collect();
    move |topic| {
        if rights.is_everything() {
            return true;
        }
        // A topic is a filter that matches only itself.
        match Filter::parse(topic).map(|it| rights.rule_for_subscribe(it.topics())) {
            Some(Verdict::Yes) => true,
            // What was asked were its filters: one that it still has lets it see the topic.
            Some(Verdict::Ask) => {
                !rights.is_narrowed() || filters.iter().any(|it| it.topics().matches(topic))
            }
            _ => false,
        }
    }
}

/// Says no, as far as the version can.
async fn refuse<S: AsyncWrite + Unpin>(
    broker: &Broker,
    io: &mut S,
    version: Option<Version>,
    reason: ConnectAckReason,
) {
    let Some(version) = version else { return };
    let mut out = BytesMut::new();
    match version {
        Version::V5 => out.extend_from_slice(&[0x20, 3, 0, reason.into(), 0]),
        Version::V3 => {
            let code = match reason {
                ConnectAckReason::UnsupportedProtocolVersion => 1,
                ConnectAckReason::ClientIdentifierNotValid => 2,
                ConnectAckReason::BadUserNameOrPassword => 4,
                ConnectAckReason::NotAuthorized => 5,
                ConnectAckReason::QuotaExceeded
                | ConnectAckReason::PacketTooLarge
                | ConnectAckReason::ConnectionRateExceeded
                | ConnectAckReason::ServerUnavailable => 3,
                _ => return,
            };
            out.extend_from_slice(&[0x20, 2, 0, code]);
        }
    }
    broker.counters.sending(version, &out);
    broker.counters.bytes[SENT].increment(out.len() as u64);
    // The client may be gone already: there is nobody to tell.
    let _ = io.write_all(&out).await;
    let _ = io.shutdown().await;
}
