//! The `dead_letters:` section: how long refused messages are kept.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::problems::{KeyPath, Problems};
use crate::stream::{self, Retention};
use crate::units::{ByteSize, Period};

/// Where refused messages wait for a person.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DeadLettersConfig {
    /// Letters older than this go, by an eighth of it later at most, and are listed no more; `null` keeps
    /// them until `max_bytes`.
    pub max_age: Option<Period>,
    /// The oldest go when all together would take more than this. Half of it is shared out among the pipelines, for letters whose sinks are not past them: a pipeline whose share is used up waits, the others do not.
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
