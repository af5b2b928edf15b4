//! Keeps a pipeline going: puts sinks into lanes, gives lanes new steps, splits
//! off the sink that holds the others up and takes it back when it has caught
//! up. The task ends when every lane and delivery has, which `shutdown` starts.

mod shown;
mod steps;

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::board::Board;
use super::delivery::{Control, Event};
use super::gone::Counted;
use super::lane::{Lane, LaneEnded, LaneId};
use super::metrics::SinkMetrics;
use super::outlet::{Outlet, outlet};
use super::reader::Attach;
use super::routes::SinkNumber;
use super::schedule::Flip;
use super::status::{SinkShared, State};
use super::swap::{Made, Making, NotMade};
use super::versions::{Needed, Versions};
use super::worker::Shared;
use crate::batch::Offset;
use crate::step::{Chain, Recall};
use crate::stream::{OnLag, Stream};

/// A sink this close behind the first lane's reader moves over to it.
pub const MERGE_DISTANCE_MESSAGES: u64 = 16_384;
/// After the patience for draining: for tasks to see that it is over.
const ABORT_WAIT: Duration = Duration::from_secs(5);
/// Ends of lanes not looked at.
const LANE_ENDS_MAX: usize = 64;

/// A sink as its pipeline sees it.
pub struct Member {
    pub name: String,
    pub control: mpsc::Sender<Control>,
    pub shared: Arc<SinkShared>,
    lane: Option<LaneId>,
    /// Open and in no lane: where it goes on.
    ready_from: Option<Offset>,
    /// Why steps that it needs do not start, and when they are tried again.
    refused: Option<(Instant, String)>,
    joining: bool,
    ended: bool,
    /// It has another stream than this one.
    away: bool,
    /// Its positions were read in this process.
    was_open: bool,
    /// First message that it was not known to have when its pipeline looked last.
    reached: Offset,
    on_lag: OnLag,
    /// What the log has told as gone.
    told_gone: Counted,
}

impl Member {
    /// `away`: it begins with another stream.
    pub fn new(
        name: String,
        control: mpsc::Sender<Control>,
        shared: Arc<SinkShared>,
        on_lag: OnLag,
        away: bool,
    ) -> Self {
        let reached = shared.next();
        Self {
            name,
            control,
            shared,
            lane: None,
            ready_from: None,
            refused: None,
            joining: false,
            ended: false,
            away,
            was_open: false,
            reached,
            on_lag,
            told_gone: Counted::default(),
        }
    }

    /// Whether nothing is delivered to it from this stream.
    fn is_out(&self) -> bool {
        self.ended || self.away
    }
}

/// What instances are made for.
enum Purpose {
    Swap(Chain),
    /// Sinks of the lane, and the versions whose instances are made.
    Lane(Vec<SinkNumber>, Vec<Needed>),
}

pub struct Supervisor {
    /// Each sink has a reader of its own, however near it is to the others.
    apart: bool,
    shared: Arc<Shared>,
    stream: Arc<dyn Stream>,
    chain: watch::Receiver<Chain>,
    /// The newest chain that was taken.
    active: Option<Chain>,
    versions: Versions,
    recall: Recall,
    /// Whether the lanes wait.
    hold: watch::Sender<bool>,
    /// Where the stream ended at the start.
    end_at_start: Offset,
    swap_refused: Option<String>,
    /// Why the newest chain waits for a sink: the newest version runs meanwhile.
    swap_waits: Option<String>,
    /// Ranges of messages that newer steps run than they should: what was told of each, and when.
    /// At most `VERSIONS_MAX`.
    steps_gone: VecDeque<(Instant, String)>,
    /// Why new steps wait that a held step waits for.
    waits_for_sink: Option<String>,
    /// Where the stream ended when a worker was last seen to wait for a held step; at the start, what
    /// one of an earlier process waited at lies before its end.
    held_below: Offset,
    /// The newest chain waits until what is being made is there.
    swap_due: bool,
    /// Instances of steps that are being made, for one purpose at a time.
    making: Option<(Making, Purpose)>,
    /// The newest chain did not start: it is tried again then.
    swap_again: Option<Instant>,
    members: Vec<Member>,
    lanes: Vec<Lane>,
    /// The lane that the others join.
    main: Option<LaneId>,
    lanes_made: u64,
    inbox: mpsc::Receiver<Event>,
    lane_ends: (mpsc::Sender<LaneEnded>, mpsc::Receiver<LaneEnded>),
    /// Lanes whose threads still run.
    running: BTreeSet<LaneId>,
    shutdown: CancellationToken,
    board: Arc<Board>,
    failed: Option<String>,
    started: Instant,
    window: Instant,
    /// By sink: how long workers had waited for it when the window began.
    blocked_us: Vec<u64>,
    gauges: Vec<SinkMetrics>,
}

impl Supervisor {
    pub fn new(
        (shared, apart): (Arc<Shared>, bool),
        stream: Arc<dyn Stream>,
        (mut chain, versions, recall): (watch::Receiver<Chain>, Versions, Recall),
        members: Vec<Member>,
        inbox: mpsc::Receiver<Event>,
        shutdown: CancellationToken,
        board: Arc<Board>,
    ) -> Self {
        // The first one comes once its plugins were looked into.
        if chain.borrow().generation > 0 {
            chain.mark_changed();
        }
        let gauges = members.iter().map(|member| SinkMetrics::new(&shared.name, &member.name)).collect();
        let end_at_start = stream.bounds().end;
        Self {
            apart,
            blocked_us: vec![0; members.len()],
            gauges,
            end_at_start,
            held_below: end_at_start,
            shared,
            stream,
            chain,
            active: None,
            versions,
            recall,
            hold: watch::Sender::new(false),
            swap_refused: None,
            swap_waits: None,
            steps_gone: VecDeque::new(),
            waits_for_sink: None,
            swap_due: false,
            making: None,
            swap_again: None,
            members,
            lanes: Vec::new(),
            main: None,
            lanes_made: 0,
            inbox,
            lane_ends: mpsc::channel(LANE_ENDS_MAX),
            running: BTreeSet::new(),
            shutdown,
            board,
            failed: None,
            started: Instant::now(),
            window: Instant::now(),
        }
    }

    pub async fn run(mut self) {
        let lag_after = self.shared.config.lag_after.0;
        let mut tick = tokio::time::interval(
            (lag_after / 4).clamp(Duration::from_millis(5), Duration::from_millis(500)),
        );
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = self.shutdown.cancelled() => break,
                Some(event) = self.inbox.recv() => self.hear(event).await,
                Some(ended) = self.lane_ends.1.recv() => self.lane_ended(ended),
                changed = self.chain.changed(), if self.chain.has_changed().is_ok() => {
                    if changed.is_ok() {
                        self.swap_due = true;
                        self.begin_swap();
                    }
                }
                made = finished(&mut self.making) => self.made(made),
                _ = tick.tick() => self.look_after(),
            }
            self.show();
        }
        self.stop().await;
    }

    async fn hear(&mut self, event: Event) {
        match event {
            Event::Ready { sink, from } => {
                self.take_out(sink);
                // Here, not in the delivery: so that nothing forgets in between.
                if let Err(error) = self.shared.letters.remember_from(sink, from).await {
                    self.fail(error.to_string());
                }
                let member = &mut self.members[sink];
                (member.away, member.was_open, member.ready_from) = (false, true, Some(from));
                self.tell_went_back(sink, from);
                self.place_all();
            }
            Event::Joined { sink } => {
                let main = self.main;
                for lane in self.lanes.iter_mut().filter(|lane| Some(lane.id) != main) {
                    lane.outlets.retain(|outlet| outlet.sink != sink);
                }
                self.members[sink].joining = false;
                self.members[sink].lane = main;
                self.drop_empty_lanes();
                tracing::info!(pipeline = %self.shared.name, sink = self.members[sink].name, "the sink has caught up");
            }
            Event::Left { sink } => {
                self.take_out(sink);
                self.members[sink].away = true;
            }
            Event::Ended { sink, stopped } => {
                self.take_out(sink);
                self.members[sink].ended = true;
                if let Some(reason) = stopped {
                    tracing::debug!(sink = self.members[sink].name, reason, "a delivery ended");
                }
            }
        }
    }

    /// Puts every sink that waits into a lane: at the start all into one, later
    /// each into its own, from which it moves over when it has caught up. One whose
    /// steps did not start is left out until they are tried again.
    fn place_all(&mut self) {
        if self.failed.is_some() || self.making.is_some() || self.swap_due {
            return;
        }
        let waiting = |member: &Member| member.ready_from.is_some();
        let now = Instant::now();
        let is_due = |member: &Member| {
            waiting(member) && member.refused.as_ref().is_none_or(|(again, _)| *again <= now)
        };
        if self.main.is_none() {
            let all = self.members.iter().all(|member| member.is_out() || waiting(member));
            let late = self.started.elapsed() >= self.shared.config.lag_after.0;
            let ready = (0..self.members.len()).filter(|i| is_due(&self.members[*i]));
            let ready: Vec<_> = ready.take(if self.apart { 1 } else { usize::MAX }).collect();
            if !ready.is_empty()
                && (all || late || self.apart)
                && self.begin_steps()
                && self.record_versions()
            {
                self.begin_lane(ready);
            }
            return;
        }
        // The others follow once its lane is open.
        let due = (0..self.members.len()).filter(|i| is_due(&self.members[*i]));
        let first = due.min_by_key(|i| self.members[*i].refused.as_ref().map(|(again, _)| *again));
        if let Some(sink) = first
            && self.record_versions()
        {
            self.begin_lane(vec![sink]);
        }
    }

    fn begin_lane(&mut self, sinks: Vec<SinkNumber>) {
        let from = self.shared.letters.received_by_all(&sinks);
        let (needed, wanted) = self.versions.needed_from(&from).into_iter().unzip();
        let making = Making::start(wanted, self.shared.config.worker_count(), Arc::clone(&self.recall));
        self.making = Some((making, Purpose::Lane(sinks, needed)));
    }

    fn made(&mut self, (made, purpose): (Made, Purpose)) {
        if self.failed.is_some() {
            return;
        }
        match (purpose, made) {
            (Purpose::Swap(next), Ok(made)) => self.swap(next, made),
            (Purpose::Swap(_), Err(NotMade::Start(_, reason) | NotMade::Gone(_, reason))) => {
                self.refuse_swap(reason);
            }
            (Purpose::Lane(mut sinks, needed), Ok(made)) => {
                // A sink may have gone meanwhile.
                sinks.retain(|sink| self.members[*sink].ready_from.is_some());
                // Of the records of all these versions.
                let ticket = self.shared.letters.ticket();
                let flip = |(Needed { id, begins }, (chain, steps))| {
                    self.versions.made_again(id, chain);
                    Flip { begins, steps, ticket }
                };
                let flips = needed.into_iter().zip(made).map(flip).collect();
                let opened = self.open_lane(&sinks, flips);
                if self.main.is_none() {
                    self.main = opened;
                }
                self.place_all();
            }
            (Purpose::Lane(sinks, needed), Err(NotMade::Gone(place, why))) => {
                let version = needed[place].id;
                if !self.give_to_next(version, &why) {
                    self.refuse_lane(&sinks, version, &why);
                }
                self.place_all();
            }
            (Purpose::Lane(sinks, needed), Err(NotMade::Start(place, reason))) => {
                self.refuse_lane(&sinks, needed[place].id, &reason);
                self.place_all();
            }
        }
        if self.swap_due {
            self.begin_swap();
        }
    }

    fn open_lane(&mut self, sinks: &[SinkNumber], versions: Vec<Flip>) -> Option<LaneId> {
        let from = sinks.iter().filter_map(|sink| self.members[*sink].ready_from).min()?;
        if self.running.is_empty() {
            self.shared.letters.check_redelivered();
        } else {
            self.shared.letters.check_all();
        }
        let id = self.lanes_made;
        let workers = self.shared.config.worker_count();
        let (outlets, intakes): (Vec<_>, Vec<_>) = sinks
            .iter()
            .map(|sink| outlet(*sink, self.shared.config.sink_queue_bytes_max.0, workers))
            .unzip();
        let (hold, ends) = (self.hold.subscribe(), self.lane_ends.0.clone());
        let steps = (versions, hold);
        let lane = match Lane::start(id, &self.shared, &self.stream, from, steps, outlets, ends) {
            Ok(lane) => lane,
            Err(error) => {
                self.fail(format!("cannot start worker threads: {error}"));
                return None;
            }
        };
        self.lanes_made += 1;
        self.running.insert(id);
        self.lanes.push(lane);
        for (sink, intake) in sinks.iter().zip(intakes) {
            let member = &mut self.members[*sink];
            (member.ready_from, member.refused) = (None, None);
            member.lane = Some(id);
            // A delivery that is ready has an empty queue; one that ended sends `Ended`.
            drop(member.control.try_send(Control::Start(intake)));
        }
        self.new_window();
        Some(id)
    }

    fn look_after(&mut self) {
        let is_due = self.swap_again.is_some_and(|at| Instant::now() >= at);
        if self.swap_due || self.swap_waits.is_some() || is_due {
            self.begin_swap();
        }
        self.note_held();
        // One that came to its held step only after the new chain was there.
        self.free_held_workers();
        self.versions.tidy(self.stream.bounds().start, self.lowest());
        self.members.iter_mut().for_each(|member| member.reached = member.reached.max(member.shared.next()));
        self.forget_lost();
        self.place_all();
        self.measure();
        self.tell_gone();
        self.split_laggards();
        if self.window.elapsed() >= self.shared.config.lag_after.0 {
            self.new_window();
        }
        self.take_back();
    }

    /// A sink for which workers waited most of a window, or half as long as one without a break, while
    /// another one could have gone on, leaves its lane; it asks for one of its own when it can.
    fn split_laggards(&mut self) {
        let half = self.shared.config.lag_after.0 / 2;
        let half_us = self.window.elapsed().as_micros() as u64 / 2;
        let is_over = self.window.elapsed() >= self.shared.config.lag_after.0;
        let mut laggards = Vec::new();
        for lane in &self.lanes {
            let in_window =
                |outlet: &Outlet| outlet.blocked_us().saturating_sub(self.blocked_us[outlet.sink]) > half_us;
            let blocked = |outlet: &&Outlet| outlet.blocked_for() > half || is_over && in_window(outlet);
            let slow: Vec<_> = lane.outlets.iter().filter(blocked).map(|outlet| outlet.sink).collect();
            if slow.len() < lane.outlets.len() {
                laggards.extend(slow.into_iter().map(|sink| (lane.id, sink)));
            }
        }
        for (id, sink) in laggards {
            let (pipeline, name) = (&self.shared.name, &self.members[sink].name);
            const TEXT: &str = "the sink holds the others up: it goes on by itself from its position";
            // The failure of one that fails has been told.
            match self.members[sink].shared.state() {
                State::Running => tracing::warn!(%pipeline, sink = name, "{TEXT}"),
                _ => tracing::info!(%pipeline, sink = name, "{TEXT}"),
            }
            if let Some(lane) = self.lanes.iter_mut().find(|lane| lane.id == id) {
                lane.detach(sink);
            }
            let member = &mut self.members[sink];
            member.joining = false;
            if member.lane == Some(id) {
                member.lane = None;
            }
        }
        self.drop_empty_lanes();
    }

    /// Sinks that have caught up move over to the main lane.
    fn take_back(&mut self) {
        let Some(main) = self.main.filter(|_| !self.apart) else { return };
        let Some(main) = self.lanes.iter_mut().find(|lane| lane.id == main) else { return };
        // A delivery that is busy with a failure gives up a lane that it was to join.
        main.outlets.retain(|outlet| !outlet.detached());
        let read = main.position.load(Ordering::Acquire);
        for (sink, member) in self.members.iter_mut().enumerate() {
            member.joining &= main.outlets.iter().any(|outlet| outlet.sink == sink);
            let elsewhere = member.lane.is_some_and(|lane| lane != main.id);
            let near = member.shared.received.load(Ordering::Acquire) + MERGE_DISTANCE_MESSAGES >= read;
            if !elsewhere || member.joining || !near || member.shared.state() != State::Running {
                continue;
            }
            let config = &self.shared.config;
            let (outlet, intake) = outlet(sink, config.sink_queue_bytes_max.0, config.worker_count());
            let attach = Attach { outlet: outlet.clone(), starts_at: Arc::clone(&intake.starts_at) };
            // The delivery first: it ignores a lane that never starts to send.
            if member.control.try_send(Control::Join(intake)).is_err() {
                continue;
            }
            if main.control.try_send(attach).is_err() {
                outlet.detach();
                continue;
            }
            main.outlets.push(outlet);
            member.joining = true;
        }
        self.drop_empty_lanes();
    }

    fn take_out(&mut self, sink: SinkNumber) {
        for lane in &mut self.lanes {
            lane.detach(sink);
        }
        let member = &mut self.members[sink];
        member.lane = None;
        member.joining = false;
        (member.ready_from, member.refused) = (None, None);
        self.drop_empty_lanes();
    }

    fn drop_empty_lanes(&mut self) {
        self.lanes.retain(|lane| {
            if lane.outlets.is_empty() {
                lane.stop.cancel();
                self.shared.schedule.forget(lane.id);
            }
            !lane.outlets.is_empty()
        });
        if self.main.is_some_and(|main| !self.lanes.iter().any(|lane| lane.id == main)) {
            // The others have their own already: the first of them leads.
            self.main = self.lanes.first().map(|lane| lane.id);
        }
    }

    fn lane_ended(&mut self, ended: LaneEnded) {
        self.running.remove(&ended.lane);
        let known = self.lanes.iter().any(|lane| lane.id == ended.lane);
        if known || ended.error.is_some() {
            self.fail(ended.error.unwrap_or_else(|| "a reader ended".to_owned()));
        }
        if self.running.len() <= 1 {
            self.shared.letters.check_redelivered();
        }
    }

    /// Nothing more is read; what is not committed is delivered after a restart.
    fn fail(&mut self, reason: String) {
        if self.failed.is_some() {
            return;
        }
        tracing::error!(pipeline = %self.shared.name, reason, "the pipeline has stopped: see the reason, then restart");
        self.failed = Some(reason);
        for lane in self.lanes.drain(..) {
            lane.stop.cancel();
        }
        self.main = None;
        self.shared.abort.cancel();
    }

    /// First message that some sink is not known to have.
    fn lowest(&self) -> Offset {
        let kept = self.stream.bounds().start;
        let next = |member: &Member| member.shared.next().max(kept);
        self.members.iter().filter(|member| !member.away).map(next).min().unwrap_or_default()
    }

    fn new_window(&mut self) {
        self.window = Instant::now();
        self.blocked_us.fill(0);
        for outlet in self.lanes.iter().flat_map(|lane| &lane.outlets) {
            self.blocked_us[outlet.sink] = self.blocked_us[outlet.sink].max(outlet.blocked_us());
        }
    }

    /// Readers stop, what is in flight goes to the sinks, within bounds.
    async fn stop(mut self) {
        self.making = None;
        for lane in self.lanes.drain(..) {
            lane.stop.cancel();
        }
        let patience = Instant::now() + self.shared.config.drain_max.0;
        let end = patience + ABORT_WAIT;
        while !self.running.is_empty() || self.members.iter().any(|member| !member.is_out()) {
            tokio::select! {
                Some(event) = self.inbox.recv() => match event {
                    Event::Ended { sink, .. } => self.members[sink].ended = true,
                    Event::Left { sink } => self.members[sink].away = true,
                    Event::Ready { .. } | Event::Joined { .. } => {}
                },
                Some(ended) = self.lane_ends.1.recv() => {
                    self.running.remove(&ended.lane);
                }
                () = tokio::time::sleep_until(patience), if !self.shared.abort.is_cancelled() => {
                    tracing::warn!(pipeline = %self.shared.name, "not drained in time: the rest is delivered after the next start");
                    self.shared.abort.cancel();
                }
                () = tokio::time::sleep_until(end) => {
                    tracing::error!(pipeline = %self.shared.name, "a step, a sink or the disk of the dead letters did not return in time; the pipeline ends without it, and what it held is delivered after the next start");
                    break;
                }
            }
        }
        self.shared.abort.cancel();
    }
}

/// Waits for the instances that are being made; for ever where none are.
async fn finished(making: &mut Option<(Making, Purpose)>) -> (Made, Purpose) {
    let made = match making {
        Some((making, _)) => making.finished().await,
        None => std::future::pending().await,
    };
    let (_, purpose) = making.take().expect("what has finished was being made");
    (made, purpose)
}
