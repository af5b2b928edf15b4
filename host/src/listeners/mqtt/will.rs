//! The message that a client leaves behind, for when it is lost.
//!
//! A will is durable before its CONNACK, as state of the stream that its topic
//! belongs to, and goes in the same append that publishes it: never twice.
//! After a restart the wills of clients that the last run lost wait for them
//! to come back. What all wills take of the streams' states is bounded.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, timeout};

use super::acks::Stopped;
use super::blobs::{self, Blob, Kind};
use super::inbound::{cut_device, taken_in};
use super::retained::{self, Staged};
use super::session::{Change, Session};
use super::{Broker, borrowed};
use crate::batch::flags;
use crate::stream::{AppendError, NewMessage, Stream, partition_of};
use crate::telemetry::Failures;

const KIND: Kind = *b"wi";
const FORMAT: u8 = 2;
/// Without a device.
const FORMAT_1: u8 = 1;
/// Format, delay, flags.
const HEAD_BYTES: usize = 1 + 4 + 2;
/// The length of each part but the payload.
const PART_HEAD_BYTES: usize = 4;
/// A will that waits looks so often whether its client is back.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What CONNECT asked to be published when the client is lost.
pub struct Will {
    pub topic: Box<str>,
    pub payload: Bytes,
    /// As [`crate::properties`] lays them out.
    pub properties: Vec<u8>,
    pub flags: u16,
    pub delay_s: u32,
    /// Of its client, where that is known to be one.
    pub device: Option<Box<str>>,
    /// Once it is durable.
    pub record: Option<Record>,
}

/// A will in its stream's state.
pub struct Record {
    stream: usize,
    blob: Blob,
    place: Place,
}

/// What a will takes of the streams' states, counted until it is dropped.
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

/// Removes the record of a connect that ended before its CONNACK.
struct GivenUp<'b> {
    broker: &'b Broker,
    record: Option<Record>,
}

impl Drop for GivenUp<'_> {
    fn drop(&mut self) {
        if let Some(record) = self.record.take() {
            self.broker.wills.remove(self.broker, record);
        }
    }
}

/// How many bytes there are of all wills, and the wills of the last run whose
/// clients are not back yet.
pub struct Wills {
    bytes: Arc<AtomicUsize>,
    bytes_max: usize,
    restored: Mutex<HashMap<Box<str>, Vec<Will>>>,
    /// Records whose streams did not take their removal: it is tried again, and
    /// until then they count.
    unremoved: Mutex<Vec<Record>>,
}

impl Will {
    /// Durable when it returns; dropped before that, as if it had not been called.
    pub async fn keep(&mut self, broker: &Broker, client_id: &str, place: Place) -> Result<(), Stopped> {
        let stream = broker.route(&self.topic);
        let bytes = self.encode(client_id);
        let blob = Blob::new(KIND, *uuid::Uuid::new_v4().as_bytes(), &bytes);
        let mut changes = Vec::new();
        blob.write(&bytes, None, &mut changes);
        let mut given_up = GivenUp { broker, record: Some(Record { stream, blob, place }) };
        broker.append_durable(&*broker.streams[stream], &changes).await?;
        self.record = given_up.record.take();
        Ok(())
    }

    /// The client does not want it published any more.
    pub fn forget(self, broker: &Broker) {
        if let Some(record) = self.record {
            // Not awaited: lost in a crash, it waits for the client once more.
            broker.wills.remove(broker, record);
        }
    }

    /// Appends the will, waiting for room; `false` when the stream stopped or refuses it.
    async fn publish(&mut self, broker: &Broker, client_id: &str) -> bool {
        let number = broker.route(&self.topic);
        let stream = &broker.streams[number];
        if let Some(elsewhere) = self.record.take_if(|record| record.stream != number) {
            broker.wills.remove(broker, elsewhere);
        }
        let span = broker.namespace.device_span(&self.topic);
        let fits = if span.is_some() { flags::FITS_NAMESPACE } else { 0 };
        let of_topic = span.map_or(cut_device(client_id), |span| &self.topic[span]);
        let device = self.device.as_deref().unwrap_or(of_topic);
        let message = NewMessage {
            topic: &self.topic,
            payload: &self.payload,
            properties: &self.properties,
            route: "",
            device,
            partition: partition_of(device, stream.identity().partitions),
            flags: self.flags | fits,
            received_us: super::now_us(),
            event_us: 0,
        };
        let mut removal = Vec::new();
        if let Some(record) = &self.record {
            record.blob.remove(&mut removal);
        }
        loop {
            match append(broker, number, message, &removal) {
                Ok(()) => return true,
                Err(AppendError::Full | AppendError::NoSpace) => stream.writable().await,
                Err(_) => return false,
            }
        }
    }

    async fn publish_in_time(mut self, broker: &Broker, client_id: &str) {
        let published = timeout(broker.config.drain_timeout.0, self.publish(broker, client_id)).await;
        if !matches!(published, Ok(true)) {
            let detail = format!("client {client_id}, topic {}", self.topic);
            broker.failures.report("mqtt: a will could not be published", 1, &detail, "");
            // Its record waits for the next run, and counts.
            std::mem::forget(self.record.map(|record| record.place));
        }
    }

    /// What its record takes of its stream's state.
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

    /// With the client that it is of.
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
    message: NewMessage<'_>,
    removal: &[Change],
) -> Result<(), AppendError> {
    let retaining = retained::stage(broker, number, &[message]);
    let retained = retaining.as_ref().map_or(&[][..], Staged::changes);
    let changes = [borrowed(removal), borrowed(retained)].concat();
    let appended = broker.streams[number].append(&[message], &changes)?;
    taken_in(broker, &[message]);
    if let Some(retaining) = retaining {
        retaining.done(broker, appended);
    }
    Ok(())
}

/// The client of `session`'s connection number `connects` was lost, in the
/// session's `epoch`. A delayed will is not published when its client is back
/// in time and goes on with the session; it is when a clean start ends that
/// (MQTT 5.0, 3.1.3.2.2). At shutdown a delayed will stays for the next run (3.1.2.5).
pub async fn lost(broker: &Broker, session: &Session, connects: u64, epoch: u64, will: Will) {
    let delay = Duration::from_secs(will.delay_s.min(session.expiry_s()).into());
    let is_back = || session.connects.load(Ordering::Acquire) != connects;
    let due = Instant::now() + delay;
    while !is_back() && Instant::now() < due {
        let look_at = due.min(Instant::now() + LOOK_EVERY);
        tokio::select! {
            () = tokio::time::sleep_until(look_at) => {}
            () = broker.shutdown.cancelled() => return,
        }
    }
    if !delay.is_zero() && is_back() && session.epoch() == epoch {
        return will.forget(broker);
    }
    will.publish_in_time(broker, &session.client_id).await;
}

impl Wills {
    /// Reads the wills that the last run left; they count, also past `bytes_max`.
    pub fn load(streams: &[Arc<dyn Stream>], bytes_max: usize, failures: &Failures) -> Self {
        let all = Arc::new(AtomicUsize::new(0));
        let mut restored: HashMap<Box<str>, Vec<Will>> = HashMap::new();
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
                will.record = Some(Record { stream: number, blob, place });
                restored.entry(client_id).or_default().push(will);
            }
            super::append_unawaited(&**stream, &removed);
        }
        Self { bytes: all, bytes_max, restored: Mutex::new(restored), unremoved: Mutex::default() }
    }

    /// Room for one more; `None` where all wills have `wills_bytes_max` already.
    pub fn enter(&self, broker: &Broker, bytes: usize) -> Option<Place> {
        self.remove_left(broker, lock(&self.unremoved));
        let fits = |all: usize| all.checked_add(bytes).filter(|all| *all <= self.bytes_max);
        self.bytes.fetch_update(Ordering::AcqRel, Ordering::Acquire, fits).ok()?;
        Some(Place { bytes, all: self.bytes.clone() })
    }

    /// What all wills take of the streams' states.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Acquire)
    }

    /// The client is back: its wills of the last run are void.
    pub fn client_is_back(&self, broker: &Broker, client_id: &str) {
        for will in self.take(client_id) {
            will.forget(broker);
        }
    }

    fn remove(&self, broker: &Broker, record: Record) {
        let mut unremoved = lock(&self.unremoved);
        unremoved.push(record);
        self.remove_left(broker, unremoved);
    }

    fn remove_left(&self, broker: &Broker, mut unremoved: MutexGuard<'_, Vec<Record>>) {
        while let Some(record) = unremoved.last() {
            let mut removal = Vec::new();
            record.blob.remove(&mut removal);
            if broker.streams[record.stream].append(&[], &borrowed(&removal)).is_err() {
                return;
            }
            unremoved.pop();
        }
    }

    fn take(&self, client_id: &str) -> Vec<Will> {
        lock(&self.restored).remove(client_id).unwrap_or_default()
    }

    /// Clients and when their wills are due, soonest first.
    fn due(&self, least: Duration) -> Vec<(Duration, Box<str>)> {
        let restored = lock(&self.restored);
        let of = |wills: &[Will]| wills.iter().map(|will| will.delay_s).max().unwrap_or_default();
        let mut due: Vec<_> = restored
            .iter()
            .map(|(client, wills)| (least.max(Duration::from_secs(of(wills).into())), client.clone()))
            .collect();
        due.sort();
        due
    }
}

/// Publishes the wills of the last run whose clients stay away.
pub async fn publish_restored(broker: Arc<Broker>) {
    let start = Instant::now();
    for (delay, client_id) in broker.wills.due(broker.config.will_delay_after_restart.0) {
        tokio::select! {
            () = tokio::time::sleep_until(start + delay) => {}
            () = broker.shutdown.cancelled() => return,
        }
        for will in broker.wills.take(&client_id) {
            will.publish_in_time(&broker, &client_id).await;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
