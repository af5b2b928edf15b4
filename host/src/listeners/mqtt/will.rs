//! Wills: messages that are published when their client is lost.
//!
//! A will is durable before its CONNACK, as state of the stream that its topic belongs to. The append
//! that publishes it removes this state, so that it is never published twice. Wills wait in one queue
//! for their delay, for room in their stream, or, after a restart, for the clients of the last run. The
//! size of all wills in the state of streams is bounded.

use std::collections::{BTreeSet, HashMap};
use std::future::pending;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

use super::acks::Stopped;
use super::blobs::{self, Blob, Kind};
use super::inbound::taken_in;
use super::owner::Owner;
use super::retained::{self, Staged};
use super::session::Change;
use super::{Broker, borrowed};
use crate::ingest::{Draft, Rejected};
use crate::properties::{Origin, facts};
use crate::stream::{NewMessage, Stream};
use crate::telemetry::Failures;

const KIND: Kind = *b"wi";
const FORMAT: u8 = 2;
/// Format without a device.
const FORMAT_1: u8 = 1;
/// Size of format, delay and flags.
const HEAD_BYTES: usize = 1 + 4 + 2;
/// Size of the length of each part except the payload.
const PART_HEAD_BYTES: usize = 4;
/// Interval of attempts to publish a will that waits for room.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The message in CONNECT that is to be published when the client is lost.
pub struct Will {
    pub topic: Box<str>,
    pub payload: Bytes,
    /// Properties in the encoding of [`crate::properties`].
    pub properties: Vec<u8>,
    pub flags: u16,
    pub delay_s: u32,
    /// Device of the client, if it is known.
    pub device: Option<Box<str>>,
    /// Record in the stream's state, once it is appended or about to be.
    pub record: Option<Record>,
}

/// A will in the state of its stream.
pub struct Record {
    stream: usize,
    blob: Blob,
    _place: Place,
}

/// The size of a will in the state of streams, counted until this is dropped.
#[derive(Debug)]
pub struct Place {
    bytes: usize,
    all: Arc<AtomicUsize>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.all.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

/// The will of a connect that is not accepted yet. If the network connection is never accepted, no will
/// is published (MQTT 5.0, 3.1.2.5): the will is removed when this is dropped.
pub struct Unaccepted<'b> {
    broker: &'b Broker,
    will: Option<Will>,
}

impl<'b> Unaccepted<'b> {
    pub fn new(broker: &'b Broker, will: Option<Will>) -> Self {
        Self { broker, will }
    }

    /// Stores the will, if there is one: see [`Will::keep`].
    pub async fn keep(&mut self, client_id: &str, place: Option<Place>) -> Result<(), Stopped> {
        match (&mut self.will, place) {
            (Some(will), Some(place)) => will.keep(self.broker, client_id, place).await,
            _ => Ok(()),
        }
    }

    /// Passes the will to the connection, when CONNACK is sent.
    pub fn accepted(mut self) -> Option<Will> {
        self.will.take()
    }
}

impl Drop for Unaccepted<'_> {
    fn drop(&mut self) {
        if let Some(will) = self.will.take() {
            will.forget(self.broker);
        }
    }
}

/// A will whose client was lost.
struct Waiting {
    will: Will,
    cause: Cause,
    due: Instant,
}

/// What a will waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cause {
    /// The will's own delay.
    Delay,
    /// Room in the will's stream.
    Room,
    /// The client of the last run.
    Restart,
}

#[derive(Default)]
struct Queue {
    by_client: HashMap<Box<str>, Vec<Waiting>>,
    due: BTreeSet<(Instant, Box<str>)>,
}

/// The size of all wills, and those that wait.
pub struct Wills {
    bytes: Arc<AtomicUsize>,
    bytes_max: usize,
    waiting: Mutex<Queue>,
    /// Notified when the first will may be due earlier.
    changed: Notify,
    /// Records whose removal their streams did not accept. It is tried again, and until then they count.
    unremoved: Mutex<Vec<Record>>,
}

impl Will {
    /// Stores the will. It is durable when this returns. If the future is dropped earlier, the will is
    /// removed.
    pub async fn keep(&mut self, broker: &Broker, client_id: &str, place: Place) -> Result<(), Stopped> {
        let stream = broker.ingest.route(&self.topic);
        let bytes = self.encode(client_id);
        let blob = Blob::new(KIND, *uuid::Uuid::new_v4().as_bytes(), &bytes);
        let mut changes = Vec::new();
        blob.write(&bytes, None, &mut changes);
        self.record = Some(Record { stream, blob, _place: place });
        broker.append_durable(&*broker.streams[stream], &changes).await
    }

    /// Removes the will, because the client no longer wants it to be published.
    pub fn forget(self, broker: &Broker) {
        if let Some(record) = self.record {
            // Not awaited: lost in a crash, it waits for the client once more.
            broker.wills.remove(broker, record);
        }
    }

    /// Removes the will as [`Self::forget`] does. The removal is durable when this returns, so the will
    /// is never published.
    pub async fn forget_durably(self, broker: &Broker) -> Result<(), Stopped> {
        let Some(record) = &self.record else { return Ok(()) };
        let (stream, mut removal) = (record.stream, Vec::new());
        record.blob.remove(&mut removal);
        // Dropped before it is done, the will is forgotten as any other.
        let unforgotten = Unaccepted::new(broker, Some(self));
        broker.append_durable(&*broker.streams[stream], &removal).await?;
        drop(unforgotten.accepted());
        Ok(())
    }

    /// Appends the will and the removal of its record together. Does not wait.
    fn publish(&mut self, broker: &Broker, client_id: &str) -> Result<(), Rejected> {
        let place = broker.ingest.place(&self.topic);
        let number = place.stream;
        if let Some(elsewhere) = self.record.take_if(|record| record.stream != number) {
            broker.wills.remove(broker, elsewhere);
        }
        let device = self.device.as_deref().unwrap_or(place.device_of(&self.topic, client_id));
        let draft = Draft {
            topic: &self.topic,
            payload: &self.payload,
            properties: &self.properties,
            device,
            flags: self.flags | place.flags(),
            received_us: super::now_us(),
        };
        let message = broker.ingest.message(number, draft);
        let mut removal = Vec::new();
        if let Some(record) = &self.record {
            record.blob.remove(&mut removal);
        }
        append(broker, number, &client_id.into(), message, &removal)
    }

    /// Returns whether the will belongs to a client with this owner.
    fn is_of(&self, owner: &Owner) -> bool {
        let name = crate::properties::get(&self.properties, Origin::Listener, facts::USERNAME);
        owner.has_name(name)
    }

    /// Reports that the will is lost, and removes its record.
    fn give_up(self, broker: &Broker, client_id: &str, why: &str) {
        let detail = format!("client {client_id}, topic {}: {why}", self.topic);
        broker.failures.report_by("mqtt: a will could not be published", client_id, 1, &detail, "");
        self.forget(broker);
    }

    /// Returns the size of its record in the stream's state.
    pub fn state_bytes(&self, client_id: &str) -> usize {
        blobs::state_bytes(self.encoded_len(client_id))
    }

    fn encoded_len(&self, client_id: &str) -> usize {
        let device = self.device.as_deref().unwrap_or_default();
        let parts = [client_id.len(), self.topic.len(), self.properties.len(), device.len()];
        HEAD_BYTES + parts.map(|len| PART_HEAD_BYTES + len).iter().sum::<usize>() + self.payload.len()
    }

    fn encode(&self, client_id: &str) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.encoded_len(client_id));
        bytes.push(FORMAT);
        bytes.extend(self.delay_s.to_be_bytes());
        bytes.extend(self.flags.to_be_bytes());
        let device = self.device.as_deref().unwrap_or_default();
        for part in [client_id.as_bytes(), self.topic.as_bytes(), &self.properties, device.as_bytes()] {
            bytes.extend((part.len() as u32).to_be_bytes());
            bytes.extend_from_slice(part);
        }
        bytes.extend_from_slice(&self.payload);
        bytes
    }

    /// Decodes a will and its client id.
    fn decode(bytes: &[u8]) -> Option<(Box<str>, Self)> {
        fn part<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
            let (len, after) = rest.split_first_chunk()?;
            let (part, after) = after.split_at_checked(u32::from_be_bytes(*len) as usize)?;
            *rest = after;
            Some(part)
        }
        let (&format, rest) = bytes.split_first()?;
        let (delay_s, rest) = rest.split_first_chunk()?;
        let (flags, mut rest) = rest.split_first_chunk()?;
        let client_id = std::str::from_utf8(part(&mut rest)?).ok()?;
        let topic = std::str::from_utf8(part(&mut rest)?).ok()?;
        let properties = part(&mut rest)?;
        let device = match format {
            FORMAT => std::str::from_utf8(part(&mut rest)?).ok()?,
            FORMAT_1 => "",
            _ => return None,
        };
        if !crate::properties::is_valid(properties) || !crate::topic::is_valid_name(topic) {
            return None;
        }
        let will = Self {
            topic: topic.into(),
            payload: Bytes::copy_from_slice(rest),
            properties: properties.to_vec(),
            flags: u16::from_be_bytes(*flags),
            delay_s: u32::from_be_bytes(*delay_s),
            device: (!device.is_empty()).then(|| device.into()),
            record: None,
        };
        Some((client_id.into(), will))
    }
}

fn append(
    broker: &Broker,
    number: usize,
    publisher: &Arc<str>,
    message: NewMessage<'_>,
    removal: &[Change],
) -> Result<(), Rejected> {
    let retaining = retained::stage(broker, number, publisher, &[message]);
    let retained = retaining.as_ref().map_or(&[][..], Staged::changes);
    let changes = [borrowed(removal), borrowed(retained)].concat();
    let appended = broker.ingest.append(number, &[message], &changes)?;
    taken_in(broker, &[message]);
    if let Some(retaining) = retaining {
        retaining.done(broker, appended);
    }
    Ok(())
}

/// Handles the loss of the client, whose session has `expiry_s` left. A will without delay is appended
/// before the session can be taken over, so that it precedes all messages of the client's next
/// connection. Other wills wait: see [`Wills::client_is_back`].
pub async fn lost(broker: &Broker, client_id: &str, expiry_s: u32, mut will: Will) {
    let delay = Duration::from_secs(will.delay_s.min(expiry_s).into());
    if !delay.is_zero() {
        return broker.wills.wait(client_id, will, Cause::Delay, Instant::now() + delay);
    }
    let begun = Instant::now();
    loop {
        match will.publish(broker, client_id) {
            Ok(()) => return,
            Err(Rejected::NoRoom { lasts: false }) if begun.elapsed() < broker.config().drain_timeout.0 => {
                let left = broker.config().drain_timeout.0.saturating_sub(begun.elapsed());
                // Out of time: it waits for room.
                let _ = timeout(left, broker.ingest.room(broker.ingest.route(&will.topic))).await;
            }
            Err(Rejected::NoRoom { .. }) => {
                return broker.wills.wait(client_id, will, Cause::Room, Instant::now() + RETRY_AFTER);
            }
            Err(error) => return will.give_up(broker, client_id, &error.to_string()),
        }
    }
}

impl Wills {
    /// Loads the wills of the last run. They count even beyond `bytes_max`, and wait for at least
    /// `delay_least`.
    pub fn load(
        streams: &[Arc<dyn Stream>],
        bytes_max: usize,
        delay_least: Duration,
        failures: &Failures,
    ) -> Self {
        let all = Arc::new(AtomicUsize::new(0));
        let (mut waiting, now) = (Queue::default(), Instant::now());
        for (number, stream) in streams.iter().enumerate() {
            let mut removed = Vec::new();
            for (blob, bytes) in blobs::load(&**stream, KIND) {
                let Some((client_id, mut will)) = Will::decode(&bytes) else {
                    failures.report("mqtt: a will cannot be read, removed", 1, stream.name(), "");
                    blob.remove(&mut removed);
                    continue;
                };
                let bytes = blobs::state_bytes(bytes.len());
                all.fetch_add(bytes, Ordering::AcqRel);
                let place = Place { bytes, all: all.clone() };
                will.record = Some(Record { stream: number, blob, _place: place });
                let due = now + delay_least.max(Duration::from_secs(will.delay_s.into()));
                waiting.push(&client_id, Waiting { will, cause: Cause::Restart, due });
            }
            super::append_unawaited(&**stream, &removed);
        }
        Self {
            bytes: all,
            bytes_max,
            waiting: Mutex::new(waiting),
            changed: Notify::new(),
            unremoved: Mutex::default(),
        }
    }

    /// Returns room for another will; `None` if all wills already have `wills_bytes_max`.
    pub fn enter(&self, broker: &Broker, bytes: usize) -> Option<Place> {
        self.remove_left(broker, lock(&self.unremoved));
        let fits = |all: usize| all.checked_add(bytes).filter(|all| *all <= self.bytes_max);
        self.bytes.fetch_update(Ordering::AcqRel, Ordering::Acquire, fits).ok()?;
        Some(Place { bytes, all: self.bytes.clone() })
    }

    /// Returns the size of all wills in the state of streams.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Acquire)
    }

    /// Handles that the client has a connection again, as `owner`, before its CONNACK is sent. A will
    /// that waited for its delay is void if the session is resumed (`resumed`); if the session has
    /// ended, the will is published now (MQTT 5.0, 3.1.3.2.2), and so is a will that waited for room. A
    /// will of the last run is void, unless it belongs to another user. Waits until the will's stream
    /// has room, because a later will could overwrite messages of the new connection. Cancel safe: that
    /// will then waits for room, and those that would be void wait as before, since the client is not
    /// connected.
    pub async fn client_is_back(&self, broker: &Broker, client_id: &str, owner: &Owner, resumed: bool) {
        while let Err(stream) = self.settle(broker, client_id, owner, resumed) {
            broker.streams[stream].writable().await;
        }
    }

    /// Decides about the wills of a client that is connected again. The error is the stream without room
    /// for one of them, which waits for it.
    fn settle(&self, broker: &Broker, client_id: &str, owner: &Owner, resumed: bool) -> Result<(), usize> {
        let mut queue = lock(&self.waiting);
        let (mut void, mut full) = (Vec::new(), Ok(()));
        for Waiting { mut will, cause, due } in queue.take(client_id) {
            match cause {
                Cause::Restart if !will.is_of(owner) => queue.push(client_id, Waiting { will, cause, due }),
                Cause::Restart => void.push(Waiting { will, cause, due }),
                Cause::Delay if resumed => void.push(Waiting { will, cause, due }),
                Cause::Delay | Cause::Room => match will.publish(broker, client_id) {
                    Ok(()) => {}
                    Err(Rejected::NoRoom { .. }) => {
                        full = Err(broker.ingest.route(&will.topic));
                        let due = Instant::now() + RETRY_AFTER;
                        queue.push(client_id, Waiting { will, cause: Cause::Room, due });
                    }
                    Err(error) => will.give_up(broker, client_id, &error.to_string()),
                },
            }
        }
        if full.is_ok() {
            void.into_iter().for_each(|waiting| waiting.will.forget(broker));
        } else {
            void.into_iter().for_each(|waiting| queue.push(client_id, waiting));
            self.changed.notify_one();
        }
        full
    }

    fn wait(&self, client_id: &str, will: Will, cause: Cause, due: Instant) {
        lock(&self.waiting).push(client_id, Waiting { will, cause, due });
        self.changed.notify_one();
    }

    fn remove(&self, broker: &Broker, record: Record) {
        let mut unremoved = lock(&self.unremoved);
        unremoved.push(record);
        self.remove_left(broker, unremoved);
    }

    /// Tries to remove records from each stream until it refuses one. A stream without room delays only
    /// its own removals.
    fn remove_left(&self, broker: &Broker, mut unremoved: MutexGuard<'_, Vec<Record>>) {
        let mut refuses = vec![false; broker.streams.len()];
        unremoved.retain(|record| {
            let mut removal = Vec::new();
            record.blob.remove(&mut removal);
            let refuses = &mut refuses[record.stream];
            *refuses = *refuses || broker.streams[record.stream].append(&[], &borrowed(&removal)).is_err();
            *refuses
        });
    }

    /// Publishes the first will that is due. Returns when to call again; `None` if not before there is
    /// another will. It holds the lock, so that a client that connects again finds either a waiting
    /// will, or one in its stream.
    pub fn publish_due(&self, broker: &Broker, now: Instant) -> Option<Instant> {
        let mut queue = lock(&self.waiting);
        if let Some((client_id, Waiting { mut will, .. })) = queue.take_due(now) {
            match will.publish(broker, &client_id) {
                Ok(()) => {}
                Err(Rejected::NoRoom { .. }) => {
                    queue.push(&client_id, Waiting { will, cause: Cause::Room, due: now + RETRY_AFTER });
                }
                Err(error) => will.give_up(broker, &client_id, &error.to_string()),
            }
        }
        queue.due.first().map(|(due, _)| *due)
    }
}

impl Queue {
    fn push(&mut self, client_id: &str, waiting: Waiting) {
        self.due.insert((waiting.due, client_id.into()));
        self.by_client.entry(client_id.into()).or_default().push(waiting);
    }

    fn take(&mut self, client_id: &str) -> Vec<Waiting> {
        let taken = self.by_client.remove(client_id).unwrap_or_default();
        for waiting in &taken {
            self.due.remove(&(waiting.due, client_id.into()));
        }
        taken
    }

    fn take_due(&mut self, now: Instant) -> Option<(Box<str>, Waiting)> {
        let (due, client_id) = self.due.first().filter(|(due, _)| *due <= now)?.clone();
        let mut wills = self.take(&client_id);
        let first = wills.iter().position(|waiting| waiting.due == due)?;
        let first = wills.swap_remove(first);
        wills.into_iter().for_each(|other| self.push(&client_id, other));
        Some((client_id, first))
    }
}

/// Publishes wills when they are due, until shutdown. Those that still wait stay for the next run (MQTT
/// 5.0, 3.1.2.5).
pub async fn publish_waiting(broker: Arc<Broker>) {
    loop {
        let next = broker.wills.publish_due(&broker, Instant::now());
        let due = async {
            match next {
                Some(due) => tokio::time::sleep_until(due).await,
                None => pending().await,
            }
        };
        tokio::select! {
            () = due => {}
            () = broker.wills.changed.notified() => {}
            () = broker.shutdown.cancelled() => return,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
