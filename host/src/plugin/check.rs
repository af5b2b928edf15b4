//! Tries the plugins of a config without a host: for `headworks validate`.
//!
//! Each step's plugin is loaded as the host does it, from the cache where that
//! knows the file, and started once with the step's config (`dry-run`). No
//! message goes through it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use super::cache::Cache;
use super::compile::Compiler;
use super::config_file::ConfigFile;
use super::folder::{self, Found, Listing, file_name};
use super::instance::StartError;
use super::program::{Library, Program};
use super::version::{self, Faults, Shared, Version};
use super::{Config, Error, StepConfig};
use crate::devices::Devices;
use crate::problems::{KeyPath, Place, Problem};
use crate::step::StepId;
use crate::telemetry::Failures;
use crate::topic::Namespace;

/// What is wrong with the plugins of a config.
#[derive(Debug, Default)]
pub struct Findings {
    /// With paths in the host's config.
    pub problems: Vec<Problem>,
    /// In the plugins folder.
    pub elsewhere: BTreeSet<(Place, KeyPath, String)>,
    /// Files that are not used, or not as they may be meant.
    pub warnings: Vec<String>,
}

/// What a check stands on.
pub struct Check<'c> {
    pub config: &'c Config,
    pub cache_dir: &'c Path,
    pub devices: Arc<Devices>,
    pub namespace: Arc<Namespace>,
}

type Plugin = Result<(Arc<Program>, Option<ConfigFile>), String>;

impl Check<'_> {
    /// Tries the plugins of these pipelines, by name: their steps, or the folder's.
    pub fn run<'p>(
        &self,
        pipelines: impl Iterator<Item = (&'p str, Option<&'p [StepConfig]>)>,
    ) -> Result<Findings, Error> {
        let mut findings = Findings::default();
        let dir = &self.config.dir;
        let Listing { found, refused, .. } =
            folder::list(dir).map_err(|error| Error::Read { path: dir.clone(), error })?;
        let shown = |file: &str| dir.join(file).display().to_string();
        findings.warnings.extend(refused.iter().map(|it| format!("{}: {}", shown(&it.file), it.reason)));
        let notes =
            found.values().filter_map(|it| Some(format!("{}: {}", it.path.display(), it.note.as_ref()?)));
        findings.warnings.extend(notes);
        let compiler = Compiler::child(self.config.compile_cpu_s, self.config.compile_memory);
        let library = Library::new(compiler, Cache::existing(self.cache_dir))?;
        let mut plugins: BTreeMap<&str, Plugin> = BTreeMap::new();
        for (name, steps) in pipelines {
            let of_folder: Vec<StepConfig> = found.keys().map(|name| StepConfig::new(name)).collect();
            for (number, step) in steps.unwrap_or(&of_folder).iter().enumerate() {
                let Some(found) = found.get(&step.plugin) else { continue };
                let plugin = plugins.entry(&found.name).or_insert_with(|| self.load(&library, found));
                let path = steps
                    .is_some()
                    .then(|| KeyPath::root().key("pipelines").key(name).key("steps").index(number));
                self.step(name, path, step, found, plugin, &mut findings);
            }
        }
        Ok(findings)
    }

    fn load(&self, library: &Library, found: &Found) -> Plugin {
        let loaded = folder::read(&self.config.dir, found).and_then(|files| {
            let config = found.config.as_deref().zip(files.config);
            let config =
                config.map(|(path, text)| ConfigFile::parse(&path.display().to_string(), &text)).transpose();
            let program = library.load(&files.wasm)?;
            if program.is_access() {
                return Err(Error::NoStep);
            }
            Ok((Arc::new(program), config.map_err(Error::Config)?))
        });
        loaded.map_err(|error| error.to_string())
    }

    /// `path`: of the step in the host's config, where it is named there.
    fn step(
        &self,
        pipeline: &str,
        path: Option<KeyPath>,
        step: &StepConfig,
        found: &Found,
        plugin: &Plugin,
        findings: &mut Findings,
    ) {
        let file = || Place { file: found.path.display().to_string(), line: None };
        let mut cannot_run = |reason: &str| match &path {
            Some(path) => {
                let message = format!("{} cannot run: {reason}", found.path.display());
                findings.problems.push(Problem { path: path.key("plugin"), message });
            }
            None => drop(findings.elsewhere.insert((file(), KeyPath::root(), reason.to_owned()))),
        };
        let (program, beside) = match plugin {
            Ok((program, config)) => (program, config.as_ref()),
            Err(reason) => return cannot_run(reason),
        };
        let here = self.config.config.get(&step.plugin);
        let config = match (&step.config, beside, here) {
            (config, _, _) if !config.is_null() => config.clone(),
            (_, Some(beside), _) => beside.value.clone(),
            (_, None, config) => config.cloned().unwrap_or_default(),
        };
        let problems = match self.start(pipeline, step, found, program, &config) {
            Ok(()) => return,
            Err(StartError::Fault(reason)) => return cannot_run(&reason),
            Err(StartError::Config(problems)) => problems,
        };
        for Problem { path: inner, message } in problems {
            if let Some(path) = path.as_ref().filter(|_| !step.config.is_null()) {
                findings.problems.push(Problem { path: path.key("config").join(&inner), message });
            } else if let Some(beside) = beside {
                let place = beside.places.of(&inner).cloned().unwrap_or_else(file);
                findings.elsewhere.insert((place, inner, message));
            } else if here.is_some() {
                let path = KeyPath::root().key("plugins").key("config").key(&step.plugin).join(&inner);
                findings.problems.push(Problem { path, message });
            } else {
                findings.elsewhere.insert((file(), KeyPath::root().key("config").join(&inner), message));
            }
        }
    }

    fn start(
        &self,
        pipeline: &str,
        step: &StepConfig,
        found: &Found,
        program: &Arc<Program>,
        config: &serde_json::Value,
    ) -> Result<(), StartError> {
        let id = StepId { pipeline: pipeline.into(), step: step.step_name().into() };
        let mut context = version::context(&id, config, &self.namespace, 0);
        context.dry_run = true;
        let version = Version::new(Shared {
            context,
            id,
            recipe: String::new(),
            file: file_name(&found.path),
            program: Arc::clone(program),
            limits: step.limits.unwrap_or(self.config.limits),
            on_failure: step.on_failure,
            file_kept: Arc::default(),
            devices: Arc::clone(&self.devices),
            namespace: Arc::clone(&self.namespace),
            failures: Failures::default(),
            on_hold: Box::new(|| {}),
            faults: Faults::default(),
            telemetry: Arc::default(),
        });
        version.trial()
    }
}
