//! The `dead_letters:` section: how long rejected messages are kept.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::problems::{KeyPath, Problems};
use crate::stream::{self, Retention};
use crate::units::{ByteSize, Period};

/// How long rejected messages are kept.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DeadLettersConfig {
    /// Age at which dead letters are removed, up to one eighth later, and no longer listed. `null` keeps
    /// them until `max_bytes` is reached.
    pub max_age: Option<Period>,
    /// Bytes that all dead letters may take on disk. The oldest are removed to stay below. Half of this
    /// is divided among the pipelines, for dead letters whose sinks have not passed them; a pipeline
    /// that has used up its share waits, and the others continue.
    pub max_bytes: ByteSize,
}

impl Default for DeadLettersConfig {
    fn default() -> Self {
        Self { max_age: Some(Period(Duration::from_secs(30 * 24 * 60 * 60))), max_bytes: ByteSize::gib(1) }
    }
}

impl DeadLettersConfig {
    pub fn validate(&self, path: &KeyPath, problems: &mut Problems) {
        if self.max_bytes < ByteSize::mib(64) {
            problems.add(path.key("max_bytes"), format!("must be at least 64 MiB, is {}", self.max_bytes));
        }
    }

    /// Bytes of one pipeline's letters whose sinks are not past them yet.
    pub fn share_of(&self, pipelines: usize) -> u64 {
        self.max_bytes.0 / 2 / pipelines.max(1) as u64
    }

    /// The stream that keeps them: small, it may use its reserve on a full disk, and takes letters of
    /// any size.
    pub fn stream(&self) -> stream::Config {
        let retention = Retention { max_age: self.max_age, max_bytes: self.max_bytes };
        stream::Config { retention, ..stream::Config::dead_letters() }
    }
}
