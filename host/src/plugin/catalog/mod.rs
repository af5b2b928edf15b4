//! All plugins of a host, and the chains of steps made of them.
//!
//! One thread looks at the folder when it changes, loads what has settled,
//! tries each new version in an instance with its config, and publishes a
//! chain only when all its steps are good. What fails leaves the last good
//! version where it was. A step never goes away by itself: see [`super::remove`].
//!
//! Nobody waits for the thread: a pipeline's chain has the generation 0 until
//! everything that it runs was looked into. In folder mode that is what lies in
//! the folder at the start, and all of it must run: a file that does not load
//! holds the pipeline, since a filter that is missing would leak. A folder that
//! cannot be read holds every pipeline that has no steps yet; what runs goes on.

mod build;
mod look;
mod recall;
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
use tokio::sync::watch;

use self::build::Pipeline;
use self::recall::Recaller;
pub use self::status::{PluginState, PluginStatus};
use super::cache::Cache;
use super::compile::Compiler;
use super::config_file::ConfigFile;
use super::folder::{self, RefusedFile, Settling, Stamp, file_name};
use super::kept_files::{KeptFile, KeptFiles};
use super::program::{Library, Program};
use super::{Config, Error, StepConfig};
use crate::devices::Devices;
use crate::problems::Places;
use crate::step::{Chain, Recall};
use crate::telemetry::Failures;
use crate::threads;
use crate::topic::Namespace;

/// Events of the folder that wait; more are seen by the next look.
const EVENTS_MAX: usize = 256;
/// A plugin's `init` cannot be cut short: the end of the host waits for it so long.
const JOIN_MAX: Duration = Duration::from_secs(1);
/// Where a host keeps what it makes of plugin files; each folder is made, private, if needed.
pub struct Folders {
    /// Compiled plugins.
    pub cache: PathBuf,
    /// Plugin files of recorded versions of steps.
    pub kept: PathBuf,
    /// Returns the recipes of the steps that are recorded; `None` where not all are known.
    pub recorded: Box<dyn Fn() -> Option<Vec<String>> + Send + Sync>,
}

/// The plugins of a host. Dropping it ends the watch; chains stay as they are.
pub struct Plugins {
    shared: Arc<Inner>,
    compiler: Compiler,
    recaller: Recaller,
    thread: Option<JoinHandle<()>>,
    _watcher: Option<notify::RecommendedWatcher>,
}

struct Inner {
    /// Pipelines that the thread has not seen yet.
    joining: Mutex<Vec<Pipeline>>,
    status: watch::Sender<Vec<PluginStatus>>,
    /// Whether everything that lay in the folder at the start was looked into.
    is_loaded: watch::Sender<bool>,
    /// Whether no pipeline joins any more.
    all_joined: AtomicBool,
    wake: SyncSender<Wake>,
    stopped: AtomicBool,
}

enum Wake {
    /// Something happened to these files; by a rename, so that they are whole.
    Renamed(Vec<PathBuf>),
    Look,
}

/// What the thread knows.
struct Work {
    shared: Arc<Inner>,
    config: Config,
    library: Library,
    kept: KeptFiles,
    /// Places of the keys in the host's own config.
    places: Places,
    devices: Arc<Devices>,
    namespace: Arc<Namespace>,
    failures: Failures,
    known_steps: PathBuf,
    /// By step name.
    files: BTreeMap<String, Known>,
    refused: Vec<RefusedFile>,
    /// Refused files that were there at the start: the steps that they may be are missing.
    missed: Vec<RefusedFile>,
    settling: Settling,
    pipelines: Vec<Pipeline>,
    generation: u64,
    /// The folder was read whole at least once.
    has_looked: bool,
    /// Why the folder could not be read at the last look.
    unreadable: Option<String>,
    /// Pipelines that began to hold, by the reason, until it is logged.
    holds: BTreeMap<String, BTreeSet<String>>,
    untold: Vec<Untold>,
}

/// What is wrong with a file, as a line that is still to be logged.
struct Untold {
    file: String,
    kind: String,
    detail: String,
    show: String,
}

#[derive(Default)]
struct Known {
    path: PathBuf,
    order: u64,
    note: Option<String>,
    /// Stamp of the files that were last looked into.
    stamp: Option<Stamp>,
    loaded: Option<Loaded>,
    is_loading: bool,
    /// The file beside it, if there is one.
    config: Option<PathBuf>,
    /// Why the newest files are not used.
    error: Option<String>,
    /// It is for the file beside it.
    is_config_wrong: bool,
    /// They are looked into again then, although they have not changed.
    retry_at: Option<Instant>,
    /// The file is gone.
    missing: bool,
    /// It lay there at the start, or took the place of one that did.
    from_the_start: bool,
    /// It is a step of a pipeline in folder mode.
    was_step: bool,
}

#[derive(Clone)]
struct Loaded {
    program: Arc<Program>,
    file_kept: Arc<KeptFile>,
    /// Config of the file beside it.
    config: Option<ConfigFile>,
}

impl Plugins {
    /// Begins to look at the folder, to load what is there, and to watch it. Returns
    /// at once. `places` are those of the config that `config` and the steps are part of.
    pub fn start(
        config: &Config,
        folders: Folders,
        places: Places,
        devices: Arc<Devices>,
        namespace: Arc<Namespace>,
        failures: Failures,
    ) -> Result<Self, Error> {
        let compiler = Compiler::child(config.compile_cpu_s, config.compile_memory);
        Self::start_with(compiler, config, folders, places, devices, namespace, failures)
    }

    /// The same with another compiler: see [`Compiler::in_process`].
    pub fn start_with(
        compiler: Compiler,
        config: &Config,
        folders: Folders,
        places: Places,
        devices: Arc<Devices>,
        namespace: Arc<Namespace>,
        failures: Failures,
    ) -> Result<Self, Error> {
        let cache = Cache::open(&folders.cache)?;
        cache.clean_up();
        let recorded = folders.recorded;
        let named = Box::new(move || recall::files_of(&recorded()?));
        let kept = KeptFiles::new(&folders.kept, named, failures.clone());
        let library = Library::new(compiler.clone(), Some(cache))?;
        let is_there = config.dir.exists();
        match std::fs::create_dir_all(&config.dir) {
            Ok(()) if !is_there => {
                tracing::info!(dir = %config.dir.display(), "made the plugins folder, which was not there");
            }
            Ok(()) => {}
            Err(error) => {
                tracing::warn!(dir = %config.dir.display(), %error, "cannot make the plugins folder");
            }
        }
        let (wake, events) = mpsc::sync_channel(EVENTS_MAX);
        let watcher = watch(&config.dir, wake.clone());
        let shared = Arc::new(Inner {
            joining: Mutex::default(),
            status: watch::Sender::default(),
            is_loaded: watch::Sender::default(),
            all_joined: AtomicBool::new(false),
            wake,
            stopped: AtomicBool::new(false),
        });
        let recaller = Recaller {
            library: library.clone(),
            kept: kept.folder().clone(),
            devices: Arc::clone(&devices),
            namespace: Arc::clone(&namespace),
            failures: failures.clone(),
        };
        let mut work = Work {
            shared: Arc::clone(&shared),
            config: config.clone(),
            library,
            kept,
            places,
            devices,
            namespace,
            failures,
            known_steps: folder::known_steps_file(&folders.cache),
            files: BTreeMap::new(),
            refused: Vec::new(),
            missed: Vec::new(),
            settling: Settling::default(),
            pipelines: Vec::new(),
            generation: 0,
            has_looked: false,
            unreadable: None,
            holds: BTreeMap::new(),
            untold: Vec::new(),
        };
        work.recall_steps()?;
        let thread = threads::spawn("plugin-folder".to_owned(), move || work.run(&events))
            .map_err(|error| Error::Engine(format!("cannot start the folder's thread: {error}")))?;
        Ok(Self { shared, compiler, recaller, thread: Some(thread), _watcher: watcher })
    }

    /// The chain of a pipeline, now and after every change; of the generation 0
    /// until its plugins were looked into. `steps: None`: the folder's plugins by
    /// the number in front of their names.
    pub fn chain(&self, pipeline: &str, steps: Option<&[StepConfig]>) -> watch::Receiver<Chain> {
        let hold = Some("its plugins are being loaded".into());
        let (sender, receiver) = watch::channel(Chain { generation: 0, steps: Arc::new([]), hold });
        self.shared.joining().push(Pipeline {
            name: pipeline.to_owned(),
            steps: steps.map(<[_]>::to_vec),
            built: BTreeMap::new(),
            holds_for: None,
            sender,
        });
        // Full: a look is due already.
        let _ = self.shared.wake.try_send(Wake::Look);
        receiver
    }

    /// Makes the steps again that ran in a pipeline earlier, from the cache or their plugin files.
    pub fn recall(&self, pipeline: &str) -> Recall {
        let (recaller, pipeline) = (self.recaller.clone(), pipeline.to_owned());
        Arc::new(move |recipe| recaller.recall(&pipeline, recipe))
    }

    /// Says that every pipeline has its chain: from now on it is logged which of them hold, and what
    /// is wrong with files that none of them holds for.
    pub fn all_joined(&self) {
        self.shared.all_joined.store(true, Ordering::Release);
        let _ = self.shared.wake.try_send(Wake::Look);
    }

    pub fn status(&self) -> Vec<PluginStatus> {
        self.shared.status.borrow().clone()
    }

    /// Returns when everything that lay in the folder at the start was looked into.
    pub async fn loaded(&self) {
        // Ends early only with the host.
        let _ = self.shared.is_loaded.subscribe().wait_for(|loaded| *loaded).await;
    }
}

impl Drop for Plugins {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Release);
        self.compiler.stop();
        let _ = self.shared.wake.try_send(Wake::Look);
        let Some(thread) = self.thread.take() else { return };
        let deadline = Instant::now() + JOIN_MAX;
        while !thread.is_finished() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        if thread.is_finished() {
            // It only watches: nothing is lost with it.
            let _ = thread.join();
        }
    }
}

impl Inner {
    fn joining(&self) -> std::sync::MutexGuard<'_, Vec<Pipeline>> {
        self.joining.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_all_joined(&self) -> bool {
        self.all_joined.load(Ordering::Acquire)
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
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
    fn run(mut self, events: &Receiver<Wake>) {
        let (poll, settle) = (self.config.poll.0, self.config.settle.0);
        let mut renamed = HashSet::new();
        while !self.shared.is_stopped() {
            self.look(&renamed);
            self.kept.retry();
            self.publish(|_| true);
            // Looks at least twice within the settle time while a file is being written.
            let settling = !self.settling.is_empty();
            let wait = if settling { poll.min(settle / 2).max(Duration::from_millis(10)) } else { poll };
            let first = match events.recv_timeout(wait) {
                Ok(wake) => Some(wake),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            renamed.clear();
            for wake in first.into_iter().chain(events.try_iter()) {
                if let Wake::Renamed(paths) = wake {
                    renamed.extend(paths);
                }
            }
        }
    }

    fn show(&self) {
        let is_loaded = self.has_looked && self.files.values().all(|known| known.is_looked_into());
        self.shared.status.send_replace(self.status());
        self.shared.is_loaded.send_if_modified(|loaded| is_loaded && !std::mem::replace(loaded, true));
    }

    /// Steps of an earlier start: one whose file is gone holds its pipeline.
    fn recall_steps(&mut self) -> Result<(), Error> {
        for (order, file) in folder::known_steps(&self.known_steps)? {
            let known = self.files.entry(folder::split_file(&file).1.to_owned()).or_default();
            known.path = self.config.dir.join(file);
            known.order = order;
            known.was_step = true;
        }
        Ok(())
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
            let detail = format!("{}: {error}", self.known_steps.display());
            self.failures.report("cannot note which steps run", 1, &detail, "");
        }
    }
}

impl Known {
    /// Or it is not there to be looked into.
    fn is_looked_into(&self) -> bool {
        self.missing || self.stamp.is_some()
    }
}
