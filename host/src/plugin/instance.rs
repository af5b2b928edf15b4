//! One instance of a plugin: started, called, explained when it fails.
//!
//! Memory is a cache: an instance that trapped is dropped with all it held,
//! one that has grown is replaced.

use std::sync::Arc;
use std::time::Duration;

use wasmtime::{FrameInfo, Store, Trap, WasmBacktrace};

use super::arena::{self, COUNT_MAX, DATA_SEGMENT, LAYOUT, OUTPUT_HEADER_WORDS, STRIDE_WORDS, set, verdict};
use super::bindings::base::exports::headworks::plugin::lifecycle::Context;
use super::bindings::batch::headworks::plugin::arena::{Answer as Raw, Header, Messages};
use super::bindings::message::exports::headworks::plugin::message::{Incoming, Outgoing, Verdict};
use super::bindings::message::headworks::plugin::types::Property;
use super::bindings::{access, batch, message};
use super::host::{HostState, Phase, Telemetry, printable};
use super::lines::Lines;
use super::program::{self, INIT_ANSWER_BYTES_MAX, ProcessIndices, Program, TOPICS_MAX};
use crate::batch::{Batch, MessageRef, SPAN_BYTES_MAX, flags};
use crate::devices::Devices;
use crate::problems::{KeyPath, Problem, step_problems};
use crate::properties::{self, Origin};
use crate::step::StepId;
use crate::topic::TopicFilter;

/// CPU time of instantiation and `init` together: an interpreter starts slowly.
const INIT_CPU: Duration = Duration::from_secs(5);
/// Problems that `init` may name, and their bytes, since they are one line of the log;
/// more are left out.
const PROBLEMS_MAX: usize = 64;
const PROBLEMS_BYTES_MAX: usize = 16 << 10;
/// Functions that a reason names: where it was, and its callers.
const FRAMES_MAX: usize = 3;
/// Frames that are looked at. Those without name and line are passed over: a recursion has tens of thousands.
const FRAMES_LOOKED_AT: usize = 64;
/// Bytes of a problem's path; what is over is cut off.
const POINTER_BYTES_MAX: usize = 1 << 10;
/// An instance may grow this much past what it had after init before its
/// memory counts as twice that: small plugins start with a few pages.
const GROWTH_BYTES_MIN: usize = 16 << 20;
/// An answer's verdicts and records, beside its data, that are let in to be checked.
const ANSWER_BYTES_BASE: usize = 4 << 20;

const NOTHING: &[u8] = &[];

pub(super) const NO_STEP: &str =
    "is an access plugin, no step: name its file in mqtt.access.authenticate (type: plugin)";

/// A plugin's instance, initialised.
pub(super) struct Instance {
    program: Arc<Program>,
    store: Store<HostState>,
    process: Process,
    memory_after_init: usize,
    memory_max: usize,
}

enum Process {
    Batch(batch::OnlyBatch),
    Message(message::OnlyMessage),
    Access(access::OnlyAccess),
}

/// Why an instance did not start.
#[derive(Debug)]
pub(super) enum StartError {
    /// The plugin refuses its config.
    Config(Vec<Problem>),
    Fault(String),
}

impl StartError {
    /// Returns what is wrong as problems of the config; a fault is one of all of it.
    pub fn problems(self) -> Vec<Problem> {
        match self {
            Self::Config(problems) => problems,
            Self::Fault(reason) => vec![Problem { path: KeyPath::root(), message: reason }],
        }
    }

    /// Returns the reason as one text, for a message or a log line.
    pub fn text(self) -> String {
        match self {
            Self::Fault(reason) => reason,
            Self::Config(problems) => format!("did not start: {}", step_problems(&problems)),
        }
    }
}

/// What one call may use.
#[derive(Clone, Copy, Debug)]
pub(super) struct CallLimits {
    pub cpu: Duration,
    /// Most bytes of the sum of all spans, and of `data`.
    pub bytes: u64,
}

impl Instance {
    /// The instance and the topics by which its config narrows the plugin's.
    pub fn start(
        program: &Arc<Program>,
        step: &StepId,
        devices: &Arc<Devices>,
        telemetry: &Arc<Telemetry>,
        memory_max: usize,
        context: &Context,
    ) -> Result<(Self, Option<Vec<TopicFilter>>), StartError> {
        metrics::counter!("headworks_plugin_instances_total",
            "pipeline" => step.pipeline.to_string(), "step" => step.step.to_string())
        .increment(1);
        let state = HostState::new(step.clone(), Arc::clone(devices), Arc::clone(telemetry), memory_max);
        let mut store = program::new_store(&program.runtime, state);
        store.set_hostcall_fuel(INIT_ANSWER_BYTES_MAX);
        let running = program.runtime.start(&mut store, INIT_CPU);
        let started = program.pre.instantiate(&mut store).and_then(|instance| {
            store.data_mut().phase = Phase::Init;
            let process = match &program.exports.process {
                ProcessIndices::Batch(indices) => Process::Batch(indices.load(&mut store, &instance)?),
                ProcessIndices::Message(indices) => Process::Message(indices.load(&mut store, &instance)?),
                ProcessIndices::Access(indices) => Process::Access(indices.load(&mut store, &instance)?),
            };
            let base = program.exports.lifecycle.load(&mut store, &instance)?;
            let ready = base.headworks_plugin_lifecycle().call_init(&mut store, context)?;
            Ok((process, ready))
        });
        drop(running);
        let (process, ready) = started.map_err(|error| {
            let why = explain(&error, store.data(), &program.lines, INIT_CPU, memory_max);
            StartError::Fault(format!("did not start: {why}"))
        })?;
        let ready = ready.map_err(|problems| {
            let problem = |p: super::bindings::base::exports::headworks::plugin::lifecycle::Problem| {
                Problem { path: from_pointer(&p.path), message: printable(&p.reason) }
            };
            let mut bytes = 0;
            let fits = |problem: &Problem| {
                let is_first = bytes == 0;
                bytes += problem.path.as_str().len() + problem.message.len();
                is_first || bytes <= PROBLEMS_BYTES_MAX
            };
            let problems = problems.into_iter().take(PROBLEMS_MAX).map(problem);
            StartError::Config(problems.take_while(fits).collect())
        })?;
        let narrowed = ready
            .topics
            .map(|topics| match topics.len() {
                0..=TOPICS_MAX => program::filters(&topics),
                more => Err(format!("narrows to {more} topics, at most {TOPICS_MAX} are allowed")),
            })
            .transpose()
            .map_err(|error| StartError::Fault(format!("init: {error}")))?;
        store.data_mut().phase = Phase::Run;
        store.data_mut().commit();
        let memory_after_init = store.data().memory_bytes;
        let program = Arc::clone(program);
        Ok((Self { program, store, process, memory_after_init, memory_max }, narrowed))
    }

    /// Runs the plugin over `batch`; it gets `segments`, of the batch's those that
    /// it may see. The answer is not checked. After an error the instance must
    /// be dropped.
    pub fn call(
        &mut self,
        batch: &Batch,
        header: Header,
        segments: &[&[u8]],
        limits: CallLimits,
    ) -> Result<Raw, String> {
        let answer_bytes =
            limits.bytes as usize + ANSWER_BYTES_BASE + batch.len().min(COUNT_MAX) * STRIDE_WORDS * 4;
        self.store.set_hostcall_fuel(answer_bytes);
        self.store.data_mut().now_us = batch.now_us;
        let running = self.program.runtime.start(&mut self.store, limits.cpu);
        let answer = match &self.process {
            Process::Batch(exports) => {
                let (data, later) = segments.split_first().unwrap_or((&NOTHING, &[]));
                let later = (!later.is_empty()).then_some(later);
                let messages = Messages { header, index: arena::index(batch), data, later };
                exports.headworks_plugin_batch().call_process(&mut self.store, messages)
            }
            Process::Message(exports) => one_by_one(exports, &mut self.store, batch, limits),
            Process::Access(_) => return Err(NO_STEP.to_owned()),
        };
        drop(running);
        match answer {
            Ok(answer) => Ok(answer),
            Err(error) => Err(self.explain(&error, limits)),
        }
    }

    fn explain(&self, error: &wasmtime::Error, limits: CallLimits) -> String {
        explain(error, self.store.data(), &self.program.lines, limits.cpu, self.memory_max)
    }

    /// One call of an access plugin, at `now_us`. After an error the instance
    /// must be dropped.
    pub fn decide<T>(
        &mut self,
        now_us: u64,
        limits: CallLimits,
        call: impl FnOnce(&access::OnlyAccess, &mut Store<HostState>) -> wasmtime::Result<T>,
    ) -> Result<T, String> {
        let Process::Access(exports) = &self.process else { return Err("is no access plugin".to_owned()) };
        self.store.set_hostcall_fuel(limits.bytes as usize);
        self.store.data_mut().now_us = now_us;
        let running = self.program.runtime.start(&mut self.store, limits.cpu);
        let answer = call(exports, &mut self.store);
        drop(running);
        answer.map_err(|error| self.explain(&error, limits))
    }

    /// The last call's answer was good: its metrics count.
    pub fn commit(&mut self) {
        self.store.data_mut().commit();
    }

    /// Whether it has grown so much that a new one should take its place.
    pub fn is_outgrown(&self) -> bool {
        let after_init = self.memory_after_init;
        self.store.data().memory_bytes > (after_init * 2).max(after_init + GROWTH_BYTES_MIN)
    }
}

/// Calls a `message` plugin for each message and writes its verdicts as an
/// arena answer, so that one check serves both kinds.
fn one_by_one(
    exports: &message::OnlyMessage,
    store: &mut Store<HostState>,
    batch: &Batch,
    limits: CallLimits,
) -> wasmtime::Result<Raw> {
    let mut answer = Writer::default();
    for (number, message) in batch.messages().enumerate() {
        let verdict = exports.headworks_plugin_message().call_process(&mut *store, &incoming(message))?;
        answer.add(number as u32, verdict);
        if answer.data.len() as u64 > limits.bytes {
            // Too much already: the check of what is here will say so.
            break;
        }
    }
    Ok(answer.finish(batch.len()))
}

fn incoming(message: MessageRef<'_>) -> Incoming {
    let property = |p: properties::Property<'_>| Property {
        origin: p.origin,
        name: p.name.to_owned(),
        value: p.value.to_owned(),
    };
    Incoming {
        topic: message.topic().to_owned(),
        device: message.device().to_owned(),
        payload: message.payload().to_owned(),
        route: message.route().to_owned(),
        properties: properties::iter(message.properties()).map(property).collect(),
        received_us: message.entry.received_us,
        event_us: message.event_us(),
        offset: message.offset().0,
        mqtt_bits: (message.entry.flags & (flags::QOS_MASK | flags::RETAIN | flags::DUP | flags::UTF8))
            .into(),
    }
}

#[derive(Default)]
struct Writer {
    verdicts: Vec<u8>,
    records: Vec<u8>,
    count: u32,
    data: Vec<u8>,
}

impl Writer {
    fn add(&mut self, number: u32, answer: Verdict) {
        let code = match answer {
            Verdict::Keep => verdict::KEEP,
            Verdict::Drop => verdict::DROP,
            Verdict::Emit(outgoing) => {
                for message in outgoing {
                    self.emit(number, message);
                }
                verdict::EMIT
            }
            Verdict::Fail(reason) => self.reason(number, &reason, verdict::FAIL),
            Verdict::Retry(reason) => self.reason(number, &reason, verdict::RETRY),
        };
        self.verdicts.push(code);
    }

    fn emit(&mut self, number: u32, message: Outgoing) {
        let mut words = [0; STRIDE_WORDS];
        words[0] = number;
        let mut put = |words: &mut [u32; STRIDE_WORDS], bit: u32, at: usize, bytes: &[u8]| {
            words[1] |= bit;
            [words[at], words[at + 1]] = self.span(bytes);
        };
        if let Some(topic) = &message.topic {
            put(&mut words, set::TOPIC, 2, topic.as_bytes());
        }
        if let Some(payload) = &message.payload {
            put(&mut words, set::PAYLOAD, 4, payload);
        }
        if let Some(list) = &message.properties {
            let mut bytes = Vec::new();
            if list.iter().any(|p| p.name.len() > usize::from(u16::MAX)) {
                // Its length field would lie: the check of the answer finds this not well formed.
                bytes.push(0);
            } else {
                for p in list {
                    let origin = if p.origin == 0 { Origin::Device } else { Origin::Pipeline };
                    // Origin 1 is the listener's and stays as it is.
                    if p.origin != Origin::Listener as u8 {
                        properties::push(&mut bytes, origin, &p.name, &p.value);
                    }
                }
            }
            put(&mut words, set::PROPERTIES, 6, &bytes);
        }
        if let Some(route) = &message.route {
            put(&mut words, set::ROUTE, 8, route.as_bytes());
        }
        if let Some(device) = &message.device {
            put(&mut words, set::DEVICE, 12, device.as_bytes());
        }
        if let Some(event_us) = message.event_us {
            words[1] |= set::EVENT_TIME;
            [words[10], words[11]] = [event_us as u32, (event_us >> 32) as u32];
        }
        if let Some(bits) = message.mqtt_bits {
            words[1] |= set::FLAGS;
            words[14] = bits;
        }
        self.record(&words);
    }

    fn reason(&mut self, number: u32, reason: &str, code: u8) -> u8 {
        let mut words = [0; STRIDE_WORDS];
        (words[0], words[1]) = (number, set::PAYLOAD);
        [words[4], words[5]] = self.span(&reason.as_bytes()[..reason.floor_char_boundary(4 << 10)]);
        self.record(&words);
        code
    }

    fn span(&mut self, bytes: &[u8]) -> [u32; 2] {
        let begin = self.data.len();
        let length = bytes.len().min(SPAN_BYTES_MAX);
        self.data.extend_from_slice(&bytes[..length]);
        [begin as u32, (DATA_SEGMENT as u32) << 28 | length as u32]
    }

    fn record(&mut self, words: &[u32; STRIDE_WORDS]) {
        self.records.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        self.count += 1;
    }

    fn finish(mut self, messages: usize) -> Raw {
        // Cut short by its size: any verdict will do, the size is a fault.
        self.verdicts.resize(messages, verdict::KEEP);
        let mut outputs = Vec::new();
        if self.count > 0 {
            let header = [LAYOUT, OUTPUT_HEADER_WORDS as u32, STRIDE_WORDS as u32, self.count, 0, 0, 0, 0];
            outputs.extend(header.iter().flat_map(|word| word.to_le_bytes()));
            outputs.append(&mut self.records);
        }
        Raw { verdicts: self.verdicts, outputs, data: self.data }
    }
}

/// Why a call failed, for the author of the plugin and for the operator.
pub(super) fn explain(
    error: &wasmtime::Error,
    state: &HostState,
    lines: &Lines,
    cpu: Duration,
    memory_max: usize,
) -> String {
    if let Some(reason) = &state.abort {
        return reason.clone();
    }
    if state.out_of_time() {
        return format!(
            "took over {} ms of CPU, or ten times that of wall time (limits.cpu_ms)",
            cpu.as_millis()
        );
    }
    let trap = error.downcast_ref::<Trap>();
    let memory = state
        .memory_denied
        .then(|| format!("; it asked for more than {} MiB of memory (limits.memory)", memory_max >> 20));
    let place = place(error, lines);
    match trap {
        Some(Trap::UnreachableCodeReached) => {
            let why =
                memory.unwrap_or_else(|| ", usually a panic; build with the SDK to see its text".into());
            format!("trapped: unreachable code{why}{place}")
        }
        Some(Trap::StackOverflow) => {
            format!("trapped: call stack exhausted, usually a recursion without end{place}")
        }
        Some(trap) => format!("trapped: {trap}{}{place}", memory.unwrap_or_default()),
        None => {
            let root = error.root_cause().to_string();
            let hint = match &root {
                root if root.contains("hostcall") => " (limits.output_bytes_factor)",
                root if root.contains("utf-8") => ", in a text for the host",
                _ => "",
            };
            format!("{}{hint}{}{place}", printable(&root), memory.unwrap_or_default())
        }
    }
}

/// Where it was, as far as the plugin has names and debug information: the function,
/// its file and line, and who called it.
fn place(error: &wasmtime::Error, lines: &Lines) -> String {
    let frames = error.downcast_ref::<WasmBacktrace>().map(WasmBacktrace::frames).unwrap_or_default();
    let name = |frame: &FrameInfo| {
        let place = frame.module_offset().and_then(|offset| lines.at(offset));
        let place = place.map(|(file, line)| format!("{file}:{line}"));
        match (frame.func_name(), place) {
            (Some(name), Some(place)) => Some(format!("{:#} ({place})", rustc_demangle::demangle(name))),
            (Some(name), None) => Some(format!("{:#}", rustc_demangle::demangle(name))),
            (None, place) => place,
        }
    };
    let names: Vec<_> = frames.iter().take(FRAMES_LOOKED_AT).filter_map(name).take(FRAMES_MAX).collect();
    match names.split_first() {
        None => String::new(),
        Some((first, [])) => format!("; in {}", printable(first)),
        Some((first, callers)) => {
            format!("; in {}, called by {}", printable(first), printable(&callers.join(", ")))
        }
    }
}

/// `/steps/0/max` as `steps[0].max`.
fn from_pointer(pointer: &str) -> KeyPath {
    let pointer = &pointer[..pointer.floor_char_boundary(POINTER_BYTES_MAX)];
    pointer.split('/').filter(|part| !part.is_empty()).fold(KeyPath::root(), |path, part| {
        match part.parse::<usize>() {
            Ok(index) => path.into_index(index),
            Err(_) => path.into_key(&printable(&part.replace("~1", "/").replace("~0", "~"))),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_json_pointer_reads_as_the_configs_own_path() {
        assert_eq!(from_pointer("/rules/0/max~1min").as_str(), "rules[0].max/min");
        assert_eq!(from_pointer("").as_str(), "");
        assert!(from_pointer(&"/a".repeat(1 << 20)).as_str().len() <= POINTER_BYTES_MAX);
    }
}
