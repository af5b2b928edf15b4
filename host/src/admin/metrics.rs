//! The list of all metrics of the host, for `/metrics`, for the reference page, and for the test that
//! every emitted metric has a description.

use std::collections::BTreeSet;
use std::fmt::Write;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use crate::telemetry::{self, BYTES, COUNTS, Metric, MetricKind, SECONDS};
use crate::{listeners, pipeline, plugin, stream};

/// The lists of all modules.
pub const ALL: &[&[Metric]] = &[
    super::METRICS,
    listeners::http::METRICS,
    listeners::mqtt::METRICS,
    pipeline::METRICS,
    plugin::METRICS,
    stream::log::METRICS,
    telemetry::METRICS,
];

/// Returns every metric, in the order of the modules' lists.
pub fn all() -> impl Iterator<Item = &'static Metric> {
    ALL.iter().copied().flatten()
}

/// Installs the recorder of the process, before any metric is used. Returns `None` if a recorder is
/// already installed.
pub fn install() -> Option<PrometheusHandle> {
    let recorder = builder().build_recorder();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder).ok()?;
    begin();
    Some(handle)
}

/// Registers and describes every metric with the installed recorder.
pub(super) fn begin() {
    describe();
    register();
}

/// Creates the counters that have no labels, so that they exist at 0: an alert on an increase misses a
/// counter that begins at 1. Other modules do the same for known label values. Metrics of the process
/// are left out, because they are rendered separately and would be shown twice.
fn register() {
    let is_of_process = |name| telemetry::METRICS.iter().any(|metric| metric.name == name);
    let is_bare = |metric: &&Metric| metric.kind == MetricKind::Counter && metric.labels.is_empty();
    for Metric { name, .. } in all().filter(is_bare).filter(|metric| !is_of_process(metric.name)) {
        metrics::counter!(*name).increment(0);
    }
}

pub(crate) fn builder() -> PrometheusBuilder {
    let buckets = "the buckets are not empty";
    PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), SECONDS)
        .expect(buckets)
        .set_buckets_for_metric(Matcher::Suffix("_bytes".to_owned()), BYTES)
        .expect(buckets)
        .set_buckets(COUNTS)
        .expect(buckets)
}

/// Passes the description of every metric to the installed recorder.
fn describe() {
    for metric in all() {
        match metric.kind {
            MetricKind::Counter => metrics::describe_counter!(metric.name, metric.help),
            MetricKind::Gauge => metrics::describe_gauge!(metric.name, metric.help),
            MetricKind::Histogram => metrics::describe_histogram!(metric.name, metric.help),
        }
    }
}

/// Returns the names in a rendered exposition that are in no list, and those that are listed as another
/// kind, each as `name` or `name is a gauge, listed as counter`.
pub fn undescribed(rendered: &str) -> Vec<String> {
    let mut wrong = BTreeSet::new();
    for line in rendered.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let (name, kind) = line.split_once(' ').unwrap_or((line, ""));
        match all().find(|metric| metric.name == name) {
            None => {
                wrong.insert(name.to_owned());
            }
            Some(metric) if metric.kind.as_str() != kind => {
                wrong.insert(format!("{name} is a {kind}, listed as {}", metric.kind.as_str()));
            }
            Some(_) => {}
        }
    }
    wrong.into_iter().collect()
}

/// Returns the reference page `METRICS.md`.
pub fn docs() -> String {
    let mut page = "# Metrics\n\n\
        The admin address serves these metrics at `/metrics` in the Prometheus text format. A counter whose label values are\n\
        known exists from the start, with the value 0. [monitoring.md](docs/monitoring.md) has alerts.\n\n\
        | name | type | labels | meaning |\n| --- | --- | --- | --- |\n"
        .to_owned();
    let mut metrics: Vec<&Metric> = all().collect();
    metrics.sort_by_key(|metric| metric.name);
    for Metric { name, kind, help, labels } in metrics {
        let _ = writeln!(page, "| `{name}` | {} | {} | {help} |", kind.as_str(), labels.join(", "));
    }
    page += crate::telemetry::MADE_FROM;
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_carry_their_units() {
        let mut names = BTreeSet::new();
        for metric in all() {
            assert!(names.insert(metric.name), "{} is listed twice", metric.name);
            assert!(
                metric.name.starts_with("headworks_") || metric.name.starts_with("process_"),
                "{metric:?}"
            );
            let is_total = metric.name.ends_with("_total");
            assert_eq!(
                is_total,
                metric.kind == MetricKind::Counter,
                "{}: counters end in _total",
                metric.name
            );
            assert!(!metric.help.is_empty() && !metric.help.contains(['\n', '|']), "{metric:?}");
        }
    }

    #[test]
    fn alerts_name_metrics_that_there_are_and_each_is_explained() {
        let (page, rules) = (include_str!("../../docs/monitoring.md"), include_str!("../../docs/alerts.yml"));
        let words = || {
            [page, rules]
                .into_iter()
                .flat_map(|text| text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')))
        };
        let named: BTreeSet<&str> =
            words().filter(|word| word.starts_with("headworks_") || word.starts_with("process_")).collect();
        let known: BTreeSet<&str> = all().map(|metric| metric.name).collect();
        assert!(named.len() > 10);
        assert_eq!(Vec::from_iter(named.difference(&known)), [&""; 0]);

        let rules = crate::yaml::to_json(rules).unwrap();
        let rules = rules["groups"][0]["rules"].as_array().unwrap();
        let alerts: BTreeSet<_> = rules.iter().map(|rule| rule["alert"].as_str().unwrap()).collect();
        assert!(
            rules.iter().all(|rule| rule["expr"].is_string() && rule["annotations"]["summary"].is_string())
        );
        let lines = page.lines().filter(|line| line.starts_with("| Headworks"));
        let mut explained = Vec::new();
        let mut twins = BTreeSet::new();
        for cells in lines.map(|line| line.split('|').map(str::trim).collect::<Vec<_>>()) {
            let [_, alert, problem, ..] = cells[..] else { panic!("{cells:?}") };
            explained.push(alert.to_owned());
            twins.extend(problem.split('`').skip(1).step_by(2));
            // A host that does not run tells no problems.
            let has_twin =
                problem.starts_with('`') || ["HeadworksDown", "HeadworksRestarts"].contains(&alert);
            assert!(has_twin, "{alert}: {problem}");
        }
        assert_eq!(twins, super::super::PROBLEM_KINDS.iter().copied().collect(), "each kind has its alert");
        assert_eq!(BTreeSet::from_iter(explained.iter().map(String::as_str)), alerts);
    }

    /// A counter that is more than 0 when it is first asked for has no increase.
    #[test]
    fn what_happens_before_the_first_scrape_is_an_alert_too() {
        let rules = include_str!("../../docs/alerts.yml");
        for kind in ["gap", "dead_letters", "faults", "skipped", "ignored", "withheld"] {
            let wanted = format!("expr: headworks_problems{{kind=\"{kind}\"}} > 0\n");
            assert!(rules.contains(&wanted), "{kind}");
        }
    }

    #[test]
    fn a_metric_that_no_list_has_is_found() {
        let recorder = builder().build_recorder();
        let rendered = metrics::with_local_recorder(&recorder, || {
            describe();
            metrics::counter!("headworks_stranger_total").increment(1);
            metrics::counter!("process_open_fds").increment(1);
            metrics::histogram!("headworks_delay_seconds").record(0.2);
            recorder.handle().render()
        });
        assert_eq!(
            undescribed(&rendered),
            [
                "headworks_delay_seconds",
                "headworks_stranger_total",
                "process_open_fds is a counter, listed as gauge"
            ]
        );
        assert!(rendered.contains("headworks_delay_seconds_bucket{le=\"0.25\"} 1"), "{rendered}");
        assert!(rendered.contains("# HELP process_open_fds Number of open file descriptors"), "{rendered}");
    }

    #[test]
    fn the_reference_page_is_in_step() {
        crate::config::reference::in_step("METRICS.md", &docs());
    }
}
