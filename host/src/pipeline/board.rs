//! Where a pipeline shows what it does, for status, readiness and metrics.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use tokio::sync::watch;

use super::status::{PipelineStatus, SinkShared, SinkStatus, State};
use crate::batch::Offset;
use crate::step::Chain;
use crate::stream::Stream;

/// What others read of a pipeline.
pub struct Board {
    name: String,
    stream: Arc<dyn Stream>,
    sinks: Vec<Arc<SinkShared>>,
    pub(super) shown: watch::Sender<Shown>,
}

/// Written by the supervisor.
pub(super) struct Shown {
    pub state: State,
    /// Since when the state is of this kind.
    pub since: Instant,
    pub wants_room: bool,
    pub read: Offset,
    pub chain: Option<Chain>,
    pub swap_refused: Option<String>,
    pub swap_waits: Option<String>,
    pub retries: Option<String>,
    pub own_lane: Vec<bool>,
}

impl Board {
    pub fn new(name: &str, stream: Arc<dyn Stream>, sinks: Vec<Arc<SinkShared>>) -> Self {
        let shown = Shown {
            state: State::Starting,
            since: Instant::now(),
            wants_room: false,
            read: Offset(0),
            chain: None,
            swap_refused: None,
            swap_waits: None,
            retries: None,
            own_lane: vec![false; sinks.len()],
        };
        Self { name: name.to_owned(), stream, sinks, shown: watch::Sender::new(shown) }
    }

    /// The steps that run.
    pub fn chain(&self) -> Option<Chain> {
        self.shown.borrow().chain.clone()
    }

    /// Returns once there are steps that run.
    pub async fn has_chain(&self) {
        // The sender lives as long as `self`.
        let _ = self.shown.subscribe().wait_for(|shown| shown.chain.is_some()).await;
    }

    pub fn status(&self) -> PipelineStatus {
        let kept = self.stream.bounds();
        let end = kept.end;
        let shown = self.shown.borrow();
        let sink = |(shared, own_lane): (&Arc<SinkShared>, &bool)| {
            let committed = shared.committed.load(Ordering::Acquire);
            let committed = (committed != u64::MAX).then_some(Offset(committed));
            let next = shared.next();
            SinkStatus {
                name: shared.name.clone(),
                state: shared.state(),
                to_do: shared.to_do(),
                committed,
                next,
                lag_messages: end.0.saturating_sub(next.max(kept.start).0),
                gone_messages: shared.gone.load(Ordering::Acquire),
                since: shared.since(),
                last_commit: shared.last_commit(),
                own_lane: *own_lane,
            }
        };
        PipelineStatus {
            name: self.name.clone(),
            stream: self.stream.name().to_owned(),
            state: shown.state.clone(),
            since: shown.since,
            wants_room: shown.wants_room,
            chain: shown.chain.as_ref().map(|chain| chain.generation),
            swap_refused: shown.swap_refused.clone(),
            swap_waits: shown.swap_waits.clone(),
            retries: shown.retries.clone(),
            read: shown.read,
            end,
            sinks: self.sinks.iter().zip(&shown.own_lane).map(sink).collect(),
        }
    }

    /// Changes whenever the pipeline has looked after itself.
    #[cfg(test)]
    pub async fn shown(&self) {
        // The sender lives as long as `self`.
        let _ = self.shown.subscribe().changed().await;
    }
}
