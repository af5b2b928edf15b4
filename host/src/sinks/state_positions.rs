//! Positions of claims as entries of a stream's state map: those of a sink that appends to that stream,
//! in the append of its messages, and those of sinks whose own stores have no transactions, in a stream
//! of the host.
//!
//! ```text
//! positions/ LOG GENERATION PIPELINE \0 SINK \0 PART PARTITION CHUNK
//! ```
//!
//! A claim is some of these keys, one for each [`Part`]: who holds it, and of each partition the position,
//! its openings, and what a pass of a redrive did with dead letters. A value that does not change is not
//! written again. The functions here read the map's entries and return changes for one append;
//! [`StatePositions`] appends. Keys of another form, which sinks into streams wrote before, are read too
//! (`former`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::positions::{Usurper, holder};
use super::{
    Advance, Claim, Epoch, Error, Found, LogPosition, Name, Opened, OtherLog, PassPosition, Position,
};
use crate::batch::{Offset, Partition};
use crate::stream::{
    AppendError, Lineage, NewMessage, STATE_VALUE_BYTES_MAX, StateChange, StateEntries, Stream, Ticket,
};

mod former;
#[cfg(test)]
mod tests;

/// Begin of all keys.
pub const PREFIX: &[u8] = b"positions/";

/// A key and its value, `None` to remove it.
pub type Change = (Vec<u8>, Option<Vec<u8>>);

/// Looks entries of the state map up whose keys begin so.
pub type Entries<'s> = &'s dyn Fn(&[u8]) -> StateEntries;

/// The positions that lie in one stream. Clones share the lock.
#[derive(Clone)]
pub struct StatePositions {
    stream: Arc<dyn Stream>,
    /// Held from the look at a position to the append that changes it.
    changing: Arc<Mutex<()>>,
}

/// Where the rows are that the positions belong to.
#[derive(Clone, Copy, Debug)]
pub enum Store<'s> {
    /// They are messages of the stream that has the positions.
    Stream { has_rows: bool },
    /// They are in a store of this name. Claims of several stores share one state map.
    Named(&'s str),
}

/// What of a claim a key holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
enum Part {
    /// [`Taken`], as JSON.
    Taken = b'c',
    /// The next offset of a partition, 8 bytes, little endian.
    Next = b'n',
    /// [`Lineage`] of a partition, as text.
    Openings = b'o',
    /// [`Advance::letters`] of a partition, in chunks.
    Letters = b'l',
}

/// Who has a claim.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Taken {
    epoch: u64,
    holder: String,
    /// RFC 3339; the former form did not note it.
    at: Option<String>,
    /// [`Store::Named`], else empty.
    target: String,
}

/// A claim as the state map has it.
#[derive(Clone, Debug, Default)]
struct Kept {
    taken: Option<Taken>,
    partitions: BTreeMap<u16, KeptPartition>,
    /// Some of it is in the former form.
    is_former: bool,
}

#[derive(Clone, Debug, Default)]
struct KeptPartition {
    next: Option<u64>,
    openings: Option<String>,
    letters: Option<Vec<u8>>,
}

/// Log, generation, and name of a claim.
type Id = (Uuid, u32, Name);

impl StatePositions {
    pub fn new(stream: Arc<dyn Stream>) -> Self {
        Self { stream, changing: Arc::default() }
    }

    pub fn stream(&self) -> &dyn Stream {
        &*self.stream
    }

    /// Returns what `look` makes of the entries that are there.
    pub fn look<T>(&self, look: impl FnOnce(Entries<'_>) -> T) -> T {
        look(&|prefix| self.stream.state(prefix))
    }

    /// Returns the positions that [`super::Sink::positions_of`] describes.
    pub fn positions_of(&self, names: &[Name], logs: &[Uuid]) -> Vec<LogPosition> {
        self.look(|entries| positions_of(entries, names, logs))
    }

    /// Returns the positions that [`super::Sink::passes_of`] describes.
    pub fn passes_of(&self, names: &[Name], log: Uuid, above: Offset) -> Vec<PassPosition> {
        self.look(|entries| passes_of(entries, names, log, above))
    }

    /// Appends the messages together with the changes that `make` makes of the entries that are there.
    /// Waits while the stream's buffer is full. No position changes between the look and the append.
    pub async fn append<T: Send>(
        &self,
        messages: &[NewMessage<'_>],
        make: impl Fn(Entries<'_>) -> Result<(T, Vec<Change>), Error> + Send + Sync,
    ) -> Result<Result<(T, Ticket), AppendError>, Error> {
        loop {
            let (made, appended) = {
                let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
                let (made, changes) = self.look(&make)?;
                (made, self.stream.append(messages, &borrowed(&changes)))
            };
            match appended {
                Ok(appended) => return Ok(Ok((made, appended.ticket))),
                Err(AppendError::Full) => self.stream.writable().await,
                Err(error) => return Ok(Err(error)),
            }
        }
    }
}

/// Borrows changes as an append takes them.
fn borrowed(changes: &[Change]) -> Vec<StateChange<'_>> {
    changes.iter().map(|(key, value)| StateChange { key, value: value.as_deref() }).collect()
}

impl Store<'_> {
    fn has_rows(self) -> bool {
        matches!(self, Self::Stream { has_rows: true })
    }

    fn target(self) -> String {
        match self {
            Self::Stream { .. } => String::new(),
            Self::Named(target) => target.to_owned(),
        }
    }
}

fn own_name(claim: &Claim) -> Name {
    (claim.pipeline.clone(), claim.sink.clone())
}

fn log_prefix(log: Uuid, generation: u32) -> Vec<u8> {
    [PREFIX, log.as_bytes(), &generation.to_be_bytes()].concat()
}

/// Names hold no NUL: `validate` checks them.
fn prefix(log: Uuid, generation: u32, (pipeline, sink): &Name) -> Vec<u8> {
    [&*log_prefix(log, generation), pipeline.as_bytes(), &[0], sink.as_bytes(), &[0]].concat()
}

fn key(claim: &[u8], part: Part, partition: u16, chunk: u16) -> Vec<u8> {
    [claim, &[part as u8], &partition.to_be_bytes(), &chunk.to_be_bytes()].concat()
}

/// Reads a key: whose it is, what it holds, and of which partition.
fn read_key(key: &[u8]) -> Option<(Id, Part, u16)> {
    let (log, rest) = key.strip_prefix(PREFIX)?.split_first_chunk::<16>()?;
    let (generation, rest) = rest.split_first_chunk::<4>()?;
    let (rest, [part, partition @ .., _, _]) = rest.split_last_chunk::<5>()?;
    let mut names = std::str::from_utf8(rest).ok()?.split('\0');
    let name = (names.next()?.to_owned(), names.next()?.to_owned());
    let part = [Part::Taken, Part::Next, Part::Openings, Part::Letters]
        .into_iter()
        .find(|known| *known as u8 == *part)?;
    let id = (Uuid::from_bytes(*log), u32::from_be_bytes(*generation), name);
    Some((id, part, u16::from_be_bytes(*partition)))
}

/// Reads claims of entries. What cannot be read is left out.
fn read(entries: StateEntries) -> BTreeMap<Id, Kept> {
    let mut claims: BTreeMap<Id, Kept> = BTreeMap::new();
    for (key, value) in entries {
        let Some((id, part, partition)) = read_key(&key) else { continue };
        let kept = claims.entry(id).or_default();
        if part == Part::Taken {
            kept.taken = serde_json::from_slice(&value).ok();
            continue;
        }
        let kept = kept.partitions.entry(partition).or_default();
        match part {
            Part::Taken => {}
            Part::Next => kept.next = value.first_chunk().map(|next| u64::from_le_bytes(*next)),
            Part::Openings => kept.openings = Some(String::from_utf8_lossy(&value).into_owned()),
            // Chunks come in their order, because it is that of the keys.
            Part::Letters => kept.letters.get_or_insert_default().extend(value),
        }
    }
    claims
}

/// Reads the claims whose keys begin with `prefix`, and all of the former form.
fn read_all(entries: Entries<'_>, prefix: &[u8]) -> BTreeMap<Id, Kept> {
    let mut claims = read(entries(prefix));
    for (id, former) in former::read(entries(former::PREFIX)) {
        claims.entry(id).or_default().overlay(former);
    }
    claims
}

impl Kept {
    fn has_positions(&self) -> bool {
        self.partitions.values().any(|partition| partition.next.is_some())
    }

    fn highest(&self) -> Option<Usurper> {
        let Taken { epoch, holder, at, .. } = self.taken.clone()?;
        Some(Usurper { epoch, holder, at })
    }

    fn positions(&self, claim: &Claim) -> Result<Vec<Position>, Error> {
        let of_claim = self.partitions.iter().filter(|(partition, _)| **partition < claim.partitions);
        let with_next = of_claim.filter_map(|(partition, kept)| Some((*partition, kept.next?, kept)));
        with_next
            .map(|(partition, next, kept)| {
                let partition = Partition(partition);
                let lineage =
                    Lineage::read(kept.openings.as_deref()).ok_or_else(|| claim.unreadable(partition))?;
                Ok(Position { partition, next: Offset(next), lineage })
            })
            .collect()
    }

    /// Returns the changes that write all positions under the claim with these keys.
    fn put(&self, entries: Entries<'_>, claim: &[u8]) -> Vec<Change> {
        let with_next = self.partitions.iter().filter_map(|(at, kept)| Some((*at, kept.next?, kept)));
        with_next
            .flat_map(|(at, next, kept)| {
                put(entries, claim, at, next, kept.openings.clone(), kept.letters.as_deref())
            })
            .collect()
    }
}

/// Returns the changes that write a position; what is `None` stays as it is.
fn put(
    entries: Entries<'_>,
    claim: &[u8],
    at: u16,
    next: u64,
    openings: Option<String>,
    letters: Option<&[u8]>,
) -> Vec<Change> {
    let mut changes = vec![(key(claim, Part::Next, at, 0), Some(next.to_le_bytes().to_vec()))];
    changes.extend(openings.map(|text| (key(claim, Part::Openings, at, 0), Some(text.into_bytes()))));
    if let Some(letters) = letters {
        let of_chunk =
            |(number, chunk): (u16, &[u8])| (key(claim, Part::Letters, at, number), Some(chunk.to_vec()));
        changes.extend((0..).zip(letters.chunks(STATE_VALUE_BYTES_MAX)).map(of_chunk));
        let before = entries(&key(claim, Part::Letters, at, 0)[..claim.len() + 3]);
        let is_left = |key: &Vec<u8>| !changes.iter().any(|(changed, _)| changed == key);
        let left: Vec<_> = before.into_iter().map(|(key, _)| key).filter(is_left).collect();
        changes.extend(left.into_iter().map(|key| (key, None)));
    }
    changes
}

fn one(entries: Entries<'_>, claim: &Claim, name: &Name) -> Kept {
    let prefix = prefix(claim.log, claim.generation, name);
    read_all(entries, &prefix).remove(&(claim.log, claim.generation, name.clone())).unwrap_or_default()
}

/// Returns the name under which the claim has positions: its own, or the first of those that it had.
fn name_with_positions(entries: Entries<'_>, claim: &Claim) -> Option<(Name, Kept)> {
    let mut names = claim.names().map(|name| (one(entries, claim, &name), name));
    names.find(|(kept, _)| kept.has_positions()).map(|(kept, name)| (name, kept))
}

/// Returns the other claims with positions that the store's rows may be of.
fn found(entries: Entries<'_>, claim: &Claim, store: Store<'_>) -> Found {
    let own = own_name(claim);
    let prefix = match store {
        Store::Stream { .. } => PREFIX.to_vec(),
        Store::Named(_) => log_prefix(claim.log, claim.generation),
    };
    let claims = read_all(entries, &prefix).into_iter().filter(|(_, kept)| kept.has_positions());
    let (mut others, mut other_logs) = (Vec::new(), Vec::new());
    for ((log, generation, name), kept) in claims {
        let is_of_store = match store {
            Store::Stream { .. } => true,
            Store::Named(target) => kept.taken.as_ref().is_some_and(|taken| taken.target == target),
        };
        if !is_of_store {
            continue;
        }
        let is_of_log = (log, generation) == (claim.log, claim.generation);
        if is_of_log && name != own {
            others.push(name);
        } else if log != claim.log && name == own {
            other_logs.push(OtherLog { log, claimed_at: kept.taken.and_then(|taken| taken.at) });
        }
    }
    match store {
        Store::Stream { has_rows } => Found { has_rows, others, other_logs: newest_first(other_logs) },
        // A store whose rows name their log keeps the rows of other logs separate.
        Store::Named(_) => Found { has_rows: !others.is_empty(), others, ..Found::default() },
    }
}

/// Returns each log once, the one that was claimed last first.
fn newest_first(mut logs: Vec<OtherLog>) -> Vec<OtherLog> {
    let claimed_at = |other: &OtherLog| other.claimed_at.as_deref()?.parse::<Timestamp>().ok();
    logs.sort_by_key(|other| (std::cmp::Reverse(claimed_at(other)), other.log));
    let mut known = BTreeSet::new();
    logs.retain(|other| known.insert(other.log));
    logs
}

/// Returns what a claim would find, and takes nothing.
pub fn look(entries: Entries<'_>, claim: &Claim, store: Store<'_>) -> Result<(Vec<Position>, Found), Error> {
    match name_with_positions(entries, claim) {
        Some((_, kept)) => Ok((kept.positions(claim)?, Found::default())),
        None => Ok((Vec::new(), found(entries, claim, store))),
    }
}

/// Takes a claim: returns what it finds, and the changes with which it is taken.
pub fn take(
    entries: Entries<'_>,
    claim: &Claim,
    held: Option<Epoch>,
    store: Store<'_>,
) -> Result<(Opened, Vec<Change>), Error> {
    let (holder, at) = (holder(), Timestamp::now().to_string());
    let own = own_name(claim);
    let to = prefix(claim.log, claim.generation, &own);
    let mut kept = one(entries, claim, &own);
    let epoch = claim.take(held, kept.highest().as_ref(), store.has_rows())?;
    let mut changes = Vec::new();
    if held.is_none()
        && let Some((name, old)) = name_with_positions(entries, claim).filter(|(name, _)| *name != own)
    {
        let from = prefix(claim.log, claim.generation, &name);
        let is_position =
            |(key, _): &(Vec<u8>, _)| read_key(key).is_none_or(|(_, part, _)| part != Part::Taken);
        let left = entries(&from).into_iter().filter(is_position).map(|(key, _)| (key, None));
        changes.extend(left);
        changes.extend(former::removed(entries, claim, &name));
        // The higher epoch prevents another process from continuing under the old name.
        let epoch = old.highest().map_or(0, |highest| highest.epoch) + 1;
        let target = old.taken.as_ref().map(|taken| taken.target.clone()).unwrap_or_default();
        let holder = claim.renamed(&holder);
        changes.push(taken(&from, &Taken { epoch, holder, at: Some(at.clone()), target }));
        changes.extend(old.put(entries, &to));
        kept.partitions = old.partitions;
    } else if kept.is_former {
        changes.extend(kept.put(entries, &to));
    }
    changes.extend(former::removed(entries, claim, &own));
    let positions = kept.positions(claim)?;
    let found = match positions.is_empty() {
        true => found(entries, claim, store),
        false => Found::default(),
    };
    changes.push(taken(&to, &Taken { epoch: epoch.0, holder, at: Some(at), target: store.target() }));
    Ok((Opened { epoch, positions, found }, changes))
}

fn taken(claim: &[u8], taken: &Taken) -> Change {
    (key(claim, Part::Taken, 0, 0), Some(serde_json::to_vec(taken).expect("plain text")))
}

/// Returns an error unless all positions are where `advance` says, and the claim is ours.
pub fn check(entries: Entries<'_>, claim: &Claim, ours: Epoch, advance: &[Advance]) -> Result<(), Error> {
    let prefix = prefix(claim.log, claim.generation, &own_name(claim));
    let of = |part: Part| read(entries(&[&*prefix, &[part as u8]].concat())).into_values().next();
    let highest = of(Part::Taken).and_then(|kept| kept.highest());
    let kept = of(Part::Next).unwrap_or_default();
    let next = |partition: Partition| kept.partitions.get(&partition.0).and_then(|kept| kept.next);
    let theirs = |step: &&Advance| next(step.partition).is_some_and(|next| next != step.from.0);
    let moved: Vec<_> = advance.iter().filter(theirs).cloned().collect();
    if moved.is_empty() && highest.as_ref().is_some_and(|highest| highest.epoch == ours.0) {
        return Ok(());
    }
    Err(claim.refusal(ours, highest.as_ref(), &moved, next))
}

/// Returns the changes that move positions, if all are where `advance` says, and the claim is ours.
pub fn moved(
    entries: Entries<'_>,
    claim: &Claim,
    ours: Epoch,
    advance: &[Advance],
) -> Result<Vec<Change>, Error> {
    check(entries, claim, ours, advance)?;
    let prefix = prefix(claim.log, claim.generation, &own_name(claim));
    let moved = advance.iter().flat_map(|step| {
        let openings = step.lineage.as_ref().map(Lineage::to_string);
        let letters = step.letters.as_deref().map(str::as_bytes);
        put(entries, &prefix, step.partition.0, step.to.0, openings, letters)
    });
    Ok(moved.collect())
}

/// Returns the positions, by log and partition, that claims of these names have in these logs.
fn positions_of(entries: Entries<'_>, names: &[Name], logs: &[Uuid]) -> Vec<LogPosition> {
    let mut positions = Vec::new();
    for log in logs {
        for ((of, _, name), kept) in read_all(entries, &[PREFIX, log.as_bytes()].concat()) {
            let is_asked = of == *log && names.contains(&name);
            let with_next = kept.partitions.iter().filter_map(|(at, kept)| Some((*at, kept.next?)));
            positions
                .extend(with_next.filter(|_| is_asked).map(|(at, next)| (*log, Partition(at), Offset(next))));
        }
    }
    positions
}

/// Returns the positions of redrives' passes with these names, past `above`, that sent letters of a log.
fn passes_of(entries: Entries<'_>, names: &[Name], log: Uuid, above: Offset) -> Vec<PassPosition> {
    let log = log.to_string();
    let mut passes = Vec::new();
    for ((pass, _, name), kept) in read_all(entries, PREFIX) {
        for (partition, kept) in kept.partitions.into_iter().filter(|_| names.contains(&name)) {
            let (Some(next), Some(letters)) = (kept.next.map(Offset), kept.letters) else { continue };
            let Some(lineage) = Lineage::read(kept.openings.as_deref()) else { continue };
            let letters = String::from_utf8_lossy(&letters).into_owned();
            if next > above && letters.starts_with(&log) {
                let position = Position { partition: Partition(partition), next, lineage };
                passes.push(PassPosition { pass, position, letters });
            }
        }
    }
    passes
}

/// Returns the changes that forget passes of redrives, of these names, that are past no letter from
/// `start` on: nobody asks for those.
pub fn forgotten(entries: Entries<'_>, names: &[Name], but: Uuid, start: Offset) -> Vec<Change> {
    let all = entries(PREFIX);
    let claims = read(all.clone());
    let is_over = |kept: &Kept| {
        let mut next = kept.partitions.values().filter_map(|kept| kept.next);
        kept.has_positions() && next.all(|next| next <= start.0)
    };
    let is_gone = |key: &[u8]| {
        let Some((id, ..)) = read_key(key) else { return false };
        id.0 != but && names.contains(&id.2) && claims.get(&id).is_some_and(is_over)
    };
    all.into_iter().map(|(key, _)| key).filter(|key| is_gone(key)).map(|key| (key, None)).collect()
}
