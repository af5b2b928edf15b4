//! What a pipeline shows of itself.

use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use crate::batch::Offset;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PipelineStatus {
    pub name: String,
    pub stream: String,
    pub state: State,
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
}

/// What a delivery tells at every commit.
pub struct SinkShared {
    pub name: String,
    /// Lowest position; `u64::MAX` until it is known.
    pub committed: AtomicU64,
    /// Lowest offset that it has not got yet.
    pub received: AtomicU64,
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
    use super::*;

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
