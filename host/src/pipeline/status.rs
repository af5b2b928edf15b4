//! What a pipeline shows of itself.

use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::time::timeout;

use crate::batch::Offset;
use crate::hints::Hint;
use crate::telemetry::{Failures, alike};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PipelineStatus {
    pub name: String,
    pub stream: String,
    pub state: State,
    /// When it came into this kind of state.
    pub since: Instant,
    /// Whether it holds because rejected messages wait for room in the dead letters.
    pub wants_room: bool,
    /// Generation of the steps that run.
    pub chain: Option<u64>,
    /// Why the newest steps are not the ones that run.
    pub swap_refused: Option<String>,
    /// Why the newest steps wait for a sink that needs the older ones.
    pub swap_waits: Option<String>,
    /// Which step asked for retries lately, and why.
    pub retries: Option<String>,
    /// Offset of the next message to be read by the first reader.
    pub read: Offset,
    pub end: Offset,
    pub sinks: Vec<SinkStatus>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SinkStatus {
    pub name: String,
    /// The stream that it reads now: that of its pipeline, or the one between the steps and the sinks. Its
    /// offsets are those of this stream.
    pub stream: String,
    /// End of that stream.
    pub end: Offset,
    pub state: State,
    /// What a person does about it while it retries.
    pub to_do: ToDo,
    /// The lowest of its positions; `None` until it was opened.
    pub committed: Option<Offset>,
    /// First message that it is not known to have: until it was opened, the place that
    /// the stream remembers of it.
    pub next: Offset,
    /// Messages from `next` on that the stream still has, and those in front of the steps.
    pub lag_messages: u64,
    /// Messages from `next` on that retention has removed.
    pub gone_messages: u64,
    /// Since when it is in this state.
    pub since: Instant,
    /// Its last commit in this process.
    pub last_commit: Option<Instant>,
    /// Lags behind the others, with a reader of its own.
    pub own_lane: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    Starting,
    Running,
    /// Waits until a person decides.
    Holding(String),
    /// Something failed that may pass.
    Retrying(String),
    /// Until a person acted and restarted it.
    Stopped(String),
}

impl PipelineStatus {
    /// Whether it works as it should: for readiness.
    pub fn is_ready(&self) -> bool {
        let fine = |state: &State| matches!(state, State::Running | State::Retrying(_));
        self.state == State::Running && self.sinks.iter().all(|sink| fine(&sink.state))
    }

    /// Whether a sink of this pipeline writes: one that could gets nothing while its pipeline holds or has
    /// stopped.
    pub fn works(&self, sink: &SinkStatus) -> bool {
        sink.state == State::Running && !matches!(self.state, State::Holding(_) | State::Stopped(_))
    }

    /// Messages of the stream that some sink has not committed.
    pub fn lag_messages(&self) -> u64 {
        let unread = self.end.0.saturating_sub(self.read.0);
        self.sinks.iter().map(|sink| sink.lag_messages).fold(unread, u64::max)
    }
}

/// What a person does about a sink that retries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ToDo {
    /// Mend what the reason names.
    #[default]
    Mend,
    /// Choose one of the ways that the reason names, with a setting that counts from the next start.
    Choose,
    /// Look why the database does not answer.
    Answer,
}

/// Kind of a failure that lasts until a person chooses: see [`ToDo::Choose`].
pub const CHOOSE: &str = "choose";
/// A call of a sink that takes longer is told as one without an answer.
const ANSWER_MAX: Duration = Duration::from_secs(15);
/// A sink is slow until no call has taken longer than that for this time.
const SLOW_FOR: Duration = Duration::from_secs(60);
/// Begins the cause of a call without an answer.
const NO_ANSWER: &str = "no answer for over";

/// What a delivery tells at every commit.
pub struct SinkShared {
    pub name: String,
    pipeline: String,
    /// Names its database and table for a person.
    target: String,
    /// With which the kinds of its failures begin.
    subject: String,
    failures: Failures,
    /// What the stream remembers of its position from earlier processes.
    pub remembered: AtomicU64,
    /// Lowest position; `u64::MAX` until it is known.
    pub committed: AtomicU64,
    /// Lowest offset that it has not got yet.
    pub received: AtomicU64,
    /// Messages that it lacks and that retention has removed.
    pub gone: AtomicU64,
    answer_max: Duration,
    state: Mutex<SinkState>,
}

struct SinkState {
    state: State,
    to_do: ToDo,
    since: Instant,
    last_commit: Option<Instant>,
    needs: Needs,
    slow: Option<Slow>,
}

/// Calls that took longer than [`ANSWER_MAX`], and were answered.
#[derive(Clone, Copy)]
struct Slow {
    /// When the first of them began.
    since: Instant,
    /// When the last of them ended.
    last: Instant,
}

/// What shows that a sink works again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Needs {
    /// It did not open: that it does is enough.
    Open,
    /// A write failed: a commit.
    Commit,
    /// It rejected too much: a commit that writes rows.
    Rows,
}

impl SinkShared {
    pub fn new(pipeline: &str, name: &str, target: &str, failures: Failures) -> Self {
        Self {
            name: name.to_owned(),
            pipeline: pipeline.to_owned(),
            target: target.to_owned(),
            subject: format!("sink \"{name}\" of pipeline \"{pipeline}\": "),
            failures,
            remembered: AtomicU64::new(0),
            committed: super::delivery::unknown(),
            received: AtomicU64::new(0),
            gone: AtomicU64::new(0),
            answer_max: ANSWER_MAX,
            state: Mutex::new(SinkState {
                state: State::Starting,
                to_do: ToDo::Mend,
                since: Instant::now(),
                last_commit: None,
                needs: Needs::Open,
                slow: None,
            }),
        }
    }

    /// First offset that it is not known to have.
    pub fn next(&self) -> Offset {
        match self.committed.load(Ordering::Acquire) {
            u64::MAX => Offset(self.remembered.load(Ordering::Acquire)),
            committed => Offset(committed),
        }
    }

    /// The sink is open. It runs, unless what failed before was a write.
    pub fn opened(&self) {
        let mut current = self.lock();
        if current.needs == Needs::Open {
            self.change(&mut current, State::Running);
        }
    }

    /// All that was to be written is in the sink, or in dead letters. A sink that
    /// rejected too much runs again once it `has_written` some of it.
    pub fn committed(&self, has_written: bool) {
        let mut current = self.lock();
        current.last_commit = Some(Instant::now());
        if has_written || current.needs != Needs::Rows {
            current.needs = Needs::Open;
            self.change(&mut current, State::Running);
        }
    }

    /// A write failed: until one succeeds the sink does not run, whatever opens.
    pub fn commit_failed(&self, rejected_too_much: bool) {
        let needs = &mut self.lock().needs;
        if rejected_too_much {
            *needs = Needs::Rows;
        } else if *needs == Needs::Open {
            *needs = Needs::Commit;
        }
    }

    /// Rows were written beside the deliveries of the pipeline: once the sink is open
    /// again, it runs.
    pub fn has_written(&self) {
        self.lock().needs = Needs::Open;
    }

    /// A try failed that is repeated. Each cause has a log line of its own.
    pub fn failed(&self, kind: &str, reason: String) {
        let is_choice = kind == CHOOSE;
        let kind = format!("{}{}", self.subject, told(kind));
        let show = self.failures.hint(Hint::Status);
        self.failures.report_by(&kind, &alike(&reason), 1, &reason, &show);
        let mut current = self.lock();
        current.to_do = if is_choice { ToDo::Choose } else { ToDo::Mend };
        self.change(&mut current, State::Retrying(reason));
    }

    /// Awaits a call of the sink. One that takes longer than [`ANSWER_MAX`] is a failure from its
    /// begin on, until it answers with success or another reason is known.
    pub async fn answer<T, E>(&self, call: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        let begun = Instant::now();
        let mut call = pin!(call);
        if let Ok(done) = timeout(self.answer_max, &mut call).await {
            if done.is_ok() {
                self.answered_in_time(Instant::now());
            }
            return done;
        }
        let before = self.unanswered(begun);
        let done = call.await;
        if let (Ok(_), Some(before)) = (&done, before) {
            self.answered_late(before, begun, Instant::now());
        }
        done
    }

    /// Returns the state before, where the sink was not known to fail.
    fn unanswered(&self, begun: Instant) -> Option<State> {
        let mut current = self.lock();
        if !matches!(current.state, State::Running | State::Starting) {
            return None;
        }
        let kind = format!("{}{}", self.subject, self.no_answer());
        let detail = format!("{}; the call goes on until a limit of the sink ends it", self.target);
        self.failures.report(&kind, 1, &detail, &self.failures.hint(Hint::Status));
        current.since = begun;
        current.to_do = ToDo::Answer;
        let unanswered = State::Retrying(format!("{} from {}", self.no_answer(), self.target));
        Some(std::mem::replace(&mut current.state, unanswered))
    }

    /// The sink is as `before`. That it works again is said once it is not slow any more: each
    /// batch of a slow database would have a line.
    fn answered_late(&self, before: State, begun: Instant, now: Instant) {
        let mut current = self.lock();
        if matches!(current.state, State::Retrying(_)) && current.to_do == ToDo::Answer {
            let since = current.slow.map_or(begun, |slow| slow.since);
            current.slow = Some(Slow { since, last: now });
            (current.state, current.since) = (before, now);
        }
    }

    fn answered_in_time(&self, now: Instant) {
        let mut current = self.lock();
        let is_over = |slow: &mut Slow| now.saturating_duration_since(slow.last) >= SLOW_FOR;
        if let Some(Slow { since, last }) = current.slow.take_if(is_over) {
            let (pipeline, sink) = (&self.pipeline, &self.name);
            tracing::info!(
                pipeline,
                sink,
                after_s = (last - since).as_secs(),
                "the sink answers in time again"
            );
        }
    }

    fn no_answer(&self) -> String {
        format!("{NO_ANSWER} {} s", self.answer_max.as_secs())
    }

    pub fn set(&self, state: State) {
        self.change(&mut self.lock(), state);
    }

    fn change(&self, current: &mut SinkState, state: State) {
        if current.state == state {
            return;
        }
        let before = std::mem::replace(&mut current.state, state);
        let is_same_kind = std::mem::discriminant(&before) == std::mem::discriminant(&current.state);
        if is_same_kind {
            return;
        }
        let now = Instant::now();
        let after_s = now.saturating_duration_since(current.since).as_secs();
        current.since = now;
        let (pipeline, sink) = (&self.pipeline, &self.name);
        match (before, &current.state) {
            (State::Starting, State::Running) => tracing::info!(pipeline, sink, "the sink is open"),
            (_, State::Running) => {
                current.slow = None;
                self.failures.end(&self.subject);
                tracing::info!(pipeline, sink, after_s, "the sink works again");
            }
            _ => {}
        }
    }

    pub fn state(&self) -> State {
        self.lock().state.clone()
    }

    pub fn to_do(&self) -> ToDo {
        self.lock().to_do
    }

    pub fn since(&self) -> Instant {
        self.lock().since
    }

    pub fn last_commit(&self) -> Option<Instant> {
        self.lock().last_commit
    }

    fn lock(&self) -> MutexGuard<'_, SinkState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns what a sink does about a failure of this kind, as a log line says it.
fn told(kind: &str) -> &'static str {
    match kind {
        "setup" | CHOOSE => "cannot write until a person acts",
        "refusals" => "pauses",
        _ => "tries again",
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn a_call_without_an_answer_is_a_failure_from_its_begin_until_there_is_one() {
        let sink = Arc::new(SinkShared {
            answer_max: Duration::from_millis(1),
            ..SinkShared::new("p", "w", "db:5432/iot table t", Failures::default())
        });
        for (begins_as, done, ends_as) in [
            (State::Running, Ok(()), State::Running),
            (State::Starting, Ok(()), State::Starting),
            (
                State::Running,
                Err(()),
                State::Retrying("no answer for over 0 s from db:5432/iot table t".to_owned()),
            ),
        ] {
            sink.set(begins_as);
            let before = Instant::now();
            let (answer, answered) = oneshot::channel();
            let called = tokio::spawn({
                let sink = sink.clone();
                async move { sink.answer(async { answered.await.expect("an answer") }).await }
            });
            while !matches!(sink.state(), State::Retrying(_)) {
                tokio::task::yield_now().await;
            }
            assert!(sink.since() >= before && sink.since() <= Instant::now());
            answer.send(done).expect("it waits");
            assert_eq!((called.await.expect("no panic"), sink.state()), (done, ends_as));
        }
        let known = State::Retrying("57014".to_owned());
        sink.set(known.clone());
        assert_eq!((sink.unanswered(Instant::now()), sink.state()), (None, known), "what is known stays");
    }

    /// Its lines are folded, whatever it answers meanwhile.
    #[test]
    fn a_slow_sink_is_told_with_its_database_and_not_at_each_call() {
        let failures = Failures::default();
        let sink = SinkShared::new("p", "w", "db:5432/iot table t", failures.clone());
        sink.opened();
        let begin = Instant::now();
        for call in 0..3 {
            let begun = begin + ANSWER_MAX * call;
            let before = sink.unanswered(begun).expect("it is not known to fail");
            assert_eq!(sink.since(), begun);
            sink.answered_late(before, begun, begun + ANSWER_MAX);
            sink.answered_in_time(begun + ANSWER_MAX);
            assert_eq!(sink.state(), State::Running);
        }
        let kind = "sink \"w\" of pipeline \"p\": no answer for over 15 s";
        assert_eq!(failures.unsaid(), [(kind.to_owned(), 2)]);
        let slow = || sink.lock().slow.map(|slow| (slow.since - begin, slow.last - begin));
        assert_eq!(slow(), Some((Duration::ZERO, ANSWER_MAX * 3)));
        sink.answered_in_time(begin + ANSWER_MAX * 3 + SLOW_FOR);
        assert_eq!(slow(), None);
    }

    #[test]
    fn what_to_do_about_a_sink_goes_by_what_failed_and_not_by_the_words_of_its_reason() {
        let sink = SinkShared::new("p", "w", "db:5432/iot table device_restarts", Failures::default());
        sink.failed("setup", "table device_restarts has no column restart; no answer for over it".to_owned());
        assert_eq!(sink.to_do(), ToDo::Mend);
        sink.failed(CHOOSE, "put the rows back, or set `begin: start`".to_owned());
        assert_eq!(sink.to_do(), ToDo::Choose);
        sink.set(State::Running);
        sink.unanswered(Instant::now());
        assert_eq!(sink.to_do(), ToDo::Answer);
    }

    #[test]
    fn a_sink_works_again_only_after_a_commit_where_a_commit_failed() {
        let sink = SinkShared::new("p", "w", "db:5432/iot table t", Failures::default());
        let retrying = || State::Retrying("57014".to_owned());
        sink.opened();
        assert_eq!(sink.state(), State::Running);
        sink.set(retrying());
        sink.opened();
        assert_eq!(sink.state(), State::Running, "it was the open that failed");
        for _ in 0..2 {
            sink.commit_failed(false);
            sink.set(retrying());
            sink.opened();
            assert_eq!((sink.state(), sink.last_commit()), (retrying(), None));
        }
        let since = sink.since();
        sink.set(State::Retrying("another reason".to_owned()));
        assert_eq!(sink.since(), since);
        sink.committed(false);
        assert_eq!(sink.state(), State::Running);
        assert!(sink.last_commit().is_some());
    }

    #[test]
    fn a_sink_that_rejected_too_much_works_again_only_once_it_wrote_rows() {
        let rejected = || {
            let sink = SinkShared::new("p", "w", "db:5432/iot table t", Failures::default());
            sink.opened();
            sink.commit_failed(true);
            sink.failed("refusals", "rejected the last 20 rows".to_owned());
            sink.opened();
            sink.committed(false);
            sink.commit_failed(false);
            sink.committed(false);
            assert!(matches!(sink.state(), State::Retrying(_)));
            sink
        };
        let sink = rejected();
        sink.committed(true);
        assert_eq!(sink.state(), State::Running);
        let sink = rejected();
        sink.has_written();
        sink.opened();
        assert_eq!(sink.state(), State::Running, "a redrive wrote what it had rejected");
    }
}
