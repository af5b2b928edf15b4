//! Sinks: writers that deliver rows in batches and keep a position of their own.
//!
//! A sink commits its rows, together with the position in the stream up to which they bring it, in one
//! transaction, so that a message becomes a row exactly once. Every sink has the same files: `config`
//! (its configuration), `sink` (the connection and the transaction), `tests`. They share `columns`,
//! which maps messages to values, and `conformance`, which tests their promises. `stream` is a stream of
//! the host as a sink. It has no `config`, because streams have their own.

use async_trait::async_trait;
use uuid::Uuid;

use crate::batch::{Batch, MessageRef, Offset, Partition};
use crate::stream::Lineage;

mod check;
pub mod columns;
mod config;
#[cfg(test)]
pub(crate) mod conformance;
pub mod influxdb;
mod journaled;
pub mod memory;
mod password;
mod positions;
pub mod postgres;
pub mod sqlite;
mod state_positions;
pub mod stream;

pub use check::{Checked, Looked};
pub use config::{
    BATCH_BYTES_MAX, BATCH_ROWS_MAX, BatchConfig, Begin, BuildContext, CheckContext, Config, OnConflict,
    SinkConfig,
};
pub use journaled::{Journal, Journaled, Put, Target, look_up};
pub use password::Password;
pub use state_positions::PREFIX as POSITIONS_PREFIX;

/// The key of positions: one pipeline's deliveries to one sink, from one log.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Claim {
    pub pipeline: String,
    pub sink: String,
    pub log: Uuid,
    pub generation: u32,
    pub partitions: u16,
    /// Former names of the claim. If it has no positions, it takes over those of the first of these
    /// names that has any.
    pub formerly: Vec<Name>,
}

/// Pipeline and sink of a claim.
pub type Name = (String, String);

/// Suffix of the name under which redrives of a pipeline have positions. Names in a config contain no
/// slash.
const REDRIVE: &str = "/redrive";

/// Returns the name under which redrives of a pipeline have positions.
pub fn redrive_of(pipeline: &str) -> String {
    format!("{pipeline}{REDRIVE}")
}

fn is_redrive(pipeline: &str) -> bool {
    pipeline.ends_with(REDRIVE)
}

/// A position with its log and partition.
pub type LogPosition = (Uuid, Partition, Offset);

/// Number of processes that took a claim over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Epoch(pub u64);

/// Result of opening a claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    pub epoch: Epoch,
    /// Position of each partition that was ever advanced; empty if the claim is new to this sink.
    pub positions: Vec<Position>,
    /// What the sink found if the claim has no positions.
    pub found: Found,
}

/// What exists before a claim that is new to a sink.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Whether the table has rows, or may have rows that the sink cannot see or that the table stores
    /// elsewhere.
    pub has_rows: bool,
    /// Other claims from the same log with positions in this table, by name.
    pub others: Vec<Name>,
    /// Other logs from which claims of this name have positions in this table, the newest claim first.
    pub other_logs: Vec<OtherLog>,
}

/// A log from which a claim of the same name wrote rows. It belongs to another data folder, or no longer
/// exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtherLog {
    pub log: Uuid,
    /// Time of the last claim in the database's format. 0.1.0 did not record it.
    pub claimed_at: Option<String>,
}

/// Progress in a partition: all offsets below `next` are done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    pub partition: Partition,
    pub next: Offset,
    /// Identifies the copy of the log to which the position belongs.
    pub lineage: Lineage,
}

/// Advances a partition's position with the rows, if it is where this process left it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advance {
    pub partition: Partition,
    /// Where this process expects the position.
    pub from: Offset,
    /// New position, which may be lower than `from`.
    pub to: Offset,
    /// New lineage; `None` leaves it unchanged.
    pub lineage: Option<Lineage>,
    /// What the pass of a redrive did with dead letters up to `to`, beginning with the UUID of the dead
    /// letters' log. `None` leaves it unchanged.
    pub letters: Option<String>,
}

/// A position of a redrive's pass, with what the pass did with dead letters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassPosition {
    pub pass: Uuid,
    pub position: Position,
    /// The last value of [`Advance::letters`].
    pub letters: String,
}

/// Messages to be written, in order, borrowed from shared batches.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    batches: Vec<Batch>,
    /// Pairs of batch and entry.
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

    /// Returns the index of row `i` among the rows that were made of its message for this sink.
    pub fn index(&self, i: usize) -> u32 {
        let (batch, entry) = self.rows[i];
        self.batches[batch as usize].index_within_offset(entry as usize)
    }

    /// Returns the index of row `i` among the entries of its batch.
    pub fn entry(&self, i: usize) -> usize {
        self.rows[i].1 as usize
    }

    #[cfg(test)]
    pub(crate) fn set_received_us(&mut self, received_us: u64) {
        for batch in &mut self.batches {
            batch.entries.to_mut().iter_mut().for_each(|entry| entry.received_us = received_us);
        }
    }

    /// Returns whether all rows were made of one message. A position cannot lie between such rows.
    pub fn is_of_one_message(&self) -> bool {
        let of = |message: MessageRef<'_>| (message.entry.partition, message.offset());
        let mut all = self.iter().map(of);
        let first = all.next();
        all.all(|other| Some(other) == first)
    }

    /// Returns some of the rows, with the same bytes.
    pub fn select(&self, rows: impl IntoIterator<Item = usize>) -> Rows {
        Rows { batches: self.batches.clone(), rows: rows.into_iter().map(|i| self.rows[i]).collect() }
    }
}

/// A row that this sink can never write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedRow {
    /// Index in the [`Rows`] of the call.
    pub row: usize,
    /// Reason for people: `column "value": not a number: "hot"`.
    pub reason: String,
    /// Error code of the database, if the database rejected the row.
    pub code: Option<String>,
}

/// Number of rows that a commit wrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    pub written: u64,
    /// Rows that were already in the table, or that one of its triggers left out.
    pub ignored: u64,
}

/// Result of [`Sink::commit`].
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Rows and positions are committed.
    Committed(Written),
    /// These rows can never be written. The open transaction contains the other rows and the positions,
    /// and [`Sink::finish`] commits it.
    Rejected(Vec<RefusedRow>),
}

/// Errors, by what the pipeline does next. In every case nothing was written, except after `Unknown`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The batch ran into a limit of time or memory. Fewer rows must be committed at once.
    #[error("{0}")]
    TooMuch(String),
    /// None of the rows could be written, because of an error that a trigger or an extension also raises
    /// for a single bad row. The pipeline waits, then tries the rows again, and after some tries the
    /// first row alone.
    #[error("{context}: {reason}")]
    Doubtful { context: String, reason: String },
    /// A temporary error of the connection, locks, a changed table or the like. The pipeline waits and
    /// calls `open` again.
    #[error("{0}")]
    Retry(String),
    /// The connection was lost during COMMIT. The pipeline calls `open` again and reads the position.
    #[error("{0}: whether the last commit took place is not known, and is read from the positions")]
    Unknown(String),
    /// Another process claimed this position. The sink stops delivering and reports it.
    #[error("{0}")]
    Fenced(String),
    /// An operator must act (no such table, permission denied). The call is retried slowly and reported
    /// prominently.
    #[error("{0}")]
    Setup(String),
    /// An operator must choose where the sink continues, with a setting that applies from the next
    /// start. The call is retried slowly and reported prominently.
    #[error("{0}")]
    Choose(String),
}

impl Error {
    /// Returns the error with its context in front.
    fn within(self, context: &str) -> Self {
        match self {
            Self::Doubtful { reason, .. } => Self::Doubtful { context: context.to_owned(), reason },
            error => error.map(|reason| format!("{context}: {reason}")),
        }
    }

    /// Returns the error with advice appended.
    fn and(self, advice: &str) -> Self {
        self.map(|reason| format!("{reason}; {advice}"))
    }

    fn map(self, with: impl FnOnce(String) -> String) -> Self {
        match self {
            Self::TooMuch(reason) => Self::TooMuch(with(reason)),
            Self::Doubtful { context, reason } => Self::Doubtful { context, reason: with(reason) },
            Self::Retry(reason) => Self::Retry(with(reason)),
            Self::Unknown(reason) => Self::Unknown(with(reason)),
            Self::Fenced(reason) => Self::Fenced(with(reason)),
            Self::Setup(reason) => Self::Setup(with(reason)),
            Self::Choose(reason) => Self::Choose(with(reason)),
        }
    }
}

/// A writer that delivers rows in batches.
///
/// The first `open` of a process claims the next epoch of the claim and returns the positions. A process
/// with an earlier epoch can then neither commit nor open. `commit` writes the rows and advances the
/// positions in one transaction, and fails with [`Error::Fenced`] if the epoch or a position is not the
/// one left behind.
#[async_trait]
pub trait Sink: Send {
    /// Connects, creates what is missing, and claims. The table of rows is created only for a claim
    /// without positions. The first advance of a partition in a new claim sets its position whatever
    /// `from` is. Begin therefore with an empty commit of `from == to` for all partitions, after which
    /// each has a position.
    ///
    /// `held` is the epoch of the claim that this process has. Without it, the claim is taken over from
    /// its holder, so only the start of a process passes `None`. With it, the claim continues, or the
    /// call fails with [`Error::Fenced`] if a higher epoch was claimed meanwhile. Call this again after
    /// `Retry`, `Unknown` and `Setup`; after `TooMuch` and `Doubtful` the claim is still valid.
    async fn open(&mut self, claim: &Claim, held: Option<Epoch>) -> Result<Opened, Error>;

    /// Returns the positions, by log and partition, of claims with these names in these logs, without
    /// taking them. Called after `open` and before the next `commit`.
    async fn positions_of(&mut self, claims: &[Name], logs: &[Uuid]) -> Result<Vec<LogPosition>, Error>;

    /// Returns the positions of redrives' passes with these names, past `above`, that sent dead letters
    /// of this log, without taking them. Called as [`Sink::positions_of`] is.
    async fn passes_of(
        &mut self,
        claims: &[Name],
        log: Uuid,
        above: Offset,
    ) -> Result<Vec<PassPosition>, Error>;

    /// Writes rows and advances positions. `rows` may be empty, to advance positions only. `advance`
    /// names a partition at most once; other partitions stay. A row that cannot be written is isolated:
    /// the others are written without it in the same transaction, which waits for [`Sink::finish`], so
    /// that the rejected rows are durable as dead letters before a position covers them. Not cancel
    /// safe: after a dropped call, `open` must be called before the next one.
    async fn commit(&mut self, rows: &Rows, advance: &[Advance]) -> Result<Outcome, Error>;

    /// Replaces the records of dead letters in positions, in the transaction that a `commit` with
    /// rejected rows left open, because the rejections were not known when it began.
    async fn set_letters(&mut self, letters: &[(Partition, String)]) -> Result<(), Error>;

    /// Commits the transaction that a `commit` with rejected rows left open. Any other call after that
    /// `commit`, except [`Sink::set_letters`], rolls it back.
    async fn finish(&mut self) -> Result<Written, Error>;
}
