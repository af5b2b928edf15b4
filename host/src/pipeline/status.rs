//! What a pipeline shows of itself.

use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, PoisonError};

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
    pub lag_messages: u64,
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
    state: Mutex<State>,
}

impl SinkShared {
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            committed: super::delivery::unknown(),
            received: AtomicU64::new(0),
            state: Mutex::new(State::Starting),
        }
    }

    pub fn set(&self, state: State) {
        let mut current = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if *current == state {
            return;
        }
        let before = std::mem::replace(&mut *current, state);
        let runs = *current == State::Running;
        drop(current);
        match before {
            State::Starting if runs => tracing::info!(sink = self.name, "the sink is open"),
            _ if runs => tracing::info!(sink = self.name, "the sink works again"),
            _ => {}
        }
    }

    pub fn state(&self) -> State {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
