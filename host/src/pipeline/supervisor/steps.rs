//! How a pipeline takes new steps: where they begin, what they wait for, and what becomes of workers
//! that an old one holds.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::super::routes::SinkNumber;
use super::super::swap::{Making, Wanted};
use super::super::versions::VersionId;
use super::super::worker::Steps;
use super::{Purpose, Supervisor};
use crate::batch::Offset;
use crate::hints::Hint;
use crate::step::{Chain, VERSIONS_MAX};
use crate::stream::AppendError;
use crate::telemetry::{Standing, alike};

/// Kind of the problem that a sink gets messages from newer steps, and the time for which it is one.
const STEPS_GONE: &str = "steps_gone";
const STEPS_GONE_WHAT: &str = "newer steps run messages of steps before them";
const STEPS_GONE_SHOWN: Duration = Duration::from_secs(3_600);
/// New steps are tried again after this where there was no buffer for their record.
const RECORD_AGAIN: Duration = Duration::from_millis(500);

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
        let is_remembered = self.lanes_made == 0 && self.versions.is_newest(&next);
        if needs_none || is_remembered {
            self.swap_waits = None;
        } else if let Some(why) = self.wants_versions() {
            return self.wait_for_room(&next, why);
        }
        let lanes = if needs_none { 0 } else { self.lanes.len().max(1) };
        let wanted = (0..lanes).map(|_| Wanted::Chain(next.clone())).collect();
        let making = Making::start(wanted, self.shared.config.worker_count(), Arc::clone(&self.recall));
        self.making = Some((making, Purpose::Swap(next)));
    }

    /// Lets the newest version run until there is room for the next steps, be it that of an earlier
    /// process, or that it was stopped by a hold that is over.
    fn wait_for_room(&mut self, next: &Chain, why: String) {
        if self.versions.is_newest(next) {
            // Made again from its recipes: it is what the next steps are.
            self.swap_waits = None;
            self.swap_again = Some(Instant::now() + self.shared.config.sink_backoff.max.0);
        } else {
            self.swap_waits = Some(why);
        }
        self.swap_refused = None;
        if self.lanes_made == 0 || self.active.as_ref().is_none_or(|active| active.hold.is_some()) {
            self.active = self.versions.newest().cloned();
        }
        self.hold.send_if_modified(std::mem::take);
        self.place_all();
    }

    /// Why no further version of the steps is taken: a sink needs every one that is kept.
    fn wants_versions(&self) -> Option<String> {
        if self.versions.needed(self.lowest()) < VERSIONS_MAX {
            return None;
        }
        let here = self.members.iter().filter(|member| !member.away);
        let last = here.min_by_key(|member| member.shared.next())?;
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
        (self.swap_refused, self.swap_waits) = (Some(reason), None);
        self.swap_again = Some(Instant::now() + self.shared.config.sink_backoff.max.0);
    }

    /// Those of a lane's sinks wait that need the version which did not start; this may pass, so that
    /// it is tried again. The others can do without it.
    pub(super) fn refuse_lane(&mut self, sinks: &[SinkNumber], version: VersionId, reason: &str) {
        let kind = format!("pipeline \"{}\": steps do not start, it tries again", self.shared.name);
        let show = self.shared.failures.hint(Hint::PluginList);
        self.shared.failures.report_by(&kind, &alike(reason), 1, reason, &show);
        let again = Instant::now() + self.shared.config.sink_backoff.max.0;
        for sink in sinks {
            let from = self.shared.letters.received_by_all(&[*sink]);
            if self.versions.needs(&from, version) {
                self.members[*sink].refused = Some((again, reason.to_owned()));
            }
        }
    }

    /// Takes the newest chain; one that holds only stops the lanes, since it may lack a step. No lane
    /// was opened since its steps were begun; some may have ended.
    pub(super) fn swap(&mut self, next: Chain, made: Vec<(Chain, Vec<Steps>)>) {
        let holds = next.hold.is_some();
        if !holds && !self.versions.runs(&next) {
            // Before the first lane they begin with it.
            if self.lanes_made > 0 && !self.flip(&next, made) {
                return;
            }
            self.shared.metrics.flipped.increment(1);
        }
        self.swap_refused = None;
        if self.swap_waits.take().is_some() {
            tracing::info!(pipeline = %self.shared.name, "new steps begin, which waited for a sink that lags");
        }
        self.active = Some(next);
        // What did not start may be what was changed.
        self.members.iter_mut().for_each(|member| member.refused = None);
        self.free_held_workers();
        self.hold.send_if_modified(|hold| std::mem::replace(hold, holds) != holds);
        self.place_all();
    }

    /// Lets new steps begin, behind all that a sink has or a lane has handed out. `false`: not now;
    /// where there is no buffer for their record they are made again soon, and lanes begin meanwhile.
    fn flip(&mut self, chain: &Chain, made: Vec<(Chain, Vec<Steps>)>) -> bool {
        let taken = self.taken(self.shared.letters.received());
        let Self { shared, lanes, versions, .. } = self;
        let made: Vec<_> = made.into_iter().map(|(_, steps)| steps).collect();
        // Some may have ended since; a lane without the new steps would run the old ones for ever.
        assert!(made.len() >= lanes.len(), "a lane was opened while its steps were made");
        let lanes = lanes.iter().map(|lane| lane.id).zip(made);
        let flipped = shared.schedule.flip(lanes, &taken, |begins| versions.add(Arc::clone(begins), chain));
        match flipped {
            Ok(()) => {
                if self.shared.held.generations().is_empty() {
                    self.versions.release();
                }
                self.say_not_recorded();
            }
            Err(AppendError::Full) => self.swap_again = Some(Instant::now() + RECORD_AGAIN),
            Err(ref error) => self.fail(format!("dead letters: {error}")),
        }
        flipped.is_ok()
    }

    /// Lets the newest steps begin with the first lane: with the first message that no sink has, or
    /// where they began in an earlier process. `false`: there are none that may run, or not now.
    pub(super) fn begin_steps(&mut self) -> bool {
        if self.lanes_made > 0 || self.swap_waits.is_some() {
            return true;
        }
        let Some(active) = self.active.clone() else { return false };
        if active.hold.is_some() {
            return self.versions.generation().is_some();
        }
        let is_waited_for = self.versions.holds_for(&active);
        if !is_waited_for {
            self.waits_for_sink = None;
        } else if !self.are_all_open() {
            return false;
        }
        let taken = self.taken(self.shared.letters.received());
        if self.versions.generation() != Some(active.generation) {
            let begun = self.versions.begin(&taken, &active);
            if !self.is_recorded(begun) {
                return false;
            }
        }
        if is_waited_for {
            self.versions.give_way(&taken);
        }
        self.versions.tidy(self.stream.bounds().start, self.lowest());
        true
    }

    /// Returns whether it is known of each sink what it has, which says where steps begin that a held
    /// step waits for.
    fn are_all_open(&mut self) -> bool {
        let closed = self.members.iter().find(|member| !member.was_open && !member.is_out());
        self.waits_for_sink = closed.map(|member| {
            format!(
                "a step holds, and where its new version begins is known once sink \"{}\" is open: mend the sink",
                member.name
            )
        });
        self.waits_for_sink.is_none()
    }

    /// Notes which versions workers wait in; and that none waits any more, once some sink has
    /// received all that was in the stream while one did.
    pub(super) fn note_held(&mut self) {
        let held = self.shared.held.generations();
        if !held.is_empty() {
            self.held_below = self.stream.bounds().end;
            held.into_iter().for_each(|generation| self.versions.hold(generation));
        } else if self.shared.letters.received().iter().all(|upto| *upto >= self.held_below) {
            self.versions.release();
        }
    }

    /// Records the versions before a lane runs messages with them. `false`: not now.
    pub(super) fn record_versions(&mut self) -> bool {
        let recorded = self.versions.record();
        self.is_recorded(recorded)
    }

    /// Where there was no buffer for a record, the next look tries again.
    fn is_recorded<T>(&mut self, recorded: Result<T, AppendError>) -> bool {
        match recorded {
            Ok(_) => self.say_not_recorded(),
            Err(AppendError::Full) => return false,
            Err(error) => {
                self.fail(format!("dead letters: {error}"));
                return false;
            }
        }
        true
    }

    /// The messages of a version that cannot be made again are the next one's; those of the newest
    /// are the next chain's, which waits for no room then. `false`: no other steps are there for them.
    pub(super) fn give_to_next(&mut self, version: VersionId, why: &str) -> bool {
        let lowest = self.lowest();
        if let Some((from, to)) = self.versions.give_to_next(version) {
            self.say_lost(why, from.max(lowest), to);
            return true;
        }
        let next = self.chain.borrow().clone();
        let is_taken = self.swap_waits.is_some() && self.versions.newest().is_none() && next.hold.is_none();
        if is_taken {
            let from = self.versions.replace_newest(&next).unwrap_or_default().max(lowest);
            if from < self.end_at_start {
                self.say_lost(why, from, self.end_at_start);
            }
            (self.swap_waits, self.active) = (None, Some(next));
        }
        is_taken
    }

    /// Says where a sink whose database went back gets messages again whose version is not kept.
    pub(super) fn tell_went_back(&mut self, sink: SinkNumber, from: Offset) {
        let member = &mut self.members[sink];
        let reached = std::mem::replace(&mut member.reached, from);
        let start = self.stream.bounds().start;
        let mut received = self.shared.letters.received_by_all(&[sink]);
        received.iter_mut().for_each(|from| *from = start.max(*from));
        if from < reached
            && let Some((from, end)) = self.versions.not_kept(&received)
        {
            let why = format!("the database of sink \"{}\" went back", member.name);
            self.say_lost(&why, from, end);
        }
    }

    /// A sink gets messages from newer steps than others got them from.
    fn say_lost(&mut self, why: &str, from: Offset, end: Offset) {
        let (name, failures) = (&self.shared.name, &self.shared.failures);
        let detail = format!("{why}; offsets {} to {}", from.0, end.0.saturating_sub(1));
        let kind = format!("pipeline \"{name}\": {STEPS_GONE_WHAT}");
        failures.report(&kind, 1, &detail, &failures.hint(Hint::PluginList));
        self.steps_gone.retain(|(_, told)| *told != detail);
        if self.steps_gone.len() == VERSIONS_MAX {
            self.steps_gone.pop_front();
        }
        self.steps_gone.push_back((Instant::now(), detail));
        self.show_lost();
    }

    /// What was said is an event, and a problem for a while.
    pub(super) fn forget_lost(&mut self) {
        let is_over = |(said, _): &mut (Instant, String)| said.elapsed() >= STEPS_GONE_SHOWN;
        if self.steps_gone.pop_front_if(is_over).is_some() {
            self.show_lost();
        }
    }

    /// Shows as one problem all that was said.
    fn show_lost(&self) {
        let (part, failures) = (format!("pipeline {}", self.shared.name), &self.shared.failures);
        if self.steps_gone.is_empty() {
            return failures.mended(&part, STEPS_GONE);
        }
        let ranges: Vec<&str> = self.steps_gone.iter().map(|(_, told)| &**told).collect();
        failures.stands(Standing {
            part,
            kind: STEPS_GONE,
            cause: format!("{STEPS_GONE_WHAT}: {}", ranges.join("; ")),
            advice: "where the newer steps route these messages elsewhere, they may be in no sink or in two: compare \
                     the tables over these offsets"
                .to_owned(),
        });
    }

    /// A restart could not tell which version of the steps has which messages.
    fn say_not_recorded(&self) {
        if self.versions.are_recorded() {
            return;
        }
        let why = "the dead letters have no room for it, the steps' configs are too large, or a plugin file cannot be \
                   stored; a restart before it is recorded can run messages of a sink that lags by other steps than \
                   those of the others";
        let kind = format!("pipeline \"{}\": where new steps begin is not recorded", self.shared.name);
        self.shared.failures.report(&kind, 1, why, &self.shared.failures.hint(Hint::PluginList));
    }

    /// Adds to what the sinks have received, by partition, what those may have that were not open
    /// yet: whatever an earlier process gave them.
    fn taken(&self, mut received: Vec<Offset>) -> Vec<Offset> {
        if self.members.iter().any(|member| !member.was_open && !member.away) {
            received.iter_mut().for_each(|upto| *upto = self.end_at_start.max(*upto));
        }
        received
    }

    /// Workers that wait for a held step never come to the new steps, which lie
    /// behind their messages: their lanes end, the new steps begin with the first message that no
    /// sink has, and the sinks begin again from their positions. What one of them has and another
    /// one has not is still run by the steps that it was run by, which hold no longer. So it waits
    /// until it is known what each sink has.
    pub(super) fn free_held_workers(&mut self) {
        let holds = self.active.as_ref().is_some_and(|active| active.hold.is_some());
        let held = self.shared.held.generations();
        let is_older =
            held.first().zip(self.versions.generation()).is_some_and(|(held, newest)| *held < newest);
        if !is_older || holds {
            // Before the first lane it is said by `begin_steps`.
            self.waits_for_sink.take_if(|_| self.lanes_made > 0);
            return;
        }
        if !self.are_all_open() {
            return;
        }
        tracing::info!(pipeline = %self.shared.name, "a held step has a new version: reading again from the sinks' positions");
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
        // Recorded before the next lane begins.
        self.versions.give_way(&taken);
        self.versions.replaced().for_each(|step| step.let_go());
        // As at the start: all sinks into one lane, as soon as they are ready.
        self.started = Instant::now();
    }
}
