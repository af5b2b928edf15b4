//! The layers between a listening address and a listener's protocol: TCP or a Unix socket, optionally
//! with TLS and WebSocket, and behind a load balancer that names the client's address (PROXY protocol).
//!
//! The accept loop does not wait for clients. Each handshake is a task of its own, has a time limit, and
//! holds one of the `handshakes_max` places of its entry until the client's first packet or request is
//! answered ([`handshakes`]).
//!
//! Every listener uses this module as a [`Service`]. The module knows none of their protocols.

mod addresses;
mod authorities;
mod bind;
mod chunks;
pub mod closing;
pub mod config;
mod connections;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod handshakes;
mod identity;
mod listen;
pub mod network;
pub mod origin;
mod proxy;
pub mod reach;
mod reload;
mod service;
mod tls;
pub mod websocket;

use std::fmt;
use std::future::pending;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::time::{interval, timeout};
use tokio_rustls::server::TlsStream;
use tokio_util::task::TaskTracker;

use self::addresses::Gate;
use self::config::Endpoint;
use self::connections::Counted;
use self::handshakes::Handshake;
use self::listen::{Listener, Socket};
use self::origin::Origins;
use self::reach::Reach;
use self::tls::Tls;
use crate::access::{Entrance, Proof};

pub use self::addresses::{AddressChanges, Addresses, Closing, HandshakePlaces};
pub use self::bind::{Bind, SocketMode};
pub use self::connections::Connections;
pub use self::handshakes::Handshakes;
pub use self::network::Network;
pub use self::service::{Io, Service};

/// Pause after a failed accept, which most likely found no free file descriptor.
const ACCEPT_RETRY_AFTER: Duration = Duration::from_millis(100);
/// Interval between two checks whether clients can reach the socket.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// If all handshakes are taken, how long nothing is accepted before connections are closed.
const HANDSHAKE_WAIT_MAX: Duration = Duration::from_millis(100);

/// The client of a connection, as far as the transport knows it.
#[derive(Clone, Debug)]
pub struct Remote {
    pub address: Address,
    /// The certificate whose possession the client has proved.
    pub certificate: Option<Box<Shown>>,
    /// Boxed: most connections have none of it.
    tls: Option<Box<Handshaken>>,
    pub entrance: Arc<Entrance>,
    /// Whether the address of the listener is closed, which ends the connection.
    pub closing: Arc<Closing>,
}

/// What is known about a certificate that a client presented.
#[derive(Clone, Debug)]
pub struct Shown {
    /// The name in the certificate that `tls.identity` selects, if it has one that a user may have.
    pub identity: Option<Box<str>>,
    pub proof: Arc<dyn Proof>,
}

/// What else a TLS handshake has brought.
#[derive(Clone, Debug)]
struct Handshaken {
    /// All certificates that the client showed, DER, its own first; kept where access control looks at them.
    certificates: Box<[Box<[u8]>]>,
    /// The protocol that both sides agreed on (ALPN, RFC 7301).
    protocol: Option<Box<[u8]>>,
}

impl Remote {
    /// Returns all certificates that the client showed, DER, its own first. Empty where access control looks
    /// at none.
    pub fn certificates(&self) -> &[Box<[u8]>] {
        self.tls.as_ref().map_or(&[], |tls| &tls.certificates)
    }

    /// Returns the protocol that TLS has agreed on (ALPN, RFC 7301).
    pub fn protocol(&self) -> Option<&[u8]> {
        self.tls.as_ref()?.protocol.as_deref()
    }

    pub fn identity(&self) -> Option<&str> {
        self.certificate.as_ref()?.identity.as_deref()
    }

    pub fn proof(&self) -> Option<&Arc<dyn Proof>> {
        self.certificate.as_ref().map(|shown| &shown.proof)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Address {
    /// Address of the client itself, even behind a load balancer.
    Ip(SocketAddr),
    /// A process of this machine, with the user id of the process.
    Unix { uid: Option<u32> },
}

impl Address {
    /// Returns the IP address; the loopback address for a Unix socket.
    pub fn ip(&self) -> IpAddr {
        match self {
            Self::Ip(address) => address.ip().to_canonical(),
            Self::Unix { .. } => IpAddr::V4(Ipv4Addr::LOCALHOST),
        }
    }

    /// Returns whether the client runs on this machine.
    pub fn is_local(&self) -> bool {
        match self {
            Self::Ip(address) => address.ip().to_canonical().is_loopback(),
            Self::Unix { .. } => true,
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Unix { uid: Some(uid) } => write!(f, "unix socket, uid {uid}"),
            Self::Unix { uid: None } => f.write_str("unix socket"),
        }
    }
}

impl fmt::Display for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address.fmt(f)?;
        match self.identity() {
            Some(identity) => write!(f, " (certificate of {})", identity.escape_debug()),
            None => Ok(()),
        }
    }
}

/// The places that a connection holds.
#[derive(Debug)]
pub struct Place {
    _connection: Counted,
    /// Place of the handshake. It is boxed because it is empty for most of a connection's life.
    handshake: Option<Box<Handshake>>,
}

impl Place {
    /// Records that the client has sent something. The connection gives way to no other handshake from
    /// now on.
    pub fn heard(&self) {
        self.handshake.iter().for_each(|handshake| handshake.heard());
    }

    /// Records that the client is awaited again, so that the connection gives way to others. This is for
    /// listeners that keep the place as long as the connection.
    pub fn waits_again(&self) {
        self.handshake.iter().for_each(|handshake| handshake.waits_again(Instant::now()));
    }

    /// Waits until the connection must end for another handshake. Cancel safe.
    pub async fn gives_way(&self) {
        match &self.handshake {
            Some(handshake) => handshake.gives_way().await,
            None => pending().await,
        }
    }

    /// Frees the place of the handshake, when the client is admitted or refused.
    pub fn handshake_ended(&mut self) {
        self.handshake = None;
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot listen on {bind}: {error}; {}", crate::listeners::bind_advice(error))]
    Bind { bind: Bind, error: io::Error },
    #[error(
        "cannot listen on {bind} while this host listens on {with}, which the reload would close; restart it"
    )]
    Overlaps { bind: Bind, with: Bind },
    #[error("tls of {bind}: {reason}")]
    Tls { bind: Bind, reason: String },
}

/// What is to be served on an address.
#[derive(Clone, PartialEq, Eq)]
pub struct Plan {
    pub endpoint: Endpoint,
    pub websocket: Option<websocket::Settings>,
    /// Protocols that TLS offers (ALPN, RFC 7301), the preferred one first.
    pub protocols: &'static [&'static [u8]],
    /// Number of the transport in the plugin contract: see `access.connecting` in `wit/plugin.wit`.
    pub transport: u32,
}

impl Plan {
    fn load_tls(&self) -> Result<Option<Arc<Tls>>, Error> {
        let bind = || self.endpoint.bind.clone();
        let tls = self.endpoint.tls.clone().map(|files| Tls::load_for(files, self.protocols)).transpose();
        let tls = tls.map_err(|unusable| Error::Tls { bind: bind(), reason: unusable.reason })?;
        Ok(tls.map(Arc::new))
    }
}

/// A bound address, with its certificates loaded.
pub struct Entry {
    plan: Plan,
    listener: Listener,
    tls: Option<Arc<Tls>>,
}

impl Entry {
    pub async fn bind(plan: Plan) -> Result<Self, Error> {
        let tls = plan.load_tls()?;
        let listener = Listener::bind(&plan.endpoint).await;
        let listener = listener.map_err(|error| Error::Bind { bind: plan.endpoint.bind.clone(), error })?;
        Ok(Self { plan, listener, tls })
    }
}

/// Fails if an address is in use. Does not listen on it.
pub fn try_address(bind: &Bind) -> Result<(), Error> {
    match bind.tcp().map(listen::take) {
        Some(Err(error)) => Err(Error::Bind { bind: bind.clone(), error }),
        _ => Ok(()),
    }
}

/// Accepts connections until shutdown, or until the address is closed. Does not wait for any of them.
async fn accept<S: Service>(
    service: Arc<S>,
    mut listener: Listener,
    gate: Arc<Gate>,
    connections: Arc<Connections>,
    tasks: TaskTracker,
) {
    let mut reach = Reach::new(service.failures(), listener.address());
    let mut looks = interval(LOOK_EVERY);
    let Gate { closing, handshakes, .. } = &*gate;
    let name = S::NAME;
    let mut shedding = false;
    loop {
        let accepted = tokio::select! {
            biased;
            () = service.shutdown().cancelled() => return,
            () = closing.closed() => return,
            accepted = listener.accept() => accepted,
            // Nobody waits to be accepted: the kernel had a file descriptor for whoever did.
            _ = looks.tick() => {
                reach.note(listener.put_back(&gate.layers().plan.endpoint).await);
                continue;
            }
        };
        let (socket, address) = match accepted {
            Ok(accepted) => accepted,
            // Of this connection alone.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) => {
                let kind = format!("{name}: cannot accept connections");
                service.failures().report(&kind, 1, &error.to_string(), "");
                reach.refused(&error);
                tokio::time::sleep(ACCEPT_RETRY_AFTER).await;
                continue;
            }
        };
        reach.accepted();
        service.accepted();
        let Some(connection) = connections.enter() else {
            let kind = format!("{name}: connections_max reached, connect refused");
            service.refused("connections_max", &kind, None, &address, &address.to_string());
            continue;
        };
        let mut handshake = handshakes.enter(&address, Instant::now());
        if handshake.is_none() && !shedding {
            let _ = timeout(HANDSHAKE_WAIT_MAX, handshakes.freed()).await;
            handshake = handshakes.enter(&address, Instant::now());
        }
        shedding = handshake.is_none();
        if shedding {
            let kind = format!("{name}: handshakes_max reached, connect refused");
            service.refused("handshakes_max", &kind, None, &address, &address.to_string());
            continue;
        }
        let place = Place { _connection: connection, handshake: handshake.map(Box::new) };
        let layers = gate.layers();
        let (entrance, closing) = (layers.entrance.clone(), closing.clone());
        let remote = Remote { address, certificate: None, tls: None, entrance, closing };
        if let (Socket::Tcp(socket), true) = (&socket, layers.is_plain()) {
            // Acks are small and must not wait for the peer's delayed ack.
            let _ = socket.set_nodelay(true);
        }
        match socket {
            Socket::Tcp(socket) if layers.is_plain() => {
                tasks.spawn(service.clone().serve(socket, remote, place));
            }
            socket => {
                let served = serve_layered(service.clone(), layers.clone(), socket, remote, place);
                tasks.spawn(served);
            }
        }
    }
}

/// The layers between the socket and the listener's protocol.
struct Layers {
    plan: Plan,
    tls: Option<Arc<Tls>>,
    entrance: Arc<Entrance>,
}

impl Layers {
    fn new(plan: Plan, tls: Option<Arc<Tls>>) -> Self {
        let Endpoint { bind, allow_anonymous, .. } = &plan.endpoint;
        let entrance = Arc::new(Entrance::new(bind.to_string(), plan.transport, *allow_anonymous));
        Self { plan, tls, entrance }
    }

    /// Returns the layers of another plan for the same address. Certificates from the same files are kept.
    fn succeeded_by(&self, plan: Plan) -> Result<Self, Error> {
        let is_same = plan.endpoint.tls == self.plan.endpoint.tls;
        let tls = if is_same { self.tls.clone() } else { plan.load_tls()? };
        let entrance = Arc::new(self.entrance.by(plan.transport));
        Ok(Self { plan, tls, entrance })
    }

    fn is_plain(&self) -> bool {
        self.tls.is_none() && self.plan.websocket.is_none() && self.plan.endpoint.proxy_protocol.is_none()
    }
}

/// Why a connection failed. `kind` is the same for similar failures, `detail` describes this one.
struct Failed {
    cause: &'static str,
    kind: String,
    /// The subject of the client's certificate.
    who: Option<String>,
    detail: String,
}

enum Opened {
    Tcp(TcpStream),
    Unix(tokio::net::UnixStream),
    Tls(Box<TlsStream<TcpStream>>),
    WebSocket(Box<websocket::Bytes<Box<dyn Io>>>),
}

async fn serve_layered<S: Service>(
    service: Arc<S>,
    layers: Arc<Layers>,
    socket: Socket,
    mut remote: Remote,
    place: Place,
) {
    let closing = remote.closing.clone();
    let opened = {
        // Boxed: its buffers are not kept for the connection's life.
        let handshake = Box::pin(layers.handshake(&*service, socket, &mut remote));
        tokio::select! {
            opened = timeout(service.handshake_timeout(), handshake) => opened,
            () = place.gives_way() => return gave_way(&*service, &remote),
            () = service.shutdown().cancelled() => return,
            () = closing.closed() => return,
        }
    };
    match opened {
        Ok(Ok(Opened::Tcp(io))) => service.serve(io, remote, place).await,
        Ok(Ok(Opened::Unix(io))) => service.serve(io, remote, place).await,
        Ok(Ok(Opened::Tls(io))) => service.serve(io, remote, place).await,
        Ok(Ok(Opened::WebSocket(io))) => service.serve(io, remote, place).await,
        Ok(Err(Failed { cause: cause @ "lost", .. })) => service.lost(cause),
        Ok(Err(Failed { cause, kind, who, detail })) => {
            let (kind, detail) = (format!("{}: {kind}", S::NAME), format!("{remote}: {detail}"));
            service.refused(cause, &kind, who.as_deref(), &remote.address, &detail);
        }
        Err(_) => service.lost("timeout"),
    }
}

/// Counts and reports a connection that ended for another handshake.
pub fn gave_way<S: Service>(service: &S, remote: &Remote) {
    let (name, greeting) = (S::NAME, S::GREETING);
    let kind = format!("{name}: handshakes_max reached, the oldest connection without {greeting} closed");
    service.refused("handshakes_max", &kind, None, &remote.address, &remote.to_string());
}

impl Layers {
    async fn handshake<S: Service>(
        &self,
        service: &S,
        socket: Socket,
        remote: &mut Remote,
    ) -> Result<Opened, Failed> {
        let mut socket = match socket {
            Socket::Tcp(socket) => socket,
            Socket::Unix(socket) => {
                let Some(settings) = &self.plan.websocket else { return Ok(Opened::Unix(socket)) };
                return self.upgrade(settings, Box::new(socket)).await;
            }
        };
        let _ = socket.set_nodelay(true);
        if let (Some(config), Address::Ip(balancer)) = (&self.plan.endpoint.proxy_protocol, remote.address) {
            let client = proxy::accept(&mut socket, balancer, config).await?;
            remote.address = Address::Ip(client.unwrap_or(balancer));
        }
        let io = match &self.tls {
            None => Opened::Tcp(socket),
            Some(tls) => {
                let (io, shown) = tls.accept(socket).await?;
                remote.certificate = shown.map(Box::new);
                let certificates = match service.looks_at_certificates() {
                    true => tls::shown(&io),
                    false => Box::default(),
                };
                let protocol = io.get_ref().1.alpn_protocol().map(Into::into);
                if protocol.is_some() || !certificates.is_empty() {
                    remote.tls = Some(Box::new(Handshaken { certificates, protocol }));
                }
                Opened::Tls(Box::new(io))
            }
        };
        let Some(settings) = &self.plan.websocket else { return Ok(io) };
        let io: Box<dyn Io> = match io {
            Opened::Tcp(io) => Box::new(io),
            Opened::Tls(io) => io,
            done => return Ok(done),
        };
        self.upgrade(settings, io).await
    }

    async fn upgrade(&self, settings: &websocket::Settings, io: Box<dyn Io>) -> Result<Opened, Failed> {
        let origins = Origins { listed: &settings.origins, tls: self.tls.is_some() };
        let io = websocket::accept(io, settings, origins).await?;
        Ok(Opened::WebSocket(Box::new(io)))
    }
}

impl Failed {
    fn new(cause: &'static str, kind: impl Into<String>, detail: impl fmt::Display) -> Self {
        Self { cause, kind: kind.into(), who: None, detail: detail.to_string() }
    }

    /// Returns the failure of a client that went away, as scanners and health checks do. It is counted,
    /// but not logged.
    fn lost(error: &io::Error) -> Self {
        Self::new("lost", "the client left", error)
    }
}
