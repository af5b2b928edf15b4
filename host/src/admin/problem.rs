//! A problem, which `/api/problems` serves and `headworks status` prints.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::telemetry::{Metric, MetricKind};
use crate::units::{ByteSize, Period};

/// Every [`Problem::kind`], the most severe first: problems that stop devices or lose messages, then
/// those that wait for an operator, then those that resolve themselves, then past events. Lists of
/// problems are in this order.
pub const PROBLEM_KINDS: &[&str] = &[
    "stopped",
    "data_folder",
    "listener",
    "stalled",
    "no_space",
    "gap",
    "other_log",
    "steps_gone",
    "holding",
    "starting",
    "plugin_removed",
    "plugin_failed",
    "retrying",
    "low_space",
    "late",
    "queues",
    "memory",
    "dead_letters",
    "unconfigured",
    "certificate",
    "reload_refused",
    "file_stalled",
    "swap_refused",
    "swap_waits",
    "takeovers",
    "dropped",
    "skipped",
    "ignored",
    "faults",
    "withheld",
    "refused",
    "refused_publishes",
    "refused_subscribes",
];

/// Returns the index of a kind in [`PROBLEM_KINDS`], by which problems are sorted.
pub fn problem_rank(kind: &str) -> usize {
    let rank = PROBLEM_KINDS.iter().position(|known| *known == kind);
    debug_assert!(rank.is_some(), "{kind} has no rank");
    rank.unwrap_or(PROBLEM_KINDS.len())
}

pub const METRICS: &[Metric] = &[
    Metric {
        name: "headworks_problems",
        kind: MetricKind::Gauge,
        help: "Problems that need an operator, by kind. `headworks status` and /api/problems list each problem.",
        labels: &["kind"],
    },
    Metric {
        name: "headworks_data_free_bytes",
        kind: MetricKind::Gauge,
        help: "Bytes that the host can still write to the file system that holds the data folder.",
        labels: &[],
    },
    Metric {
        name: "headworks_data_disk_bytes",
        kind: MetricKind::Gauge,
        help: "Size in bytes of the file system that holds the data folder.",
        labels: &[],
    },
    Metric {
        name: "headworks_sink_works",
        kind: MetricKind::Gauge,
        help: "1 while the sink writes; 0 while the sink starts, retries, is held or has stopped, or its pipeline is held or has stopped.",
        labels: &["pipeline", "sink"],
    },
    Metric {
        name: "headworks_sink_lag_seconds",
        kind: MetricKind::Gauge,
        help: "Age of the oldest message that the sink has not committed, 0 if it has committed all.",
        labels: &["pipeline", "sink"],
    },
];

/// A problem that needs an operator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// Affected part, such as `sink telemetry/warehouse`.
    pub part: String,
    /// One of [`PROBLEM_KINDS`].
    pub kind: String,
    pub cause: String,
    /// When the problem began, or when this run of the host first detected it:
    /// `2026-11-23T06:28:00.125Z`.
    pub since: String,
    /// Seconds since the problem began.
    pub seconds: u64,
    pub at_stake: AtStake,
    /// What the operator should do.
    pub advice: String,
}

/// What is pending, lost, or running out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AtStake {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub messages: Option<u64>,
    /// Number of messages that retention removed before a sink received them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gone_messages: Option<u64>,
    /// Age of the oldest pending message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oldest_seconds: Option<u64>,
    /// Free space on the disk of the stream or the folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_bytes: Option<u64>,
    /// Number of files that can still be created on the disk, if it is low.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_inodes: Option<u64>,
}

impl fmt::Display for AtStake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let messages = self.messages.map(|count| match count {
            1 => "1 message".to_owned(),
            count => format!("{count} messages"),
        });
        let messages = match (messages, self.gone_messages) {
            (Some(waiting), Some(1)) => Some(format!("{waiting} wait, 1 is gone")),
            (Some(waiting), Some(gone)) => Some(format!("{waiting} wait, {gone} are gone")),
            (messages, _) => messages,
        };
        let oldest = self
            .oldest_seconds
            .map(|seconds| format!("the oldest waits {}", Period(Duration::from_secs(seconds))));
        let free = self.free_bytes.map(|bytes| format!("{} free on disk", ByteSize(bytes)));
        let inodes = self.free_inodes.map(|inodes| match inodes {
            1 => "1 inode free".to_owned(),
            count => format!("{count} inodes free"),
        });
        let parts: Vec<String> = [messages, oldest, free, inodes].into_iter().flatten().collect();
        f.write_str(&parts.join(", "))
    }
}
