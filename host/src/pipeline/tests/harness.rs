//! A pipeline on memory parts, and steps written as functions.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::batch::{Batch, Entry, MessageRef, Offset, Partition, Span};
use crate::pipeline::{
    Backoff, Batching, Config, DeadLettersError, Deps, Handle, KeptReasons, Letter, MARK_PREFIX, Mark, Marks,
    OutPart, PipelineStatus, Retries, RouteTarget, SinkPart, list_open, name_sinks, names_of, need_out,
    start,
};
use crate::problems::{KeyPath, Problem};
use crate::sinks::Begin;
use crate::sinks::memory::MemoryDatabase;
use crate::sinks::stream::Target;
use crate::step::{
    Attempt, Chain, Outcome, Recall, RecallError, Refused, RefusedKind, Step, StepFactory, StepId,
};
use crate::stream::memory::MemoryStream;
use crate::stream::{NewMessage, OnLag, Read, Stream, partition_of};
use crate::telemetry::Failures;
use crate::units::Period;

/// What a test's step does with one message.
#[derive(Clone)]
pub enum Act {
    Pass,
    Drop,
    Route(&'static str),
    Payload(String),
    /// So many messages in its place.
    Times(usize),
    Refuse(String),
    Retry(&'static str),
    Hold(&'static str),
}

type Broken = Box<dyn Fn(u32) -> bool + Send + Sync>;

pub type StepFn = Arc<dyn Fn(&MessageRef<'_>, u32) -> Act + Send + Sync>;

struct TestStep {
    id: StepId,
    act: StepFn,
    sees_all: bool,
    is_let_go: Arc<AtomicBool>,
}

impl Step for TestStep {
    fn id(&self) -> &StepId {
        &self.id
    }

    fn sees_all(&self) -> bool {
        self.sees_all
    }

    fn run(&mut self, batch: Batch, _: Partition, attempt: Attempt) -> Outcome {
        let mut outcome = Outcome::default();
        let mut data = Vec::new();
        let segment = batch.segments.len();
        let mut entries: Vec<Entry> = Vec::new();
        for (i, message) in batch.messages().enumerate() {
            let mut entry = *message.entry;
            let mut put = |bytes: &[u8]| {
                data.extend_from_slice(bytes);
                Span::new(segment, data.len() - bytes.len(), bytes.len())
            };
            match (self.act)(&message, attempt.number - 1) {
                Act::Pass => {}
                Act::Drop => {
                    outcome.dropped += 1;
                    continue;
                }
                Act::Route(route) => entry.route = put(route.as_bytes()),
                Act::Payload(payload) => entry.payload = put(payload.as_bytes()),
                Act::Times(n) => entries.extend(std::iter::repeat_n(entry, n - 1)),
                Act::Refuse(reason) => {
                    outcome.refused.push(Refused { index: i as u32, kind: RefusedKind::Failed, reason });
                    continue;
                }
                Act::Retry(reason) if attempt.is_last => {
                    let reason = reason.to_owned();
                    outcome.refused.push(Refused { index: i as u32, kind: RefusedKind::Retries, reason });
                    continue;
                }
                Act::Retry(reason) => {
                    outcome.retry = Some(reason.to_owned());
                    return outcome;
                }
                Act::Hold(reason) if self.is_let_go.load(Ordering::Acquire) => {
                    let reason = reason.to_owned();
                    outcome.refused.push(Refused { index: i as u32, kind: RefusedKind::Fault, reason });
                    continue;
                }
                Act::Hold(reason) => {
                    return Outcome { retry: Some(reason.to_owned()), held: true, ..Outcome::default() };
                }
            }
            entries.push(entry);
        }
        let mut segments = batch.segments.clone();
        segments.push(Bytes::from(data));
        outcome.passed = Batch { segments, entries: entries.into(), exclusive: false, ..batch };
        outcome
    }
}

/// All that were made, each by its place: what a host keeps on disk.
static MADE: LazyLock<Mutex<Vec<Arc<dyn StepFactory>>>> = LazyLock::new(Mutex::default);

pub struct TestFactory {
    id: StepId,
    number: usize,
    act: StepFn,
    sees_all: bool,
    /// Whether an instance for this worker cannot start.
    broken: Broken,
    is_let_go: Arc<AtomicBool>,
}

impl StepFactory for TestFactory {
    fn id(&self) -> &StepId {
        &self.id
    }

    fn describe(&self) -> String {
        self.id.step.to_string()
    }

    fn recipe(&self) -> String {
        self.number.to_string()
    }

    fn instantiate(&self, worker: u32) -> Result<Box<dyn Step>, Vec<Problem>> {
        if (self.broken)(worker) {
            return Err(vec![Problem { path: KeyPath::root(), message: "no such table".to_owned() }]);
        }
        let Self { id, act, sees_all, is_let_go, .. } = self;
        let (act, is_let_go) = (Arc::clone(act), Arc::clone(is_let_go));
        Ok(Box::new(TestStep { id: id.clone(), act, sees_all: *sees_all, is_let_go }))
    }

    fn let_go(&self) {
        self.is_let_go.store(true, Ordering::Release);
    }
}

pub fn step(
    name: &str,
    act: impl Fn(&MessageRef<'_>, u32) -> Act + Send + Sync + 'static,
) -> Arc<dyn StepFactory> {
    made(name, Arc::new(act), true, Box::new(|_| false))
}

/// A step that the other messages of the pipeline do not concern.
pub fn selective_step(
    name: &str,
    act: impl Fn(&MessageRef<'_>, u32) -> Act + Send + Sync + 'static,
) -> Arc<dyn StepFactory> {
    made(name, Arc::new(act), false, Box::new(|_| false))
}

/// Cannot start where `broken` says so of a worker.
pub fn broken_step(name: &str, broken: impl Fn(u32) -> bool + Send + Sync + 'static) -> Arc<dyn StepFactory> {
    made(name, Arc::new(|_, _| Act::Pass), true, Box::new(broken))
}

fn made(name: &str, act: StepFn, sees_all: bool, broken: Broken) -> Arc<dyn StepFactory> {
    let id = StepId { pipeline: "p".into(), step: name.into() };
    let mut made = MADE.lock().unwrap();
    let number = made.len();
    let factory = Arc::new(TestFactory { id, number, act, sees_all, broken, is_let_go: Arc::default() });
    made.push(Arc::clone(&factory) as Arc<dyn StepFactory>);
    factory
}

/// As [`crate::step::Recall`].
pub fn recall(recipe: &str) -> Result<Arc<dyn StepFactory>, RecallError> {
    let number: usize = recipe.parse().unwrap();
    Ok(Arc::clone(&MADE.lock().unwrap()[number]))
}

pub fn chain(generation: u64, steps: &[Arc<dyn StepFactory>]) -> Chain {
    Chain { generation, steps: steps.iter().cloned().collect(), hold: None }
}

/// Steps that pass every message on, with the number of messages that they have run.
pub fn counting() -> (Arc<AtomicUsize>, Chain) {
    let ran = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&ran);
    let counter = step("count", move |_, _| {
        count.fetch_add(1, Ordering::Release);
        Act::Pass
    });
    (ran, chain(1, &[counter]))
}

/// Payload as text.
pub fn text(message: &MessageRef<'_>) -> String {
    String::from_utf8_lossy(message.payload()).into_owned()
}

/// Returns the number of a payload: 7 of `d3:7`.
pub fn number(text: &str) -> u64 {
    text.split(':').nth(1).and_then(|n| n.parse().ok()).expect("payloads are device:number")
}

/// Name of the stream between the steps and the sinks.
pub const OUT: &str = "p.out";

/// What outlives a process: the streams, the databases.
#[derive(Clone)]
pub struct World {
    pub stream: Arc<dyn Stream>,
    pub memory: Arc<MemoryStream>,
    pub dead: Arc<dyn Stream>,
    pub dead_memory: Arc<MemoryStream>,
    pub databases: BTreeMap<String, MemoryDatabase>,
    /// Streams that the pipeline writes to, by name.
    pub targets: BTreeMap<String, Target>,
    pub out: Option<Arc<dyn Stream>>,
    pub out_target: Option<Target>,
    pub config: Config,
    pub batching: Batching,
    pub on_lag: OnLag,
    pub dead_letters_bytes_max: u64,
    pub pipeline: String,
    /// By sink.
    pub renamed_from: BTreeMap<String, String>,
    pub begin: Option<Begin>,
    /// In place of one that finds all steps that were made.
    pub recall: Option<Recall>,
    pub failures: Failures,
}

impl World {
    /// Sinks by route: `[("default", "w")]`.
    pub fn new(partitions: u16, routes: &[(&str, &str)]) -> Self {
        let ms = |n| Period(Duration::from_millis(n));
        let config = Config {
            routes: routes
                .iter()
                .map(|(route, sink)| {
                    ((*route).to_owned(), RouteTarget::Several(sink.split(' ').map(str::to_owned).collect()))
                })
                .collect(),
            workers: Some(2),
            retries: Retries { max: 2, backoff_min: ms(1), backoff_max: ms(2) },
            sink_backoff: Backoff { min: ms(1), max: ms(5) },
            progress_every: ms(5),
            lag_after: ms(40),
            ..Config::default()
        };
        let memory = MemoryStream::with_hooks("telemetry", partitions);
        let dead_memory = MemoryStream::with_hooks("dead-letters", 2);
        let databases =
            config.sinks().into_iter().map(|name| (name.to_owned(), MemoryDatabase::default())).collect();
        Self {
            stream: Arc::clone(&memory) as Arc<dyn Stream>,
            memory,
            dead: Arc::clone(&dead_memory) as Arc<dyn Stream>,
            dead_memory,
            databases,
            targets: BTreeMap::new(),
            out: None,
            out_target: None,
            config,
            batching: Batching { rows_max: 50, bytes_max: 1 << 20, wait_max: Duration::from_millis(2) },
            on_lag: OnLag::Block,
            dead_letters_bytes_max: u64::MAX,
            pipeline: "p".to_owned(),
            renamed_from: BTreeMap::new(),
            begin: None,
            recall: None,
            failures: Failures::default(),
        }
    }

    /// From the next start on the route leads to one more sink, which has no rows.
    pub fn add_sink(&mut self, route: &str, sink: &str) {
        let target = self.config.routes.get_mut(route).expect("the pipeline has the route");
        let sinks = target.sinks().iter().cloned().chain([sink.to_owned()]).collect();
        *target = RouteTarget::Several(sinks);
        self.databases.insert(sink.to_owned(), MemoryDatabase::default());
    }

    /// From the next start on all routes but those that drop lead to these sinks.
    pub fn set_sinks(&mut self, sinks: &[&str]) {
        let names: Vec<_> = sinks.iter().map(|sink| (*sink).to_owned()).collect();
        for target in self.config.routes.values_mut().filter(|target| !target.sinks().is_empty()) {
            *target = RouteTarget::Several(names.clone());
        }
        for name in names {
            self.databases.entry(name).or_default();
        }
    }

    pub fn database(&self, sink: &str) -> &MemoryDatabase {
        &self.databases[sink]
    }

    /// One frame; message `n` of device `d` is `d:n`.
    pub fn publish(&self, messages: &[(&str, u64)]) {
        let partitions = self.stream.identity().partitions;
        let payloads: Vec<_> = messages.iter().map(|(device, n)| format!("{device}:{n}")).collect();
        let new: Vec<_> = messages
            .iter()
            .zip(&payloads)
            .map(|((device, _), payload)| NewMessage {
                topic: "acme/a/b/c/d",
                payload: payload.as_bytes(),
                properties: &[],
                route: "",
                device,
                partition: partition_of(device, partitions),
                flags: 0,
                received_us: 1,
                event_us: 0,
            })
            .collect();
        self.stream.append(&new, &[]).unwrap();
    }

    /// `count` messages of `devices` devices, in frames of ten.
    pub fn publish_many(&self, devices: u64, from: u64, count: u64) {
        let messages: Vec<_> = (from..from + count).map(|n| (format!("d{}", n % devices), n)).collect();
        for frame in messages.chunks(10) {
            self.publish(&frame.iter().map(|(device, n)| (device.as_str(), *n)).collect::<Vec<_>>());
        }
    }

    pub async fn start(&self, chain: Chain) -> Process {
        self.try_start(chain).await.unwrap()
    }

    pub async fn try_start(&self, chain: Chain) -> Result<Process, DeadLettersError> {
        let (chain_sender, chain) = watch::channel(chain);
        let shutdown = CancellationToken::new();
        let is_configured = |name: &&String| self.config.sinks().contains(name.as_str());
        let sinks = self
            .databases
            .iter()
            .filter(|(name, _)| is_configured(name))
            .map(|(name, database)| SinkPart {
                name: name.clone(),
                sink: Box::new(database.sink()),
                target: name.clone(),
                batching: self.batching,
                on_lag: self.on_lag,
                renamed_from: self.renamed_from.get(name).cloned(),
                begin: self.begin,
                is_stream: false,
            })
            .chain(self.targets.iter().map(|(name, target)| SinkPart {
                name: name.clone(),
                sink: target.sink(),
                target: name.clone(),
                batching: self.batching,
                on_lag: self.on_lag,
                renamed_from: None,
                begin: Some(Begin::Now),
                is_stream: true,
            }))
            .collect();
        let names = || self.databases.keys().filter(is_configured).chain(self.targets.keys());
        let named: Vec<_> =
            names().map(|name| (name.clone(), self.renamed_from.get(name).cloned())).collect();
        let deps = Deps {
            sink_names: name_sinks(&self.dead, &named),
            reasons: Arc::new(KeptReasons::of(&*self.dead)),
            stream: Arc::clone(&self.stream),
            chain,
            recall: self.recall.clone().unwrap_or_else(|| Arc::new(recall)),
            sinks,
            out: self.out(),
            dead_letters: Arc::clone(&self.dead),
            dead_letters_bytes_max: self.dead_letters_bytes_max,
            configured: names()
                .map(|sink| (self.pipeline.clone(), sink.clone()))
                .collect::<BTreeSet<_>>()
                .into(),
            failures: self.failures.clone(),
            shutdown: shutdown.clone(),
        };
        let handle = start(&self.pipeline, &self.config, deps).await?;
        Ok(Process { handle, chain: chain_sender, shutdown })
    }

    fn out(&self) -> Option<OutPart> {
        let stream = self.out.clone()?;
        let target = self.out_target.clone()?;
        let is_written = self.config.sinks().len() > 1;
        let names = names_of(&self.pipeline, &self.config.renamed_from);
        if !is_written && !need_out(&*self.dead, &names, self.stream.identity()) {
            return None;
        }
        let part = SinkPart {
            name: OUT.to_owned(),
            sink: target.sink(),
            target: OUT.to_owned(),
            batching: self.batching,
            on_lag: OnLag::Block,
            renamed_from: None,
            begin: Some(Begin::Now),
            is_stream: true,
        };
        Some(OutPart { part, stream, target, is_written })
    }

    /// Puts a stream between the steps and the sinks from the next start on, where these are several.
    pub fn with_out(mut self) -> (Self, Arc<MemoryStream>) {
        let out = MemoryStream::with_hooks(OUT, self.stream.identity().partitions);
        self.out = Some(Arc::clone(&out) as Arc<dyn Stream>);
        self.out_target = Some(Target::new(Arc::clone(&out) as Arc<dyn Stream>, None));
        (self, out)
    }

    /// Letters that are no copies: payload and reason.
    pub async fn letters(&self) -> Vec<(String, String)> {
        let mut cursor = self.dead.cursor(Offset(0));
        let mut letters = Vec::new();
        while let Some(read) = cursor.try_next().await.unwrap() {
            let Read::Batch(batch) = read else { continue };
            for message in batch.messages() {
                let letter = Letter::of(&message).expect("only letters are here");
                if !letter.is_copy() {
                    letters.push((text(&message), letter.reason.to_owned()));
                }
            }
        }
        letters
    }

    /// Payload and refusing step or sink of each letter for a sink that nobody
    /// sent again.
    pub async fn open_letters(&self, sink: &str) -> Vec<(String, String)> {
        let open = list_open(&*self.dead, None).await.unwrap();
        let marks = Marks::read(&self.dead.state(MARK_PREFIX));
        let mut cursor = self.dead.cursor(Offset(0));
        let mut letters = Vec::new();
        while let Some(read) = cursor.try_next().await.unwrap() {
            let Read::Batch(batch) = read else { continue };
            for message in batch.messages().filter(|message| open.contains(&message.offset())) {
                let letter = Letter::of(&message).expect("only letters are here");
                let only = match marks.get(message.offset().0) {
                    Some(Mark::Open { sinks, .. }) => Some(sinks),
                    _ => None,
                };
                let is_named = letter.sink_names().is_none_or(|mut names| names.any(|name| name == sink));
                if is_named && only.is_none_or(|only| only.contains(sink)) {
                    let by = letter.step.or(letter.sink).unwrap_or_default();
                    letters.push((text(&message), by.to_owned()));
                }
            }
        }
        letters
    }

    pub fn payloads(&self, sink: &str) -> Vec<String> {
        let rows = self.database(sink).rows();
        rows.iter().map(|row| String::from_utf8_lossy(&row.payload).into_owned()).collect()
    }

    pub fn id(&self) -> Uuid {
        self.stream.identity().log
    }
}

/// What ends with a process.
pub struct Process {
    pub handle: Handle,
    pub chain: watch::Sender<Chain>,
    pub shutdown: CancellationToken,
}

impl Process {
    pub async fn stop(self) {
        self.shutdown.cancel();
        self.handle.join().await;
    }

    /// For whoever asks it only; it ends with the test.
    pub fn into_handle(self) -> Arc<Handle> {
        Arc::new(self.handle)
    }

    /// Waits for a status; for at most a minute, so that a failure says what it was.
    pub async fn until(
        &self,
        what: &str,
        mut reached: impl FnMut(&PipelineStatus) -> bool,
    ) -> PipelineStatus {
        let reach = async {
            loop {
                let status = self.handle.status();
                if reached(&status) {
                    return status;
                }
                self.looked_after().await;
            }
        };
        match tokio::time::timeout(Duration::from_secs(60), reach).await {
            Ok(status) => status,
            Err(_) => panic!("not reached: {what}: {:?}", self.handle.status()),
        }
    }

    /// Until its supervisor, which never sleeps for long, has been at work once more.
    pub async fn looked_after(&self) {
        self.handle.looked_after().await;
    }

    /// Until every sink has committed the whole stream.
    pub async fn drained(&self) {
        self.until("drained", |status| {
            status.sinks.iter().all(|sink| sink.committed == Some(sink.end) && sink.lag_messages == 0)
        })
        .await;
    }
}

/// Sorted, for comparing sets with repeats.
pub fn sorted(mut list: Vec<String>) -> Vec<String> {
    list.sort();
    list
}

/// The payloads that `publish_many` made.
pub fn published(devices: u64, count: u64) -> Vec<String> {
    sorted((0..count).map(|n| format!("d{}:{n}", n % devices)).collect())
}
