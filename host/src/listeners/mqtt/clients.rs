//! The clients as an operator sees them, and how one is sent away.

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

/// What is known of a client that is connected, or whose session waits for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Client {
    pub client_id: String,
    pub connection: Option<Connection>,
    /// Seconds that the session is kept without its client; `None`: for ever.
    pub session_expiry_s: Option<u32>,
    /// When the last connection ended, microseconds since 1970, UTC; `None` while there is one.
    pub disconnected_us: Option<u64>,
    pub subscriptions: usize,
    /// Messages that wait to be sent, and their bytes, in memory or in their streams.
    pub queued: usize,
    pub queued_bytes: usize,
    /// Sent and not acknowledged.
    pub in_flight: usize,
    /// Bytes of memory that the session's filters and queue take.
    pub session_bytes: usize,
    /// When bytes last came from the client, microseconds since 1970, UTC; `None` where none came
    /// since the host started.
    pub last_seen_us: Option<u64>,
    pub counts: Counts,
    /// Times that connections with the client id ended each other lately: see `headworks status` for
    /// those of which two devices seem to have one id.
    #[serde(default)]
    pub takeovers: u64,
    /// Its filters; empty in a list.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub filters: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// `3.1`, `3.1.1` or `5.0`.
    pub version: String,
    /// `192.0.2.7:50112`, or what a Unix socket tells.
    pub address: String,
    pub user: Option<String>,
    /// Microseconds since 1970, UTC.
    pub since_us: u64,
    /// 0: off.
    pub keep_alive_s: u16,
}

/// What a session knows of its connection. Each connected client has one, so it holds no text of
/// its own.
#[derive(Clone)]
pub(super) struct Connected {
    pub version: Version,
    pub remote: Arc<Remote>,
    pub user: Option<Arc<str>>,
    /// Microseconds since 1970, UTC.
    pub since_us: u64,
    pub keep_alive_s: u16,
}

impl Connected {
    /// Whether `address` is another host than that of the connection. A client that comes back
    /// from where it was has lost its connection.
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

/// In which order clients are listed: by id, or the greatest first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClientOrder {
    #[default]
    Id,
    Published,
    Delivered,
    Queued,
    /// Messages that the client did not get.
    Missed,
    /// Publishes and filters that were refused.
    Refused,
}

impl ClientOrder {
    /// Returns the number by which clients are put in order, the greatest first.
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

/// Looks at the clients of a running listener.
#[derive(Clone)]
pub struct Clients(pub(super) Arc<Broker>);

impl Clients {
    /// Clients whose id begins with `prefix` and comes behind `after`: how many there are, and the
    /// first `max`.
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

    /// Brings the gauges up to date that count over all sessions.
    pub fn measure(&self) {
        self.0.measure();
    }

    /// Returns the client that was refused last for this cause.
    pub fn last_refused(&self, cause: &str) -> Option<RefusedClient> {
        self.0.refused_clients.last_of(cause)
    }

    /// Returns the client ids that several devices seem to have, the most contended first.
    pub fn contended(&self) -> Vec<ContendedId> {
        self.0.takeovers.contended(Instant::now())
    }

    /// Returns how many entries the list of refused clients has, and its newest `max`.
    pub fn refused(&self, max: usize) -> (usize, Vec<RefusedClient>) {
        self.0.refused_clients.newest(max)
    }

    /// Ends the client's connection; its session and its will follow their own
    /// rules. Returns once it has ended, false where it is not connected. Dropped before, it
    /// ends all the same.
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

    /// Ends the client's session, with its connection if it has one: its subscriptions and
    /// what waits for it are gone. Returns once that is durable, false where there is no session.
    /// Dropped before, it goes on.
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
