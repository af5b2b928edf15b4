//! Steps of earlier versions, made again from the cache of compiled plugins or from their plugin files.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::build::Key;
use crate::devices::Devices;
use crate::plugin::Error;
use crate::plugin::kept_files::KeptFolder;
use crate::plugin::program::{Library, Program};
use crate::plugin::version::{self, Faults, Shared, Version};
use crate::step::{RecallError, StepFactory, StepId};
use crate::telemetry::Failures;
use crate::topic::Namespace;

/// What a version of a step is made of, as [`StepFactory::recipe`] gives it.
#[derive(Serialize, Deserialize)]
pub struct Recipe {
    pub step: String,
    pub key: Key,
}

/// What recalled versions share with those of the folder.
#[derive(Clone)]
pub struct Recaller {
    pub library: Library,
    pub kept: KeptFolder,
    pub devices: Arc<Devices>,
    pub namespace: Arc<Namespace>,
    pub failures: Failures,
}

impl Recipe {
    pub fn text(&self) -> String {
        serde_json::to_string(self).expect("a recipe is plain text")
    }
}

/// Returns the SHA-256 of each file that these recipes name; `None` where one cannot be read.
pub fn files_of(recipes: &[String]) -> Option<BTreeSet<String>> {
    let file = |recipe: &String| Some(serde_json::from_str::<Recipe>(recipe).ok()?.key.sha256);
    recipes.iter().map(file).collect()
}

impl Recaller {
    /// See [`crate::step::Recall`].
    pub fn recall(&self, pipeline: &str, recipe: &str) -> Result<Arc<dyn StepFactory>, RecallError> {
        let Recipe { step, key } = serde_json::from_str(recipe)
            .map_err(|error| RecallError::Gone(format!("a step of an earlier version: {error}")))?;
        let hash = key.sha256.get(..8).unwrap_or_default();
        let named = |why: &str| format!("step {step}: the version before ({}, {hash}…) {why}", key.file);
        let program = self.program(&key.sha256).map_err(|error| match error {
            RecallError::Gone(why) => RecallError::Gone(named(&why)),
            RecallError::Later(why) => RecallError::Later(named(&why)),
        })?;
        let id = StepId { pipeline: pipeline.into(), step: step.as_str().into() };
        Ok(Arc::new(Version::new(Shared {
            context: version::context(&id, &key.config, &self.namespace, 0),
            id,
            file: key.file,
            recipe: recipe.to_owned(),
            program: Arc::new(program),
            // It has a record, or needs none.
            file_kept: Arc::default(),
            limits: key.limits,
            on_failure: key.on_failure,
            devices: Arc::clone(&self.devices),
            namespace: Arc::clone(&self.namespace),
            failures: self.failures.clone(),
            on_hold: Box::new(|| {}),
            faults: Faults::default(),
            telemetry: Arc::default(),
        })))
    }

    /// Returns the program of a plugin file, by its SHA-256 in hexadecimal.
    fn program(&self, sha256: &str) -> Result<Program, RecallError> {
        if let Some(program) = self.library.kept(sha256) {
            return Ok(program);
        }
        let gone =
            || RecallError::Gone("is neither in the plugin cache nor in plugin-files any more".to_owned());
        let is_by_compiler = |error: &Error| match error {
            Error::Killed(_) => true,
            Error::Compile(error) => error.is_of_the_file(),
            _ => false,
        };
        let failed = |error: Error| match &error {
            // The file is there, and a limit may be raised: other steps do not get its messages for that.
            error if is_by_compiler(error) => RecallError::Later(format!(
                "cannot be compiled again yet: {error}; raise the limit that it names, or remove \
                 plugin-files/{sha256}.wasm of the data folder to have newer steps run its messages"
            )),
            _ if error.is_passing() => RecallError::Later(format!("cannot be made again yet: {error}")),
            _ => RecallError::Gone(format!("cannot be made again: {error}")),
        };
        let bytes = self.kept.read(sha256).map_err(failed)?.ok_or_else(gone)?;
        let program = self.library.load(&bytes).map_err(failed)?;
        // Its name says what it has.
        if program.sha256 == sha256 { Ok(program) } else { Err(gone()) }
    }
}
