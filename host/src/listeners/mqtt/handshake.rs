//! The handshake from CONNECT to CONNACK. It checks the client's requests ([`connect`] parses them),
//! authenticates the client, takes its session over from an older connection, and answers only once a
//! persistent session is durable.

mod connect;

use std::sync::Arc;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use rmqtt_codec::v5::{self, ConnectAckReason};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::codec::Encoder;

use self::connect::read_connect;
use super::Broker;
use super::acks::Stopped;
use super::aliases::Aliases;
use super::auth::{self, Denial, Method};
use super::clients;
use super::config::Config;
use super::inbound::push_sender;
use super::outbound::Peer;
use super::owner::{Owner, USER_NAME_BYTES_MAX};
use super::refused::Refused;
use super::session::{CLIENT_ID_BYTES_MAX, Session, Turn};
use super::subscriptions::Filter;
use super::will::{self, Unaccepted, Will};
use super::wire::Version;
use crate::access::{Act, Admitted, Credentials, Denied, UserPlace, Verdict};
use crate::listeners::transport::{Place, Remote};
use crate::properties;
use crate::topic;

pub use self::connect::first_packet_bytes_max;

/// Failure text without the actual length, because data that a client sends must not be part of a kind
/// of failure.
const CLIENT_ID_TOO_LONG: &str = "a client id of more than 512 bytes";
const USER_NAME_TOO_LONG: &str = "a user name of more than 1024 bytes";
const _: () = assert!(CLIENT_ID_BYTES_MAX == 512 && USER_NAME_BYTES_MAX == 1_024);

/// A client whose CONNACK is in `answer`, and not sent yet.
pub struct Opened {
    /// The configuration when the client connected.
    pub config: Arc<Config>,
    /// Whether the host chose the client id.
    pub assigned: bool,
    pub session: Arc<Session>,
    pub turn: Turn,
    pub peer: Peer,
    pub aliases: Aliases,
    pub keep_alive_s: u16,
    /// Whether the client is another broker, which does not receive its own messages and receives RETAIN
    /// as it was published.
    pub is_bridge: bool,
    /// Whether negative acknowledgements may have a reason string.
    pub tells_reasons: bool,
    pub rights: Admitted,
    /// Place that counts for `connections_per_user_max`.
    pub user_place: Option<UserPlace>,
    pub will: Option<Will>,
    /// Authentication method with the user name, if CONNECT named one; the client may then authenticate
    /// again.
    pub auth: Option<(Method, Option<Box<str>>)>,
    pub answer: BytesMut,
}

/// The requests in CONNECT, the same for all versions.
struct Asked {
    config: Arc<Config>,
    version: Version,
    client_id: String,
    assigned: bool,
    clean: bool,
    keep_alive_s: u16,
    is_bridge: bool,
    tells_reasons: bool,
    expiry_s: u32,
    window: u16,
    packet_bytes_max: usize,
    /// Number of topic aliases that the client accepts.
    aliases_max: u16,
    username: Option<Box<str>>,
    password: Option<Bytes>,
    will: Option<Will>,
    /// This and the next field are set when the client is admitted, before an older connection is
    /// closed: a refused client takes nothing over.
    user_place: Option<UserPlace>,
    will_place: Option<will::Place>,
    auth: Option<Method>,
    /// Data of the last round, which is sent with CONNACK.
    auth_answer: Option<Bytes>,
}

/// Reads CONNECT from `io`. Later bytes stay in `input`. The caller limits the time, and answers a
/// refused client.
pub async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
    broker: &Arc<Broker>,
    io: &mut S,
    input: &mut BytesMut,
    remote: &Remote,
    place: &Place,
) -> Result<Opened, Refused> {
    let mut asked = read_connect(broker, io, input).await.map_err(|unread| unread.refused(remote))?;
    place.heard();
    asked.check().map_err(|(reason, what)| asked.refused(remote, "invalid", reason).what(what))?;
    asked.leave_reserved_will(broker, remote);
    let mut rights = match asked.admit(broker, io, input, remote).await {
        Ok(rights) => rights,
        Err(denial) => return Err(asked.denied(remote, denial)),
    };
    let owner = Owner::of(rights.access(), &rights.identity);
    let (session, turn) = asked.claim(broker, remote, &owner).await?;
    // While nobody else has the session, and before anything of it changes.
    let other = session.other_owner(&owner);
    if !asked.clean
        && other.is_none()
        && let Err(denied) = ask_for_filters(&mut rights, &session).await
    {
        broker.sessions.give_back(broker, &session, turn).await;
        return Err(asked.denied(remote, auth::denial(denied)));
    }
    if let Some(other) = &other {
        let detail = format!("client {} at {remote}: of {other} before, of {owner} now", asked.client_id);
        let kind = "mqtt: a session ended because another user took its client id";
        broker.failures.report_client(kind, &asked.client_id, 1, &detail, "");
    }
    // Present is a session of which nothing was taken away: else the client would not
    // subscribe again, and never hear why.
    let narrowed = other.is_none() && session.filter_list().iter().any(|it| is_forbidden(&rights, it));
    if narrowed && !asked.clean {
        let detail = format!("client {} at {remote}, {owner}", asked.client_id);
        let kind =
            "mqtt: a session ended because its user no longer has the right to all of its subscriptions";
        broker.failures.report_client(kind, &asked.client_id, 1, &detail, "");
    }
    // It has the turn: where this connect is given up, the next one waits for its end.
    let open = {
        let (broker, session) = (broker.clone(), session.clone());
        let (owner, clean, expiry_s) = (owner.clone(), asked.clean || narrowed, asked.expiry_s);
        async move { (broker.sessions.open(&broker, &session, owner, clean, expiry_s).await, turn) }
    };
    let (resumed, mut turn) = broker.in_background(open).await;
    let mut will = Unaccepted::new(broker, asked.will.take());
    let opened = async {
        let resumed = resumed?;
        will.keep(&asked.client_id, asked.will_place.take()).await?;
        Ok::<_, Stopped>(resumed)
    };
    let resumed = opened.await.map_err(|_| {
        let refused = Refused::new("stopped", None, "a stream has stopped");
        refused.told(asked.version, ConnectAckReason::ServerUnavailable, asked.packet_bytes_max)
    })?;
    if resumed && !rights.is_everything() {
        // It has the turn, for the same reason.
        let left = {
            let (broker, session) = (broker.clone(), session.clone());
            async move {
                leave_forbidden(&broker, &session, &mut rights).await;
                (rights, turn)
            }
        };
        (rights, turn) = broker.in_background(left).await;
    }
    // Last: until it returns, the client is not back, and a connect that is given up changes no will.
    broker.wills.client_is_back(broker, &asked.client_id, &owner, resumed).await;
    auth::watch(&mut rights, &session);
    let answer = asked.connack(resumed);
    let peer =
        Peer { version: asked.version, window: asked.window, packet_bytes_max: asked.packet_bytes_max };
    Ok(Opened {
        config: asked.config.clone(),
        assigned: asked.assigned,
        session,
        turn,
        peer,
        aliases: Aliases::within(asked.aliases_max, &broker.rooms.connections),
        keep_alive_s: asked.server_keep_alive_s().unwrap_or(asked.keep_alive_s),
        is_bridge: asked.is_bridge,
        tells_reasons: asked.tells_reasons,
        rights,
        user_place: asked.user_place,
        will: will.accepted(),
        auth: asked.auth.map(|method| (method, asked.username)),
        answer,
    })
}

impl Asked {
    fn new(
        (version, config): (Version, &Arc<Config>),
        client_id: &str,
        username: Option<&str>,
        will: Option<Will>,
        fill: impl FnOnce(&mut Self),
    ) -> Self {
        let assigned = client_id.is_empty();
        let client_id =
            if assigned { format!("auto-{}", uuid::Uuid::new_v4().simple()) } else { client_id.to_owned() };
        let mut asked = Self {
            config: config.clone(),
            version,
            client_id,
            assigned,
            clean: true,
            keep_alive_s: 0,
            is_bridge: false,
            tells_reasons: false,
            expiry_s: 0,
            window: u16::MAX,
            packet_bytes_max: usize::MAX,
            aliases_max: 0,
            // What clients send that were given no user: MQTT allows it, and it is nobody's name.
            username: username.filter(|name| !name.is_empty()).map(Into::into),
            password: None,
            will,
            user_place: None,
            will_place: None,
            auth: None,
            auth_answer: None,
        };
        fill(&mut asked);
        if asked.username.is_none() {
            asked.password = asked.password.filter(|password| !password.is_empty());
        }
        asked
    }

    /// Checks the requests by themselves.
    fn check(&self) -> Result<(), (ConnectAckReason, &'static str)> {
        let id = ConnectAckReason::ClientIdentifierNotValid;
        if self.client_id.len() > CLIENT_ID_BYTES_MAX {
            return Err((id, CLIENT_ID_TOO_LONG));
        }
        if self.client_id.contains('\0') {
            return Err((id, "a NUL character in the client id"));
        }
        // MQTT 5 allows it (3.1.3.1): a fresh id has no session to resume.
        if self.assigned && !self.clean && self.version != Version::V5 {
            return Err((id, "no client id with clean session 0: set a client id, or clean session 1"));
        }
        if self.username.as_ref().is_some_and(|name| name.len() > USER_NAME_BYTES_MAX) {
            return Err((ConnectAckReason::BadUserNameOrPassword, USER_NAME_TOO_LONG));
        }
        match &self.will {
            Some(will) if !topic::is_valid_name(&will.topic) => {
                let what = "a will whose topic is empty or has a wildcard";
                Err((ConnectAckReason::TopicNameInvalid, what))
            }
            _ => Ok(()),
        }
    }

    /// Removes a will below `$SYS`, as every publish there is refused: those topics belong to the
    /// broker. The client is admitted, because each Mosquitto bridge has such a will.
    fn leave_reserved_will(&mut self, broker: &Broker, remote: &Remote) {
        if let Some(will) = self.will.take_if(|will| topic::is_reserved(&will.topic)) {
            broker.counters.dollar_topics.increment(1);
            let detail = format!("client {} at {remote}: {}", self.client_id, will.topic);
            let kind = "mqtt: a will for a topic of the broker's is not kept";
            broker.failures.report_client(kind, &self.client_id, 1, &detail, "");
        }
    }

    /// Takes the client's session over from an older connection.
    async fn claim(
        &self,
        broker: &Arc<Broker>,
        remote: &Remote,
        owner: &Owner,
    ) -> Result<(Arc<Session>, Turn), Refused> {
        let invalid = ConnectAckReason::ClientIdentifierNotValid;
        let is_anothers =
            |session: &Session| session.other_owner(owner).is_some_and(|other| !other.gives_way_to(owner));
        // Before the owner's connection is ended for this one.
        if broker.sessions.get(&self.client_id).is_some_and(|session| is_anothers(&session)) {
            return Err(self.refused(remote, "session_owner", invalid));
        }
        let sessions_max = self.config.sessions_max as usize;
        let quota = ConnectAckReason::QuotaExceeded;
        let since = Instant::now();
        let claimed = broker.sessions.claim(&self.client_id, sessions_max).await;
        let (session, turn) = claimed.ok_or_else(|| self.refused(remote, "sessions_max", quota))?;
        // It has the turn: the connection that ended last is the one before this one.
        if let Some(older) = session.taken_over(since) {
            self.say_taken_over(broker, remote, &older);
        }
        let is_full = self.expiry_s > 0 && !session.is_kept() && !broker.has_state_room();
        let refused = match is_anothers(&session) {
            true => self.refused(remote, "session_owner", invalid),
            false if is_full => self.refused(remote, "broker_state", quota),
            false => return Ok((session, turn)),
        };
        broker.sessions.give_back(broker, &session, turn).await;
        Err(refused)
    }

    /// Reports that an older connection with the client's id was ended for this one. A device that lost
    /// its connection connects again from the same address, which is reported only when it is frequent.
    fn say_taken_over(&self, broker: &Broker, remote: &Remote, older: &clients::Connected) {
        let mut detail =
            format!("client {} at {}: taken over from {remote}", self.client_id, older.remote.address);
        match broker.takeovers.note(&self.client_id, &detail, Instant::now()) {
            Some(takeovers) => detail += &format!(", {takeovers} times within a minute"),
            None if older.is_elsewhere(&remote.address) => {}
            None => return,
        }
        let kind = "mqtt: one client id, two connections";
        broker.failures.report_client(kind, &self.client_id, 1, &detail, "");
    }

    /// Returns the client id, unless the host assigned it.
    fn own_id(&self) -> Option<&str> {
        (!self.assigned).then_some(&*self.client_id)
    }

    fn refused(&self, remote: &Remote, cause: &'static str, reason: ConnectAckReason) -> Refused {
        let detail = match self.assigned {
            true => format!("client without an id at {remote}"),
            false => format!("client {:.600} at {remote}", self.client_id),
        };
        let refused = Refused::new(cause, self.own_id(), detail);
        refused.told(self.version, reason, self.packet_bytes_max)
    }

    /// Returns the refusal, with the user name that the client presented.
    fn denied(&self, remote: &Remote, denial: Denial) -> Refused {
        let tried = self.auth.as_ref().and_then(Method::tried);
        let user = self.username.as_deref().or(tried);
        let shown = user.unwrap_or("anonymous");
        let detail = format!("user {shown}, client {:.600} at {remote}", self.client_id);
        let refused = Refused::new(denial.cause, user.or_else(|| self.own_id()), detail);
        let refused = if denial.is_reported { refused.reported() } else { refused };
        match denial.reason {
            Some(reason) => refused.told(self.version, reason, self.packet_bytes_max),
            None => refused,
        }
    }

    /// Returns the Server Keep Alive (MQTT 5.0, 3.2.2.3.14). Clients of older versions cannot be told,
    /// and keep their own.
    fn server_keep_alive_s(&self) -> Option<u16> {
        let max = self.config.keep_alive_max.as_ref()?.0.as_secs().try_into().unwrap_or(u16::MAX);
        let is_longer = self.keep_alive_s == 0 || self.keep_alive_s > max;
        (self.version == Version::V5 && is_longer).then_some(max)
    }

    /// Authenticates the client. The error is the reason for CONNACK and the cause that is counted.
    async fn admit<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        broker: &Broker,
        io: &mut S,
        input: &mut BytesMut,
        remote: &Remote,
    ) -> Result<Admitted, Denial> {
        self.check_size()?;
        let access = broker.access.get();
        if !access.may_connect(remote.address.ip()) {
            return Err(Denial::new(ConnectAckReason::ConnectionRateExceeded, "connect_rate"));
        }
        let who = Credentials {
            client_id: &self.client_id,
            username: self.username.as_deref(),
            password: self.password.as_deref(),
            certificate: remote.identity(),
            proof: remote.proof(),
            certificates: remote.certificates(),
            ip: remote.address.ip(),
            is_connected: false,
            entrance: &remote.entrance,
            allow_anonymous: remote.entrance.allows_anonymous(),
        };
        let mut rights = match &self.auth {
            None => {
                auth::unless_gone(broker, io, input, access.admit(&who)).await?.map_err(
                    |denied| match denied {
                        Denied::BadCredentials => {
                            Denial::new(ConnectAckReason::BadUserNameOrPassword, "bad_credentials")
                        }
                        other => auth::denial(other),
                    },
                )?
            }
            Some(method) => {
                let (rights, answer) = method.admit(broker, io, input, self.packet_bytes_max, &who).await?;
                self.auth_answer = Some(answer);
                self.check_size()?;
                rights
            }
        };
        if !self.assigned && !access.may_have_id(&rights.identity, &self.client_id) {
            return Err(Denial::new(ConnectAckReason::ClientIdentifierNotValid, "client_id"));
        }
        let place = access.enter(&rights.identity, &self.client_id);
        self.user_place =
            place.ok_or(Denial::new(ConnectAckReason::QuotaExceeded, "connections_per_user"))?;
        if let Some(will) = &mut self.will {
            self.will_place =
                Some(admit_will((broker, &self.config), &mut rights, &self.client_id, will).await?);
        }
        Ok(rights)
    }

    /// Checks that the client accepts a CONNACK of this size.
    fn check_size(&self) -> Result<(), Denial> {
        if self.connack(false).len() > self.packet_bytes_max {
            return Err(Denial::new(ConnectAckReason::PacketTooLarge, "invalid"));
        }
        Ok(())
    }

    fn connack(&self, session_present: bool) -> BytesMut {
        let config = &*self.config;
        if self.version != Version::V5 {
            return [0x20, 2, u8::from(session_present), 0][..].into();
        }
        let ack = v5::ConnectAck {
            session_present,
            session_expiry_interval_secs: Some(self.expiry_s),
            receive_max: config.receive_maximum.try_into().unwrap_or(std::num::NonZeroU16::MIN),
            max_packet_size: Some(config.packet_bytes_max() as u32),
            topic_alias_max: config.topic_alias_maximum,
            server_keepalive_sec: self.server_keep_alive_s(),
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

/// Checks the will against the access rules, since it will be published as a message of its client.
async fn admit_will(
    (broker, config): (&Broker, &Config),
    rights: &mut Admitted,
    client_id: &str,
    will: &mut Will,
) -> Result<will::Place, Denial> {
    if rights.access().is_too_deep(&will.topic) {
        return Err(Denial::new(ConnectAckReason::TopicNameInvalid, "will_topic_levels"));
    }
    if rights.publish(&will.topic) == Verdict::Ask {
        rights.ask_now(Act::Publish, vec![will.topic.clone()]).await.map_err(auth::denial)?;
    }
    if rights.publish(&will.topic) != Verdict::Yes {
        return Err(Denial::new(ConnectAckReason::NotAuthorized, "will_not_authorized"));
    }
    will.device.clone_from(&rights.identity.device);
    let names_device = will.device.is_none() && broker.ingest.place(&will.topic).device.is_some();
    push_sender(&mut will.properties, (broker, config), client_id, names_device, &rights.identity);
    if will.properties.len() > properties::PROPERTIES_BYTES_MAX {
        return Err(Denial::new(ConnectAckReason::PacketTooLarge, "invalid"));
    }
    let bytes = will.state_bytes(client_id);
    if bytes as u64 > config.will_bytes_max.0 {
        return Err(Denial::new(ConnectAckReason::PacketTooLarge, "will_bytes_max"));
    }
    broker.wills.enter(broker, bytes).ok_or(Denial::new(ConnectAckReason::QuotaExceeded, "wills_bytes_max"))
}

/// Asks the access plugin about the session's filters, if the rules require it, before
/// [`leave_forbidden`]. An error means that it cannot be asked.
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

/// Unsubscribes filters that the client's present rights deny, and drops their queued messages, because
/// a session outlives the rights of its client.
pub async fn leave_forbidden(broker: &Broker, session: &Arc<Session>, rights: &mut Admitted) {
    if rights.is_everything() {
        return;
    }
    let forbidden = session.filter_list().into_iter().filter(|filter| is_forbidden(rights, filter));
    let forbidden: Vec<_> = forbidden.collect();
    for filter in &forbidden {
        broker.live.unsubscribe(broker, session, filter).await;
    }
    rights.narrow();
    // Also where all filters stay: what waits may be of one that is gone.
    let may_see = may_see(rights, session);
    session.outbox().keep_only(may_see);
    if !forbidden.is_empty() {
        // Not awaited: what a crash brings back is removed at the next connect.
        session.note(broker, Vec::new());
    }
}

/// Returns whether the session has a filter that [`leave_forbidden`] removes.
pub fn has_forbidden(rights: &Admitted, session: &Session) -> bool {
    !rights.is_everything() && session.filter_list().iter().any(|filter| is_forbidden(rights, filter))
}

fn is_forbidden(rights: &Admitted, filter: &str) -> bool {
    Filter::parse(filter).is_none_or(|it| rights.subscribe(it.topics()) != Verdict::Yes)
}

/// Returns a function that tells whether queued messages of a topic may still be sent, given the present
/// subscriptions.
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
