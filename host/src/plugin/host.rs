//! What a plugin can call: log, metrics, clock, devices. No other authority.
//!
//! One [`HostState`] per instance. Everything here is bounded, and a call that
//! traps leaves nothing behind but its log lines: recorded metrics wait in
//! `recorded` until the call has ended well.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use wasmtime::{ResourceLimiter, Result, bail};

use super::bindings::base::headworks::plugin::{clock, devices, log, metrics as series, types};
use super::engine::{Deadline, HasDeadline};
use super::series::{Kind, Series, StepSeries};
use crate::devices::Devices;
use crate::step::StepId;
use crate::telemetry::is_printable;

/// Most bytes of one log line or panic text.
pub(super) const TEXT_BYTES_MAX: usize = 4 << 10;
/// Log lines a second of one step, and their bytes; what is over is counted.
const LINES_PER_S_MAX: u32 = 100;
const LINE_BYTES_PER_S_MAX: usize = 64 << 10;
/// Times that an instance may register a series.
const REGISTERED_MAX: usize = 256;
/// Histogram values that one call may record; more are dropped.
const HISTOGRAM_VALUES_MAX: usize = 65_536;
const MEMORIES_MAX: usize = 8;
const INSTANCES_MAX: usize = 64;
const TABLES_MAX: usize = 32;
const TABLE_ELEMENTS_MAX: usize = 100_000;
/// Bytes that `devices.lookup` goes through between two looks at the call's deadline, of
/// which each id counts for [`LOOKUP_COST_BYTES`] more: some hundred microseconds.
const LOOKED_UP_BYTES: usize = 256 << 10;
const LOOKUP_COST_BYTES: usize = 256;

/// What an instance is doing, which decides what it may call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The start function: nothing.
    Start,
    /// `describe`: nothing.
    Describe,
    /// `init`: may register metrics.
    Init,
    Run,
}

/// The host's side of one instance.
pub struct HostState {
    step: StepId,
    devices: Arc<Devices>,
    pub phase: Phase,
    /// The batch's append time.
    pub now_us: u64,
    /// Text of `log.abort`: the reason of the trap that follows.
    pub abort: Option<String>,
    deadline: Deadline,
    memory_max: usize,
    pub memory_bytes: usize,
    /// The plugin asked for more memory than it may have.
    pub memory_denied: bool,
    telemetry: Arc<Telemetry>,
    /// By the number that the plugin has for each.
    series: Vec<Registered>,
    recorded: Vec<(u32, f64)>,
}

/// What all instances of a step say of themselves, one after another and together.
#[derive(Debug, Default)]
pub struct Telemetry {
    lines: Mutex<Lines>,
    series: Mutex<StepSeries>,
}

#[derive(Debug, Default)]
struct Lines {
    second: Option<Instant>,
    written: u32,
    written_bytes: usize,
    unwritten: u64,
}

struct Registered {
    series: Arc<Series>,
    /// What this call adds to a counter, or makes of a gauge.
    pending: f64,
    touched: bool,
}

impl HostState {
    pub fn new(step: StepId, devices: Arc<Devices>, telemetry: Arc<Telemetry>, memory_max: usize) -> Self {
        Self {
            step,
            devices,
            phase: Phase::Start,
            now_us: 0,
            abort: None,
            deadline: Deadline::default(),
            memory_max,
            memory_bytes: 0,
            memory_denied: false,
            telemetry,
            series: Vec::new(),
            recorded: Vec::new(),
        }
    }

    /// The last call was cut short by its deadline.
    pub fn out_of_time(&self) -> bool {
        self.deadline.exceeded()
    }

    /// The call ended well: its metrics count.
    pub fn commit(&mut self) {
        for Registered { series, pending, touched } in &mut self.series {
            if std::mem::take(touched) {
                series.record(std::mem::take(pending));
            }
        }
        for (number, value) in self.recorded.drain(..) {
            if let Some(registered) = self.series.get(number as usize) {
                registered.series.record(value);
            }
        }
    }

    fn allow(&self, import: &str, phases: &[Phase]) -> Result<()> {
        if phases.contains(&self.phase) {
            return Ok(());
        }
        match self.phase {
            Phase::Start => bail!("{import} was called in the start function, where no import may be called"),
            Phase::Describe => bail!("{import} was called in describe, where no import may be called"),
            Phase::Init => bail!("{import} was called in init"),
            Phase::Run => bail!("{import} was called after init"),
        }
    }

    fn line(&mut self, level: u8, text: &str) {
        let (pipeline, step, text) = (&*self.step.pipeline, &*self.step.step, printable(text));
        let mut lines = self.telemetry.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if lines.second.is_none_or(|second| now.duration_since(second).as_secs() >= 1) {
            let unwritten = lines.unwritten;
            *lines = Lines { second: Some(now), ..Lines::default() };
            if unwritten > 0 {
                tracing::warn!(
                    pipeline,
                    step,
                    unwritten,
                    "plugin wrote more than {LINES_PER_S_MAX} lines or {} KiB a second",
                    LINE_BYTES_PER_S_MAX >> 10
                );
            }
        }
        if lines.written >= LINES_PER_S_MAX || lines.written_bytes + text.len() > LINE_BYTES_PER_S_MAX {
            lines.unwritten += 1;
            drop(lines);
            metrics::counter!("headworks_plugin_log_lines_dropped_total",
                "pipeline" => pipeline.to_owned(), "step" => step.to_owned())
            .increment(1);
            return;
        }
        lines.written += 1;
        lines.written_bytes += text.len();
        drop(lines);
        match level {
            0 | 1 => tracing::trace!(pipeline, step, "{text}"),
            2 => tracing::debug!(pipeline, step, "{text}"),
            3 => tracing::info!(pipeline, step, "{text}"),
            4 => tracing::warn!(pipeline, step, "{text}"),
            _ => tracing::error!(pipeline, step, "{text}"),
        }
    }
}

impl HasDeadline for HostState {
    fn deadline(&mut self) -> &mut Deadline {
        &mut self.deadline
    }
}

impl ResourceLimiter for HostState {
    fn memory_growing(&mut self, current: usize, desired: usize, _: Option<usize>) -> Result<bool> {
        let total = self.memory_bytes.saturating_add(desired.saturating_sub(current));
        if total > self.memory_max {
            self.memory_denied = true;
            return Ok(false);
        }
        self.memory_bytes = total;
        Ok(true)
    }
    fn table_growing(&mut self, _: usize, desired: usize, _: Option<usize>) -> Result<bool> {
        Ok(desired <= TABLE_ELEMENTS_MAX)
    }
    fn instances(&self) -> usize {
        INSTANCES_MAX
    }
    fn tables(&self) -> usize {
        TABLES_MAX
    }
    fn memories(&self) -> usize {
        MEMORIES_MAX
    }
}

impl types::Host for HostState {}

impl log::Host for HostState {
    fn write(&mut self, level: u8, text: String) -> Result<()> {
        self.allow("log.write", &[Phase::Init, Phase::Run])?;
        self.line(level, &text);
        Ok(())
    }

    fn event(&mut self, level: u8, text: String, fields: Vec<(String, String)>) -> Result<()> {
        self.allow("log.event", &[Phase::Init, Phase::Run])?;
        let mut line = text;
        for (name, value) in fields {
            if line.len() > TEXT_BYTES_MAX {
                break;
            }
            line.push_str(&format!(" {name}={value}"));
        }
        self.line(level, &line);
        Ok(())
    }

    fn abort(&mut self, reason: String, file: String, line: u32) -> Result<()> {
        let place = if file.is_empty() { String::new() } else { format!(" ({file}:{line})") };
        self.abort = Some(printable(&format!("{}{place}", cut(&reason))));
        bail!("aborted")
    }
}

impl series::Host for HostState {
    fn register(
        &mut self,
        kind: u8,
        name: String,
        help: String,
        labels: Vec<(String, String)>,
    ) -> Result<Result<u32, types::Error>> {
        self.allow("metrics.register", &[Phase::Init])?;
        let error = |code, reason| Ok(Err(types::Error { code, reason }));
        let Some(kind) = Kind::of(kind) else {
            return error(7, format!("kind {kind}: must be 1 counter, 2 gauge or 3 histogram"));
        };
        if self.series.len() >= REGISTERED_MAX {
            return error(3, format!("an instance may register at most {REGISTERED_MAX} times"));
        }
        let of_step = [("pipeline", &*self.step.pipeline), ("step", &*self.step.step)];
        let mut series = self.telemetry.series.lock().unwrap_or_else(PoisonError::into_inner);
        match series.register(of_step, kind, &name, &help, labels) {
            Ok(series) => self.series.push(Registered { series, pending: 0.0, touched: false }),
            Err((is_limit, reason)) => return error(if is_limit { 3 } else { 7 }, reason),
        }
        Ok(Ok(self.series.len() as u32 - 1))
    }

    fn record_value(&mut self, series: u32, value: f64) -> Result<()> {
        self.allow("metrics.record-value", &[Phase::Init, Phase::Run])?;
        let Some(known) = self.series.get_mut(series as usize) else {
            bail!("metrics.record-value: no series {series}");
        };
        match known.series.kind {
            Kind::Counter if value.is_finite() && value > 0.0 => known.pending += value,
            Kind::Gauge => known.pending = value,
            Kind::Histogram if self.recorded.len() < HISTOGRAM_VALUES_MAX => {
                self.recorded.push((series, value));
                return Ok(());
            }
            _ => return Ok(()),
        }
        known.touched = true;
        Ok(())
    }
}

impl clock::Host for HostState {
    fn now_us(&mut self) -> Result<u64> {
        self.allow("clock.now-us", &[Phase::Init, Phase::Run])?;
        Ok(self.now_us)
    }
}

impl devices::Host for HostState {
    fn lookup(&mut self, ids: types::Packed) -> Result<Result<types::Packed, types::Error>> {
        self.allow("devices.lookup", &[Phase::Init, Phase::Run])?;
        let invalid = |reason: &str| Ok(Err(types::Error { code: 7, reason: reason.into() }));
        let (words, rest) = ids.ends.as_chunks::<4>();
        if !rest.is_empty() {
            return invalid("ends must be whole u32 words");
        }
        let table = self.devices.table();
        let mut found = types::Packed { data: Vec::new(), ends: Vec::with_capacity(ids.ends.len()) };
        let (mut begin, mut unlooked) = (0, 0);
        for word in words {
            let end = u32::from_le_bytes(*word) as usize;
            let Some(id) = ids.data.get(begin..end) else {
                return invalid("ends must not descend or pass the data");
            };
            let object = std::str::from_utf8(id).ok().and_then(|id| table.get(id)).unwrap_or("");
            if found.data.len() + object.len() > self.memory_max {
                return Ok(Err(types::Error { code: 3, reason: "more than the plugin's memory".into() }));
            }
            unlooked += LOOKUP_COST_BYTES + id.len() + object.len();
            if unlooked >= LOOKED_UP_BYTES && !self.deadline.look() {
                bail!("out of time");
            }
            unlooked %= LOOKED_UP_BYTES;
            found.data.extend_from_slice(object.as_bytes());
            found.ends.extend_from_slice(&(found.data.len() as u32).to_le_bytes());
            begin = end;
        }
        Ok(Ok(found))
    }

    fn get(&mut self, id: String) -> Result<Result<Option<String>, types::Error>> {
        self.allow("devices.get", &[Phase::Init, Phase::Run])?;
        Ok(Ok(self.devices.table().get(&id).map(str::to_owned)))
    }
}

/// At most [`TEXT_BYTES_MAX`] bytes, what is not printable escaped, so that a
/// plugin cannot forge lines or steer a terminal.
pub(super) fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len().min(TEXT_BYTES_MAX));
    for c in cut(text).chars() {
        if is_printable(c) {
            out.push(c);
        } else {
            out.extend(c.escape_default());
        }
    }
    out.truncate(out.floor_char_boundary(TEXT_BYTES_MAX));
    out
}

fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(TEXT_BYTES_MAX)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> HostState {
        let id = StepId { pipeline: "p".into(), step: "s".into() };
        let mut state = HostState::new(id, Arc::default(), Arc::default(), 64 << 20);
        state.phase = Phase::Run;
        state
    }

    #[test]
    fn a_lookup_of_any_number_of_devices_ends_with_its_calls_time() {
        // Ids of no bytes: the cheapest way to ask for many.
        let ids = || types::Packed { data: Vec::new(), ends: vec![0; 4 * 100_000] };
        let mut state = state();
        let found = devices::Host::lookup(&mut state, ids()).unwrap().unwrap();
        assert_eq!(found.ends.len(), ids().ends.len());
        *state.deadline() = Deadline::new(std::time::Duration::ZERO);
        assert!(devices::Host::lookup(&mut state, ids()).is_err());
        assert!(state.out_of_time());
    }

    #[test]
    fn a_line_keeps_the_level_that_the_plugin_gave_it() {
        use tracing_subscriber::layer::SubscriberExt;
        #[derive(Clone, Default)]
        struct Levels(Arc<Mutex<Vec<tracing::Level>>>);
        impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for Levels {
            fn on_event(&self, event: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
                self.0.lock().unwrap().push(*event.metadata().level());
            }
        }
        let levels = Levels::default();
        let logs = tracing_subscriber::registry().with(levels.clone());
        tracing::subscriber::with_default(logs, || {
            let mut state = state();
            for level in 1..=5 {
                log::Host::write(&mut state, level, "x".to_owned()).unwrap();
            }
        });
        use tracing::Level;
        let wanted = [Level::TRACE, Level::DEBUG, Level::INFO, Level::WARN, Level::ERROR];
        assert_eq!(*levels.0.lock().unwrap(), wanted);
    }

    #[test]
    fn instances_of_one_step_share_its_lines_and_bytes_a_second() {
        let telemetry = Arc::<Telemetry>::default();
        let begun = Instant::now();
        let mut written = 0;
        for number in 0..1_000 {
            let mut state = HostState { telemetry: Arc::clone(&telemetry), ..state() };
            let text = if number < 500 { "short".to_owned() } else { "x".repeat(TEXT_BYTES_MAX) };
            let before = telemetry.lines.lock().unwrap().unwritten;
            log::Host::write(&mut state, 0, text).unwrap();
            let lines = telemetry.lines.lock().unwrap();
            written += u32::from(lines.unwritten <= before);
            assert!(lines.written <= LINES_PER_S_MAX && lines.written_bytes <= LINE_BYTES_PER_S_MAX);
        }
        let seconds = begun.elapsed().as_secs() as u32 + 1;
        assert!(written <= seconds * LINES_PER_S_MAX, "{written} lines in {seconds} s");
    }

    #[test]
    fn a_log_line_cannot_forge_another_or_steer_a_terminal() {
        assert_eq!(printable("a\nb\x1b[2J"), "a\\nb\\u{1b}[2J");
        assert_eq!(printable(&"x".repeat(9000)).len(), TEXT_BYTES_MAX);
        assert!(printable(&"\n".repeat(5000)).len() <= TEXT_BYTES_MAX);
    }
}
