//! One sink's claim: writes rows and moves positions so that each row is in
//! the sink or in dead letters, once.
//!
//! The order of effects is the promise (`host/decisions/delivery-order.md`):
//! what is refused is durable in dead letters before a position covers it, and
//! a position moves in the transaction of its rows.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::dead_letters::{DeadLetters, Refusal, Source};
use super::known::{Reader, Seen, before_last, index_within_offset};
use super::metrics::SinkMetrics;
use super::routes::SinkNumber;
use crate::batch::{MessageRef, Offset, Partition};
use crate::sinks::{Advance, Claim, Error, RefusedRow, Rows, Sink};
use crate::step::RefusedKind;
use crate::telemetry::Failures;

/// Rows before a share of refused ones says anything.
const REFUSALS_ROWS_MIN: u64 = 1_000;
/// Over which the share is taken.
const REFUSALS_WINDOW: Duration = Duration::from_secs(60);

pub struct Writer {
    /// `None` while a redrive has it.
    pub sink: Option<Box<dyn Sink>>,
    pub number: SinkNumber,
    pub claim: Claim,
    pub letters: Arc<DeadLetters>,
    pub metrics: SinkMetrics,
    pub failures: Failures,
    pub refusals: Refusals,
    /// By partition, as the sink last said or committed.
    pub positions: Vec<Offset>,
    /// Rows refused so far, for a redrive's summary.
    pub refused: u64,
}

/// Why a write did not finish; the rows it did not get to are still in the
/// caller's hands.
#[derive(Debug, PartialEq, Eq)]
pub enum Failed {
    /// Back off, [`Writer::open`], go on.
    Later { kind: &'static str, reason: String },
    /// Nothing more from this claim until a person acted.
    Stop(String),
}

/// How many rows a sink refused lately.
pub struct Refusals {
    share_max: f64,
    since: Instant,
    rows: u64,
    refused: u64,
}

impl Refusals {
    pub fn new(share_max: f64) -> Self {
        Self { share_max, since: Instant::now(), rows: 0, refused: 0 }
    }

    fn note(&mut self, rows: usize, refused: usize) {
        if self.since.elapsed() > REFUSALS_WINDOW {
            *self = Self::new(self.share_max);
        }
        self.rows += rows as u64;
        self.refused += refused as u64;
    }

    fn too_many(&mut self) -> Option<String> {
        let many = self.rows >= REFUSALS_ROWS_MIN && self.refused as f64 > self.share_max * self.rows as f64;
        if !many || self.share_max >= 1.0 {
            return None;
        }
        let reason = format!(
            "refused {} of {} rows; look at the dead letters: most often a column or a plugin is wrong",
            self.refused, self.rows
        );
        *self = Self::new(self.share_max);
        Some(reason)
    }
}

impl Writer {
    /// Claims and learns the positions. A claim that is new to the sink begins
    /// at `first`, and that is committed, so that it begins there after a crash too.
    pub async fn open(&mut self, first: Offset) -> Result<(), Failed> {
        let partitions = usize::from(self.claim.partitions);
        let sink = self.sink.as_mut().expect("a lent sink is back before the next call");
        let found = sink.open(&self.claim).await.map_err(|error| self.failed(error))?;
        self.positions = vec![first; partitions];
        if found.is_empty() {
            let advance: Vec<_> = (0..self.claim.partitions)
                .map(|p| Advance { partition: Partition(p), from: first, to: first })
                .collect();
            let sink = self.sink.as_mut().expect("still here");
            return sink.commit(&Rows::default(), &advance).await.map_err(|error| self.failed(error));
        }
        for position in found {
            if let Some(known) = self.positions.get_mut(usize::from(position.partition.0)) {
                *known = position.next;
            }
        }
        Ok(())
    }

    /// Writes all of `rows` and moves the positions to `upto`. On a failure
    /// `rows` holds what is neither written nor in dead letters for certain.
    pub async fn write(&mut self, rows: &mut Rows, upto: &[Offset]) -> Result<(), Failed> {
        // Lengths of the parts to write, the next one last.
        let mut parts = vec![rows.len()];
        while let Some(&len) = parts.last() {
            if len == 0 && parts.len() > 1 {
                parts.pop();
                continue;
            }
            let advance = self.advance(rows, len, upto);
            if len == 0 && advance.is_empty() {
                return Ok(());
            }
            let committed = if len == rows.len() {
                self.commit(rows, &advance).await
            } else {
                self.commit(&rows.select(0..len), &advance).await
            };
            match committed {
                Ok(()) => {
                    *rows = if len == rows.len() { Rows::default() } else { rows.select(len..rows.len()) };
                    parts.pop();
                    if parts.is_empty() {
                        parts.push(rows.len());
                    }
                }
                Err(Error::Rows(refused)) if refused.iter().any(|r| r.row < len) => {
                    self.metrics.retry("rows");
                    let refused: Vec<_> = refused.into_iter().filter(|r| r.row < len).collect();
                    let removed = self.refuse(rows, len, refused).await?;
                    if let Some(last) = parts.last_mut() {
                        *last -= removed;
                    }
                }
                Err(error @ (Error::Rows(_) | Error::Data(_))) => {
                    self.metrics.retry("data");
                    parts.pop();
                    if let Some(half) = halve(rows, len) {
                        parts.extend([len - half, half]);
                    } else {
                        let reason = error.to_string();
                        let all = (0..len).map(|row| RefusedRow { row, reason: reason.clone() }).collect();
                        let removed = self.refuse(rows, len, all).await?;
                        parts.push(len - removed);
                    }
                }
                Err(error) => return Err(self.failed(error)),
            }
        }
        Ok(())
    }

    async fn commit(&mut self, rows: &Rows, advance: &[Advance]) -> Result<(), Error> {
        let sink = self.sink.as_mut().expect("a lent sink is back before the next call");
        let begun = Instant::now();
        let result = sink.commit(rows, advance).await;
        self.metrics.duration.record(begun.elapsed());
        if result.is_ok() {
            self.metrics.batches.increment(1);
            self.metrics.written.increment(rows.len() as u64);
            self.refusals.note(rows.len(), 0);
            for step in advance {
                self.positions[usize::from(step.partition.0)] = step.to;
            }
        }
        result
    }

    /// How far the positions may move once the first `len` rows are written:
    /// to the first row after them, else to `upto`.
    fn advance(&self, rows: &Rows, len: usize, upto: &[Offset]) -> Vec<Advance> {
        let mut to = upto.to_vec();
        for row in len..rows.len() {
            let message = rows.get(row);
            let to = &mut to[usize::from(message.entry.partition.0)];
            *to = message.offset().min(*to);
        }
        self.positions
            .iter()
            .zip(to)
            .enumerate()
            .filter(|(_, (from, to))| to > *from)
            .map(|(p, (from, to))| Advance { partition: Partition(p as u16), from: *from, to })
            .collect()
    }

    /// Puts rows among the first `len` into dead letters; when this returns
    /// they survive a crash, and are out of `rows`.
    async fn refuse(
        &mut self,
        rows: &mut Rows,
        len: usize,
        mut refused: Vec<RefusedRow>,
    ) -> Result<usize, Failed> {
        self.refusals.note(refused.len(), refused.len());
        if let Some(reason) = self.refusals.too_many() {
            self.metrics.retry("refusals");
            return Err(Failed::Later { kind: "refusals", reason });
        }
        refused.sort_unstable_by_key(|r| r.row);
        refused.dedup_by_key(|r| r.row);
        let refusals: Vec<_> = refused
            .iter()
            .enumerate()
            .map(|(k, r)| {
                let message = rows.get(r.row);
                let entry = place(&message);
                let before = before_last(message.batch, entry);
                let also = |n: usize| {
                    let first = k.checked_sub(n).map(|k| rows.get(refused[k].row).entry);
                    first.is_some_and(|first| std::ptr::eq(first, &message.batch.entries[entry - n]))
                };
                Refusal {
                    message,
                    source: Source::Sink(&self.claim.sink),
                    kind: RefusedKind::Sink,
                    reason: &r.reason,
                    partition: message.entry.partition,
                    index: index_within_offset(message.batch, entry),
                    alone: before == Some(0),
                    closes: before.is_some_and(also),
                }
            })
            .collect();
        let mut itself = [Reader { sink: self.number, seen: Seen::default() }];
        let letters = self.letters.refuse(&refusals, &mut itself).await;
        let letters = letters.map_err(|error| Failed::Stop(error.to_string()))?;
        self.letters.durable(letters.ticket).await.map_err(|error| Failed::Stop(error.to_string()))?;
        self.metrics.refused.increment(refused.len() as u64);
        self.refused += refused.len() as u64;
        self.failures.report(
            &format!("sink \"{}\": rows refused", self.claim.sink),
            refused.len() as u64,
            refused.first().map_or("", |r| &r.reason),
            &format!("headworks dead-letters list --sink {}", self.claim.sink),
        );
        let mut gone = refused.iter().map(|r| r.row).peekable();
        let kept: Vec<_> =
            (0..len).filter(|row| gone.next_if_eq(row).is_none()).chain(len..rows.len()).collect();
        let removed = rows.len() - kept.len();
        *rows = rows.select(kept);
        Ok(removed)
    }

    fn failed(&self, error: Error) -> Failed {
        let sink = &self.claim.sink;
        let kind = match &error {
            Error::Fenced(reason) => {
                return Failed::Stop(format!(
                    "sink \"{sink}\": {reason}; another host writes as pipeline \"{}\" of this log: stop one of them, then restart this one",
                    self.claim.pipeline
                ));
            }
            Error::Unknown(_) => "unknown",
            Error::Setup(_) => "setup",
            Error::Rows(_) | Error::Data(_) | Error::Retry(_) => "retry",
        };
        self.metrics.retry(kind);
        Failed::Later { kind, reason: error.to_string() }
    }
}

/// Of a row among the entries of its batch.
fn place(message: &MessageRef<'_>) -> usize {
    let place = message.batch.entries.iter().position(|entry| std::ptr::eq(entry, message.entry));
    place.unwrap_or_default()
}

/// The first rows, about half of `len`, that end where an offset's rows end; a
/// position cannot lie between rows of one offset. `None`: all are of one.
fn halve(rows: &Rows, len: usize) -> Option<usize> {
    let of = |row: usize| {
        let message = rows.get(row);
        (message.entry.partition, message.offset())
    };
    let middle = len / 2;
    (middle.max(1)..len)
        .find(|row| of(*row) != of(*row - 1))
        .or_else(|| (1..middle).rev().find(|row| of(*row) != of(*row - 1)))
}
