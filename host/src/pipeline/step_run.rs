//! Runs one step over a batch: again where the step asks for it, and until the lane ends where the
//! step waits for a new version of itself.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::config::Backoff;
use super::held::Waiting;
use super::worker::{Ended, Shared};
use crate::batch::{Batch, Partition};
use crate::hints::Hint;
use crate::patience::Patience;
use crate::step::{Attempt, Outcome, Refused, RefusedKind, Step};
use crate::telemetry::alike;

/// A step that waits for a new version is asked again after this.
const HELD_WAIT: Duration = Duration::from_millis(200);

/// What the run of a step belongs to.
pub struct Context<'a> {
    /// Generation of the chain.
    pub generation: u64,
    /// The lane ends.
    pub stop: &'a CancellationToken,
    /// The messages run for the first time.
    pub counts: bool,
}

impl Context<'_> {
    /// Waits for a held step. A new chain lies behind the messages at hand: the
    /// supervisor sees that a worker waits, and ends the lane when there is one.
    /// `waiting`: until it is dropped, the worker is one that waits.
    pub fn wait<'s>(
        &self,
        waiting: &mut Option<Waiting<'s>>,
        why: &str,
        shared: &'s Shared,
        runtime: &Handle,
    ) -> Result<(), Ended> {
        if self.stop.is_cancelled() {
            return Err(Ended::Aborted);
        }
        match waiting {
            Some(waiting) => waiting.set_why(why),
            None => *waiting = Some(shared.held.wait(self.generation, why, self.stop)),
        }
        runtime.block_on(async {
            tokio::select! {
                () = shared.abort.cancelled() => Err(Ended::Aborted),
                () = self.stop.cancelled() => Err(Ended::Aborted),
                () = tokio::time::sleep(HELD_WAIT) => Ok(()),
            }
        })
    }
}

/// Runs one step, again where it asks for it, as often as `retries.max` lets it
/// and, where others wait that do not concern the step, as long as `patience` lets
/// it.
pub fn run_step(
    step: &mut dyn Step,
    batch: &Batch,
    partition: Partition,
    shared: &Shared,
    runtime: &Handle,
    context: &Context<'_>,
    patience: &mut Patience,
) -> Result<Outcome, Ended> {
    let retries = &shared.config.retries;
    let backoff = Backoff { min: retries.backoff_min, max: retries.backoff_max };
    let mut attempt = Attempt { number: 1, is_last: retries.max == 0 };
    let (mut waiting, mut has_waited) = (None, false);
    let mut outcome = loop {
        let outcome = step.run(batch.clone(), partition, attempt);
        // The step may have been let go for messages of other lanes.
        if has_waited && context.stop.is_cancelled() {
            return Err(Ended::Aborted);
        }
        waiting.take_if(|_| !outcome.held);
        let Some(reason) = &outcome.retry else { break outcome };
        if outcome.held {
            context.wait(&mut waiting, reason, shared, runtime)?;
            has_waited = true;
            continue;
        }
        if attempt.is_last {
            // Against the contract of a step; whatever it is, the batch must not come for ever.
            let reason = format!("asked for a retry {} times, the last time: {reason}", attempt.number);
            break refuse_all(batch, RefusedKind::Retries, &reason);
        }
        let kind = format!("{}/{}: retry", shared.name, step.id().step);
        let show = shared.failures.hint(Hint::Status);
        shared.failures.report_by(&kind, &alike(reason), 1, reason, &show);
        let why = format!("step {} asks for retries: {reason}", step.id().step);
        *shared.retry.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), why));
        let wait = backoff.delay(attempt.number - 1);
        let bound = if step.sees_all() { wait } else { patience.left(Instant::now()) };
        let aborted = runtime.block_on(async {
            tokio::time::timeout(wait.min(bound), shared.abort.cancelled()).await.is_ok()
        });
        if aborted {
            return Err(Ended::Aborted);
        }
        patience.charge(wait.min(bound));
        attempt.number += 1;
        attempt.is_last = attempt.number > retries.max || bound < wait;
    };
    if context.counts {
        shared.metrics.dropped.increment(outcome.dropped);
    }
    outcome.refused.retain(|refused| (refused.index as usize) < batch.len());
    Ok(outcome)
}

fn refuse_all(batch: &Batch, kind: RefusedKind, reason: &str) -> Outcome {
    let refused =
        (0..batch.len() as u32).map(|index| Refused { index, kind, reason: reason.to_owned() }).collect();
    let passed = Batch { base: batch.base, now_us: batch.now_us, ..Batch::default() };
    Outcome { passed, refused, ..Default::default() }
}
