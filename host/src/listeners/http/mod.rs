//! HTTP/1.1 and HTTP/2 for devices and gateways that post their messages: one (`POST /messages/TOPIC`,
//! the body is the payload) or many (`POST /batch`).
//!
//! An answer of 2xx means that the messages are durable, as an MQTT acknowledgement does. Who may post is
//! said by the access control of the MQTT listener ([`credentials`]); from there on a message goes the way
//! that all listeners share ([`crate::ingest`]). A request that is sent again with its `Idempotency-Key`
//! appends nothing ([`idempotency`]).

mod answer;
#[cfg(not(any(test, fuzzing)))]
mod batch;
#[cfg(any(test, fuzzing))]
pub(crate) mod batch;
mod body;
mod clients;
mod config;
mod connection;
mod credentials;
mod http2;
mod idempotency;
mod metrics;
mod reload;
mod request;
mod requests;
mod store;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::idempotency::Idempotency;
use self::metrics::Counters;
use super::permits::Permits;
use super::refused_clients::RefusedClients;
use super::transport::config::Endpoint;
use super::transport::{
    self, Address, Addresses, Bind, Connections, Entry, HandshakePlaces, Handshakes, Io, Place, Plan, Remote,
    Service,
};
use crate::access;
use crate::hints::Hint;
use crate::ingest::Ingest;
use crate::telemetry::Failures;

pub use self::config::Config;
pub use self::metrics::METRICS;
pub use self::reload::Prepared;

/// Protocols that TLS offers, the best first (RFC 7301).
const ALPN: &[&[u8]] = &[http2::ALPN, connection::ALPN];
/// HTTP's number in the plugin contract.
const TRANSPORT: u32 = 5;
/// Connections that have been told to give way and have not ended yet, beside `connections_max`.
pub const GIVING_WAY_MAX: usize = 64;
/// Between two looks for idempotency keys whose time is over.
const SWEEP_EVERY: Duration = Duration::from_secs(10);
/// A shutdown waits so long for connections: one that is left loses nothing that was acknowledged.
const JOIN_MAX: Duration = Duration::from_secs(10);

/// What the listener stands on.
pub struct Deps {
    pub ingest: Arc<Ingest>,
    /// That of the MQTT listener.
    pub access: Arc<access::Current>,
    pub refused_clients: Arc<RefusedClients>,
    pub failures: Failures,
    pub shutdown: CancellationToken,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("http.listeners: {0}")]
    Listen(#[from] transport::Error),
}

/// What all connections share.
pub struct Http {
    /// The configuration in force. A connection keeps that of its beginning.
    config: watch::Sender<Arc<Config>>,
    ingest: Arc<Ingest>,
    access: Arc<access::Current>,
    refused_clients: Arc<RefusedClients>,
    idempotency: Idempotency,
    /// Permits to hold bodies in memory.
    bodies: Arc<Permits>,
    /// KiB that clients of HTTP/2 may send of bodies that have no permit yet.
    windows: Arc<Semaphore>,
    /// Requests under way beside the first of each connection.
    further_requests: Arc<Semaphore>,
    /// Connections, and their requests where these are tasks.
    tasks: TaskTracker,
    failures: Failures,
    shutdown: CancellationToken,
    counters: Counters,
}

/// A running listener; ends after its shutdown token is cancelled.
pub struct Handle {
    addresses: Arc<Addresses<Http>>,
    tasks: TaskTracker,
    http: Arc<Http>,
}

impl Handle {
    /// Returns the addresses in the order of the configuration, with the ports that were taken.
    pub fn addresses(&self) -> Vec<Bind> {
        self.addresses.bound()
    }

    /// Returns when every connection has ended, or after [`JOIN_MAX`].
    pub async fn join(self) {
        let ended = async {
            self.tasks.close();
            self.tasks.wait().await;
        };
        if tokio::time::timeout(JOIN_MAX, ended).await.is_err() {
            tracing::warn!(
                connections = self.tasks.len(),
                "http: some connections have not ended, going on without them"
            );
        }
    }
}

/// Fails where an address is taken, without listening at it.
pub fn try_addresses(config: &Config) -> Result<(), Error> {
    Ok(config.listeners.iter().try_for_each(|endpoint| transport::try_address(&endpoint.bind))?)
}

/// Reads the keys of requests, binds, serves.
pub async fn start(config: &Config, deps: Deps) -> Result<Handle, Error> {
    let Deps { ingest, access, refused_clients, failures, shutdown } = deps;
    let mut entries = Vec::new();
    for endpoint in &config.listeners {
        entries.push(Entry::bind(plan(endpoint)).await?);
    }
    let (window, keys_max) = (config.idempotency_window.0, config.idempotency_keys_max as usize);
    let idempotency = Idempotency::load(&ingest, window, keys_max, request::now_us(), metrics::idempotency());
    let tasks = TaskTracker::new();
    let http = Arc::new(Http {
        idempotency,
        bodies: Permits::new(config.partial_bodies_bytes_max.0),
        windows: http2::windows(config.partial_bodies_bytes_max.0),
        further_requests: Arc::new(Semaphore::new(requests::FURTHER_MAX)),
        tasks: tasks.clone(),
        config: watch::Sender::new(Arc::new(config.clone())),
        ingest,
        access,
        refused_clients,
        failures,
        shutdown,
        counters: Counters::new(),
    });
    tasks.spawn(keep_house(http.clone()));
    config.listeners.iter().for_each(|endpoint| http.warn_of_strangers(endpoint));
    let hangup = signal(SignalKind::hangup()).ok();
    let (connections, places) = handshake_places(config);
    // Shared by all addresses: a connection keeps its place, and gives way whenever it asks nothing.
    let handshakes = HandshakePlaces::Shared(Handshakes::new(places));
    let connections = Connections::new(connections);
    let addresses = Addresses::serve(http.clone(), entries, connections, handshakes, (tasks.clone(), hangup));
    Ok(Handle { addresses: Arc::new(addresses), tasks, http })
}

/// Returns what is served on an address.
fn plan(endpoint: &Endpoint) -> Plan {
    Plan { endpoint: endpoint.clone(), websocket: None, protocols: ALPN, transport: TRANSPORT }
}

/// Returns the number of connections, with those that give way, and of places for them.
fn handshake_places(config: &Config) -> (usize, usize) {
    let places = config.connections_max as usize;
    (places + GIVING_WAY_MAX, places)
}

impl Http {
    /// Returns the configuration in force.
    fn config(&self) -> Arc<Config> {
        self.config.borrow().clone()
    }

    /// Warns of an address that serves whoever reaches it.
    fn warn_of_strangers(&self, endpoint: &Endpoint) {
        let bind = &endpoint.bind;
        if !endpoint.is_local() && endpoint.allow_anonymous && !self.access.get().is_checked() {
            tracing::warn!(%bind, "http: anyone who can reach this address may post messages (allow_anonymous)");
        }
    }
}

/// Forgets keys of requests whose time is over.
async fn keep_house(http: Arc<Http>) {
    while http.shutdown.run_until_cancelled(tokio::time::sleep(SWEEP_EVERY)).await.is_some() {
        http.idempotency.remove_old(&http.ingest);
    }
}

impl Service for Http {
    const NAME: &'static str = "http";
    const GREETING: &'static str = "a request";

    fn failures(&self) -> &Failures {
        &self.failures
    }

    fn shutdown(&self) -> &CancellationToken {
        &self.shutdown
    }

    fn handshake_timeout(&self) -> Duration {
        self.config().request_timeout.0
    }

    fn looks_at_certificates(&self) -> bool {
        self.access.get().looks_at_certificates()
    }

    fn accepted(&self) {
        self.counters.sockets.increment(1);
    }

    fn lost(&self, cause: &'static str) {
        self.counters.refused_connect(cause);
    }

    fn refused(&self, cause: &'static str, kind: &str, who: Option<&str>, address: &Address, detail: &str) {
        self.counters.refused_connect(cause);
        let ip = address.ip();
        let subject = who.map_or_else(|| ip.to_string(), str::to_owned);
        self.failures.report_client(kind, &subject, 1, detail, &self.failures.hint(Hint::ClientsRefused));
        self.refused_clients.add(cause, who, ip, detail);
    }

    fn certificates_changed(&self, outcome: &'static str) {
        self.counters.tls_reload(outcome);
        if outcome == "taken" {
            self.access.get().recheck();
        }
    }

    fn show_certificate(&self, file: &Path, seconds_left: f64) {
        let file = file.display().to_string();
        ::metrics::gauge!("headworks_http_certificate_seconds_left", "file" => file).set(seconds_left);
    }

    fn show_revocation_list(&self, file: &Path, seconds_left: f64) {
        let file = file.display().to_string();
        ::metrics::gauge!("headworks_http_revocation_list_seconds_left", "file" => file).set(seconds_left);
    }

    fn serve<I: Io>(self: Arc<Self>, io: I, remote: Remote, place: Place) -> impl Future<Output = ()> + Send {
        connection::serve(self, io, remote, place)
    }
}
