//! What a plugin can call: log, metrics, clock, devices. No other authority.
//!
//! One [`HostState`] per instance. Everything here is bounded, and a call that
//! traps leaves nothing behind but its log lines: recorded metrics wait in
//! `recorded` until the call has ended well.

use std::sync::Arc;
use std::time::Instant;

use metrics::{Counter, Gauge, Histogram, Key, Label, Level, Metadata};
use wasmtime::{ResourceLimiter, Result, bail};

use super::bindings::base::headworks::plugin::{clock, devices, log, metrics as series, types};
use super::engine::{Deadline, HasDeadline};
use crate::devices::Devices;
use crate::step::StepId;

/// Of one log line or panic text.
pub(super) const TEXT_BYTES_MAX: usize = 4 << 10;
/// Log lines a second of one instance; more are counted.
const LINES_PER_S_MAX: u32 = 100;
/// Series that a step may register.
const SERIES_MAX: usize = 64;
const LABELS_MAX: usize = 8;
const LABEL_BYTES_MAX: usize = 128;
/// Histogram values that one call may record; more are dropped.
const HISTOGRAM_VALUES_MAX: usize = 65_536;
const MEMORIES_MAX: usize = 8;
const INSTANCES_MAX: usize = 64;
const TABLES_MAX: usize = 32;
const TABLE_ELEMENTS_MAX: usize = 100_000;

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
    lines: Lines,
    series: Vec<Series>,
    recorded: Vec<(u32, f64)>,
}

struct Lines {
    second: Instant,
    written: u32,
    unwritten: u64,
}

struct Series {
    kind: Kind,
    /// Fraction of a counter that did not make a whole yet, or this call's sum.
    pending: f64,
    touched: bool,
}

enum Kind {
    Counter(Counter),
    Gauge(Gauge),
    Histogram(Histogram),
}

impl HostState {
    pub fn new(step: StepId, devices: Arc<Devices>, memory_max: usize) -> Self {
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
            lines: Lines { second: Instant::now(), written: 0, unwritten: 0 },
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
        for series in &mut self.series {
            if !std::mem::take(&mut series.touched) {
                continue;
            }
            match &series.kind {
                Kind::Counter(counter) => {
                    let whole = series.pending.floor();
                    counter.increment(whole as u64);
                    series.pending -= whole;
                }
                Kind::Gauge(gauge) => gauge.set(series.pending),
                Kind::Histogram(_) => {}
            }
        }
        for (number, value) in self.recorded.drain(..) {
            if let Some(Series { kind: Kind::Histogram(histogram), .. }) = self.series.get(number as usize) {
                histogram.record(value);
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
        let now = Instant::now();
        if now.duration_since(self.lines.second).as_secs() >= 1 {
            let unwritten = std::mem::take(&mut self.lines.unwritten);
            if unwritten > 0 {
                tracing::warn!(pipeline = %self.step.pipeline, step = %self.step.step, unwritten,
                    "plugin wrote more than {LINES_PER_S_MAX} lines a second");
            }
            (self.lines.second, self.lines.written) = (now, 0);
        }
        if self.lines.written >= LINES_PER_S_MAX {
            self.lines.unwritten += 1;
            metrics::counter!("headworks_plugin_log_lines_dropped_total",
                "pipeline" => self.step.pipeline.to_string(), "step" => self.step.step.to_string())
            .increment(1);
            return;
        }
        self.lines.written += 1;
        let (pipeline, step, text) = (&*self.step.pipeline, &*self.step.step, printable(text));
        match level {
            0 | 1 => tracing::trace!(pipeline, step, "{text}"),
            2 => tracing::debug!(pipeline, step, "{text}"),
            3 => tracing::info!(pipeline, step, "{text}"),
            // A plugin's error is one device's or one author's, not the host's.
            _ => tracing::warn!(pipeline, step, "{text}"),
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
        let invalid = |reason: String| Ok(Err(types::Error { code: 7, reason }));
        if !is_metric_name(&name) || labels.iter().any(|(name, _)| !is_metric_name(name)) {
            return invalid(format!(
                "metric \"{}\": names must match [a-z][a-z0-9_]{{0,63}}",
                printable(&name)
            ));
        }
        if labels.len() > LABELS_MAX || labels.iter().any(|(_, value)| value.len() > LABEL_BYTES_MAX) {
            return invalid(format!("metric {name}: at most {LABELS_MAX} labels of {LABEL_BYTES_MAX} bytes"));
        }
        if labels.iter().any(|(name, _)| name == "pipeline" || name == "step") {
            return invalid(format!("metric {name}: the labels pipeline and step are the host's"));
        }
        if self.series.len() >= SERIES_MAX {
            let reason = format!("a step may register at most {SERIES_MAX} series");
            return Ok(Err(types::Error { code: 3, reason }));
        }
        let full_name = format!("headworks_plugin_{name}");
        let labels = [("pipeline", &self.step.pipeline), ("step", &self.step.step)]
            .into_iter()
            .map(|(name, value)| Label::new(name, value.to_string()))
            .chain(labels.into_iter().map(|(name, value)| Label::new(name, value)))
            .collect::<Vec<_>>();
        let key = Key::from_parts(full_name.clone(), labels);
        let metadata = Metadata::new(module_path!(), Level::INFO, Some(module_path!()));
        let help = printable(&help);
        let kind = metrics::with_recorder(|recorder| match kind {
            1 => {
                recorder.describe_counter(full_name.into(), None, help.into());
                Some(Kind::Counter(recorder.register_counter(&key, &metadata)))
            }
            2 => {
                recorder.describe_gauge(full_name.into(), None, help.into());
                Some(Kind::Gauge(recorder.register_gauge(&key, &metadata)))
            }
            3 => {
                recorder.describe_histogram(full_name.into(), None, help.into());
                Some(Kind::Histogram(recorder.register_histogram(&key, &metadata)))
            }
            _ => None,
        });
        let Some(kind) = kind else {
            return invalid(format!("metric {name}: kind must be 1 counter, 2 gauge or 3 histogram"));
        };
        self.series.push(Series { kind, pending: 0.0, touched: false });
        Ok(Ok(self.series.len() as u32 - 1))
    }

    fn record_value(&mut self, series: u32, value: f64) -> Result<()> {
        self.allow("metrics.record-value", &[Phase::Init, Phase::Run])?;
        let Some(known) = self.series.get_mut(series as usize) else {
            bail!("metrics.record-value: no series {series}");
        };
        match known.kind {
            Kind::Counter(_) if value.is_finite() && value > 0.0 => known.pending += value,
            Kind::Gauge(_) => known.pending = value,
            Kind::Histogram(_) if self.recorded.len() < HISTOGRAM_VALUES_MAX => {
                self.recorded.push((series, value))
            }
            _ => {}
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
        let mut found = types::Packed { data: Vec::new(), ends: Vec::with_capacity(ids.ends.len()) };
        let mut begin = 0;
        for word in words {
            let end = u32::from_le_bytes(*word) as usize;
            let Some(id) = ids.data.get(begin..end) else {
                return invalid("ends must not descend or pass the data");
            };
            let object = std::str::from_utf8(id).ok().and_then(|id| self.devices.get(id)).unwrap_or("");
            if found.data.len() + object.len() > self.memory_max {
                return Ok(Err(types::Error { code: 3, reason: "more than the plugin's memory".into() }));
            }
            found.data.extend_from_slice(object.as_bytes());
            found.ends.extend_from_slice(&(found.data.len() as u32).to_le_bytes());
            begin = end;
        }
        Ok(Ok(found))
    }

    fn get(&mut self, id: String) -> Result<Result<Option<String>, types::Error>> {
        self.allow("devices.get", &[Phase::Init, Phase::Run])?;
        Ok(Ok(self.devices.get(&id).map(str::to_owned)))
    }
}

/// At most [`TEXT_BYTES_MAX`] bytes, control characters escaped, so that a
/// plugin cannot forge lines or steer a terminal.
pub(super) fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len().min(TEXT_BYTES_MAX));
    for c in cut(text).chars() {
        // U+202A.. and U+2066.. turn the direction of what follows.
        if c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}') {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out.truncate(out.floor_char_boundary(TEXT_BYTES_MAX));
    out
}

fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(TEXT_BYTES_MAX)]
}

fn is_metric_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name.as_bytes()[0].is_ascii_lowercase()
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_line_cannot_forge_another_or_steer_a_terminal() {
        assert_eq!(printable("a\nb\x1b[2J"), "a\\nb\\u{1b}[2J");
        assert_eq!(printable(&"x".repeat(9000)).len(), TEXT_BYTES_MAX);
        assert!(printable(&"\n".repeat(5000)).len() <= TEXT_BYTES_MAX);
    }
}
