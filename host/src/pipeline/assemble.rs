//! How a pipeline is put together: which streams its sinks read, what delivers to them, what supervises that.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::answering::{Answering, Shown};
use super::board::{Board, Boards};
use super::claim::Waiting;
use super::dead_letters::{DeadLetters, Error as DeadLettersError, OutHas};
use super::delivery::{Delivery, Event, Lend};
use super::gone::Gone;
use super::held::HeldWorkers;
use super::letter::Names;
use super::metrics::{self, PipelineMetrics};
use super::reasons::KeptReasons;
use super::records::Records;
use super::redrive::{CatchesUp, Lender};
use super::redrive_status::Redrives;
use super::road::{self, Leg, OutNow, Road, Table};
use super::routes::{RouteTables, Routes, SinkNumber};
use super::schedule::Schedule;
use super::status::SinkShared;
use super::supervisor::{Member, Supervisor};
use super::travel::{Traveller, begin_at};
use super::versions::Versions;
use super::worker::Shared;
use super::writer::{Pace, Refusals, Writer};
use super::{
    Batching, Beginning, CONTROLS_MAX, Config, Deps, EVENTS_PER_SINK_MAX, FirstStart, Handle, OutPart,
    Redriver, SinkPart, claim_of, names_of,
};
use crate::batch::Offset;
use crate::sinks::stream::Target;
use crate::sinks::{Begin, Name};
use crate::step::{Chain, Recall};
use crate::stream::{Attachment, BeginNow, Delivered, Identity, OnLag, Stream};
use crate::telemetry::Failures;
use crate::units::Period;

/// After the time that a pipeline has to drain, what its sinks read of the out stream has this time.
const DRAIN_BEHIND_MAX: Duration = Duration::from_secs(2);
/// A redrive waits for a sink that another one has.
const LENDS_MAX: usize = 1;

/// Starts a pipeline. Fails only where the dead letters cannot be read, or have no room for which streams the
/// sinks read; a sink that is down is waited for.
pub async fn start(name: &str, config: &Config, deps: Deps) -> Result<Handle, DeadLettersError> {
    let Deps {
        stream,
        chain,
        recall,
        sinks,
        out,
        dead_letters,
        sink_names,
        reasons,
        dead_letters_bytes_max,
        configured,
        failures,
        shutdown,
    } = deps;
    let pipelines = names_of(name, &config.renamed_from);
    let written = out.as_ref().filter(|out| out.is_written);
    let shown: Vec<String> =
        sinks.iter().chain(written.map(|out| &out.part)).map(|part| part.name.clone()).collect();
    let number_of_out = written.map(|_| sinks.len());
    let mut names = Names::new(pipelines.clone(), shown.clone(), sink_names).with_out(number_of_out);
    if let Some(left_over) = out.as_ref().filter(|out| !out.is_written) {
        names = names.taking_over(&left_over.part.name);
    }
    let own = names.own();
    let ids = &own.sinks[..sinks.len()];
    let out_now = out.as_ref().map(|out| out_now(&pipelines, &*stream, out));
    let roads =
        road::plan(&dead_letters, &names, &*stream, out_now.as_ref(), ids, &routes_of(config, &names))
            .await?;
    let roads_of: Vec<Road> = ids.iter().map(|ids| roads.of(&ids[0])).collect();
    let read_out = out.as_ref().filter(|_| roads_of.iter().any(|road| road.reads_out(out_now.as_ref())));

    // The steps and the sinks have their letters by the stream that each of them reads.
    let share = if read_out.is_some() { dead_letters_bytes_max / 2 } else { dead_letters_bytes_max };
    let open = |source: &Arc<dyn Stream>, names: Names| {
        let (dead_letters, source) = (Arc::clone(&dead_letters), Arc::clone(source));
        async move { DeadLetters::open(dead_letters, names, &*source, share, None).await }
    };
    let letters = open(&stream, names.clone()).await?;
    let until = roads_of.iter().map(Road::source_end).chain(written.map(|_| None)).collect();
    letters.set_until(until, written.map(|out| out_has(&names, &out.target))).await?;
    metrics::register(name, &shown);
    let common = Common {
        name,
        config,
        pipelines: &pipelines,
        configured: &configured,
        failures: &failures,
        dead_letters: &dead_letters,
        reasons: &reasons,
        shutdown: &shutdown,
    };
    // What the steps have written goes to the sinks first.
    let stop_behind = CancellationToken::new();
    let of_behind = Common { shutdown: &stop_behind, ..common };
    let of_config = || Routes::new(config, &shown);
    let of_source = RouteTables::new(Vec::new(), (Offset(0), of_config().with_all_to(number_of_out)));
    let table =
        |table: &Table| Routes::of(routes_then(table, &names, &routes_of(config, &names)).into_iter());
    let tables = roads.tables().iter().map(|known| (known.from, table(known))).collect();
    let end = out_now.as_ref().map_or(Offset(0), |out| out.end);
    let of_out = RouteTables::new(tables, (end, of_config()));
    let steps = (chain, recall);
    let mut source =
        Part::new(&common, config.clone(), Arc::clone(&stream), letters, (&shown, of_source), false);
    let mut behind = match read_out {
        Some(out) => {
            let letters =
                open(&out.stream, names.clone().with_out(None)).await?.with_sent_of(&source.shared.letters);
            // No step runs: a thread for each sink hands its messages out.
            let drain_max = Period(config.drain_max.0.min(DRAIN_BEHIND_MAX));
            let config = Config { workers: Some(1), drain_max, ..config.clone() };
            Some(Part::new(&of_behind, config, Arc::clone(&out.stream), letters, (&shown, of_out), true))
        }
        None => None,
    };

    let (mut lenders, mut places) = (Vec::new(), Vec::new());
    for (number, part) in sinks.into_iter().enumerate() {
        let road = roads_of[number].clone();
        let (lender, place) = travel(
            (&common, &of_behind),
            number,
            part,
            road,
            &ids[number][0],
            (&mut source, behind.as_mut()),
            out_now.as_ref(),
        );
        lenders.push(lender);
        places.push(place);
    }
    if let Some(OutPart { part, .. }) = out.filter(|out| out.is_written) {
        // What is written to it comes to all that read it.
        let others =
            lenders.iter_mut().flat_map(|lender: &mut Lender| std::mem::take(&mut lender.others)).collect();
        let (lender, place) =
            deliver_to_out(&common, lenders.len(), part, (roads.begun(), others), &mut source);
        lenders.push(lender);
        places.push(place);
    }

    let identity = stream.identity();
    #[cfg(test)]
    let aborts = std::iter::once(&source).chain(&behind).map(|part| part.shared.abort.clone()).collect();
    let shared = Arc::clone(&source.shared);
    let (board, mut ends) = source.supervise(&common, identity, steps);
    let mut boards = vec![board];
    if let Some(behind) = behind {
        let identity = behind.stream.identity();
        let (out, abort) = (Arc::clone(&behind.stream), behind.shared.abort.clone());
        // The steps have run.
        let (none, chain) = watch::channel(Chain { generation: 1, steps: [].into(), hold: None });
        let recall: Recall = Arc::new(|_| unreachable!("there are no steps"));
        let (board, task) = behind.supervise(&of_behind, identity, (chain, recall));
        let (shutdown, drain_max, shown) = (shutdown.clone(), config.drain_max.0, Arc::clone(&board));
        boards.push(board);
        let drains = places.clone();
        ends = tokio::spawn(async move {
            shutdown.cancelled().await;
            let end = tokio::time::Instant::now() + drain_max;
            let ended = ends.await;
            let drained = abort.run_until_cancelled(shown.drained(&*out, &drains));
            drop(tokio::time::timeout_at(end, drained).await);
            stop_behind.cancel();
            drop((task.await, none));
            ended.unwrap_or_else(|error| tracing::error!(%error, "a pipeline's supervisor failed"));
        });
    }
    let redriver = Arc::new(Redriver {
        boards: Boards::new(boards, places, number_of_out),
        epochs: tokio::sync::Mutex::default(),
        lenders,
        dead_letters: Arc::clone(&dead_letters),
        shared,
        stopping: shutdown.clone(),
    });
    let watching = Arc::clone(&redriver).watch_missing();
    tokio::spawn(shutdown.clone().run_until_cancelled_owned(watching));
    tokio::spawn(Arc::clone(&redriver).resume());
    Ok(Handle {
        #[cfg(test)]
        shutdown: shutdown.clone(),
        #[cfg(test)]
        aborts,
        redriver,
        task: tokio::sync::Mutex::new(Some(ends)),
    })
}

/// What the parts of a pipeline have in common.
#[derive(Clone, Copy)]
struct Common<'a> {
    name: &'a str,
    config: &'a Config,
    /// The name that the pipeline has, then those that it had.
    pipelines: &'a [String],
    configured: &'a Arc<BTreeSet<Name>>,
    failures: &'a Failures,
    dead_letters: &'a Arc<dyn Stream>,
    reasons: &'a Arc<KeptReasons>,
    shutdown: &'a CancellationToken,
}

/// What reads one stream: the source, with the steps, or the out stream.
struct Part {
    stream: Arc<dyn Stream>,
    shared: Arc<Shared>,
    members: Vec<Member>,
    events: mpsc::Sender<Event>,
    inbox: mpsc::Receiver<Event>,
    is_behind_steps: bool,
}

impl Part {
    fn new(
        common: &Common<'_>,
        config: Config,
        stream: Arc<dyn Stream>,
        letters: DeadLetters,
        (sinks, routes): (&[String], RouteTables),
        is_behind_steps: bool,
    ) -> Self {
        let name = common.name;
        // What the steps have seen is counted: see `Worker::count`.
        let counted = if is_behind_steps { u64::MAX } else { 0 };
        let shared = Arc::new(Shared {
            name: name.into(),
            routes,
            config,
            letters: Arc::new(letters),
            failures: common.failures.clone(),
            metrics: PipelineMetrics::new(name),
            redrives: Redrives::new(name),
            reasons: Arc::clone(common.reasons),
            gone: Arc::new(Gone::new(name)),
            counted: (0..stream.identity().partitions).map(|_| AtomicU64::new(counted)).collect(),
            held: HeldWorkers::default(),
            retry: Mutex::default(),
            schedule: Schedule::default(),
            abort: CancellationToken::new(),
        });
        let (events, inbox) = mpsc::channel(EVENTS_PER_SINK_MAX * sinks.len().max(1));
        Self { stream, shared, members: Vec::new(), events, inbox, is_behind_steps }
    }

    /// Adds a sink, and returns what delivers to it from this part's stream.
    fn add(&mut self, common: &Common<'_>, of: &Of<'_>, begins_elsewhere: bool) -> Delivery {
        let has_left = begins_elsewhere && !self.is_behind_steps;
        let (shared, number) = (&self.shared, of.number);
        let (control, controls) = mpsc::channel(CONTROLS_MAX);
        let sink_shared = Arc::new(SinkShared::new(common.name, of.name, of.target, common.failures.clone()));
        let claim = claim_of(common.pipelines, &of.names, self.stream.identity());
        let consumer = format!("{}/{}", common.name, of.name);
        for (pipeline, sink) in &claim.formerly {
            self.stream.rename_reader(&format!("{pipeline}/{sink}"), &consumer);
        }
        let kept = self.stream.bounds();
        // A sink that has gone on to another stream needs nothing here.
        let from = if has_left { kept.end } else { kept.start };
        // One that has left is only looked at: its database may be an older one.
        let on_lag = if has_left { OnLag::Detach } else { of.on_lag };
        let attachment: Arc<dyn Attachment> = self.stream.attach(&consumer, from, on_lag).into();
        // Now, however long the database is away.
        let now = attachment.begin_now(of.begin == Some(Begin::Now));
        let remembered = match (now, has_left) {
            (_, true) => kept.end,
            (Some(BeginNow::At(offset)), _) => offset.max(attachment.remembered()),
            _ => attachment.remembered(),
        };
        sink_shared.remembered.store(remembered.0, Ordering::Release);
        let waiting = Waiting { from: remembered, on_lag: of.on_lag, gone: Arc::clone(&shared.gone) };
        let batching = bounded(of.batching, common.config);
        let member =
            Member::new(of.name.to_owned(), control, Arc::clone(&sink_shared), of.on_lag, begins_elsewhere);
        self.members.push(member);
        Delivery {
            number,
            attachment: Arc::clone(&attachment),
            writer: Writer {
                beginning: Some(Beginning {
                    begin: FirstStart::new(of.begin, now),
                    configured: Arc::clone(common.configured),
                    stream: of.is_stream.then_some(remembered),
                }),
                attachment: Some(attachment),
                waiting: Some(waiting),
                refusals: Refusals::new(common.config.refusals_max_share),
                pace: Pace::new(&batching),
                ..Writer::new(None, number, claim, &shared.letters, common.failures.clone())
            },
            stream: Arc::clone(&self.stream),
            on_lag: of.on_lag,
            batching,
            backoff: common.config.sink_backoff,
            progress_every: common.config.progress_every.0,
            shared: sink_shared,
            control: controls,
            lends: None,
            events: self.events.clone(),
            stopping: common.shutdown.clone(),
            abort: shared.abort.clone(),
            intake: None,
            pending: None,
            received: Vec::new(),
            floor: Vec::new(),
            until: None,
            next: None,
            hold: has_left.then_some((consumer, of.on_lag)),
            shows: None,
        }
    }

    fn supervise(
        self,
        common: &Common<'_>,
        identity: Identity,
        (chain, recall): (watch::Receiver<Chain>, Recall),
    ) -> (Arc<Board>, tokio::task::JoinHandle<()>) {
        let Self { stream, shared, members, inbox, is_behind_steps, .. } = self;
        let shareds: Vec<Arc<SinkShared>> = members.iter().map(|member| Arc::clone(&member.shared)).collect();
        let board = Arc::new(Board::new(common.name, Arc::clone(&stream), shareds));
        let letters = Arc::clone(&shared.letters);
        let (records, recorded) =
            Records::open(Arc::clone(common.dead_letters), letters, shared.letters.names(), identity);
        let versions = Versions::new(records, recorded, stream.bounds().end);
        let steps = (chain, versions, recall);
        let shutdown = common.shutdown.clone();
        let supervisor = Supervisor::new(
            (shared, is_behind_steps),
            stream,
            steps,
            members,
            inbox,
            shutdown,
            Arc::clone(&board),
        );
        (board, tokio::spawn(supervisor.run()))
    }
}

/// What a part has to know of a sink.
struct Of<'a> {
    number: SinkNumber,
    name: &'a str,
    /// The name that it has, then the one that it had.
    names: Vec<String>,
    target: &'a str,
    batching: Batching,
    on_lag: OnLag,
    begin: Option<Begin>,
    is_stream: bool,
}

impl<'a> Of<'a> {
    fn new(number: SinkNumber, part: &'a SinkPart) -> Self {
        let SinkPart { name, target, batching, on_lag, renamed_from, begin, is_stream, .. } = part;
        let (batching, on_lag, begin) = (*batching, *on_lag, *begin);
        Self {
            number,
            name,
            names: names_of(name, renamed_from),
            target,
            batching,
            on_lag,
            begin,
            is_stream: *is_stream,
        }
    }
}

/// Which stream a sink is shown in: its place in [`Boards`].
pub type Place = Arc<AtomicUsize>;
pub const AT_SOURCE: usize = 0;
pub const BEHIND_STEPS: usize = 1;

/// Starts what delivers to a sink, along its road.
fn travel(
    (common, of_behind): (&Common<'_>, &Common<'_>),
    number: SinkNumber,
    part: SinkPart,
    road: Road,
    id: &str,
    (source, behind): (&mut Part, Option<&mut Part>),
    out: Option<&OutNow>,
) -> (Lender, Place) {
    let of = Of::new(number, &part);
    let consumer = format!("{}/{}", common.name, of.name);
    // It has read the out stream in an earlier process.
    let attached = behind.as_deref().map(|behind| {
        let claim = claim_of(common.pipelines, &of.names, behind.stream.identity());
        for (pipeline, sink) in &claim.formerly {
            behind.stream.rename_reader(&format!("{pipeline}/{sink}"), &consumer);
        }
        behind.stream.attach(&consumer, behind.stream.bounds().start, of.on_lag)
    });
    let has_begun = attached.as_ref().is_some_and(|attached| attached.delivered() == Delivered::ToThis);
    // And it has left the source for good.
    let begins_there = has_begun
        && match (&road.legs[..], attached) {
            ([Leg::Source { from, .. }, Leg::Out { .. }], _) if from.is_empty() => true,
            ([.., Leg::Out { from, .. }], Some(attached)) => attached.remembered() > *from,
            _ => false,
        };
    let mut at_source = source.add(common, &of, begins_there);
    let shown = Shown::new(Arc::clone(&at_source.shared));
    let place: Place = Arc::new(AtomicUsize::new(if begins_there { BEHIND_STEPS } else { AT_SOURCE }));
    at_source.shows = Some((Arc::clone(&place), AT_SOURCE));
    let here = (Arc::clone(&source.shared.letters), Arc::clone(&at_source.shared));
    // Messages before that come to it by the source.
    let source_end = road.source_end().filter(|_| !begins_there).and_then(|until| until.into_iter().max());
    let catches_up = source_end.map(|until| (Arc::clone(&here.0), Arc::clone(&here.1), until));
    let mut places = vec![here];
    let batching = at_source.batching;
    let at_out = behind.map(|behind| {
        let mut delivery = behind.add(of_behind, &of, !begins_there);
        places.push((Arc::clone(&behind.shared.letters), Arc::clone(&delivery.shared)));
        delivery.shows = Some((Arc::clone(&place), BEHIND_STEPS));
        delivery
    });
    let in_out = at_out.as_ref().zip(out).map(|(delivery, out)| {
        let claim = &delivery.writer.claim;
        let own = (claim.pipeline.clone(), claim.sink.clone());
        (std::iter::once(own).chain(claim.formerly.iter().cloned()).collect(), out.log)
    });
    let (lends, asked) = mpsc::channel(LENDS_MAX);
    let lender = Lender { lends, places, others: catches_up.into_iter().collect(), batching };
    let traveller = Traveller {
        road,
        id: id.to_owned(),
        pipeline: common.name.to_owned(),
        sink: Box::new(Answering { sink: part.sink, shown: shown.clone() }),
        shown,
        lends: asked,
        at_source,
        at_out,
        out: out.map_or(Uuid::nil(), |out| out.log),
        in_out,
        has_begun,
        begins_at_out: begins_there,
    };
    tokio::spawn(traveller.run());
    (lender, place)
}

/// Starts what writes to the out stream.
fn deliver_to_out(
    common: &Common<'_>,
    number: SinkNumber,
    part: SinkPart,
    (begun, others): (Offset, Vec<CatchesUp>),
    source: &mut Part,
) -> (Lender, Place) {
    let of = Of::new(number, &part);
    let mut delivery = source.add(common, &of, false);
    let names = Arc::clone(common.configured);
    delivery.writer.beginning = Some(Beginning { begin: None, configured: names, stream: Some(begun) });
    begin_at(&mut delivery, begun);
    delivery.floor = vec![begun; usize::from(source.stream.identity().partitions)];
    let shown = Shown::new(Arc::clone(&delivery.shared));
    delivery.writer.sink = Some(Box::new(Answering { sink: part.sink, shown }));
    let (lends, asked) = mpsc::channel::<Lend>(LENDS_MAX);
    delivery.lends = Some(asked);
    let places = vec![(Arc::clone(&source.shared.letters), Arc::clone(&delivery.shared))];
    let lender = Lender { lends, places, others, batching: delivery.batching };
    tokio::spawn(async move { delivery.run().await });
    (lender, Arc::new(AtomicUsize::new(AT_SOURCE)))
}

/// Returns what the routes of a config lead to, as ids of sinks, which stay when sinks are renamed.
fn routes_of(config: &Config, names: &Names) -> BTreeMap<String, Vec<String>> {
    let id = |sink: &String| names.with_name(sink).map(|sink| names.id(sink).to_owned());
    let to = |target| config.targets(target).filter_map(id).collect();
    config.routes.iter().map(|(route, target)| (route.clone(), to(target))).collect()
}

/// Returns what the routes led to when a table was taken down, as sinks by route. A sink that was not there then, and is
/// back, gets what it would have got by the routes of now.
fn routes_then(
    then: &Table,
    names: &Names,
    now: &BTreeMap<String, Vec<String>>,
) -> Vec<(String, Vec<SinkNumber>)> {
    let number = |ids: &Vec<String>| ids.iter().filter_map(|id| names.number(id)).collect::<BTreeSet<_>>();
    let there: BTreeSet<_> = then.to.values().flat_map(number).collect();
    let of_route = |(route, ids): (&String, &Vec<String>)| {
        let back = now.get(route).map(number).unwrap_or_default();
        let sinks = number(ids).into_iter().chain(back.difference(&there).copied()).collect();
        (route.clone(), sinks)
    };
    then.to.iter().map(of_route).collect()
}

/// Tells which letters redrives have written to the out stream.
fn out_has(names: &Names, out: &Target) -> OutHas {
    let of_out = names.sinks.last().cloned().unwrap_or_default();
    let claims: Vec<Name> = names
        .redrives()
        .iter()
        .flat_map(|pipeline| of_out.iter().map(|sink| (pipeline.clone(), sink.clone())))
        .collect();
    let out = out.clone();
    Box::new(move |pass, partition, letter| out.has_passed(&claims, pass, partition, letter))
}

/// Returns the out stream as this start finds it, before anything is written to it.
fn out_now(pipelines: &[String], source: &dyn Stream, out: &OutPart) -> OutNow {
    let claim = claim_of(pipelines, &names_of(&out.part.name, &out.part.renamed_from), source.identity());
    let consumer = format!("{}/{}", claim.pipeline, claim.sink);
    for (pipeline, sink) in &claim.formerly {
        source.rename_reader(&format!("{pipeline}/{sink}"), &consumer);
    }
    OutNow {
        log: out.stream.identity().log,
        start: out.stream.bounds().start,
        end: out.stream.bounds().end,
        reached: out.target.reached(&claim),
        is_written: out.is_written,
    }
}

/// A commit must be reached before the queue's room is used up.
fn bounded(batching: Batching, config: &Config) -> Batching {
    Batching {
        rows_max: batching.rows_max.max(1),
        bytes_max: batching.bytes_max.clamp(1, config.sink_queue_bytes_max.0 / 2),
        ..batching
    }
}
