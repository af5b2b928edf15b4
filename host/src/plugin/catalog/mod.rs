//! All plugins of a host, and the chains of steps made of them.
//!
//! One thread looks at the folder when it changes, loads what has settled,
//! tries each new version in an instance with its config, and publishes a
//! chain only when all its steps are good. What fails leaves the last good
//! version where it was. A step never goes away by itself: see [`super::remove`].

mod build;
mod status;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use notify::{EventKind, RecursiveMode, Watcher, event::ModifyKind};
use serde_json::Value;
use tokio::sync::watch;

use self::build::Pipeline;
pub use self::build::problem_text;
pub use self::status::{PluginState, PluginStatus};
use super::cache::Cache;
use super::compile::Compiler;
use super::folder::{self, Found, Listing, Settling, Stamp};
use super::program::{Library, Program, read};
use super::{Config, Error, StepConfig};
use crate::devices::Devices;
use crate::step::Chain;
use crate::telemetry::Failures;
use crate::threads;
use crate::topic::Namespace;

/// Events of the folder that wait; more are seen by the next look.
const EVENTS_MAX: usize = 256;
/// How long the start waits for files that are being written.
const START_WAIT: Duration = Duration::from_secs(3);

/// The plugins of a host. Dropping it ends the watch; chains stay as they are.
pub struct Plugins {
    shared: Arc<Inner>,
    thread: Option<JoinHandle<()>>,
    _watcher: Option<notify::RecommendedWatcher>,
}

struct Inner {
    work: Mutex<Work>,
    /// What `status` shows: never behind a compiler.
    status: watch::Sender<Vec<PluginStatus>>,
    wake: SyncSender<Wake>,
    stopped: AtomicBool,
}

enum Wake {
    /// Something happened to these files; by a rename, so that they are whole.
    Renamed(Vec<PathBuf>),
    Look,
}

struct Work {
    config: Config,
    library: Library,
    devices: Arc<Devices>,
    namespace: Arc<Namespace>,
    failures: Failures,
    wake: SyncSender<Wake>,
    known_steps: PathBuf,
    /// By step name.
    files: BTreeMap<String, Known>,
    refused: Vec<(String, String)>,
    settling: Settling,
    pipelines: Vec<Pipeline>,
    generation: u64,
}

#[derive(Default)]
struct Known {
    path: PathBuf,
    order: u64,
    /// Of the files that were last looked into.
    stamp: Option<Stamp>,
    loaded: Option<Loaded>,
    /// Why the newest files are not used.
    error: Option<String>,
    /// The file is gone.
    missing: bool,
    /// It has been a step of a pipeline in folder mode.
    was_step: bool,
}

#[derive(Clone)]
struct Loaded {
    program: Arc<Program>,
    config: Value,
}

impl Plugins {
    /// Looks at the folder, loads what is there, and watches it from then on.
    /// Blocks while plugins compile. `cache_dir` is made, private, if needed.
    pub fn start(
        config: &Config,
        cache_dir: &Path,
        devices: Arc<Devices>,
        namespace: Arc<Namespace>,
        failures: Failures,
    ) -> Result<Self, Error> {
        let compiler = Compiler::child(config.compile_cpu_s, config.compile_memory)
            .map_err(|error| Error::Engine(format!("cannot find this program's file: {error}")))?;
        Self::start_with(compiler, config, cache_dir, devices, namespace, failures)
    }

    /// The same with another compiler: see [`Compiler::in_process`].
    pub fn start_with(
        compiler: Compiler,
        config: &Config,
        cache_dir: &Path,
        devices: Arc<Devices>,
        namespace: Arc<Namespace>,
        failures: Failures,
    ) -> Result<Self, Error> {
        let library = Library::new(compiler, Some(Cache::open(cache_dir)?))?;
        if let Err(error) = std::fs::create_dir_all(&config.dir) {
            tracing::warn!(dir = %config.dir.display(), %error, "cannot make the plugins folder");
        }
        let (wake, events) = mpsc::sync_channel(EVENTS_MAX);
        let watcher = watch(&config.dir, wake.clone());
        let mut work = Work {
            config: config.clone(),
            library,
            devices,
            namespace,
            failures,
            wake: wake.clone(),
            known_steps: folder::known_steps_file(cache_dir),
            files: BTreeMap::new(),
            refused: Vec::new(),
            settling: Settling::default(),
            pipelines: Vec::new(),
            generation: 0,
        };
        work.recall_steps();
        let deadline = Instant::now() + START_WAIT;
        work.look(&HashSet::new(), true);
        while !work.settling.is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
            work.look(&HashSet::new(), true);
        }
        let status = watch::Sender::new(work.status());
        let shared =
            Arc::new(Inner { work: Mutex::new(work), status, wake, stopped: AtomicBool::new(false) });
        let watching = Arc::clone(&shared);
        let thread = threads::spawn("plugin-folder".to_owned(), move || watching.run(&events))
            .map_err(|error| Error::Engine(format!("cannot start the folder's thread: {error}")))?;
        Ok(Self { shared, thread: Some(thread), _watcher: watcher })
    }

    /// The chain of a pipeline, now and after every change. `steps: None`: the
    /// folder's plugins by the number in front of their names.
    pub fn chain(&self, pipeline: &str, steps: Option<&[StepConfig]>) -> watch::Receiver<Chain> {
        let mut work = self.shared.work();
        let empty = Chain { generation: 0, steps: Arc::new([]), hold: None };
        let (sender, receiver) = watch::channel(empty);
        work.pipelines.retain(|known| !known.sender.is_closed());
        work.pipelines.push(Pipeline {
            name: pipeline.to_owned(),
            steps: steps.map(<[_]>::to_vec),
            built: BTreeMap::new(),
            sender,
        });
        work.publish();
        self.shared.show(work.status());
        receiver
    }

    pub fn status(&self) -> Vec<PluginStatus> {
        self.shared.status.borrow().clone()
    }
}

impl Drop for Plugins {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Release);
        let _ = self.shared.wake.try_send(Wake::Look);
        if let Some(thread) = self.thread.take() {
            // It only watches: nothing is lost with it.
            let _ = thread.join();
        }
    }
}

impl Inner {
    fn work(&self) -> std::sync::MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn show(&self, status: Vec<PluginStatus>) {
        self.status.send_replace(status);
    }

    fn run(&self, events: &Receiver<Wake>) {
        let (poll, settle) = {
            let work = self.work();
            (work.config.poll.0, work.config.settle.0)
        };
        let mut settling = false;
        loop {
            // Looks at least twice within the settle time while a file is being written.
            let wait = if settling { poll.min(settle / 2).max(Duration::from_millis(10)) } else { poll };
            let mut renamed = HashSet::new();
            let first = match events.recv_timeout(wait) {
                Ok(wake) => Some(wake),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            for wake in first.into_iter().chain(events.try_iter()) {
                if let Wake::Renamed(paths) = wake {
                    renamed.extend(paths);
                }
            }
            if self.stopped.load(Ordering::Acquire) {
                return;
            }
            let mut work = self.work();
            work.look(&renamed, false);
            work.publish();
            settling = !work.settling.is_empty();
            self.show(work.status());
        }
    }
}

fn watch(dir: &Path, wake: SyncSender<Wake>) -> Option<notify::RecommendedWatcher> {
    let folder = dir.to_owned();
    let on_event = move |event: notify::Result<notify::Event>| {
        let wake_up = match event {
            Ok(event) => match event.kind {
                // As they are named in `dir`, which may be a link itself.
                EventKind::Modify(ModifyKind::Name(_)) => Wake::Renamed(
                    event.paths.iter().filter_map(|path| Some(folder.join(path.file_name()?))).collect(),
                ),
                EventKind::Access(_) => return,
                _ => Wake::Look,
            },
            Err(_) => Wake::Look,
        };
        // Full: a look is due already.
        let _ = wake.try_send(wake_up);
    };
    let watcher = notify::recommended_watcher(on_event)
        .and_then(|mut watcher| watcher.watch(dir, RecursiveMode::NonRecursive).map(|()| watcher));
    match watcher {
        Ok(watcher) => Some(watcher),
        Err(error) => {
            tracing::info!(dir = %dir.display(), %error, "no change events from the plugins folder, polling only");
            None
        }
    }
}

impl Work {
    /// Looks at the folder and loads what is new and whole.
    fn look(&mut self, renamed: &HashSet<PathBuf>, starting: bool) {
        let Listing { found, refused } = match folder::list(&self.config.dir) {
            Ok(listing) => listing,
            Err(error) => {
                let detail = format!("{}: {error}", self.config.dir.display());
                self.failures.report("cannot read the plugins folder", 1, &detail, "headworks plugin list");
                return;
            }
        };
        for (file, reason) in refused.iter().filter(|entry| !self.refused.contains(entry)) {
            self.failures.report(
                &format!("plugin file {file} is not used"),
                1,
                reason,
                "headworks plugin list",
            );
        }
        self.refused = refused;
        self.settling.retain(&found);
        self.note_missing(&found);
        for found in found.into_values() {
            let known = self.files.entry(found.name.clone()).or_default();
            known.missing = false;
            if known.stamp.as_ref() == Some(&found.stamp) {
                (known.path, known.order) = (found.path, found.order);
                continue;
            }
            let old_enough = starting && found.stamp.is_older_than(self.config.settle.0);
            if old_enough || self.settling.is_settled(&found, self.config.settle.0, renamed) {
                self.load(found);
            }
        }
    }

    fn note_missing(&mut self, found: &BTreeMap<String, Found>) {
        let dir = &self.config.dir;
        self.files.retain(|name, known| {
            if found.contains_key(name) {
                return true;
            }
            if folder::take_removed_mark(dir, name) {
                tracing::info!(plugin = name, "plugin removed");
                return false;
            }
            // A file that never was a step anywhere goes without a word.
            known.missing = true;
            known.was_step || known.loaded.is_some()
        });
    }

    fn load(&mut self, found: Found) {
        // Of a file that is back; left there, it would let a later loss pass without a word.
        folder::take_removed_mark(&self.config.dir, &found.name);
        let result = self.read(&found);
        let known = self.files.entry(found.name.clone()).or_default();
        let file = file_name(&found.path);
        match result {
            Ok(loaded) => {
                let description = &loaded.program.description;
                tracing::info!(file, name = found.name, version = description.version, "plugin loaded");
                known.loaded = Some(loaded);
                known.error = None;
            }
            Err(error) => {
                let kept = if known.loaded.is_some() { "; the last good version stays" } else { "" };
                let reason = error.to_string();
                let detail = format!("{reason}{kept}");
                self.failures.report(
                    &format!("plugin file {file} is not used"),
                    1,
                    &detail,
                    &format!("headworks plugin inspect {}", found.path.display()),
                );
                known.error = Some(reason);
            }
        }
        (known.path, known.order, known.stamp) = (found.path, found.order, Some(found.stamp));
    }

    fn read(&self, found: &Found) -> Result<Loaded, Error> {
        let config = match &found.config {
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .map_err(|error| Error::Read { path: path.clone(), error })?;
                crate::yaml::to_json(&text)
                    .map_err(|reason| Error::Config(format!("{}: {reason}", file_name(path))))?
            }
            None => self.config.config.get(&found.name).cloned().unwrap_or_default(),
        };
        let program = Arc::new(self.library.load(&read(&found.path)?)?);
        Ok(Loaded { program, config })
    }

    /// Steps of an earlier start: one whose file is gone holds its pipeline.
    fn recall_steps(&mut self) {
        for (order, file) in folder::known_steps(&self.known_steps) {
            let known = self.files.entry(folder::split_file(&file).1.to_owned()).or_default();
            known.path = self.config.dir.join(file);
            known.order = order;
            known.was_step = true;
        }
    }

    fn remember_steps(&self) {
        let steps: BTreeSet<String> = self
            .files
            .values()
            .filter(|known| known.was_step)
            .map(|known| format!("{} {}\n", known.order, file_name(&known.path)))
            .collect();
        let text: String = steps.into_iter().collect();
        let known = std::fs::read_to_string(&self.known_steps).unwrap_or_default();
        if text == known {
            return;
        }
        let temporary = self.known_steps.with_extension("tmp");
        let written =
            std::fs::write(&temporary, text).and_then(|()| std::fs::rename(&temporary, &self.known_steps));
        if let Err(error) = written {
            tracing::warn!(%error, path = %self.known_steps.display(), "cannot note which steps run");
        }
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
