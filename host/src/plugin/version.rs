//! One version of a step: a program with a config, and the steps made of it.
//!
//! [`PluginStep::run`] is the hot path. A batch goes in whole and in place
//! where it can; it is gathered into one segment where the plugin may not see
//! all of it or where most of its bytes are nobody's any more.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use metrics::{Counter, Histogram, counter, histogram};
use xxhash_rust::xxh3::xxh3_64;

use super::arena::{self, COUNT_MAX, call};
use super::bindings::base::exports::headworks::plugin::lifecycle::Context;
use super::collected::{Collected, Target};
use super::gather::gather;
use super::instance::{CallLimits, Instance, StartError};
use super::program::Program;
use super::{Limits, OnFailure};
use crate::batch::{Batch, Partition, SEGMENTS_MAX};
use crate::devices::Devices;
use crate::problems::{KeyPath, Problem};
use crate::step::{Outcome, Refused, RefusedKind, Step, StepFactory, StepId};
use crate::telemetry::Failures;
use crate::topic::{Namespace, TopicFilter};

/// Faults within [`FAULT_WINDOW`] after which `on_failure` decides.
const FAULTS_MAX: usize = 3;
const FAULT_WINDOW: Duration = Duration::from_secs(60);
/// A message that runs alone after a trap has this part of a batch's limits.
const ALONE_PART: u32 = 8;
/// Ticks are 5 ms apart.
const ALONE_CPU_MIN: Duration = Duration::from_millis(10);
/// A batch goes in at once while it fills at most this part of the plugin's memory.
const MEMORY_PART: u64 = 4;

/// A program with its config: makes steps.
pub(super) struct Version(Arc<Shared>);

pub(super) struct Shared {
    pub id: StepId,
    pub file: String,
    pub program: Arc<Program>,
    pub context: Context,
    pub limits: Limits,
    pub on_failure: OnFailure,
    pub devices: Arc<Devices>,
    pub namespace: Arc<Namespace>,
    pub failures: Failures,
    /// Called when the step asks for the pipeline to be held.
    pub on_hold: Box<dyn Fn() + Send + Sync>,
    pub faults: Faults,
}

/// Faults of all instances of a step.
#[derive(Default)]
pub(super) struct Faults {
    recent: Mutex<Vec<Instant>>,
    held: AtomicBool,
}

/// One worker's instance of a plugin.
pub(super) struct PluginStep {
    shared: Arc<Shared>,
    instance: Option<Instance>,
    /// All must match; each list any. Empty: every message.
    filters: Vec<Vec<TopicFilter>>,
    meters: Meters,
}

/// What a call is for.
#[derive(Clone, Copy)]
struct Work<'a> {
    /// The batch that the step was given.
    batch: &'a Batch,
    /// Those of its messages that are gathered for the call; `None`: all, in place.
    numbers: Option<&'a [u32]>,
    partition: Partition,
    attempt: u32,
    /// Of [`call`].
    flags: u32,
}

struct Meters {
    passed: Counter,
    dropped: Counter,
    refused: Counter,
    faults: Counter,
    seconds: Histogram,
}

impl Version {
    pub fn new(shared: Shared) -> Self {
        Self(Arc::new(shared))
    }

    pub fn held(&self) -> Option<String> {
        self.0.faults.held.load(Ordering::Acquire).then(|| self.0.held_reason())
    }

    /// Starts an instance with the config and runs it on no message.
    pub fn trial(&self) -> Result<(), Vec<Problem>> {
        let mut step = PluginStep::new(&self.0)?;
        step.on_nothing().map_err(|reason| vec![Problem { path: KeyPath::root(), message: reason }])
    }

    pub fn step(&self) -> Result<PluginStep, Vec<Problem>> {
        PluginStep::new(&self.0)
    }
}

impl StepFactory for Version {
    fn id(&self) -> &StepId {
        &self.0.id
    }

    fn describe(&self) -> String {
        let Shared { program, file, .. } = &*self.0;
        let hash = program.sha256.get(..8).unwrap_or_default();
        format!("{} {} ({file}, {hash}…)", program.description.name, program.description.version)
    }

    fn instantiate(&self, _worker: u32) -> Result<Box<dyn Step>, Vec<Problem>> {
        Ok(Box::new(self.step()?))
    }
}

impl Shared {
    fn held_reason(&self) -> String {
        let Self { id, file, .. } = self;
        format!(
            "step {}/{} faulted {FAULTS_MAX} times within a minute and has on_failure: hold; change {file} or its config",
            id.pipeline, id.step
        )
    }

    /// Counts a fault; what to do with its message.
    fn fault(&self) -> OnFailure {
        let mut recent = self.faults.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        recent.retain(|at| now.duration_since(*at) < FAULT_WINDOW);
        if recent.len() < FAULTS_MAX {
            recent.push(now);
        }
        if recent.len() < FAULTS_MAX {
            return OnFailure::DeadLetters;
        }
        if self.on_failure == OnFailure::Hold && !self.faults.held.swap(true, Ordering::AcqRel) {
            (self.on_hold)();
        }
        self.on_failure
    }
}

/// A context for all partitions: one instance serves a worker, and the batch
/// header says which partition it is.
pub(super) fn context(
    id: &StepId,
    config: &serde_json::Value,
    namespace: &Namespace,
    generation: u64,
) -> Context {
    let step = format!("{}/{}", id.pipeline, id.step);
    Context {
        config: if config.is_null() { "{}".into() } else { config.to_string() },
        seed: xxh3_64(step.as_bytes()),
        step,
        partition: 0,
        partitions: 0,
        namespace: namespace.fields().to_vec(),
        generation,
        dry_run: false,
        extras: Vec::new(),
    }
}

impl PluginStep {
    fn new(shared: &Arc<Shared>) -> Result<Self, Vec<Problem>> {
        let labels = [("pipeline", shared.id.pipeline.to_string()), ("step", shared.id.step.to_string())];
        let messages = |outcome: &'static str| {
            counter!("headworks_step_messages_total", "pipeline" => labels[0].1.clone(),
                "step" => labels[1].1.clone(), "outcome" => outcome)
        };
        let meters = Meters {
            passed: messages("passed"),
            dropped: messages("dropped"),
            refused: messages("refused"),
            faults: counter!("headworks_step_faults_total", &labels),
            seconds: histogram!("headworks_step_run_duration_seconds", &labels),
        };
        let mut step = Self { shared: Arc::clone(shared), instance: None, filters: Vec::new(), meters };
        match step.ensure_instance() {
            Ok(()) => Ok(step),
            Err(StartError::Config(problems)) => Err(problems),
            Err(StartError::Fault(reason)) => Err(vec![Problem { path: KeyPath::root(), message: reason }]),
        }
    }

    fn ensure_instance(&mut self) -> Result<(), StartError> {
        if self.instance.as_ref().is_some_and(|instance| !instance.is_outgrown()) {
            return Ok(());
        }
        let Shared { program, id, devices, limits, context, .. } = &*self.shared;
        let (instance, narrowed) = Instance::start(program, id, devices, limits.memory.0 as usize, context)?;
        let declared = (!program.filters.is_empty()).then(|| program.filters.clone());
        self.filters = declared.into_iter().chain(narrowed.filter(|topics| !topics.is_empty())).collect();
        self.instance = Some(instance);
        Ok(())
    }

    fn on_nothing(&mut self) -> Result<(), String> {
        let batch = Batch::default();
        let work =
            Work { batch: &batch, numbers: None, partition: Partition::default(), attempt: 0, flags: 0 };
        self.call(&work, &batch, 0, self.batch_limits(0), &mut Collected::default())
    }

    fn batch_limits(&self, bytes_in: u64) -> CallLimits {
        let limits = &self.shared.limits;
        CallLimits {
            cpu: Duration::from_millis(limits.cpu_ms),
            bytes: limits.output_bytes_min.0.max(bytes_in * u64::from(limits.output_bytes_factor)),
        }
    }

    fn alone_limits(&self, of_batch: CallLimits, bytes_in: u64) -> CallLimits {
        CallLimits {
            cpu: (of_batch.cpu / ALONE_PART).max(ALONE_CPU_MIN),
            // A large message is not guilty of its size.
            bytes: (of_batch.bytes / u64::from(ALONE_PART))
                .max(bytes_in * u64::from(self.shared.limits.output_bytes_factor)),
        }
    }

    fn sees(&self, topic: &str) -> bool {
        self.filters.iter().all(|any| any.iter().any(|filter| filter.matches(topic)))
    }

    /// One call over all of `view`, whose `used` segments are given whole; its
    /// answer goes into `collected`. After an error there is no instance.
    fn call(
        &mut self,
        work: &Work<'_>,
        view: &Batch,
        used: u16,
        limits: CallLimits,
        collected: &mut Collected,
    ) -> Result<(), String> {
        let mut segments: [&[u8]; SEGMENTS_MAX] = [&[]; SEGMENTS_MAX];
        for (number, segment) in view.segments.iter().enumerate() {
            if used & 1 << number != 0 {
                segments[number] = segment;
            }
        }
        let segments = &segments[..view.segments.len()];
        let target = Target {
            batch: work.batch,
            numbers: work.numbers,
            namespace: &self.shared.namespace,
            retries_used_up: work.attempt >= self.shared.limits.retries_max,
        };
        // Taken out, and put back only after a good answer: a fault discards it.
        let Some(mut instance) = self.instance.take() else { return Err("has no instance".into()) };
        let header = arena::header(view, work.partition, work.flags, work.attempt);
        let raw = instance.call(view, header, segments, limits)?;
        collected
            .take(view, raw, &self.shared.limits, limits.bytes, &target)
            .map_err(|fault| format!("bad answer: {fault}"))?;
        instance.commit();
        self.instance = Some(instance);
        Ok(())
    }

    fn run_batch(&mut self, mut batch: Batch, partition: Partition, attempt: u32) -> Outcome {
        if batch.segments.len() >= SEGMENTS_MAX {
            batch = gather(&batch, None);
        }
        let mut collected = Collected::default();
        if self.filters.is_empty() {
            let work = Work { batch: &batch, numbers: None, partition, attempt, flags: 0 };
            let (bytes, used) = arena::extent(&batch);
            let held = segment_bytes(&batch, used);
            if bytes * 2 < held {
                // Most of it is nobody's any more.
                return self.run_batch(gather(&batch, None), partition, attempt);
            }
            if batch.len() <= COUNT_MAX && held <= self.part_bytes_max() {
                let limits = self.batch_limits(bytes);
                if let Err(reason) = self.call(&work, &batch, used, limits, &mut collected) {
                    let numbers: Vec<u32> = (0..batch.len() as u32).collect();
                    let work = Work { numbers: Some(&numbers), ..work };
                    self.run_alone(&work, limits, &reason, &mut collected);
                }
                return collected.into_outcome(batch);
            }
        }
        self.run_parts(&batch, partition, attempt, &mut collected);
        collected.into_outcome(batch)
    }

    fn part_bytes_max(&self) -> u64 {
        self.shared.limits.memory.0 / MEMORY_PART
    }

    /// Messages that the plugin may see, gathered, as many at a time as fit.
    fn run_parts(&mut self, batch: &Batch, partition: Partition, attempt: u32, collected: &mut Collected) {
        let seen: Vec<u32> = (0..batch.len() as u32)
            .filter(|number| self.sees(batch.text(batch.entries[*number as usize].topic)))
            .collect();
        let mut rest = &seen[..];
        while !rest.is_empty() && !collected.asks_again() {
            let (numbers, later) = rest.split_at(self.part_length(batch, rest));
            rest = later;
            let work = Work { batch, numbers: Some(numbers), partition, attempt, flags: 0 };
            let view = gather(batch, work.numbers);
            let (bytes, used) = arena::extent(&view);
            let limits = self.batch_limits(bytes);
            if let Err(error) = self.ensure_instance() {
                return collected.ask_again(start_reason(error), false);
            }
            if let Err(reason) = self.call(&work, &view, used, limits, collected) {
                self.run_alone(&work, limits, &reason, collected);
            }
        }
    }

    /// How many of the messages `numbers`, at least one, fit into one call.
    fn part_length(&self, batch: &Batch, numbers: &[u32]) -> usize {
        let mut bytes = 0;
        let fits = numbers.iter().take(COUNT_MAX).take_while(|number| {
            bytes +=
                arena::spans(&batch.entries[**number as usize]).iter().map(|s| s.len() as u64).sum::<u64>();
            bytes <= self.part_bytes_max()
        });
        fits.count().max(1)
    }

    /// After a fault: each message by itself, so that only the guilty are refused.
    fn run_alone(&mut self, work: &Work<'_>, of_batch: CallLimits, reason: &str, collected: &mut Collected) {
        let numbers = work.numbers.unwrap_or_default();
        self.meters.faults.increment(1);
        let id = &self.shared.id;
        tracing::debug!(pipeline = %id.pipeline, step = %id.step, messages = numbers.len(), reason,
            "plugin faulted, running the batch message by message");
        for number in numbers {
            if let Err(error) = self.ensure_instance() {
                return collected.ask_again(start_reason(error), false);
            }
            let alone =
                Work { numbers: Some(std::slice::from_ref(number)), flags: call::ALONE_AFTER_TRAP, ..*work };
            let view = gather(work.batch, alone.numbers);
            let (bytes, used) = arena::extent(&view);
            let limits = self.alone_limits(of_batch, bytes);
            if let Err(reason) = self.call(&alone, &view, used, limits, collected) {
                match self.guilty(&reason) {
                    OnFailure::DeadLetters => {
                        let refused = Refused { index: *number, kind: RefusedKind::Fault, reason };
                        collected.refuse_fault(work.batch, refused);
                    }
                    OnFailure::Pass => collected.keep_until(work.batch, *number as usize + 1),
                    OnFailure::Hold => return collected.ask_again(self.shared.held_reason(), true),
                }
            }
            if collected.asks_again() {
                return;
            }
        }
    }

    fn guilty(&self, reason: &str) -> OnFailure {
        let Shared { id, failures, file, .. } = &*self.shared;
        let kind = format!("{}/{}: fault in {file}", id.pipeline, id.step);
        failures.report(&kind, 1, reason, "headworks dead-letters list");
        self.shared.fault()
    }
}

impl Step for PluginStep {
    fn id(&self) -> &StepId {
        &self.shared.id
    }

    fn run(&mut self, batch: Batch, partition: Partition, attempt: u32) -> Outcome {
        if batch.is_empty() {
            return Outcome { passed: batch, ..Outcome::default() };
        }
        if self.shared.faults.held.load(Ordering::Acquire) {
            return Outcome { retry: Some(self.shared.held_reason()), held: true, ..Outcome::default() };
        }
        let begin = Instant::now();
        if let Err(error) = self.ensure_instance() {
            return Outcome { retry: Some(start_reason(error)), ..Outcome::default() };
        }
        let outcome = self.run_batch(batch, partition, attempt);
        self.meters.passed.increment(outcome.passed.len() as u64);
        self.meters.dropped.increment(outcome.dropped);
        self.meters.refused.increment(outcome.refused.len() as u64);
        self.meters.seconds.record(begin.elapsed().as_secs_f64());
        outcome
    }
}

fn segment_bytes(batch: &Batch, used: u16) -> u64 {
    let of_used = |(number, segment): (usize, &bytes::Bytes)| {
        if used & 1 << number != 0 { segment.len() as u64 } else { 0 }
    };
    batch.segments.iter().enumerate().map(of_used).sum()
}

fn start_reason(error: StartError) -> String {
    match error {
        StartError::Fault(reason) => reason,
        StartError::Config(problems) => {
            let lines: Vec<_> =
                problems.iter().map(|p| format!("config.{}: {}", p.path.as_str(), p.message)).collect();
            format!("did not start: {}", lines.join("; "))
        }
    }
}
