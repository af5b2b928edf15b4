//! The chains of steps: which versions a pipeline runs, and when it holds.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::watch;

use super::recall::Recipe;
use super::{Known, Loaded, RefusedFile, Untold, Wake, Work, file_name};
use crate::hints::Hint;
use crate::plugin::config_file::located;
use crate::plugin::instance::StartError;
use crate::plugin::version::{self, Faults, Shared, Version};
use crate::plugin::{Limits, OnFailure, StepConfig};
use crate::problems::{KeyPath, Places, Problem};
use crate::step::{Chain, StepFactory, StepId};

pub struct Pipeline {
    pub name: String,
    pub steps: Option<Vec<StepConfig>>,
    pub built: BTreeMap<String, Built>,
    /// File of the plugin that it holds for.
    pub holds_for: Option<String>,
    pub sender: watch::Sender<Chain>,
}

#[derive(Default)]
pub struct Built {
    good: Option<(Key, Arc<Version>)>,
    failed: Option<(Key, NotStarted)>,
}

/// Why a version did not start.
pub struct NotStarted {
    pub reason: String,
    /// The program is at fault, and not its config.
    pub is_fault: bool,
}

/// What a version is made of: another key, another version.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct Key {
    pub sha256: String,
    pub file: String,
    pub config: Value,
    pub limits: Limits,
    pub on_failure: OnFailure,
}

impl Built {
    pub fn runs(&self) -> bool {
        self.good.is_some()
    }

    pub fn not_started(&self) -> Option<&NotStarted> {
        self.failed.as_ref().map(|(_, why)| why)
    }
}

impl Pipeline {
    /// The steps that a plugin was built for: the pipeline's name, the step's, and what came of it.
    pub fn built_of<'p>(&'p self, plugin: &'p str) -> impl Iterator<Item = (&'p str, &'p str, &'p Built)> {
        let is_of = move |step: &str| match &self.steps {
            None => step == plugin,
            Some(steps) => steps.iter().any(|s| s.step_name() == step && s.plugin == plugin),
        };
        let built = self.built.iter().filter(move |(step, _)| is_of(step));
        built.map(|(step, built)| (&*self.name, &**step, built))
    }

    /// It has no steps yet.
    pub fn is_first(&self) -> bool {
        self.sender.borrow().generation == 0
    }
}

impl Work {
    /// Builds the chains of these pipelines again and publishes those that changed.
    pub fn publish(&mut self, is_meant: impl Fn(&Pipeline) -> bool) {
        let mut pipelines = std::mem::take(&mut self.pipelines);
        pipelines.append(&mut self.shared.joining());
        pipelines.retain(|pipeline| !pipeline.sender.is_closed());
        let mut built = Vec::new();
        for (number, pipeline) in pipelines.iter_mut().enumerate() {
            // What a folder that cannot be read has is not waited for: the pipeline holds.
            let waits = pipeline.is_first() && self.unreadable.is_none() && self.is_awaited(pipeline);
            if is_meant(pipeline) && !waits && !self.shared.is_stopped() {
                built.push((number, self.build(pipeline)));
            }
        }
        self.pipelines = pipelines;
        self.remember_steps();
        // First: the line that a pipeline holds leads people to the status.
        self.shared.status.send_replace(self.status());
        for (number, (steps, hold)) in built {
            if let Some(why) = self.publish_one(number, steps, hold) {
                self.holds.entry(why).or_default().insert(self.pipelines[number].name.clone());
            }
        }
        self.tell();
        self.show();
    }

    /// Logs which pipelines hold: one line for all that a fault holds. Then reports what is wrong
    /// with files, once every pipeline has its first steps: one that holds for a file has told so,
    /// with the reason.
    fn tell(&mut self) {
        if !self.shared.has_all_joined() {
            return;
        }
        for (why, names) in std::mem::take(&mut self.holds) {
            let names: Vec<_> = names.into_iter().collect();
            tracing::warn!(pipeline = names.join(", "), "pipeline holds: {why}");
        }
        if self.pipelines.iter().any(Pipeline::is_first) {
            return;
        }
        for Untold { file, kind, detail, show } in std::mem::take(&mut self.untold) {
            if !self.pipelines.iter().any(|pipeline| pipeline.holds_for.as_deref() == Some(&*file)) {
                self.failures.report(&kind, 1, &detail, &show);
            }
        }
    }

    /// Whether a plugin that it runs was not looked into yet.
    fn is_awaited(&self, pipeline: &Pipeline) -> bool {
        let is_awaited = |known: &Known| !known.is_looked_into();
        match &pipeline.steps {
            None => self.files.values().any(is_awaited),
            Some(steps) => steps.iter().filter_map(|step| self.files.get(&step.plugin)).any(is_awaited),
        }
    }

    /// Returns the reason where the pipeline begins to hold for it.
    fn publish_one(
        &mut self,
        number: usize,
        steps: Vec<Arc<dyn StepFactory>>,
        hold: Option<String>,
    ) -> Option<String> {
        let pipeline = &self.pipelines[number];
        let current = pipeline.sender.borrow();
        let is_first = current.generation == 0;
        let same = !is_first
            && current.hold.as_deref() == hold.as_deref()
            && current.steps.len() == steps.len()
            && current.steps.iter().zip(&steps).all(|(a, b)| Arc::ptr_eq(a, b));
        let before = current.hold.as_deref().map(str::to_owned).filter(|_| !is_first);
        drop(current);
        if before.is_some() && hold.is_none() {
            tracing::info!(pipeline = pipeline.name, "pipeline goes on");
        }
        let holds_now = hold.clone().filter(|_| before != hold);
        if !same {
            self.generation += 1;
            let hold = hold.map(Into::into);
            pipeline.sender.send_replace(Chain { generation: self.generation, steps: steps.into(), hold });
        }
        holds_now
    }

    fn build(&mut self, pipeline: &mut Pipeline) -> (Vec<Arc<dyn StepFactory>>, Option<String>) {
        let in_folder_mode = pipeline.steps.is_none();
        let wanted = pipeline.steps.clone().unwrap_or_else(|| self.folder_steps());
        let mut steps: Vec<Arc<dyn StepFactory>> = Vec::new();
        let has_steps = in_folder_mode || !wanted.is_empty();
        // The first reason, and the file that it is about.
        let unreadable = self.unreadable.clone().filter(|_| has_steps && !self.has_looked);
        let mut hold: Option<(String, Option<String>)> = unreadable.map(|why| (why, None));
        if in_folder_mode && let Some(RefusedFile { file, reason, .. }) = self.missed.first() {
            hold = hold.or_else(|| Some((format!("plugins folder: {file}: {reason}"), Some(file.clone()))));
        }
        for (number, step) in wanted.iter().enumerate() {
            let built = pipeline.built.entry(step.step_name().to_owned()).or_default();
            let known = self.files.get(&step.plugin);
            if let Some(loaded) = known.and_then(|known| known.loaded.clone()) {
                let (config, places, base) = self.config_of(&pipeline.name, number, step, &loaded);
                let failed = self.build_step(&pipeline.name, step, &loaded, config, built, |problems| {
                    located(problems, places, &base).join("; ")
                });
                self.untold.extend(failed);
            }
            let known = self.files.get(&step.plugin);
            match &built.good {
                Some((_, version)) => {
                    hold = hold.or_else(|| Some((version.held()?, None)));
                    steps.push(Arc::clone(version) as Arc<dyn StepFactory>);
                }
                None => {
                    let reason = match (&built.failed, known) {
                        (_, Some(known)) if known.missing && in_folder_mode => {
                            self.missing_reason(&step.plugin, known)
                        }
                        (Some((_, why)), _) => why.reason.clone(),
                        (None, Some(Known { error: Some(error), .. })) => error.clone(),
                        (None, Some(known)) if !known.is_looked_into() => {
                            self.unreadable.clone().unwrap_or_else(|| "is being loaded".to_owned())
                        }
                        _ => self.unreadable.clone().unwrap_or_else(|| {
                            format!("no file {}.wasm in {}", step.plugin, self.config.dir.display())
                        }),
                    };
                    // A new file that never worked is no step yet. A step is missed that is named, has run, or
                    // lay there at the start.
                    let is_missed = |known: &Known| known.was_step || known.from_the_start;
                    let file = known.map(|known| file_name(&known.path));
                    if !in_folder_mode {
                        hold = hold.or(Some((format!("step {}: {reason}", step.step_name()), file)));
                    } else if let Some(known) = known.filter(|known| is_missed(known)) {
                        hold = hold.or_else(|| Some((self.not_running(&step.plugin, known, &reason), file)));
                    }
                }
            }
            let Some(known) = self.files.get_mut(&step.plugin) else { continue };
            known.was_step |= in_folder_mode && (built.good.is_some() || known.from_the_start);
            let known = &self.files[&step.plugin];
            if known.missing && in_folder_mode {
                hold = hold.or_else(|| Some((self.missing_reason(&step.plugin, known), None)));
            } else if known.missing {
                let detail = "its file is gone, the last good version stays until the host ends";
                let show = self.failures.hint(Hint::PluginList);
                self.failures.report(&format!("plugin {}", step.plugin), 1, detail, &show);
            }
        }
        pipeline.built.retain(|name, _| wanted.iter().any(|step| step.step_name() == name));
        let (why, file) = hold.map_or((None, None), |(why, file)| (Some(why), file));
        pipeline.holds_for = file;
        (steps, why)
    }

    /// Why a pipeline of the folder holds for a step, and what to do.
    fn not_running(&self, name: &str, known: &Known, reason: &str) -> String {
        if known.missing {
            return reason.to_owned();
        }
        let (file, remove) = (file_name(&known.path), self.failures.hint(Hint::PluginRemove(name)));
        format!("{file} does not run: {reason}; mend it, or run `{remove}` to continue without it")
    }

    /// The folder's plugins as steps, in order.
    fn folder_steps(&self) -> Vec<StepConfig> {
        let mut names: Vec<_> = self.files.iter().map(|(name, known)| (known.order, name)).collect();
        names.sort();
        names.into_iter().map(|(_, name)| StepConfig::new(name)).collect()
    }

    /// A step's config, and where it is written.
    fn config_of<'w>(
        &'w self,
        pipeline: &str,
        number: usize,
        step: &StepConfig,
        loaded: &'w Loaded,
    ) -> (Value, &'w Places, KeyPath) {
        let root = KeyPath::root();
        if !step.config.is_null() {
            let base = root.key("pipelines").key(pipeline).key("steps").index(number).key("config");
            return (step.config.clone(), &self.places, base);
        }
        if let Some(file) = &loaded.config {
            return (file.value.clone(), &file.places, root);
        }
        let config = self.config.config.get(&step.plugin).cloned().unwrap_or_default();
        (config, &self.places, root.key("plugins").key("config").key(&step.plugin))
    }

    /// Returns what to tell of a step that does not start, the first time.
    fn build_step(
        &self,
        pipeline: &str,
        step: &StepConfig,
        loaded: &Loaded,
        config: Value,
        built: &mut Built,
        text: impl Fn(&[Problem]) -> String,
    ) -> Option<Untold> {
        let known = self.files.get(&step.plugin)?;
        let key = Key {
            sha256: loaded.program.sha256.clone(),
            file: file_name(&known.path),
            config,
            limits: step.limits.unwrap_or(self.config.limits),
            on_failure: step.on_failure,
        };
        let is = |other: &Key| *other == key;
        if built.good.as_ref().is_some_and(|(good, _)| is(good)) {
            built.failed = None;
            return None;
        }
        if built.failed.as_ref().is_some_and(|(failed, _)| is(failed)) {
            return None;
        }
        let id = StepId { pipeline: pipeline.into(), step: step.step_name().into() };
        let wake = self.shared.wake.clone();
        let version = Version::new(Shared {
            context: version::context(&id, &key.config, &self.namespace, self.generation + 1),
            id,
            file: key.file.clone(),
            recipe: Recipe { step: step.step_name().to_owned(), key: key.clone() }.text(),
            program: Arc::clone(&loaded.program),
            file_kept: Arc::clone(&loaded.file_kept),
            limits: key.limits,
            on_failure: key.on_failure,
            devices: Arc::clone(&self.devices),
            namespace: Arc::clone(&self.namespace),
            failures: self.failures.clone(),
            on_hold: Box::new(move || drop(wake.try_send(Wake::Look))),
            faults: Faults::default(),
            telemetry: Arc::default(),
        });
        match version.trial() {
            Ok(()) => {
                *built = Built { good: Some((key, Arc::new(version))), failed: None };
                None
            }
            Err(error) => {
                let is_fault = matches!(error, StartError::Fault(_));
                let reason = match error {
                    StartError::Fault(reason) => reason,
                    StartError::Config(problems) => text(&problems),
                };
                let kept = if built.good.is_some() { "; the last good version stays" } else { "" };
                let untold = Untold {
                    file: key.file.clone(),
                    kind: format!("{}: step {pipeline}/{} does not start", key.file, step.step_name()),
                    detail: format!("{reason}{kept}"),
                    show: self.failures.hint(Hint::PluginList),
                };
                built.failed = Some((key, NotStarted { reason, is_fault }));
                Some(untold)
            }
        }
    }
}
