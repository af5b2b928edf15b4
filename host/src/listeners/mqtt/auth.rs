//! Enhanced authentication (MQTT 5.0, 4.12): rounds of AUTH packets before CONNACK, and again at any
//! later time. [`crate::access`] handles their contents.

use std::future::pending;
use std::sync::{Arc, OnceLock};

use bytes::{Bytes, BytesMut};
use rmqtt_codec::v5::{self, Auth, AuthReasonCode, ConnectAckReason, DisconnectReasonCode};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::Instant;
use tokio_util::codec::Encoder;
use tokio_util::task::AbortOnDropHandle;

use super::Broker;
use super::acks::Stopped;
use super::handshake::{ask_for_filters, first_packet_bytes_max, has_forbidden, leave_forbidden};
use super::inbound::{Inbound, Trouble};
use super::metrics::{RECEIVED, SENT};
use super::session::Session;
use super::subscriptions::Filter;
use super::will::Will;
use super::wire::{self, Fault, Packet, Version};
use crate::access::{Act, Admitted, Credentials, Denied, Exchange, ROUNDS_MAX, Step, Verdict};
use crate::listeners::transport::Remote;

/// Authentication method in CONNECT, which applies to the whole connection.
#[derive(Clone, Debug)]
pub struct Method {
    pub name: Box<str>,
    /// Authentication data of CONNECT.
    pub data: Bytes,
    /// User name that the client claimed during an exchange.
    tried: OnceLock<Box<str>>,
}

/// Why a client is refused.
#[derive(Clone, Copy, Debug)]
pub struct Denial {
    /// Reason in CONNACK; `None` if no CONNACK is sent.
    pub reason: Option<ConnectAckReason>,
    /// Cause under which the refusal is counted.
    pub cause: &'static str,
    /// Whether the underlying failure has a log line of its own, which counts these clients.
    pub is_reported: bool,
}

impl Denial {
    /// The client has disconnected.
    const LOST: Self = Self { reason: None, cause: "lost", is_reported: false };

    pub fn new(reason: ConnectAckReason, cause: &'static str) -> Self {
        Self { reason: Some(reason), cause, is_reported: false }
    }
}

/// Bytes that are read from a client while its credentials are checked.
const EARLY_BYTES_MAX: usize = 16 << 10;

/// Runs `work`. Returns `Err` if the client disconnects before it is done. Bytes that the client sends
/// meanwhile stay in `input`.
pub async fn unless_gone<S: AsyncRead + Unpin, T>(
    broker: &Broker,
    io: &mut S,
    input: &mut BytesMut,
    work: impl Future<Output = T>,
) -> Result<T, Denial> {
    let gone = async {
        while input.len() < EARLY_BYTES_MAX {
            match io.read_buf(input).await {
                Ok(len @ 1..) => broker.counters.bytes[RECEIVED].increment(len as u64),
                // It may have said all that it has to say.
                Ok(0) if !input.is_empty() => break,
                _ => return,
            }
        }
        pending().await
    };
    tokio::select! {
        biased;
        done = work => Ok(done),
        () = gone => Err(Denial::LOST),
    }
}

impl Method {
    pub fn new(name: &str, data: Bytes) -> Self {
        Self { name: name.into(), data, tried: OnceLock::new() }
    }

    pub fn tried(&self) -> Option<&str> {
        self.tried.get().map(|user| &**user)
    }

    /// Performs the rounds between CONNECT and CONNACK, and returns the data for CONNACK. The caller
    /// limits the time.
    pub async fn admit<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        broker: &Broker,
        io: &mut S,
        input: &mut BytesMut,
        packet_bytes_max: usize,
        who: &Credentials<'_>,
    ) -> Result<(Admitted, Bytes), Denial> {
        let access = broker.access.get();
        let begun = unless_gone(broker, io, input, access.begin(&self.name, &self.data, who)).await?;
        let mut step = begun.map_err(denial)?;
        for _ in 0..ROUNDS_MAX {
            let (data, exchange) = match step {
                Step::Ask { data, exchange } => (data, exchange),
                Step::Done { data, identity } => {
                    return Ok((access.rights(identity, who.client_id, who.proof), data.into()));
                }
            };
            if let Some(user) = exchange.user() {
                self.tried.get_or_init(|| user.into());
            }
            let mut out = BytesMut::new();
            self.put(AuthReasonCode::ContinueAuth, data, packet_bytes_max, &mut out)
                .ok_or(Denial::new(ConnectAckReason::PacketTooLarge, "invalid"))?;
            broker.counters.sending(Version::V5, &out);
            io.write_all(&out).await.map_err(|_| Denial::LOST)?;
            broker.counters.bytes[SENT].increment(out.len() as u64);
            let answer = self.read_answer(broker, io, input).await?;
            let answered = unless_gone(broker, io, input, exchange.answer(&answer)).await?;
            step = answered.map_err(denial)?;
        }
        Err(Denial::new(ConnectAckReason::NotAuthorized, "bad_credentials"))
    }

    /// Reads the client's answer. Until CONNACK a client may send only AUTH and DISCONNECT (3.1.2-30).
    async fn read_answer<S: AsyncRead + Unpin>(
        &self,
        broker: &Broker,
        io: &mut S,
        input: &mut BytesMut,
    ) -> Result<Bytes, Denial> {
        let fault = |fault: Fault| {
            let reason = ConnectAckReason::try_from(u8::from(fault.code));
            Denial::new(reason.unwrap_or(ConnectAckReason::MalformedPacket), "malformed")
        };
        loop {
            if let Some(frame) =
                wire::frame(input, first_packet_bytes_max(&broker.config())).map_err(fault)?
            {
                broker.counters.received.add_one(frame.first);
                let len = frame.len;
                let packet = wire::decode(Version::V5, &input.split_to(len)).map_err(fault)?;
                return match packet {
                    Packet::V5(v5::Packet::Auth(auth))
                        if auth.reason_code == AuthReasonCode::ContinueAuth =>
                    {
                        self.data_of(auth).map_err(fault)
                    }
                    Packet::V5(v5::Packet::Disconnect(_)) => Err(Denial::LOST),
                    _ => Err(fault(OUT_OF_TURN)),
                };
            }
            match io.read_buf(input).await {
                Ok(len @ 1..) => broker.counters.bytes[RECEIVED].increment(len as u64),
                _ => return Err(Denial::LOST),
            }
        }
    }

    fn data_of(&self, auth: Auth) -> Result<Bytes, Fault> {
        if auth.auth_method.as_deref() != Some(&self.name) {
            return Err(Fault::protocol("AUTH names another method than CONNECT"));
        }
        Ok(auth.auth_data.unwrap_or_default())
    }

    /// Encodes an AUTH packet. Returns `None` if it exceeds the client's maximum packet size.
    fn put(
        &self,
        reason_code: AuthReasonCode,
        data: Vec<u8>,
        packet_bytes_max: usize,
        out: &mut BytesMut,
    ) -> Option<()> {
        let before = out.len();
        let auth = Auth {
            reason_code,
            auth_method: Some((&*self.name).into()),
            auth_data: Some(data.into()),
            ..Auth::default()
        };
        v5::Codec::new(0, 0).encode(auth.into(), out).ok()?;
        (out.len() - before <= packet_bytes_max).then_some(())
    }
}

const FAILED_AGAIN: &str = "mqtt: a connected client did not authenticate again with success";
const OUT_OF_TURN: Fault = Fault::protocol("AUTH out of turn");

pub fn denial(denied: Denied) -> Denial {
    match denied {
        // By this way a wrong password is no other thing than a wrong right (4.12).
        Denied::BadCredentials => Denial::new(ConnectAckReason::NotAuthorized, "bad_credentials"),
        Denied::NotAuthorized => Denial::new(ConnectAckReason::NotAuthorized, "not_authorized"),
        Denied::TooMany => Denial::new(ConnectAckReason::ConnectionRateExceeded, "guessing"),
        Denied::BadMethod => Denial::new(ConnectAckReason::BadAuthenticationMethod, "bad_auth_method"),
        Denied::Unavailable(_) | Denied::Failed(_) => Denial {
            is_reported: matches!(denied, Denied::Failed(_)),
            ..Denial::new(ConnectAckReason::ServerUnavailable, "access_unavailable")
        },
    }
}

/// Re-authentication of a connected client (4.12.1). The connection continues meanwhile, with the
/// client's present rights.
pub struct Again {
    method: Method,
    remote: Arc<Remote>,
    /// User name in CONNECT.
    username: Option<Box<str>>,
    running: Option<Running>,
}

/// A running exchange.
struct Running {
    rounds: u32,
    /// Time by which the exchange must be finished.
    until: Instant,
    turn: Turn,
}

enum Turn {
    /// The client must answer.
    Clients(Box<dyn Exchange>),
    /// The client's answer is being checked, on a task of its own, so that a connection that does
    /// something else meanwhile does not keep the turn of others.
    Hosts(AbortOnDropHandle<Looked>),
}

/// Result of a check.
pub enum Looked {
    /// The client must answer this.
    Ask {
        data: Vec<u8>,
        exchange: Box<dyn Exchange>,
    },
    /// The client is authenticated. The access plugin was asked about its subscriptions with the new
    /// rights.
    Done {
        data: Vec<u8>,
        rights: Box<Admitted>,
        may_leave_will: bool,
        /// Whether subscriptions were removed that the new rights deny.
        has_left: bool,
    },
    Failed,
    /// A stream has stopped.
    Stopped,
}

/// What a check needs of a connection.
struct Looking {
    broker: Arc<Broker>,
    session: Arc<Session>,
    remote: Arc<Remote>,
    method: Box<str>,
    username: Option<Box<str>>,
    /// Present user name, which must stay the same.
    name: Option<Arc<str>>,
    will_topic: Option<Box<str>>,
}

impl Again {
    pub fn new(method: Method, username: Option<Box<str>>, remote: Arc<Remote>) -> Self {
        Self { method, remote, username, running: None }
    }

    /// Accepts an AUTH packet and begins to check it: see [`Self::looked`].
    pub fn take(
        &mut self,
        broker: &Arc<Broker>,
        auth: Auth,
        inbound: &Inbound,
        will: Option<&Will>,
    ) -> Result<(), Fault> {
        let code = auth.reason_code;
        let data = self.method.data_of(auth)?;
        let looking = self.looking(broker, inbound, will);
        let (rounds, until, look) = match (self.running.take(), code) {
            (None, AuthReasonCode::ReAuth) => {
                let until = Instant::now() + broker.config().connect_timeout.0;
                (1, until, tokio::spawn(looking.begin(data)))
            }
            (
                Some(Running { turn: Turn::Clients(exchange), rounds, until }),
                AuthReasonCode::ContinueAuth,
            ) => (rounds + 1, until, tokio::spawn(looking.go_on(exchange, data))),
            _ => return Err(OUT_OF_TURN),
        };
        self.running = Some(Running { rounds, until, turn: Turn::Hosts(AbortOnDropHandle::new(look)) });
        Ok(())
    }

    fn looking(&self, broker: &Arc<Broker>, inbound: &Inbound, will: Option<&Will>) -> Looking {
        Looking {
            broker: broker.clone(),
            session: inbound.session().clone(),
            remote: self.remote.clone(),
            method: self.method.name.clone(),
            username: self.username.clone(),
            name: inbound.rights().identity.name.clone(),
            will_topic: will.map(|will| will.topic.clone()),
        }
    }

    /// Returns the result of a check. Never returns while none runs. Cancel safe.
    async fn look(&mut self) -> Looked {
        let Some(Running { turn: Turn::Hosts(look), .. }) = &mut self.running else { return pending().await };
        // Fails only while the runtime ends.
        let Ok(looked) = look.await else { return pending().await };
        looked
    }

    /// Handles the result of a check: puts an AUTH packet into `out`, changes the client's rights when
    /// the exchange is complete, and removes its `will` if the new rights deny it. A failure ends the
    /// connection.
    pub fn looked(
        &mut self,
        broker: &Arc<Broker>,
        looked: Looked,
        inbound: &mut Inbound,
        will: &mut Option<Box<Will>>,
        packet_bytes_max: usize,
        out: &mut BytesMut,
    ) -> Result<(), Trouble> {
        let session = inbound.session().clone();
        let failed = || failed(broker, &session.client_id, FAILED_AGAIN);
        let Some(Running { rounds, until, .. }) = self.running.take() else { return Ok(()) };
        let too_large =
            Fault { code: DisconnectReasonCode::PacketTooLarge, what: "AUTH is more than the client takes" };
        let mut put = |code, data| self.method.put(code, data, packet_bytes_max, out).ok_or(too_large);
        let next = match looked {
            Looked::Failed => return Err(failed().into()),
            Looked::Stopped => return Err(Trouble::Stopped),
            Looked::Ask { .. } if rounds > ROUNDS_MAX => return Err(failed().into()),
            Looked::Ask { data, exchange } => {
                put(AuthReasonCode::ContinueAuth, data)?;
                Turn::Clients(exchange)
            }
            // It was subscribed to more meanwhile.
            Looked::Done { data, rights, .. } if is_unanswered(&rights, &session) => {
                let looking = self.looking(broker, inbound, will.as_deref());
                Turn::Hosts(AbortOnDropHandle::new(tokio::spawn(looking.ask(data, rights))))
            }
            // The client is told once its will is gone for good.
            Looked::Done { data, rights, may_leave_will: false, .. } if will.is_some() => {
                let will = will.take().expect("it is there");
                report_forgotten(broker, &session, &will);
                let broker = broker.clone();
                let gone = async move {
                    match will.forget_durably(&broker).await {
                        Ok(()) => Looked::Done { data, rights, may_leave_will: true, has_left: false },
                        Err(Stopped) => Looked::Stopped,
                    }
                };
                Turn::Hosts(AbortOnDropHandle::new(tokio::spawn(gone)))
            }
            // Also what it was subscribed to while it left the others.
            Looked::Done { data, mut rights, has_left, may_leave_will }
                if !has_left || has_forbidden(&rights, &session) =>
            {
                let (broker, session) = (broker.clone(), session.clone());
                let left = async move {
                    leave_forbidden(&broker, &session, &mut rights).await;
                    Looked::Done { data, rights, may_leave_will, has_left: true }
                };
                Turn::Hosts(AbortOnDropHandle::new(tokio::spawn(left)))
            }
            Looked::Done { data, mut rights, .. } => {
                put(AuthReasonCode::Success, data)?;
                watch(&mut rights, &session);
                inbound.renew(*rights);
                return Ok(());
            }
        };
        self.running = Some(Running { rounds, until, turn: next });
        Ok(())
    }
}

/// Returns the result of the check of the client's answer. Never returns while none runs, or if the
/// client does not authenticate again. Cancel safe.
pub async fn look(again: Option<&mut Again>) -> Looked {
    match again {
        // Boxed: a connection that has nothing looked at does not carry it.
        Some(again) => Box::pin(again.look()).await,
        None => pending().await,
    }
}

impl Looking {
    async fn begin(self, data: Bytes) -> Looked {
        let begun = self.broker.access.get().begin(&self.method, &data, &self.who()).await;
        self.after(begun).await
    }

    async fn go_on(self, exchange: Box<dyn Exchange>, data: Bytes) -> Looked {
        let answered = exchange.answer(&data).await;
        self.after(answered).await
    }

    fn who(&self) -> Credentials<'_> {
        Credentials {
            client_id: &self.session.client_id,
            username: self.username.as_deref(),
            password: None,
            certificate: self.remote.identity(),
            proof: self.remote.proof(),
            certificates: self.remote.certificates(),
            ip: self.remote.address.ip(),
            is_connected: true,
            entrance: &self.remote.entrance,
            allow_anonymous: false,
        }
    }

    async fn after(self, step: Result<Step, Denied>) -> Looked {
        match step {
            Ok(Step::Ask { data, exchange }) => Looked::Ask { data, exchange },
            Ok(Step::Done { data, identity }) if identity.name == self.name => {
                let client_id = &self.session.client_id;
                let rights = self.broker.access.get().rights(identity, client_id, self.remote.proof());
                self.ask(data, Box::new(rights)).await
            }
            Ok(Step::Done { .. }) | Err(_) => Looked::Failed,
        }
    }

    /// Asks the access plugin about the client's will and subscriptions, if the rules require it.
    async fn ask(self, data: Vec<u8>, mut rights: Box<Admitted>) -> Looked {
        let mut may_leave_will = true;
        if let Some(topic) = self.will_topic {
            if rights.publish(&topic) == Verdict::Ask
                && rights.ask_now(Act::Publish, vec![topic.clone()]).await.is_err()
            {
                return Looked::Failed;
            }
            may_leave_will = rights.publish(&topic) == Verdict::Yes;
        }
        // Last: the answers of the last call are all kept.
        match ask_for_filters(&mut rights, &self.session).await {
            Ok(()) => Looked::Done { data, rights, may_leave_will, has_left: false },
            Err(_) => Looked::Failed,
        }
    }
}

/// Returns whether the session has a filter about which the plugin was not asked.
fn is_unanswered(rights: &Admitted, session: &Session) -> bool {
    let filters = if rights.is_everything() { Vec::new() } else { session.filter_list() };
    let mut filters = filters.iter().filter_map(|filter| Filter::parse(filter));
    filters.any(|filter| rights.subscribe(filter.topics()) == Verdict::Ask)
}

fn report_forgotten(broker: &Broker, session: &Session, will: &Will) {
    let detail = format!("client {}, topic {}", session.client_id, will.topic);
    let kind =
        "mqtt: a will is forgotten because its client authenticated again and may not publish it any more";
    broker.failures.report_client(kind, &session.client_id, 1, &detail, "");
}

/// Wakes the connection to check its deadline when its rights are revoked.
pub fn watch(rights: &mut Admitted, session: &Arc<Session>) {
    let session = session.clone();
    rights.access().clone().watch(rights, move || session.wake.notify_one());
}

/// Returns when the running exchange must be finished, or the client's credentials expire.
pub fn deadline(again: Option<&Again>, rights: &Admitted) -> Option<Instant> {
    if rights.is_revoked() {
        return Some(Instant::now());
    }
    let until = again.and_then(|again| again.running.as_ref()).map(|running| running.until);
    let known_until = rights.identity.valid_until.map(Instant::from_std);
    [until, known_until].into_iter().flatten().min()
}

/// Returns why the [`deadline`] has passed.
pub fn over(again: Option<&Again>, rights: &Admitted) -> &'static str {
    let is_running = again.is_some_and(|again| again.running.is_some());
    let is_known = rights.identity.valid_until.is_none_or(|until| Instant::from_std(until) > Instant::now());
    match (rights.is_revoked(), is_known) {
        (true, _) => "mqtt: the credentials of a connected client were revoked",
        (false, true) if is_running => "mqtt: a connected client did not authenticate again in time",
        (false, _) => "mqtt: the credentials of a connected client ran out",
    }
}

/// Counts and reports a failure. The client is not told whether the proof, the user or the time was the
/// reason.
pub fn failed(broker: &Broker, client_id: &str, why: &'static str) -> Fault {
    broker.failures.report_client(why, client_id, 1, &format!("client {client_id}"), "");
    Fault { code: DisconnectReasonCode::NotAuthorized, what: "authentication failed or ran out" }
}
