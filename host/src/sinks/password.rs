//! A password or token of a sink. The config names it, but does not contain it.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::files;
use crate::problems::{KeyPath, Problems};

/// Where the password is stored. It is never in the config itself.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Password {
    /// Name of an environment variable.
    Env(String),
    /// A file. A line end after the password is ignored.
    File(PathBuf),
}

impl Password {
    /// Reads the password now. `what` describes it for the error, which never contains it.
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

    /// Reads the password, and adds what is wrong with it.
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
