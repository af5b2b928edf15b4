//! Sinks: batched writers with a position of their own.
//!
//! A sink commits its rows and the position in the stream that they bring it
//! to in one transaction, so that a message becomes a row exactly once.
//! Every sink is the same set of files: `config` (what a user says), `sink`
//! (the connection and the transaction), `tests`; `columns` turns messages into
//! values for all of them, `conformance` holds all of them to their promises.
//! `stream` is a stream of the host as a sink: it needs no `config`, since the streams have theirs.

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

/// Whose positions: one pipeline's deliveries to one sink, from one log.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Claim {
    pub pipeline: String,
    pub sink: String,
    pub log: Uuid,
    pub generation: u32,
    pub partitions: u16,
    /// Names that the claim had before: where it has no positions, it takes over those of the
    /// first of these that has.
    pub formerly: Vec<Name>,
}

/// Pipeline and sink of a claim.
pub type Name = (String, String);

/// Ends the name under which redrives of a pipeline have positions. Names in a config have no slash.
const REDRIVE: &str = "/redrive";

/// Returns the name under which redrives of a pipeline have positions.
pub fn redrive_of(pipeline: &str) -> String {
    format!("{pipeline}{REDRIVE}")
}

fn is_redrive(pipeline: &str) -> bool {
    pipeline.ends_with(REDRIVE)
}

/// A position, with the log and the partition that it is in.
pub type LogPosition = (Uuid, Partition, Offset);

/// Counts the processes that took a claim over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Epoch(pub u64);

/// An open claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    pub epoch: Epoch,
    /// Position of each partition that was ever advanced; empty when the claim is new to this sink.
    pub positions: Vec<Position>,
    /// What the sink found where the claim has no positions.
    pub found: Found,
}

/// What is there before a claim that is new to a sink.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The table has rows, or it is not certain that it has none: the sink may not see them, or the
    /// table puts them elsewhere.
    pub has_rows: bool,
    /// Other claims from the same log with positions in this table, by name.
    pub others: Vec<Name>,
    /// Other logs of which claims of this name have positions in this table, the newest claim first.
    pub other_logs: Vec<OtherLog>,
}

/// A log of which a claim of the same name wrote rows: of another data folder, or of one that is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtherLog {
    pub log: Uuid,
    /// When it was claimed last, as its database writes it; 0.1.0 did not note it.
    pub claimed_at: Option<String>,
}

/// Up to where a partition is done: `next` is the first offset that is not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    pub partition: Partition,
    pub next: Offset,
    /// Tells which copy of the log the position is in.
    pub lineage: Lineage,
}

/// Moves a partition's position, with the rows, if it is where we left it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advance {
    pub partition: Partition,
    /// Where this process believes the position is.
    pub from: Offset,
    /// May lie before `from`.
    pub to: Offset,
    /// `None`: stays as it is.
    pub lineage: Option<Lineage>,
    /// What the pass of a redrive did with dead letters up to `to`, beginning with the UUID of the
    /// dead letters' log. `None`: stays as it is.
    pub letters: Option<String>,
}

/// A position of a redrive's pass, with what the pass did with dead letters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassPosition {
    pub pass: Uuid,
    pub position: Position,
    /// What [`Advance::letters`] said last.
    pub letters: String,
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

    /// Index of row `i` among the rows that were made of its message for this sink.
    pub fn index(&self, i: usize) -> u32 {
        let (batch, entry) = self.rows[i];
        self.batches[batch as usize].index_within_offset(entry as usize)
    }

    /// Index of row `i` among the entries of its batch.
    pub fn entry(&self, i: usize) -> usize {
        self.rows[i].1 as usize
    }

    #[cfg(test)]
    pub(crate) fn set_received_us(&mut self, received_us: u64) {
        for batch in &mut self.batches {
            batch.entries.to_mut().iter_mut().for_each(|entry| entry.received_us = received_us);
        }
    }

    /// Returns whether all rows were made of one message. A position cannot lie
    /// between such rows.
    pub fn is_of_one_message(&self) -> bool {
        let of = |message: MessageRef<'_>| (message.entry.partition, message.offset());
        let mut all = self.iter().map(of);
        let first = all.next();
        all.all(|other| Some(other) == first)
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
    /// Error code of the database, where the database rejected the row.
    pub code: Option<String>,
}

/// How many rows a commit wrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    pub written: u64,
    /// Rows that the table had already, or that one of its triggers left out.
    pub ignored: u64,
}

/// What [`Sink::commit`] did.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Rows and positions are committed.
    Committed(Written),
    /// These rows can never be written. The transaction holds the others and
    /// the positions: [`Sink::finish`] commits it.
    Rejected(Vec<RefusedRow>),
}

/// Variants by what the pipeline does next. In every case nothing was written,
/// except after `Unknown`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The batch ran into a limit of time or memory: commit fewer rows at once.
    #[error("{0}")]
    TooMuch(String),
    /// None of the rows could be written, by an error that a trigger or an
    /// extension also raises for a single bad row: back off, then try the rows
    /// again; after some tries, the first row alone.
    #[error("{context}: {reason}")]
    Doubtful { context: String, reason: String },
    /// Connection, locks, a changed table, anything that may pass: back off, `open` again.
    #[error("{0}")]
    Retry(String),
    /// The connection went in COMMIT: `open` again and read the position.
    #[error("{0}: whether the last commit took place is not known, and is read from the positions")]
    Unknown(String),
    /// Another process claimed this position: stop delivering, say so.
    #[error("{0}")]
    Fenced(String),
    /// A person must act (no such table, permission denied): retried slowly, said loudly.
    #[error("{0}")]
    Setup(String),
    /// A person must choose where the sink goes on, by a setting that counts from the next start:
    /// retried slowly, said loudly.
    #[error("{0}")]
    Choose(String),
}

impl Error {
    /// The same, with where it happened in front.
    fn within(self, context: &str) -> Self {
        match self {
            Self::Doubtful { reason, .. } => Self::Doubtful { context: context.to_owned(), reason },
            error => error.map(|reason| format!("{context}: {reason}")),
        }
    }

    /// The same, with what to do behind it.
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

/// A batched writer.
///
/// The first `open` of a process claims the next epoch for the claim and returns
/// the positions; a process that claimed an earlier epoch can neither commit nor
/// open any more. `commit` writes the rows and moves the positions in one
/// transaction, and refuses with [`Error::Fenced`] when the epoch or a position
/// is not the one left behind.
#[async_trait]
pub trait Sink: Send {
    /// Connects, creates what is missing, claims. The table of rows is created only for a claim
    /// without positions. A new claim's first advance of a
    /// partition sets its position whatever `from` says, so begin with an empty
    /// commit of `from == to` for all partitions: from then on each has a position.
    ///
    /// `held` is the epoch that this process has of the claim. Without one the
    /// claim is taken over from whoever has it, so only the start of a process
    /// does without. With one it goes on, or is [`Error::Fenced`] where a higher
    /// epoch was claimed meanwhile.
    /// Call it again after `Retry`, `Unknown` and `Setup`; after `TooMuch` and
    /// `Doubtful` the claim still stands.
    async fn open(&mut self, claim: &Claim, held: Option<Epoch>) -> Result<Opened, Error>;

    /// Returns the positions, by log and partition, that claims of these names have in these logs,
    /// and takes none. To be called after `open` and before the next `commit`.
    async fn positions_of(&mut self, claims: &[Name], logs: &[Uuid]) -> Result<Vec<LogPosition>, Error>;

    /// Returns the positions of redrives' passes with these names, past `above`, that sent dead
    /// letters of this log, and takes none. To be called as [`Sink::positions_of`].
    async fn passes_of(
        &mut self,
        claims: &[Name],
        log: Uuid,
        above: Offset,
    ) -> Result<Vec<PassPosition>, Error>;

    /// `rows` may be empty: then only positions move. `advance` names a
    /// partition at most once; partitions that it does not name stay.
    /// A row that cannot be written is isolated: the others are written without
    /// it, in the same transaction, which waits for [`Sink::finish`] so that the
    /// rejected are durable in dead letters before a position covers them.
    /// Not safe to drop midway: `open` again before the next call.
    async fn commit(&mut self, rows: &Rows, advance: &[Advance]) -> Result<Outcome, Error>;

    /// Replaces what positions say of dead letters, in the transaction that a `commit` which rejected
    /// rows left open: what is rejected was not known when it began.
    async fn set_letters(&mut self, letters: &[(Partition, String)]) -> Result<(), Error>;

    /// Commits what a `commit` that rejected rows left open. Any other call
    /// after that one, but for [`Sink::set_letters`], gives that transaction up.
    async fn finish(&mut self) -> Result<Written, Error>;
}
