//! Enhanced authentication (MQTT 5.0, 4.12): rounds of AUTH before CONNACK, and
//! again at any time later. What is said in them is [`crate::access`]'s.

use std::future::pending;
use std::sync::{Arc, OnceLock};

use bytes::{Bytes, BytesMut};
use rmqtt_codec::v5::{self, Auth, AuthReasonCode, ConnectAckReason, DisconnectReasonCode};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, timeout_at};
use tokio_util::codec::Encoder;

use super::Broker;
use super::handshake::{ask_for_filters, first_packet_bytes_max, leave_forbidden};
use super::inbound::Inbound;
use super::metrics::{RECEIVED, SENT};
use super::session::Session;
use super::transport::Remote;
use super::wire::{self, Fault, Packet, Version};
use crate::access::{Admitted, Credentials, Denied, Exchange, ROUNDS_MAX, Step};

/// What CONNECT named; it stays for the connection.
#[derive(Clone, Debug)]
pub struct Method {
    pub name: Box<str>,
    /// Of CONNECT.
    pub data: Bytes,
    /// Who the client said that it is, within an exchange.
    tried: OnceLock<Box<str>>,
}

/// Why a client is not served: what CONNACK says, if anything, and the cause that is counted.
pub type Denial = (Option<ConnectAckReason>, &'static str);

/// Bytes of a client that are read while its credentials are looked at.
const EARLY_BYTES_MAX: usize = 16 << 10;

/// `Err`: the client has left before `work` was done. What it sends meanwhile stays in `input`.
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
        () = gone => Err((None, "lost")),
    }
}

impl Method {
    pub fn new(name: &str, data: Bytes) -> Self {
        Self { name: name.into(), data, tried: OnceLock::new() }
    }

    pub fn tried(&self) -> Option<&str> {
        self.tried.get().map(|user| &**user)
    }

    /// The rounds between CONNECT and CONNACK, with the data that CONNACK
    /// carries. The caller bounds the time.
    pub async fn admit<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        broker: &Broker,
        io: &mut S,
        input: &mut BytesMut,
        packet_bytes_max: usize,
        who: &Credentials<'_>,
    ) -> Result<(Admitted, Bytes), Denial> {
        let begun = unless_gone(broker, io, input, broker.access.begin(&self.name, &self.data, who)).await?;
        let mut step = begun.map_err(denial)?;
        for _ in 0..ROUNDS_MAX {
            let (data, exchange) = match step {
                Step::Ask { data, exchange } => (data, exchange),
                Step::Done { data, identity } => {
                    return Ok((broker.access.rights(identity, who.client_id, who.proof), data.into()));
                }
            };
            if let Some(user) = exchange.user() {
                self.tried.get_or_init(|| user.into());
            }
            let mut out = BytesMut::new();
            self.put(AuthReasonCode::ContinueAuth, data, packet_bytes_max, &mut out)
                .ok_or((Some(ConnectAckReason::PacketTooLarge), "invalid"))?;
            broker.counters.sending(Version::V5, &out);
            io.write_all(&out).await.map_err(|_| (None, "lost"))?;
            broker.counters.bytes[SENT].increment(out.len() as u64);
            let answer = self.read_answer(broker, io, input).await?;
            let answered = unless_gone(broker, io, input, exchange.answer(&answer)).await?;
            step = answered.map_err(denial)?;
        }
        Err((Some(ConnectAckReason::NotAuthorized), "bad_credentials"))
    }

    /// Until CONNACK a client sends nothing but AUTH and DISCONNECT (3.1.2-30).
    async fn read_answer<S: AsyncRead + Unpin>(
        &self,
        broker: &Broker,
        io: &mut S,
        input: &mut BytesMut,
    ) -> Result<Bytes, Denial> {
        let fault = |fault: Fault| {
            let reason = ConnectAckReason::try_from(u8::from(fault.code));
            (Some(reason.unwrap_or(ConnectAckReason::MalformedPacket)), "malformed")
        };
        loop {
            if let Some(frame) = wire::frame(input, first_packet_bytes_max(broker)).map_err(fault)? {
                broker.counters.received.add_one(frame.first);
                let len = frame.len;
                let packet = wire::decode(Version::V5, &input.split_to(len)).map_err(fault)?;
                return match packet {
                    Packet::V5(v5::Packet::Auth(auth))
                        if auth.reason_code == AuthReasonCode::ContinueAuth =>
                    {
                        self.data_of(auth).map_err(fault)
                    }
                    Packet::V5(v5::Packet::Disconnect(_)) => Err((None, "lost")),
                    _ => Err(fault(OUT_OF_TURN)),
                };
            }
            match io.read_buf(input).await {
                Ok(len @ 1..) => broker.counters.bytes[RECEIVED].increment(len as u64),
                _ => return Err((None, "lost")),
            }
        }
    }

    fn data_of(&self, auth: Auth) -> Result<Bytes, Fault> {
        if auth.auth_method.as_deref() != Some(&self.name) {
            return Err(Fault::protocol("AUTH names another method than CONNECT"));
        }
        Ok(auth.auth_data.unwrap_or_default())
    }

    /// `None` where it is more than the client takes.
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

const OUT_OF_TURN: Fault = Fault::protocol("AUTH out of turn");

pub fn denial(denied: Denied) -> Denial {
    match denied {
        // By this way a wrong password is no other thing than a wrong right (4.12).
        Denied::BadCredentials => (Some(ConnectAckReason::NotAuthorized), "bad_credentials"),
        Denied::NotAuthorized => (Some(ConnectAckReason::NotAuthorized), "not_authorized"),
        Denied::TooMany => (Some(ConnectAckReason::ConnectionRateExceeded), "guessing"),
        Denied::BadMethod => (Some(ConnectAckReason::BadAuthenticationMethod), "bad_auth_method"),
        Denied::Unavailable(_) => (Some(ConnectAckReason::ServerUnavailable), "access_unavailable"),
    }
}

/// For authenticating again (4.12.1), while everything else goes on.
pub struct Again<'b> {
    pub method: Method,
    pub remote: &'b Remote,
    /// Of CONNECT.
    pub username: Option<Box<str>>,
    pub running: Option<Running>,
}

pub struct Running {
    exchange: Box<dyn Exchange>,
    rounds: u32,
    until: Instant,
}

impl Again<'_> {
    /// Takes an AUTH, puts the answer into `out`, changes the client's rights
    /// where it is over. A failure ends the connection.
    pub async fn take(
        &mut self,
        broker: &Broker,
        auth: Auth,
        inbound: &mut Inbound,
        packet_bytes_max: usize,
        out: &mut BytesMut,
    ) -> Result<(), Fault> {
        let session = inbound.session().clone();
        let (running, code) = (self.running.take(), auth.reason_code);
        let data = self.method.data_of(auth)?;
        let rounds = running.as_ref().map_or(0, |running| running.rounds) + 1;
        let until = running.as_ref().map_or(Instant::now() + broker.config.connect_timeout.0, |it| it.until);
        let who = Credentials {
            client_id: &session.client_id,
            username: self.username.as_deref(),
            password: None,
            certificate: self.remote.identity(),
            proof: self.remote.proof(),
            certificates: &self.remote.certificates,
            ip: self.remote.address.ip(),
            entrance: &self.remote.entrance,
            allow_anonymous: false,
        };
        let step = async {
            match (running, code) {
                (None, AuthReasonCode::ReAuth) => {
                    Ok(broker.access.begin(&self.method.name, &data, &who).await)
                }
                (Some(running), AuthReasonCode::ContinueAuth) => Ok(running.exchange.answer(&data).await),
                _ => Err(OUT_OF_TURN),
            }
        };
        let step = timeout_at(until, step).await.unwrap_or(Ok(Err(Denied::NotAuthorized)))?;
        let failed = || failed(broker, &session.client_id);
        let step = step.map_err(|_| failed())?;
        let too_large =
            Fault { code: DisconnectReasonCode::PacketTooLarge, what: "AUTH is more than the client takes" };
        let mut put = |code, data| self.method.put(code, data, packet_bytes_max, out).ok_or(too_large);
        match step {
            Step::Ask { .. } if rounds > ROUNDS_MAX => Err(failed()),
            Step::Ask { data, exchange } => {
                put(AuthReasonCode::ContinueAuth, data)?;
                self.running = Some(Running { exchange, rounds, until });
                Ok(())
            }
            Step::Done { identity, .. } if identity.name != inbound.rights().identity.name => Err(failed()),
            Step::Done { data, identity } => {
                let mut rights = broker.access.rights(identity, who.client_id, who.proof);
                ask_for_filters(&mut rights, &session).await.map_err(|_| failed())?;
                put(AuthReasonCode::Success, data)?;
                leave_forbidden(broker, &session, &mut rights);
                watch(broker, &mut rights, &session);
                inbound.renew(rights);
                Ok(())
            }
        }
    }
}

/// Has the connection look at its deadline when its rights are taken back.
pub fn watch(broker: &Broker, rights: &mut Admitted, session: &Arc<Session>) {
    let session = session.clone();
    broker.access.watch(rights, move || session.wake.notify_one());
}

/// When what runs must be over, or the client is known no longer.
pub fn deadline(again: Option<&Again<'_>>, rights: &Admitted) -> Option<Instant> {
    if rights.is_revoked() {
        return Some(Instant::now());
    }
    let until = again.and_then(|again| again.running.as_ref()).map(|running| running.until);
    let known_until = rights.identity.valid_until.map(Instant::from_std);
    [until, known_until].into_iter().flatten().min()
}

/// Counted and said to a person; the client is not told whether it was the
/// proof, the user or the time.
pub fn failed(broker: &Broker, client_id: &str) -> Fault {
    broker.failures.report(
        "mqtt: authentication of a connected client failed, ran out or was taken back",
        1,
        &format!("client {client_id}"),
        "",
    );
    Fault { code: DisconnectReasonCode::NotAuthorized, what: "authentication failed or ran out" }
}
