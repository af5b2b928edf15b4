//! The MQTT listener: MQTT 3.1.1 and 5.0 on the same port.
//!
//! Publishes go from the socket's read buffer into their stream, with one append for each read
//! ([`inbound`]). Their acknowledgements are sent when the stream is durable ([`acks`]). Subscribers
//! receive messages from the durable tails of the streams ([`fanout`]). [`crate::access`] authenticates
//! clients and decides about each topic; [`handshake`] calls it first. Sessions and QoS 2 packet ids are
//! state of the streams ([`session`]), and so are retained messages ([`retained`]), wills ([`will`]),
//! and how far the queue of each session ([`outbound`]) has come.

mod acks;
mod activity;
mod aliases;
mod auth;
mod blobs;
mod caution;
mod clients;
mod clock;
mod config;
mod connection;
mod copies;
mod engines;
mod fanout;
mod filter_map;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod handshake;
mod inbound;
mod lineages;
mod lock_order;
mod metrics;
mod open_ids;
mod outbound;
mod owner;
mod picks;
mod refused;
mod reload;
mod retained;
mod service;
mod session;
mod subscriptions;
mod sys;
mod takeovers;
#[cfg(test)]
mod tests;
mod will;
mod wire;

use std::future::pending;
use std::panic::resume_unwind;
use std::slice;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ring::rand::SecureRandom;
use tokio::runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::acks::Stopped;
use self::clock::Clock;
use self::copies::Copies;
use self::engines::Engines;
use self::fanout::{Live, Subscription};
use self::lineages::Lineages;
use self::lock_order::{Locked, Rank, in_order};
use self::metrics::{Counters, Measured};
use self::outbound::QueueLimits;
use self::retained::Retained;
use self::session::{Change, LoadedSessions, Sessions};
use self::sys::Sys;
use self::takeovers::Takeovers;
use self::will::Wills;
use crate::access::{self, Access};
use crate::hints::Hint;
use crate::ingest::Ingest;
use crate::listeners::permits::Permits;
use crate::listeners::refused_clients::RefusedClients;
use crate::listeners::transport::{self, Address, Addresses, Bind, Connections, Entry, HandshakePlaces};
use crate::room::Room;
use crate::stream::log::STATE_BYTES_MAX;
use crate::stream::{AppendError, Identity, StateChange, Stream, Ticket};
use crate::telemetry::{Failures, memory_bytes};
use crate::threads::{LONG_TURN, SHORT_TURN, in_turns};
use crate::units::{ByteSize, Period};

pub use self::activity::Counts;
pub use self::clients::{Client, ClientOrder, Clients};
pub use self::clock::{Source as ClockSource, system as system_clock};
pub use self::config::{Config, Endpoint};
pub use self::copies::READER;
pub use self::engines::MakeEngine;
pub use self::metrics::METRICS;
pub use self::reload::Prepared;
pub use self::takeovers::ContendedId;

/// Key in the state of the broker's stream.
const ACCESS_SECRET: &[u8] = b"ac";
/// Bytes of the broker's stream state that new sessions and subscriptions must leave free for the
/// delivery records of existing ones.
const STATE_ROOM_BYTES: usize = 8 << 20;
/// Bytes of filters that one session may have in the second half of that state.
const STATE_SHARE_BYTES: usize = 16 << 10;
/// Assumed memory of the host if the system does not report it.
const UNKNOWN_MEMORY_BYTES: u64 = 1 << 30;
/// Packets up to this size are copied into the broker's stream, whatever `max_packet_size` was at the start:
/// it has the default commit buffer at least.
const PACKET_BYTES_LEAST: ByteSize = ByteSize::mib(15);
/// Divisor for the part of the memory of all queues that is lent in turn to messages which a client
/// needs to make progress and for which there is no other memory.
const PERMITS_PART: usize = 8;
/// Interval of checks of the files of users and keys.
const ACCESS_LOOK_EVERY: Duration = Duration::from_secs(1);
/// Interval of checks for expired sessions.
const SWEEP_EVERY: Duration = Duration::from_secs(10);
/// Number of those checks after which the clock is saved.
const SWEEPS_PER_SAVED_CLOCK: u64 = 360;

/// How long a shutdown waits for connections. A connection that is left loses nothing that was
/// acknowledged.
const JOIN_MAX: Duration = Duration::from_secs(10);

/// Dependencies of the listener.
pub struct Deps {
    pub ingest: Arc<Ingest>,
    /// Stream for the broker's own durable state, and for copies of messages that wait for sessions.
    pub broker: Arc<dyn Stream>,
    pub failures: Failures,
    /// Makes the engine for access plugins, once one is configured. `None`: plugins cannot be run.
    pub access_plugins: Option<MakeEngine>,
    /// Runtime with a lower priority than that of the connections: see [`Broker::in_background`].
    pub background: runtime::Handle,
    pub clock: ClockSource,
    pub shutdown: CancellationToken,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("mqtt.listeners: {0}")]
    Listen(#[from] transport::Error),
    #[error("mqtt.access: {0}")]
    Access(String),
    #[error("mqtt: cannot read what waits for sessions in the broker's stream: {0}")]
    Copies(Arc<str>),
}

/// A running listener. It ends after its shutdown token is cancelled.
pub struct Handle {
    addresses: Arc<Addresses<Broker>>,
    tasks: TaskTracker,
    clients: Clients,
}

impl Handle {
    /// Returns the bound addresses with their actual ports, in the order of the configuration.
    pub fn addresses(&self) -> Vec<Bind> {
        self.addresses.bound()
    }

    pub fn clients(&self) -> Clients {
        self.clients.clone()
    }

    /// Returns access control for the other listeners, because a user has one set of rights and limits.
    pub fn access(&self) -> Arc<access::Current> {
        self.clients.0.access.clone()
    }

    /// Returns the list of refused clients, which all listeners share.
    pub fn refused_clients(&self) -> Arc<RefusedClients> {
        self.clients.0.refused_clients.clone()
    }

    /// Waits until every connection has ended, for at most [`JOIN_MAX`].
    pub async fn join(self) {
        let ended = async {
            self.tasks.close();
            self.tasks.wait().await;
        };
        if tokio::time::timeout(JOIN_MAX, ended).await.is_err() {
            tracing::warn!(
                connections = self.tasks.len(),
                "mqtt: some connections have not ended, going on without them"
            );
        }
        self.clients.0.sessions.note_all(&self.clients.0);
    }
}

/// Loads the sessions, binds the addresses, and begins to serve.
pub async fn start(config: &Config, mut deps: Deps) -> Result<Handle, Error> {
    // Before anything that may need room in the broker's stream.
    let mut lineages = Lineages::read(&*deps.broker, deps.ingest.streams());
    for told in lineages.other_logs() {
        tracing::error!(part = told.part, "{}; {}", told.cause, told.advice);
        deps.failures.stands(told.clone());
    }
    let copies = Copies::new(&deps, config.queue_copies_bytes_max.0, &mut lineages);
    copies.load(&mut lineages).await.map_err(Error::Copies)?;
    let secret = match &config.access {
        Some(_) => access_secret(&*deps.broker).await?,
        None => Default::default(),
    };
    let engines = Engines::new(deps.access_plugins.take());
    let engine = engines.for_config(config.access.as_ref()).map_err(Error::Access)?;
    let access_deps = access::Deps {
        secret: &secret,
        plugins: engine.as_ref(),
        wait_max: config.connect_timeout.0,
        failures: &deps.failures,
    };
    let access = Access::open(config.access.as_ref(), &config.limits, &access_deps);
    let access = access.map_err(Error::Access)?;

    // Once who gets in is known: from here on connections wait until they are accepted.
    let mut entries = Vec::new();
    for endpoint in &config.listeners {
        entries.push(Entry::bind(service::plan(endpoint, config)).await?);
        reload::warn_of_strangers(endpoint, config);
    }

    let broker = Broker::new(config, (access, engines), copies, lineages, deps);
    // Before the streams grow past what the records say of them.
    while let Err(AppendError::Full) = broker.renew_records() {
        broker.broker.writable().await;
    }
    let tasks = TaskTracker::new();
    for number in 0..broker.streams.len() {
        tasks.spawn_on(in_turns(LONG_TURN, fanout::run(broker.clone(), number)), &broker.background);
        tasks.spawn_on(in_turns(LONG_TURN, fanout::catch_up(broker.clone(), number)), &broker.background);
    }
    for number in 0..=broker.streams.len() {
        tasks.spawn_on(in_turns(SHORT_TURN, copies::run(broker.clone(), number)), &broker.background);
    }
    tasks.spawn_on(in_turns(SHORT_TURN, keep_house(broker.clone())), &broker.background);
    tasks.spawn_on(in_turns(SHORT_TURN, will::publish_waiting(broker.clone())), &broker.background);
    tasks.spawn_on(in_turns(SHORT_TURN, sys::run(broker.clone())), &broker.background);
    // Taken also where there is nothing to read again: by default it ends a process.
    let hangup = signal(SignalKind::hangup()).ok();
    tasks.spawn(keep_access(broker.clone()));
    let connections = Connections::new(config.connections_max as usize);
    let handshakes = HandshakePlaces::Each(config.handshakes_max as usize);
    let addresses =
        Addresses::serve(broker.clone(), entries, connections, handshakes, (tasks.clone(), hangup));
    Ok(Handle { addresses: Arc::new(addresses), tasks, clients: Clients(broker) })
}

/// Fails if an address is in use, without listening on it, so that a start can fail before it creates
/// anything.
pub fn try_addresses(config: &Config) -> Result<(), Error> {
    for endpoint in &config.listeners {
        transport::try_address(&endpoint.bind)?;
    }
    Ok(())
}

/// Ends expired sessions. At shutdown, notifies every connection.
async fn keep_house(broker: Arc<Broker>) {
    for sweep in 1.. {
        tokio::select! {
            () = tokio::time::sleep(SWEEP_EVERY) => {
                broker.check_clock();
                if sweep % SWEEPS_PER_SAVED_CLOCK == 0 {
                    broker.save_clock();
                }
                // Refused again: tried at the next sweep.
                let _ = broker.renew_records();
                broker.sessions.sweep(&broker).await;
            }
            () = broker.shutdown.cancelled() => {
                broker.sessions.wake_all();
                return;
            }
        }
    }
}

/// Reads changed files of users and keys again, even if no client connects.
async fn keep_access(broker: Arc<Broker>) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(ACCESS_LOOK_EVERY) => {}
            () = broker.shutdown.cancelled() => return,
        }
        let looking = broker.clone();
        let looked = tokio::task::spawn_blocking(move || looking.access.get().refresh());
        // A panic ends the process.
        let _ = broker.shutdown.run_until_cancelled(looked).await;
    }
}

/// State that all connections share.
struct Broker {
    /// The configuration in force. A connection keeps that of its beginning.
    config: watch::Sender<Arc<Config>>,
    /// The largest `max_packet_size` for which the broker's stream has room.
    packet_bytes_most: ByteSize,
    ingest: Arc<Ingest>,
    /// The streams of `ingest`. The listener refers to them by index.
    streams: Arc<[Arc<dyn Stream>]>,
    identities: Arc<[Identity]>,
    broker: Arc<dyn Stream>,
    failures: Failures,
    access: Arc<access::Current>,
    access_plugins: Engines,
    /// The runtime that serves connections.
    connections: runtime::Handle,
    background: runtime::Handle,
    clock: Clock,
    shutdown: CancellationToken,
    sessions: Sessions,
    live: Live,
    copies: Copies,
    /// Present until the records match the streams: see [`Broker::renew_records`].
    lineages: Mutex<Option<Lineages>>,
    /// Turns for reading queued messages from the streams.
    loads: Arc<Semaphore>,
    /// Permits for partly received packets.
    incoming_permits: Arc<Permits>,
    /// Permits for outgoing messages for which there is no memory.
    outgoing_permits: Arc<Permits>,
    rooms: Rooms,
    retained: Mutex<Retained>,
    wills: Wills,
    clients: AtomicI64,
    /// Notified when a connection has ended.
    connection_ended: Notify,
    refused_clients: Arc<RefusedClients>,
    takeovers: Takeovers,
    /// The largest number of connected clients at one time.
    clients_most: AtomicU64,
    totals: Totals,
    sys: Sys,
    counters: Counters,
}

/// Memory of all clients together, by use.
#[derive(Clone)]
struct Rooms {
    queues: Arc<Room>,
    subscriptions: Arc<Room>,
    connections: Arc<Room>,
}

impl Rooms {
    fn new(config: &Config, memory_bytes: u64) -> Self {
        let bytes = |bytes_max: Option<ByteSize>, part: u64| {
            let bytes = bytes_max.map_or(memory_bytes / part, |bytes| bytes.0);
            usize::try_from(bytes).unwrap_or(usize::MAX)
        };
        let queues = bytes(config.queues_bytes_max, 4);
        Self {
            queues: Room::with_reserve(queues, queues / PERMITS_PART),
            subscriptions: Room::new(bytes(config.subscriptions_bytes_max, 8)),
            connections: Room::new(bytes(config.connections_bytes_max, 8)),
        }
    }

    /// Returns the rooms with their names in the metrics.
    fn named(&self) -> [(&'static str, &Room); 3] {
        [("queues", &self.queues), ("subscriptions", &self.subscriptions), ("connections", &self.connections)]
    }
}

/// Sums over all sessions, as of the last examination.
#[derive(Default)]
struct Totals {
    queued: AtomicU64,
    queued_bytes: AtomicU64,
    in_flight: AtomicU64,
}

impl Broker {
    fn new(
        config: &Config,
        (access, access_plugins): (Access, Engines),
        copies: Copies,
        lineages: Lineages,
        deps: Deps,
    ) -> Arc<Self> {
        let streams = deps.ingest.streams().clone();
        let identities: Arc<[_]> = streams.iter().map(|stream| stream.identity()).collect();
        let limits = QueueLimits::of(config);
        let retained_max = (config.retained_messages_max as usize, config.retained_bytes_max.0 as usize);
        let retained = Retained::load(&streams, deps.ingest.routes(), retained_max, &deps.failures);
        let saved = deps.broker.state(clock::KEY).pop();
        let saved = saved.as_ref().map(|(_, value)| &**value);
        let (clock, jump) = Clock::new(deps.clock, saved, session::newest_us(&*deps.broker));
        let by_id = retained.by_id();
        let rooms = Rooms::new(config, memory_bytes().unwrap_or(UNKNOWN_MEMORY_BYTES));
        let LoadedSessions { sessions, subscriptions, shares, lost } = Sessions::load(
            &*deps.broker,
            &streams,
            &identities,
            lineages.valid(),
            &by_id,
            clock.now_us(),
            &rooms,
        );
        let wills_bytes_max = config.wills_bytes_max.0 as usize;
        let delay_least = config.will_delay_after_restart.0;
        let wills = Wills::load(&streams, wills_bytes_max, delay_least, &deps.failures);
        let broker = Arc::new(Self {
            packet_bytes_most: config.max_packet_size.max(PACKET_BYTES_LEAST),
            live: Live::new(&streams, limits, &sessions.all(), shares),
            copies,
            lineages: Mutex::new(Some(lineages)),
            loads: Arc::new(Semaphore::new(outbound::LOADS_MAX)),
            incoming_permits: Permits::new(config.partial_packets_bytes_max.0),
            outgoing_permits: Permits::new(rooms.queues.reserved() as u64),
            rooms,
            identities,
            streams,
            ingest: deps.ingest,
            broker: deps.broker,
            failures: deps.failures,
            access: access::Current::new(access),
            access_plugins,
            connections: runtime::Handle::current(),
            background: deps.background,
            clock,
            shutdown: deps.shutdown,
            sessions,
            retained: Mutex::new(retained),
            wills,
            clients: AtomicI64::new(0),
            connection_ended: Notify::new(),
            refused_clients: Arc::default(),
            takeovers: Takeovers::default(),
            clients_most: AtomicU64::new(0),
            totals: Totals::default(),
            sys: Sys::new(),
            counters: Counters::new(),
            config: watch::Sender::new(Arc::new(config.clone())),
        });
        broker.counters.gap.increment(lost);
        match jump {
            Some(jump) => broker.clock_jumped(jump),
            None => broker.save_clock(),
        }
        for (session, filter, options) in subscriptions {
            if let Some(filter) = subscriptions::Filter::parse(&filter) {
                let retained = fanout::SendRetained::Never;
                broker.live.subscribe(&broker, &session, &[Subscription { filter, options, retained }]);
            }
        }
        broker
    }

    /// Writes records again that no longer match the streams, and then the openings to which they refer.
    /// If there is no room, this is done later. Until then a restart compares with the former openings,
    /// so that messages may be duplicated and none is skipped.
    fn renew_records(&self) -> Result<(), AppendError> {
        let mut lineages = self.lineages.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(found) = &*lineages else { return Ok(()) };
        for session in self.sessions.all() {
            if session.outbox().is_stale() {
                let positions = self.live.positions_of(self, &session);
                session.outbox().renew(&*self.broker, &positions, self.note_bytes_max())?;
            }
        }
        self.live.write_share_records(self)?;
        // Last: a crash before it compares with the openings of before, and does all this again.
        if !found.changes().is_empty() {
            append(&*self.broker, found.changes())?;
        }
        *lineages = None;
        Ok(())
    }

    /// Returns whether the broker's stream has room for more sessions and subscriptions.
    fn has_state_room(&self) -> bool {
        self.broker.state_room() >= STATE_ROOM_BYTES
    }

    /// Returns the bytes of filters that a session may have in the state. A few clients with the largest
    /// allowed number cannot use up the half that is for small ones.
    fn state_share(&self) -> usize {
        match self.broker.state_room() {
            room if room < STATE_ROOM_BYTES => 0,
            room if room < STATE_BYTES_MAX / 2 => STATE_SHARE_BYTES,
            _ => usize::MAX,
        }
    }

    /// Checks the clock. Must be called before recent time stamps are evaluated.
    fn check_clock(&self) {
        if let Some(jump) = self.clock.check() {
            self.clock_jumped(jump);
        }
    }

    fn clock_jumped(&self, jump: clock::Jump) {
        let direction = if jump.is_forward { "forward" } else { "back" };
        let by = Period(Duration::from_secs(jump.by.as_secs()));
        tracing::warn!(
            "the clock jumped {direction} by {by}: sessions, queues and expiry go on by the time that passed"
        );
        self.save_clock();
    }

    fn save_clock(&self) {
        append_unawaited(&*self.broker, &[(clock::KEY.to_vec(), Some(self.clock.to_bytes()))]);
    }

    fn note_bytes_max(&self) -> usize {
        outbound::note_bytes_max(self.sessions.len())
    }

    /// Returns the configuration in force.
    fn config(&self) -> Arc<Config> {
        self.config.borrow().clone()
    }

    fn retained(&self) -> Locked<MutexGuard<'_, Retained>> {
        in_order(Rank::Retained, || self.retained.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Counts a refused connection under its cause, reports it as `kind`, and adds it to the list of
    /// refused clients, with `who` if the client presented a name.
    fn refuse(
        &self,
        cause: &'static str,
        kind: Option<&str>,
        who: Option<&str>,
        address: &Address,
        detail: &str,
    ) {
        self.counters.refused_connect(cause);
        let ip = address.ip();
        if let Some(kind) = kind {
            let subject = who.map_or_else(|| ip.to_string(), str::to_owned);
            self.failures.report_client(kind, &subject, 1, detail, &self.failures.hint(Hint::ClientsRefused));
        }
        self.refused_clients.add(cause, who, ip, detail);
    }

    fn client_connected(&self, change: i64) {
        let clients = self.clients.fetch_add(change, Ordering::AcqRel) + change;
        self.counters.connections.set(clients as f64);
        if change > 0 {
            self.counters.connects.increment(1);
            self.clients_most.fetch_max(clients.unsigned_abs(), Ordering::Relaxed);
        }
    }

    /// Examines every session for the sums that are not updated continuously.
    fn measure(&self) {
        let sessions = self.sessions.all();
        let (retained, retained_bytes) = self.retained().sizes();
        let mut measured = Measured {
            sessions: sessions.len(),
            retained,
            retained_bytes,
            wills_bytes: self.wills.bytes(),
            subscriptions: self.live.subscriptions(),
            ..Measured::default()
        };
        (measured.copies, measured.copies_bytes) = self.copies.sizes();
        for session in sessions {
            let (queued, queued_bytes, in_flight) = session.outbox().sizes();
            measured.queued += queued;
            measured.queued_bytes += queued_bytes;
            measured.in_flight += in_flight;
        }
        let totals = &self.totals;
        totals.queued.store(measured.queued as u64, Ordering::Relaxed);
        totals.queued_bytes.store(measured.queued_bytes as u64, Ordering::Relaxed);
        totals.in_flight.store(measured.in_flight as u64, Ordering::Relaxed);
        self.counters.set_gauges(&measured);
        metrics::set_memory(self.rooms.named());
    }

    /// Runs work on the background threads, which yield to those that serve connections. This is for
    /// work that takes a lock which live delivery holds, or that walks a queue. The work continues even
    /// if its caller no longer waits.
    async fn in_background<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> T {
        match self.background.spawn(in_turns(SHORT_TURN, work)).await {
            Ok(done) => done,
            Err(failed) => match failed.try_into_panic() {
                Ok(panic) => resume_unwind(panic),
                // The host ends, and these threads did first.
                Err(_) => pending().await,
            },
        }
    }

    /// Appends changes of state, waits for room, and waits until they are durable; at shutdown for at
    /// most `drain_timeout`.
    async fn append_durable(&self, stream: &dyn Stream, changes: &[Change]) -> Result<(), Stopped> {
        self.durable(stream, || append(stream, changes)).await
    }

    /// Calls `append` until there is room, and waits until the result is durable.
    async fn durable(
        &self,
        stream: &dyn Stream,
        append: impl FnMut() -> Result<Ticket, AppendError>,
    ) -> Result<(), Stopped> {
        let given_up = async {
            self.shutdown.cancelled().await;
            tokio::time::sleep(self.config().drain_timeout.0).await;
        };
        tokio::select! {
            biased;
            done = append_and_wait(stream, append) => done,
            () = given_up => Err(Stopped),
        }
    }
}

async fn append_and_wait(
    stream: &dyn Stream,
    mut append: impl FnMut() -> Result<Ticket, AppendError>,
) -> Result<(), Stopped> {
    let ticket = loop {
        match append() {
            Ok(ticket) => break ticket,
            Err(AppendError::Full | AppendError::NoSpace) => stream.writable().await,
            Err(_) => return Err(Stopped),
        }
    };
    let mut durable = stream.durable();
    durable.wait_for(|durable| *durable >= ticket).await.map(drop).map_err(|_| Stopped)
}

/// Returns the secret from which answers for unknown users are derived, so that they stay the same as
/// long as the data folder exists.
async fn access_secret(broker: &dyn Stream) -> Result<[u8; 32], Error> {
    let kept = broker.state(ACCESS_SECRET).into_iter().find_map(|(_, value)| value.try_into().ok());
    if let Some(secret) = kept {
        return Ok(secret);
    }
    let mut secret = [0; 32];
    let filled = ring::rand::SystemRandom::new().fill(&mut secret);
    filled.map_err(|_| Error::Access("the system gives no random bytes".to_owned()))?;
    let change = (ACCESS_SECRET.to_vec(), Some(secret.to_vec()));
    append_and_wait(broker, || append(broker, slice::from_ref(&change)))
        .await
        .map_err(|_| Error::Access("the broker stream has stopped".to_owned()))?;
    Ok(secret)
}

/// Appends changes on which nothing depends. What a refused change leaves is removed at the next start.
fn append_unawaited(stream: &dyn Stream, changes: &[Change]) {
    if !changes.is_empty() {
        let _ = append(stream, changes);
    }
}

fn append(stream: &dyn Stream, changes: &[Change]) -> Result<Ticket, AppendError> {
    stream.append(&[], &borrowed(changes)).map(|appended| appended.ticket)
}

fn borrowed(changes: &[Change]) -> Vec<StateChange<'_>> {
    changes.iter().map(|(key, value)| StateChange { key, value: value.as_deref() }).collect()
}

/// Returns microseconds since 1970, UTC, of the wall clock, for messages and for people. Ages are
/// measured with [`Clock`].
fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}
