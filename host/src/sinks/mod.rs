//! Sinks: batched writers with a position of their own.
//!
//! A sink commits its rows and the position in the stream that they bring it
//! to in one transaction, so that a message becomes a row exactly once.
//! Every sink is the same set of files: `config` (what a user says), `sink`
//! (the connection and the transaction), `tests`; `columns` turns messages into
//! values for all of them, `conformance` holds all of them to their promises.

use async_trait::async_trait;
use uuid::Uuid;

use crate::batch::{Batch, MessageRef, Offset, Partition};

#[cfg(test)]
pub(crate) mod conformance;
pub mod columns;
mod config;
pub mod memory;
pub mod postgres;
pub mod sqlite;

pub use config::{BATCH_BYTES_MAX, BATCH_ROWS_MAX, BatchConfig, Config, OnConflict};

/// Whose positions: one pipeline's deliveries to one sink, from one log.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Claim {
    pub pipeline: String,
    pub sink: String,
    pub log: Uuid,
    pub generation: u32,
    pub partitions: u16,
}

/// Up to where a partition is done: `next` is the first offset that is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    pub partition: Partition,
    pub next: Offset,
}

/// Moves a partition's position, with the rows, if it is where we left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Advance {
    pub partition: Partition,
    /// Where this process believes the position is.
    pub from: Offset,
    pub to: Offset,
}

/// Messages to be written, in order, borrowed from shared batches.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    batches: Vec<Batch>,
    /// (batch, entry)
    rows: Vec<(u32, u32)>,
}

impl Rows {
    pub fn push_batch(&mut self, batch: Batch) {
        let number = self.batches.len() as u32;
        self.rows.extend((0..batch.len() as u32).map(|entry| (number, entry)));
        self.batches.push(batch);
    }

    pub fn len(&self) -> usize {
        self.rows.len()
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    pub fn get(&self, i: usize) -> MessageRef<'_> {
        let (batch, entry) = self.rows[i];
        self.batches[batch as usize].message(entry as usize)
    }

    pub fn iter(&self) -> impl ExactSizeIterator<Item = MessageRef<'_>> {
        (0..self.len()).map(|i| self.get(i))
    }

    /// The same bytes, some of the rows.
    pub fn select(&self, rows: impl IntoIterator<Item = usize>) -> Rows {
        Rows { batches: self.batches.clone(), rows: rows.into_iter().map(|i| self.rows[i]).collect() }
    }
}

/// A row that this sink can never write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedRow {
    /// Index into the [`Rows`] of the call.
    pub row: usize,
    /// For a person: `column "value": not a number: "hot"`.
    pub reason: String,
}

/// Variants by what the pipeline does next. In every case nothing was written,
/// but after `Unknown`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// These rows can never be written; the others may: to dead letters, and
    /// the rest again.
    #[error("{} rows refused, the first: {}", .0.len(), .0.first().map_or("", |r| r.reason.as_str()))]
    Rows(Vec<RefusedRow>),
    /// The database refused the data (SQLSTATE class 22 or 23) without saying
    /// which row: halve the batch.
    #[error("the data was refused: {0}")]
    Data(String),
    /// Connection, locks, anything that may pass: back off, `open` again.
    #[error("{0}")]
    Retry(String),
    /// The connection went in COMMIT: `open` again and read the position.
    #[error("outcome of the commit unknown: {0}")]
    Unknown(String),
    /// Another process claimed this position: stop delivering, say so.
    #[error("{0}")]
    Fenced(String),
    /// A person must act (no such table, permission denied): retried slowly, said loudly.
    #[error("{0}")]
    Setup(String),
}

/// A batched writer.
///
/// `open` claims the next epoch for the claim and returns the positions; a
/// process that claimed an earlier epoch can no longer commit. `commit` writes
/// the rows and moves the positions in one transaction, and refuses with
/// [`Error::Fenced`] when the epoch or a position is not the one left behind.
#[async_trait]
pub trait Sink: Send {
    /// Connects, creates what is missing, claims. The answer holds the position
    /// of each partition that was ever advanced: none when the claim is new to
    /// this sink. A new claim's first advance of a partition sets its position
    /// whatever `from` says, so begin with an empty commit of `from == to` for
    /// all partitions: from then on each has a position.
    /// Call it again after `Retry`, `Unknown`, `Setup`.
    async fn open(&mut self, claim: &Claim) -> Result<Vec<Position>, Error>;

    /// `rows` may be empty: then only positions move. `advance` names a
    /// partition at most once; partitions that it does not name stay.
    /// Not safe to drop midway: `open` again before the next call.
    async fn commit(&mut self, rows: &Rows, advance: &[Advance]) -> Result<(), Error>;
}

/// Who claims, for the one who is fenced: `edge-7 (process 4711)`.
fn holder() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|name| name.trim().to_owned())
        .or_else(|_| std::env::var("HOSTNAME"))
        .unwrap_or_else(|_| "a host".to_owned());
    format!("{host} (process {})", std::process::id())
}
