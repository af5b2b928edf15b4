//! The engine for access plugins, which is made once one is configured.

use std::sync::{Mutex, PoisonError};

use crate::access::{self, Authenticator};
use crate::plugin::access::AccessEngine;

/// Makes the engine.
pub type MakeEngine = Box<dyn Fn() -> Result<AccessEngine, String> + Send + Sync>;

#[derive(Default)]
pub struct Engines {
    make: Option<MakeEngine>,
    made: Mutex<Option<AccessEngine>>,
}

impl Engines {
    pub fn new(make: Option<MakeEngine>) -> Self {
        Self { make, made: Mutex::default() }
    }

    /// Returns the engine if a plugin is configured and plugins can be run. Blocks on the disk.
    pub fn for_config(&self, config: Option<&access::Config>) -> Result<Option<AccessEngine>, String> {
        let mut authenticators = config.iter().flat_map(|access| &access.authenticate);
        let Some(make) = &self.make else { return Ok(None) };
        if !authenticators.any(|one| matches!(one, Authenticator::Plugin(_))) {
            return Ok(None);
        }
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if made.is_none() {
            *made = Some(make()?);
        }
        Ok(made.clone())
    }
}
