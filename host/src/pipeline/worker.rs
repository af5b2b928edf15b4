//! A worker: one thread with its own instances of the steps. A partition
//! belongs to one worker, so that its messages stay in order.
//!
//! Takes frames, runs the chain over each partition's messages, sorts what
//! comes out by route, hands each sink its part. Blocks where a sink's queue
//! is full: that is what pushes back to the reader.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use metrics::Histogram;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_util::sync::CancellationToken;

use super::config::{Backoff, Config};
use super::dead_letters::{self, DeadLetters, Refusal, Source, index_within_offset};
use super::metrics::{PipelineMetrics, step_duration};
use super::outlet::{Bundle, Outlet, OutletClosed};
use super::routes::Routes;
use crate::batch::{Batch, Entry, Offset, Partition};
use crate::step::{RefusedKind, Step};
use crate::stream::Ticket;
use crate::telemetry::Failures;

/// A step that waits for a new version is asked again after this.
const HELD_WAIT: Duration = Duration::from_millis(200);
/// Messages of a frame that a worker makes room for at once.
const ENTRIES_AT_ONCE: usize = 1_024;
/// Frames that wait for one worker.
pub const WORK_FRAMES_MAX: usize = 8;

/// What a reader gives its workers, in stream order.
pub enum Work {
    /// All messages of a frame; the worker takes those of its partitions.
    Frame(Arc<Frame>),
    /// Nothing for this worker below `upto`: the sinks' positions may move there.
    Progress { upto: Offset },
    /// The new steps, from here on.
    Flip(Steps),
    /// One more sink, from `from` on.
    Attach { outlet: Outlet, from: Offset },
}

/// A frame on its way through the workers; counts against the read-ahead until
/// the last worker is done with it.
pub struct Frame {
    pub batch: Batch,
    pub upto: Offset,
    pub _room: OwnedSemaphorePermit,
}

/// A worker's instances of a chain.
#[derive(Default)]
pub struct Steps {
    steps: Vec<(Box<dyn Step>, Histogram)>,
    /// Of the chain.
    generation: u64,
}

impl Steps {
    pub fn new(steps: Vec<Box<dyn Step>>, generation: u64) -> Self {
        let timed = |step: Box<dyn Step>| {
            let duration = step_duration(&step.id().pipeline, &step.id().step);
            (step, duration)
        };
        Self { steps: steps.into_iter().map(timed).collect(), generation }
    }
}

/// What all workers of a pipeline share.
pub struct Shared {
    pub name: Arc<str>,
    pub config: Config,
    pub routes: Routes,
    pub letters: Arc<DeadLetters>,
    pub failures: Failures,
    pub metrics: PipelineMetrics,
    /// Generation of a chain in which a worker waits for a held step; 0: none does.
    pub held_in: AtomicU64,
    /// The end of the process's patience: stop at once.
    pub abort: CancellationToken,
}

/// Why a worker ended before its queue did. In each case what it held is
/// delivered again from the sinks' positions.
#[derive(Debug, thiserror::Error)]
pub enum Ended {
    #[error("stopped")]
    Aborted,
    #[error(transparent)]
    DeadLetters(#[from] dead_letters::Error),
}

pub struct Worker {
    pub number: u16,
    pub workers: u16,
    pub shared: Arc<Shared>,
    pub queue: mpsc::Receiver<Work>,
    pub steps: Steps,
    pub runtime: Handle,
    pub outlets: Vec<Served>,
    /// All below is through the steps.
    pub done: Offset,
    /// The same, for the pipeline: no letter comes from here below it.
    pub shown: Arc<AtomicU64>,
    /// Covers every letter that this worker wrote or found.
    pub letters: Ticket,
    /// The lane ends: a held step is waited for no longer.
    pub stop: CancellationToken,
}

/// An outlet as one worker sees it.
pub struct Served {
    pub outlet: Outlet,
    /// All below was sent to it.
    pub sent: Offset,
    /// Of the frame at hand.
    pub batches: Vec<Batch>,
}

impl Served {
    pub fn new(outlet: Outlet, from: Offset) -> Self {
        Self { outlet, sent: from, batches: Vec::new() }
    }
}

impl Worker {
    /// Until the reader is gone and the queue is empty.
    pub fn run(mut self) -> Result<(), Ended> {
        while let Some(work) = self.queue.blocking_recv() {
            match work {
                Work::Frame(frame) => self.frame(&frame)?,
                Work::Progress { upto } => {
                    self.set_done(self.done.max(upto));
                    self.hand_out(true)?;
                }
                Work::Flip(steps) => self.steps = steps,
                Work::Attach { outlet, from } => self.outlets.push(Served::new(outlet, from)),
            }
        }
        self.hand_out(true)
    }

    fn frame(&mut self, frame: &Frame) -> Result<(), Ended> {
        if self.outlets.is_empty() {
            // The lane ends: what it would make goes to nobody.
            self.set_done(frame.upto);
            return Ok(());
        }
        let mut parts: Vec<(Partition, Vec<Entry>)> = Vec::new();
        for entry in &frame.batch.entries {
            if entry.partition.0 % self.workers != self.number {
                continue;
            }
            match parts.iter_mut().find(|(partition, _)| *partition == entry.partition) {
                Some((_, entries)) => entries.push(*entry),
                None => {
                    let mut entries = Vec::with_capacity(frame.batch.len().min(ENTRIES_AT_ONCE));
                    entries.push(*entry);
                    parts.push((entry.partition, entries));
                }
            }
        }
        let batch_max = self.shared.config.batch_messages_max.max(1) as usize;
        for (partition, mut rest) in parts {
            self.shared.metrics.read.increment(rest.len() as u64);
            while !rest.is_empty() {
                let later = if rest.len() > batch_max { rest.split_off(batch_max) } else { Vec::new() };
                let entries = std::mem::replace(&mut rest, later);
                let batch = Batch {
                    base: frame.batch.base,
                    now_us: frame.batch.now_us,
                    segments: frame.batch.segments.clone(),
                    entries: entries.into(),
                };
                let mut batch = self.chain(batch, partition)?;
                if batch.entries.iter().any(|entry| entry.partition != partition) {
                    for entry in batch.entries.to_mut() {
                        entry.partition = partition;
                    }
                }
                self.shared.metrics.passed.increment(batch.len() as u64);
                self.route(batch)?;
            }
        }
        self.set_done(frame.upto);
        self.hand_out(false)
    }

    fn set_done(&mut self, upto: Offset) {
        self.done = upto;
        self.shown.store(upto.0, Ordering::Release);
    }

    fn chain(&mut self, mut batch: Batch, partition: Partition) -> Result<Batch, Ended> {
        let shared = Arc::clone(&self.shared);
        let held = Held { generation: self.steps.generation, stop: &self.stop };
        for (step, duration) in &mut self.steps.steps {
            if batch.is_empty() {
                break;
            }
            let begun = Instant::now();
            let ran = run_step(step.as_mut(), batch, partition, &shared, &self.runtime, &held)?;
            duration.record(begun.elapsed());
            self.letters = self.letters.max(ran.letters);
            batch = ran.passed;
        }
        Ok(batch)
    }

    /// Sorts a batch by sink; what names no route goes to dead letters.
    fn route(&mut self, batch: Batch) -> Result<(), Ended> {
        if batch.is_empty() {
            return Ok(());
        }
        let shared = Arc::clone(&self.shared);
        let (batch, indexes, found) = without_letters(batch, super::ROUTES_STEP, &shared.letters);
        self.letters = self.letters.max(found);
        if batch.is_empty() {
            return Ok(());
        }
        let sorted = shared.routes.sort(batch);
        if !sorted.unknown.is_empty() {
            let unknown = &sorted.unknown;
            let refused = refuse_unknown(&sorted.batch, indexes.as_deref(), unknown, &shared, &self.runtime)?;
            self.letters = self.letters.max(refused);
        }
        for served in &mut self.outlets {
            if let Some(batch) = sorted.for_sink(served.outlet.sink) {
                served.batches.push(batch);
            }
        }
        Ok(())
    }

    /// Sends each sink what is there for it; with `progress` also where nothing is.
    fn hand_out(&mut self, progress: bool) -> Result<(), Ended> {
        let mut lost = false;
        for served in &mut self.outlets {
            if served.batches.is_empty() && !(progress && served.sent < self.done) {
                continue;
            }
            let bundle = Bundle {
                worker: self.number,
                workers: self.workers,
                from: served.sent,
                upto: self.done,
                batches: std::mem::take(&mut served.batches),
                letters: self.letters,
                room: None,
            };
            served.sent = self.done;
            match served.outlet.send(bundle, &self.shared.abort, &self.runtime) {
                Ok(()) => {}
                Err(OutletClosed::Detached) => lost = true,
                Err(OutletClosed::Aborted) => return Err(Ended::Aborted),
            }
        }
        if lost {
            self.outlets.retain(|served| !served.outlet.detached());
        }
        Ok(())
    }
}

struct Ran {
    passed: Batch,
    letters: Ticket,
}

/// What a worker that waits for a held step looks at.
struct Held<'a> {
    generation: u64,
    stop: &'a CancellationToken,
}

impl Held<'_> {
    /// A new chain lies behind the messages at hand: the supervisor sees that
    /// somebody waits, and ends the lane when there is one.
    fn wait(&self, shared: &Shared, runtime: &Handle) -> Result<(), Ended> {
        if self.stop.is_cancelled() {
            return Err(Ended::Aborted);
        }
        shared.held_in.store(self.generation, Ordering::Release);
        runtime.block_on(async {
            tokio::select! {
                () = shared.abort.cancelled() => Err(Ended::Aborted),
                () = self.stop.cancelled() => Err(Ended::Aborted),
                () = tokio::time::sleep(HELD_WAIT) => Ok(()),
            }
        })
    }
}

/// Runs one step, again where it asks for it; what it refuses is appended to dead letters.
fn run_step(
    step: &mut dyn Step,
    batch: Batch,
    partition: Partition,
    shared: &Shared,
    runtime: &Handle,
    held: &Held<'_>,
) -> Result<Ran, Ended> {
    let name = Arc::clone(&step.id().step);
    let (batch, indexes, found) = without_letters(batch, &name, &shared.letters);
    if batch.is_empty() {
        return Ok(Ran { passed: batch, letters: found });
    }
    let retries = &shared.config.retries;
    let backoff = Backoff { min: retries.backoff_min, max: retries.backoff_max };
    let mut attempt = 0;
    let mut outcome = loop {
        let outcome = step.run(batch.clone(), partition, attempt);
        let Some(reason) = &outcome.retry else { break outcome };
        if outcome.held {
            held.wait(shared, runtime)?;
            continue;
        }
        if attempt >= retries.max {
            let reason = format!("asked for a retry {} times, the last time: {reason}", attempt + 1);
            break refuse_all(&batch, RefusedKind::Retries, &reason);
        }
        shared.failures.report(
            &format!("{}/{name}: retry", shared.name),
            1,
            reason,
            "the admin address, /api/status",
        );
        let wait = backoff.delay(attempt);
        let aborted =
            runtime.block_on(async { tokio::time::timeout(wait, shared.abort.cancelled()).await.is_ok() });
        if aborted {
            return Err(Ended::Aborted);
        }
        attempt += 1;
    };
    shared.metrics.dropped.increment(outcome.dropped);
    outcome.refused.retain(|refused| (refused.index as usize) < batch.len());
    let Some(first) = outcome.refused.first() else {
        return Ok(Ran { passed: outcome.passed, letters: found });
    };
    shared.metrics.refused.increment(outcome.refused.len() as u64);
    let show = format!("headworks dead-letters list --pipeline {}", shared.name);
    let kind = format!("{}/{name}: {}", shared.name, first.kind.as_str());
    shared.failures.report(&kind, outcome.refused.len() as u64, &first.reason, &show);
    let refusals: Vec<_> = outcome
        .refused
        .iter()
        .map(|refused| Refusal {
            message: batch.message(refused.index as usize),
            source: Source::Step(&name),
            kind: refused.kind,
            reason: &refused.reason,
            index: place(&batch, indexes.as_deref(), refused.index as usize),
        })
        .collect();
    let letters = appended(&refusals, shared, runtime)?;
    Ok(Ran { passed: outcome.passed, letters })
}

/// A message that got a letter from this step before a crash must not pass it
/// now, be it that the step has changed. `Some`: the places that the others
/// had within their offsets.
pub(super) fn without_letters(
    batch: Batch,
    step: &str,
    letters: &DeadLetters,
) -> (Batch, Option<Vec<u32>>, Ticket) {
    let offset = |entry: Option<&Entry>| entry.map_or(Offset(0), |entry| batch.offset(entry));
    let (first, last) = (offset(batch.entries.first()), offset(batch.entries.last()));
    if first >= letters.check_below() || !letters.any_within(first, last) {
        return (batch, None, Ticket::default());
    }
    let mut indexes = Vec::new();
    let mut entries = Vec::new();
    for (i, entry) in batch.entries.iter().enumerate() {
        let index = index_within_offset(&batch, i);
        if !letters.contains(Source::Step(step), batch.offset(entry), index) {
            indexes.push(index);
            entries.push(*entry);
        }
    }
    if entries.len() == batch.len() {
        return (batch, None, Ticket::default());
    }
    // Whoever wrote the letter may not have seen it durable yet.
    (Batch { entries: entries.into(), ..batch }, Some(indexes), letters.ticket())
}

/// The place that an entry had within its offset when it came; `indexes`: as
/// [`without_letters`] gave them.
pub(super) fn place(batch: &Batch, indexes: Option<&[u32]>, entry: usize) -> u32 {
    indexes.map_or_else(|| index_within_offset(batch, entry), |of| of[entry])
}

fn refuse_all(batch: &Batch, kind: RefusedKind, reason: &str) -> crate::step::Outcome {
    let refused = (0..batch.len() as u32)
        .map(|index| crate::step::Refused { index, kind, reason: reason.to_owned() })
        .collect();
    let passed = Batch { base: batch.base, now_us: batch.now_us, ..Batch::default() };
    crate::step::Outcome { passed, refused, ..Default::default() }
}

fn refuse_unknown(
    batch: &Batch,
    indexes: Option<&[u32]>,
    unknown: &[usize],
    shared: &Shared,
    runtime: &Handle,
) -> Result<Ticket, Ended> {
    let reasons: Vec<_> =
        unknown.iter().map(|i| shared.routes.unknown_reason(batch.message(*i).route())).collect();
    let refusals: Vec<_> = unknown
        .iter()
        .zip(&reasons)
        .map(|(i, reason)| Refusal {
            message: batch.message(*i),
            source: Source::Step(super::ROUTES_STEP),
            kind: RefusedKind::Failed,
            reason,
            index: place(batch, indexes, *i),
        })
        .collect();
    shared.metrics.refused.increment(refusals.len() as u64);
    let show = format!("headworks dead-letters list --pipeline {}", shared.name);
    let kind = format!("{}: unknown route", shared.name);
    shared.failures.report(&kind, refusals.len() as u64, &reasons[0], &show);
    appended(&refusals, shared, runtime)
}

fn appended(refusals: &[Refusal<'_>], shared: &Shared, runtime: &Handle) -> Result<Ticket, Ended> {
    runtime.block_on(async {
        tokio::select! {
            ticket = shared.letters.refuse(refusals) => Ok(ticket?),
            () = shared.abort.cancelled() => Err(Ended::Aborted),
        }
    })
}
