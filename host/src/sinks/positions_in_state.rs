//! Positions of claims in the state map of a stream, for sinks whose own store has no transactions.
//!
//! A claim is some keys below `positions/`, the log, the generation and the names of pipeline and
//! sink: who holds it, and of each partition the position, its openings, and what a pass of a redrive
//! did with dead letters. A value that does not change is not written again. Everything here is a
//! function of the map's entries, or makes changes for one append: who calls it appends, and waits
//! until that is durable.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::positions::Usurper;
use super::{Advance, Claim, Epoch, Error, Found, LogPosition, Name, Opened, PassPosition, Position};
use crate::batch::{Offset, Partition};
use crate::stream::{Lineage, STATE_VALUE_BYTES_MAX, StateEntries};

/// Begin of all keys.
pub const PREFIX: &[u8] = b"positions/";

/// A key and its value, `None` to remove it.
pub type Change = (Vec<u8>, Option<Vec<u8>>);

/// Looks entries of the state map up whose keys begin so.
pub type Entries<'s> = &'s dyn Fn(&[u8]) -> StateEntries;

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
    /// RFC 3339.
    at: String,
    /// What the sink writes to.
    target: String,
}

/// A claim as the state map has it.
#[derive(Clone, Debug, Default)]
struct Kept {
    taken: Option<Taken>,
    partitions: BTreeMap<u16, KeptPartition>,
}

#[derive(Clone, Debug, Default)]
struct KeptPartition {
    next: Option<u64>,
    openings: Option<String>,
    letters: Option<String>,
}

/// Log, generation, and name of a claim.
type Id = (Uuid, u32, Name);

fn log_prefix(log: Uuid, generation: u32) -> Vec<u8> {
    [PREFIX, log.as_bytes(), &generation.to_be_bytes()].concat()
}

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
        let text = String::from_utf8_lossy(&value);
        match part {
            Part::Taken => {}
            Part::Next => kept.next = value.first_chunk().map(|next| u64::from_le_bytes(*next)),
            Part::Openings => kept.openings = Some(text.into_owned()),
            // In the order of the chunks, which is that of the keys.
            Part::Letters => kept.letters.get_or_insert_default().push_str(&text),
        }
    }
    claims
}

impl Kept {
    fn has_positions(&self) -> bool {
        self.partitions.values().any(|partition| partition.next.is_some())
    }

    fn highest(&self) -> Option<Usurper> {
        let Taken { epoch, holder, at, .. } = self.taken.clone()?;
        Some(Usurper { epoch, holder, at: Some(at) })
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
}

fn one(entries: Entries<'_>, claim: &Claim, name: &Name) -> Kept {
    let found = entries(&prefix(claim.log, claim.generation, name));
    read(found).into_values().next().unwrap_or_default()
}

/// Returns the name under which the claim has positions: its own, or the first of those that it had.
fn name_with_positions(entries: Entries<'_>, claim: &Claim) -> Option<(Name, Kept)> {
    let mut names = claim.names().map(|name| (one(entries, claim, &name), name));
    names.find(|(kept, _)| kept.has_positions()).map(|(kept, name)| (name, kept))
}

/// Returns the other claims from the same log with positions in the same target.
fn found(entries: Entries<'_>, claim: &Claim, target: &str) -> Found {
    let own = (claim.pipeline.clone(), claim.sink.clone());
    let claims = read(entries(&log_prefix(claim.log, claim.generation)));
    let is_other = |(_, _, name): &Id, kept: &Kept| {
        let is_there = kept.taken.as_ref().is_some_and(|taken| taken.target == target);
        *name != own && is_there && kept.has_positions()
    };
    let others: Vec<Name> =
        claims.into_iter().filter(|(id, kept)| is_other(id, kept)).map(|((.., name), _)| name).collect();
    Found { has_rows: !others.is_empty(), others, ..Found::default() }
}

/// Returns what a claim would find, and takes nothing.
pub fn look(entries: Entries<'_>, claim: &Claim, target: &str) -> Result<(Vec<Position>, Found), Error> {
    match name_with_positions(entries, claim) {
        Some((_, kept)) => Ok((kept.positions(claim)?, Found::default())),
        None => Ok((Vec::new(), found(entries, claim, target))),
    }
}

/// Takes a claim: returns what it finds, and the changes with which it is taken. `at`: now, RFC 3339.
pub fn take(
    entries: Entries<'_>,
    claim: &Claim,
    held: Option<Epoch>,
    (holder, at, target): (&str, &str, &str),
) -> Result<(Vec<Change>, Opened), Error> {
    let own = (claim.pipeline.clone(), claim.sink.clone());
    let mut kept = one(entries, claim, &own);
    let epoch = claim.take(held, kept.highest().as_ref(), false)?;
    let mut changes = Vec::new();
    if held.is_none()
        && let Some((former, old)) = name_with_positions(entries, claim).filter(|(name, _)| *name != own)
    {
        let from = prefix(claim.log, claim.generation, &former);
        let to = prefix(claim.log, claim.generation, &own);
        for (key, value) in entries(&from) {
            if read_key(&key).is_some_and(|(_, part, _)| part == Part::Taken) {
                continue;
            }
            changes.push(([&*to, &key[from.len()..]].concat(), Some(value)));
            changes.push((key, None));
        }
        // So that nobody goes on under the old name.
        let holder = claim.renamed(holder);
        let epoch = old.highest().map_or(0, |highest| highest.epoch) + 1;
        let target = old.taken.map(|taken| taken.target).unwrap_or_default();
        changes.push(taken(&from, &Taken { epoch, holder, at: at.to_owned(), target }));
        kept.partitions = old.partitions;
    }
    let positions = kept.positions(claim)?;
    let found = match positions.is_empty() {
        true => found(entries, claim, target),
        false => Found::default(),
    };
    let own = prefix(claim.log, claim.generation, &own);
    let (holder, at, target) = (holder.to_owned(), at.to_owned(), target.to_owned());
    changes.push(taken(&own, &Taken { epoch: epoch.0, holder, at, target }));
    Ok((changes, Opened { epoch, positions, found }))
}

fn taken(claim: &[u8], taken: &Taken) -> Change {
    (key(claim, Part::Taken, 0, 0), Some(serde_json::to_vec(taken).expect("plain text")))
}

/// Whether all positions are where `advance` says, and ours.
pub fn check(entries: Entries<'_>, claim: &Claim, ours: Epoch, advance: &[Advance]) -> Result<(), Error> {
    let prefix = prefix(claim.log, claim.generation, &(claim.pipeline.clone(), claim.sink.clone()));
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

/// Returns the changes that move positions.
pub fn moved(entries: Entries<'_>, claim: &Claim, advance: &[Advance]) -> Vec<Change> {
    let prefix = prefix(claim.log, claim.generation, &(claim.pipeline.clone(), claim.sink.clone()));
    let moved = advance.iter().flat_map(|step| {
        let at = step.partition.0;
        let mut changes = vec![(key(&prefix, Part::Next, at, 0), Some(step.to.0.to_le_bytes().to_vec()))];
        if let Some(lineage) = &step.lineage {
            changes.push((key(&prefix, Part::Openings, at, 0), Some(lineage.to_string().into_bytes())));
        }
        if let Some(letters) = &step.letters {
            let chunks = || letters.as_bytes().chunks(STATE_VALUE_BYTES_MAX);
            let chunk = |(number, chunk): (u16, &[u8])| {
                (key(&prefix, Part::Letters, at, number), Some(chunk.to_vec()))
            };
            changes.extend((0..).zip(chunks()).map(chunk));
            let before = entries(&key(&prefix, Part::Letters, at, 0)[..prefix.len() + 3]);
            let is_left = |key: &Vec<u8>| !changes.iter().any(|(changed, _)| changed == key);
            let left: Vec<_> = before.into_iter().map(|(key, _)| key).filter(is_left).collect();
            changes.extend(left.into_iter().map(|key| (key, None)));
        }
        changes
    });
    moved.collect()
}

/// Returns the positions, by log and partition, that claims of these names have in these logs.
pub fn positions_of(entries: Entries<'_>, names: &[Name], logs: &[Uuid]) -> Vec<LogPosition> {
    let mut positions = Vec::new();
    for log in logs {
        for ((_, _, name), kept) in read(entries(&[PREFIX, log.as_bytes()].concat())) {
            let is_asked = names.contains(&name);
            let with_next = kept.partitions.iter().filter_map(|(at, kept)| Some((*at, kept.next?)));
            positions
                .extend(with_next.filter(|_| is_asked).map(|(at, next)| (*log, Partition(at), Offset(next))));
        }
    }
    positions
}

/// Returns the positions of redrives' passes with these names, past `above`, that sent letters of a log.
pub fn passes_of(entries: Entries<'_>, names: &[Name], log: Uuid, above: Offset) -> Vec<PassPosition> {
    let log = log.to_string();
    let mut passes = Vec::new();
    for ((pass, _, name), kept) in read(entries(PREFIX)) {
        for (partition, kept) in kept.partitions.into_iter().filter(|_| names.contains(&name)) {
            let (Some(next), Some(letters)) = (kept.next.map(Offset), kept.letters) else { continue };
            let Some(lineage) = Lineage::read(kept.openings.as_deref()) else { continue };
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
