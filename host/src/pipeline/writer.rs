//! One sink's claim: writes rows and moves positions so that each row is in
//! the sink or in dead letters, once.
//!
//! The order of effects is the promise (`host/decisions/delivery-order.md`):
//! what is refused is durable in dead letters before a position covers it, and
//! a position moves in the transaction of its rows.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time;
use uuid::Uuid;

use super::Batching;
use super::claim::{self, Beginning, Waiting};
use super::dead_letters::{self, DeadLetters, Refusal, Source};
use super::known::{Reader, Seen, before_last, index_within_offset};
use super::metrics::SinkMetrics;
use super::pass_letters::{PassLetters, Told};
use super::routes::SinkNumber;
use super::status::CHOOSE;
use crate::batch::{MessageRef, Offset, Partition};
use crate::hints::{Hint, Letters};
use crate::sinks::{
    Advance, BATCH_ROWS_MAX, Claim, Epoch, Error, Opened, Outcome, Position, RefusedRow, Rows, Sink, Written,
};
use crate::step::RefusedKind;
use crate::stream::{AppendError, Attachment, Delivered, Lineage, Opening, Stream};
use crate::telemetry::Failures;

/// Rows before a share of rejected ones says anything.
const REFUSALS_ROWS_MIN: u64 = 1_000;
/// Length of the window in which the share of rejected rows is taken.
const REFUSALS_WINDOW: Duration = Duration::from_secs(60);
/// Rows in a row that the database rejected with one code, none written between.
const STREAK_MAX: u64 = 20;
/// Most rows that a sink which pauses for a streak tries after each pause.
const LEAK_MAX: usize = 256;
/// Default of [`Pace::hold_max`].
const HOLD_MAX: Duration = Duration::from_secs(10);
/// Tries of a batch of which nothing can be written, before its first row is tried alone.
const DOUBTS_MAX: u32 = 3;

/// Stands for the error code of a row that was rejected after [`Error::Doubtful`]: the
/// brake recognizes a streak.
const DOUBTFUL_CODE: &str = "doubtful";

pub struct Writer {
    /// `None` while a redrive has it.
    pub sink: Option<Box<dyn Sink>>,
    pub number: SinkNumber,
    pub claim: Claim,
    /// What this process has of the claim; `None` until it was opened once.
    pub held: Option<Epoch>,
    /// `None`: a new claim begins at the start, whatever the table has.
    pub beginning: Option<Beginning>,
    /// Set until the sink was opened once: what it waits for.
    pub waiting: Option<Waiting>,
    /// This process has had positions of the claim.
    pub has_begun: bool,
    /// The sink had positions of the claim when this process opened it first.
    pub has_found: bool,
    /// Keeps from retention what the claim needs; a redrive has none.
    pub attachment: Option<Arc<dyn Attachment>>,
    pub letters: Arc<DeadLetters>,
    pub metrics: SinkMetrics,
    pub failures: Failures,
    pub refusals: Refusals,
    pub pace: Pace,
    /// By partition, as the sink last said or committed.
    pub positions: Vec<Offset>,
    /// Lineage of each position, by partition.
    pub lineages: Vec<Lineage>,
    /// Openings of the stream that is delivered.
    pub openings: Vec<Opening>,
    /// Number of rows that the sink took so far, those that it ignored included.
    pub written: u64,
    /// Rows refused so far, for a redrive's summary.
    pub refused: u64,
    /// What a redrive knows of letters in the sink's database, once it has asked for that.
    pub told: Option<Told>,
    /// What a redrive's pass has done with the letters of each partition; empty for other claims.
    pub pass_letters: Vec<PassLetters>,
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

/// Limits of one transaction: those of the sink's `batch`, and of its rows one that is halved where a
/// batch runs into a limit of time or memory, and that grows by an eighth with each one that does not.
#[derive(Debug)]
pub struct Pace {
    rows_max: usize,
    /// Bytes of payload.
    bytes_max: u64,
    rows: usize,
    /// Longest wait of an open transaction, which holds locks in the database,
    /// for room in the dead letters and for their sync.
    pub(super) hold_max: Duration,
    /// Tries in a row of which nothing could be written, for no clear reason.
    doubts: u32,
    /// The next transaction has at least so many rows, whatever `rows` says: after a set-up error twice as
    /// many as those of which none could be written. Rows beside them show whether it is these or the table.
    rows_min: usize,
    /// The last transaction was given up while some of its rows had a letter
    /// already: positions move past these before more rows are tried, which
    /// gives back the room that their letters hold.
    settle: bool,
}

impl Default for Pace {
    fn default() -> Self {
        Self::new(&Batching::default())
    }
}

impl Pace {
    pub fn new(batching: &Batching) -> Self {
        let Batching { rows_max, bytes_max, .. } = *batching;
        Self {
            rows_max,
            bytes_max,
            rows: usize::MAX,
            hold_max: HOLD_MAX,
            doubts: 0,
            rows_min: 0,
            settle: false,
        }
    }

    /// Returns how many of the first rows are one transaction: as many as the limits and `most` let, and
    /// all of one offset together, however many these are: a position cannot lie between them.
    fn part(&self, rows: &Rows, most: usize) -> usize {
        let most = most.min(self.rows_max).min(rows.len());
        let mut bytes = 0;
        let is_too_much = |message: MessageRef<'_>| {
            bytes += message.payload().len() as u64;
            bytes > self.bytes_max
        };
        let most = rows.iter().take(most).position(is_too_much).unwrap_or(most);
        if rows.len() <= most {
            return rows.len();
        }
        let of = |row: usize| {
            let message = rows.get(row);
            (message.entry.partition, message.offset())
        };
        let ends = |row: &usize| of(*row) != of(*row - 1);
        let end = (1..=most).rev().find(ends).or_else(|| (most.max(1)..rows.len()).find(ends));
        end.unwrap_or(rows.len())
    }

    /// Halves the next transaction after one of `len` rows.
    fn halve(&mut self, len: usize) {
        if len > 0 {
            self.rows = (len / 2).max(1);
        }
    }

    fn committed(&mut self, len: usize) {
        self.settle = false;
        if len == 0 {
            return;
        }
        (self.doubts, self.rows_min) = (0, 0);
        if len >= self.rows {
            self.rows = self.rows.saturating_add((self.rows / 8).max(1));
        }
        if self.rows > BATCH_ROWS_MAX as usize {
            self.rows = usize::MAX;
        }
    }
}

/// The brake on rejections: what a sink rejected lately, and when that is so
/// much that the table or a plugin is wrong rather than the data. It acts once
/// the rejected are in dead letters; the sink then pauses, and goes on.
pub struct Refusals {
    share_max: f64,
    since: Instant,
    rows: u64,
    refused: u64,
    first: String,
    streak: Streak,
}

/// Rows that the database rejected with one code since the last row it took.
#[derive(Default)]
struct Streak {
    code: String,
    rows: u64,
    first: String,
    /// Rows at the last pause.
    paused_at: u64,
    /// Rows that are tried after the pause; `None`: no pause yet.
    leak: Option<usize>,
}

impl Refusals {
    pub fn new(share_max: f64) -> Self {
        Self {
            share_max,
            since: Instant::now(),
            rows: 0,
            refused: 0,
            first: String::new(),
            streak: Streak::default(),
        }
    }

    fn note_written(&mut self, written: Written) {
        self.renew();
        self.rows += written.written + written.ignored;
        if written != Written::default() {
            self.streak = Streak::default();
        }
    }

    fn note_refused(&mut self, refused: &[RefusedRow]) {
        self.renew();
        self.rows += refused.len() as u64;
        self.refused += refused.len() as u64;
        if let (Some(row), "") = (refused.first(), &*self.first) {
            self.first.clone_from(&row.reason);
        }
        for row in refused {
            let Some(code) = &row.code else { continue };
            if *code != self.streak.code {
                self.streak = Streak { code: code.clone(), first: row.reason.clone(), ..Streak::default() };
            }
            self.streak.rows += 1;
        }
    }

    fn renew(&mut self) {
        if self.since.elapsed() > REFUSALS_WINDOW {
            self.begin_again();
        }
    }

    fn begin_again(&mut self) {
        (self.since, self.rows, self.refused) = (Instant::now(), 0, 0);
        self.first.clear();
    }

    /// Rows to be tried at once.
    fn leak(&self) -> usize {
        self.streak.leak.unwrap_or(usize::MAX)
    }

    /// Why the sink should pause, if it should.
    fn too_many(&mut self) -> Option<String> {
        const LOOK: &str = "look at the dead letters: most often a column, the table or a plugin is wrong";
        if self.share_max >= 1.0 {
            return None;
        }
        if self.streak.rows >= STREAK_MAX && self.streak.rows > self.streak.paused_at {
            self.streak.paused_at = self.streak.rows;
            let leak = self.streak.leak.map_or(1, |leak| (leak * 2).min(LEAK_MAX));
            self.streak.leak = Some(leak);
            return Some(format!(
                "rejected the last {} rows, all with error code {}, and wrote none between them; the first: {}; {LOOK}",
                self.streak.rows, self.streak.code, self.streak.first
            ));
        }
        let many = self.rows >= REFUSALS_ROWS_MIN && self.refused as f64 > self.share_max * self.rows as f64;
        many.then(|| {
            let reason =
                format!("rejected {} of {} rows, the first: {}; {LOOK}", self.refused, self.rows, self.first);
            self.begin_again();
            reason
        })
    }
}

impl Writer {
    /// A writer that is not open yet, without the brake on rejections.
    pub fn new(
        sink: Option<Box<dyn Sink>>,
        number: SinkNumber,
        claim: Claim,
        letters: &Arc<DeadLetters>,
        failures: Failures,
    ) -> Self {
        Self {
            sink,
            number,
            held: None,
            beginning: None,
            waiting: None,
            has_begun: false,
            has_found: false,
            attachment: None,
            letters: Arc::clone(letters),
            metrics: SinkMetrics::new(&claim.pipeline, &claim.sink),
            failures,
            refusals: Refusals::new(1.0),
            pace: Pace::default(),
            positions: Vec::new(),
            lineages: Vec::new(),
            openings: Vec::new(),
            written: 0,
            refused: 0,
            told: None,
            pass_letters: Vec::new(),
            claim,
        }
    }

    /// Claims and learns the positions. A claim that is new to the sink begins at the
    /// first kept message, unless [`Beginning`] says otherwise. A position that was left
    /// in another copy of the log comes back to where the two part. Either is committed,
    /// so that it holds after a crash. `delivered`: what the stream remembers.
    pub async fn open(&mut self, stream: &dyn Stream, delivered: Delivered) -> Result<(), Failed> {
        let sink = self.sink.as_mut().expect("a lent sink is back before the next call");
        let opened = sink.open(&self.claim, self.held).await.map_err(|error| self.failed(error))?;
        self.held = Some(opened.epoch);
        self.openings = stream.openings();
        let partitions = usize::from(self.claim.partitions);
        let is_new = opened.positions.is_empty();
        let is_gone = is_new && self.has_begun;
        self.has_found |= !is_new && !self.has_begun;
        let goes_on = is_gone
            && !opened.found.has_rows
            && self.beginning.as_ref().is_some_and(|beginning| beginning.goes_on());
        // Before anything else, which may fail or take long: what the sink needs again stays. Only then
        // is it known what retention has taken already.
        if !goes_on && let Some(needed) = self.needed(&opened.positions, stream.bounds().start) {
            self.attachment.iter().for_each(|attachment| attachment.go_back(needed));
        }
        let kept = stream.bounds();
        let mut start = kept.start;
        if let Some(beginning) = self.beginning.as_ref().filter(|_| !goes_on) {
            let Opened { positions, found, .. } = &opened;
            let decided = match is_gone && found.has_rows {
                true => Err(self.claim.gone()),
                false => beginning.start(&self.claim, positions.len(), found, delivered, &kept),
            };
            let begin = beginning.begin;
            start = decided.map_err(|reason| self.failed(Error::Choose(reason)))?;
            if is_new && let Some(told) = claim::other_log(&self.claim, found, begin) {
                tracing::warn!(
                    pipeline = self.claim.pipeline,
                    sink = self.claim.sink,
                    "{}; {}",
                    told.cause,
                    told.advice
                );
                self.failures.stands(told);
            }
            if is_new && start > Offset::default() {
                // Before it has a position: afterwards it is not new any more.
                let begins = self.letters.begins(self.number, start).await;
                begins.map_err(|error| self.needed_first(error))?;
            }
        }
        let believes = |beginning: &Beginning| is_new && (goes_on || beginning.believes_sent(&opened.found));
        if self.beginning.as_ref().is_some_and(believes) {
            // Before it has a position, as above.
            let believed = self.letters.sent().believe(self.number).await;
            let believed = believed.map_err(|error| self.needed_first(error))?;
            self.letters.durable(believed).await.map_err(stopped)?;
        }
        if !goes_on {
            self.positions = vec![start; partitions];
        }
        self.lineages = vec![Lineage::default(); partitions];
        let mut to = self.positions.clone();
        let mut is_known = vec![false; partitions];
        for Position { partition, next, lineage } in opened.positions {
            let p = usize::from(partition.0);
            if p < partitions {
                to[p] = lineage.locate(next, &self.openings, kept.start);
                (self.positions[p], self.lineages[p], is_known[p]) = (next, lineage, true);
            }
        }
        let advance: Vec<_> = (0..partitions)
            .filter(|p| !is_known[*p] || self.positions[*p] != to[*p])
            .map(|p| self.step(p, to[p]))
            .collect();
        if is_known.contains(&false) {
            self.tell_lost(stream, kept.start);
        }
        if !advance.is_empty() {
            let sink = self.sink.as_mut().expect("still here");
            sink.commit(&Rows::default(), &advance).await.map_err(|error| self.failed(error))?;
            match is_new {
                true if goes_on => claim::say_goes_on(&self.claim, stream, &self.positions),
                true => claim::say_begun(&self.claim, stream, start, delivered),
                false => claim::say_moved(&self.claim, stream, &advance, &self.failures),
            }
            self.moved(advance);
        }
        (self.has_begun, self.waiting) = (true, None);
        self.beginning.iter_mut().for_each(Beginning::follow);
        // Not in a redrive, which sends by the pass's own position.
        if self.beginning.is_some() { self.compare_sent().await } else { Ok(()) }
    }

    /// Asks the sink for the positions of the passes that sent dead letters to it, and compares.
    async fn compare_sent(&mut self) -> Result<(), Failed> {
        let sent = self.letters.sent();
        let expected = sent.expected(self.number);
        if expected.is_empty() {
            return Ok(());
        }
        let passes: BTreeSet<Uuid> = expected.iter().map(|record| record.pass).collect();
        let sink = self.sink.as_mut().expect("still here");
        let positions = sink.positions_of(&sent.claims(self.number), &Vec::from_iter(passes)).await;
        let positions = positions.map_err(|error| self.failed(error))?;
        self.letters.sent().compare(self.number, expected, &positions);
        Ok(())
    }

    /// Learns what the pass whose claim this is, and others, did with letters in the sink's database.
    /// It is asked once in a run: what this run writes it knows.
    pub async fn learn(&mut self, pass: Uuid, dead_letters: &dyn Stream) -> Result<(), Failed> {
        if self.told.is_none() {
            let claims = self.letters.sent().claims(self.number);
            let sink = self.sink.as_mut().expect("still here");
            let told = Told::ask(&mut **sink, &claims, pass, dead_letters).await;
            self.told = Some(told.map_err(|error| self.failed(error))?);
        }
        let told = self.told.as_ref().expect("just asked");
        if self.pass_letters.is_empty() {
            let none = PassLetters::none_of(dead_letters.identity().log);
            let own = |partition| told.own(partition).cloned().unwrap_or_else(|| none.clone());
            self.pass_letters = (0..self.positions.len()).map(own).collect();
        }
        self.letters.compare(self.number, told, &self.positions);
        Ok(())
    }

    /// Tells what was lost to a claim that begins with the first kept message, `start`. Comes before
    /// the commit of its positions: a crash in between tells it twice.
    fn tell_lost(&mut self, stream: &dyn Stream, start: Offset) {
        let Some(waiting) = &mut self.waiting else { return };
        let lost = waiting.lost(start);
        waiting.from = waiting.from.max(start);
        if let Some((lost, cause)) = lost {
            claim::tell_lost(&self.claim, stream, &waiting.gone, lost, cause);
        }
    }

    /// Returns the lowest offset that a sink with these positions may need; `None` where that is where
    /// the stream has its reader already. `start`: the first kept offset.
    fn needed(&self, positions: &[Position], start: Offset) -> Option<Offset> {
        if positions.len() < usize::from(self.claim.partitions) {
            // Positions that are gone may come back older, or a person may say `begin: start`.
            return (self.has_begun || !positions.is_empty()).then_some(Offset(0));
        }
        let lowest = |at: &Position| at.next.min(at.lineage.locate(at.next, &self.openings, start));
        positions.iter().map(lowest).min()
    }

    /// Writes all of `rows` and moves the positions to `upto`. On a failure
    /// `rows` holds what is neither written nor in dead letters for certain.
    pub async fn write(&mut self, rows: &mut Rows, upto: &[Offset]) -> Result<(), Failed> {
        let mut wrote = false;
        loop {
            let alone = self.pace.doubts >= DOUBTS_MAX && self.pace.rows_min == 0;
            let most = if alone { 1 } else { self.pace.rows.min(self.refusals.leak()) };
            let most = most.max(self.pace.rows_min);
            let len = if self.pace.settle { 0 } else { self.pace.part(rows, most) };
            let advance = self.advance(rows, len, upto);
            if self.pace.settle {
                self.letters.durable(self.letters.ticket()).await.map_err(stopped)?;
            }
            if len == 0 && advance.is_empty() {
                if !std::mem::take(&mut self.pace.settle) {
                    return Ok(());
                }
                // Nothing before it can be committed, and it cannot be halved: all its letters are
                // written, whatever room they take.
                if self.pace.part(rows, self.pace.rows) == self.pace.part(rows, 1) {
                    self.letters.committed(self.number);
                }
                continue;
            }
            match self.commit(rows, len, advance).await {
                Ok(()) => wrote |= len > 0,
                Err(Stopped::Sink(error @ Error::TooMuch(_))) => {
                    self.pace.halve(len);
                    self.pace.rows_min = 0;
                    // Rows of one message stay together.
                    if self.pace.part(rows, self.pace.rows) >= len {
                        return Err(self.failed(error));
                    }
                    self.metrics.retry("too_much");
                    continue;
                }
                // Where others of the batch went through, it is the row. The doubts
                // stay: until a row is written, each that fails alone goes the same
                // way, and the brake on a streak of them holds a sink of which
                // nothing works.
                Err(Stopped::Sink(Error::Doubtful { reason, .. }))
                    if len > 0 && (alone || wrote && len == self.pace.part(rows, 1)) =>
                {
                    let code = Some(DOUBTFUL_CODE.to_owned());
                    let reject = |row| RefusedRow { row, reason: reason.clone(), code: code.clone() };
                    self.refuse(rows, (0..len).map(reject).collect()).await?;
                }
                Err(Stopped::Sink(error)) => {
                    self.pace.rows_min = if matches!(error, Error::Setup(_)) { 2 * len } else { 0 };
                    if matches!(error, Error::Unknown(_)) {
                        // No answer in time may be a limit too.
                        self.pace.halve(len);
                    }
                    return Err(self.failed(error));
                }
                Err(Stopped::Letters(failed)) => {
                    self.pace.halve(len);
                    return Err(failed);
                }
            }
            // After the rejected are in dead letters: somebody can look at them.
            if let Some(reason) = self.refusals.too_many() {
                self.metrics.retry("refusals");
                return Err(Failed::Later { kind: "refusals", reason });
            }
        }
    }

    /// Commits the first `len` rows and takes them out of `rows`; those that
    /// the sink rejects are durable in dead letters before the commit.
    async fn commit(
        &mut self,
        rows: &mut Rows,
        len: usize,
        mut advance: Vec<Advance>,
    ) -> Result<(), Stopped> {
        let begun = Instant::now();
        let sink = self.sink.as_mut().expect("a lent sink is back before the next call");
        let part = if len == rows.len() { rows.clone() } else { rows.select(0..len) };
        let mut left = len;
        let outcome = match sink.commit(&part, &advance).await {
            Ok(Outcome::Committed(written)) => Ok(written),
            Ok(Outcome::Rejected(rejected)) => {
                drop(part);
                let refused = self.refuse(rows, rejected).await;
                for step in &mut advance {
                    step.letters = self.letters_done(step.partition, step.from, step.to);
                }
                let sink = self.sink.as_mut().expect("still here");
                match refused {
                    Ok(refused) => left -= refused,
                    Err(failed) => {
                        // Gives the transaction up: it holds locks.
                        drop(sink.commit(&Rows::default(), &[]).await);
                        return Err(Stopped::Letters(failed));
                    }
                }
                let letters = advance.iter().filter_map(|step| Some((step.partition, step.letters.clone()?)));
                let letters: Vec<_> = letters.collect();
                let set = match letters.is_empty() {
                    true => Ok(()),
                    false => sink.set_letters(&letters).await,
                };
                match set {
                    Ok(()) => sink.finish().await,
                    Err(error) => Err(error),
                }
            }
            Err(error) => Err(error),
        };
        self.metrics.duration.record(begun.elapsed());
        let written = outcome.map_err(Stopped::Sink)?;
        *rows = if left == rows.len() { Rows::default() } else { rows.select(left..rows.len()) };
        self.pace.committed(len);
        self.metrics.batches.increment(1);
        self.written += written.written + written.ignored;
        self.metrics.written.increment(written.written);
        self.metrics.ignored.increment(written.ignored);
        self.refusals.note_written(written);
        self.moved(advance);
        self.letters.committed(self.number);
        Ok(())
    }

    /// These are committed.
    fn moved(&mut self, advance: Vec<Advance>) {
        for Advance { partition, to, lineage, letters, .. } in advance {
            let p = usize::from(partition.0);
            self.positions[p] = to;
            if let Some(letters) = letters.as_deref().and_then(PassLetters::read) {
                self.pass_letters[p] = letters;
            }
            if let Some(lineage) = lineage {
                self.lineages[p] = lineage;
            }
        }
    }

    fn step(&self, partition: usize, to: Offset) -> Advance {
        let from = self.positions[partition];
        let lineage = self.lineages[partition].moved(&self.openings, from, to);
        let partition = Partition(partition as u16);
        Advance { partition, from, to, lineage, letters: self.letters_done(partition, from, to) }
    }

    /// Returns what a pass will have done with a partition's letters once it is at `to`.
    fn letters_done(&self, partition: Partition, from: Offset, to: Offset) -> Option<String> {
        let before = self.pass_letters.get(usize::from(partition.0)).filter(|_| from < to)?;
        let (sent, partly) = self.letters.sent_from(self.number, partition, from..to);
        Some(before.with(&sent, &partly).to_string())
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
            .map(|(p, (_, to))| self.step(p, to))
            .collect()
    }

    /// Puts rows into dead letters and returns their number; the letters then
    /// survive a crash. Each row that has a letter leaves `rows`, also where this
    /// fails because the dead letters have no room for all of them in time: a row
    /// that stayed would be written as well.
    async fn refuse(&mut self, rows: &mut Rows, mut refused: Vec<RefusedRow>) -> Result<usize, Failed> {
        let until = time::Instant::now() + self.pace.hold_max;
        refused.sort_unstable_by_key(|r| r.row);
        refused.dedup_by_key(|r| r.row);
        let refusals: Vec<_> = refused
            .iter()
            .enumerate()
            .map(|(k, r)| {
                let message = rows.get(r.row);
                let entry = rows.entry(r.row);
                let before = before_last(message.batch, entry);
                let also = |n: usize| {
                    let first = k.checked_sub(n).map(|k| rows.get(refused[k].row).entry);
                    first.is_some_and(|first| std::ptr::eq(first, &message.batch.entries[entry - n]))
                };
                Refusal {
                    message,
                    source: Source::Sink(self.letters.names().sink(self.number)),
                    kind: RefusedKind::Sink,
                    reason: &r.reason,
                    partition: message.entry.partition,
                    index: index_within_offset(message.batch, entry),
                    steps: "",
                    alone: before == Some(0),
                    closes: before.is_some_and(also),
                }
            })
            .collect();
        let mut itself = [Reader { sink: self.number, seen: Seen::default() }];
        let letters =
            self.letters.refuse_until(Some(until), &refusals, &mut itself).await.map_err(stopped)?;
        let waiting = refused.len() - letters.done;
        refused.truncate(letters.done);
        self.metrics.refused.increment(refused.len() as u64);
        self.refused += refused.len() as u64;
        self.refusals.note_refused(&refused);
        self.failures.report_rejected(
            &format!("sink \"{}\"", self.letters.names().sink(self.number)),
            refused.iter().map(|r| ("rows refused", &*r.reason)),
            &self
                .failures
                .hint(Hint::DeadLettersSummary(Letters::OfSink(self.letters.names().sink(self.number)))),
        );
        let is_refused = |row: &usize| refused.binary_search_by_key(row, |r| r.row).is_ok();
        *rows = rows.select((0..rows.len()).filter(|row| !is_refused(row)));
        let durable = self.letters.durable_until(until, letters.ticket).await.map_err(stopped)?;
        if waiting > 0 || !durable {
            self.pace.settle = true;
            let reason = match waiting {
                0 => "the dead letters of rejected rows are not durable yet".to_owned(),
                waiting => format!("{waiting} rejected rows wait for room in the dead letters"),
            };
            self.metrics.retry("retry");
            return Err(Failed::Later { kind: "retry", reason });
        }
        Ok(refused.len())
    }

    /// What an append to the dead letters came to that must be durable before the sink has a
    /// position: it waits for room.
    fn needed_first(&self, error: dead_letters::Error) -> Failed {
        match error {
            dead_letters::Error::Append(AppendError::NoSpace) => {
                self.metrics.retry("retry");
                Failed::Later { kind: "retry", reason: error.to_string() }
            }
            error => stopped(error),
        }
    }

    /// Says what an error of the sink means for whoever writes.
    pub fn failed(&mut self, error: Error) -> Failed {
        let kind = match &error {
            Error::Fenced(reason) => return Failed::Stop(reason.clone()),
            Error::Unknown(_) => "unknown",
            Error::Doubtful { .. } => {
                self.pace.doubts += 1;
                "setup"
            }
            Error::Setup(_) | Error::TooMuch(_) => "setup",
            Error::Choose(_) => {
                self.metrics.retry("setup");
                return Failed::Later { kind: CHOOSE, reason: error.to_string() };
            }
            Error::Retry(_) => "retry",
        };
        self.metrics.retry(kind);
        Failed::Later { kind, reason: error.to_string() }
    }
}

/// A failure of the dead letters' log: nothing can be rejected any more.
fn stopped(error: dead_letters::Error) -> Failed {
    Failed::Stop(error.to_string())
}

/// Why a commit did not happen.
enum Stopped {
    Sink(Error),
    Letters(Failed),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rejected(code: &str, count: usize) -> Vec<RefusedRow> {
        let row = |row| RefusedRow { row, reason: "no".to_owned(), code: Some(code.to_owned()) };
        (0..count).map(row).collect()
    }

    #[test]
    fn the_brake_acts_on_a_streak_of_one_code_at_any_rate_and_leaks_ever_more() {
        let mut refusals = Refusals::new(0.5);
        for _ in 0..19 {
            refusals.note_refused(&rejected("23502", 1));
            assert_eq!(refusals.too_many(), None);
        }
        refusals.note_refused(&rejected("23502", 1));
        let reason = refusals.too_many().unwrap();
        assert!(reason.starts_with("rejected the last 20 rows, all with error code 23502"), "{reason}");
        let mut leaks = Vec::new();
        for _ in 0..12 {
            leaks.push(refusals.leak());
            assert_eq!(refusals.too_many(), None, "not without another row");
            refusals.note_refused(&rejected("23502", 1));
            refusals.too_many().unwrap();
        }
        assert_eq!(leaks, [1, 2, 4, 8, 16, 32, 64, 128, 256, 256, 256, 256]);
        refusals.note_written(Written { written: 1, ignored: 0 });
        assert_eq!(refusals.leak(), usize::MAX);
        // Another code, or a row between them, is no streak.
        for n in 0..100 {
            refusals.note_refused(&rejected(["23502", "23514"][n % 2], 1));
            assert_eq!(refusals.too_many(), None);
        }
        let mut refusals = Refusals::new(0.5);
        for _ in 0..30 {
            refusals.note_refused(&rejected("23502", 15));
            refusals.note_written(Written { written: 15, ignored: 0 });
            assert_eq!(refusals.too_many(), None);
        }
    }

    #[test]
    fn a_share_counts_good_rows_beside_bad_ones() {
        let mut refusals = Refusals::new(0.5);
        refusals.note_refused(&rejected("22001", 2_000));
        refusals.note_written(Written { written: 3_000, ignored: 0 });
        assert_eq!(refusals.too_many(), None);
        refusals.note_refused(&rejected("22001", 2_000));
        assert!(refusals.too_many().unwrap().starts_with("rejected the last 2000 rows"));
        let mut never = Refusals::new(1.0);
        never.note_refused(&rejected("22001", 2_000));
        assert_eq!(never.too_many(), None);
    }
}
