//! What a person should act on, worst first: behind `/api/problems`, `headworks
//! status` and the gauges `headworks_problems`, `headworks_sink_works` and
//! `headworks_sink_lag_seconds`.
//!
//! A state (a sink that retries) is a problem for as long as it lasts. An event (a
//! message lost) is one for [`RECENT`], so that it is seen when nobody looked.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use futures_util::FutureExt;
use jiff::{SignedDuration, Timestamp};
use metrics::gauge;

use super::Host;
use super::advice;
use super::disks::{self, Disk, Disks};
use super::events::{self, EVENTS};
use super::oldest::Oldest;
use super::said::Said;
use super::status::is_stopped;
use super::unconfigured::{self, Unconfigured};
use crate::admin::{AtStake, PROBLEM_KINDS, Problem, problem_rank};
use crate::config::DEAD_LETTERS;
use crate::hints::{Hint, Hints, Letters};
use crate::listeners::mqtt::ContendedId;
use crate::pipeline::{OpenCount, OpenLetters, PipelineStatus, SinkStatus, State, letters_gone};
use crate::plugin::PluginState;
use crate::stream::{Lack, Slow, Stall, Stream};
use crate::telemetry::{DiskSpace, Growth, Standing};
use crate::units::ByteSize;

/// Time for which an event stays in the list.
const RECENT: Duration = Duration::from_secs(3_600);
/// Time between two looks, hence the resolution of `since`.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// A pipeline that has not begun within this is a problem.
const STARTS_WITHIN: Duration = Duration::from_secs(30);
/// A sink that works is late where its oldest message waits longer.
const LATE: Duration = Duration::from_secs(300);
/// Messages that wait in the queues of all subscribers past which somebody should look.
const QUEUED_MANY: u64 = 100_000;
/// Looks between two that count what waits in all sessions.
const MEASURED_EVERY: u32 = 15;

/// Remembers since when each problem is there, and how counters grew.
#[derive(Default)]
pub struct Watch {
    /// By part and kind.
    since: Mutex<HashMap<(String, &'static str), Since>>,
    /// The disks as the last look found them.
    disks: Mutex<Disks>,
    /// By part, kind and all labels of the counter.
    growth: Mutex<BTreeMap<(String, &'static str, String), Growth>>,
    unconfigured: Mutex<Vec<Unconfigured>>,
    oldest: Oldest,
    /// By pipeline: dead letters that nobody sent again, as of the last look.
    open_letters: Mutex<BTreeMap<String, OpenCount>>,
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
        let (mut stalled, mut said) = (HashMap::new(), Said::default());
        for number in (0..MEASURED_EVERY).cycle() {
            ticks.tick().await;
            if number == 0 {
                self.clients.measure();
            }
            self.say_stalls(&mut stalled);
            if let Some(space) = lock(&self.watch.disks).data() {
                gauge!("headworks_data_free_bytes").set(space.free as f64);
                gauge!("headworks_data_disk_bytes").set(space.total as f64);
            }
            let problems = self.problems();
            said.say(&problems);
            for kind in PROBLEM_KINDS {
                let count = problems.iter().filter(|problem| problem.kind == *kind).count();
                gauge!("headworks_problems", "kind" => *kind).set(count as f64);
            }
            for status in self.pipelines.iter().map(|pipeline| pipeline.status()) {
                for sink in &status.sinks {
                    let labels = [("pipeline", status.name.clone()), ("sink", sink.name.clone())];
                    let works = if status.works(sink) { 1.0 } else { 0.0 };
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
            let host = Arc::clone(&self);
            let looked = tokio::task::spawn_blocking(move || {
                let folders =
                    host.streams.iter().map(|stream| (host.stream_folder(stream.name()), &**stream));
                host.held.look(&host.failures, folders);
                host.forget_removed_streams();
                let streams = host.streams.iter().map(|stream| stream.name().to_owned());
                let folders = streams.map(|name| (name.clone(), host.stream_folder(&name)));
                Disks::look(host.data_folder(), folders)
            });
            *lock(&self.watch.disks) = looked.await.unwrap_or_default();
            self.find_oldest().await;
            self.count_open_letters().await;
        }
    }

    /// Says which streams are in the data folder and not in the config.
    pub async fn look_for_unconfigured(self: Arc<Self>) {
        let host = Arc::clone(&self);
        let found = tokio::task::spawn_blocking(move || {
            let is_open = |name: &str| host.streams.iter().any(|stream| stream.name() == name);
            unconfigured::find(&host.data_folder(), is_open)
        });
        match found.await {
            Ok(Ok(found)) => {
                for stream in &found {
                    tracing::warn!(stream = stream.name, "{}; {}", stream.cause(), stream.advice());
                }
                *lock(&self.watch.unconfigured) = found;
            }
            Ok(Err(error)) => tracing::warn!(%error, "cannot list the folders of streams"),
            Err(_) => {}
        }
    }

    /// Asks the disk while no lock is held that others wait for.
    fn forget_removed_streams(&self) {
        let mut gone = lock(&self.watch.unconfigured).clone();
        gone.retain(|stream| !stream.folder.exists());
        lock(&self.watch.unconfigured).retain(|stream| !gone.contains(stream));
    }

    /// Says which streams wait for a disk that does not answer, or answers late, and when it is fast again;
    /// `stalled` are those of the last call.
    fn say_stalls(&self, stalled: &mut HashMap<String, Instant>) {
        for stream in &self.streams {
            let (name, folder) = (stream.name(), self.stream_folder(stream.name()));
            let is_bad = stream.stall().is_some() || stream.slow().is_some();
            match (stream.stall(), stalled.contains_key(name)) {
                (Some(Stall { since, messages }), false) => {
                    stalled.insert(name.to_owned(), since);
                    let s = since.elapsed().as_secs();
                    let waits = self.waits_for(name);
                    tracing::warn!(stream = name, messages, folder = %folder.display(),
                        "the disk has not answered for {s} s: {waits} until it does");
                }
                (None, false) if is_bad => {
                    let Some(Slow { since, longest }) = stream.slow() else { continue };
                    stalled.insert(name.to_owned(), since);
                    let waits = self.waits_for(name);
                    tracing::warn!(stream = name, folder = %folder.display(),
                        "the disk is slow: a write or a sync takes up to {:.1} s, and {waits} for so long",
                        longest.as_secs_f64());
                }
                (None, true) if !is_bad => {
                    let s = stalled.remove(name).map_or(0, |since| since.elapsed().as_secs());
                    tracing::info!(stream = name, "the disk answers in time again, after {s} s");
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

    /// A problem began when something was appended: microseconds since 1970, UTC.
    fn began(&self, problem: &Found, append_us: u64) {
        let appended = SystemTime::UNIX_EPOCH + Duration::from_micros(append_us);
        let ago = SystemTime::now().duration_since(appended).unwrap_or_default();
        let Some(since) = Instant::now().checked_sub(ago) else { return };
        let began_at = Timestamp::try_from(appended).unwrap_or_default();
        lock(&self.watch.since).insert((problem.part.clone(), problem.kind), (since, began_at));
    }

    /// `metrics`: as they are served.
    fn find(&self, metrics: &str) -> Vec<Found> {
        let disks = lock(&self.watch.disks).clone();
        let mut found = Vec::new();
        for stream in &self.streams {
            found.extend(self.stream_problem(stream.as_ref(), disks.of_stream(stream.name())));
            found.extend(read_problem(stream.as_ref()));
        }
        found.extend(disks.low().into_iter().map(low_space));
        found.extend(self.recent_events());
        let open = lock(&self.watch.open_letters).clone();
        for (pipeline, open) in open {
            let problem = dead_letters(&pipeline, &open, &self.hints);
            self.began(&problem, open.since_us);
            found.push(problem);
        }
        found.extend(self.standing_problems());
        for status in self.pipelines.iter().map(|pipeline| pipeline.status()) {
            found.extend(self.pipeline_problems(&status));
        }
        found.extend(lock(&self.watch.unconfigured).iter().map(unconfigured_stream));
        found.extend(self.plugin_problems());
        found.extend(takeovers(&self.clients.contended(), &self.hints));
        found.extend(self.gauge_problems(metrics));
        found.sort_by_key(|found| problem_rank(found.kind));
        found
    }

    /// The data folder as a person in another folder can name it.
    fn data_folder(&self) -> PathBuf {
        std::path::absolute(&self.data_dir).unwrap_or_else(|_| self.data_dir.clone())
    }

    fn stream_folder(&self, name: &str) -> PathBuf {
        // One that a pipeline had between its steps and its sinks is not in the config any more.
        let is_left_over = name.contains('.');
        let is_configured = self.takes_messages(name) || self.written.contains(name) || is_left_over;
        disks::stream_folder(&self.data_dir, name, is_configured)
    }

    /// Whether devices' messages come into the stream of this name.
    pub(super) fn takes_messages(&self, name: &str) -> bool {
        self.intake.contains(name)
    }

    /// Says what waits while a stream takes no appends.
    pub(super) fn waits_for(&self, name: &str) -> &'static str {
        match self.written.contains(name) {
            true if !self.takes_messages(name) => "the pipelines that write to it wait",
            _ => advice::waits_for(name, self.takes_messages(name)),
        }
    }

    fn stream_problem(&self, stream: &dyn Stream, space: Option<DiskSpace>) -> Option<Found> {
        let part = format!("stream {}", stream.name());
        let at_stake = space.map(room).unwrap_or_default();
        if is_stopped(stream) {
            let cause = "the stream has stopped: the disk refused a write or a sync".to_owned();
            let advice = format!(
                "look at the disk of {} and at the kernel's log (dmesg), mount it for writing again or replace it, then \
                 start the host",
                self.stream_folder(stream.name()).display()
            );
            return Some(Found { part, kind: "stopped", cause, at_stake, advice });
        }
        let waits = self.waits_for(stream.name());
        if let Some(stall) = stream.stall() {
            self.remember((part.clone(), "stalled"), stall.since);
            let cause = format!("the disk does not answer: {waits}");
            let advice = format!(
                "look at the disk of {} and at the kernel's log; what waits goes on by itself once it answers",
                self.stream_folder(stream.name()).display()
            );
            let at_stake = AtStake { messages: Some(stall.messages), ..at_stake };
            return Some(Found { part, kind: "stalled", cause, at_stake, advice });
        }
        if let Some(Slow { since, longest }) = stream.slow() {
            self.remember((part.clone(), "stalled"), since);
            let s = longest.as_secs_f64();
            let cause = format!(
                "the disk is slow, a write or a sync took up to {s:.1} s within the last minute: {waits}"
            );
            let advice = format!(
                "look at the disk of {}, at what else writes to it, and at the kernel's log; nothing is lost",
                self.stream_folder(stream.name()).display()
            );
            return Some(Found { part, kind: "stalled", cause, at_stake, advice });
        }
        let (kind, cause, advice) = lack_problem(stream, waits, &self.stream_folder(stream.name()), space)?;
        Some(Found { part, kind, cause, at_stake, advice })
    }

    fn pipeline_problems(&self, status: &PipelineStatus) -> Vec<Found> {
        let mut found = Vec::new();
        let behind = AtStake { messages: Some(status.lag_messages()), ..AtStake::default() };
        let detaches = |sink: &SinkStatus| self.detaching.contains(&format!("{}/{}", status.name, sink.name));
        if let Some((kind, cause)) = named(&status.state) {
            let advice = advice::of_pipeline(kind, status, status.sinks.iter().any(detaches), &self.hints);
            let part = format!("pipeline {}", status.name);
            found.push(Found { part, kind, cause: cause.to_owned(), at_stake: behind, advice });
        }
        found.extend(not_started(status, Instant::now(), &self.hints));
        // Without steps before them the pipeline holds, and its state has the reason.
        if let Some(reason) = status.swap_refused.as_ref().filter(|_| status.chain.is_some()) {
            found.push(Found {
                part: format!("pipeline {}", status.name),
                kind: "swap_refused",
                cause: format!("its new steps were refused, the ones before them run: {reason}"),
                at_stake: AtStake::default(),
                advice: "mend the plugin or its configuration; the change is tried again by itself"
                    .to_owned(),
            });
        }
        if let Some(reason) = &status.swap_waits {
            found.push(Found {
                part: format!("pipeline {}", status.name),
                kind: "swap_waits",
                cause: format!("its new steps wait, the ones before them run: {reason}"),
                at_stake: AtStake::default(),
                advice: "mend the sink; the new steps begin by themselves once it has caught up".to_owned(),
            });
        }
        for sink in &status.sinks {
            let Some((kind, cause)) = named(&sink.state) else { continue };
            let advice = advice::of_sink(kind, sink.to_do, detaches(sink));
            let at_stake = AtStake {
                messages: Some(sink.lag_messages),
                gone_messages: Some(sink.gone_messages).filter(|gone| *gone > 0),
                oldest_seconds: self.oldest_age(status, sink).map(|age| age.as_secs()),
                ..AtStake::default()
            };
            let part = format!("sink {}/{}", status.name, sink.name);
            self.remember((part.clone(), kind), sink.since);
            found.push(Found { part, kind, cause: cause.to_owned(), at_stake, advice });
        }
        found
    }

    fn plugin_problems(&self) -> Vec<Found> {
        let status = self.plugins.status().into_iter();
        let found = status.filter_map(|plugin| {
            let (kind, cause, advice) = match plugin.state {
                PluginState::Active | PluginState::Loading => return None,
                PluginState::Failed(reason) => {
                    let advice = self.plugin_advice(&plugin.name, plugin.wrong_file.as_deref(), plugin.runs);
                    let runs = if plugin.runs { "; the last good version runs" } else { "" };
                    ("plugin_failed", reason + runs, advice)
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

    /// Returns what to do about a plugin whose newest file or config is not used.
    fn plugin_advice(&self, name: &str, wrong_file: Option<&str>, runs: bool) -> String {
        let mut advice = match wrong_file {
            None => "mend its config in the host's, then start the host again".to_owned(),
            Some(file) => {
                let path = self.plugins_dir.join(file);
                let inspect = Some(Hint::PluginInspect(&path)).filter(|_| file.ends_with(".wasm"));
                let shown = inspect.unwrap_or(Hint::Validate);
                format!("mend or replace {}, which `{}` looks at", path.display(), self.hints.command(shown))
            }
        };
        if !runs && name.is_empty() {
            advice += ", or take the file away";
        } else if !runs {
            advice += &format!(
                "; to let pipelines go on without it, `{}`",
                self.hints.command(Hint::PluginRemove(name))
            );
        }
        advice
    }

    /// Counters of [`EVENTS`] as they are now.
    fn count_events(&self, metrics: &str) {
        let now = Instant::now();
        let mut growth = lock(&self.watch.growth);
        let writing: BTreeSet<String> = metrics.lines().filter_map(events::written).collect();
        for line in metrics.lines() {
            for event in EVENTS {
                let Some((name, labels, value)) = event.read(line) else { continue };
                // As its config says; or the database counts none of its rows, wherever they are.
                if event.kind == "ignored" && (self.ignoring.contains(&name) || !writing.contains(&name)) {
                    continue;
                }
                let key = (name.clone(), event.kind, labels.to_owned());
                let growth = growth.entry(key).or_insert_with(|| Growth::over(RECENT, now));
                let more = growth.set(value, now);
                if event.kind == "ignored" && more > 0 {
                    self.say_left_out(&name, more);
                }
            }
        }
    }

    /// Says that a table took rows of a sink and did not keep them. Nothing else would: the database
    /// tells it as a success.
    fn say_left_out(&self, sink: &str, rows: u64) {
        let kind =
            format!("sink {sink}: rows were not written, a trigger or a rule of the table left them out");
        let detail = "the messages stay in the stream for as long as its retention says";
        self.failures.report(&kind, rows, detail, &self.hints.command(Hint::Status));
    }

    fn recent_events(&self) -> Vec<Found> {
        let mut sums: BTreeMap<(&'static str, String), u64> = BTreeMap::new();
        for ((name, kind, _), growth) in lock(&self.watch.growth).iter() {
            *sums.entry((*kind, name.clone())).or_default() += growth.recent();
        }
        let grown = sums.into_iter().filter(|((kind, name), count)| events::is_problem(kind, name, *count));
        let found = grown.map(|((kind, name), count)| {
            let last = (kind == "refused").then(|| self.clients.last_refused(&name)).flatten();
            let events::Told { part, cause, advice } =
                events::told(kind, &name, count, last.as_ref(), &self.hints);
            let messages = (!kind.starts_with("refused") && kind != "faults").then_some(count);
            let kind = events::problem_kind(kind);
            Found { part, kind, cause, at_stake: AtStake { messages, ..AtStake::default() }, advice }
        });
        found.collect()
    }

    /// Sinks that work and are late, and queues that grow: gauges that pass a bound.
    fn gauge_problems(&self, metrics: &str) -> Vec<Found> {
        let mut found = Vec::new();
        let statuses = self.pipelines.iter().map(|pipeline| pipeline.status());
        // Where a pipeline holds, nothing comes to its sinks.
        for status in statuses.filter(|status| status.state == State::Running) {
            for sink in status.sinks.iter().filter(|sink| sink.state == State::Running) {
                let age = self.oldest_age(&status, sink).filter(|age| *age > LATE);
                found.extend(age.map(|age| Found {
                    part: format!("sink {}/{}", status.name, sink.name),
                    kind: "late",
                    cause: advice::late_cause(&status),
                    at_stake: AtStake {
                        messages: Some(sink.lag_messages),
                        gone_messages: Some(sink.gone_messages).filter(|gone| *gone > 0),
                        oldest_seconds: Some(age.as_secs()),
                        ..AtStake::default()
                    },
                    advice: advice::late(&status).to_owned(),
                }));
            }
        }
        let value = |name: &str| {
            let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.and_then(|value| value.parse::<f64>().ok()).unwrap_or_default() as u64
        };
        let queued = value("headworks_mqtt_queued_messages");
        if queued > QUEUED_MANY {
            found.push(Found {
                part: "subscribers".to_owned(),
                kind: "queues",
                cause: "many messages wait in the queues of subscribers".to_owned(),
                at_stake: AtStake { messages: Some(queued), ..AtStake::default() },
                advice: format!("`{}` shows whose queues are long", self.hints.command(Hint::ClientsQueued)),
            });
        }
        found.extend(memory_problems(value, &self.hints));
        let copies = value("headworks_mqtt_copies_bytes");
        if copies > self.copies_bytes_max / 5 * 4 {
            found.push(Found {
                part: "subscribers (copies)".to_owned(),
                kind: "queues",
                cause: format!(
                    "{} wait for sessions beyond the retention of their stream; past {} they are lost",
                    ByteSize(copies),
                    ByteSize(self.copies_bytes_max)
                ),
                at_stake: AtStake::default(),
                advice: format!(
                    "raise mqtt.queue_copies_bytes_max or the stream's retention, or delete sessions of clients \
                     that are gone: `{}`",
                    self.hints.command(Hint::ClientsQueued)
                ),
            });
        }
        found
    }

    /// Faults that last until somebody mends them, as their parts tell.
    fn standing_problems(&self) -> Vec<Found> {
        let standing = self.failures.standing().into_iter();
        let found = standing.map(|Standing { part, kind, cause, advice }| Found {
            part,
            kind,
            cause,
            at_stake: AtStake::default(),
            advice,
        });
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
        for (pipeline, count) in letters.take_gone() {
            letters_gone(&pipeline).increment(count);
            self.failures.report_by(
                "dead letters that nobody sent again are gone",
                &pipeline,
                count,
                &gone_letters(&pipeline),
                "",
            );
        }
    }

    /// Reads when the first message that each sink lacks was appended.
    async fn find_oldest(&self) {
        for status in self.pipelines.iter().map(|pipeline| pipeline.status()) {
            self.watch.oldest.find(&status, &self.streams).await;
        }
    }

    /// How long the oldest message waits that the sink has not committed.
    pub(super) fn oldest_age(&self, status: &PipelineStatus, sink: &SinkStatus) -> Option<Duration> {
        self.watch.oldest.age(status, sink)
    }
}

fn dead_letters(pipeline: &str, open: &OpenCount, hints: &Hints) -> Found {
    let letters = Letters::OfPipeline(pipeline);
    let count = open.letters;
    let perhaps = match open.possible_duplicates {
        0 => String::new(),
        some => format!("; {some} of them may be rows already, by another copy of this data folder"),
    };
    let messages = match count {
        1 => "1 message is a dead letter".to_owned(),
        count => format!("{count} messages are dead letters"),
    };
    let recent = match open.recent {
        0 => String::new(),
        recent => format!("; {recent} within the last hour, the newest: {}", open.newest),
    };
    Found {
        part: format!("pipeline {pipeline}"),
        kind: "dead_letters",
        cause: format!("{messages}: rejected, and not sent again{perhaps}{recent}"),
        at_stake: AtStake { messages: Some(count), ..AtStake::default() },
        advice: format!(
            "`{}` shows the reasons, `{}` sends them again once the cause is mended, `{}` closes those that \
             nobody will send",
            hints.command(Hint::DeadLettersSummary(letters)),
            hints.command(Hint::Redrive(letters)),
            hints.command(Hint::Discard(letters)),
        ),
    }
}

/// A stream of which the disk does not give what a reader wants.
fn read_problem(stream: &dyn Stream) -> Option<Found> {
    let fault = stream.read_fault()?;
    Some(Found {
        part: format!("stream {} (reads)", stream.name()),
        kind: "retrying",
        cause: format!(
            "a pipeline or a subscriber waits for messages that cannot be read: {fault}; the host tries again, and \
             takes a place for damaged that the disk does not give while it gives the rest of the file"
        ),
        at_stake: AtStake::default(),
        advice:
            "look at the kernel's log and at the disk, and copy the data folder from it while it can be read"
                .to_owned(),
    })
}

/// Returns the rooms of clients' memory whose last quarter is begun; `value` reads a gauge.
fn memory_problems(value: impl Fn(&str) -> u64, hints: &Hints) -> Vec<Found> {
    let of = |name: &str| {
        let read = |metric: &str| value(&format!("headworks_mqtt_memory{metric}{{of=\"{name}\"}}"));
        (read("_bytes"), read("_max_bytes"))
    };
    let rooms = [
        (
            "queues",
            "messages wait for subscribers, and are dropped of those that have the most",
            Hint::ClientsQueued,
        ),
        (
            "subscriptions",
            "clients have subscriptions, and more are refused of those that have the most",
            Hint::ClientsList,
        ),
        (
            "connections",
            "connections hold aliases and packets, and are read and written in smaller pieces",
            Hint::ClientsList,
        ),
    ];
    let full = rooms.into_iter().filter_map(|(name, what, hint)| {
        let (taken, max) = of(name);
        (taken > max / 4 * 3).then(|| Found {
            part: format!("clients ({name})"),
            kind: "memory",
            cause: format!("{} of {} of memory are taken: {what}", ByteSize(taken), ByteSize(max)),
            at_stake: AtStake::default(),
            advice: format!(
                "raise mqtt.{name}_bytes_max, or send away clients that nobody needs: `{}`",
                hints.command(hint)
            ),
        })
    });
    full.collect()
}

/// Returns kind, cause and advice where a stream has no room for appends, or for its reserve alone.
/// `waits` says what waits for appends.
fn lack_problem(
    stream: &dyn Stream,
    waits: &str,
    folder: &Path,
    space: Option<DiskSpace>,
) -> Option<(&'static str, String, String)> {
    match stream.lack() {
        Some(lack) => {
            Some(("no_space", format!("{}: {waits}", lack.cause(space)), lack.advice(folder, space)))
        }
        None if stream.has_room() => None,
        None => Some((
            "low_space",
            "the disk has no room for the reserve of the stream, which still takes messages".to_owned(),
            Lack::Disk.advice(folder, space),
        )),
    }
}

fn low_space(Disk { folder, space }: &Disk) -> Found {
    let (cause, advice) = match space.low_inodes() {
        None => ("little room is left", "free space, or lower retention.max_bytes of the streams"),
        Some(_) => ("few inodes are left", "remove files, or make its file system with more inodes"),
    };
    Found {
        part: format!("disk of {}", folder.display()),
        kind: "low_space",
        cause: format!("{cause}: where none is left, devices wait for their acknowledgements"),
        at_stake: room(*space),
        advice: advice.to_owned(),
    }
}

/// Says that retention removed dead letters of a pipeline; "": of letters that went before the host had
/// read whose they are.
fn gone_letters(pipeline: &str) -> String {
    let whose = match pipeline {
        "" => "some before the host had read of which pipeline they are".to_owned(),
        name => format!("those of pipeline \"{name}\""),
    };
    format!("retention removed {whose}: raise max_bytes or max_age of dead_letters")
}

fn unconfigured_stream(stream: &Unconfigured) -> Found {
    let messages = stream.holds.as_ref().ok().map(|holds| holds.messages);
    Found {
        part: format!("stream {}", stream.name),
        kind: "unconfigured",
        cause: stream.cause(),
        at_stake: AtStake { messages, ..AtStake::default() },
        advice: stream.advice(),
    }
}

fn room(space: DiskSpace) -> AtStake {
    AtStake { free_bytes: Some(space.free), free_inodes: space.low_inodes(), ..AtStake::default() }
}

/// Devices with one client id that end each other's connections.
fn takeovers(contended: &[ContendedId], hints: &Hints) -> Option<Found> {
    let [worst, others @ ..] = contended else { return None };
    let ContendedId { client_id, takeovers, newest } = worst;
    let others = match others.len() {
        0 => String::new(),
        1 => "; so do those with 1 other client id".to_owned(),
        count => format!("; so do those with {count} other client ids"),
    };
    Some(Found {
        part: "clients".to_owned(),
        kind: "takeovers",
        cause: format!(
            "connections with client id \"{client_id}\" ended each other {takeovers} times, as those of two \
             devices with one client id do; the last time: {newest}{others}"
        ),
        at_stake: AtStake::default(),
        advice: format!(
            "give each device a client id of its own, and a client one connection at a time; `{}` shows the client",
            hints.command(Hint::ClientsShow(client_id))
        ),
    })
}

/// A pipeline that has been starting for over [`STARTS_WITHIN`], unless the problem of one of its
/// sinks says why.
fn not_started(status: &PipelineStatus, now: Instant, hints: &Hints) -> Option<Found> {
    let waits = now.saturating_duration_since(status.since);
    let is_told = status.sinks.iter().any(|sink| named(&sink.state).is_some());
    if status.state != State::Starting || waits < STARTS_WITHIN || is_told {
        return None;
    }
    let (what, advice) = match status.chain {
        None => (
            "its plugins are still being loaded",
            format!("`{}` shows which; it goes on by itself once they are", hints.command(Hint::PluginList)),
        ),
        Some(_) => (
            "none of its sinks has opened yet",
            "look at the databases of its sinks; it goes on by itself once one answers".to_owned(),
        ),
    };
    Some(Found {
        part: format!("pipeline {}", status.name),
        kind: "starting",
        cause: format!("it has not begun for over {} s: {what}", STARTS_WITHIN.as_secs()),
        at_stake: AtStake { messages: Some(status.lag_messages()), ..AtStake::default() },
        advice,
    })
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

/// Returns a label's value of `{stream="telemetry",cause="damaged"}`, in Prometheus' text format: in a value a
/// backslash stands before a quote, another backslash, and the `n` of a line end.
pub(super) fn label_value(labels: &str, name: &str) -> Option<String> {
    let mut rest = labels.strip_prefix('{')?.strip_suffix('}')?;
    while let Some((label, value)) = rest.split_once("=\"") {
        let (mut text, mut chars) = (String::new(), value.char_indices());
        let end = loop {
            match chars.next()? {
                (at, '"') => break at,
                (_, '\\') => match chars.next()? {
                    (_, 'n') => text.push('\n'),
                    (_, c) => text.push(c),
                },
                (_, c) => text.push(c),
            }
        };
        if label == name {
            return Some(text);
        }
        let next = &value[end + 1..];
        rest = next.strip_prefix(',').unwrap_or(next);
    }
    None
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::Offset;
    use crate::pipeline::ToDo;
    use crate::stream::Config;
    use crate::stream::conformance::message;
    use crate::stream::log::Log;
    use crate::stream::log::sim::SimDisk;
    use crate::stream::memory::MemoryStream;

    #[test]
    fn a_label_is_read_whatever_its_value_holds() {
        let labels = r#"{file="/a,b/\"s\".pem",other="x=\\",end=""}"#;
        let read = |name| label_value(labels, name);
        assert_eq!(read("file").as_deref(), Some(r#"/a,b/"s".pem"#));
        assert_eq!(read("other").as_deref(), Some(r"x=\"));
        assert_eq!(read("end").as_deref(), Some(""));
        assert_eq!((read("b/"), label_value("", "file")), (None, None));
    }

    #[test]
    fn a_disk_without_room_for_a_reserve_is_told_apart_from_one_that_devices_wait_for() {
        let kind = |bytes_max| {
            let disk = SimDisk::new(3);
            disk.set_bytes_max(bytes_max);
            let config = Config {
                segment_bytes: ByteSize(64 << 10),
                reserve_bytes: ByteSize(4 << 20),
                ..Config::default()
            };
            let (log, _) = Log::open(Arc::new(disk), Path::new("/streams/t"), "t", &config).unwrap();
            log.append(&[message("a/b", b"x")], &[]).unwrap();
            lack_problem(&*log, "devices wait", Path::new("/"), None).map(|(kind, ..)| kind)
        };
        assert_eq!((kind(8 << 20), kind(2 << 20)), (None, Some("low_space")));
        let full = MemoryStream::with_hooks("t", 1);
        full.set_no_space(true);
        assert_eq!(lack_problem(&*full, "devices wait", Path::new("/"), None).unwrap().0, "no_space");
    }

    #[test]
    fn memory_of_clients_is_a_problem_once_its_last_quarter_is_begun() {
        let problems = |taken: u64| {
            let value = move |name: &str| match name {
                "headworks_mqtt_memory_bytes{of=\"queues\"}" => taken,
                "headworks_mqtt_memory_max_bytes{of=\"queues\"}" => 4 << 20,
                _ => 0,
            };
            memory_problems(value, &Hints::default())
        };
        assert!(problems(3 << 20).is_empty());
        let found = problems((3 << 20) + 1);
        let said: Vec<_> = found.iter().map(|it| (&*it.part, it.kind)).collect();
        assert_eq!(said, [("clients (queues)", "memory")]);
        assert!(found[0].advice.contains("mqtt.queues_bytes_max"), "{}", found[0].advice);
    }

    #[test]
    fn a_pipeline_that_does_not_begin_is_a_problem_unless_a_sink_says_why() {
        let now = Instant::now();
        let sink = |state| SinkStatus {
            name: "w".to_owned(),
            stream: "s".to_owned(),
            end: Offset(5),
            state,
            to_do: ToDo::Mend,
            committed: None,
            next: Offset(0),
            lag_messages: 5,
            gone_messages: 0,
            since: now,
            last_commit: None,
            own_lane: false,
        };
        let starting = PipelineStatus {
            name: "p".to_owned(),
            stream: "s".to_owned(),
            state: State::Starting,
            since: now,
            wants_room: false,
            chain: None,
            swap_refused: None,
            swap_waits: None,
            retries: None,
            read: Offset(0),
            end: Offset(5),
            sinks: vec![sink(State::Starting)],
        };
        let found = |status: &PipelineStatus, after: Duration| {
            not_started(status, now + after, &Hints::default()).map(|found| found.cause)
        };
        let second = Duration::from_secs(1);
        assert_eq!(found(&starting, STARTS_WITHIN - second), None);
        assert!(found(&starting, STARTS_WITHIN).unwrap().contains("plugins"));
        let loaded = PipelineStatus { chain: Some(1), ..starting.clone() };
        assert!(found(&loaded, STARTS_WITHIN).unwrap().contains("sinks"));
        let retrying = vec![sink(State::Retrying("refused".to_owned()))];
        assert_eq!(found(&PipelineStatus { sinks: retrying, ..loaded.clone() }, STARTS_WITHIN), None);
        assert_eq!(found(&PipelineStatus { state: State::Running, ..loaded }, STARTS_WITHIN), None);
    }

    #[test]
    fn a_fleet_that_is_rejected_now_is_told_beside_an_old_letter() {
        let newest = "no column \"a\"".to_owned();
        let open = OpenCount { letters: 1_001, recent: 0, newest, possible_duplicates: 0, since_us: 0 };
        let cause = |open: &OpenCount| dead_letters("p", open, &Hints::default()).cause;
        assert_eq!(cause(&open), "1001 messages are dead letters: rejected, and not sent again");
        let now = "; 1000 within the last hour, the newest: no column \"a\"";
        assert!(cause(&OpenCount { recent: 1_000, ..open }).ends_with(now));
    }

    #[test]
    fn dead_letters_that_are_gone_are_told_of_their_pipeline_or_of_none() {
        assert!(gone_letters("telemetry").contains("pipeline \"telemetry\""));
        assert!(!gone_letters("").contains("\"\""), "{}", gone_letters(""));
    }
}
