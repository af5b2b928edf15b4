//! Metadata of devices: a table from device id to JSON object, from the config or from a file, in which
//! plugins look up devices (`devices.get`, `devices.lookup`). A changed file is read while the host
//! runs. If it cannot be read, the table stays as it is.

use std::collections::{BTreeMap, HashMap};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::files;
use crate::hints::Hint;
use crate::problems::{KeyPath, Problems};
use crate::telemetry::Failures;
use crate::topic::DEVICE_ID_BYTES_MAX;

/// Largest file that is read.
const FILE_BYTES_MAX: u64 = 256 << 20;
/// Interval between two checks of the file. A changed file is read when it has not changed since the
/// previous check, because it may still be being written.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Metadata of devices, in the config, in a file, or in both. For a device in both, the config applies.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// YAML or JSON file with an object that maps each device id to an object. It is read again when it
    /// changes; if it cannot be read, the old contents stay in use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Maps each device id to an object: `sensor-4a3b: { location: "hall 2", model: T100 }`.
    pub table: BTreeMap<String, Value>,
}

/// The table as it is now.
#[derive(Debug, Default)]
pub struct Devices(RwLock<Arc<Table>>);

/// Device id to the JSON text of its object.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Table(HashMap<Box<str>, Box<str>>);

/// What tells one state of a file from another: file number, bytes, and the times of
/// the last change of its bytes and of itself. `None`: it is not there.
type Stamp = Option<(u64, u64, (i64, i64), (i64, i64))>;

/// Looks whether the file has changed.
struct Watch {
    config: Config,
    /// As it was at the last look.
    seen: Stamp,
    /// As it was when it was last read.
    read: Option<Stamp>,
}

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
        if let Err(error) = Table::load(self) {
            problems.add(path.key("file"), error.to_string());
        }
    }
}

impl Devices {
    pub fn load(config: &Config) -> Result<Self, Error> {
        Ok(Self(RwLock::new(Arc::new(Table::load(config)?))))
    }

    pub fn table(&self) -> Arc<Table> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes what the file says whenever it changes, for as long as it is polled.
    pub async fn follow(self: Arc<Self>, config: Config, failures: Failures) {
        let Some(file) = config.file.clone() else { return };
        let file = file.as_path();
        let mut watch = Watch { config, seen: None, read: None };
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let (devices, looking) = (Arc::clone(&self), failures.look_at(file));
            let looked = tokio::task::spawn_blocking(move || (devices.look(&mut watch), watch)).await;
            drop(looking);
            // The runtime ends.
            let Ok((taken, same)) = looked else { return };
            watch = same;
            match taken {
                Ok(None) => {}
                Ok(Some(taken)) => {
                    failures.reloaded(file);
                    if let Some(devices) = taken {
                        tracing::info!(devices, "the table of devices has changed");
                    }
                }
                Err(error) => {
                    let reason = error.to_string();
                    failures.reload_refused(file, &reason);
                    let reason = format!("{reason}; what was read before stays");
                    failures.report("devices.file", 1, &reason, &failures.hint(Hint::Validate));
                }
            }
        }
    }

    /// Reads the file where it has changed, or could not be read before: `Some` where it could be read, with
    /// the number of devices where another table was taken.
    fn look(&self, watch: &mut Watch) -> Result<Option<Option<usize>>, Error> {
        let stamp = watch.config.file.as_deref().and_then(stamp);
        let has_settled = std::mem::replace(&mut watch.seen, stamp) == stamp;
        if !has_settled || watch.read == Some(stamp) {
            return Ok(None);
        }
        let table = Table::load(&watch.config);
        // What the file says stays wrong until it changes; a failed read may pass.
        if !matches!(table, Err(Error::Read { .. })) {
            watch.read = Some(stamp);
        }
        let table = table?;
        if table == *self.table() {
            return Ok(Some(None));
        }
        let devices = table.0.len();
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(table);
        Ok(Some(Some(devices)))
    }
}

fn stamp(path: &Path) -> Stamp {
    let found = std::fs::metadata(path).ok()?;
    let changed = ((found.mtime(), found.mtime_nsec()), (found.ctime(), found.ctime_nsec()));
    Some((found.ino(), found.len(), changed.0, changed.1))
}

impl Table {
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

    fn read(path: &Path) -> Result<Self, Error> {
        let content = |reason: String| Error::Content { path: path.to_owned(), reason };
        let io = |error| Error::Read { path: path.to_owned(), error };
        if std::fs::metadata(path).map_err(io)?.len() > FILE_BYTES_MAX {
            return Err(content(format!("must be at most {} MiB", FILE_BYTES_MAX >> 20)));
        }
        let text = files::read_to_string(path).map_err(io)?;
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
        let devices = Table::load(&Config { file: Some(file), table }).unwrap();
        assert_eq!(devices.get("a"), Some(r#"{"site":"one"}"#));
        assert_eq!(devices.get("b"), Some(r#"{"site":"three"}"#));
        assert_eq!(devices.get("c"), None);
    }

    #[test]
    fn a_bad_file_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("devices.json");
        std::fs::write(&file, r#"{"a": 3}"#).unwrap();
        let error = Table::load(&Config { file: Some(file), ..Config::default() }).unwrap_err().to_string();
        assert!(error.contains("devices.json") && error.contains("a: must be an object"), "{error}");
    }
    #[test]
    fn a_changed_file_is_taken_once_it_is_whole_and_a_broken_one_never() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("devices.yaml");
        let write = |text: &str| {
            let new = folder.path().join("new");
            std::fs::write(&new, text).unwrap();
            std::fs::rename(&new, &file).unwrap();
        };
        write("a: { site: one }\n");
        let config = Config { file: Some(file.clone()), ..Config::default() };
        let devices = Devices::load(&config).unwrap();
        let mut watch = Watch { config, seen: None, read: None };
        let site = |devices: &Devices, id: &str| devices.table().get(id).map(str::to_owned);
        let mut look = || devices.look(&mut watch);
        assert!(matches!((look(), look(), look()), (Ok(None), Ok(Some(None)), Ok(None))));
        write("a: { site: one }\nnew: { site: two }\n");
        assert!(matches!(look(), Ok(None)), "it may not be whole yet");
        assert!(matches!(look(), Ok(Some(Some(2)))));
        assert_eq!(site(&devices, "new").as_deref(), Some(r#"{"site":"two"}"#));
        for broken in ["", "a: [", "a: 3\n", "- a\n"] {
            write(broken);
            let _ = look();
            assert!(look().is_err(), "{broken:?}");
            assert!(matches!(look(), Ok(None)), "said once");
        }
        // Once as if the disk had refused to read a good file.
        std::fs::remove_file(&file).unwrap();
        std::fs::create_dir(&file).unwrap();
        let _ = look();
        for _ in 0..2 {
            assert!(matches!(look(), Err(Error::Read { .. })), "it is tried again");
        }
        std::fs::remove_dir(&file).unwrap();
        let _ = look();
        assert!(look().is_err());
        assert_eq!(site(&devices, "new").as_deref(), Some(r#"{"site":"two"}"#));
    }
}
