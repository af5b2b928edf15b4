//! What a pipeline shows of itself.

use std::pin::pin;
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::time::timeout;

use crate::batch::Offset;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PipelineStatus {
    pub name: String,
    pub stream: String,
    pub state: State,
    /// Whether it holds because rejected messages wait for room in the dead letters.
    pub wants_room: bool,
    /// Generation of the steps that run.
    pub chain: Option<u64>,
    /// Why the newest steps are not the ones that run.
    pub swap_refused: Option<String>,
    /// Offset of the next message to be read by the first reader.
    pub read: Offset,
    pub end: Offset,
    pub sinks: Vec<SinkStatus>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SinkStatus {
    pub name: String,
    pub state: State,
    /// The lowest of its positions; `None` until it was opened.
    pub committed: Option<Offset>,
    /// Messages that it has not committed; until it was opened all that are kept.
    pub lag_messages: u64,
    /// Since when it is in this state.
    pub since: SystemTime,
    /// Its last commit in this process.
    pub last_commit: Option<SystemTime>,
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

    /// Messages of the stream that some sink has not committed.
    pub fn lag_messages(&self) -> u64 {
        let unread = self.end.0.saturating_sub(self.read.0);
        self.sinks.iter().map(|sink| sink.lag_messages).fold(unread, u64::max)
    }
}

/// A call of a sink that takes longer is told as one without an answer.
const ANSWER_MAX: Duration = Duration::from_secs(15);

/// What a delivery tells at every commit.
pub struct SinkShared {
    pub name: String,
    /// Lowest position; `u64::MAX` until it is known.
    pub committed: AtomicU64,
    /// Lowest offset that it has not got yet.
    pub received: AtomicU64,
    answer_max: Duration,
    state: Mutex<SinkState>,
}

struct SinkState {
    state: State,
    since: SystemTime,
    last_commit: Option<SystemTime>,
    /// The last write failed: an open sink does not work again until one succeeds.
    commit_failed: bool,
}

impl SinkShared {
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            committed: super::delivery::unknown(),
            received: AtomicU64::new(0),
            answer_max: ANSWER_MAX,
            state: Mutex::new(SinkState {
                state: State::Starting,
                since: SystemTime::now(),
                last_commit: None,
                commit_failed: false,
            }),
        }
    }

    /// The sink is open. It runs, unless what failed before was a write.
    pub fn opened(&self) {
        let mut current = self.lock();
        if !current.commit_failed {
            self.change(&mut current, State::Running);
        }
    }

    /// All that was to be written is in the sink.
    pub fn committed(&self) {
        let mut current = self.lock();
        current.commit_failed = false;
        current.last_commit = Some(SystemTime::now());
        self.change(&mut current, State::Running);
    }

    /// A write failed: until one succeeds the sink does not run, whatever opens.
    pub fn commit_failed(&self) {
        self.lock().commit_failed = true;
    }

    /// Awaits a call of the sink. One that takes longer than [`ANSWER_MAX`] is a failure from its
    /// begin on, until it answers with success or another reason is known.
    pub async fn answer<T, E>(&self, call: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        let begun = SystemTime::now();
        let mut call = pin!(call);
        if let Ok(done) = timeout(self.answer_max, &mut call).await {
            return done;
        }
        let before = self.unanswered(begun);
        let done = call.await;
        if let (Ok(_), Some(before)) = (&done, before) {
            self.set(before);
        }
        done
    }

    /// Returns the state before, where the sink was not known to fail.
    fn unanswered(&self, begun: SystemTime) -> Option<State> {
        let mut current = self.lock();
        if !matches!(current.state, State::Running | State::Starting) {
            return None;
        }
        let s = self.answer_max.as_secs();
        tracing::warn!(
            sink = self.name,
            "no answer for {s} s: the call goes on until a limit of the sink ends it"
        );
        current.since = begun;
        let unanswered = State::Retrying(format!("no answer for over {s} s"));
        Some(std::mem::replace(&mut current.state, unanswered))
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
        let now = SystemTime::now();
        let lasted = now.duration_since(current.since).unwrap_or_default();
        current.since = now;
        match (before, &current.state) {
            (State::Starting, State::Running) => tracing::info!(sink = self.name, "the sink is open"),
            (_, State::Running) => {
                tracing::info!(sink = self.name, after_s = lasted.as_secs(), "the sink works again");
            }
            _ => {}
        }
    }

    pub fn state(&self) -> State {
        self.lock().state.clone()
    }

    pub fn since(&self) -> SystemTime {
        self.lock().since
    }

    pub fn last_commit(&self) -> Option<SystemTime> {
        self.lock().last_commit
    }

    fn lock(&self) -> MutexGuard<'_, SinkState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn a_call_without_an_answer_is_a_failure_from_its_begin_until_there_is_one() {
        let sink = Arc::new(SinkShared { answer_max: Duration::from_millis(1), ..SinkShared::new("w") });
        for (begins_as, done, ends_as) in [
            (State::Running, Ok(()), State::Running),
            (State::Starting, Ok(()), State::Starting),
            (State::Running, Err(()), State::Retrying("no answer for over 0 s".to_owned())),
        ] {
            sink.set(begins_as);
            let before = SystemTime::now();
            let (answer, answered) = oneshot::channel();
            let called = tokio::spawn({
                let sink = sink.clone();
                async move { sink.answer(async { answered.await.expect("an answer") }).await }
            });
            while !matches!(sink.state(), State::Retrying(_)) {
                tokio::task::yield_now().await;
            }
            assert!(sink.since() >= before && sink.since() <= SystemTime::now());
            answer.send(done).expect("it waits");
            assert_eq!((called.await.expect("no panic"), sink.state()), (done, ends_as));
        }
        let known = State::Retrying("57014".to_owned());
        sink.set(known.clone());
        let slow = async {
            tokio::time::sleep(Duration::from_millis(5)).await;
            Ok::<_, ()>(())
        };
        assert_eq!((sink.answer(slow).await, sink.state()), (Ok(()), known), "what is known stays");
    }

    #[test]
    fn a_sink_works_again_only_after_a_commit_where_a_commit_failed() {
        let sink = SinkShared::new("w");
        let retrying = || State::Retrying("57014".to_owned());
        sink.opened();
        assert_eq!(sink.state(), State::Running);
        sink.set(retrying());
        sink.opened();
        assert_eq!(sink.state(), State::Running, "it was the open that failed");
        for _ in 0..2 {
            sink.commit_failed();
            sink.set(retrying());
            sink.opened();
            assert_eq!((sink.state(), sink.last_commit()), (retrying(), None));
        }
        let since = sink.since();
        sink.set(State::Retrying("another reason".to_owned()));
        assert_eq!(sink.since(), since);
        sink.committed();
        assert_eq!(sink.state(), State::Running);
        assert!(sink.last_commit().is_some());
    }
}
