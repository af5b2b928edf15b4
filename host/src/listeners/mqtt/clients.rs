//! The operator's view of clients, and the operations on them.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::Broker;
use super::activity::Counts;
use super::clock::Clock;
use super::session::Session;
use super::takeovers::ContendedId;
use super::wire::Version;
use crate::listeners::refused_clients::RefusedClient;
use crate::listeners::transport::{Address, Remote};

/// A client that is connected, or that has a stored session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Client {
    pub client_id: String,
    pub connection: Option<Connection>,
    /// Seconds for which the session is kept while its client is not connected; `None` if it never
    /// expires.
    pub session_expiry_s: Option<u32>,
    /// When the last connection ended, in microseconds since 1970, UTC; `None` while the client is
    /// connected.
    pub disconnected_us: Option<u64>,
    pub subscriptions: usize,
    /// Number of queued messages, and their bytes, in memory or in their streams.
    pub queued: usize,
    pub queued_bytes: usize,
    /// Number of messages that were sent and are not acknowledged.
    pub in_flight: usize,
    /// Bytes of memory of the session's filters and queue.
    pub session_bytes: usize,
    /// When bytes were last received from the client, in microseconds since 1970, UTC; `None` if none
    /// were received since the host started.
    pub last_seen_us: Option<u64>,
    pub counts: Counts,
    /// Number of recent takeovers between connections with this client id. `headworks status` lists ids
    /// that two devices seem to share.
    #[serde(default)]
    pub takeovers: u64,
    /// Filters of the session; empty in a list.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub filters: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// `3.1`, `3.1.1` or `5.0`.
    pub version: String,
    /// Address, such as `192.0.2.7:50112`, or the information that a Unix socket provides.
    pub address: String,
    pub user: Option<String>,
    /// Start of the connection in microseconds since 1970, UTC.
    pub since_us: u64,
    /// Keep alive in seconds; 0 if it is off.
    pub keep_alive_s: u16,
}

/// What a session stores about its connection. Each connected client has one, so it contains no text of
/// its own.
#[derive(Clone)]
pub(super) struct Connected {
    pub version: Version,
    pub remote: Arc<Remote>,
    pub user: Option<Arc<str>>,
    /// Start of the connection in microseconds since 1970, UTC.
    pub since_us: u64,
    pub keep_alive_s: u16,
}

impl Connected {
    /// Returns whether `address` is a different host from that of the connection. A client that connects
    /// again from the same host has lost its connection.
    pub fn is_elsewhere(&self, address: &Address) -> bool {
        self.remote.address.ip() != address.ip()
    }

    fn describe(&self) -> Connection {
        let version = match self.version {
            Version::V31 => "3.1",
            Version::V3 => "3.1.1",
            Version::V5 => "5.0",
        };
        Connection {
            version: version.into(),
            address: self.remote.address.to_string(),
            user: self.user.as_deref().map(Into::into),
            since_us: self.since_us,
            keep_alive_s: self.keep_alive_s,
        }
    }
}

/// Order of a list of clients: by id, or the largest value first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClientOrder {
    #[default]
    Id,
    Published,
    Delivered,
    Queued,
    /// Number of messages that the client did not receive.
    Missed,
    /// Number of refused publishes and filters.
    Refused,
}

impl ClientOrder {
    /// Returns the value by which clients are sorted, the largest first.
    pub fn key(self, client: &Client) -> u64 {
        match self {
            Self::Id => 0,
            Self::Published => client.counts.published,
            Self::Delivered => client.counts.delivered,
            Self::Queued => client.queued as u64,
            Self::Missed => client.counts.missed(),
            Self::Refused => client.counts.refused(),
        }
    }
}

/// Access to the clients of a running listener.
#[derive(Clone)]
pub struct Clients(pub(super) Arc<Broker>);

impl Clients {
    /// Returns the number of clients whose id begins with `prefix` and is greater than `after`, and the
    /// first `max` of them.
    pub fn list(&self, prefix: &str, after: &str, max: usize, order: ClientOrder) -> (usize, Vec<Client>) {
        let mut sessions = self.0.sessions.all();
        let is_asked_for = |id: &str| id.starts_with(prefix) && (after.is_empty() || id > after);
        sessions.retain(|session| is_asked_for(&session.client_id) && session.is_alive());
        sessions.sort_unstable_by(|a, b| a.client_id.cmp(&b.client_id));
        let found = sessions.len();
        if order != ClientOrder::Id {
            // Not all that is known of each is kept meanwhile.
            let key = |session: &Arc<Session>| std::cmp::Reverse(order.key(&session.describe(&self.0.clock)));
            sessions.sort_by_cached_key(key);
        }
        sessions.truncate(max);
        (found, sessions.iter().map(|session| self.describe(session)).collect())
    }

    pub fn show(&self, client_id: &str) -> Option<Client> {
        let session = self.0.sessions.get(client_id).filter(|session| session.is_alive())?;
        let filters = session.filter_list().iter().map(|filter| filter.to_string()).collect();
        Some(Client { filters, ..self.describe(&session) })
    }

    fn describe(&self, session: &Session) -> Client {
        let takeovers = self.0.takeovers.lately(&session.client_id, Instant::now());
        Client { takeovers, ..session.describe(&self.0.clock) }
    }

    /// Updates the gauges that are sums over all sessions.
    pub fn measure(&self) {
        self.0.measure();
    }

    /// Returns the last client that was refused for this cause.
    pub fn last_refused(&self, cause: &str) -> Option<RefusedClient> {
        self.0.refused_clients.last_of(cause)
    }

    /// Returns the client ids that several devices seem to share, the most contended first.
    pub fn contended(&self) -> Vec<ContendedId> {
        self.0.takeovers.contended(Instant::now())
    }

    /// Returns the number of entries in the list of refused clients, and the newest `max` of them.
    pub fn refused(&self, max: usize) -> (usize, Vec<RefusedClient>) {
        self.0.refused_clients.newest(max)
    }

    /// Ends the client's connection; its session and will follow their own rules. Returns when the
    /// connection has ended, with false if the client was not connected. A dropped future ends the
    /// connection all the same.
    pub async fn kick(&self, client_id: &str) -> bool {
        let session = self.0.sessions.get(client_id).filter(|session| session.presence().0.is_some());
        let Some(session) = session else { return false };
        session.kicked.store(true, Ordering::Release);
        session.wake.notify_one();
        loop {
            let ended = self.0.connection_ended.notified();
            // The client's next connection takes the kick back.
            if session.presence().0.is_none() || !session.kicked.load(Ordering::Acquire) {
                return true;
            }
            ended.await;
        }
    }

    /// Ends the client's session and connection, and deletes its subscriptions and queued messages.
    /// Returns when that is durable, with false if there is no session. A dropped future continues.
    pub async fn delete(&self, client_id: &str) -> bool {
        let (broker, client_id) = (self.0.clone(), client_id.to_owned());
        self.0.in_background(async move { broker.sessions.delete(&broker, &client_id).await }).await
    }
}

impl Session {
    fn describe(&self, clock: &Clock) -> Client {
        let filters_bytes = self.filters_memory();
        let outbox = self.outbox();
        let ((queued, queued_bytes, in_flight), dropped) = (outbox.sizes(), outbox.dropped());
        let session_bytes = outbox.size() + filters_bytes;
        drop(outbox);
        let seen_us =
            self.activity().silent_for().map(|ago| super::now_us().saturating_sub(ago.as_micros() as u64));
        let (connection, expiry_s, disconnected_us) = self.presence();
        Client {
            client_id: self.client_id.to_string(),
            disconnected_us: connection.is_none().then(|| clock.to_wall(disconnected_us)),
            connection: connection.map(|connection| connection.describe()),
            session_expiry_s: (expiry_s != super::session::NEVER).then_some(expiry_s),
            subscriptions: self.filters(),
            queued,
            queued_bytes,
            in_flight,
            session_bytes,
            last_seen_us: seen_us,
            counts: Counts { dropped, ..self.activity().counts() },
            takeovers: 0,
            filters: Vec::new(),
        }
    }
}
