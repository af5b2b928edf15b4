//! From a listening address to a byte stream and what is known of who is at
//! its other end: TCP or a Unix socket, below TLS, below WebSocket, behind a
//! load balancer that tells the client's address (PROXY protocol).
//!
//! The accept loop waits for no client: each handshake is a task of its own,
//! ends within `connect_timeout`, and holds one of `handshakes_max` places of
//! its listener until CONNECT is answered ([`handshakes`]).

mod authorities;
mod chunks;
pub mod closing;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod handshakes;
mod identity;
mod listen;
pub mod network;
pub(super) mod origin;
mod proxy;
mod reload;
pub(super) mod tls;
mod websocket;

use std::fmt;
use std::future::pending;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::signal::unix::Signal;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_rustls::server::TlsStream;
use tokio_util::task::TaskTracker;

use self::handshakes::{Handshake, Handshakes};
use self::listen::{Listener, Socket};
use self::origin::Origins;
use super::bind::Bind;
use super::config::{Endpoint, WebSocket};
use super::{Broker, Error, connection};
use crate::access::{Entrance, Proof};

pub use self::listen::take;
pub use self::tls::Tls;

/// After an accept that failed, most likely for want of file descriptors.
const ACCEPT_RETRY_AFTER: Duration = Duration::from_millis(100);
/// With all handshakes taken, nothing is accepted for so long before connections are closed.
const HANDSHAKE_WAIT_MAX: Duration = Duration::from_millis(100);

/// Who is at the other end, as far as the transport knows.
#[derive(Clone, Debug)]
pub struct Remote {
    pub address: Address,
    /// The certificate that the client has proved to own.
    pub certificate: Option<Box<Shown>>,
    /// All that it showed with it, DER, its own first; kept where access control looks at them.
    pub certificates: Box<[Box<[u8]>]>,
    pub entrance: Arc<Entrance>,
}

/// What is known of a certificate that a client has shown.
#[derive(Clone, Debug)]
pub struct Shown {
    /// The name in it that `tls.identity` asks for, where it has one that a user may have.
    pub identity: Option<Box<str>>,
    pub proof: Arc<dyn Proof>,
}

impl Remote {
    pub fn identity(&self) -> Option<&str> {
        self.certificate.as_ref()?.identity.as_deref()
    }

    pub fn proof(&self) -> Option<&Arc<dyn Proof>> {
        self.certificate.as_ref().map(|shown| &shown.proof)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Address {
    /// The client's own, also behind a load balancer.
    Ip(SocketAddr),
    /// A process of this machine, by the user that it runs as.
    Unix { uid: Option<u32> },
}

impl Address {
    /// The loopback address for a Unix socket.
    pub fn ip(&self) -> IpAddr {
        match self {
            Self::Ip(address) => address.ip().to_canonical(),
            Self::Unix { .. } => IpAddr::V4(Ipv4Addr::LOCALHOST),
        }
    }

    /// The client runs on this machine.
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

/// What a connection holds of the bounds.
#[derive(Debug)]
pub struct Place {
    _connection: OwnedSemaphorePermit,
    /// Boxed: it is gone for most of a connection's life.
    handshake: Option<Box<Handshake>>,
}

impl Place {
    /// CONNECT is there: it gives way to no other handshake.
    pub fn heard(&self) {
        self.handshake.iter().for_each(|handshake| handshake.heard());
    }

    /// Returns where it is to end for another handshake. Safe to drop.
    pub async fn gives_way(&self) {
        match &self.handshake {
            Some(handshake) => handshake.gives_way().await,
            None => pending().await,
        }
    }

    /// CONNECT is answered: another handshake may begin.
    pub fn handshake_ended(&mut self) {
        self.handshake = None;
    }
}

/// An address that is bound, its certificates read.
pub struct Entry {
    endpoint: Endpoint,
    listener: Listener,
    tls: Option<Arc<Tls>>,
}

impl Entry {
    pub async fn bind(endpoint: &Endpoint) -> Result<Self, Error> {
        let bind = || endpoint.bind.clone();
        let tls = endpoint.tls.clone().map(Tls::load).transpose();
        let tls = tls.map_err(|unusable| Error::Tls { bind: bind(), reason: unusable.reason })?;
        let listener = Listener::bind(endpoint).await.map_err(|error| Error::Bind { bind: bind(), error })?;
        Ok(Self { endpoint: endpoint.clone(), listener, tls: tls.map(Arc::new) })
    }

    /// With the port that was taken.
    pub fn address(&self) -> Bind {
        self.listener.address()
    }

    pub fn tls(&self) -> Option<&Arc<Tls>> {
        self.tls.as_ref()
    }
}

/// Reads certificates again when their files change, until shutdown.
pub async fn keep_certificates(broker: Arc<Broker>, tls: Vec<Arc<Tls>>, hangup: Option<Signal>) {
    reload::run(&broker, &tls, hangup).await;
}

/// Takes connections until shutdown; never waits for one of them.
pub async fn accept(broker: Arc<Broker>, entry: Entry, room: Arc<Semaphore>, tasks: TaskTracker) {
    let Entry { endpoint, listener, tls } = entry;
    let handshakes = Handshakes::new(broker.config.handshakes_max as usize);
    let entrance = Arc::new(entrance(&endpoint));
    let layers = Arc::new(Layers { endpoint, tls });
    let mut shedding = false;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = broker.shutdown.cancelled() => return,
        };
        let (socket, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                broker.failures.report("mqtt: cannot accept connections", 1, &error.to_string(), "");
                tokio::time::sleep(ACCEPT_RETRY_AFTER).await;
                continue;
            }
        };
        broker.counters.sockets.increment(1);
        let Ok(connection) = room.clone().try_acquire_owned() else {
            let kind = "mqtt: connections_max reached, connect refused";
            broker.refused("connections_max", Some(kind), None, &address, &address.to_string());
            continue;
        };
        let mut handshake = handshakes.enter(&address, Instant::now());
        if handshake.is_none() && !shedding {
            let _ = timeout(HANDSHAKE_WAIT_MAX, handshakes.freed()).await;
            handshake = handshakes.enter(&address, Instant::now());
        }
        shedding = handshake.is_none();
        if shedding {
            let kind = "mqtt: handshakes_max reached, connect refused";
            broker.refused("handshakes_max", Some(kind), None, &address, &address.to_string());
            continue;
        }
        let place = Place { _connection: connection, handshake: handshake.map(Box::new) };
        let remote =
            Remote { address, certificate: None, certificates: Box::default(), entrance: entrance.clone() };
        if let (Socket::Tcp(socket), true) = (&socket, layers.is_plain()) {
            // Acks are small and must not wait for the peer's delayed ack.
            let _ = socket.set_nodelay(true);
        }
        match socket {
            Socket::Tcp(socket) if layers.is_plain() => {
                tasks.spawn(connection::serve(broker.clone(), socket, remote, place));
            }
            socket => {
                let served = serve_layered(broker.clone(), layers.clone(), socket, remote, place);
                tasks.spawn(served);
            }
        }
    }
}

/// The numbers are those of `access.connecting` in `wit/plugin.wit`.
fn entrance(endpoint: &Endpoint) -> Entrance {
    let transport = match (&endpoint.bind, &endpoint.websocket, &endpoint.tls) {
        (Bind::Unix(_), ..) => 8,
        (_, None, None) => 1,
        (_, None, Some(_)) => 2,
        (_, Some(_), None) => 3,
        (_, Some(_), Some(_)) => 4,
    };
    let listener = endpoint.bind.to_string();
    Entrance { listener, transport, allow_anonymous: endpoint.allow_anonymous }
}

/// What lies between the socket and MQTT.
struct Layers {
    endpoint: Endpoint,
    tls: Option<Arc<Tls>>,
}

impl Layers {
    fn is_plain(&self) -> bool {
        let Endpoint { proxy_protocol, websocket, .. } = &self.endpoint;
        self.tls.is_none() && websocket.is_none() && proxy_protocol.is_none()
    }
}

/// Why there was no connection; `kind` repeats, `detail` is of this one.
struct Failed {
    cause: &'static str,
    kind: String,
    /// The subject of the client's certificate.
    who: Option<String>,
    detail: String,
}

trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Io for S {}

enum Opened {
    Tcp(TcpStream),
    Unix(tokio::net::UnixStream),
    Tls(Box<TlsStream<TcpStream>>),
    WebSocket(Box<websocket::Bytes<Box<dyn Io>>>),
}

async fn serve_layered(
    broker: Arc<Broker>,
    layers: Arc<Layers>,
    socket: Socket,
    mut remote: Remote,
    place: Place,
) {
    let opened = {
        // Boxed: its buffers are not kept for the connection's life.
        let handshake = Box::pin(layers.handshake(&broker, socket, &mut remote));
        tokio::select! {
            opened = timeout(broker.config.connect_timeout.0, handshake) => opened,
            () = place.gives_way() => return gave_way(&broker, &remote),
            () = broker.shutdown.cancelled() => return,
        }
    };
    match opened {
        Ok(Ok(Opened::Tcp(io))) => connection::serve(broker, io, remote, place).await,
        Ok(Ok(Opened::Unix(io))) => connection::serve(broker, io, remote, place).await,
        Ok(Ok(Opened::Tls(io))) => connection::serve(broker, io, remote, place).await,
        Ok(Ok(Opened::WebSocket(io))) => connection::serve(broker, io, remote, place).await,
        Ok(Err(Failed { cause: cause @ "lost", .. })) => broker.counters.refused_connect(cause),
        Ok(Err(Failed { cause, kind, who, detail })) => {
            let detail = format!("{remote}: {detail}");
            broker.refused(cause, Some(&kind), who.as_deref(), &remote.address, &detail);
        }
        Err(_) => broker.counters.refused_connect("timeout"),
    }
}

/// Counted, and said once in a while: the connection ended for another handshake.
pub fn gave_way(broker: &Broker, remote: &Remote) {
    let kind = "mqtt: handshakes_max reached, the oldest connection without CONNECT closed";
    broker.refused("handshakes_max", Some(kind), None, &remote.address, &remote.to_string());
}

impl Layers {
    async fn handshake(
        &self,
        broker: &Broker,
        socket: Socket,
        remote: &mut Remote,
    ) -> Result<Opened, Failed> {
        let mut socket = match socket {
            Socket::Tcp(socket) => socket,
            Socket::Unix(socket) => {
                let Some(config) = &self.endpoint.websocket else { return Ok(Opened::Unix(socket)) };
                return self.upgrade(broker, config, Box::new(socket)).await;
            }
        };
        let _ = socket.set_nodelay(true);
        if let (Some(config), Address::Ip(balancer)) = (&self.endpoint.proxy_protocol, remote.address) {
            let client = proxy::accept(&mut socket, balancer, config).await?;
            remote.address = Address::Ip(client.unwrap_or(balancer));
        }
        let io = match &self.tls {
            None => Opened::Tcp(socket),
            Some(tls) => {
                let (io, shown) = tls.accept(socket).await?;
                remote.certificate = shown.map(Box::new);
                if broker.access.looks_at_certificates() {
                    remote.certificates = tls::shown(&io);
                }
                Opened::Tls(Box::new(io))
            }
        };
        let Some(config) = &self.endpoint.websocket else { return Ok(io) };
        let io: Box<dyn Io> = match io {
            Opened::Tcp(io) => Box::new(io),
            Opened::Tls(io) => io,
            done => return Ok(done),
        };
        self.upgrade(broker, config, io).await
    }

    async fn upgrade(&self, broker: &Broker, config: &WebSocket, io: Box<dyn Io>) -> Result<Opened, Failed> {
        let origins = Origins { listed: &config.origins, tls: self.tls.is_some() };
        let io = websocket::accept(io, &config.path, origins, config.frame_bytes_max(&broker.config)).await?;
        Ok(Opened::WebSocket(Box::new(io)))
    }
}

impl Failed {
    fn new(cause: &'static str, kind: impl Into<String>, detail: impl fmt::Display) -> Self {
        Self { cause, kind: format!("mqtt: {}", kind.into()), who: None, detail: detail.to_string() }
    }

    /// The client went away, as a scanner or a health check does: counted, not said.
    fn lost(error: &io::Error) -> Self {
        Self::new("lost", "the client left", error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entrance_is_named_as_the_config_writes_it_and_has_its_transport() {
        let tls = || serde_json::from_str(r#"{ "cert": "x.pem", "key": "x.pem" }"#).unwrap();
        let websocket = || Some(serde_json::from_str("{}").unwrap());
        let endpoint = |bind: &str| Endpoint::at(bind.parse().unwrap());
        for (endpoint, transport) in [
            (endpoint("127.0.0.1:0"), 1),
            (Endpoint { tls: tls(), ..endpoint("[::1]:8883") }, 2),
            (Endpoint { websocket: websocket(), ..endpoint("127.0.0.1:80") }, 3),
            (Endpoint { websocket: websocket(), tls: tls(), ..endpoint("127.0.0.1:443") }, 4),
            (endpoint("unix:/run/mqtt.sock"), 8),
        ] {
            let Entrance { listener, transport: found, .. } = entrance(&endpoint);
            assert_eq!((listener, found), (endpoint.bind.to_string(), transport));
        }
    }
}
