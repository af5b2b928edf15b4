//! The process itself, under the names that Prometheus client libraries use:
//! memory, CPU time, open files, start; and its log. Read from /proc at each scrape; where
//! there is no /proc, only what needs none.

use std::fmt::Write;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::{Metric, MetricKind, log_queue};

pub const METRICS: &[Metric] = &[
    gauge("process_resident_memory_bytes", "Resident memory of the process in bytes."),
    Metric {
        name: "process_cpu_seconds_total",
        kind: MetricKind::Counter,
        help: "CPU time of the process in seconds, user and system.",
        labels: &[],
    },
    gauge("process_open_fds", "Number of open file descriptors."),
    gauge("process_threads", "Number of threads of the process."),
    gauge("process_start_time_seconds", "Start time of the process in seconds since 1970, UTC."),
    gauge("headworks_uptime_seconds", "Seconds since the process started."),
    Metric {
        name: "headworks_log_dropped_lines_total",
        kind: MetricKind::Counter,
        help: "Log lines that were dropped because the reader of stderr was too slow or stderr could not be written.",
        labels: &[],
    },
    Metric {
        name: "headworks_build_info",
        kind: MetricKind::Gauge,
        help: "Constant 1, with the version of Headworks as a label.",
        labels: &["version"],
    },
];

/// Reads the process's figures; made once, at start.
#[derive(Clone, Copy, Debug)]
pub struct Process {
    started: SystemTime,
    /// The same, on a clock that nobody sets.
    since: Instant,
}

/// Made at the start of the process.
impl Default for Process {
    fn default() -> Self {
        Self { started: SystemTime::now(), since: Instant::now() }
    }
}

impl Process {
    pub fn uptime(&self) -> Duration {
        self.since.elapsed()
    }

    /// Prometheus text, ready to stand beside what the recorder renders.
    pub fn render(&self) -> String {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let field = |name: &str| -> Option<f64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse().ok()
        };
        let start = self.started.duration_since(UNIX_EPOCH).unwrap_or_default();
        let values = [
            field("VmRSS:").map(|kib| kib * 1_024.0),
            Some(cpu_time().as_secs_f64()),
            std::fs::read_dir("/proc/self/fd").ok().map(|files| files.count() as f64),
            field("Threads:"),
            Some(start.as_secs_f64()),
            Some(self.uptime().as_secs_f64()),
            Some(log_queue::dropped_lines() as f64),
            Some(1.0),
        ];
        let mut text = String::new();
        for (metric, value) in METRICS.iter().zip(values) {
            let Some(value) = value else { continue };
            let kind = metric.kind.as_str();
            let Metric { name, help, .. } = metric;
            let labels = if metric.labels.is_empty() {
                String::new()
            } else {
                format!("{{version=\"{}\"}}", env!("CARGO_PKG_VERSION"))
            };
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name}{labels} {value}\n");
        }
        text
    }
}

fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.try_into().unwrap_or(0), time.tv_nsec.try_into().unwrap_or(0))
}

const fn gauge(name: &'static str, help: &'static str) -> Metric {
    Metric { name, kind: MetricKind::Gauge, help, labels: &[] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_set_later_does_not_change_the_uptime() {
        let process = Process { started: UNIX_EPOCH, ..Process::default() };
        assert!(process.uptime() < Duration::from_secs(24 * 60 * 60));
    }

    #[test]
    fn every_figure_of_the_process_is_shown() {
        let text = Process::default().render();
        for metric in METRICS {
            let line = text
                .lines()
                .find(|line| line.strip_prefix(metric.name).is_some_and(|rest| rest.starts_with([' ', '{'])));
            let value: f64 = line.unwrap().rsplit(' ').next().unwrap().parse().unwrap();
            assert!(value >= 0.0, "{line:?}");
        }
    }
}
