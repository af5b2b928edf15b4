//! Steps of earlier processes, made again from the cache of compiled plugins.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::build::Key;
use crate::devices::Devices;
use crate::plugin::program::Library;
use crate::plugin::version::{self, Faults, Shared, Version};
use crate::step::{StepFactory, StepId};
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
    pub devices: Arc<Devices>,
    pub namespace: Arc<Namespace>,
    pub failures: Failures,
}

impl Recipe {
    pub fn text(&self) -> String {
        serde_json::to_string(self).expect("a recipe is plain text")
    }
}

impl Recaller {
    /// See [`crate::step::Recall`].
    pub fn recall(&self, pipeline: &str, recipe: &str) -> Result<Arc<dyn StepFactory>, String> {
        let Recipe { step, key } =
            serde_json::from_str(recipe).map_err(|error| format!("a step of an earlier version: {error}"))?;
        let program = self.library.kept(&key.sha256).ok_or_else(|| {
            let hash = key.sha256.get(..8).unwrap_or_default();
            format!(
                "step {step}: the version before ({}, {hash}…) is not in the plugin cache any more",
                key.file
            )
        })?;
        let id = StepId { pipeline: pipeline.into(), step: step.as_str().into() };
        let version = Version::new(Shared {
            context: version::context(&id, &key.config, &self.namespace, 0),
            id,
            file: key.file,
            recipe: recipe.to_owned(),
            program: Arc::new(program),
            limits: key.limits,
            on_failure: key.on_failure,
            devices: Arc::clone(&self.devices),
            namespace: Arc::clone(&self.namespace),
            failures: self.failures.clone(),
            on_hold: Box::new(|| {}),
            faults: Faults::default(),
            telemetry: Arc::default(),
        });
        version.let_go();
        Ok(Arc::new(version))
    }
}
