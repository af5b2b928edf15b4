//! THE wiring: everything that a host is, built bottom-up, so that whoever
//! hands on finds the next one ready, and taken down in the order that a
//! message travels, so that what is in flight arrives.

mod advice;
mod background;
pub mod banner;
mod clients;
mod descriptors;
mod disks;
mod events;
pub mod held_folder;
mod lost_state;
mod oldest;
mod out_streams;
mod problems;
mod redrive;
pub mod run_file;
mod said;
mod status;
mod unconfigured;
mod watchdog;
mod written;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, Permissions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use futures_util::future::{Either, join_all, select};
use metrics_exporter_prometheus::PrometheusHandle;
use rustix::fs::Mode;
use tokio::runtime::Handle;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use self::background::Background;
use self::banner::{PluginLine, Started, banner};
use self::held_folder::HeldFolder;
use self::run_file::RunFile;
use crate::admin;
use crate::config::{Config, DEAD_LETTERS, Source};
use crate::devices::Devices;
use crate::files::{Locked, found};
use crate::hints::Hints;
use crate::ingest::Ingest;
use crate::listeners::{http, mqtt};
use crate::pipeline::{self, Batching, SinkPart};
use crate::plugin::access::AccessEngine;
use crate::plugin::{Folders, PluginState, PluginStatus, Plugins};
use crate::sinks::stream::Target;
use crate::sinks::{self, BuildContext, Journal};
use crate::stream::log::{Disk, Log, RealDisk, STATE_BYTES_MAX};
use crate::stream::{self, AppendError, OnLag, Stream, Streams};
use crate::telemetry::{self, Failures};
use crate::topic::{Namespace, TopicFilter};
use crate::units::{ByteSize, Period};

/// File in the data folder that the running host holds a lock on.
const LOCK: &str = "LOCK";
/// The stream of sessions, subscriptions, retained messages and wills, and its folder in the data folder.
const BROKER: &str = "broker";
/// A start waits so long for commands that look whether a host runs, and tries again so often.
const ASKED_MAX: Duration = Duration::from_secs(10);
const ASKED_EVERY: Duration = Duration::from_millis(10);
/// The start screen waits so long for plugins.
const PLUGINS_SHOWN_AFTER: Duration = Duration::from_secs(3);
/// A shutdown waits so long for each part, beside what pipelines have to drain.
const END_MAX: Duration = Duration::from_secs(15);
/// The exit status of a host that ended without one of its parts.
const LATE: i32 = 1;
/// As a shell shows a process that SIGINT ended.
const INTERRUPTED: i32 = 130;

/// The broker's stream has so much room beside copies: a checkpoint of its state begins
/// each segment.
const BROKER_STATE_BYTES: u64 = 4 * STATE_BYTES_MAX as u64;
/// Copies that nobody waits for any more go from the disk after this, at the latest.
const COPIES_SORTED_AFTER: Duration = Duration::from_secs(6 * 3_600);

/// The parts that status and readiness speak of.
pub struct Host {
    /// All of them.
    pub streams: Vec<Arc<dyn Stream>>,
    /// Names of those that take devices' messages.
    intake: BTreeSet<String>,
    /// Names of those that only pipelines write.
    written: BTreeSet<String>,
    pub pipelines: Vec<Arc<pipeline::Handle>>,
    pub plugins: Plugins,
    pub data_dir: PathBuf,
    held: HeldFolder,
    /// Cancelled once the host ends and accepts no connection any more.
    stop_listening: CancellationToken,
    pub plugins_dir: PathBuf,
    pub hints: Hints,
    pub failures: Failures,
    pub clients: mqtt::Clients,
    /// Sinks, as `PIPELINE/SINK`, that are told to leave out rows that the table has.
    pub ignoring: BTreeSet<String>,
    /// Sinks, as `PIPELINE/SINK`, for whose messages retention does not wait.
    pub detaching: BTreeSet<String>,
    /// As `mqtt.queue_copies_bytes_max`.
    pub copies_bytes_max: u64,
    pub prometheus: PrometheusHandle,
    watch: problems::Watch,
}

/// Runs a host until SIGINT, SIGTERM, or a stream that stopped.
pub async fn run(mut config: Config, source: Source) -> anyhow::Result<()> {
    // What it writes is for its user alone: messages, sessions, tokens.
    rustix::process::umask(Mode::from_raw_mode(0o077));
    let process = telemetry::Process::default();
    let prometheus = admin::metrics::install().context("metrics were set up twice in one process")?;
    let data_dir = config.data_dir.clone();
    if !data_dir.exists() {
        mqtt::try_addresses(&config.mqtt)?;
        http::try_addresses(&config.http)?;
    }
    let held = HeldFolder::new(&data_dir, lock(&data_dir)?);
    let instance: Arc<str> = uuid::Uuid::new_v4().simple().to_string().into();
    let failures = Failures::showing(source.hints());
    tokio::spawn(failures.clone().flush_regularly());
    let namespace = Arc::new(Namespace::parse(&config.topics)?);
    let stop_listening = CancellationToken::new();
    let stop_delivering = CancellationToken::new();

    let descriptors::Connections { mqtt: of_mqtt, http: of_http } = descriptors::connections_max(&config)?;
    (config.mqtt.connections_max, config.http.connections_max) = (of_mqtt, of_http);

    out_streams::rename(&config, &data_dir)?;
    // Streams first: the log is what everything else stands on.
    let OpenStreams { mut logs, set: streams } = open_streams(&config, &data_dir, &failures)?;
    let targets = written::targets(&config, &streams);
    let of_letters = config.dead_letters.stream();
    let dead_letters = open_log(&data_dir.join(DEAD_LETTERS), DEAD_LETTERS, &of_letters, &failures)?;
    logs.push(Arc::clone(&dead_letters));
    let dead_letters: Arc<dyn Stream> = dead_letters;
    let mut left_over = BTreeMap::new();
    for (name, like) in out_streams::left_over(&config, &data_dir, &*dead_letters, &streams) {
        let log = open_log(&config.stream_dir(&name), &name, &like, &failures)?;
        logs.push(Arc::clone(&log));
        left_over.insert(name, log as Arc<dyn Stream>);
    }
    let of_broker = broker_stream(&config.mqtt);
    let broker: Arc<dyn Stream> = open_log(&config.broker_dir(), BROKER, &of_broker, &failures)?;

    // Plugins, which are loaded from now on, then the pipelines that wait for them and own the sinks.
    let devices = Arc::new(Devices::load(&config.devices).context("devices.file")?);
    let following = Arc::clone(&devices).follow(config.devices.clone(), failures.clone());
    tokio::spawn(stop_delivering.clone().run_until_cancelled_owned(following));
    let cache = config.plugin_cache_dir();
    let of_records = Arc::clone(&dead_letters);
    let folders = Folders {
        cache: cache.clone(),
        kept: config.plugin_files_dir(),
        recorded: Box::new(move || pipeline::recorded_recipes(&*of_records)),
    };
    let plugins = Plugins::start(
        &config.plugins,
        folders,
        source.places.clone(),
        devices,
        Arc::clone(&namespace),
        failures.clone(),
    )?;
    let mut pipelines = Vec::new();
    let configured = Arc::new(config.claims());
    // No sink reads the broker's stream, so that it takes positions however far sinks lag.
    let journal = Journal::new(Arc::clone(&broker), Arc::clone(&dead_letters));
    let named =
        |(name, sink): (&String, &sinks::Config)| (name.clone(), sink.renamed_from().map(str::to_owned));
    let written = targets.keys().map(|name| (name.clone(), None));
    let named: Vec<_> = config.sinks.iter().map(named).chain(written).collect();
    let sink_names = pipeline::name_sinks(&dead_letters, &named);
    let reasons = Arc::new(pipeline::KeptReasons::of(&*dead_letters));
    for (name, pipeline) in &config.pipelines {
        // It drops all: there is nothing to read the stream for.
        if pipeline.sinks().is_empty() {
            continue;
        }
        let stream =
            streams.get(&pipeline.from).with_context(|| format!("no stream \"{}\"", pipeline.from))?;
        let deps = pipeline::Deps {
            stream: Arc::clone(stream),
            chain: plugins.chain(name, pipeline.steps.as_deref()),
            recall: plugins.recall(name),
            sinks: sink_parts(&config, pipeline, &targets, &namespace, &journal, &failures),
            out: written::out_part(&config, (name, pipeline), &targets, &streams, &left_over),
            dead_letters: Arc::clone(&dead_letters),
            sink_names: Arc::clone(&sink_names),
            reasons: Arc::clone(&reasons),
            dead_letters_bytes_max: config.dead_letters.share_of(config.pipelines.len()),
            configured: Arc::clone(&configured),
            failures: failures.clone(),
            shutdown: stop_delivering.clone(),
        };
        match pipeline::start(name, pipeline, deps).await {
            Ok(started) => pipelines.push(Arc::new(started)),
            // The other pipelines run, and devices are acknowledged.
            Err(pipeline::DeadLettersError::Append(
                error @ (AppendError::NoSpace | AppendError::TooLarge(_)),
            )) => {
                failures.stands(out_streams::not_recorded(name, &error));
            }
            Err(error) => return Err(error).with_context(|| format!("cannot start pipeline \"{name}\"")),
        }
    }
    plugins.all_joined();
    // After the pipelines are attached: one with a new name learns that there was another.
    for log in &logs {
        forget_strangers(log, &config, &left_over);
    }

    let make_engine = access_engine(&config, &cache);

    // Devices: what they are acknowledged for stands on the log alone.
    let background = Background::start().context("cannot start threads")?;
    let runtimes = vec![("runtime", Handle::current()), ("background", background.handle())];
    watchdog::start(runtimes).context("cannot start threads")?;
    let (intake, written) = config.streams.keys().cloned().partition(|name| config.takes_messages(name));
    // Listeners know streams that only pipelines write, too: subscribers get their messages.
    let for_listeners = written::for_subscribers(&config, &streams);
    let ingest = Arc::new(Ingest::new(for_listeners, Arc::clone(&namespace)));
    let deps = mqtt::Deps {
        ingest: Arc::clone(&ingest),
        broker: Arc::clone(&broker),
        failures: failures.clone(),
        access_plugins: Some(make_engine),
        background: background.handle(),
        clock: mqtt::system_clock(),
        shutdown: stop_listening.clone(),
    };
    let listener = mqtt::start(&config.mqtt, deps).await?;
    let deps = http::Deps {
        ingest,
        access: listener.access(),
        refused_clients: listener.refused_clients(),
        failures: failures.clone(),
        shutdown: stop_listening.clone(),
    };
    let http = http::start(&config.http, deps).await?;

    let all_streams: Vec<_> =
        streams.iter().cloned().chain(left_over.into_values()).chain([dead_letters, broker]).collect();
    let host = Arc::new(Host {
        streams: all_streams.clone(),
        intake,
        written,
        pipelines: pipelines.clone(),
        plugins,
        data_dir: data_dir.clone(),
        held,
        stop_listening: stop_listening.clone(),
        plugins_dir: config.plugins.dir.clone(),
        hints: source.hints(),
        failures: failures.clone(),
        clients: listener.clients(),
        ignoring: sinks_that(&config, |sink| sink.ignores_rows()),
        detaching: sinks_that(&config, |sink| sink.on_lag() == OnLag::Detach),
        copies_bytes_max: config.mqtt.queue_copies_bytes_max.0,
        prometheus: prometheus.clone(),
        watch: problems::Watch::default(),
    });
    let watching = tokio::spawn(Arc::clone(&host).watch());
    tokio::spawn(Arc::clone(&host).look_for_unconfigured());
    let watching_disks = tokio::spawn(Arc::clone(&host).look_at_disks());
    let of_file = config.admin.token().map_err(anyhow::Error::msg).context("admin.token_file")?;
    let is_kept = of_file.is_some();
    let token = of_file.unwrap_or_else(|| uuid::Uuid::new_v4().simple().to_string());
    let deps = admin::Deps {
        unhealthy: Arc::new({
            let host = Arc::clone(&host);
            move || host.unhealthy()
        }),
        ready: Arc::new({
            let host = Arc::clone(&host);
            move || host.ready()
        }),
        problems: Arc::new({
            let host = Arc::clone(&host);
            move || host.problems()
        }),
        status: Arc::new({
            let host = Arc::clone(&host);
            move || host.status()
        }),
        redrive: Arc::new(redrive::Redrives(pipelines.clone())),
        clients: Arc::new(clients::MqttClients(listener.clients())),
        measure: Arc::new({
            let clients = listener.clients();
            move || clients.measure()
        }),
        prometheus,
        process,
        failures: failures.clone(),
        instance: Arc::clone(&instance),
        token: token.as_str().into(),
    };
    let stop_admin = CancellationToken::new();
    let admin = admin::start(&config.admin, deps, stop_admin.clone()).await?;

    // From here on a signal ends the host in order; whoever reads where it listens may send one.
    let (mut interrupts, terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let told = if is_kept { String::new() } else { token };
    let running = RunFile::new(&instance, (&listener.addresses(), &http.addresses()), admin.address(), told);
    run_file::write_or_retry(&data_dir, running, stop_admin.clone());
    let mut started = Started::of(&config, &source);
    let addresses = listener.addresses().into_iter().chain(http.addresses());
    for ((_, bound), address) in started.listeners.iter_mut().zip(addresses) {
        *bound = address;
    }
    started.admin = Some(admin.address());

    let ended = {
        let end = std::pin::pin!(wait_for_end(&all_streams, &mut interrupts, terminate));
        // On this thread, not in a task: the command line holds the lock on stdout.
        match select(end, std::pin::pin!(say_started(started, &host))).await {
            Either::Left((ended, _)) => ended,
            Either::Right(((), end)) => end.await,
        }
    };
    tokio::spawn(end_when_interrupted(interrupts));

    // Devices first, then what is in flight, then the log.
    stop_listening.cancel();
    let mut ending = Ending::default();
    let (mqtt_ends, http_ends) = (listener.join(), http.join());
    ending.wait("listeners", END_MAX, async { tokio::join!(mqtt_ends, http_ends) }).await;
    stop_delivering.cancel();
    let drained = config.pipelines.values().map(|pipeline| pipeline.drain_max.0).max().unwrap_or_default();
    ending.wait("pipelines", drained + END_MAX, join_all(pipelines.iter().map(|one| one.join()))).await;
    ending.wait("streams", END_MAX, join_all(all_streams.iter().map(|stream| stream.close()))).await;
    stop_admin.cancel();
    ending.wait("admin", END_MAX, admin.closed()).await;
    watching.abort();
    watching_disks.abort();
    run_file::remove(&data_dir);
    failures.flush();
    ending.leave_late_parts();
    ended
}

/// Makes the engine for access plugins, once one is configured.
fn access_engine(config: &Config, cache: &Path) -> mqtt::MakeEngine {
    let (plugins, cache) = (config.plugins.clone(), cache.to_owned());
    Box::new(move || AccessEngine::new(&plugins, Some(&cache)).map_err(|error| error.to_string()))
}

/// The end of the host's parts, each within its time: a disk that does not answer ends nothing.
#[derive(Default)]
struct Ending {
    is_late: bool,
}

impl Ending {
    async fn wait<T>(&mut self, part: &str, wait_max: Duration, end: impl Future<Output = T>) {
        if tokio::time::timeout(wait_max, end).await.is_err() {
            let s = wait_max.as_secs();
            tracing::warn!(
                part,
                "has not ended for {s} s, going on without it: what was acknowledged is durable"
            );
            self.is_late = true;
        }
    }

    /// Ends the process where a part did not end: to take it down would wait for it.
    fn leave_late_parts(self) {
        if self.is_late {
            telemetry::exit(LATE);
        }
    }
}

struct OpenStreams {
    logs: Vec<Arc<Log>>,
    set: Streams,
}

fn open_streams(config: &Config, data_dir: &Path, failures: &Failures) -> anyhow::Result<OpenStreams> {
    let mut logs = Vec::new();
    let mut routed: Vec<(Vec<TopicFilter>, Arc<dyn Stream>)> = Vec::new();
    let mut rest: Option<Arc<dyn Stream>> = None;
    for (name, stream) in &config.streams {
        let log = open_log(&data_dir.join("streams").join(name), name, stream, failures)?;
        logs.push(Arc::clone(&log));
        if name == config.default_stream() {
            rest = Some(log);
        } else {
            // A stream that only pipelines write has no filters, and gets no device's message.
            let filters: Result<Vec<_>, _> =
                stream.topics.iter().map(|filter| TopicFilter::new(filter)).collect();
            routed.push((filters?, log));
        }
    }
    let rest = rest.context("no stream takes the topics that no other wants")?;
    Ok(OpenStreams { logs, set: Streams::new(routed, rest) })
}

/// Releases the retention holds of readers whose pipeline or sink is no longer configured: their
/// positions would hold retention back for ever.
fn forget_strangers(log: &Log, config: &Config, left_over: &BTreeMap<String, Arc<dyn Stream>>) {
    for (consumer, next) in log.remembered() {
        if !reads(config, log.name(), &consumer, left_over) {
            tracing::warn!(
                stream = log.name(),
                consumer,
                next = next.0,
                "reader no longer configured; its retention hold is released"
            );
            log.forget(&consumer);
        }
    }
}

/// Whether the config still makes a pipeline read this stream under this name.
fn reads(
    config: &Config,
    stream: &str,
    consumer: &str,
    left_over: &BTreeMap<String, Arc<dyn Stream>>,
) -> bool {
    if consumer == mqtt::READER {
        return config.has_subscribers(stream);
    }
    let Some((name, rest)) = consumer.split_once('/') else { return false };
    let Some(pipeline) = config.pipelines.get(name) else { return false };
    let out = pipeline::out_stream_of(name);
    let is_written = config.out_stream(name, pipeline).is_some();
    let has_out = is_written || left_over.contains_key(&out);
    if stream != DEAD_LETTERS {
        let is_sink = pipeline.sinks().contains(rest);
        let is_out = is_written && rest == out;
        return pipeline.from == stream && (is_sink || is_out) || has_out && out == stream && is_sink;
    }
    // The keys of its letters.
    rest.strip_suffix("/dead-letters").is_some_and(|of| of == pipeline.from || has_out && of == out)
}

fn open_log(
    dir: &Path,
    name: &str,
    config: &stream::Config,
    failures: &Failures,
) -> anyhow::Result<Arc<Log>> {
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::default());
    let (log, recovery) = tokio::task::block_in_place(|| Log::open(disk, dir, name, config))
        .with_context(|| format!("cannot open the stream \"{name}\""))?;
    lost_state::of(dir, name, &recovery).into_iter().for_each(|fault| failures.stands(fault));
    Ok(log)
}

/// Sessions and packet ids: small, and all of it is in the newest segment. Beside
/// them copies of messages, which this stream's retention sorts out.
fn broker_stream(mqtt: &mqtt::Config) -> stream::Config {
    let default = stream::Config::default();
    let copy_max = ByteSize(mqtt.max_packet_size.0 + (1 << 20));
    stream::Config {
        retention: stream::Retention {
            max_age: Some(Period(COPIES_SORTED_AFTER)),
            max_bytes: ByteSize(2 * mqtt.queue_copies_bytes_max.0 + BROKER_STATE_BYTES),
        },
        commit_buffer_bytes_max: default.commit_buffer_bytes_max.max(copy_max),
        partitions: 1,
        segment_bytes: ByteSize::mib(8),
        tail_bytes_max: ByteSize::mib(1),
        reserve_bytes: ByteSize::mib(4),
        may_use_reserve: true,
        ..default
    }
}

/// Every sink that a route of the pipeline names, and every stream that the pipeline writes to, once.
fn sink_parts(
    config: &Config,
    pipeline: &pipeline::Config,
    targets: &BTreeMap<String, Target>,
    namespace: &Arc<Namespace>,
    journal: &Journal,
    failures: &Failures,
) -> Vec<SinkPart> {
    let part = |name: &str| {
        let Some(sink) = config.sinks.get(name) else {
            return targets.get(name).map(|target| written::sink_part(config, name, target));
        };
        let batch = sink.batch();
        let (namespace, journal) = (Arc::clone(namespace), journal.clone());
        let context = BuildContext { name, namespace, journal, failures: failures.clone() };
        Some(SinkPart {
            name: name.to_owned(),
            sink: sink.build(context),
            target: sink.describe(),
            batching: Batching {
                rows_max: batch.rows_max as usize,
                bytes_max: batch.bytes_max.0,
                wait_max: batch.wait_max.0,
            },
            on_lag: sink.on_lag(),
            renamed_from: sink.renamed_from().map(str::to_owned),
            begin: sink.begin(),
            is_stream: false,
        })
    };
    pipeline.sinks().into_iter().filter_map(part).collect()
}

/// Returns the sinks of each pipeline for which this holds, as `PIPELINE/SINK`.
fn sinks_that(config: &Config, holds: impl Fn(&sinks::Config) -> bool) -> BTreeSet<String> {
    let of_pipeline = |(name, pipeline): (&String, &pipeline::Config)| {
        let sinks = pipeline.sinks().into_iter();
        let those = sinks.filter(|sink| config.sinks.get(*sink).is_some_and(&holds));
        those.map(|sink| format!("{name}/{sink}")).collect::<Vec<_>>()
    };
    config.pipelines.iter().flat_map(of_pipeline).collect()
}

/// Takes from everybody else what they may do in the data folder; it may be from before this was so.
fn make_private(data_dir: &Path) {
    const OTHERS: u32 = 0o077;
    /// The mode bit of a folder for everybody, such as /tmp.
    const STICKY: u32 = 0o1000;
    let Ok(found) = std::fs::metadata(data_dir) else { return };
    let mode = found.permissions().mode();
    if mode & OTHERS == 0 || mode & STICKY != 0 {
        return;
    }
    if let Err(error) = std::fs::set_permissions(data_dir, Permissions::from_mode(mode & !OTHERS)) {
        tracing::warn!(%error, "other users may read the data folder {}: chmod go-rwx it", data_dir.display());
    }
}

/// One host a data folder: held until the process ends.
fn lock(data_dir: &Path) -> anyhow::Result<Locked> {
    let folder = data_dir.display();
    std::fs::create_dir_all(data_dir).with_context(|| format!("cannot make the data folder {folder}"))?;
    make_private(data_dir);
    let path = data_dir.join(LOCK);
    let file = File::options().create(true).truncate(false).write(true).open(&path).with_context(|| {
        format!("cannot write to the data folder {folder}: {}: let this user write there, or set another data_dir", path.display())
    })?;
    let until = Instant::now() + ASKED_MAX;
    loop {
        match try_lock(&file).with_context(|| format!("cannot lock {}", path.display()))? {
            Tried::Locked(held) => return Ok(held),
            Tried::HostHolds => {
                bail!("another headworks uses the data folder {folder}: stop it, or set another data_dir")
            }
            Tried::CommandHolds if Instant::now() >= until => {
                bail!("a command keeps {} locked: end it, then start the host again", path.display())
            }
            Tried::CommandHolds => std::thread::sleep(ASKED_EVERY),
        }
    }
}

/// What came of a try to lock a data folder.
enum Tried {
    Locked(Locked),
    HostHolds,
    /// A command looks whether a host runs: see [`is_held`].
    CommandHolds,
}

fn try_lock(file: &File) -> std::io::Result<Tried> {
    match Locked::exclusive(file.try_clone()?) {
        Ok(held) => return Ok(Tried::Locked(held)),
        Err(TryLockError::WouldBlock) => {}
        Err(TryLockError::Error(error)) => return Err(error),
    }
    // Only a host keeps out those who share the lock.
    match Locked::shared(file.try_clone()?) {
        Ok(_) => Ok(Tried::CommandHolds),
        Err(TryLockError::WouldBlock) => Ok(Tried::HostHolds),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Whether a host runs on this data folder, whatever it answers.
pub fn is_held(data_dir: &Path) -> io::Result<bool> {
    let Some(file) = found(File::open(data_dir.join(LOCK)))? else { return Ok(false) };
    match Locked::shared(file) {
        Ok(_) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

async fn wait_for_end(
    streams: &[Arc<dyn Stream>],
    interrupts: &mut Signal,
    mut terminate: Signal,
) -> anyhow::Result<()> {
    let stopped = futures_util::future::select_all(streams.iter().map(|stream| stream.stopped()));
    tokio::select! {
        _ = interrupts.recv() => {
            tracing::info!("interrupted: finishing what is in flight, Ctrl-C again ends at once");
            Ok(())
        }
        _ = terminate.recv() => {
            tracing::info!("told to end: finishing what is in flight, SIGINT ends at once");
            Ok(())
        }
        (reason, which, _) = stopped => {
            bail!("stream \"{}\" stopped: {reason}", streams[which].name());
        }
    }
}

/// For whoever does not wait for the shutdown. What was acknowledged is durable,
/// and what is in flight comes again at the next start.
async fn end_when_interrupted(mut interrupts: Signal) {
    interrupts.recv().await;
    tracing::warn!("interrupted again: ending at once");
    telemetry::exit(INTERRUPTED);
}

/// The start screen, for a person: logs go to stderr, this to stdout. With the
/// plugins, where they do not take long.
async fn say_started(mut started: Started, host: &Host) {
    // Past it: what is still being loaded is shown as that.
    let _ = tokio::time::timeout(PLUGINS_SHOWN_AFTER, host.plugins.loaded()).await;
    started.plugins = host.plugins.status().into_iter().map(plugin_line).collect();
    // Whoever closed stdout does not want it.
    let _ = writeln!(std::io::stdout(), "{}", telemetry::escaped(&banner(&started)));
}

fn plugin_line(plugin: PluginStatus) -> PluginLine {
    let problem = match plugin.state {
        PluginState::Active => None,
        PluginState::Loading => Some("is being loaded".to_owned()),
        PluginState::Failed(reason) | PluginState::Removed(reason) => Some(reason),
    };
    PluginLine { file: plugin.file, name: plugin.name, version: plugin.version, problem }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_part_that_does_not_end_is_left_after_its_time() {
        let mut ending = Ending::default();
        ending.wait("good", END_MAX, async {}).await;
        assert!(!ending.is_late);
        ending.wait("hung", Duration::ZERO, std::future::pending::<()>()).await;
        ending.wait("good", END_MAX, async {}).await;
        assert!(ending.is_late);
    }

    /// Else its mark would hold retention back for ever, and devices with it.
    #[test]
    fn a_pipeline_that_reads_another_stream_now_keeps_nothing_of_the_old_one() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("headworks.yaml");
        let load = |from: &str| {
            std::fs::write(
                &file,
                format!(
                    "streams: {{ old: {{ topics: [old/#] }}, new: {{}} }}\n\
                     sinks: {{ w: {{ type: sqlite }} }}\n\
                     pipelines: {{ p: {{ from: {from}, routes: {{ default: w }} }} }}\n"
                ),
            )
            .unwrap();
            crate::config::load(Some(&file)).unwrap().config
        };
        let (before, after) = (load("old"), load("new"));
        let reads = |config: &Config, stream, consumer| reads(config, stream, consumer, &BTreeMap::new());
        for (stream, consumer) in [("old", "p/w"), (DEAD_LETTERS, "p/old/dead-letters")] {
            assert!(reads(&before, stream, consumer), "{consumer} of {stream}");
            assert!(!reads(&after, stream, consumer), "{consumer} of {stream}");
        }
        assert!(reads(&after, "new", "p/w") && reads(&after, DEAD_LETTERS, "p/new/dead-letters"));
        assert!(!reads(&after, "new", "p/gone") && !reads(&after, "new", "q/w"));
    }

    #[test]
    fn a_stream_that_subscribers_get_no_more_keeps_nothing_for_them() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("headworks.yaml");
        let load = |clean: &str| {
            let text = format!("streams: {{ clean: {{ {clean} }} }}\npipelines: {{ p: {{ to: clean }} }}\n");
            std::fs::write(&file, text).unwrap();
            crate::config::load(Some(&file)).unwrap().config
        };
        let (before, after) = (load("topic_prefix: clean"), load(""));
        let reads = |config: &Config, stream, consumer| reads(config, stream, consumer, &BTreeMap::new());
        assert!(reads(&before, "clean", mqtt::READER) && !reads(&after, "clean", mqtt::READER));
        for stream in ["default", DEAD_LETTERS] {
            assert!(reads(&after, stream, mqtt::READER), "{stream}");
        }
        assert!(reads(&after, "default", "p/clean"), "the pipeline's own place in what it reads");
    }

    #[test]
    fn a_data_folder_is_for_its_owner_alone_from_now_on() {
        let folder = tempfile::tempdir().unwrap();
        let mode = || std::fs::metadata(folder.path()).unwrap().permissions().mode() & 0o7777;
        for (before, after) in [(0o755, 0o700), (0o2770, 0o2700), (0o700, 0o700), (0o1777, 0o1777)] {
            std::fs::set_permissions(folder.path(), Permissions::from_mode(before)).unwrap();
            assert!(!is_held(folder.path()).unwrap());
            let held = lock(folder.path()).unwrap();
            assert!(is_held(folder.path()).unwrap());
            drop(held);
            assert_eq!(mode(), after, "{before:o}");
        }
    }

    #[test]
    fn a_command_that_looks_whether_a_host_runs_is_not_taken_for_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(LOCK);
        let open = || File::options().create(true).truncate(false).write(true).open(&path).unwrap();
        let command = Locked::shared(open()).unwrap();
        let starting = open();
        assert!(matches!(try_lock(&starting), Ok(Tried::CommandHolds)));
        drop(command);
        let held = try_lock(&starting);
        assert!(matches!(held, Ok(Tried::Locked(_))));
        assert!(matches!(try_lock(&open()), Ok(Tried::HostHolds)));
        assert!(is_held(folder.path()).unwrap());
    }

    #[test]
    fn a_data_folder_that_cannot_be_written_is_named_with_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("LOCK")).unwrap();
        let said = format!("{:#}", lock(folder.path()).unwrap_err());
        assert!(said.contains(&folder.path().display().to_string()) && said.contains("data_dir"), "{said}");
    }
}
