//! What the host says of itself: metric descriptions and failures.
//!
//! A metric is emitted with the `metrics` macros, counted per batch, and
//! described once, in its module's `METRICS`; `admin` composes the list that
//! `/metrics` and the docs show.

mod disk;
mod failures;
mod growth;
mod logs;
mod process;

pub use disk::DiskSpace;
pub use failures::Failures;
pub use growth::Growth;
pub use logs::{InitError, LogFormat, end_on_panic, init_logs, no_color, write_escaped};
pub use process::Process;

/// The process's own, see [`Process`].
pub const METRICS: &[Metric] = process::METRICS;

/// One metric, for `# HELP` and the reference page. A test fails when a metric
/// is emitted that no list describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metric {
    /// `headworks_pipeline_messages_total`; units last: `_seconds`, `_bytes`, `_total`.
    pub name: &'static str,
    pub kind: MetricKind,
    pub help: &'static str,
    pub labels: &'static [&'static str],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    Counter,
    Gauge,
    Histogram,
}

impl MetricKind {
    /// As after `# TYPE`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}
