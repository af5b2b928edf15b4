//! One version of a step: a program with a config, and the steps made of it.
//!
//! [`PluginStep::run`] is the hot path. A batch goes in whole and in place
//! where it can; it is gathered into one segment where the plugin may not see
//! all of it or where most of its bytes are nobody's any more.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use metrics::{Counter, counter};
use xxhash_rust::xxh3::xxh3_64;

use super::arena::{self, COUNT_MAX, call};
use super::bindings::base::exports::headworks::plugin::lifecycle::Context;
use super::collected::{BYTES_MAX, Collected, Target};
use super::gather::gather;
use super::host::Telemetry;
use super::instance::{CallLimits, Instance, StartError};
use super::kept_files::KeptFile;
use super::program::{ProcessIndices, Program};
use super::starts::{Started, Starts};
use super::{Limits, OnFailure};
use crate::batch::{Batch, Partition, SEGMENTS_MAX};
use crate::devices::Devices;
use crate::hints::{Hint, Letters};
use crate::problems::Problem;
use crate::step::{Attempt, Outcome, Refused, RefusedKind, Step, StepFactory, StepId};
use crate::telemetry::{Failures, alike};
use crate::topic::{Namespace, TopicFilter};

/// Faults within [`FAULT_WINDOW`] after which `on_failure` decides.
const FAULTS_MAX: usize = 3;
const FAULT_WINDOW: Duration = Duration::from_secs(60);
/// A message that runs alone after a trap has this part of a batch's limits.
const ALONE_PART: u32 = 8;
/// Ticks are 5 ms apart.
const ALONE_CPU_MIN: Duration = Duration::from_millis(10);
/// A plugin that gets fewer messages at a time, because it faulted on more, gets
/// twice as many after so many calls that went well.
const GOOD_CALLS: u32 = 64;
/// A batch goes in at once while it fills at most this part of the plugin's memory.
const MEMORY_PART: u64 = 4;

/// A program with its config: makes steps.
pub(super) struct Version(Arc<Shared>);

pub(super) struct Shared {
    pub id: StepId,
    pub file: String,
    /// See [`StepFactory::recipe`].
    pub recipe: String,
    pub program: Arc<Program>,
    /// What the recipe names.
    pub file_kept: Arc<KeptFile>,
    pub context: Context,
    pub limits: Limits,
    pub on_failure: OnFailure,
    pub devices: Arc<Devices>,
    pub namespace: Arc<Namespace>,
    pub failures: Failures,
    /// Called when the step asks for the pipeline to be held.
    pub on_hold: Box<dyn Fn() + Send + Sync>,
    pub faults: Faults,
    pub telemetry: Arc<Telemetry>,
}

/// Faults of all instances of a step.
#[derive(Default)]
pub(super) struct Faults {
    recent: Mutex<Vec<Instant>>,
    /// Why the step holds, where it does.
    held: OnceLock<String>,
    /// It holds no more: see [`StepFactory::let_go`].
    is_let_go: AtomicBool,
}

/// One worker's instance of a plugin.
pub(super) struct PluginStep {
    shared: Arc<Shared>,
    instance: Option<Instance>,
    starts: Starts,
    /// All must match; each list any. Empty: every message.
    filters: Vec<Vec<TopicFilter>>,
    /// The filters let every message through.
    sees_all: bool,
    /// Messages of one call: halved where the plugin faults on several together.
    pub(super) call_messages_max: usize,
    /// Calls that went well since that last changed.
    good_calls: u32,
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
    attempt: Attempt,
    /// Flags of [`call`].
    flags: u32,
}

struct Meters {
    passed: Counter,
    /// Counts those among the passed messages that the plugin failed on.
    skipped: Counter,
    dropped: Counter,
    refused: Counter,
    faults: Counter,
}

impl Version {
    pub fn new(shared: Shared) -> Self {
        Self(Arc::new(shared))
    }

    pub fn held(&self) -> Option<String> {
        self.0.held().cloned()
    }

    /// Starts an instance with the config and runs it on no message.
    pub fn trial(&self) -> Result<(), StartError> {
        let mut step = PluginStep::new(&self.0)?;
        step.on_nothing().map_err(StartError::Fault)
    }

    pub fn step(&self) -> Result<PluginStep, Vec<Problem>> {
        PluginStep::new(&self.0).map_err(StartError::problems)
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

    fn recipe(&self) -> String {
        self.0.recipe.clone()
    }

    fn is_stored(&self) -> bool {
        self.0.file_kept.is_stored()
    }

    fn let_go(&self) {
        self.0.faults.is_let_go.store(true, Ordering::Release);
    }
}

impl Shared {
    pub(super) fn start(&self) -> Result<Started, StartError> {
        let Self { program, id, devices, limits, context, telemetry, .. } = self;
        Instance::start(program, id, devices, telemetry, limits.memory.0 as usize, context)
    }

    /// Counts a fault; what to do with its message.
    fn fault(&self, reason: &str) -> OnFailure {
        let mut recent = self.faults.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        recent.retain(|at| now.duration_since(*at) < FAULT_WINDOW);
        if recent.len() < FAULTS_MAX {
            recent.push(now);
        }
        if recent.len() < FAULTS_MAX {
            return OnFailure::DeadLetters;
        }
        let Self { id, file, .. } = self;
        let why = || {
            format!(
                "step {}/{} faulted {FAULTS_MAX} times within a minute and has on_failure: hold, the last time: {reason}; \
                 change {file} or its config",
                id.pipeline, id.step
            )
        };
        let on_failure = self.on_failure();
        if on_failure == OnFailure::Hold && self.faults.held.set(why()).is_ok() {
            (self.on_hold)();
        }
        on_failure
    }

    fn on_failure(&self) -> OnFailure {
        match self.on_failure {
            OnFailure::Hold if self.faults.is_let_go.load(Ordering::Acquire) => OnFailure::DeadLetters,
            on_failure => on_failure,
        }
    }

    /// Why the step holds, where it does.
    fn held(&self) -> Option<&String> {
        self.faults.held.get().filter(|_| self.on_failure() == OnFailure::Hold)
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
    fn new(shared: &Arc<Shared>) -> Result<Self, StartError> {
        let labels = [("pipeline", shared.id.pipeline.to_string()), ("step", shared.id.step.to_string())];
        let messages = |outcome: &'static str| {
            counter!("headworks_step_messages_total", "pipeline" => labels[0].1.clone(),
                "step" => labels[1].1.clone(), "outcome" => outcome)
        };
        let meters = Meters {
            passed: messages("passed"),
            skipped: messages("skipped"),
            dropped: messages("dropped"),
            refused: messages("refused"),
            faults: counter!("headworks_step_faults_total", &labels),
        };
        // There at 0: an alert on an increase misses a series that begins at 1.
        counter!("headworks_plugin_log_lines_dropped_total", &labels).increment(0);
        let started = shared.start()?;
        let mut step = Self {
            shared: Arc::clone(shared),
            instance: None,
            starts: Starts::new(),
            filters: Vec::new(),
            sees_all: true,
            call_messages_max: COUNT_MAX,
            good_calls: 0,
            meters,
        };
        step.adopt(started);
        Ok(step)
    }

    fn adopt(&mut self, (instance, narrowed): Started) {
        let declared = &self.shared.program.filters;
        let declared = (!declared.is_empty()).then(|| declared.clone());
        self.filters = declared.into_iter().chain(narrowed.filter(|topics| !topics.is_empty())).collect();
        self.sees_all = self.filters.iter().all(|any| any.iter().any(|filter| filter.as_str() == "#"));
        self.instance = Some(instance);
    }

    /// Makes sure that there is an instance, or says why there is none. Where other
    /// messages would wait for it, it is started off this thread. One that has
    /// outgrown its memory serves until there is another.
    fn ensure_instance(&mut self) -> Result<(), String> {
        if self.instance.as_ref().is_some_and(|instance| !instance.is_outgrown()) {
            return Ok(());
        }
        let started = if self.sees_all {
            self.shared.start().map_err(StartError::text)
        } else {
            self.starts.next(&self.shared)
        };
        match started {
            Ok(started) => self.adopt(started),
            Err(_) if self.instance.is_some() => {}
            Err(why) => return Err(why),
        }
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn use_up_patience(&mut self) {
        self.starts.use_up_patience();
    }

    fn on_nothing(&mut self) -> Result<(), String> {
        let batch = Batch::default();
        let work = Work {
            batch: &batch,
            numbers: None,
            partition: Partition::default(),
            attempt: Attempt::ONLY,
            flags: 0,
        };
        self.call(&work, &batch, 0, self.batch_limits(&batch, 0), &mut Collected::new(BYTES_MAX))
    }

    /// `bytes`: of the spans of `batch`.
    fn batch_limits(&self, batch: &Batch, bytes: u64) -> CallLimits {
        let limits = &self.shared.limits;
        CallLimits {
            cpu: Duration::from_millis(limits.cpu_ms),
            bytes: self.output_bytes_max(batch, bytes).max(limits.output_bytes_min.0),
        }
    }

    fn alone_limits(&self, of_batch: CallLimits, alone: &Batch, bytes: u64) -> CallLimits {
        CallLimits {
            cpu: (of_batch.cpu / ALONE_PART).max(ALONE_CPU_MIN),
            // A large message is not guilty of its size.
            bytes: (of_batch.bytes / u64::from(ALONE_PART)).max(self.output_bytes_max(alone, bytes)),
        }
    }

    /// The index counts as input: each of many small messages made of one keeps its
    /// topic and device id.
    fn output_bytes_max(&self, batch: &Batch, bytes: u64) -> u64 {
        let index = size_of_val(&*batch.entries) as u64;
        (bytes + index).saturating_mul(self.shared.limits.output_bytes_factor.into())
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
            attempt: work.attempt,
        };
        // Taken out, and put back only after a good answer: a fault discards it.
        let Some(mut instance) = self.instance.take() else { return Err("has no instance".into()) };
        let header = arena::header(view, work.partition, work.flags, work.attempt.number);
        let raw = instance.call(view, header, segments, limits)?;
        collected
            .take(view, raw, &self.shared.limits, limits.bytes, &target)
            .map_err(|fault| format!("bad answer: {fault}"))?;
        instance.commit();
        self.instance = Some(instance);
        if self.call_messages_max < COUNT_MAX && work.flags & call::ALONE_AFTER_TRAP == 0 {
            self.grow_back();
        }
        Ok(())
    }

    fn run_batch(&mut self, mut batch: Batch, partition: Partition, attempt: Attempt) -> Outcome {
        let (bytes, mut used) = arena::extent(&batch);
        let limits = self.batch_limits(&batch, bytes);
        let mut collected = Collected::new(limits.bytes.min(BYTES_MAX.saturating_sub(bytes)));
        if batch.segments.len() >= SEGMENTS_MAX
            || (self.filters.is_empty() && !self.may_have_whole(&batch, bytes, used))
        {
            batch = gather(&batch, None);
            used = u16::from(!batch.segments.is_empty());
        }
        let whole = Work { batch: &batch, numbers: None, partition, attempt, flags: 0 };
        if !self.filters.is_empty()
            || batch.len() > self.call_messages_max
            || segment_bytes(&batch, used) > self.part_bytes_max()
        {
            self.run_parts(&whole, &mut collected);
            return collected.into_outcome(batch);
        }
        let all = || (0..batch.len() as u32).collect::<Vec<_>>();
        if let Err(reason) = self.ensure_instance() {
            self.without_instance(&whole, &all(), &reason, &mut collected);
            return collected.into_outcome(batch);
        }
        if let Err(reason) = self.call(&whole, &batch, used, limits, &mut collected) {
            let numbers = all();
            self.run_alone(&Work { numbers: Some(&numbers), ..whole }, limits, &reason, &mut collected);
        }
        collected.into_outcome(batch)
    }

    /// Whether the plugin may be given the segments of `batch` as they are: they
    /// hold nothing that it must not see, and not mostly what nobody uses. A plugin
    /// that gets its messages one by one sees no segment.
    fn may_have_whole(&self, batch: &Batch, bytes: u64, used: u16) -> bool {
        let one_by_one = matches!(self.shared.program.exports.process, ProcessIndices::Message(_));
        one_by_one || (batch.exclusive && bytes * 2 >= segment_bytes(batch, used))
    }

    fn part_bytes_max(&self) -> u64 {
        self.shared.limits.memory.0 / MEMORY_PART
    }

    /// Messages that the plugin may see, gathered, as many at a time as fit.
    fn run_parts(&mut self, whole: &Work<'_>, collected: &mut Collected) {
        let batch = whole.batch;
        let seen: Vec<u32> = (0..batch.len() as u32)
            .filter(|number| self.sees(batch.text(batch.entries[*number as usize].topic)))
            .collect();
        let mut rest = &seen[..];
        while !rest.is_empty() && !collected.asks_again() {
            if let Err(reason) = self.ensure_instance() {
                return self.without_instance(whole, rest, &reason, collected);
            }
            let (numbers, later) = rest.split_at(self.part_length(batch, rest));
            rest = later;
            let work = Work { numbers: Some(numbers), ..*whole };
            let view = gather(batch, work.numbers);
            let (bytes, used) = arena::extent(&view);
            let limits = self.batch_limits(&view, bytes);
            if let Err(reason) = self.call(&work, &view, used, limits, collected) {
                self.run_alone(&work, limits, &reason, collected);
            }
        }
    }

    /// How many of the messages `numbers`, at least one, fit into one call.
    fn part_length(&self, batch: &Batch, numbers: &[u32]) -> usize {
        let mut bytes = 0;
        let fits = numbers.iter().take(self.call_messages_max).take_while(|number| {
            bytes += arena::bytes_in(std::iter::once(&batch.entries[**number as usize]));
            bytes <= self.part_bytes_max()
        });
        fits.count().max(1)
    }

    /// After a fault: each message by itself, so that only the guilty are refused.
    fn run_alone(&mut self, work: &Work<'_>, of_batch: CallLimits, first: &str, collected: &mut Collected) {
        let numbers = work.numbers.unwrap_or_default();
        self.meters.faults.increment(1); // the call with all of them
        let id = &self.shared.id;
        tracing::debug!(pipeline = %id.pipeline, step = %id.step, messages = numbers.len(), first,
            "plugin faulted, running the batch message by message");
        let mut guilty = 0;
        for (done, number) in numbers.iter().enumerate() {
            if let Err(why) = self.ensure_instance() {
                let why = format!("{first}; {why}");
                return self.without_instance(work, &numbers[done..], &why, collected);
            }
            let alone =
                Work { numbers: Some(std::slice::from_ref(number)), flags: call::ALONE_AFTER_TRAP, ..*work };
            let view = gather(work.batch, alone.numbers);
            let (bytes, used) = arena::extent(&view);
            let limits = self.alone_limits(of_batch, &view, bytes);
            if let Err(reason) = self.call(&alone, &view, used, limits, collected) {
                guilty += 1;
                self.meters.faults.increment(1);
                let reason = match (reason == first, guilty) {
                    (true, _) => reason,
                    (false, 1) => format!("{first}; alone, with an eighth of the limits: {reason}"),
                    (false, _) => format!("alone, with an eighth of the limits: {reason}"),
                };
                match self.guilty(&reason) {
                    OnFailure::DeadLetters => {
                        let refused = Refused { index: *number, kind: RefusedKind::Fault, reason };
                        collected.refuse_fault(work.batch, refused);
                    }
                    OnFailure::Pass => {
                        self.meters.skipped.increment(1);
                        collected.keep_until(work.batch, *number as usize + 1);
                    }
                    OnFailure::Hold => {
                        let why = self.shared.faults.held.get().cloned().unwrap_or(reason);
                        return collected.ask_again(why, true);
                    }
                }
            }
            if collected.asks_again() {
                return;
            }
        }
        if guilty == 0 && numbers.len() > 1 {
            self.halve(numbers.len(), first);
        }
    }

    fn guilty(&self, reason: &str) -> OnFailure {
        let Shared { id, failures, file, .. } = &*self.shared;
        let then = self.shared.fault(reason);
        let (fate, shown) = match then {
            OnFailure::DeadLetters => ("", Hint::DeadLettersSummary(Letters::OfPipeline(&id.pipeline))),
            OnFailure::Pass => (", the message goes on without the step (on_failure: pass)", Hint::Status),
            // The line that the pipeline holds has the reason.
            OnFailure::Hold => return then,
        };
        let kind = format!("{}/{}: fault in {file}{fate}", id.pipeline, id.step);
        failures.report_by(&kind, &alike(reason), 1, reason, &failures.hint(shown));
        then
    }

    /// The plugin faulted on messages together and on none of them alone.
    fn halve(&mut self, messages: usize, reason: &str) {
        self.call_messages_max = (messages / 2).max(1);
        self.good_calls = 0;
        let Shared { id, failures, file, .. } = &*self.shared;
        let kind = format!(
            "{}/{}: {file} faults on messages together and on none of them alone, so it gets fewer at a time",
            id.pipeline, id.step
        );
        let show = failures.hint(Hint::PluginList);
        failures.report(&kind, 1, &format!("{messages} messages: {reason}"), &show);
    }

    fn grow_back(&mut self) {
        self.good_calls += 1;
        if self.good_calls == GOOD_CALLS {
            self.call_messages_max = (self.call_messages_max * 2).min(COUNT_MAX);
            self.good_calls = 0;
        }
    }

    /// There is no instance for the messages `numbers`. Where the step sees all
    /// messages they come again; else the others must not wait, and `on_failure`
    /// decides what becomes of these.
    fn without_instance(&self, work: &Work<'_>, numbers: &[u32], why: &str, collected: &mut Collected) {
        if self.sees_all && !work.attempt.is_last {
            return collected.ask_again(why.to_owned(), false);
        }
        let Shared { id, failures, file, .. } = &*self.shared;
        let kind = format!("{}/{}: no instance of {file}", id.pipeline, id.step);
        let show = failures.hint(Hint::DeadLettersSummary(Letters::OfPipeline(&id.pipeline)));
        failures.report(&kind, numbers.len() as u64, why, &show);
        match self.shared.on_failure() {
            OnFailure::DeadLetters => {
                for index in numbers.iter().copied() {
                    let refused = Refused { index, kind: RefusedKind::Fault, reason: why.to_owned() };
                    collected.refuse_fault(work.batch, refused);
                }
            }
            OnFailure::Pass => self.meters.skipped.increment(numbers.len() as u64),
            OnFailure::Hold => collected.ask_again(why.to_owned(), true),
        }
    }
}

impl Step for PluginStep {
    fn id(&self) -> &StepId {
        &self.shared.id
    }

    fn sees_all(&self) -> bool {
        self.sees_all
    }

    fn run(&mut self, batch: Batch, partition: Partition, mut attempt: Attempt) -> Outcome {
        if batch.is_empty() {
            return Outcome { passed: batch, ..Outcome::default() };
        }
        if let Some(why) = self.shared.held() {
            return Outcome { retry: Some(why.clone()), held: true, ..Outcome::default() };
        }
        attempt.is_last |= self.shared.limits.retries_max.is_some_and(|max| attempt.number > max);
        let outcome = self.run_batch(batch, partition, attempt);
        self.meters.passed.increment(outcome.passed.len() as u64);
        self.meters.dropped.increment(outcome.dropped);
        self.meters.refused.increment(outcome.refused.len() as u64);
        outcome
    }
}

fn segment_bytes(batch: &Batch, used: u16) -> u64 {
    let of_used = |(number, segment): (usize, &bytes::Bytes)| {
        if used & 1 << number != 0 { segment.len() as u64 } else { 0 }
    };
    batch.segments.iter().enumerate().map(of_used).sum()
}
