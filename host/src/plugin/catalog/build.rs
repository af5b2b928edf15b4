//! The chains of steps: which versions a pipeline runs, and when it holds.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;
use tokio::sync::watch;

use super::status::missing_reason;
use super::{Known, Loaded, Wake, Work, file_name};
use crate::plugin::version::{self, Faults, Shared, Version};
use crate::plugin::{Limits, OnFailure, StepConfig};
use crate::problems::Problem;
use crate::step::{Chain, StepFactory, StepId};

pub struct Pipeline {
    pub name: String,
    pub steps: Option<Vec<StepConfig>>,
    pub built: BTreeMap<String, Built>,
    pub sender: watch::Sender<Chain>,
}

#[derive(Default)]
pub struct Built {
    good: Option<(Key, Arc<Version>)>,
    pub failed: Option<(Key, String)>,
}

/// What a version is made of: another key, another version.
#[derive(Clone, PartialEq)]
pub struct Key {
    sha256: String,
    file: String,
    config: Value,
    limits: Limits,
    on_failure: OnFailure,
}

impl Work {
    /// Builds every pipeline's chain again and publishes those that changed.
    pub fn publish(&mut self) {
        let mut pipelines = std::mem::take(&mut self.pipelines);
        pipelines.retain(|pipeline| !pipeline.sender.is_closed());
        for pipeline in &mut pipelines {
            let (steps, hold) = self.build(pipeline);
            let current = pipeline.sender.borrow();
            let same = current.generation > 0
                && current.hold.as_deref() == hold.as_deref()
                && current.steps.len() == steps.len()
                && current.steps.iter().zip(&steps).all(|(a, b)| Arc::ptr_eq(a, b));
            let before = current.hold.clone();
            drop(current);
            match (&before, &hold) {
                (before, Some(why)) if before.as_deref() != Some(why) => {
                    tracing::warn!(pipeline = pipeline.name, "pipeline holds: {why}");
                }
                (Some(_), None) => tracing::info!(pipeline = pipeline.name, "pipeline goes on"),
                _ => {}
            }
            if !same {
                self.generation += 1;
                let chain =
                    Chain { generation: self.generation, steps: steps.into(), hold: hold.map(Into::into) };
                pipeline.sender.send_replace(chain);
            }
        }
        self.pipelines = pipelines;
        self.remember_steps();
    }

    fn build(&mut self, pipeline: &mut Pipeline) -> (Vec<Arc<dyn StepFactory>>, Option<String>) {
        let in_folder_mode = pipeline.steps.is_none();
        let wanted = pipeline.steps.clone().unwrap_or_else(|| self.folder_steps());
        let mut steps: Vec<Arc<dyn StepFactory>> = Vec::new();
        let mut hold = None;
        for step in &wanted {
            let built = pipeline.built.entry(step.step_name().to_owned()).or_default();
            let known = self.files.get(&step.plugin);
            if let Some(loaded) = known.and_then(|known| known.loaded.clone()) {
                self.build_step(&pipeline.name, step, &loaded, built);
            }
            match &built.good {
                Some((_, version)) => {
                    hold = hold.or_else(|| version.held());
                    steps.push(Arc::clone(version) as Arc<dyn StepFactory>);
                }
                None => {
                    let reason = match (&built.failed, known) {
                        (_, Some(known)) if known.missing && in_folder_mode => {
                            missing_reason(&step.plugin, known)
                        }
                        (Some((_, reason)), _) => reason.clone(),
                        (None, Some(Known { error: Some(error), .. })) => error.clone(),
                        _ => format!("no file {}.wasm in {}", step.plugin, self.config.dir.display()),
                    };
                    // A new file that never worked is no step yet; a step that is named or has run is missed.
                    if !in_folder_mode || known.is_some_and(|known| known.was_step) {
                        hold = hold.or(Some(format!("step {}: {reason}", step.step_name())));
                    }
                }
            }
            let Some(known) = self.files.get_mut(&step.plugin) else { continue };
            known.was_step |= in_folder_mode && built.good.is_some();
            if known.missing && in_folder_mode {
                hold = hold.or_else(|| Some(missing_reason(&step.plugin, known)));
            } else if known.missing {
                let detail = "its file is gone, the last good version stays until the host ends";
                self.failures.report(&format!("plugin {}", step.plugin), 1, detail, "headworks plugin list");
            }
        }
        pipeline.built.retain(|name, _| wanted.iter().any(|step| step.step_name() == name));
        (steps, hold)
    }

    /// The folder's plugins as steps, in order.
    fn folder_steps(&self) -> Vec<StepConfig> {
        let mut names: Vec<_> = self.files.iter().map(|(name, known)| (known.order, name)).collect();
        names.sort();
        names.into_iter().map(|(_, name)| StepConfig::new(name)).collect()
    }

    fn build_step(&self, pipeline: &str, step: &StepConfig, loaded: &Loaded, built: &mut Built) {
        let Some(known) = self.files.get(&step.plugin) else { return };
        let key = Key {
            sha256: loaded.program.sha256.clone(),
            file: file_name(&known.path),
            config: if step.config.is_null() { loaded.config.clone() } else { step.config.clone() },
            limits: step.limits.unwrap_or(self.config.limits),
            on_failure: step.on_failure,
        };
        let is = |other: &Key| *other == key;
        if built.good.as_ref().is_some_and(|(good, _)| is(good)) {
            built.failed = None;
            return;
        }
        if built.failed.as_ref().is_some_and(|(failed, _)| is(failed)) {
            return;
        }
        let id = StepId { pipeline: pipeline.into(), step: step.step_name().into() };
        let wake = self.wake.clone();
        let version = Version::new(Shared {
            context: version::context(&id, &key.config, &self.namespace, self.generation + 1),
            id,
            file: key.file.clone(),
            program: Arc::clone(&loaded.program),
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
            Ok(()) => *built = Built { good: Some((key, Arc::new(version))), failed: None },
            Err(problems) => {
                let reason = problem_text(&problems);
                let kept = if built.good.is_some() { "; the last good version stays" } else { "" };
                self.failures.report(
                    &format!("{}: step {pipeline}/{} does not start", key.file, step.step_name()),
                    1,
                    &format!("{reason}{kept}"),
                    "headworks plugin list",
                );
                built.failed = Some((key, reason));
            }
        }
    }
}

pub fn problem_text(problems: &[Problem]) -> String {
    let line = |p: &Problem| match p.path.as_str() {
        "" => p.message.clone(),
        path => format!("config.{path}: {}", p.message),
    };
    problems.iter().map(line).collect::<Vec<_>>().join("; ")
}
