//! Where a pipeline shows what it does, for status, readiness and metrics.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::assemble::{AT_SOURCE, BEHIND_STEPS, Place};
use super::routes::SinkNumber;
use super::status::{PipelineStatus, SinkShared, SinkStatus, State};
use crate::batch::Offset;
use crate::step::Chain;
use crate::stream::Stream;

/// Interval between two looks at the sinks at a shutdown.
const DRAINED_EVERY: Duration = Duration::from_millis(10);

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

    /// Returns once each sink that works and reads this stream has all of it. `places`: by sink, what it reads.
    pub async fn drained(&self, stream: &dyn Stream, places: &[Place]) {
        let lacks = |(sink, place): (&Arc<SinkShared>, &Place)| {
            let is_here = place.load(Ordering::Acquire) == BEHIND_STEPS;
            is_here && sink.state() == State::Running && sink.next() < stream.bounds().end
        };
        let mut look = tokio::time::interval(DRAINED_EVERY);
        while self.sinks.iter().zip(places).any(lacks) {
            look.tick().await;
        }
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
                stream: self.stream.name().to_owned(),
                end,
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

/// The boards of a pipeline: of what reads the source, and of what reads the out stream, where one is read.
pub struct Boards {
    boards: Vec<Arc<Board>>,
    /// The stream in which each sink is shown.
    places: Vec<Place>,
    /// The sink that is the out stream.
    out: Option<SinkNumber>,
}

impl Boards {
    pub fn new(boards: Vec<Arc<Board>>, places: Vec<Place>, out: Option<SinkNumber>) -> Self {
        Self { boards, places, out }
    }

    fn source(&self) -> &Board {
        &self.boards[AT_SOURCE]
    }

    /// The steps that run.
    pub fn chain(&self) -> Option<Chain> {
        self.source().chain()
    }

    /// Returns once there are steps that run.
    pub async fn has_chain(&self) {
        self.source().has_chain().await;
    }

    pub fn status(&self) -> PipelineStatus {
        let mut status = self.source().status();
        let Some(behind) = self.boards.get(BEHIND_STEPS) else { return status };
        let behind = behind.status();
        // What the steps have still to write is ahead of each sink that reads what they wrote.
        let ahead = self.out.map_or(0, |out| status.sinks[out].lag_messages);
        for ((sink, place), there) in status.sinks.iter_mut().zip(&self.places).zip(behind.sinks) {
            if place.load(Ordering::Acquire) != BEHIND_STEPS {
                continue;
            }
            let here = std::mem::replace(sink, there);
            sink.lag_messages += ahead;
            sink.own_lane = false;
            // It is opened for the source first.
            if sink.state == State::Starting && here.state != State::Running {
                (sink.state, sink.to_do, sink.since) = (here.state, here.to_do, here.since);
            }
        }
        if status.state == State::Running && !matches!(behind.state, State::Running | State::Starting) {
            (status.state, status.since, status.wants_room) = (behind.state, behind.since, behind.wants_room);
        }
        status
    }

    /// Changes whenever the pipeline has looked after itself.
    #[cfg(test)]
    pub async fn shown(&self) {
        futures_util::future::join_all(self.boards.iter().map(|board| board.shown())).await;
    }
}
