//! Positions of claims in the state map of a log, for a sink whose rows are messages of that log: one append
//! makes rows and positions durable together.
//!
//! ```text
//! out/ PIPELINE \0 SINK \0 LOG GENERATION c                   epoch, holder
//! out/ PIPELINE \0 SINK \0 LOG GENERATION p PARTITION CHUNK   next offset, lineage, dead letters of a pass
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use super::positions::{Usurper, holder};
use super::{
    Advance, Claim, Epoch, Error, Found, LogPosition, Name, Opened, OtherLog, PassPosition, Position,
};
use crate::batch::{Offset, Partition};
use crate::stream::{Lineage, STATE_VALUE_BYTES_MAX, StateChange, Stream};

const PREFIX: &[u8] = b"out/";
const CLAIM: u8 = b'c';
const PARTITION: u8 = b'p';

/// Changes of the state map, for one append.
pub type Changes = Vec<(Vec<u8>, Option<Vec<u8>>)>;

/// Borrows changes as an append takes them.
pub fn borrowed(changes: &Changes) -> Vec<StateChange<'_>> {
    changes.iter().map(|(key, value)| StateChange { key, value: value.as_deref() }).collect()
}

/// The positions that lie in one log. Clones share the lock.
#[derive(Clone)]
pub struct LogPositions {
    stream: Arc<dyn Stream>,
    changing: Arc<Mutex<()>>,
}

/// What the state map has of a claim.
struct Claimed {
    epoch: u64,
    holder: String,
    partitions: BTreeMap<u16, At>,
}

/// A position, as it is stored.
#[derive(Clone)]
struct At {
    next: Offset,
    lineage: String,
    letters: Option<String>,
    chunks: usize,
}

impl LogPositions {
    pub fn new(stream: Arc<dyn Stream>) -> Self {
        Self { stream, changing: Arc::default() }
    }

    /// Held from the look at a claim to the append that changes the claim.
    pub fn change(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a claim, as [`super::Sink::open`] says, once the changes are durable. `has_rows`: the log has
    /// messages.
    pub fn claim(
        &self,
        claim: &Claim,
        held: Option<Epoch>,
        has_rows: bool,
    ) -> Result<(Opened, Changes), Error> {
        let mut changes = Changes::new();
        let own = key_of(&(claim.pipeline.clone(), claim.sink.clone()), claim.log, claim.generation);
        let known = self.read(&own);
        let mut partitions = known.as_ref().map(|known| known.partitions.clone()).unwrap_or_default();
        if held.is_none() && partitions.is_empty() {
            partitions = self.rename(claim, &own, &mut changes);
        }
        let epoch = match (held, &known) {
            (None, known) => known.as_ref().map_or(0, |known| known.epoch) + 1,
            (Some(held), Some(known)) if known.epoch > held.0 => return Err(known.fences(claim, held)),
            (Some(_), None) if has_rows => return Err(Error::Choose(claim.gone())),
            (Some(held), _) => held.0,
        };
        changes.push(claimed(&own, epoch, &holder()));
        let position = |(partition, at): (&u16, &At)| {
            let partition = Partition(*partition);
            let lineage = Lineage::read(Some(&at.lineage)).ok_or_else(|| claim.unreadable(partition))?;
            Ok(Position { partition, next: at.next, lineage })
        };
        let positions = partitions.iter().map(position).collect::<Result<Vec<_>, Error>>()?;
        let found = match positions.is_empty() {
            true => Found { has_rows, others: self.others(claim), other_logs: self.other_logs(claim) },
            false => Found::default(),
        };
        Ok((Opened { epoch: Epoch(epoch), positions, found }, changes))
    }

    /// Moves positions, if each is where `advance` says and the claim is ours.
    pub fn advance(&self, claim: &Claim, ours: Epoch, advance: &[Advance]) -> Result<Changes, Error> {
        let own = key_of(&(claim.pipeline.clone(), claim.sink.clone()), claim.log, claim.generation);
        let claimed = self.read(&own).ok_or_else(|| Error::Retry(claim.gone()))?;
        if claimed.epoch != ours.0 {
            return Err(claimed.fences(claim, ours));
        }
        let mut changes = Changes::new();
        for step in advance {
            let known = claimed.partitions.get(&step.partition.0);
            if let Some(known) = known.filter(|known| known.next != step.from) {
                return Err(Error::Fenced(claim.moved(step.partition, Some(known.next.0), step.from)));
            }
            let lineage = match &step.lineage {
                Some(lineage) => lineage.to_string(),
                None => known.map(|known| known.lineage.clone()).unwrap_or_default(),
            };
            let letters = step.letters.clone().or_else(|| known.and_then(|known| known.letters.clone()));
            let at = At { next: step.to, lineage, letters, chunks: known.map_or(0, |known| known.chunks) };
            at.write(&own, step.partition.0, &mut changes);
        }
        Ok(changes)
    }

    /// As [`super::Sink::positions_of`].
    pub fn positions_of(&self, claims: &[Name], logs: &[Uuid]) -> Vec<LogPosition> {
        let claims = claims.iter().flat_map(|name| logs.iter().map(move |log| (name, *log)));
        let positions = claims.flat_map(|(name, log)| {
            let of_log = self.claims(&[&of_name(name)[..], log.as_bytes()].concat());
            of_log.into_values().flat_map(move |claimed| {
                claimed
                    .partitions
                    .into_iter()
                    .map(move |(partition, at)| (log, Partition(partition), at.next))
            })
        });
        positions.collect()
    }

    /// As [`super::Sink::passes_of`].
    pub fn passes_of(&self, claims: &[Name], log: Uuid, above: Offset) -> Vec<PassPosition> {
        let log = log.to_string();
        let mut passes = Vec::new();
        for (key, claimed) in claims.iter().flat_map(|name| self.claims(&of_name(name))) {
            let (_, pass, _) = parts(&key).expect("a key of a claim");
            for (partition, at) in claimed.partitions {
                let letters = at.letters.filter(|letters| letters.starts_with(&log));
                let lineage = Lineage::read(Some(&at.lineage));
                if let (Some(letters), Some(lineage), true) = (letters, lineage, at.next > above) {
                    let position = Position { partition: Partition(partition), next: at.next, lineage };
                    passes.push(PassPosition { pass, position, letters });
                }
            }
        }
        passes
    }

    /// Gives the claim the positions of the first name that it had and that has some, and takes them from
    /// that name.
    fn rename(&self, claim: &Claim, own: &[u8], changes: &mut Changes) -> BTreeMap<u16, At> {
        for name in &claim.formerly {
            let former = key_of(name, claim.log, claim.generation);
            let Some(old) = self.read(&former).filter(|old| !old.partitions.is_empty()) else { continue };
            for (partition, at) in &old.partitions {
                changes.extend((0..at.chunks).map(|chunk| (chunk_key(&former, *partition, chunk), None)));
                At { chunks: 0, ..at.clone() }.write(own, *partition, changes);
            }
            changes.push(claimed(&former, old.epoch + 1, &claim.renamed(&holder())));
            return old.partitions;
        }
        BTreeMap::new()
    }

    /// Returns the names of other claims from the same log that have positions.
    fn others(&self, claim: &Claim) -> Vec<Name> {
        let own = (claim.pipeline.clone(), claim.sink.clone());
        let mut others = BTreeSet::new();
        for (key, claimed) in self.claims(PREFIX) {
            let Some((name, log, generation)) = parts(&key) else { continue };
            let is_of_log = (log, generation) == (claim.log, claim.generation);
            if is_of_log && name != own && !claimed.partitions.is_empty() {
                others.insert(name);
            }
        }
        others.into_iter().collect()
    }

    /// Returns the other logs of which a claim of this name has positions.
    fn other_logs(&self, claim: &Claim) -> Vec<OtherLog> {
        let own = (claim.pipeline.clone(), claim.sink.clone());
        let claims =
            self.claims(&of_name(&own)).into_iter().filter(|(_, claimed)| !claimed.partitions.is_empty());
        let logs: BTreeSet<Uuid> = claims.filter_map(|(key, _)| Some(parts(&key)?.1)).collect();
        let others = logs.into_iter().filter(|log| *log != claim.log);
        others.map(|log| OtherLog { log, claimed_at: None }).collect()
    }

    fn read(&self, key: &[u8]) -> Option<Claimed> {
        self.claims(key).remove(key)
    }

    /// Returns the claims whose keys begin with `prefix`, by key.
    fn claims(&self, prefix: &[u8]) -> BTreeMap<Vec<u8>, Claimed> {
        let mut claims: BTreeMap<Vec<u8>, Claimed> = BTreeMap::new();
        let mut chunks: BTreeMap<(Vec<u8>, u16), (Vec<u8>, usize)> = BTreeMap::new();
        // In key order: the chunks of a position follow each other.
        for (key, value) in self.stream.state(prefix) {
            let Some(len) = claim_len(&key) else { continue };
            match (key.get(len), key.get(len + 1..len + 3)) {
                (Some(&CLAIM), None) => {
                    let Some((epoch, holder)) = value.split_first_chunk() else { continue };
                    let holder = String::from_utf8_lossy(holder).into_owned();
                    let epoch = u64::from_be_bytes(*epoch);
                    claims
                        .insert(key[..len].to_vec(), Claimed { epoch, holder, partitions: BTreeMap::new() });
                }
                (Some(&PARTITION), Some(&[high, low])) => {
                    let partition = u16::from_be_bytes([high, low]);
                    let (bytes, count) = chunks.entry((key[..len].to_vec(), partition)).or_default();
                    bytes.extend(value);
                    *count += 1;
                }
                _ => {}
            }
        }
        for ((key, partition), (bytes, count)) in chunks {
            let at = At::read(&bytes, count);
            if let (Some(claimed), Some(at)) = (claims.get_mut(&key), at) {
                claimed.partitions.insert(partition, at);
            }
        }
        claims
    }
}

impl Claimed {
    fn fences(&self, claim: &Claim, ours: Epoch) -> Error {
        let usurper = Usurper { epoch: self.epoch, holder: self.holder.clone(), at: None };
        Error::Fenced(claim.fenced_by(&usurper, ours))
    }
}

impl At {
    /// `chunks`: how many there are of the position so far.
    fn write(&self, own: &[u8], partition: u16, changes: &mut Changes) {
        let mut bytes = self.next.0.to_be_bytes().to_vec();
        bytes.extend((self.lineage.len() as u32).to_be_bytes());
        bytes.extend(self.lineage.as_bytes());
        if let Some(letters) = &self.letters {
            bytes.push(1);
            bytes.extend(letters.as_bytes());
        }
        let chunks = bytes.chunks(STATE_VALUE_BYTES_MAX);
        let count = chunks.len();
        let put = |(chunk, bytes): (usize, &[u8])| (chunk_key(own, partition, chunk), Some(bytes.to_vec()));
        changes.extend(chunks.enumerate().map(put));
        changes.extend((count..self.chunks).map(|chunk| (chunk_key(own, partition, chunk), None)));
    }

    fn read(bytes: &[u8], chunks: usize) -> Option<Self> {
        let (next, rest) = bytes.split_first_chunk()?;
        let (len, rest) = rest.split_first_chunk()?;
        let (lineage, letters) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let letters = letters.split_first().map(|(_, letters)| text(letters));
        Some(Self { next: Offset(u64::from_be_bytes(*next)), lineage: text(lineage), letters, chunks })
    }
}

fn claimed(own: &[u8], epoch: u64, holder: &str) -> (Vec<u8>, Option<Vec<u8>>) {
    ([own, &[CLAIM]].concat(), Some([&epoch.to_be_bytes()[..], holder.as_bytes()].concat()))
}

/// Names hold no NUL: `validate` checks them.
fn of_name((pipeline, sink): &Name) -> Vec<u8> {
    [PREFIX, pipeline.as_bytes(), &[0], sink.as_bytes(), &[0]].concat()
}

fn key_of(name: &Name, log: Uuid, generation: u32) -> Vec<u8> {
    [&of_name(name)[..], log.as_bytes(), &generation.to_be_bytes()].concat()
}

fn chunk_key(own: &[u8], partition: u16, chunk: usize) -> Vec<u8> {
    [own, &[PARTITION], &partition.to_be_bytes(), &(chunk as u16).to_be_bytes()].concat()
}

/// Returns the length of the part of a key that names the claim.
fn claim_len(key: &[u8]) -> Option<usize> {
    let nul = |from: usize| Some(from + key.get(from..)?.iter().position(|byte| *byte == 0)?);
    let names = nul(nul(PREFIX.len())? + 1)? + 1;
    let len = names + size_of::<Uuid>() + size_of::<u32>();
    (key.len() > len).then_some(len)
}

/// Returns name, log and generation of the key of a claim.
fn parts(key: &[u8]) -> Option<(Name, Uuid, u32)> {
    let (names, generation) = key.split_last_chunk()?;
    let (names, log) = names.split_last_chunk()?;
    let mut names = names.strip_prefix(PREFIX)?.split(|byte| *byte == 0);
    let mut name = || Some(String::from_utf8_lossy(names.next()?).into_owned());
    Some(((name()?, name()?), Uuid::from_bytes(*log), u32::from_be_bytes(*generation)))
}
