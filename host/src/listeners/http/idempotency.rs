//! Requests that are remembered by their `Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header).
//! A repeated request is answered as the first was, and appends nothing.
//!
//! A request has a record in each stream to which it brought messages, as state of that stream in the
//! same append as the messages: after a crash both are there, or neither. In a record, messages of other
//! streams are [`Known::Elsewhere`]; a repeated request is continued for those streams.
//!
//! Records are bounded by age and number. If there are too many, the client with the most loses its
//! oldest, so that no client displaces the records of others.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use metrics::{Counter, Gauge};
use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::Xxh3;

use super::answer::Outcome;
use crate::ingest::{Ingest, Rejected};
use crate::stream::{Appended, NewMessage, StateChange, Ticket};

/// Longest key that a client may send.
pub const KEY_BYTES_MAX: usize = 256;
/// Most bytes of all records, in memory and in the state of streams.
pub const RECORDS_BYTES_MAX: usize = 16 << 20;
/// Most removals that found no room in their stream's state. Further ones are left to the next start.
pub const UNREMOVED_MAX: usize = 1_024;

/// First bytes of the records' keys in a stream's state.
const KIND: &[u8] = b"ik";
const FORMAT: u8 = 1;
/// Size of format, client, time and fingerprint.
const HEAD_BYTES: usize = 1 + 8 + 8 + 16;
/// Outcome in a record for a message of another stream.
const ELSEWHERE: u8 = 1;

/// Identifies a request of a client. No other client can choose a key with the same value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Id {
    key: [u8; 16],
    client: u64,
    /// Fingerprint of the whole request. Another request with the same key is refused.
    fingerprint: u128,
}

/// What a record says about a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    Decided(Outcome),
    Elsewhere,
}

/// The outcome of an earlier request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repeated {
    /// Ticket with which the messages of this stream are durable.
    pub ticket: Ticket,
    /// One entry for each message of the request.
    pub known: Vec<Known>,
}

/// The key was used for another request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch;

pub struct Idempotency {
    records: Mutex<Records>,
    /// Number of records.
    kept: Gauge,
    /// Number of records that were removed early.
    forgotten: Counter,
}

#[derive(Default)]
struct Records {
    /// How long a request is remembered, and how many are.
    window: Duration,
    keys_max: usize,
    by_key: HashMap<Place, Record>,
    /// Records by age, the oldest first.
    by_age: BTreeMap<u64, Place>,
    by_client: HashMap<u64, BTreeSet<u64>>,
    /// Clients by their number of records.
    by_count: BTreeSet<(usize, u64)>,
    next: u64,
    bytes: usize,
    unremoved: Vec<Place>,
}

/// Stream and key of a record.
type Place = (usize, [u8; 16]);

struct Record {
    number: u64,
    client: u64,
    fingerprint: u128,
    until: Instant,
    ticket: Ticket,
    /// One byte for each message; empty if all were accepted.
    outcomes: Box<[u8]>,
}

impl Id {
    /// Returns the id of a request. `client` is the user, or the available identification of an unknown
    /// client; `parts` is everything in the request.
    pub fn new(client: &str, key: &[u8], parts: &[&[u8]]) -> Self {
        let digest: [u8; 32] = Sha256::new()
            .chain_update((client.len() as u64).to_le_bytes())
            .chain_update(client)
            .chain_update(key)
            .finalize()
            .into();
        let of_client: [u8; 32] = Sha256::digest(client).into();
        let mut fingerprint = Xxh3::new();
        for part in parts {
            fingerprint.update(&(part.len() as u64).to_le_bytes());
            fingerprint.update(part);
        }
        Self {
            key: *digest.first_chunk().expect("it is longer"),
            client: u64::from_le_bytes(*of_client.first_chunk().expect("it is longer")),
            fingerprint: fingerprint.digest128(),
        }
    }

    fn state_key(key: &[u8; 16]) -> Vec<u8> {
        [KIND, key].concat()
    }
}

impl Idempotency {
    /// Reads the records of the last run.
    pub fn load(
        ingest: &Ingest,
        window: Duration,
        keys_max: usize,
        now_us: u64,
        (kept, forgotten): (Gauge, Counter),
    ) -> Self {
        let (mut found, mut records) = (Vec::new(), Records { window, keys_max, ..Records::default() });
        for (stream, source) in ingest.streams().iter().enumerate() {
            for (key, value) in source.state(KIND) {
                let key: Result<[u8; 16], _> = key[KIND.len()..].try_into();
                // What cannot be read is a later version's.
                if let (Ok(key), Some(decoded)) = (key, decode(&value)) {
                    found.push(((stream, key), decoded));
                }
            }
        }
        found.sort_by_key(|(_, decoded)| decoded.at_us);
        let now = Instant::now();
        for (place, Decoded { client, at_us, fingerprint, outcomes }) in found {
            // A clock that was set back makes none of them older.
            let age = Duration::from_micros(now_us.saturating_sub(at_us)).min(window);
            let (until, ticket) = (now + (window - age), Ticket::default());
            let number = records.next;
            records.insert(place, Record { number, client, fingerprint, until, ticket, outcomes });
        }
        let this = Self { records: Mutex::new(records), kept, forgotten };
        this.remove_old(ingest);
        this
    }

    /// Returns the outcome of an earlier request in one stream.
    pub fn look(&self, stream: usize, id: &Id, messages: usize) -> Result<Option<Repeated>, Mismatch> {
        let records = self.lock();
        let Some(record) = records.by_key.get(&(stream, id.key)) else { return Ok(None) };
        if record.until <= Instant::now() {
            return Ok(None);
        }
        record.repeated(id, messages).map(Some)
    }

    /// Appends the messages of a request to a stream, with its record. `outcomes` has one entry for each
    /// message of the request, `None` for those of other streams. A request that was received before,
    /// possibly just now on another connection, only gets the earlier outcome.
    pub fn append(
        &self,
        ingest: &Ingest,
        stream: usize,
        id: &Id,
        now_us: u64,
        messages: &[NewMessage<'_>],
        outcomes: &[Option<Outcome>],
    ) -> Result<Result<Appended, Repeated>, Failed> {
        let place = (stream, id.key);
        let codes = outcomes.iter().map(|outcome| outcome.map_or(ELSEWHERE, |outcome| outcome as u8));
        let mut codes: Box<[u8]> = codes.collect();
        if codes.iter().all(|code| *code == Outcome::Accepted as u8) {
            codes = Box::default();
        }
        // Held over the append, so that of two requests with one key only the first appends.
        let mut records = self.lock();
        let now = Instant::now();
        if let Some(record) = records.by_key.get(&place) {
            if record.until > now {
                return record.repeated(id, outcomes.len()).map(Err).map_err(|_| Failed::Mismatch);
            }
            records.remove(&place);
        }
        let value = encode(id, now_us, &codes);
        let gone = records.too_many(records.keys_max, value.len());
        let mut keys: Vec<Vec<u8>> = Vec::new();
        keys.extend(gone.iter().filter(|gone| gone.0 == stream).map(|gone| Id::state_key(&gone.1)));
        let own = Id::state_key(&id.key);
        let mut changes: Vec<StateChange<'_>> =
            keys.iter().map(|key| StateChange { key, value: None }).collect();
        changes.push(StateChange { key: &own, value: Some(&value) });
        let appended = ingest.append(stream, messages, &changes).map_err(Failed::Rejected)?;
        for place in &gone {
            records.remove(place);
            if place.0 != stream {
                records.remove_state(ingest, *place);
            }
        }
        self.forgotten.increment(gone.len() as u64);
        let (number, ticket, until) = (records.next, appended.ticket, now + records.window);
        let Id { client, fingerprint, .. } = *id;
        records.insert(place, Record { number, client, fingerprint, until, ticket, outcomes: codes });
        self.kept.set(records.by_key.len() as f64);
        Ok(Ok(appended))
    }

    /// Changes how long requests are remembered from now on, and how many are.
    pub fn set_bounds(&self, window: Duration, keys_max: usize) {
        let mut records = self.lock();
        (records.window, records.keys_max) = (window, keys_max);
    }

    /// Removes expired records from memory and from their streams.
    pub fn remove_old(&self, ingest: &Ingest) {
        let mut records = self.lock();
        for place in std::mem::take(&mut records.unremoved) {
            if !records.by_key.contains_key(&place) {
                records.remove_state(ingest, place);
            }
        }
        let now = Instant::now();
        while let Some((_, place)) = records.by_age.first_key_value().map(|(number, place)| (*number, *place))
        {
            let is_over = records.by_key.get(&place).is_none_or(|record| record.until <= now);
            if !is_over && records.by_key.len() <= records.keys_max {
                break;
            }
            records.remove(&place);
            records.remove_state(ingest, place);
        }
        self.kept.set(records.by_key.len() as f64);
    }

    fn lock(&self) -> MutexGuard<'_, Records> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why there was no append with a record.
#[derive(Debug, PartialEq, Eq)]
pub enum Failed {
    Mismatch,
    Rejected(Rejected),
}

impl Record {
    fn repeated(&self, id: &Id, messages: usize) -> Result<Repeated, Mismatch> {
        if self.fingerprint != id.fingerprint {
            return Err(Mismatch);
        }
        let read = |code: &u8| match Outcome::of(*code) {
            Some(outcome) => Known::Decided(outcome),
            None => Known::Elsewhere,
        };
        let known = match self.outcomes.is_empty() {
            true => vec![Known::Decided(Outcome::Accepted); messages],
            false => self.outcomes.iter().map(read).collect(),
        };
        Ok(Repeated { ticket: self.ticket, known })
    }

    fn bytes(&self) -> usize {
        HEAD_BYTES + self.outcomes.len()
    }
}

impl Records {
    fn insert(&mut self, place: Place, record: Record) {
        self.next = record.number + 1;
        self.bytes += record.bytes();
        self.by_age.insert(record.number, place);
        let of_client = self.by_client.entry(record.client).or_default();
        self.by_count.remove(&(of_client.len(), record.client));
        of_client.insert(record.number);
        self.by_count.insert((of_client.len(), record.client));
        self.by_key.insert(place, record);
    }

    fn remove(&mut self, place: &Place) {
        let Some(record) = self.by_key.remove(place) else { return };
        self.bytes -= record.bytes();
        self.by_age.remove(&record.number);
        if let Some(of_client) = self.by_client.get_mut(&record.client) {
            self.by_count.remove(&(of_client.len(), record.client));
            of_client.remove(&record.number);
            if of_client.is_empty() {
                self.by_client.remove(&record.client);
            } else {
                self.by_count.insert((of_client.len(), record.client));
            }
        }
    }

    /// Returns the records that must be removed for another record of `bytes`: the oldest of the client
    /// that has the most, and if that is not enough, of the next client.
    fn too_many(&self, keys_max: usize, bytes: usize) -> Vec<Place> {
        let (mut keys, mut left) = (self.by_key.len() + 1, self.bytes + bytes);
        let clients = self.by_count.iter().rev();
        let numbers = clients.flat_map(|(_, client)| self.by_client.get(client).into_iter().flatten());
        let mut gone = Vec::new();
        for place in numbers.map(|number| self.by_age[number]) {
            if keys <= keys_max && left <= RECORDS_BYTES_MAX {
                break;
            }
            keys -= 1;
            left -= self.by_key[&place].bytes();
            gone.push(place);
        }
        gone
    }

    fn remove_state(&mut self, ingest: &Ingest, place: Place) {
        let key = Id::state_key(&place.1);
        let refused = ingest.append(place.0, &[], &[StateChange { key: &key, value: None }]).is_err();
        if refused && self.unremoved.len() < UNREMOVED_MAX {
            self.unremoved.push(place);
        }
    }
}

struct Decoded {
    client: u64,
    at_us: u64,
    fingerprint: u128,
    outcomes: Box<[u8]>,
}

fn encode(id: &Id, at_us: u64, outcomes: &[u8]) -> Vec<u8> {
    let mut value = Vec::with_capacity(HEAD_BYTES + outcomes.len());
    value.push(FORMAT);
    value.extend(id.client.to_le_bytes());
    value.extend(at_us.to_le_bytes());
    value.extend(id.fingerprint.to_le_bytes());
    value.extend_from_slice(outcomes);
    value
}

fn decode(value: &[u8]) -> Option<Decoded> {
    let (&[FORMAT], rest) = value.split_first_chunk()? else { return None };
    let (client, rest) = rest.split_first_chunk()?;
    let (at_us, rest) = rest.split_first_chunk()?;
    let (fingerprint, outcomes) = rest.split_first_chunk()?;
    Some(Decoded {
        client: u64::from_le_bytes(*client),
        at_us: u64::from_le_bytes(*at_us),
        fingerprint: u128::from_le_bytes(*fingerprint),
        outcomes: outcomes.into(),
    })
}

#[cfg(test)]
mod tests {
    use metrics::{counter, gauge};

    use super::*;
    use crate::stream::memory::MemoryStream;
    use crate::stream::{Stream, Streams};

    const HOUR: Duration = Duration::from_secs(3_600);

    fn ingest(stream: &std::sync::Arc<MemoryStream>) -> Ingest {
        Ingest::new(Streams::new(vec![], stream.clone()), Default::default())
    }

    fn load(ingest: &Ingest, keys_max: usize, now_us: u64) -> Idempotency {
        Idempotency::load(ingest, HOUR, keys_max, now_us, (gauge!("kept"), counter!("forgotten")))
    }

    fn id(client: &str, key: &str) -> Id {
        Id::new(client, key.as_bytes(), &[b"body"])
    }

    fn append(known: &Idempotency, ingest: &Ingest, id: &Id, now_us: u64) -> bool {
        known.append(ingest, 0, id, now_us, &[], &[Some(Outcome::Accepted)]).unwrap().is_ok()
    }

    #[test]
    fn the_client_with_the_most_keys_loses_its_oldest_and_nobody_else() {
        let stream = MemoryStream::with_hooks("s", 1);
        let ingest = ingest(&stream);
        let known = load(&ingest, 4, 0);
        for (client, key) in
            [("one", "a"), ("many", "a"), ("many", "b"), ("many", "c"), ("many", "d"), ("one", "b")]
        {
            assert!(append(&known, &ingest, &id(client, key), 0));
        }
        let is_known = |client, key| known.look(0, &id(client, key), 1).unwrap().is_some();
        assert!(is_known("one", "a") && is_known("one", "b") && is_known("many", "d"));
        assert!(!is_known("many", "a") && !is_known("many", "b"));
        assert_eq!(stream.state(KIND).len(), 4, "the state has no more");
    }

    #[test]
    fn records_of_the_last_run_go_on_with_the_age_that_they_have() {
        let stream = MemoryStream::with_hooks("s", 1);
        let ingest = ingest(&stream);
        let now_us = 10 * HOUR.as_micros() as u64;
        let known = load(&ingest, 9, now_us);
        assert!(append(&known, &ingest, &id("c", "old"), now_us - HOUR.as_micros() as u64));
        assert!(append(&known, &ingest, &id("c", "new"), now_us - 1));
        // Its clock was set back since.
        assert!(append(&known, &ingest, &id("c", "ahead"), now_us + 7));
        let known = load(&ingest, 9, now_us);
        let repeated = |key| known.look(0, &id("c", key), 2).unwrap();
        assert_eq!(repeated("old"), None);
        let all = vec![Known::Decided(Outcome::Accepted); 2];
        assert_eq!(repeated("new"), Some(Repeated { ticket: Ticket(0), known: all }));
        assert!(repeated("ahead").is_some());
        assert_eq!(known.look(0, &Id::new("c", b"new", &[b"other"]), 1), Err(Mismatch));
        assert_eq!(stream.state(KIND).len(), 2);
    }

    #[test]
    fn of_two_requests_with_one_key_only_the_first_appends_and_a_refused_one_leaves_no_record() {
        let stream = MemoryStream::with_hooks("s", 1);
        let ingest = ingest(&stream);
        let known = load(&ingest, 9, 0);
        stream.set_no_space(true);
        let refused = known.append(&ingest, 0, &id("c", "k"), 0, &[], &[Some(Outcome::Accepted)]);
        assert_eq!(refused, Err(Failed::Rejected(Rejected::NoRoom { lasts: true })));
        stream.set_no_space(false);
        assert!(append(&known, &ingest, &id("c", "k"), 0));
        assert!(!append(&known, &ingest, &id("c", "k"), 0));
        // What it says of messages of other streams and of those that were rejected.
        let outcomes = [Some(Outcome::Accepted), None, Some(Outcome::TooLarge)];
        known.append(&ingest, 0, &id("c", "l"), 0, &[], &outcomes).unwrap().unwrap();
        let told = known.look(0, &id("c", "l"), 3).unwrap().unwrap().known;
        use Known::{Decided, Elsewhere};
        assert_eq!(told, [Decided(Outcome::Accepted), Elsewhere, Decided(Outcome::TooLarge)]);
    }
}
