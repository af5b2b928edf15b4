//! What a pipeline counts. Handles are made once; counted per batch.

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};

use crate::telemetry::{Metric, MetricKind};

const fn metric(
    name: &'static str,
    kind: MetricKind,
    help: &'static str,
    labels: &'static [&'static str],
) -> Metric {
    Metric { name, kind, help, labels }
}

pub const METRICS: &[Metric] = &[
    metric(
        "headworks_pipeline_messages_total",
        MetricKind::Counter,
        "Messages of the pipeline, by what its steps did: read, passed, dropped, refused. A message that runs through the steps again for a sink with a reader of its own is counted once.",
        &["pipeline", "outcome"],
    ),
    metric(
        "headworks_pipeline_gap_messages_total",
        MetricKind::Counter,
        "Messages that sinks of the pipeline can never receive, by cause: damaged (on disk), trimmed (removed by retention). Trimmed messages are counted once, when they are removed.",
        &["pipeline", "cause"],
    ),
    metric(
        "headworks_pipeline_lag_messages",
        MetricKind::Gauge,
        "Messages of the stream that the sink has not committed.",
        &["pipeline", "sink"],
    ),
    metric(
        "headworks_pipeline_queue_bytes",
        MetricKind::Gauge,
        "Bytes queued for the sink.",
        &["pipeline", "sink"],
    ),
    metric(
        "headworks_pipeline_lanes",
        MetricKind::Gauge,
        "Readers of the pipeline. There is more than one while a sink lags behind the others.",
        &["pipeline"],
    ),
    metric(
        "headworks_pipeline_swaps_total",
        MetricKind::Counter,
        "Changes of the pipeline's steps, by outcome: flipped, refused.",
        &["pipeline", "outcome"],
    ),
    metric(
        "headworks_pipeline_step_duration_seconds",
        MetricKind::Histogram,
        "Time that the step took for one batch.",
        &["pipeline", "step"],
    ),
    metric(
        "headworks_sink_rows_total",
        MetricKind::Counter,
        "Rows of the sink, by outcome: written, ignored (the row was already in the table, or a trigger left it out), refused (rejected, in dead letters).",
        &["pipeline", "sink", "outcome"],
    ),
    metric(
        "headworks_sink_batches_total",
        MetricKind::Counter,
        "Commits of the sink that succeeded.",
        &["pipeline", "sink"],
    ),
    metric(
        "headworks_sink_write_duration_seconds",
        MetricKind::Histogram,
        "Time of one commit, including failed ones.",
        &["pipeline", "sink"],
    ),
    metric(
        "headworks_sink_retries_total",
        MetricKind::Counter,
        "Write attempts that did not write the whole batch, by kind: retry, unknown, setup (of the sink), too_much (a limit of time or memory; the next attempt has fewer rows), refusals (too many rows were rejected; the sink pauses).",
        &["pipeline", "sink", "kind"],
    ),
    metric(
        "headworks_redrive_running",
        MetricKind::Gauge,
        "1 while a redrive of the pipeline's dead letters runs, otherwise 0.",
        &["pipeline"],
    ),
    metric(
        "headworks_redrive_letters_total",
        MetricKind::Counter,
        "Dead letters that redrives processed, by outcome: sent, sent_before (another copy of the data folder had sent them), refused (rejected again, and open again).",
        &["pipeline", "outcome"],
    ),
    metric(
        "headworks_redrive_rows_total",
        MetricKind::Counter,
        "Rows of dead letters that redrives delivered to the sink, by outcome: written, ignored (the row was already in the table, or a trigger left it out), refused (rejected again).",
        &["pipeline", "sink", "outcome"],
    ),
    metric(
        "headworks_dead_letters_total",
        MetricKind::Counter,
        "Messages that became dead letters, by the step or sink that rejected them.",
        &["pipeline", "source"],
    ),
    metric(
        "headworks_dead_letters_gone_total",
        MetricKind::Counter,
        "Dead letters that retention removed before a redrive sent them; their messages are lost. The label `pipeline` is empty for dead letters that were removed before removals were counted by pipeline.",
        &["pipeline"],
    ),
    metric(
        "headworks_dead_letters_properties_dropped_total",
        MetricKind::Counter,
        "Dead letters that were stored without the properties of their message, because there was no room for them.",
        &["pipeline"],
    ),
];

/// The metrics of a pipeline and its steps.
#[derive(Clone)]
pub struct PipelineMetrics {
    pub read: Counter,
    pub passed: Counter,
    pub dropped: Counter,
    pub refused: Counter,
    pub lanes: Gauge,
    pub flipped: Counter,
    pub flip_refused: Counter,
}

impl PipelineMetrics {
    pub fn new(pipeline: &str) -> Self {
        let messages = |outcome: &'static str| counter!("headworks_pipeline_messages_total", "pipeline" => pipeline.to_owned(), "outcome" => outcome);
        let swaps = |outcome: &'static str| counter!("headworks_pipeline_swaps_total", "pipeline" => pipeline.to_owned(), "outcome" => outcome);
        Self {
            read: messages("read"),
            passed: messages("passed"),
            dropped: messages("dropped"),
            refused: messages("refused"),
            lanes: gauge!("headworks_pipeline_lanes", "pipeline" => pipeline.to_owned()),
            flipped: swaps("flipped"),
            flip_refused: swaps("refused"),
        }
    }
}

/// The metrics of a pipeline's redrives.
#[derive(Clone)]
pub struct RedriveMetrics {
    pub running: Gauge,
    pub sent: Counter,
    pub sent_before: Counter,
    pub refused: Counter,
}

impl RedriveMetrics {
    pub fn new(pipeline: &str) -> Self {
        let letters = |outcome: &'static str| counter!("headworks_redrive_letters_total", "pipeline" => pipeline.to_owned(), "outcome" => outcome);
        let running = gauge!("headworks_redrive_running", "pipeline" => pipeline.to_owned());
        running.set(0.0);
        let (sent, sent_before) = (letters("sent"), letters("sent_before"));
        Self { running, sent, sent_before, refused: letters("refused") }
    }
}

/// Kinds of `headworks_sink_retries_total`.
const RETRY_KINDS: [&str; 5] = ["retry", "unknown", "setup", "too_much", "refusals"];

/// Makes the counters that count what rarely happens, so that they are there at 0:
/// an alert on an increase misses one that begins at 1.
pub fn register(pipeline: &str, sinks: &[String]) {
    for cause in ["damaged", "trimmed"] {
        gap(pipeline, cause).increment(0);
    }
    properties_dropped(pipeline).increment(0);
    letters_gone(pipeline).increment(0);
    dead_letters(pipeline, super::ROUTES_STEP).increment(0);
    for sink in sinks {
        SinkMetrics::of_redrive(pipeline, sink).written.increment(0);
        dead_letters(pipeline, sink).increment(0);
        for kind in RETRY_KINDS {
            retries(pipeline, sink, kind).increment(0);
        }
    }
}

/// Returns the histogram of one step, for the workers.
pub fn step_duration(pipeline: &str, step: &str) -> Histogram {
    dead_letters(pipeline, step).increment(0);
    histogram!("headworks_pipeline_step_duration_seconds", "pipeline" => pipeline.to_owned(), "step" => step.to_owned())
}

pub fn gap(pipeline: &str, cause: &'static str) -> Counter {
    counter!("headworks_pipeline_gap_messages_total", "pipeline" => pipeline.to_owned(), "cause" => cause)
}

pub fn dead_letters(pipeline: &str, source: &str) -> Counter {
    counter!("headworks_dead_letters_total", "pipeline" => pipeline.to_owned(), "source" => source.to_owned())
}

/// Returns the counter of dead letters that are gone and were not sent again.
pub fn letters_gone(pipeline: &str) -> Counter {
    counter!("headworks_dead_letters_gone_total", "pipeline" => pipeline.to_owned())
}

pub fn properties_dropped(pipeline: &str) -> Counter {
    counter!("headworks_dead_letters_properties_dropped_total", "pipeline" => pipeline.to_owned())
}

/// The metrics of one sink.
#[derive(Clone)]
pub struct SinkMetrics {
    pub written: Counter,
    pub ignored: Counter,
    pub refused: Counter,
    pub batches: Counter,
    pub duration: Histogram,
    pub lag: Gauge,
    pub queue_bytes: Gauge,
    pipeline: String,
    sink: String,
}

impl SinkMetrics {
    pub fn new(pipeline: &str, sink: &str) -> Self {
        let rows = |outcome: &'static str| counter!("headworks_sink_rows_total", "pipeline" => pipeline.to_owned(), "sink" => sink.to_owned(), "outcome" => outcome);
        Self {
            written: rows("written"),
            ignored: rows("ignored"),
            refused: rows("refused"),
            batches: counter!("headworks_sink_batches_total", "pipeline" => pipeline.to_owned(), "sink" => sink.to_owned()),
            duration: histogram!("headworks_sink_write_duration_seconds", "pipeline" => pipeline.to_owned(), "sink" => sink.to_owned()),
            lag: gauge!("headworks_pipeline_lag_messages", "pipeline" => pipeline.to_owned(), "sink" => sink.to_owned()),
            queue_bytes: gauge!("headworks_pipeline_queue_bytes", "pipeline" => pipeline.to_owned(), "sink" => sink.to_owned()),
            pipeline: pipeline.to_owned(),
            sink: sink.to_owned(),
        }
    }

    /// Counts the rows of a redrive apart.
    pub fn of_redrive(pipeline: &str, sink: &str) -> Self {
        let rows = |outcome: &'static str| counter!("headworks_redrive_rows_total", "pipeline" => pipeline.to_owned(), "sink" => sink.to_owned(), "outcome" => outcome);
        let (written, ignored, refused) = (rows("written"), rows("ignored"), rows("refused"));
        Self { written, ignored, refused, ..Self::new(pipeline, sink) }
    }

    /// `kind`: retry, unknown, setup, too_much, refusals.
    pub fn retry(&self, kind: &'static str) {
        debug_assert!(RETRY_KINDS.contains(&kind), "{kind} is not registered");
        retries(&self.pipeline, &self.sink, kind).increment(1);
    }
}

fn retries(pipeline: &str, sink: &str, kind: &'static str) -> Counter {
    counter!("headworks_sink_retries_total", "pipeline" => pipeline.to_owned(), "sink" => sink.to_owned(), "kind" => kind)
}
