//! Sessions: what outlives a connection.
//!
//! A persistent session has a small durable record in the broker stream
//! (`se` + client id), written before CONNACK, and a key for each subscription
//! (`sf` + epoch + filter), written before SUBACK. Its QoS 2 packet ids lie in
//! the stream of their message (`q2` + epoch + packet id), in the same append. An id
//! has a record in one stream at most: see `inbound`.
//! The epoch is new with every clean start, so that what an old session left
//! behind can never be taken for the new one's; orphans are removed at start.
//! What waits for the client is [`outbound`]'s, with keys of the same epoch.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use tokio::sync::{Notify, OwnedMutexGuard};

use super::acks::Stopped;
use super::activity::Activity;
use super::blobs::Id;
use super::clients::Connected;
use super::fanout::{Departure, FoundRecords, FoundShare, RECORDS_AT_ONCE};
use super::filter_map::FilterMap;
use super::lock_order::{Locked, Rank, in_order};
use super::open_ids::{Content, Known, OpenIds, OpenIdsRoom, Received};
use super::outbound::{self, FilterPage, Ids, Kept, Message, Outbox};
use super::owner::Owner;
use super::subscriptions::{self, Filter, Options, is_shared, levels};
use super::{Broker, Rooms, append, borrowed};
use crate::hints::Hint;
use crate::room::Holding;
use crate::stream::{AppendError, Identity, StateChange, Stream, Ticket};

/// Longest client id. Longer ones are refused, because they are keys of the durable state.
pub const CLIENT_ID_BYTES_MAX: usize = 512;
/// Longest filter of a persistent session. Longer ones are refused, because they are keys of the durable
/// state.
pub const KEPT_FILTER_BYTES_MAX: usize = 1_000;
/// Expiry of a session that never expires (MQTT 5.0, 3.1.2.11.2).
pub const NEVER: u32 = u32::MAX;
/// Number of expired sessions that are ended together, while their clients wait.
const ENDED_AT_ONCE: usize = 10_000;

/// Number of pending key removals of a client's ended sessions beyond which its next session adds none.
/// The next start removes what that session left.
const STALE_KEYS_MAX: usize = 256;

/// The kind of failure that a share's record in the broker's stream is.
const UNWRITTEN: &str = "mqtt: the record of a shared subscription could not be written";

const SESSION: &[u8] = b"se";
const SUBSCRIPTION: &[u8] = b"sf";
const QOS2: &[u8] = b"q2";

/// An owned durable change, for state that changes rarely.
pub type Change = (Vec<u8>, Option<Vec<u8>>);

pub struct Session {
    /// Number within this process, by which the subscription tree refers to sessions.
    pub number: u64,
    pub client_id: Arc<str>,
    /// Notified when deliveries wait, another connection wants the session, or the host stops.
    pub wake: Notify,
    /// Set if the subscriber is too slow and must be disconnected.
    pub overflow: AtomicBool,
    /// Set if an operator disconnects the client.
    pub kicked: AtomicBool,
    /// The last connection and its end, if it ended for another connection.
    taken_over: Mutex<Option<Box<(Connected, Instant)>>>,
    /// Number of connections that wait for their turn.
    claims: AtomicU32,
    turn: Arc<tokio::sync::Mutex<()>>,
    state: Mutex<State>,
    /// Unreleased QoS 2 packet ids.
    received: Mutex<OpenIds>,
    outbox: Mutex<Outbox>,
    activity: Activity,
    /// Lanes by stream, for a session that a restart found behind live delivery: see [`Session::lane`].
    lanes: OnceLock<Box<[AtomicU8]>>,
}

#[derive(Default)]
struct State {
    epoch: u64,
    owner: Owner,
    /// Whether there is a session to resume.
    alive: bool,
    connected: bool,
    connection: Option<Box<Connected>>,
    expiry_s: u32,
    /// Whether the broker's stream has a record of the session.
    kept: bool,
    /// Whether the record is older than the end of the last connection: its append failed, and a later
    /// note appends it.
    record_due: bool,
    /// End of the last connection in broker time.
    disconnected_us: u64,
    filters: FilterMap<Options>,
    filter_sums: FilterSums,
    /// The filters' part of the memory of all subscriptions.
    memory: Holding,
    /// Keys in the broker's stream that are no longer needed. They are removed in the next append of any
    /// connection.
    stale: Vec<Vec<u8>>,
}

/// Sums over the filters of a session. They are kept so that the cost of checking a SUBSCRIBE does not
/// depend on the number of filters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FilterSums {
    pub bytes: usize,
    /// Number of topic levels.
    pub levels: usize,
}

impl FilterSums {
    fn add(&mut self, filter: &str) {
        self.bytes += filter.len();
        self.levels += levels(filter);
    }

    fn subtract(&mut self, filter: &str) {
        self.bytes -= filter.len();
        self.levels -= levels(filter);
    }
}

/// The right to use a session, which one connection has at a time.
pub struct Turn(#[allow(dead_code, reason = "held, not read")] OwnedMutexGuard<()>);

pub struct Sessions {
    by_client: Mutex<HashMap<Arc<str>, Arc<Session>>>,
    /// Number of sessions in `by_client`, for callers that hold another lock.
    count: AtomicUsize,
    next_number: AtomicU64,
    pub open_ids: Arc<OpenIdsRoom>,
    rooms: Rooms,
}

impl Session {
    fn new(number: u64, client_id: Arc<str>, open_ids: Arc<OpenIdsRoom>, rooms: &Rooms) -> Self {
        let memory = Holding::of(&rooms.subscriptions);
        Self {
            number,
            client_id,
            wake: Notify::new(),
            overflow: AtomicBool::new(false),
            kicked: AtomicBool::new(false),
            taken_over: Mutex::default(),
            claims: AtomicU32::new(0),
            turn: Arc::default(),
            state: Mutex::new(State { epoch: new_epoch(), memory, ..State::default() }),
            received: Mutex::new(OpenIds::new(open_ids)),
            outbox: Mutex::new(Outbox::within(&rooms.queues)),
            activity: Activity::default(),
            lanes: OnceLock::new(),
        }
    }

    /// Returns which task delivers a stream's messages to the session: 0 for live delivery, or the
    /// number of the lane in which it catches up.
    #[inline]
    pub fn lane(&self, stream: usize) -> u8 {
        self.lanes.get().and_then(|lanes| lanes.get(stream)).map_or(0, |lane| lane.load(Ordering::Acquire))
    }

    /// Returns whether the session catches up in a lane of any stream.
    pub fn is_behind(&self) -> bool {
        let is_behind = |lanes: &[AtomicU8]| lanes.iter().any(|lane| lane.load(Ordering::Acquire) > 0);
        self.lanes.get().is_some_and(|lanes| is_behind(lanes))
    }

    /// Sets the lane of a stream. `streams` is the number of streams.
    pub fn set_lane(&self, streams: usize, stream: usize, lane: u8) {
        let lanes = self.lanes.get_or_init(|| (0..streams).map(|_| AtomicU8::new(0)).collect());
        lanes[stream].store(lane, Ordering::Release);
    }

    /// Returns the activity of the client since the host started.
    pub fn activity(&self) -> &Activity {
        &self.activity
    }

    fn state(&self) -> Locked<MutexGuard<'_, State>> {
        in_order(Rank::State, || lock(&self.state))
    }

    pub fn outbox(&self) -> Locked<MutexGuard<'_, Outbox>> {
        in_order(Rank::Outbox, || lock(&self.outbox))
    }

    pub fn received(&self) -> Locked<MutexGuard<'_, OpenIds>> {
        in_order(Rank::Last, || lock(&self.received))
    }

    /// Returns whether another connection waits for this session.
    pub fn is_wanted(&self) -> bool {
        self.claims.load(Ordering::Acquire) > 0
    }

    /// Returns the epoch of a persistent session.
    pub fn persistent_epoch(&self) -> Option<u64> {
        let state = self.state();
        (state.expiry_s > 0).then_some(state.epoch)
    }

    pub fn expiry_s(&self) -> u32 {
        self.state().expiry_s
    }

    #[cfg(test)]
    pub fn stale_keys(&self) -> usize {
        self.state().stale.len()
    }

    pub fn filters(&self) -> usize {
        self.state().filters.len()
    }

    /// Returns the approximate number of bytes of memory of the filters.
    pub fn filters_memory(&self) -> usize {
        self.state().filters_memory()
    }

    /// Returns the sums over the filters.
    pub fn filter_sums(&self) -> FilterSums {
        self.state().filter_sums
    }

    /// Returns whether the broker's stream has a record of the session.
    pub fn is_kept(&self) -> bool {
        self.state().kept
    }

    /// Returns whether the session is connected, or waits for its client.
    pub fn is_alive(&self) -> bool {
        self.state().alive
    }

    /// Returns the owner if there is a session that `client` may not resume.
    pub fn other_owner(&self, client: &Owner) -> Option<Owner> {
        let state = self.state();
        (state.alive && !state.owner.is(client)).then(|| state.owner.clone())
    }

    /// Records that the client is connected. Called after everything that CONNACK promises is durable,
    /// since an abandoned connect does not count.
    pub(super) fn connected(&self, connection: Connected) {
        let mut state = self.state();
        state.connected = true;
        state.connection = Some(Box::new(connection));
    }

    /// Records that the connection ends for another one.
    pub fn note_taken_over(&self) {
        let (connection, ..) = self.presence();
        *self.lock_taken_over() = connection.map(|connection| Box::new((connection, Instant::now())));
    }

    /// Returns, once, the connection that ended for one which waits for its turn since `since`.
    pub(super) fn taken_over(&self, since: Instant) -> Option<Connected> {
        let (connection, ended) = *self.lock_taken_over().take()?;
        (ended >= since).then_some(connection)
    }

    fn lock_taken_over(&self) -> MutexGuard<'_, Option<Box<(Connected, Instant)>>> {
        self.taken_over.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the connection, the session's expiry, and when the last connection ended.
    pub(super) fn presence(&self) -> (Option<Connected>, u32, u64) {
        let state = self.state();
        (state.connection.as_deref().cloned(), state.expiry_s, state.disconnected_us)
    }

    pub fn filter_list(&self) -> Vec<Box<str>> {
        let mut filters: Vec<_> = self.state().filters.filters().map(Into::into).collect();
        filters.sort_unstable();
        filters
    }

    /// Returns the filters of the shared subscriptions.
    pub fn shares(&self) -> Vec<Box<str>> {
        self.state().filters.filters().filter(|filter| is_shared(filter)).map(Into::into).collect()
    }

    pub fn has_filter(&self, filter: &str) -> bool {
        self.state().filters.contains(filter)
    }

    /// Adds a filter or changes its options. Returns whether this was a change.
    pub fn add_filter(&self, filter: &str, options: Options) -> bool {
        let mut state = self.state();
        let before = state.filters.insert(filter, options);
        if before.is_none() {
            state.filter_sums.add(filter);
            state.count();
        }
        before != Some(options)
    }

    /// Takes memory of `bytes` for filters that are to be added, until [`Session::filters_added`].
    /// Returns false if there is no room.
    pub fn take_memory(&self, bytes: usize) -> bool {
        let mut state = self.state();
        let all = state.filters_memory() + bytes;
        state.memory.try_hold(all)
    }

    /// Releases memory that was taken for filters that were not added.
    pub fn filters_added(&self) {
        self.state().count();
    }

    /// Returns the identifiers of the subscriptions that match a topic, except shared ones.
    pub fn subscription_ids(&self, topic: &str, publisher: Option<&[u8]>) -> Ids {
        let state = self.state();
        let is_own = publisher == Some(self.client_id.as_bytes());
        let matching = state.filters.iter().filter(|(filter, options)| {
            options.id != 0
                && !(options.no_local && is_own)
                && !is_shared(filter)
                && crate::topic::filter_matches(filter, topic)
        });
        matching.map(|(_, options)| options.id).collect()
    }

    /// Appends a note of the outbox to the broker's stream, with `changes` and the pending changes of
    /// filters that wait for no record of a share. Does not wait. If it fails, an older note is still
    /// valid.
    pub fn note(&self, broker: &Broker, changes: Vec<Change>) {
        let _ = self.append_note(broker, changes);
    }

    /// Appends a note as [`Self::note`] does. Fails if it was not appended.
    pub fn try_note(&self, broker: &Broker) -> Result<Ticket, AppendError> {
        self.append_note(broker, Vec::new())
    }

    /// Appends a note with the changes of the subscriptions, and waits until it is durable. Cancel safe:
    /// changes that were not appended are written with a later note.
    pub async fn note_durable(&self, broker: &Broker) -> Result<(), Stopped> {
        let append = || {
            let settled = broker.live.settle(broker);
            let appended = self.append_note(broker, Vec::new());
            if appended.is_err() {
                // Its connection looks whether the note found no room.
                self.wake.notify_one();
            }
            // A change that waits for a record since just now is appended with the next try.
            let is_whole = !self.outbox().awaits_record();
            appended.and_then(|ticket| match is_whole {
                true => Ok(ticket),
                false => settled.and(Err(AppendError::Full)),
            })
        };
        broker.durable(&*broker.broker, append).await
    }

    /// Appends a note while holding the outbox, so that notes reach the log in the order in which they
    /// were made. An older note would list messages that another member of a share has taken over
    /// meanwhile.
    fn append_note(&self, broker: &Broker, mut changes: Vec<Change>) -> Result<Ticket, AppendError> {
        let positions = broker.live.positions_of(broker, self);
        let mut outbox = self.outbox();
        loop {
            let FilterPage { filters, changes: some, is_last } = outbox.filter_changes();
            changes.extend(some);
            if is_last {
                changes.extend(outbox.note(&positions, broker.note_bytes_max()));
            }
            if changes.is_empty() {
                return Ok(Ticket::default());
            }
            match broker.broker.append(&[], &borrowed(&changes)) {
                Ok(appended) => {
                    outbox.filters_appended(&filters);
                    if is_last {
                        outbox.noted();
                        return Ok(appended.ticket);
                    }
                    changes.clear();
                }
                Err(error) => {
                    outbox.note_failed();
                    return Err(error);
                }
            }
        }
    }

    /// Appends a note, with the record that [`State::record_due`] marks as due. Does nothing while a
    /// connection has the session, because that connection has appended a newer record, or is about to.
    fn note_with_record(&self, broker: &Broker) {
        let turn = self.turn.clone().try_lock_owned();
        let record = {
            let state = self.state();
            let is_due = turn.is_ok() && state.record_due && state.expiry_s > 0;
            is_due.then(|| state.record(&self.client_id))
        };
        let is_due = record.is_some();
        if self.append_note(broker, record.into_iter().collect()).is_ok() && is_due {
            self.state().record_due = false;
        }
    }

    fn is_record_due(&self) -> bool {
        self.state().record_due
    }

    /// Reports the messages that a persistent session has lost, by its client.
    fn report_lost(&self, broker: &Broker, lost: u64) {
        if lost > 0 {
            let client_id = &*self.client_id;
            let detail = format!(
                "client {client_id}: its queue is full, or they waited longer than mqtt.queue_age_max, or \
                 the queues of all clients together are full; raise mqtt.queue_messages_max, \
                 mqtt.queue_bytes_max or mqtt.queues_bytes_max, or delete its session"
            );
            let kind = "mqtt: messages dropped that waited for a session";
            broker.failures.report_by(
                kind,
                client_id,
                lost,
                &detail,
                &broker.failures.hint(Hint::ClientsShow(client_id)),
            );
        }
    }

    pub fn remove_filter(&self, filter: &str) {
        let mut state = self.state();
        if state.filters.remove(filter).is_some() {
            state.filter_sums.subtract(filter);
            state.count();
        }
    }
}

/// The sessions that a start finds.
pub struct LoadedSessions {
    pub sessions: Sessions,
    pub subscriptions: Vec<(Arc<Session>, String, Options)>,
    pub shares: Vec<FoundShare>,
    /// Number of queued messages that their streams no longer have.
    pub lost: u64,
}

/// Returns the latest time in the records of sessions.
pub fn newest_us(broker: &dyn Stream) -> u64 {
    let records = broker.state(SESSION);
    let records = records.iter().filter_map(|(_, value)| State::from_bytes(value));
    records.map(|state| state.disconnected_us).max().unwrap_or(0)
}

impl Sessions {
    /// Reads the durable sessions, their subscriptions and the packet ids in flight, and removes keys
    /// without a session. `valid`: see [`Lineages`](super::lineages::Lineages). `retained`: all retained
    /// messages by their ids.
    pub fn load(
        broker: &dyn Stream,
        streams: &[Arc<dyn Stream>],
        identities: &Arc<[Identity]>,
        valid: &[u64],
        retained: &HashMap<Id, Arc<Message>>,
        now_us: u64,
        rooms: &Rooms,
    ) -> LoadedSessions {
        let sessions = Self {
            by_client: Mutex::default(),
            count: AtomicUsize::new(0),
            next_number: AtomicU64::new(1),
            open_ids: Arc::default(),
            rooms: rooms.clone(),
        };
        let mut by_epoch: HashMap<u64, Arc<Session>> = HashMap::new();
        for (key, value) in broker.state(SESSION) {
            let client_id = std::str::from_utf8(&key[SESSION.len()..]);
            let (Ok(client_id), Some(mut state)) = (client_id, State::from_bytes(&value)) else {
                remove(broker, &key);
                continue;
            };
            if state.disconnected_us == 0 {
                state.disconnected_us = now_us;
            }
            let session = sessions.insert(client_id.into());
            by_epoch.insert(state.epoch, session.clone());
            let mut known = session.state();
            state.memory = std::mem::take(&mut known.memory);
            *known = state;
        }
        let (mut subscriptions, mut to_be_given) = (Vec::new(), Vec::new());
        let mut shares = FoundRecords::of(broker);
        for (key, value) in broker.state(SUBSCRIPTION) {
            let rest = &key[SUBSCRIPTION.len()..];
            let epoch = rest.first_chunk().map_or(0, |epoch| u64::from_be_bytes(*epoch));
            let owner = by_epoch.get(&epoch);
            let filter = rest.get(8..).and_then(|filter| std::str::from_utf8(filter).ok());
            match (owner, filter, Options::from_bytes(&value)) {
                (Some(session), Some(filter), Some((options, retained))) => {
                    session.add_filter(filter, options);
                    shares.see(session, epoch, filter, options);
                    if let (false, Some(filter)) = (retained.is_empty(), Filter::parse(filter)) {
                        to_be_given.push((session.clone(), filter, options, retained.to_vec()));
                    }
                    subscriptions.push((session.clone(), filter.to_owned(), options));
                }
                _ => remove(broker, &key),
            }
        }
        let mut outboxes: HashMap<u64, outbound::Found> = HashMap::new();
        for kind in [outbound::NOTE, outbound::STEP, outbound::SENT] {
            for (key, value) in broker.state(kind) {
                let parts = key[kind.len()..].split_first_chunk();
                let owner = parts.map(|(epoch, rest)| (u64::from_be_bytes(*epoch), rest));
                let owner = owner.filter(|(epoch, _)| by_epoch.contains_key(epoch));
                let known = owner
                    .is_some_and(|(epoch, rest)| outboxes.entry(epoch).or_default().add(kind, rest, &value));
                if !known {
                    remove(broker, &key);
                }
            }
        }
        let shares =
            shares.give(broker, |epoch, share| outboxes.entry(epoch).or_default().shares.push(share));
        let retained = |id: &Id, received_us| {
            retained.get(id).filter(|message| message.received_us() == received_us).cloned()
        };
        let ends: Box<[u64]> = streams.iter().map(|stream| stream.bounds().end.0).collect();
        let (mut stale, mut lost) = (0, 0);
        let mut owed = HashMap::new();
        for (epoch, session) in &by_epoch {
            let found = outboxes.remove(epoch).unwrap_or_default();
            let mut restored = found.restore(*epoch, identities.clone(), &ends, valid, &retained);
            owed.extend(restored.owed.drain(..));
            stale += usize::from(restored.kept.is_stale);
            session.activity().gone(restored.lost as u64);
            lost += restored.lost;
            session.outbox().restore(restored);
        }
        let shares = FoundShare::of(shares, &owed, &subscriptions, by_epoch.values());
        say_gone_back(streams, valid, stale, lost);
        for (session, filter, options, retained) in to_be_given {
            session.outbox().resume_retained(&filter, options, &retained);
        }
        let mut doubtful = Vec::new();
        for (number, stream) in streams.iter().enumerate() {
            for (key, value) in stream.state(QOS2) {
                let parts = key[QOS2.len()..].split_first_chunk::<8>();
                let id = parts.and_then(|(_, id)| <[u8; 2]>::try_from(id).ok());
                let owner = parts.and_then(|(epoch, _)| by_epoch.get(&u64::from_be_bytes(*epoch)));
                match (owner, id) {
                    (Some(session), Some(id)) => {
                        let content = Content::read(&value);
                        let received = Received { stream: number, ticket: Some(Ticket(0)), content };
                        let id = u16::from_be_bytes(id);
                        if let Some(Known::Open(other)) = session.received().open(id, received) {
                            remove(&*streams[other.stream], &key);
                            doubtful.push((session, id, key));
                        }
                    }
                    _ => remove(&**stream, &key),
                }
            }
        }
        // Which of two records is the newer one is not known, and a message that equals the one of
        // an old record would be lost. So the id is not open: a message that is sent again is a new one.
        for (session, id, key) in doubtful {
            if let Some(received) = session.received().get(id) {
                remove(&*streams[received.stream], &key);
            }
            session.received().put_back(id, None);
            tracing::warn!(
                client = &*session.client_id,
                packet_id = id,
                "two streams have a record of this QoS 2 packet id, because parts of the data folder are older \
                 than others; the id counts as released, and its message is accepted again if the client repeats it"
            );
        }
        LoadedSessions { sessions, subscriptions, shares, lost: lost as u64 }
    }

    fn new_session(&self, number: u64, client_id: Arc<str>) -> Session {
        Session::new(number, client_id, self.open_ids.clone(), &self.rooms)
    }

    fn insert(&self, client_id: Arc<str>) -> Arc<Session> {
        let number = self.next_number.fetch_add(1, Ordering::Relaxed);
        let session = Arc::new(self.new_session(number, client_id.clone()));
        let mut by_client = self.by_client();
        by_client.insert(client_id, session.clone());
        self.count.store(by_client.len(), Ordering::Relaxed);
        drop(by_client);
        session
    }

    fn by_client(&self) -> Locked<MutexGuard<'_, HashMap<Arc<str>, Arc<Session>>>> {
        in_order(Rank::Last, || lock(&self.by_client))
    }

    pub fn all(&self) -> Vec<Arc<Session>> {
        self.by_client().values().cloned().collect()
    }

    pub fn get(&self, client_id: &str) -> Option<Arc<Session>> {
        self.by_client().get(client_id).cloned()
    }

    /// Returns the number of sessions. Takes no lock, because callers hold an outbox.
    pub fn len(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Wakes every connection, to check a change that affects all.
    pub fn wake_all(&self) {
        self.by_client().values().for_each(|session| session.wake.notify_one());
    }

    /// Returns the client's session, once the connection that has it gives way. Returns `None` if there
    /// are already `sessions_max`.
    pub async fn claim(&self, client_id: &str, sessions_max: usize) -> Option<(Arc<Session>, Turn)> {
        let session = {
            let mut by_client = self.by_client();
            let session = match by_client.get(client_id) {
                Some(session) => session.clone(),
                None if by_client.len() >= sessions_max => return None,
                None => {
                    let number = self.next_number.fetch_add(1, Ordering::Relaxed);
                    let session = Arc::new(self.new_session(number, client_id.into()));
                    by_client.insert(session.client_id.clone(), session.clone());
                    self.count.store(by_client.len(), Ordering::Relaxed);
                    session
                }
            };
            // Counted under the lock: the session is not removed while wanted.
            session.claims.fetch_add(1, Ordering::AcqRel);
            session
        };
        let claimed = Claimed(&session);
        session.wake.notify_one();
        let turn = session.turn.clone().lock_owned().await;
        drop(claimed);
        // One wake may have stood for several that wait.
        if session.is_wanted() {
            session.wake.notify_one();
        }
        Some((session, Turn(turn)))
    }

    /// Begins or resumes the session for `owner`, and returns whether it was present. It is durable when
    /// this returns.
    pub async fn open(
        &self,
        broker: &Broker,
        session: &Arc<Session>,
        owner: Owner,
        clean: bool,
        expiry_s: u32,
    ) -> Result<bool, Stopped> {
        let (changes, resumed, kept_no_more) = {
            let expired = session.state().is_expired(broker.clock.now_us());
            let goes_on = session.other_owner(&owner).is_none() && !clean && !expired;
            let resumed = session.state().alive && goes_on;
            broker.counters.sessions_expired.increment(expired.into());
            if !resumed {
                discard(broker, session).await;
                session.activity().reset();
            }
            let mut state = session.state();
            let mut changes = state.stale_removed();
            (state.alive, state.disconnected_us) = (true, 0);
            state.expiry_s = expiry_s;
            if owner != Owner::Unchecked {
                state.owner = owner;
            }
            if expiry_s > 0 {
                changes.push(state.record(&session.client_id));
                state.kept = true;
            } else if state.kept {
                changes.extend(removed(state.keys(&session.client_id)));
            }
            let mut outbox = session.outbox();
            if !resumed {
                // What comes from now on; also while the live delivery lags.
                let from: Box<[u64]> = broker.streams.iter().map(|stream| stream.bounds().end.0).collect();
                let kept = (expiry_s > 0).then(|| Kept::new(state.epoch, broker.identities.clone()));
                outbox.begin(from.clone(), kept);
                changes.extend(outbox.note(&from, broker.note_bytes_max()));
            } else if expiry_s == 0 {
                changes.extend(removed(outbox.keys()));
            }
            drop(outbox);
            // The record says connected; if this connect is given up here, the session waits on.
            state.disconnected_us = broker.clock.now_us();
            (changes, resumed, (expiry_s == 0 && state.kept).then_some(state.epoch))
        };
        session.overflow.store(false, Ordering::Relaxed);
        session.kicked.store(false, Ordering::Relaxed);
        if kept_no_more.is_some() {
            broker.live.keep_no_more(broker, session).await?;
        }
        if !changes.is_empty() {
            remove_durable(broker, &changes).await?;
        }
        {
            let mut state = session.state();
            state.stale.clear();
            state.record_due = false;
        }
        if let Some(epoch) = kept_no_more {
            session.state().kept = false;
            let received = session.received().all();
            forget_ids(broker, epoch, &received);
        }
        Ok(resumed)
    }

    /// Handles the end of the connection at `ended_us` in broker time. `expiry_s` is set if DISCONNECT
    /// changed it.
    pub async fn close(
        &self,
        broker: &Broker,
        session: &Arc<Session>,
        turn: Turn,
        expiry_s: Option<u32>,
        ended_us: u64,
    ) {
        session.outbox().disconnected();
        broker.live.pass_on(broker, session, Departure::Client).await;
        let changes = {
            let mut state = session.state();
            state.connected = false;
            state.connection = None;
            state.disconnected_us = ended_us;
            state.expiry_s = expiry_s.unwrap_or(state.expiry_s);
            (state.expiry_s > 0).then(|| vec![state.record(&session.client_id)])
        };
        match changes {
            // Not awaited: lost in a crash, the session lives by the expiry of its CONNECT, from the
            // restart on.
            Some(changes) => {
                let appended = session.append_note(broker, changes);
                session.state().record_due = appended.is_err();
            }
            None => self.end(broker, session).await,
        }
        drop(turn);
    }

    /// Ends a client's session and its connection, if it has one. Returns false if there is no session.
    /// The turn is kept until the end is appended, so that appends of the client's next connection come
    /// after it.
    pub async fn delete(&self, broker: &Broker, client_id: &str) -> bool {
        let Some(session) = self.get(client_id).filter(|session| session.is_alive()) else { return false };
        session.kicked.store(true, Ordering::Release);
        let Some((session, turn)) = self.claim(&session.client_id, usize::MAX).await else { return false };
        self.end(broker, &session).await;
        // Durable with this, whatever the session left.
        let removed = (key(SESSION, client_id.as_bytes()), None);
        let is_removed = remove_durable(broker, &[removed]).await.is_ok();
        drop(turn);
        is_removed
    }

    /// Gives up a claim without a connection. A session that was created for it ends.
    pub async fn give_back(&self, broker: &Broker, session: &Arc<Session>, turn: Turn) {
        if !session.is_alive() {
            self.end(broker, session).await;
        }
        drop(turn);
    }

    /// Removes a session and everything that it left behind.
    async fn end(&self, broker: &Broker, session: &Arc<Session>) {
        discard(broker, session).await;
        let changes = session.state().stale_removed();
        // Refused: what it left is removed, or found again, at the next start.
        let _ = append_removal(broker, &changes);
        let mut by_client = self.by_client();
        let is_this = by_client.get(&session.client_id).is_some_and(|known| Arc::ptr_eq(known, session));
        if is_this && !session.is_wanted() {
            by_client.remove(&session.client_id);
            self.count.store(by_client.len(), Ordering::Relaxed);
        }
    }

    /// Ends expired sessions, drops messages that waited too long, and notes the positions of the
    /// others.
    pub async fn sweep(&self, broker: &Broker) {
        // Refused: pending until the next sweep.
        let _ = broker.live.settle(broker);
        let now_us = broker.clock.now_us();
        let age_us = u64::try_from(broker.config().queue_age_max.0.as_micros()).unwrap_or(u64::MAX);
        let durable: Vec<_> = broker.streams.iter().map(|stream| *stream.durable().borrow()).collect();
        for session in self.all() {
            session.received().settle(&durable);
            let positions = broker.live.positions_of(broker, &session);
            let (dropped, wants_note, lost) = {
                let mut outbox = session.outbox();
                let dropped = outbox.drop_older(now_us.saturating_sub(age_us));
                (dropped, outbox.wants_note(&positions), outbox.take_lost())
            };
            if dropped > 0 {
                broker.counters.queue_age.increment(dropped);
            }
            session.report_lost(broker, lost);
            if wants_note || session.is_record_due() {
                session.note_with_record(broker);
            }
        }
        let mut is_written = true;
        for some in broker.live.recorded_shares().chunks(RECORDS_AT_ONCE) {
            if let Err(error) = broker.live.write_share_records_of(broker, some) {
                report_unwritten(broker, some, &error, "tried again in a few seconds");
                is_written = false;
            }
            tokio::task::yield_now().await;
        }
        if is_written {
            broker.failures.end(UNWRITTEN);
        }
        // The map is not locked while a session's state is.
        let mut gone = self.all();
        gone.retain(|session| session.state().is_over(now_us));
        for some in gone.chunks(ENDED_AT_ONCE) {
            self.end_those_over(broker, some, now_us).await;
        }
    }

    /// Ends those of the sessions that have expired.
    async fn end_those_over(&self, broker: &Broker, sessions: &[Arc<Session>], now_us: u64) {
        let mut over = Vec::new();
        for session in sessions {
            // Taken by a client in this moment: it decides.
            let Ok(turn) = session.turn.clone().try_lock_owned() else { continue };
            let (is_over, is_expired) = {
                let state = session.state();
                (state.is_over(now_us), state.is_expired(now_us))
            };
            if is_over {
                broker.counters.sessions_expired.increment(is_expired.into());
                over.push((session, turn));
            }
        }
        // All of them leave their shares first: what one of them held is not for another.
        for (session, _) in &over {
            broker.live.forget(session, &session.filter_list());
            tokio::task::yield_now().await;
        }
        for (session, turn) in over {
            self.end(broker, session).await;
            drop(turn);
        }
    }
}

impl Sessions {
    /// Notes all sessions at shutdown, so that the next start needs to find nothing again.
    pub fn note_all(&self, broker: &Broker) {
        broker.save_clock();
        self.all().iter().for_each(|session| session.note_with_record(broker));
        if let Err(error) = broker.live.write_share_records(broker) {
            report_unwritten(broker, &broker.live.recorded_shares(), &error, "the host stops");
        }
    }
}

/// Says that the records of shares say less than their members hold and have had.
fn report_unwritten(broker: &Broker, shares: &[Box<str>], error: &AppendError, what: &str) {
    let Some(first) = shares.first() else { return };
    let others = match shares.len() - 1 {
        0 => String::new(),
        others => format!(" and {others} more"),
    };
    let detail = format!(
        "{first}{others}: {error}; {what}. A host that ends before it is written delivers to members of the share \
         again what they have had since the last record"
    );
    broker.failures.report_by(
        UNWRITTEN,
        first,
        shares.len() as u64,
        &detail,
        &broker.failures.hint(Hint::Status),
    );
}

/// Says that sessions had come further than their streams, of which they waited for `lost` messages.
fn say_gone_back(streams: &[Arc<dyn Stream>], valid: &[u64], sessions: usize, lost: usize) {
    if sessions == 0 {
        return;
    }
    let from: Vec<String> =
        streams.iter().zip(valid).map(|(stream, valid)| format!("{}: {valid}", stream.name())).collect();
    let from = from.join(", ");
    if lost > 0 {
        tracing::error!(
            sessions,
            messages = lost,
            from,
            "messages that were queued for sessions are no longer in their streams: a stream lost its end, or is older \
             than the rest of the data folder. The sessions continue at these offsets at the latest"
        );
    } else {
        tracing::warn!(
            sessions,
            from,
            "sessions received messages that are no longer in their streams: a stream lost its end, or is \
             older than the rest of the data folder. The sessions continue at these offsets at the latest"
        );
    }
}

/// A claim that is taken back when it is dropped, even while it waits for the turn.
struct Claimed<'a>(&'a Session);

impl Drop for Claimed<'_> {
    fn drop(&mut self) {
        self.0.claims.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Removes all state of a session. Its keys in the broker's stream become stale.
async fn discard(broker: &Broker, session: &Arc<Session>) {
    let queue_keys = session.outbox().keys();
    let (epoch, filters) = {
        let mut state = session.state();
        let epoch = state.epoch;
        let mut stale = std::mem::take(&mut state.stale);
        // While nothing can be appended, connects that are given up would add theirs for ever.
        if state.kept && stale.len() < STALE_KEYS_MAX {
            stale.extend(state.keys(&session.client_id));
            stale.extend(queue_keys);
        }
        let filters = std::mem::take(&mut state.filters);
        let memory = std::mem::take(&mut state.memory);
        *state = State { epoch: new_epoch(), stale, memory, ..State::default() };
        state.count();
        (epoch, filters)
    };
    let filters: Vec<Box<str>> = filters.filters().map(Into::into).collect();
    broker.live.forget(session, &filters);
    broker.live.pass_on(broker, session, Departure::Session).await;
    let lost = session.outbox().take_lost();
    session.report_lost(broker, lost);
    session.outbox().clear();
    let received = session.received().release_all();
    forget_ids(broker, epoch, &received);
}

/// Appends changes that remove what ended sessions left, after everything that they gave to others is in
/// the others' notes and in records.
fn append_removal(broker: &Broker, changes: &[Change]) -> Result<Ticket, AppendError> {
    if changes.is_empty() {
        return Ok(Ticket::default());
    }
    let settled = broker.live.settle(broker);
    // Where only the state is full, the removal makes room for what is pending.
    let makes_room = matches!(settled, Err(AppendError::NoSpace)) && !broker.has_state_room();
    if !makes_room {
        settled?;
    }
    let appended = append(&*broker.broker, changes);
    if makes_room {
        // Refused: tried again at the next sweep.
        let _ = broker.live.settle(broker);
    }
    appended
}

/// Appends removals as [`append_removal`] does, waits for room, and waits until they are durable.
async fn remove_durable(broker: &Broker, changes: &[Change]) -> Result<(), Stopped> {
    broker.durable(&*broker.broker, || append_removal(broker, changes)).await
}

fn removed(keys: Vec<Vec<u8>>) -> Vec<Change> {
    keys.into_iter().map(|key| (key, None)).collect()
}

/// Removes the packet ids of an epoch that is no longer kept.
fn forget_ids(broker: &Broker, epoch: u64, received: &[(u16, Received)]) {
    for (number, stream) in broker.streams.iter().enumerate() {
        let ids = received.iter().filter(|(_, received)| received.stream == number);
        let removed: Vec<Change> = ids.map(|(id, _)| (qos2_key(epoch, *id).to_vec(), None)).collect();
        // Not awaited: ids of an epoch without a session are removed at the next start.
        super::append_unawaited(&**stream, &removed);
    }
}

impl State {
    /// Returns the keys of the durable record and the subscriptions.
    fn keys(&self, client_id: &str) -> Vec<Vec<u8>> {
        let filters = self.filters.filters().map(|filter| subscription_key(self.epoch, filter));
        [key(SESSION, client_id.as_bytes())].into_iter().chain(filters).collect()
    }

    /// Returns the approximate number of bytes of memory of the filters.
    fn filters_memory(&self) -> usize {
        subscriptions::memory(self.filters.len(), self.filter_sums.levels, self.filter_sums.bytes)
    }

    fn count(&mut self) {
        self.memory.hold(self.filters_memory());
    }

    fn stale_removed(&self) -> Vec<Change> {
        removed(self.stale.clone())
    }

    fn is_expired(&self, now_us: u64) -> bool {
        let ends_us = self.disconnected_us.saturating_add(u64::from(self.expiry_s) * 1_000_000);
        self.alive && !self.connected && self.expiry_s != NEVER && ends_us <= now_us
    }

    /// Returns whether the session has expired, or was left by an abandoned connect.
    fn is_over(&self, now_us: u64) -> bool {
        self.is_expired(now_us) || (!self.alive && !self.connected)
    }

    /// Returns the change that appends the durable record.
    fn record(&self, client_id: &str) -> Change {
        (key(SESSION, client_id.as_bytes()), Some(self.to_bytes()))
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![1];
        bytes.extend(self.epoch.to_be_bytes());
        bytes.extend(self.expiry_s.to_be_bytes());
        bytes.extend(self.disconnected_us.to_be_bytes());
        bytes.extend(self.owner.to_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (&[1], rest) = bytes.split_first_chunk::<1>()? else { return None };
        let (epoch, rest) = rest.split_first_chunk()?;
        let (expiry_s, rest) = rest.split_first_chunk()?;
        let (disconnected_us, rest) = rest.split_first_chunk()?;
        Some(Self {
            epoch: u64::from_be_bytes(*epoch),
            owner: Owner::from_bytes(rest)?,
            alive: true,
            connected: false,
            connection: None,
            expiry_s: u32::from_be_bytes(*expiry_s),
            kept: true,
            disconnected_us: u64::from_be_bytes(*disconnected_us),
            ..Self::default()
        })
    }
}

pub fn qos2_key(epoch: u64, packet_id: u16) -> [u8; 12] {
    let mut key = [0; 12];
    key[..2].copy_from_slice(QOS2);
    key[2..10].copy_from_slice(&epoch.to_be_bytes());
    key[10..].copy_from_slice(&packet_id.to_be_bytes());
    key
}

pub fn subscription_key(epoch: u64, filter: &str) -> Vec<u8> {
    [SUBSCRIPTION, &epoch.to_be_bytes(), filter.as_bytes()].concat()
}

fn key(prefix: &[u8], rest: &[u8]) -> Vec<u8> {
    [prefix, rest].concat()
}

/// Returns a random epoch, so that no epoch is used twice, whatever a crash lost.
fn new_epoch() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().1
}

fn remove(stream: &dyn Stream, key: &[u8]) {
    // Refused: still there at the next start, and removed then.
    let _ = stream.append(&[], &[StateChange { key, value: None }]);
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::listeners::mqtt::config::Config;
    use crate::listeners::mqtt::fuzzing;
    use crate::stream::memory::MemoryStream;

    #[tokio::test]
    async fn the_sums_over_the_filters_follow_each_change() {
        let stream = |name| MemoryStream::new(name, 1);
        let broker = fuzzing::broker(&Config::default(), stream("s"), stream("broker"));
        let (session, _turn) = broker.sessions.claim("c", 9).await.expect("there is room");
        let of = |filters: &[&str]| {
            let mut sums = FilterSums::default();
            filters.iter().for_each(|filter| sums.add(filter));
            sums
        };
        session.add_filter("a/+/b", Options::default());
        session.add_filter("c/#", Options::default());
        session.add_filter("c/#", Options { qos: 1, ..Options::default() });
        assert_eq!(session.filter_sums(), of(&["a/+/b", "c/#"]), "one that comes again counts once");
        assert_eq!((session.filter_sums().bytes, session.filter_sums().levels), (8, 5));
        session.remove_filter("a/+/b");
        session.remove_filter("none");
        assert_eq!(session.filter_sums(), of(&["c/#"]));
        session.remove_filter("c/#");
        assert_eq!(session.filter_sums(), FilterSums::default());
    }
}
