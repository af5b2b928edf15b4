//! How a pipeline takes new steps: where they begin, what they wait for, and what becomes of workers
//! that an old one holds.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::time::Instant;

use super::super::swap::Making;
use super::super::worker::Steps;
use super::{Purpose, Supervisor};
use crate::batch::Offset;
use crate::hints::Hint;
use crate::step::{Chain, VERSIONS_MAX};
use crate::stream::AppendError;
use crate::telemetry::alike;

impl Supervisor {
    /// Starts to make the newest chain's instances: for every worker of every lane, or nothing
    /// changes. Lanes go on meanwhile.
    pub(super) fn begin_swap(&mut self) {
        if self.making.is_some() || self.failed.is_some() {
            return;
        }
        (self.swap_due, self.swap_again) = (false, None);
        let next = self.chain.borrow_and_update().clone();
        // Steps that hold run no message.
        let needs_none = next.hold.is_some() || self.versions.runs(&next);
        self.swap_waits = if needs_none { None } else { self.wants_versions() };
        if self.swap_waits.is_some() {
            self.swap_again = Some(Instant::now() + self.shared.config.sink_backoff.max.0);
            return;
        }
        let lanes = if needs_none { 0 } else { self.lanes.len().max(1) };
        let making = Making::start(vec![next.clone(); lanes], self.shared.config.worker_count());
        self.making = Some((making, Purpose::Swap(next)));
    }

    /// Why no further version of the steps is taken: a sink needs every one that is kept.
    fn wants_versions(&self) -> Option<String> {
        if self.lanes_made == 0 || self.versions.len() < VERSIONS_MAX {
            return None;
        }
        let last = self.members.iter().min_by_key(|member| member.shared.next())?;
        Some(format!(
            "sink \"{}\" has messages from offset {} on still to come, and the steps have changed {} times since: \
             the next change waits until it has them",
            last.name,
            last.shared.next().0,
            VERSIONS_MAX - 1
        ))
    }

    /// The chain before goes on; the reason may pass, so that the new one is tried again.
    pub(super) fn refuse_swap(&mut self, reason: String) {
        self.shared.metrics.flip_refused.increment(1);
        self.shared.failures.report_by(
            &match self.active {
                Some(_) => {
                    format!("pipeline \"{}\": new steps refused, the old ones go on", self.shared.name)
                }
                None => format!("pipeline \"{}\": its steps do not start, it tries again", self.shared.name),
            },
            &alike(&reason),
            1,
            &reason,
            &self.shared.failures.hint(Hint::PluginList),
        );
        self.swap_refused = Some(reason);
        self.swap_again = Some(Instant::now() + self.shared.config.sink_backoff.max.0);
    }

    /// Takes the newest chain; one that holds only stops the lanes, since it may lack a step. No lane
    /// was opened since its steps were begun; some may have ended.
    pub(super) async fn swap(&mut self, next: Chain, made: Vec<Vec<Steps>>) {
        let holds = next.hold.is_some();
        if !holds && !self.versions.runs(&next) {
            // Before the first lane they begin with it.
            if self.lanes_made > 0 && !self.flip(&next, made).await {
                return;
            }
            self.shared.metrics.flipped.increment(1);
        }
        self.swap_refused = None;
        self.active = Some(next);
        self.free_held_workers().await;
        self.hold.send_if_modified(|hold| std::mem::replace(hold, holds) != holds);
        self.place_all().await;
    }

    /// Lets new steps begin, behind all that a sink has or a lane has handed out. `false`: not now.
    async fn flip(&mut self, chain: &Chain, made: Vec<Vec<Steps>>) -> bool {
        let taken = self.taken(self.shared.letters.received());
        let mut made = made.into_iter();
        loop {
            let Self { shared, lanes, versions, .. } = self;
            let lanes = lanes.iter().map(|lane| lane.id).zip(&mut made);
            let flipped =
                shared.schedule.flip(lanes, &taken, |begins| versions.add(Arc::clone(begins), chain));
            match self.recorded(flipped).await {
                Some(is_recorded) => return is_recorded,
                None => continue,
            }
        }
    }

    /// Lets the newest steps begin with the first lane: with the first message that no sink has, or
    /// where they began in an earlier process. `false`: there are none that may run.
    pub(super) async fn begin_steps(&mut self) -> bool {
        if self.lanes_made > 0 {
            return true;
        }
        let Some(active) = self.active.clone() else { return false };
        if active.hold.is_some() {
            return self.versions.generation().is_some();
        }
        while self.versions.generation() != Some(active.generation) {
            let taken = self.taken(self.shared.letters.received());
            let begun = self.versions.begin(&taken, &active);
            if self.recorded(begun).await == Some(false) {
                return false;
            }
        }
        while self.versions.len() > VERSIONS_MAX {
            self.versions.drop_oldest();
            self.say_lost(&format!(
                "more than {VERSIONS_MAX} versions of the steps are needed by sinks that lag"
            ));
        }
        true
    }

    /// A sink gets messages from newer steps than others got them from.
    pub(super) fn say_lost(&self, why: &str) {
        let kind =
            format!("pipeline \"{}\": newer steps run messages of steps before them", self.shared.name);
        self.shared.failures.report(&kind, 1, why, &self.shared.failures.hint(Hint::PluginList));
    }

    /// A restart could not tell where the newest steps began.
    fn say_not_noted(&self) {
        if self.versions.is_noted() {
            return;
        }
        let why = "the dead letters have no room for it, or the steps' configs are too large; a restart before it is noted \
                   can run messages of a sink that lags by other steps than those of the others";
        let kind = format!("pipeline \"{}\": where new steps begin is not noted", self.shared.name);
        self.shared.failures.report(&kind, 1, why, &self.shared.failures.hint(Hint::PluginList));
    }

    /// Returns whether a record was made; `None`: there is a buffer for it now.
    async fn recorded(&mut self, recorded: Result<(), AppendError>) -> Option<bool> {
        match recorded {
            Ok(()) => {
                self.say_not_noted();
                Some(true)
            }
            Err(AppendError::Full) => {
                self.versions.writable().await;
                None
            }
            Err(error) => {
                self.fail(format!("dead letters: {error}"));
                Some(false)
            }
        }
    }

    /// Adds to what the sinks have received, by partition, what those may have that were not open
    /// yet: whatever an earlier process gave them.
    fn taken(&self, mut received: Vec<Offset>) -> Vec<Offset> {
        if self.members.iter().any(|member| !member.was_open) {
            received.iter_mut().for_each(|upto| *upto = self.end_at_start.max(*upto));
        }
        received
    }

    /// Workers that wait for a held step never come to the new steps, which lie
    /// behind their messages: their lanes end, the new steps begin with the first message that no
    /// sink has, and the sinks begin again from their positions. What one of them has and another
    /// one has not is still run by the steps that it was run by, which hold no longer.
    pub(super) async fn free_held_workers(&mut self) {
        let held_in = self.shared.held_in.load(Ordering::Acquire);
        let Some(newest) = self.versions.generation() else { return };
        let holds = self.active.as_ref().is_some_and(|active| active.hold.is_some());
        if held_in == 0 || held_in >= newest || holds {
            return;
        }
        tracing::info!(pipeline = %self.shared.name, "a held step has a new version: reading again from the sinks' positions");
        self.shared.held_in.store(0, Ordering::Release);
        for sink in 0..self.members.len() {
            for lane in &mut self.lanes {
                lane.detach(sink);
            }
            self.members[sink].lane = None;
            self.members[sink].joining = false;
        }
        self.drop_empty_lanes();
        // A lane that is being made has the versions as they are before this.
        self.making.take_if(|(_, purpose)| matches!(purpose, Purpose::Lane(..)));
        let taken = self.taken(self.shared.letters.cut());
        loop {
            match self.versions.begin_newest_at(&taken) {
                Ok(()) => break,
                Err(AppendError::Full) => self.versions.writable().await,
                Err(error) => return self.fail(format!("dead letters: {error}")),
            }
        }
        self.say_not_noted();
        self.versions.replaced().for_each(|step| step.let_go());
        // As at the start: all sinks into one lane, as soon as they are ready.
        self.started = Instant::now();
    }
}
