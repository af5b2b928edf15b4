//! The versions of a pipeline's steps, as they are remembered over a restart.
//!
//! Records are entries of the state of the dead letters, one for each version: where it begins,
//! and the recipes of its steps. What new steps make of a message carries the ticket of their
//! record, as it does those of its letters, so that no position covers it before the record is
//! durable. A record that a crash lets stand longer than its version is removed at the next start.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::dead_letters::DeadLetters;
use super::letter::Names;
use super::versions::Begins;
use crate::batch::Offset;
use crate::stream::{AppendError, Identity, StateChange, Stream, Ticket};

/// Begin of the state keys; then the pipeline, the log, the generation and a number.
const KEY: &str = "steps/";

/// Where the versions of one pipeline's steps are remembered.
pub struct Records {
    stream: Arc<dyn Stream>,
    letters: Arc<DeadLetters>,
    prefix: Vec<u8>,
    /// Of the next record: the later, the newer.
    number: u64,
    partitions: usize,
}

/// Names a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key(Vec<u8>);

#[derive(Serialize, Deserialize)]
struct Record {
    /// By partition; one where all are the same.
    begins: Vec<u64>,
    recipes: Vec<String>,
    #[serde(default)]
    holds: bool,
}

/// A version as an earlier process recorded it.
pub struct Recorded {
    pub key: Key,
    pub begins: Begins,
    pub recipes: Vec<String>,
    /// Whether it waits at a message for the next version.
    pub holds: bool,
}

impl Records {
    /// Reads what earlier processes remembered, oldest first.
    pub fn open(
        stream: Arc<dyn Stream>,
        letters: Arc<DeadLetters>,
        names: &Names,
        source: Identity,
    ) -> (Self, Vec<Recorded>) {
        let prefix = |name: &str| format!("{KEY}{name}/{}/{}/", source.log, source.generation).into_bytes();
        let partitions = usize::from(source.partitions);
        let mut found: Vec<(u64, Recorded)> = Vec::new();
        for prefix in names.pipelines.iter().map(|name| prefix(name)) {
            let of_key = |key: &[u8]| key.get(prefix.len()..)?.try_into().ok().map(u64::from_be_bytes);
            found.extend(stream.state(&prefix).into_iter().filter_map(|(key, value)| {
                let record: Record = serde_json::from_slice(&value).ok()?;
                let begins = record.begins(partitions)?;
                Some((
                    of_key(&key)?,
                    Recorded { key: Key(key), begins, recipes: record.recipes, holds: record.holds },
                ))
            }));
        }
        found.sort_by_key(|(number, _)| *number);
        let number = found.last().map_or(0, |(number, _)| number + 1);
        let records = Self { stream, letters, prefix: prefix(names.pipeline()), number, partitions };
        (records, found.into_iter().map(|(_, remembered)| remembered).collect())
    }

    pub fn partitions(&self) -> usize {
        self.partitions
    }

    /// Returns the key of a version that is newer than all others.
    pub fn next_key(&mut self) -> Key {
        let key = Key([&*self.prefix, &self.number.to_be_bytes()].concat());
        self.number += 1;
        key
    }

    /// Records a version, or that it begins elsewhere. The record is durable with the ticket, which
    /// [`DeadLetters::ticket`] covers from now on.
    pub fn set(
        &self,
        key: &Key,
        begins: &Begins,
        recipes: &[String],
        holds: bool,
    ) -> Result<Ticket, AppendError> {
        let mut begins: Vec<_> = begins.iter().map(|begin| begin.0).collect();
        if begins.windows(2).all(|two| two[0] == two[1]) {
            begins.truncate(1);
        }
        let record = Record { begins, recipes: recipes.to_vec(), holds };
        let value = serde_json::to_vec(&record).expect("a record is plain text");
        let appended = self.stream.append(&[], &[StateChange { key: &key.0, value: Some(&value) }])?;
        self.letters.cover(appended.ticket);
        Ok(appended.ticket)
    }

    /// Forgets versions that no sink needs. What finds no room is forgotten by a later call.
    pub fn remove(&self, keys: &mut Vec<Key>) {
        if keys.is_empty() {
            return;
        }
        let changes: Vec<_> = keys.iter().map(|key| StateChange { key: &key.0, value: None }).collect();
        if self.stream.append(&[], &changes).is_ok() {
            keys.clear();
        }
    }
}

/// Returns the recipes of all steps that records of any pipeline name; `None` where a record cannot
/// be read, so that what it names is not known.
pub fn recorded_recipes(dead_letters: &dyn Stream) -> Option<Vec<String>> {
    let records = dead_letters.state(KEY.as_bytes()).into_iter();
    let recipes = records.map(|(_, value)| Some(serde_json::from_slice::<Record>(&value).ok()?.recipes));
    recipes.collect::<Option<Vec<_>>>().map(|recipes| recipes.concat())
}

impl Record {
    fn begins(&self, partitions: usize) -> Option<Begins> {
        match &self.begins[..] {
            [all] => Some(vec![Offset(*all); partitions].into()),
            each if each.len() == partitions => Some(each.iter().copied().map(Offset).collect()),
            _ => None,
        }
    }
}
