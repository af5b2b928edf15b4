//! What is known of a device: a table of id to JSON object, from the config or
//! from a file, that plugins look up (`devices.get`, `devices.lookup`).

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::problems::{KeyPath, Problems};
use crate::topic::DEVICE_ID_BYTES_MAX;

/// Largest file that is read.
const FILE_BYTES_MAX: u64 = 256 << 20;

/// `devices:` the table, in the config, in a file, or both; the config wins.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// YAML or JSON file: an object of device id to object.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Device id to object: `sensor-4a3b: { location: "hall 2", model: T100 }`.
    pub table: BTreeMap<String, Value>,
}

/// The table as it is looked up.
#[derive(Clone, Debug, Default)]
pub struct Devices(HashMap<Box<str>, Box<str>>);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read {path}: {error}")]
    Read { path: PathBuf, error: std::io::Error },
    #[error("{path}: {reason}")]
    Content { path: PathBuf, reason: String },
}

impl Config {
    pub fn validate(&self, path: &KeyPath, problems: &mut Problems) {
        for (id, value) in &self.table {
            if let Err(reason) = check(id, value) {
                problems.add(path.key("table").key(id), reason);
            }
        }
    }

    /// Tries the file.
    pub fn look(&self, path: &KeyPath, problems: &mut Problems) {
        if let Err(error) = Devices::load(self) {
            problems.add(path.key("file"), error.to_string());
        }
    }
}

impl Devices {
    /// Reads the file, if there is one, and puts the config's entries over it.
    pub fn load(config: &Config) -> Result<Self, Error> {
        let mut devices = match &config.file {
            Some(path) => Self::read(path)?,
            None => Self::default(),
        };
        devices
            .0
            .extend(config.table.iter().map(|(id, value)| (id.as_str().into(), value.to_string().into())));
        Ok(devices)
    }

    /// JSON text of the object, `None` where the device is not known.
    pub fn get(&self, id: &str) -> Option<&str> {
        self.0.get(id).map(AsRef::as_ref)
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn read(path: &Path) -> Result<Self, Error> {
        let content = |reason: String| Error::Content { path: path.to_owned(), reason };
        let io = |error| Error::Read { path: path.to_owned(), error };
        if std::fs::metadata(path).map_err(io)?.len() > FILE_BYTES_MAX {
            return Err(content(format!("must be at most {} MiB", FILE_BYTES_MAX >> 20)));
        }
        let text = std::fs::read_to_string(path).map_err(io)?;
        let is_json = path.extension().is_some_and(|extension| extension == "json");
        let value = if is_json {
            serde_json::from_str(&text).map_err(|error| content(error.to_string()))?
        } else {
            crate::yaml::to_json(&text).map_err(content)?
        };
        let Value::Object(table) = value else {
            return Err(content("must be an object of device id to object".into()));
        };
        table
            .into_iter()
            .map(|(id, value)| match check(&id, &value) {
                Ok(()) => Ok((id.into(), value.to_string().into())),
                Err(reason) => Err(content(format!("{id}: {reason}"))),
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

fn check(id: &str, value: &Value) -> Result<(), String> {
    if id.is_empty() || id.len() > DEVICE_ID_BYTES_MAX {
        return Err(format!("a device id must have 1 to {DEVICE_ID_BYTES_MAX} bytes, has {}", id.len()));
    }
    if !value.is_object() {
        return Err("must be an object such as { location: hall 2 }".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_config_wins_over_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("devices.yaml");
        std::fs::write(&file, "a: { site: one }\nb: { site: two }\n").unwrap();
        let table = BTreeMap::from([("b".to_owned(), serde_json::json!({"site": "three"}))]);
        let devices = Devices::load(&Config { file: Some(file), table }).unwrap();
        assert_eq!(devices.get("a"), Some(r#"{"site":"one"}"#));
        assert_eq!(devices.get("b"), Some(r#"{"site":"three"}"#));
        assert_eq!(devices.get("c"), None);
    }

    #[test]
    fn a_bad_file_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("devices.json");
        std::fs::write(&file, r#"{"a": 3}"#).unwrap();
        let error = Devices::load(&Config { file: Some(file), ..Config::default() }).unwrap_err().to_string();
        assert!(error.contains("devices.json") && error.contains("a: must be an object"), "{error}");
    }
}
