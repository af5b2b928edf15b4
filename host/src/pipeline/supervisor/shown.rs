//! What a pipeline shows of itself: its state, its gauges, and what retention removed before a sink had it.

use std::sync::atomic::Ordering;

use super::super::dead_letters::{KEYS_MAX, Waiting};
use super::super::outlet::Outlet;
use super::super::routes::SinkNumber;
use super::super::status::State;
use super::{Member, Supervisor};
use crate::batch::Offset;
use crate::hints::Hint;
use crate::stream::OnLag;
use crate::units::ByteSize;

impl Supervisor {
    pub(super) fn show(&self) {
        let main = self.lanes.iter().find(|lane| Some(lane.id) == self.main);
        let state = self.state();
        let wants_room =
            matches!(&state, State::Holding(reason) if self.wants_room().as_ref() == Some(reason));
        let mut before = State::Starting;
        self.board.shown.send_modify(|shown| {
            before = std::mem::replace(&mut shown.state, state.clone());
            if std::mem::discriminant(&before) != std::mem::discriminant(&state) {
                shown.since = std::time::Instant::now();
            }
            shown.wants_room = wants_room;
            shown.chain.clone_from(&self.active);
            shown.swap_refused.clone_from(&self.swap_refused);
            shown.swap_waits.clone_from(&self.swap_waits);
            shown.retries = self.shared.recent_retry();
            if let Some(lane) = main {
                shown.read = Offset(lane.position.load(Ordering::Acquire));
            } else if self.lanes_made == 0 {
                shown.read = self.lowest();
            }
            for (own, member) in shown.own_lane.iter_mut().zip(&self.members) {
                *own = member.lane.is_some() && member.lane != self.main;
            }
        });
        match (&before, &state) {
            (State::Running, State::Running) => {}
            (_, State::Running) => tracing::info!(pipeline = %self.shared.name, "the pipeline runs"),
            (State::Running, State::Holding(reason)) if wants_room => {
                tracing::warn!(pipeline = %self.shared.name, "{reason}");
            }
            _ => {}
        }
    }

    fn state(&self) -> State {
        if let Some(reason) = &self.failed {
            return State::Stopped(reason.clone());
        }
        let Some(active) = &self.active else {
            let refused = self.lane_refused().map(State::Retrying);
            return refused.or(self.swap_refused.clone().map(State::Holding)).unwrap_or(State::Starting);
        };
        if let Some(reason) = &active.hold {
            return State::Holding(reason.to_string());
        }
        if let Some(why) = self.shared.held.why(active.generation) {
            return State::Holding(why);
        }
        if let Some(reason) = &self.waits_for_sink {
            return State::Holding(reason.clone());
        }
        if let Some(reason) = self.lane_refused() {
            return State::Retrying(reason);
        }
        if self.main.is_some() {
            return self.wants_room().map_or(State::Running, State::Holding);
        }
        if self.members.iter().all(|member| member.away) {
            return State::Running;
        }
        if self.members.iter().all(|member| member.is_out()) {
            return State::Stopped("none of its sinks goes on".to_owned());
        }
        State::Starting
    }

    /// Why no lane starts for a sink; it is tried again.
    fn lane_refused(&self) -> Option<String> {
        self.members.iter().find_map(|member| member.refused.as_ref().map(|(_, reason)| reason.clone()))
    }

    /// Why rejected messages wait for room in the dead letters. `None` also where each
    /// sink that holds the room runs: it gives it back as it commits.
    fn wants_room(&self) -> Option<String> {
        let holders = match self.shared.letters.waiting()? {
            Waiting::Sinks(holders) => holders,
            Waiting::Log => {
                return Some(
                    "dead letters are full: look at them, then raise their retention or free disk space"
                        .to_owned(),
                );
            }
        };
        let down = |sink: &&SinkNumber| self.members[**sink].shared.state() != State::Running;
        let sink = &self.members[*holders.iter().find(down)?].name;
        let share = ByteSize(self.shared.letters.share_bytes());
        Some(format!(
            "dead letters are full for this pipeline: sink \"{sink}\" does not run, and {KEYS_MAX} letters or {share} of them \
             wait until it is past their messages; mend the sink, or raise dead_letters.max_bytes"
        ))
    }

    pub(super) fn measure(&self) {
        let kept = self.stream.bounds();
        let (start, end) = (kept.start, kept.end.0);
        for (sink, (member, gauges)) in self.members.iter().zip(&self.gauges).enumerate() {
            if member.away {
                continue;
            }
            gauges.lag.set(end.saturating_sub(member.shared.next().max(start).0) as f64);
            let outlets = self.lanes.iter().flat_map(|lane| &lane.outlets).filter(|o| o.sink == sink);
            gauges.queue_bytes.set(outlets.map(Outlet::queued_bytes).sum::<u64>() as f64);
        }
        if !self.apart {
            self.shared.metrics.lanes.set(self.lanes.len() as f64);
        }
    }

    /// Tells what retention removed before sinks had it, at once: a sink may come to the gap much later.
    pub(super) fn tell_gone(&mut self) {
        let start = self.stream.bounds().start.0;
        let detaching = |member: &&mut Member| member.on_lag == OnLag::Detach && !member.away;
        for member in self.members.iter_mut().filter(detaching) {
            let lane = self.lanes.iter().find(|lane| Some(lane.id) == member.lane);
            // What its lane has read is in memory, and may still be written.
            let lacks = lane.map_or(member.shared.next().0, |lane| lane.position.load(Ordering::Acquire));
            member.shared.gone.store(start.saturating_sub(lacks), Ordering::Release);
            self.shared.gone.count(lacks..start);
            let more = member.told_gone.add(lacks..start);
            if more > 0 {
                let kind = format!(
                    "sink \"{}\" of pipeline \"{}\": retention removed messages before the sink had them \
                     (on_lag: detach)",
                    member.name, self.shared.name
                );
                let offsets = format!("offsets {lacks} to {}", start - 1);
                self.shared.failures.report(&kind, more, &offsets, &self.shared.failures.hint(Hint::Status));
            }
        }
    }
}
