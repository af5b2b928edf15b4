//! One plugin by itself, through the real path: for `plugin inspect`,
//! `plugin bench`, the benchmarks and tests.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::cache::Cache;
use super::compile::Compiler;
use super::program::{Description, Inspection, Library, read};
use super::version::{self, Faults, PluginStep, Shared, Version};
use super::{Error, Limits, OnFailure};
use crate::batch::{Batch, Partition};
use crate::devices::Devices;
use crate::problems::step_problems;
use crate::step::{Attempt, Outcome, Step, StepId};
use crate::telemetry::Failures;
use crate::topic::Namespace;

/// A step of one plugin, outside of a pipeline.
pub struct Runner {
    step: PluginStep,
    description: Description,
}

impl Runner {
    /// Compiles in a child with the default limits, so the program must serve [`super::CHILD_COMMAND`].
    pub fn load(path: &Path, config: &Value) -> Result<Self, Error> {
        let library = Library::new(default_compiler(), None)?;
        let (devices, namespace) = (Arc::default(), Arc::default());
        Self::of(&library, &read(path)?, config, Limits::default(), devices, namespace, OnFailure::default())
    }

    /// Compiles in this process, without limits: for a plugin of the tree.
    pub fn from_bytes(
        bytes: &[u8],
        config: &Value,
        limits: Limits,
        devices: Arc<Devices>,
        namespace: Arc<Namespace>,
    ) -> Result<Self, Error> {
        Self::with_failure(bytes, config, limits, devices, namespace, OnFailure::default())
    }

    pub(super) fn with_failure(
        bytes: &[u8],
        config: &Value,
        limits: Limits,
        devices: Arc<Devices>,
        namespace: Arc<Namespace>,
        on_failure: OnFailure,
    ) -> Result<Self, Error> {
        let library = Library::new(Compiler::in_process(), None)?;
        Self::of(&library, bytes, config, limits, devices, namespace, on_failure)
    }

    fn of(
        library: &Library,
        bytes: &[u8],
        config: &Value,
        limits: Limits,
        devices: Arc<Devices>,
        namespace: Arc<Namespace>,
        on_failure: OnFailure,
    ) -> Result<Self, Error> {
        let program = Arc::new(library.load(bytes)?);
        if program.is_access() {
            return Err(Error::NoStep);
        }
        let description = program.description.clone();
        let id = StepId { pipeline: "runner".into(), step: description.name.as_str().into() };
        let version = Version::new(Shared {
            context: version::context(&id, config, &namespace, 0),
            file: format!("{}.wasm", description.name),
            recipe: String::new(),
            id,
            program,
            limits,
            on_failure,
            file_kept: Arc::default(),
            devices,
            namespace,
            failures: Failures::default(),
            on_hold: Box::new(|| {}),
            faults: Faults::default(),
            telemetry: Arc::default(),
        });
        let step = version.step().map_err(|problems| Error::Config(step_problems(&problems)))?;
        Ok(Self { step, description })
    }

    #[cfg(test)]
    pub(super) fn use_up_patience(&mut self) {
        self.step.use_up_patience();
    }

    #[cfg(test)]
    pub(super) fn call_messages_max(&self) -> usize {
        self.step.call_messages_max
    }

    pub fn description(&self) -> &Description {
        &self.description
    }
}

impl Step for Runner {
    fn id(&self) -> &StepId {
        self.step.id()
    }

    fn run(&mut self, batch: Batch, partition: Partition, attempt: Attempt) -> Outcome {
        self.step.run(batch, partition, attempt)
    }

    fn sees_all(&self) -> bool {
        self.step.sees_all()
    }
}

/// Looks at a plugin file: what it is, what it imports, what it says of
/// itself, or why it cannot run here. Compiles in a child with the default
/// limits, so the program must serve [`super::CHILD_COMMAND`], unless the cache
/// of a host knows the file.
pub fn inspect(path: &Path, cache_dir: Option<&Path>) -> Result<Inspection, Error> {
    Library::new(default_compiler(), cache_dir.and_then(Cache::existing))?.inspect(path)
}

fn default_compiler() -> Compiler {
    let limits = super::Config::default();
    Compiler::child(limits.compile_cpu_s, limits.compile_memory)
}
