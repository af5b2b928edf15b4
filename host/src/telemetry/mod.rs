//! What the host says of itself: metric descriptions and failures.
//!
//! A metric is emitted with the `metrics` macros, counted per batch, and
//! described once, in its module's `METRICS`; `admin` composes the list that
//! `/metrics` and the docs show.

mod disk;
mod failures;
mod growth;
mod log_queue;
mod logs;
mod memory;
mod process;

pub use disk::{DiskSpace, Inodes};
pub use failures::{Failures, Standing, alike};
pub use growth::Growth;
pub use log_queue::{exit, flush_logs, say};
pub use logs::{
    InitError, LogFormat, end_on_panic, escaped, init_logs, is_printable, json_escaped, no_color,
};
pub use memory::memory_bytes;
pub use process::Process;

/// The end of a page of the docs that is made from the code.
pub const MADE_FROM: &str =
    "\nThis page is made from the code: `BLESS=1 cargo test --release --workspace --lib reference`.\n";

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

/// Buckets of histograms whose name ends in `_seconds`.
pub const SECONDS: &[f64] = &[
    0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
    10.0, 30.0, 60.0,
];
/// Buckets of histograms whose name ends in `_bytes`.
pub const BYTES: &[f64] = &[
    256.0,
    1_024.0,
    4_096.0,
    16_384.0,
    65_536.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
    67_108_864.0,
];
/// Buckets of all other histograms.
pub const COUNTS: &[f64] =
    &[1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1_000.0, 2_500.0, 5_000.0, 10_000.0, 50_000.0];

/// Returns the buckets of a histogram by the unit at the end of its name.
pub fn buckets_of(name: &str) -> &'static [f64] {
    match name {
        _ if name.ends_with("_seconds") => SECONDS,
        _ if name.ends_with("_bytes") => BYTES,
        _ => COUNTS,
    }
}
