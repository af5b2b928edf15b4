//! A worker: one thread with its own instances of the steps. A partition
//! belongs to one worker, so that its messages stay in order.
//!
//! Takes frames, runs the chain over each partition's messages, sorts what
//! comes out by route, hands each sink its part. Blocks where a sink's queue
//! is full: that is what pushes back to the reader. Before it waits for room for
//! dead letters, it hands out what it is done with: the sinks give that room back.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use metrics::Histogram;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_util::sync::CancellationToken;

use super::config::Config;
use super::dead_letters::{self, DeadLetters, Refusal, Source};
use super::gone::Gone;
use super::held::HeldWorkers;
use super::known::{Reader, Seen};
use super::metrics::{PipelineMetrics, step_duration};
use super::outlet::{Bundle, Outlet, OutletClosed, send_all};
use super::reasons::KeptReasons;
use super::redrive_status::Redrives;
use super::routes::RouteTables;
use super::schedule::{OfWorker, Schedule};
use super::step_history::StepHistory;
use super::step_run::{Context, run_step};
use super::stripped::{Stripped, without_letters, without_whole};
use super::unrouted::{Inputs, Unrouted};
use super::versions::Begins;
use crate::batch::{Batch, Entry, Offset, Partition};
use crate::hints::{Hint, Letters};
use crate::patience::Patience;
use crate::step::{Chain, RefusedKind, Step};
use crate::stream::Ticket;
use crate::telemetry::Failures;

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
    /// New steps, and the messages that they begin with.
    Flip { begins: Begins, steps: Steps, ticket: Ticket },
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
    steps: Vec<Timed>,
    names: Vec<Arc<str>>,
    /// Generation of the chain.
    generation: u64,
    /// Why they run no message, and wait for the next version.
    hold: Option<Arc<str>>,
}

struct Timed {
    step: Box<dyn Step>,
    duration: Histogram,
    /// How long messages that do not concern the step may wait for its retries.
    patience: Patience,
}

impl Steps {
    pub fn new(steps: Vec<Box<dyn Step>>, chain: &Chain) -> Self {
        let timed = |step: Box<dyn Step>| {
            let duration = step_duration(&step.id().pipeline, &step.id().step);
            Timed { step, duration, patience: Patience::new(Instant::now()) }
        };
        let names = steps.iter().map(|step| Arc::clone(&step.id().step)).collect();
        let steps = steps.into_iter().map(timed).collect();
        Self { steps, names, generation: chain.generation, hold: chain.hold.clone() }
    }
}

/// What all workers of a pipeline share.
pub struct Shared {
    pub name: Arc<str>,
    pub config: Config,
    pub routes: RouteTables,
    pub letters: Arc<DeadLetters>,
    pub failures: Failures,
    pub metrics: PipelineMetrics,
    pub redrives: Redrives,
    /// Of the redrives of all pipelines.
    pub reasons: Arc<KeptReasons>,
    pub gone: Arc<Gone>,
    /// Offset, by partition, below which each message was counted as read.
    pub counted: Vec<AtomicU64>,
    pub held: HeldWorkers,
    /// The last time that a step asked for a retry, and which with what reason.
    pub retry: Mutex<Option<(Instant, String)>>,
    pub schedule: Schedule,
    /// The end of the process's patience: stop at once.
    pub abort: CancellationToken,
}

impl Shared {
    /// Returns which step asked for a retry within the last [`RETRIES_FOR`], and why.
    pub fn recent_retry(&self) -> Option<String> {
        let retry = self.retry.lock().unwrap_or_else(PoisonError::into_inner);
        retry.as_ref().filter(|(at, _)| at.elapsed() < RETRIES_FOR).map(|(_, why)| why.clone())
    }
}

/// A step asks for retries until it has asked for none for this time.
const RETRIES_FOR: Duration = Duration::from_secs(60);

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
    pub versions: OfWorker,
    /// Place of the version that runs the batch at hand.
    pub version: usize,
    pub runtime: Handle,
    pub outlets: Vec<Served>,
    /// All below is through the steps.
    pub done: Offset,
    /// Covers every letter that this worker wrote or found, and the records of its steps.
    pub letters: Ticket,
    /// The lane ends: a held step is waited for no longer.
    pub stop: CancellationToken,
    /// The batch at hand runs for the first time.
    pub counts: bool,
}

/// An outlet as one worker sees it.
pub struct Served {
    pub outlet: Outlet,
    /// All below was sent to it.
    sent: Offset,
    /// What is to be sent, of messages below [`Worker::done`].
    done: Made,
    /// What is made of messages above it.
    at_hand: Made,
}

/// What the steps made for one sink.
#[derive(Default)]
struct Made {
    batches: Vec<Batch>,
    /// Letters for the sink that the steps knew of, or wrote.
    seen: Seen,
}

impl Served {
    pub fn new(outlet: Outlet, worker: u16, from: Offset) -> Self {
        outlet.begin(worker, from);
        Self { outlet, sent: from, done: Made::default(), at_hand: Made::default() }
    }
}

impl Worker {
    /// Runs the work of the queue until the reader is gone and the queue is empty.
    pub fn run(mut self) -> Result<(), Ended> {
        while let Some(work) = self.queue.blocking_recv() {
            match work {
                Work::Frame(frame) => self.frame(&frame)?,
                Work::Progress { upto } => {
                    self.done = self.done.max(upto);
                    self.versions.drop_below(self.done);
                    self.hand_out(true)?;
                }
                Work::Flip { begins, steps, ticket } => {
                    self.letters = self.letters.max(ticket);
                    self.versions.push(begins, steps);
                    self.versions.drop_below(self.done);
                }
                Work::Attach { outlet, from } => {
                    // One a sink: an earlier one, which it left, may be here still.
                    self.outlets.retain(|served| !served.outlet.detached());
                    self.outlets.push(Served::new(outlet, self.number, from));
                }
            }
        }
        self.hand_out(true)
    }

    fn frame(&mut self, frame: &Frame) -> Result<(), Ended> {
        if self.outlets.iter().all(|served| served.outlet.detached()) {
            // The lane ends: what it would make goes to nobody.
            self.done = frame.upto;
            return Ok(());
        }
        let letters = self.letters;
        let batch_max = self.shared.config.batch_messages_max.max(1) as usize;
        let mut parts: Vec<(Partition, Vec<Entry>)> = Vec::new();
        for entry in &frame.batch.entries {
            if entry.partition.0 % self.workers != self.number {
                continue;
            }
            let part = match parts.iter().position(|(partition, _)| *partition == entry.partition) {
                Some(part) => part,
                None => {
                    let entries = Vec::with_capacity(frame.batch.len().min(ENTRIES_AT_ONCE));
                    parts.push((entry.partition, entries));
                    parts.len() - 1
                }
            };
            let entries = &mut parts[part].1;
            entries.push(*entry);
            // All partitions come to the same offset, which they can be done with.
            if entries.len() == batch_max {
                self.run_parts(&mut parts, &frame.batch)?;
                self.done_below(Offset(frame.batch.offset(entry).0 + 1));
            }
        }
        self.run_parts(&mut parts, &frame.batch)?;
        self.done_below(frame.upto);
        // Letters give their room back once the sinks are past them.
        self.hand_out(self.letters > letters)
    }

    /// Runs the messages of each partition, and leaves its list empty.
    fn run_parts(&mut self, parts: &mut [(Partition, Vec<Entry>)], frame: &Batch) -> Result<(), Ended> {
        for (partition, entries) in parts {
            let mut entries = std::mem::take(entries);
            while let Some(first) = entries.first() {
                let (version, end) = self.versions.of(*partition, frame.offset(first));
                let of_routes = self.shared.routes.end_of(frame.offset(first));
                let end = [end, of_routes].into_iter().flatten().min();
                self.version = version;
                let is_before = |entry: &Entry| end.is_none_or(|end| frame.offset(entry) < end);
                let later = entries.split_off(entries.partition_point(is_before));
                let batch = Batch {
                    base: frame.base,
                    now_us: frame.now_us,
                    segments: frame.segments.clone(),
                    exclusive: frame.exclusive && entries.len() == frame.len(),
                    entries: std::mem::replace(&mut entries, later).into(),
                };
                // Once, however many lanes and runs a message has.
                self.counts = self.count(&batch, *partition);
                for readers in self.readers(&batch) {
                    self.run_for(readers, batch.clone(), *partition)?;
                    self.counts = false;
                }
            }
        }
        Ok(())
    }

    /// What was made of messages below `upto` can be handed out.
    fn done_below(&mut self, upto: Offset) {
        self.done = upto;
        self.versions.drop_below(upto);
        for served in &mut self.outlets {
            served.done.batches.append(&mut served.at_hand.batches);
            served.done.seen.add_all(std::mem::take(&mut served.at_hand.seen));
        }
    }

    /// Counts messages of a partition that no lane ran before.
    fn count(&self, batch: &Batch, partition: Partition) -> bool {
        let (Some(counted), Some(last)) =
            (self.shared.counted.get(usize::from(partition.0)), batch.entries.last())
        else {
            return true;
        };
        let before = counted.fetch_max(batch.offset(last).0 + 1, Ordering::AcqRel);
        let new = batch.entries.iter().filter(|entry| batch.offset(entry).0 >= before).count();
        self.shared.metrics.read.increment(new as u64);
        new > 0
    }

    /// The sinks for which the steps run, those together that the letters of
    /// these messages name alike: most often all, since there are no letters.
    fn readers(&mut self, batch: &Batch) -> Vec<Vec<Reader>> {
        let sinks =
            self.outlets.iter().map(|served| &served.outlet).filter(|o| !o.detached()).map(|o| o.sink);
        let (Some(first), Some(last)) = (batch.entries.first(), batch.entries.last()) else {
            return Vec::new();
        };
        let letters = &self.shared.letters;
        let Some(readers) = letters.seen(sinks.clone(), batch.offset(first), batch.offset(last)) else {
            return vec![sinks.map(|sink| Reader { sink, seen: Seen::default() }).collect()];
        };
        // Whoever wrote them may not have seen them durable yet.
        self.letters = self.letters.max(letters.ticket());
        let mut groups: Vec<Vec<Reader>> = Vec::new();
        for reader in readers {
            match groups.iter_mut().find(|group| group[0].seen == reader.seen) {
                Some(group) => group.push(reader),
                None => groups.push(vec![reader]),
            }
        }
        groups
    }

    /// Runs the chain, and sorts by sink what comes out.
    fn run_for(&mut self, mut readers: Vec<Reader>, batch: Batch, partition: Partition) -> Result<(), Ended> {
        let (mut batch, inputs) = self.chain(batch, partition, &mut readers)?;
        if batch.entries.iter().any(|entry| entry.partition != partition) {
            for entry in batch.entries.to_mut() {
                entry.partition = partition;
            }
        }
        if self.counts {
            self.shared.metrics.passed.increment(batch.len() as u64);
        }
        self.route(batch, inputs, partition, &mut readers)?;
        for reader in readers {
            if let Some(served) = self.outlets.iter_mut().find(|served| served.outlet.sink == reader.sink) {
                served.at_hand.seen.add_all(reader.seen);
            }
        }
        Ok(())
    }

    /// Returns also what went into the steps that may have given a message its route.
    fn chain(
        &mut self,
        batch: Batch,
        partition: Partition,
        readers: &mut [Reader],
    ) -> Result<(Batch, Inputs), Ended> {
        let shared = Arc::clone(&self.shared);
        let mut batch = match readers.first() {
            Some(reader) => without_whole(batch, &reader.seen),
            None => batch,
        };
        let Some(first) = batch.entries.first().map(|entry| batch.offset(entry)) else {
            return Ok((batch, Inputs::default()));
        };
        let routes = shared.routes.of(first);
        routes.without_unknown(&mut batch);
        let mut inputs = Inputs::default();
        for place in 0..self.versions.0[self.version].1.steps.len() {
            let steps = &mut self.versions.0[self.version].1;
            let context = Context { generation: steps.generation, stop: &self.stop, counts: self.counts };
            let mut waiting = None;
            while let Some(why) = &steps.hold {
                context.wait(&mut waiting, why, &shared, &self.runtime)?;
            }
            let Timed { step, duration, patience } = &mut steps.steps[place];
            let name = Arc::clone(&step.id().step);
            let indexes;
            (batch, indexes) = without_letters(batch, Source::Step(&name), readers);
            if batch.is_empty() {
                break;
            }
            let begun = Instant::now();
            let outcome =
                run_step(step.as_mut(), &batch, partition, &shared, &self.runtime, &context, patience)?;
            duration.record(begun.elapsed());
            if !outcome.refused.is_empty() {
                // A step reports its faults itself.
                let rejected = outcome.refused.iter().filter(|refused| refused.kind != RefusedKind::Fault);
                let rejected = rejected.map(|refused| (refused.kind.as_str(), &*refused.reason));
                let show = shared.failures.hint(Hint::DeadLettersSummary(Letters::OfPipeline(&shared.name)));
                shared.failures.report_rejected(&format!("{}/{name}", shared.name), rejected, &show);
                let history = StepHistory::at(&steps.names, place).to_string();
                let batch = Stripped { batch: &batch, indexes, partition };
                self.refuse(&batch.refusals(Source::Step(&name), &outcome.refused, &history), readers)?;
            }
            let input = std::mem::replace(&mut batch, outcome.passed);
            inputs.keep(place, input, routes.are_known(&batch));
        }
        Ok((batch, inputs))
    }

    /// Sorts a batch by sink; what names no route goes to dead letters.
    fn route(
        &mut self,
        batch: Batch,
        inputs: Inputs,
        partition: Partition,
        readers: &mut [Reader],
    ) -> Result<(), Ended> {
        let shared = Arc::clone(&self.shared);
        let (batch, indexes) = without_letters(batch, Source::Routes, readers);
        if batch.is_empty() {
            return Ok(());
        }
        let routes = shared.routes.of(batch.offset(&batch.entries[0]));
        let sorted = routes.sort(batch);
        if !sorted.unknown.is_empty() {
            let names = &self.versions.0[self.version].1.names;
            let history = |place| StepHistory::at(names, place);
            let unrouted = Unrouted::new(&sorted, &inputs, readers, routes, names, history);
            let rejected = unrouted.refused.iter().map(|refused| ("unknown route", &*refused.reason));
            let show = shared.failures.hint(Hint::DeadLettersSummary(Letters::OfPipeline(&shared.name)));
            shared.failures.report_rejected(&shared.name, rejected, &show);
            let batch = Stripped { batch: &sorted.batch, indexes, partition };
            self.refuse(&unrouted.refusals(&batch), readers)?;
        }
        for reader in readers {
            if let Some(served) = self.outlets.iter_mut().find(|served| served.outlet.sink == reader.sink)
                && let Some(batch) = sorted.for_sink(reader.sink)
            {
                served.at_hand.batches.push(batch);
            }
        }
        Ok(())
    }

    /// Appends messages that a step rejected, or that found no route, to dead letters.
    fn refuse(&mut self, refusals: &[Refusal<'_>], readers: &mut [Reader]) -> Result<(), Ended> {
        let shared = Arc::clone(&self.shared);
        if self.counts {
            shared.metrics.refused.increment(refusals.len() as u64);
        }
        let now = Some(tokio::time::Instant::now());
        let at_once = self.runtime.block_on(shared.letters.refuse_until(now, refusals, readers))?;
        self.letters = self.letters.max(at_once.ticket);
        let rest = &refusals[at_once.done..];
        if rest.is_empty() {
            return Ok(());
        }
        // Only sinks that have all that lies before can give room back.
        self.send(true, true)?;
        let refused = self.runtime.block_on(async {
            tokio::select! {
                refused = shared.letters.refuse(rest, readers) => Ok(refused?),
                () = shared.abort.cancelled() => Err(Ended::Aborted),
            }
        })?;
        self.letters = self.letters.max(refused.ticket);
        Ok(())
    }

    /// Sends each sink what is there for it; with `progress` also where nothing is.
    fn hand_out(&mut self, progress: bool) -> Result<(), Ended> {
        self.send(progress, false)
    }

    fn send(&mut self, progress: bool, urgent: bool) -> Result<(), Ended> {
        let Self { number: worker, workers, done: upto, letters, .. } = *self;
        let bundles = self.outlets.iter_mut().filter_map(|served| {
            let Made { batches, seen } = std::mem::take(&mut served.done);
            if batches.is_empty() && !(progress && served.sent < upto) {
                return None;
            }
            let from = std::mem::replace(&mut served.sent, upto);
            let bundle = Bundle { worker, workers, from, upto, batches, seen, letters, urgent, room: None };
            Some((&served.outlet, bundle))
        });
        match send_all(bundles, &self.shared.abort, &self.runtime) {
            Ok(()) => {}
            Err(OutletClosed::Detached) => self.outlets.retain(|served| !served.outlet.detached()),
            Err(OutletClosed::Aborted) => return Err(Ended::Aborted),
        }
        Ok(())
    }
}
