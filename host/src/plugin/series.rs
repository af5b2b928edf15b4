//! Metrics that plugins register, apart from the host's own: whatever a plugin
//! does, a scrape is valid text, and no series of the host is touched.
//!
//! A series lives as long as a step that registered it: see [`render`].

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::telemetry::buckets_of;

/// In front of a plugin's name of a metric. No metric of the host begins so.
pub const PREFIX: &str = "headworks_plugin_metric_";
/// Series that a step may register.
const SERIES_MAX: usize = 64;
/// Names of all plugins.
const FAMILIES_MAX: usize = 1_024;
const LABELS_MAX: usize = 8;
const LABEL_BYTES_MAX: usize = 128;
/// Names that a histogram of name `x` writes beside `x`.
const HISTOGRAM_SUFFIXES: [&str; 3] = ["_bucket", "_sum", "_count"];
/// Labels that mean something to Prometheus or are the host's.
const RESERVED_LABELS: [&str; 4] = ["le", "quantile", "pipeline", "step"];

/// By name, without [`PREFIX`].
static FAMILIES: Mutex<BTreeMap<String, Family>> = Mutex::new(BTreeMap::new());

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// All series of one name.
struct Family {
    kind: Kind,
    help: String,
    series: Vec<(Labels, Weak<Series>)>,
}

type Labels = Vec<(String, String)>;

/// One series, shared by the instances of a step.
#[derive(Debug)]
pub struct Series {
    pub kind: Kind,
    value: Mutex<Value>,
}

#[derive(Debug, Default)]
struct Value {
    /// A counter's or histogram's sum, a gauge's value.
    sum: f64,
    count: u64,
    /// By bucket, not cumulated.
    buckets: Vec<u64>,
    bounds: &'static [f64],
}

/// What a step registered.
#[derive(Debug, Default)]
pub struct StepSeries(BTreeMap<(String, Labels), Arc<Series>>);

impl Kind {
    /// As the contract numbers them.
    pub fn of(number: u8) -> Option<Self> {
        [Self::Counter, Self::Gauge, Self::Histogram].get(usize::from(number).checked_sub(1)?).copied()
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

impl StepSeries {
    /// Returns the series of this name and these labels, a new one if there is none.
    /// The error says what is wrong with them; `true`: it is a limit.
    pub fn register(
        &mut self,
        of_step: [(&str, &str); 2],
        kind: Kind,
        name: &str,
        help: &str,
        mut labels: Labels,
    ) -> Result<Arc<Series>, (bool, String)> {
        check(name, &labels).map_err(|reason| (false, format!("metric \"{name}\": {reason}")))?;
        labels.sort();
        let key = (name.to_owned(), labels);
        if let Some(series) = self.0.get(&key).filter(|series| series.kind == kind) {
            return Ok(Arc::clone(series));
        }
        if self.0.len() >= SERIES_MAX {
            return Err((true, format!("a step may register at most {SERIES_MAX} series")));
        }
        let of_step = of_step.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let all = of_step.into_iter().chain(key.1.iter().cloned()).collect();
        let series = shared(kind, name, help, all)?;
        self.0.insert(key, Arc::clone(&series));
        Ok(series)
    }
}

impl Series {
    /// Adds to a counter, sets a gauge, records into a histogram.
    pub fn record(&self, number: f64) {
        let mut value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        match self.kind {
            Kind::Counter => value.sum += number,
            Kind::Gauge => value.sum = number,
            Kind::Histogram => {
                let bucket = value.bounds.iter().position(|bound| number <= *bound);
                if let Some(bucket) = bucket {
                    value.buckets[bucket] += 1;
                }
                value.sum += number;
                value.count += 1;
            }
        }
    }
}

fn check(name: &str, labels: &[(String, String)]) -> Result<(), String> {
    if let Some(name) =
        std::iter::once(name).chain(labels.iter().map(|(name, _)| &**name)).find(|n| !is_name(n))
    {
        return Err(format!("the name {:?} must match [a-z][a-z0-9_]{{0,63}}", super::host::printable(name)));
    }
    if labels.len() > LABELS_MAX || labels.iter().any(|(_, value)| value.len() > LABEL_BYTES_MAX) {
        return Err(format!("at most {LABELS_MAX} labels of {LABEL_BYTES_MAX} bytes"));
    }
    if let Some((name, _)) = labels.iter().find(|(name, _)| RESERVED_LABELS.contains(&&**name)) {
        return Err(format!("the label {name} is reserved, take another name"));
    }
    let names: BTreeSet<_> = labels.iter().map(|(name, _)| name).collect();
    if names.len() < labels.len() {
        return Err("a label comes twice".to_owned());
    }
    Ok(())
}

fn is_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name.as_bytes()[0].is_ascii_lowercase()
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

/// The series as all steps share it: a new version of a step goes on with what the
/// old one counted as long as both live.
fn shared(kind: Kind, name: &str, help: &str, labels: Labels) -> Result<Arc<Series>, (bool, String)> {
    let mut families = families();
    forget_gone(&mut families);
    if let Some(family) = families.get(name).filter(|family| family.kind != kind) {
        return Err((false, format!("metric \"{name}\" is a {} already", family.kind.as_str())));
    }
    let is_histogram = |name: &str| families.get(name).is_some_and(|family| family.kind == Kind::Histogram);
    let base = HISTOGRAM_SUFFIXES
        .iter()
        .find_map(|suffix| name.strip_suffix(suffix))
        .filter(|base| is_histogram(base));
    let beside = HISTOGRAM_SUFFIXES
        .iter()
        .map(|suffix| format!("{name}{suffix}"))
        .find(|beside| kind == Kind::Histogram && families.contains_key(beside));
    if let Some(taken) = base.map(str::to_owned).or(beside) {
        return Err((false, format!("metric \"{name}\": its samples would have the names of \"{taken}\"")));
    }
    if families.len() >= FAMILIES_MAX && !families.contains_key(name) {
        return Err((true, format!("all plugins together may register at most {FAMILIES_MAX} names")));
    }
    let family = families.entry(name.to_owned()).or_insert_with(|| Family {
        kind,
        help: super::host::printable(help),
        series: Vec::new(),
    });
    let known =
        family.series.iter().find(|(known, _)| *known == labels).and_then(|(_, series)| series.upgrade());
    Ok(known.unwrap_or_else(|| {
        let bounds = if kind == Kind::Histogram { buckets_of(name) } else { &[] };
        let value = Value { buckets: vec![0; bounds.len()], bounds, ..Value::default() };
        let series = Arc::new(Series { kind, value: Mutex::new(value) });
        family.series.push((labels, Arc::downgrade(&series)));
        series
    }))
}

/// Returns all series of steps that are there, in the Prometheus text format.
pub fn render() -> String {
    let mut families = families();
    forget_gone(&mut families);
    let mut out = String::new();
    for (name, Family { kind, help, series }) in &*families {
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        // Writing to a string cannot fail.
        let _ = writeln!(out, "# HELP {PREFIX}{name} {help}\n# TYPE {PREFIX}{name} {}", kind.as_str());
        for (labels, series) in series {
            let Some(series) = series.upgrade() else { continue };
            let value = series.value.lock().unwrap_or_else(PoisonError::into_inner);
            sample(&mut out, name, labels, &value, *kind);
        }
    }
    out
}

fn sample(out: &mut String, name: &str, labels: &Labels, value: &Value, kind: Kind) {
    let escaped = |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let labels: Vec<_> =
        labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
    let labels = labels.join(",");
    if kind == Kind::Histogram {
        let mut below = 0;
        for (bound, count) in value.bounds.iter().zip(&value.buckets) {
            below += count;
            let _ = writeln!(out, "{PREFIX}{name}_bucket{{{labels},le=\"{bound}\"}} {below}");
        }
        let _ = writeln!(out, "{PREFIX}{name}_bucket{{{labels},le=\"+Inf\"}} {}", value.count);
        let _ = writeln!(out, "{PREFIX}{name}_sum{{{labels}}} {}", number(value.sum));
        let _ = writeln!(out, "{PREFIX}{name}_count{{{labels}}} {}", value.count);
    } else {
        let _ = writeln!(out, "{PREFIX}{name}{{{labels}}} {}", number(value.sum));
    }
}

fn number(value: f64) -> String {
    match value {
        f64::INFINITY => "+Inf".to_owned(),
        f64::NEG_INFINITY => "-Inf".to_owned(),
        value => value.to_string(),
    }
}

fn forget_gone(families: &mut BTreeMap<String, Family>) {
    families.retain(|_, family| {
        family.series.retain(|(_, series)| series.strong_count() > 0);
        !family.series.is_empty()
    });
}

fn families() -> MutexGuard<'static, BTreeMap<String, Family>> {
    FAMILIES.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[path = "series_tests.rs"]
mod tests;
