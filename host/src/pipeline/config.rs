//! A pipeline as people write it: the stream it reads, its steps, where the
//! routes lead.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::plugin::StepConfig;
use crate::problems::{KeyPath, Problems};
use crate::units::{ByteSize, Period};

/// The route of messages that no step routed.
pub const DEFAULT_ROUTE: &str = "default";
/// In place of a sink: the message ends here, counted.
pub const DROP: &str = "drop";

const WORKERS_MAX: u16 = 256;
const BATCH_MESSAGES_MAX: u32 = 65_536;
const RETRIES_MAX: u32 = 1_000;
/// A dead letter names them all at most, in its properties.
const SINKS_MAX: usize = 64;

/// A pipeline reads one stream, runs steps over its messages, and delivers the results to the sinks of
/// its routes.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The stream to read. If unset: the stream with the pipeline's name, otherwise the only stream.
    pub from: String,
    /// The steps, in order. If unset: the plugins of the plugins folder, ordered by the numbers in their
    /// file names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<Vec<StepConfig>>,
    /// Maps each route to a sink, a stream, several of them, or `drop`. `default` takes messages that no
    /// step routed. If a stream and a sink have the same name, the sink is meant. If the routes lead to more
    /// than one sink, the steps write to the stream `PIPELINE.out`, which each sink reads; `streams` may
    /// configure it under that name.
    pub routes: BTreeMap<String, RouteTarget>,
    /// A stream that also receives every message whose route does not lead to `drop`, as the steps left
    /// it, starting with the first start of the host that has this key. Other pipelines read the stream
    /// with `from`; if it has a `topic_prefix`, MQTT clients can subscribe to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// Number of threads that run the steps. If unset: the number of cores, at most 256.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workers: Option<u16>,
    /// Most messages in one call of a step.
    pub batch_messages_max: u32,
    /// Most bytes that are read and have not passed the steps.
    pub read_ahead_bytes_max: ByteSize,
    /// Most bytes that are queued for one sink. Beyond this, the pipeline waits.
    pub sink_queue_bytes_max: ByteSize,
    /// How batches are retried that a step asks to run again later.
    pub retries: Retries,
    /// How a failing sink is retried. Retries never end.
    pub sink_backoff: Backoff,
    /// A sink that delays the other sinks for longer gets a reader of its own.
    pub lag_after: Period,
    /// How often positions advance when no message becomes a row.
    pub progress_every: Period,
    /// A sink that rejects more than this share of at least 1,000 rows, or 20 consecutive rows with one
    /// error code of its database, pauses for a while after the rejected rows are in dead letters. Most
    /// often the cause is a wrong column or plugin, and not the data. 1 turns this off.
    pub refusals_max_share: f64,
    /// Time that messages in flight have to reach the sinks at a shutdown. Other messages are delivered
    /// after the next start.
    pub drain_max: Period,
    /// Former name of this pipeline. Its sinks continue at the positions of the pipeline with that name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub renamed_from: Option<String>,
}

/// One sink or stream, several of them, or `drop`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum RouteTarget {
    One(String),
    Several(Vec<String>),
}

/// How often, and how far apart.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Retries {
    /// Runs of a batch after the first. After that, its messages become dead letters.
    pub max: u32,
    /// Wait before the first retry. It is doubled for each further retry.
    pub backoff_min: Period,
    /// The longest wait between retries.
    pub backoff_max: Period,
}

/// Waits between tries, doubled each time, with jitter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Backoff {
    /// The first wait between tries.
    pub min: Period,
    /// The longest wait between tries.
    pub max: Period,
}

impl RouteTarget {
    /// Names of the sinks and streams; none: drop.
    pub fn sinks(&self) -> &[String] {
        let names = match self {
            Self::One(name) => std::slice::from_ref(name),
            Self::Several(names) => names,
        };
        if matches!(names, [one] if one == DROP) { &[] } else { names }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            from: "telemetry".to_owned(),
            steps: None,
            routes: BTreeMap::new(),
            to: None,
            workers: None,
            batch_messages_max: 1_024,
            read_ahead_bytes_max: ByteSize::mib(16),
            sink_queue_bytes_max: ByteSize::mib(32),
            retries: Retries::default(),
            sink_backoff: Backoff::default(),
            lag_after: Period(Duration::from_secs(2)),
            progress_every: Period(Duration::from_secs(1)),
            refusals_max_share: 0.5,
            drain_max: Period(Duration::from_secs(10)),
            renamed_from: None,
        }
    }
}

impl Default for Retries {
    fn default() -> Self {
        Self {
            max: 10,
            backoff_min: Period(Duration::from_millis(50)),
            backoff_max: Period(Duration::from_secs(5)),
        }
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self { min: Period(Duration::from_millis(100)), max: Period(Duration::from_secs(15)) }
    }
}

impl Config {
    /// Threads, with the default in place.
    pub fn worker_count(&self) -> u16 {
        self.workers.unwrap_or_else(|| {
            std::thread::available_parallelism().map_or(1, |n| n.get().min(usize::from(WORKERS_MAX)) as u16)
        })
    }

    /// Every sink that a route names, and every stream that the pipeline writes to, each once, in the order
    /// of names.
    pub fn sinks(&self) -> BTreeSet<&str> {
        self.routes.values().flat_map(|target| self.targets(target)).map(String::as_str).collect()
    }

    /// What a route leads to: its target, and the stream of `to` unless the target is `drop`.
    pub fn targets<'c>(&'c self, target: &'c RouteTarget) -> impl Iterator<Item = &'c String> {
        let named = target.sinks();
        let to = self.to.as_ref().filter(|to| !named.is_empty() && !named.contains(to));
        named.iter().chain(to)
    }

    /// Pure. That the stream and the sinks exist is checked where they are known.
    pub fn validate(&self, path: &KeyPath, problems: &mut Problems) {
        if self.from.is_empty() {
            problems.add(path.key("from"), "must name a stream");
        }
        if self.to.as_deref() == Some("") {
            problems.add(path.key("to"), "must name a stream");
        }
        self.validate_routes(&path.key("routes"), problems);
        if let Some(workers) = self.workers {
            range(path.key("workers"), u64::from(workers), 1, u64::from(WORKERS_MAX), problems);
        }
        range(
            path.key("batch_messages_max"),
            u64::from(self.batch_messages_max),
            1,
            u64::from(BATCH_MESSAGES_MAX),
            problems,
        );
        let bytes = (64 << 10, 16 << 30);
        range(path.key("read_ahead_bytes_max"), self.read_ahead_bytes_max.0, bytes.0, bytes.1, problems);
        range(path.key("sink_queue_bytes_max"), self.sink_queue_bytes_max.0, bytes.0, bytes.1, problems);
        range(
            path.key("retries").key("max"),
            u64::from(self.retries.max),
            0,
            u64::from(RETRIES_MAX),
            problems,
        );
        ordered(
            path.key("retries").key("backoff_max"),
            self.retries.backoff_min,
            self.retries.backoff_max,
            problems,
        );
        ordered(path.key("sink_backoff").key("max"), self.sink_backoff.min, self.sink_backoff.max, problems);
        if self.progress_every.0 < Duration::from_millis(1) {
            problems
                .add(path.key("progress_every"), format!("must be at least 1ms, is {}", self.progress_every));
        }
        if self.lag_after.0 < Duration::from_millis(10) {
            problems.add(path.key("lag_after"), format!("must be at least 10ms, is {}", self.lag_after));
        }
        if !(0.0..=1.0).contains(&self.refusals_max_share) {
            problems.add(
                path.key("refusals_max_share"),
                format!("must be 0 to 1, is {}", self.refusals_max_share),
            );
        }
    }

    fn validate_routes(&self, path: &KeyPath, problems: &mut Problems) {
        if !self.routes.contains_key(DEFAULT_ROUTE) {
            problems.add(
                path.key(DEFAULT_ROUTE),
                "must be set: the sink or stream of messages that no step routed, or `drop`",
            );
        }
        for (route, target) in &self.routes {
            let names = match target {
                RouteTarget::One(name) => std::slice::from_ref(name),
                RouteTarget::Several(names) => names,
            };
            if names.is_empty() || names.iter().any(String::is_empty) {
                problems.add(path.key(route), "must name a sink or a stream, or be `drop`");
            }
            if names.len() > 1 && names.iter().any(|name| name == DROP) {
                problems.add(path.key(route), "`drop` stands alone");
            }
            if (1..names.len()).any(|i| names[..i].contains(&names[i])) {
                problems.add(path.key(route), "names a sink or a stream twice");
            }
        }
        let sinks = self.sinks().len();
        if sinks > SINKS_MAX {
            problems.add(
                path.clone(),
                format!("must lead to at most {SINKS_MAX} sinks and streams, lead to {sinks}"),
            );
        }
    }
}

impl Backoff {
    /// The wait before try `attempt` (0: the first after a failure): doubled each
    /// time up to the longest, then between half and all of it, so that many
    /// hosts do not return at once.
    pub fn delay(&self, attempt: u32) -> Duration {
        let full = self.min.0.saturating_mul(1 << attempt.min(20)).min(self.max.0);
        let share = 0.5 + f64::from(uuid::Uuid::new_v4().as_bytes()[0]) / 510.0;
        full.mul_f64(share)
    }
}

fn range(path: KeyPath, value: u64, min: u64, max: u64, problems: &mut Problems) {
    if value < min || value > max {
        problems.add(path, format!("must be {min} to {max}, is {value}"));
    }
}

fn ordered(path: KeyPath, min: Period, max: Period, problems: &mut Problems) {
    if min.0.is_zero() || max.0 < min.0 {
        problems.add(path, format!("must be at least the shortest wait {min}, which is above 0; is {max}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_problem_is_found_at_once() {
        let config = Config {
            from: String::new(),
            routes: [("alert".to_owned(), RouteTarget::Several(vec!["a".into(), "a".into(), "drop".into()]))]
                .into(),
            workers: Some(0),
            batch_messages_max: 0,
            refusals_max_share: 2.0,
            ..Config::default()
        };
        let mut problems = Problems::default();
        config.validate(&KeyPath::root().key("pipelines").key("p"), &mut problems);
        let paths: Vec<_> = problems.into_vec().into_iter().map(|p| p.path.as_str().to_owned()).collect();
        for key in
            ["from", "routes.default", "routes.alert", "workers", "batch_messages_max", "refusals_max_share"]
        {
            assert!(paths.contains(&format!("pipelines.p.{key}")), "{key} in {paths:?}");
        }
    }

    #[test]
    fn the_sinks_of_a_pipeline_are_bounded() {
        let lead_to = |sinks: usize| {
            let names = RouteTarget::Several((0..sinks).map(|n| format!("s{n}")).collect());
            let config = Config { routes: [(DEFAULT_ROUTE.to_owned(), names)].into(), ..Config::default() };
            let mut problems = Problems::default();
            config.validate(&KeyPath::root(), &mut problems);
            problems.into_vec().into_iter().map(|problem| problem.message).collect::<Vec<_>>()
        };
        assert!(lead_to(SINKS_MAX).is_empty());
        assert_eq!(lead_to(SINKS_MAX + 1), ["must lead to at most 64 sinks and streams, lead to 65"]);
    }

    #[test]
    fn a_route_names_a_sink_several_or_drop() {
        let config: Config = serde_json::from_str(
            r#"{"from": "t", "routes": {"default": "w", "alert": ["w", "alerts"], "noise": "drop"}}"#,
        )
        .unwrap();
        assert_eq!(config.sinks().into_iter().collect::<Vec<_>>(), ["alerts", "w"]);
        assert!(config.routes["noise"].sinks().is_empty());
        let mut problems = Problems::default();
        config.validate(&KeyPath::root(), &mut problems);
        assert!(problems.is_empty());
    }

    #[test]
    fn what_no_route_drops_also_goes_to_the_stream_of_to() {
        let config: Config = serde_json::from_str(
            r#"{"from": "t", "to": "clean", "routes": {"default": "w", "clean": ["clean", "a"], "noise": "drop"}}"#,
        )
        .unwrap();
        let leads_to = |route: &str| config.targets(&config.routes[route]).cloned().collect::<Vec<_>>();
        assert_eq!(leads_to("default"), ["w", "clean"]);
        assert_eq!(leads_to("clean"), ["clean", "a"]);
        assert_eq!(leads_to("noise"), [""; 0]);
        assert_eq!(config.sinks().into_iter().collect::<Vec<_>>(), ["a", "clean", "w"]);
    }

    #[test]
    fn waits_grow_to_a_bound_with_jitter() {
        let backoff = Backoff::default();
        for attempt in 0..64 {
            let delay = backoff.delay(attempt);
            assert!(delay >= backoff.min.0 / 2 && delay <= backoff.max.0, "{attempt}: {delay:?}");
        }
    }
}
