//! A password or token of a sink, which a config names and does not have.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::files;
use crate::problems::{KeyPath, Problems};

/// Where the password is; it is never kept in the config itself.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Password {
    /// Name of an environment variable.
    Env(String),
    /// A file; a line end after the password is ignored.
    File(PathBuf),
}

impl Password {
    /// Reads it now; `what` it is, for the error, which never holds it.
    pub fn read(&self, what: &str) -> Result<String, String> {
        match self {
            Self::Env(name) => std::env::var(name)
                .map_err(|_| format!("the environment variable {name} for the {what} is not set")),
            Self::File(path) => files::read_to_string(path)
                .map(|text| text.trim_end_matches(['\r', '\n']).to_owned())
                .map_err(|error| format!("cannot read the {what} from {}: {error}", path.display())),
        }
    }

    pub fn validate(&self, path: &KeyPath, problems: &mut Problems) {
        if matches!(self, Self::Env(name) if name.is_empty() || name.contains(['=', '\0'])) {
            problems.add(path.key("env"), "must be the name of an environment variable");
        }
    }

    /// Tries to read it.
    pub fn look(&self, what: &str, path: &KeyPath, problems: &mut Problems) {
        let key = match self {
            Self::Env(_) => "env",
            Self::File(_) => "file",
        };
        if let Err(reason) = self.read(what) {
            problems.add(path.key(key), reason);
        }
    }
}
