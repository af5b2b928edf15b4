//! What a person should act on, worst first: behind `/api/problems`, `headworks
//! status` and the gauges `headworks_problems`, `headworks_sink_works` and
//! `headworks_sink_lag_seconds`.
//!
//! A state (a sink that retries) is a problem for as long as it lasts. An event (a
//! message lost) is one for [`RECENT`], so that it is seen when nobody looked.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use futures_util::FutureExt;
use jiff::{SignedDuration, Timestamp};
use metrics::gauge;

use super::Host;
use super::status::is_stopped;
use crate::admin::{AtStake, PROBLEM_KINDS, Problem};
use crate::batch::Offset;
use crate::config::DEAD_LETTERS;
use crate::hints::{Hint, Hints, Letters};
use crate::pipeline::{OpenLetters, PipelineStatus, SinkStatus, State};
use crate::plugin::PluginState;
use crate::stream::{Read, Stall, Stream};
use crate::telemetry::{DiskSpace, Growth};

/// Time for which an event stays in the list.
const RECENT: Duration = Duration::from_secs(3_600);
/// Time between two looks, hence the resolution of `since`.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Counters whose growth is a problem: metric, the label that names the part, kind.
const EVENTS: [(&str, &str, &str); 3] = [
    ("headworks_stream_gap_messages_total", "stream", DAMAGED),
    ("headworks_pipeline_gap_messages_total", "pipeline", TRIMMED),
    ("headworks_mqtt_dropped_total", "cause", "dropped"),
];
/// Causes of gaps, and the labels of their counters: where the disk lost messages, and
/// whose messages retention removed.
const DAMAGED: &str = "damaged";
const TRIMMED: &str = "trimmed";
/// Gauge of the certificates of listeners, by file.
const CERTIFICATES: &str = "headworks_mqtt_certificate_seconds_left";
/// A certificate that ends within this is a problem.
const ENDS_SOON: Duration = Duration::from_secs(30 * 86_400);
/// Causes of `headworks_mqtt_dropped_total` that an operator can do something about.
const DROPS: [&str; 4] = ["no_space", "queue_full", "gap", "retained_full"];

/// Remembers since when each problem is there, and how counters grew.
#[derive(Default)]
pub struct Watch {
    /// By part and kind.
    since: Mutex<HashMap<(String, &'static str), Since>>,
    /// Room on the disk of the data folder, when it was looked at last.
    space: Mutex<Option<DiskSpace>>,
    /// By part, kind and all labels of the counter.
    growth: Mutex<BTreeMap<(String, &'static str, String), Growth>>,
    /// By pipeline and sink: the first message that is not committed, and when it was appended.
    oldest: Mutex<HashMap<(String, String), (Offset, SystemTime)>>,
    /// By pipeline: dead letters that nobody sent again, as of the last look.
    open_letters: Mutex<BTreeMap<String, u64>>,
    letters: tokio::sync::Mutex<Option<OpenLetters>>,
}

/// When a problem was first seen, on a clock that nobody sets, and on the other.
type Since = (Instant, Timestamp);

struct Found {
    part: String,
    kind: &'static str,
    cause: String,
    at_stake: AtStake,
    advice: String,
}

impl Host {
    /// Every problem of this moment, worst first.
    pub fn problems(&self) -> Vec<Problem> {
        let metrics = self.prometheus.render();
        self.count_events(&metrics);
        // What is not read from the disk is up to date.
        let _ = self.count_open_letters().now_or_never();
        let found = self.find(&metrics);
        let (now, time) = (Instant::now(), Timestamp::now());
        let mut since = lock(&self.watch.since);
        since.retain(|(part, kind), _| found.iter().any(|found| found.part == *part && found.kind == *kind));
        let named = found.into_iter().map(|found| {
            debug_assert!(PROBLEM_KINDS.contains(&found.kind), "{}", found.kind);
            let key = (found.part.clone(), found.kind);
            let (began, began_at) = *since.entry(key).or_insert((now, time));
            Problem {
                part: found.part,
                kind: found.kind.to_owned(),
                cause: found.cause,
                since: format!("{began_at:.3}"),
                seconds: (now - began).as_secs(),
                at_stake: found.at_stake,
                advice: found.advice,
            }
        });
        named.collect()
    }

    /// Looks regularly, so that `since` is true and the gauges move.
    pub async fn watch(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(LOOK_EVERY);
        let mut stalled = HashMap::new();
        loop {
            ticks.tick().await;
            self.say_stalls(&mut stalled);
            if let Some(space) = *lock(&self.watch.space) {
                gauge!("headworks_data_free_bytes").set(space.free as f64);
                gauge!("headworks_data_disk_bytes").set(space.total as f64);
            }
            let problems = self.problems();
            for kind in PROBLEM_KINDS {
                let count = problems.iter().filter(|problem| problem.kind == *kind).count();
                gauge!("headworks_problems", "kind" => *kind).set(count as f64);
            }
            for status in self.pipelines.iter().map(|pipeline| pipeline.status()) {
                for sink in &status.sinks {
                    let labels = [("pipeline", status.name.clone()), ("sink", sink.name.clone())];
                    let works = if sink.state == State::Running { 1.0 } else { 0.0 };
                    gauge!("headworks_sink_works", &labels).set(works);
                    let lag = self.oldest_age(&status, sink).unwrap_or_default();
                    gauge!("headworks_sink_lag_seconds", &labels).set(lag.as_secs_f64());
                }
            }
        }
    }

    /// Reads regularly what problems are told with and only a disk knows, which may not answer.
    pub async fn look_at_disks(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(LOOK_EVERY);
        loop {
            ticks.tick().await;
            let folder = self.data_dir.clone();
            let looked = tokio::task::spawn_blocking(move || DiskSpace::of(&folder).ok());
            *lock(&self.watch.space) = looked.await.ok().flatten();
            self.find_oldest().await;
            self.count_open_letters().await;
        }
    }

    /// Says which streams wait for a disk that does not answer, and when it has; `stalled` are
    /// those of the last call.
    fn say_stalls(&self, stalled: &mut HashMap<String, Instant>) {
        for stream in &self.streams {
            let (name, folder) = (stream.name(), self.data_folder());
            match (stream.stall(), stalled.contains_key(name)) {
                (Some(Stall { since, messages }), false) => {
                    stalled.insert(name.to_owned(), since);
                    let s = since.elapsed().as_secs();
                    tracing::warn!(stream = name, messages, folder = %folder.display(),
                        "the disk has not answered for {s} s: acknowledgements wait until it does");
                }
                (None, true) => {
                    let s = stalled.remove(name).map_or(0, |since| since.elapsed().as_secs());
                    tracing::info!(stream = name, "the disk answers again, after {s} s");
                }
                _ => {}
            }
        }
    }

    /// A problem began before it was looked for.
    fn remember(&self, key: (String, &'static str), since: Instant) {
        let began_at = Timestamp::now() - SignedDuration::from_secs(since.elapsed().as_secs() as i64);
        lock(&self.watch.since).entry(key).or_insert((since, began_at));
    }

    /// `metrics`: as they are served.
    fn find(&self, metrics: &str) -> Vec<Found> {
        let space = *lock(&self.watch.space);
        let mut found = Vec::new();
        for stream in &self.streams {
            found.extend(self.stream_problem(stream.as_ref(), space));
        }
        found.extend(space.filter(DiskSpace::is_low).map(|space| low_space(&self.data_folder(), space)));
        found.extend(self.recent_events());
        let open = lock(&self.watch.open_letters).clone();
        found.extend(open.into_iter().map(|(pipeline, count)| dead_letters(&pipeline, count, &self.hints)));
        for status in self.pipelines.iter().map(|pipeline| pipeline.status()) {
            found.extend(self.pipeline_problems(&status));
        }
        found.extend(self.plugin_problems());
        found.extend(certificate_problems(metrics));
        found
    }

    /// The data folder as a person in another folder can name it.
    fn data_folder(&self) -> PathBuf {
        std::path::absolute(&self.data_dir).unwrap_or_else(|_| self.data_dir.clone())
    }

    fn stream_problem(&self, stream: &dyn Stream, space: Option<DiskSpace>) -> Option<Found> {
        let part = format!("stream {}", stream.name());
        let at_stake = AtStake { free_bytes: space.map(|space| space.free), ..AtStake::default() };
        if is_stopped(stream) {
            let cause = "the stream has stopped: the disk refused a write or a sync".to_owned();
            let advice = "look at the log and the disk, then start the host again".to_owned();
            return Some(Found { part, kind: "stopped", cause, at_stake, advice });
        }
        let waits = match stream.name() {
            name if self.intake.iter().any(|intake| intake.name() == name) => {
                "devices wait for their acknowledgements, QoS 0 messages are dropped"
            }
            DEAD_LETTERS => "pipelines wait with what they reject",
            _ => "sessions, retained messages and wills wait",
        };
        if let Some(stall) = stream.stall() {
            self.remember((part.clone(), "stalled"), stall.since);
            let cause = format!("the disk does not answer: {waits}");
            let advice = format!(
                "look at the disk of {} and at the kernel's log; what waits goes on by itself once it answers",
                self.data_folder().display()
            );
            let at_stake = AtStake { messages: Some(stall.messages), ..at_stake };
            return Some(Found { part, kind: "stalled", cause, at_stake, advice });
        }
        let lack = stream.lack()?;
        let advice = lack.advice(&self.data_folder());
        let cause = format!("{lack}: {waits}");
        Some(Found { part, kind: "no_space", cause, at_stake, advice })
    }

    fn pipeline_problems(&self, status: &PipelineStatus) -> Vec<Found> {
        let mut found = Vec::new();
        let behind = AtStake { messages: Some(status.lag_messages()), ..AtStake::default() };
        if let Some((kind, cause)) = named(&status.state) {
            let advice = match kind {
                "holding" if status.wants_room => {
                    "mend what the cause names; what waits goes on by itself".to_owned()
                }
                "holding" => {
                    format!(
                        "`{}` shows the steps; mend the one that is named",
                        self.hints.command(Hint::PluginList)
                    )
                }
                _ => "mend the cause, then start the host again".to_owned(),
            };
            let part = format!("pipeline {}", status.name);
            found.push(Found { part, kind, cause: cause.to_owned(), at_stake: behind, advice });
        }
        if let Some(reason) = &status.swap_refused {
            found.push(Found {
                part: format!("pipeline {}", status.name),
                kind: "swap_refused",
                cause: format!("its new steps were refused, the ones before them run: {reason}"),
                at_stake: AtStake::default(),
                advice: "mend the plugin or its configuration; the change is tried again by itself"
                    .to_owned(),
            });
        }
        for sink in &status.sinks {
            let Some((kind, cause)) = named(&sink.state) else { continue };
            let advice = match kind {
                "retrying" => "mend what the cause names; the sink goes on by itself and loses nothing",
                _ => "mend what the cause names, then start the host again",
            };
            let at_stake = AtStake {
                messages: Some(sink.lag_messages),
                oldest_seconds: self.oldest_age(status, sink).map(|age| age.as_secs()),
                ..AtStake::default()
            };
            let part = format!("sink {}/{}", status.name, sink.name);
            let since = SystemTime::now().duration_since(sink.since).unwrap_or_default();
            if let Some(since) = Instant::now().checked_sub(since) {
                self.remember((part.clone(), kind), since);
            }
            found.push(Found { part, kind, cause: cause.to_owned(), at_stake, advice: advice.to_owned() });
        }
        found
    }

    fn plugin_problems(&self) -> Vec<Found> {
        let status = self.plugins.status().into_iter();
        let found = status.filter_map(|plugin| {
            let (kind, cause, advice) = match plugin.state {
                PluginState::Active | PluginState::Loading => return None,
                PluginState::Failed(reason) => {
                    let file = self.plugins_dir.join(&plugin.file);
                    let advice = format!(
                        "mend the file or take it away; `{}`",
                        self.hints.command(Hint::PluginInspect(&file))
                    );
                    ("plugin_failed", reason, advice)
                }
                PluginState::Removed(reason) => {
                    let advice = format!(
                        "put the file back, or let pipelines go on without it: `{}`",
                        self.hints.command(Hint::PluginRemove(&plugin.name))
                    );
                    ("plugin_removed", reason, advice)
                }
            };
            let part = format!("plugin {}", if plugin.file.is_empty() { &plugin.name } else { &plugin.file });
            Some(Found { part, kind, cause, at_stake: AtStake::default(), advice })
        });
        found.collect()
    }

    /// Counters of [`EVENTS`] as they are now.
    fn count_events(&self, metrics: &str) {
        let now = Instant::now();
        let mut growth = lock(&self.watch.growth);
        for line in metrics.lines() {
            for (metric, label, kind) in EVENTS {
                let Some((labels, value)) = line.strip_prefix(metric).and_then(|rest| rest.rsplit_once(' '))
                else {
                    continue;
                };
                let Some(name) = label_value(labels, label) else { continue };
                let is_other = match kind {
                    DAMAGED | TRIMMED => label_value(labels, "cause") != Some(kind),
                    _ => !DROPS.contains(&name),
                };
                if is_other {
                    continue;
                }
                let key = (name.to_owned(), kind, labels.to_owned());
                let value: f64 = value.parse().unwrap_or_default();
                growth.entry(key).or_insert_with(|| Growth::over(RECENT, now)).set(value as u64, now);
            }
        }
    }

    fn recent_events(&self) -> Vec<Found> {
        let mut sums: BTreeMap<(&'static str, String), u64> = BTreeMap::new();
        for ((name, kind, _), growth) in lock(&self.watch.growth).iter() {
            *sums.entry((*kind, name.clone())).or_default() += growth.recent();
        }
        let grown = sums.into_iter().filter(|(_, count)| *count > 0);
        let found = grown.map(|((kind, name), count)| event(kind, &name, count, &self.hints));
        found.collect()
    }

    /// Counts the dead letters that are open, unless that is under way.
    async fn count_open_letters(&self) {
        let Ok(mut counted) = self.watch.letters.try_lock() else { return };
        let Some(stream) = self.streams.iter().find(|stream| stream.name() == DEAD_LETTERS) else { return };
        let letters = counted.get_or_insert_with(|| OpenLetters::new(Arc::clone(stream)));
        match letters.look().await {
            Ok(open) => *lock(&self.watch.open_letters) = open,
            Err(error) => tracing::debug!(%error, "cannot count the dead letters, tries again"),
        }
    }

    /// Reads when the first message that a sink lacks was appended.
    async fn find_oldest(&self) {
        for status in self.pipelines.iter().map(|pipeline| pipeline.status()) {
            let Some(stream) = self.streams.iter().find(|stream| stream.name() == status.stream) else {
                continue;
            };
            for sink in &status.sinks {
                let key = (status.name.clone(), sink.name.clone());
                let known = lock(&self.watch.oldest).get(&key).map(|(offset, _)| *offset);
                let next = sink.next;
                if sink.lag_messages == 0 {
                    lock(&self.watch.oldest).remove(&key);
                    continue;
                }
                if known == Some(next) {
                    continue;
                }
                let mut cursor = stream.peek(next);
                while let Ok(Some(read)) = cursor.try_next().await {
                    if let Read::Batch(batch) = read {
                        let appended = SystemTime::UNIX_EPOCH + Duration::from_micros(batch.now_us);
                        lock(&self.watch.oldest).insert(key, (next, appended));
                        break;
                    }
                }
            }
        }
    }

    /// How long the oldest message waits that the sink has not committed.
    pub(super) fn oldest_age(&self, status: &PipelineStatus, sink: &SinkStatus) -> Option<Duration> {
        let key = (status.name.clone(), sink.name.clone());
        let (_, appended) = *lock(&self.watch.oldest).get(&key).filter(|_| sink.lag_messages > 0)?;
        SystemTime::now().duration_since(appended).ok()
    }
}

/// Part, cause and advice for messages that `headworks_mqtt_dropped_total` counts under `cause`.
fn dropped(cause: &str, messages: &str, hints: &Hints) -> (String, String, String) {
    let (part, why, advice) = match cause {
        "no_space" => (
            "publishers",
            "QoS 0, and their stream had no room",
            format!(
                "`{}` says what a stream lacks now; publish with QoS 1 what must not be lost",
                hints.command(Hint::Status)
            ),
        ),
        "retained_full" => (
            "retained messages",
            "not kept for new subscribers, because there are too many",
            "raise mqtt.retained_messages_max or mqtt.retained_bytes_max, or clear topics that nobody needs"
                .to_owned(),
        ),
        "gap" => (
            "subscribers",
            "damaged on disk, or removed by retention while they waited in a queue",
            "look at the log and the disk, or raise retention of the stream or mqtt.queue_copies_bytes_max"
                .to_owned(),
        ),
        _ => (
            "subscribers",
            "their queue was full",
            format!("`{}` shows whose they were", hints.command(Hint::ClientsMissed)),
        ),
    };
    (format!("{part} ({cause})"), format!("{messages} dropped within the last hour: {why}"), advice)
}

/// What happened within [`RECENT`], by the kind that [`EVENTS`] gives it.
fn event(kind: &'static str, name: &str, count: u64, hints: &Hints) -> Found {
    let messages = if count == 1 { "1 message was".to_owned() } else { format!("{count} messages were") };
    let (part, kind, cause, advice) = match kind {
        DAMAGED => (
            format!("stream {name}"),
            "gap",
            format!("{messages} found damaged on disk within the last hour, and cannot be read"),
            "look at the disk; the log names the offsets".to_owned(),
        ),
        TRIMMED => (
            format!("pipeline {name}"),
            "gap",
            format!("{messages} removed by retention within the last hour before the pipeline read them"),
            "mend the sink that lags, or raise retention of the stream; the log names the offsets".to_owned(),
        ),
        _ => {
            let (part, cause, advice) = dropped(name, &messages, hints);
            (part, "dropped", cause, advice)
        }
    };
    let at_stake = AtStake { messages: Some(count), ..AtStake::default() };
    Found { part, kind, cause, at_stake, advice }
}

fn dead_letters(pipeline: &str, count: u64, hints: &Hints) -> Found {
    let letters = Letters::OfPipeline(pipeline);
    let messages = match count {
        1 => "1 message is a dead letter".to_owned(),
        count => format!("{count} messages are dead letters"),
    };
    Found {
        part: format!("pipeline {pipeline}"),
        kind: "dead_letters",
        cause: format!("{messages}: rejected, and not sent again"),
        at_stake: AtStake { messages: Some(count), ..AtStake::default() },
        advice: format!(
            "`{}` shows the reasons, `{}` sends them again once the cause is mended",
            hints.command(Hint::DeadLettersSummary(letters)),
            hints.command(Hint::Redrive(letters)),
        ),
    }
}

fn certificate_problems(metrics: &str) -> Vec<Found> {
    let lines = metrics.lines().filter_map(|line| line.strip_prefix(CERTIFICATES)?.rsplit_once(' '));
    let ending = lines.filter_map(|(labels, seconds)| {
        let (file, seconds) = (label_value(labels, "file")?, seconds.parse::<f64>().ok()?);
        let days = (seconds / 86_400.0).floor();
        let cause = if seconds <= 0.0 {
            "the certificate has ended: clients are turned away".to_owned()
        } else if seconds < ENDS_SOON.as_secs_f64() {
            format!("the certificate ends within {} days", days + 1.0)
        } else {
            return None;
        };
        Some(Found {
            part: format!("certificate {file}"),
            kind: "certificate",
            cause,
            at_stake: AtStake::default(),
            advice: format!("put a new certificate into {file}; it is taken while the host runs"),
        })
    });
    ending.collect()
}

fn low_space(data_dir: &Path, space: DiskSpace) -> Found {
    Found {
        part: format!("disk of {}", data_dir.display()),
        kind: "low_space",
        cause: "little room is left: where none is left, devices wait for their acknowledgements".to_owned(),
        at_stake: AtStake { free_bytes: Some(space.free), ..AtStake::default() },
        advice: "free space, or lower retention.max_bytes of the streams".to_owned(),
    }
}

/// Kind and cause of a state that a person should act on.
fn named(state: &State) -> Option<(&'static str, &str)> {
    match state {
        State::Starting | State::Running => None,
        State::Holding(reason) => Some(("holding", reason)),
        State::Retrying(reason) => Some(("retrying", reason)),
        State::Stopped(reason) => Some(("stopped", reason)),
    }
}

/// Of `{stream="telemetry",cause="damaged"}`; names hold no quotes.
pub(super) fn label_value<'l>(labels: &'l str, name: &str) -> Option<&'l str> {
    let pairs = labels.strip_prefix('{')?.strip_suffix('}')?;
    pairs.split(',').find_map(|pair| pair.strip_prefix(name)?.strip_prefix("=\"")?.strip_suffix('"'))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_lost_messages_is_told_by_what_dropped_them() {
        let part = |cause| dropped(cause, "7 messages were", &Hints::default()).0;
        let found = DROPS.map(part);
        let wanted = [
            "publishers (no_space)",
            "subscribers (queue_full)",
            "subscribers (gap)",
            "retained messages (retained_full)",
        ];
        assert_eq!(found, wanted);
    }

    #[test]
    fn a_gap_says_whether_the_disk_or_retention_lost_the_messages_and_to_whom() {
        let said = |kind| {
            let found = event(kind, "telemetry", 2_000, &Hints::default());
            assert_eq!(found.kind, "gap");
            found.part + ": " + &found.cause
        };
        let damaged = "stream telemetry: 2000 messages were found damaged on disk";
        let trimmed = "pipeline telemetry: 2000 messages were removed by retention";
        assert!(said(DAMAGED).starts_with(damaged) && said(TRIMMED).starts_with(trimmed));
    }

    #[test]
    fn a_certificate_is_a_problem_a_month_before_it_ends() {
        let line = |file: &str, days: f64| format!("{CERTIFICATES}{{file=\"{file}\"}} {}\n", days * 86_400.0);
        let metrics = line("server.pem", 6.5) + &line("ca.pem", 400.0) + &line("old.pem", -0.1);
        let found = certificate_problems(&format!("# TYPE {CERTIFICATES} gauge\n{metrics}"));
        let said: Vec<_> = found.iter().map(|found| (&*found.part, &*found.cause)).collect();
        let wanted = [
            ("certificate server.pem", "the certificate ends within 7 days"),
            ("certificate old.pem", "the certificate has ended: clients are turned away"),
        ];
        assert_eq!(said, wanted);
    }
}
