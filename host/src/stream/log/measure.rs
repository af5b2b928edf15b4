//! Metrics of a log, counted for each commit.

use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};

use crate::stream::GapCause;
use crate::telemetry::{Metric, MetricKind};

const STREAM: &[&str] = &["stream"];

pub const METRICS: &[Metric] = &[
    metric("headworks_stream_messages_total", MetricKind::Counter, "Messages that the stream made durable."),
    metric(
        "headworks_stream_written_bytes_total",
        MetricKind::Counter,
        "Bytes of messages that the stream made durable.",
    ),
    metric(
        "headworks_stream_commits_total",
        MetricKind::Counter,
        "Frames that were written, each with one sync.",
    ),
    metric(
        "headworks_stream_checkpoint_bytes_total",
        MetricKind::Counter,
        "Bytes of state that were written again at the beginning of segments; at most as many as the bytes of new frames.",
    ),
    metric("headworks_stream_sync_duration_seconds", MetricKind::Histogram, "Time of one sync."),
    metric("headworks_stream_disk_bytes", MetricKind::Gauge, "Size of all segment files of the stream."),
    metric("headworks_stream_segments", MetricKind::Gauge, "Number of segment files of the stream."),
    metric(
        "headworks_stream_trimmed_bytes_total",
        MetricKind::Counter,
        "Bytes that retention removed from the stream.",
    ),
    metric(
        "headworks_stream_no_space",
        MetricKind::Gauge,
        "1 while appends wait for disk space, a file descriptor or memory, otherwise 0.",
    ),
    Metric {
        name: "headworks_stream_gap_messages_total",
        kind: MetricKind::Counter,
        help: "Messages that readers could not read, by cause: damaged (on disk, counted once), trimmed (removed by retention, counted for each reader).",
        labels: &["stream", "cause"],
    },
];

const fn metric(name: &'static str, kind: MetricKind, help: &'static str) -> Metric {
    Metric { name, kind, help, labels: STREAM }
}

pub struct Meters {
    messages: Counter,
    bytes: Counter,
    commits: Counter,
    checkpoints: Counter,
    sync: Histogram,
    disk_bytes: Gauge,
    segments: Gauge,
    trimmed: Counter,
    no_space: Gauge,
    damaged_gap: Counter,
    trimmed_gap: Counter,
}

impl Meters {
    pub fn new(stream: &str) -> Self {
        let label = || stream.to_owned();
        Self {
            messages: counter!("headworks_stream_messages_total", "stream" => label()),
            bytes: counter!("headworks_stream_written_bytes_total", "stream" => label()),
            commits: counter!("headworks_stream_commits_total", "stream" => label()),
            checkpoints: counter!("headworks_stream_checkpoint_bytes_total", "stream" => label()),
            sync: histogram!("headworks_stream_sync_duration_seconds", "stream" => label()),
            disk_bytes: gauge!("headworks_stream_disk_bytes", "stream" => label()),
            segments: gauge!("headworks_stream_segments", "stream" => label()),
            trimmed: counter!("headworks_stream_trimmed_bytes_total", "stream" => label()),
            no_space: gauge!("headworks_stream_no_space", "stream" => label()),
            damaged_gap: counter!("headworks_stream_gap_messages_total", "stream" => label(), "cause" => "damaged"),
            trimmed_gap: counter!("headworks_stream_gap_messages_total", "stream" => label(), "cause" => "trimmed"),
        }
    }

    pub fn committed(&self, messages: u32, bytes: usize) {
        self.messages.increment(u64::from(messages));
        self.bytes.increment(bytes as u64);
        self.commits.increment(1);
    }

    pub fn checkpoint(&self, bytes: u64) {
        self.checkpoints.increment(bytes);
    }

    pub fn synced(&self, took: Duration) {
        self.sync.record(took.as_secs_f64());
    }

    pub fn kept(&self, bytes: u64, segments: usize) {
        self.disk_bytes.set(bytes as f64);
        self.segments.set(segments as f64);
    }

    pub fn trimmed(&self, bytes: u64) {
        self.trimmed.increment(bytes);
    }

    pub fn no_space(&self, full: bool) {
        self.no_space.set(if full { 1.0 } else { 0.0 });
    }

    pub fn gap(&self, messages: u64, cause: GapCause) {
        match cause {
            GapCause::Damaged => self.damaged_gap.increment(messages),
            GapCause::Trimmed => self.trimmed_gap.increment(messages),
        }
    }
}
