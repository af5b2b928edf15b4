//! Starts of replacement instances, on a thread of their own.
//!
//! An instance that faulted is replaced, and `init` may take seconds. Messages
//! that do not concern the step wait for it no longer than [`Patience`] allows,
//! and a step whose starts use that up is started again only when some is left.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::instance::{Instance, StartError};
use super::version::Shared;
use crate::patience::Patience;
use crate::threads;
use crate::topic::TopicFilter;

/// An instance and the topics by which its config narrows the plugin's.
pub(super) type Started = (Instance, Option<Vec<TopicFilter>>);

pub(super) struct Starts {
    patience: Patience,
    under_way: Option<UnderWay>,
}

struct UnderWay {
    /// The instance, and how long its start took.
    given: Receiver<(Result<Started, StartError>, Duration)>,
    /// Part of that time which was charged already.
    charged: Duration,
}

impl Starts {
    pub fn new() -> Self {
        Self { patience: Patience::new(Instant::now()), under_way: None }
    }

    #[cfg(test)]
    pub fn use_up_patience(&mut self) {
        self.patience.charge(Duration::from_secs(3_600));
    }

    /// Returns a new instance, or why there is none yet.
    pub fn next(&mut self, shared: &Arc<Shared>) -> Result<Started, String> {
        let left = self.patience.left(Instant::now());
        let under_way = match &mut self.under_way {
            Some(under_way) => under_way,
            None if left.is_zero() => {
                return Err("its instance is not started again yet: its starts take too long".to_owned());
            }
            None => self.under_way.insert(begin(Arc::clone(shared))?),
        };
        let begun = Instant::now();
        match under_way.given.recv_timeout(left) {
            Ok((started, took)) => {
                self.patience.charge(took.saturating_sub(under_way.charged));
                self.under_way = None;
                started.map_err(StartError::text)
            }
            Err(RecvTimeoutError::Timeout) => {
                let waited = begun.elapsed();
                self.patience.charge(waited);
                under_way.charged += waited;
                Err("its instance is still starting".to_owned())
            }
            Err(RecvTimeoutError::Disconnected) => {
                self.under_way = None;
                Err("the thread that starts its instance ended".to_owned())
            }
        }
    }
}

fn begin(shared: Arc<Shared>) -> Result<UnderWay, String> {
    let (give, given) = mpsc::sync_channel(1);
    let nice = threads::nice_of_workers();
    let work = move || {
        // Nicer than the worker, whose other messages do not wait for it.
        nice.into_iter().for_each(threads::give_way);
        let begun = Instant::now();
        let started = shared.start();
        // Nobody waits for it where the step was replaced meanwhile.
        drop(give.send((started, begun.elapsed())));
    };
    threads::spawn("plugin-start".to_owned(), work)
        .map(|_| UnderWay { given, charged: Duration::ZERO })
        .map_err(|error| format!("cannot start a thread for its instance: {error}"))
}
