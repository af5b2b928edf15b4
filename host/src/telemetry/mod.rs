//! What the host says of itself: metric descriptions and failures.
//!
//! A metric is emitted with the `metrics` macros, counted per batch, and
//! described once, in its module's `METRICS`; `admin` composes the list that
//! `/metrics` and the docs show.

mod failures;

pub use failures::Failures;

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
