//! The configuration: one YAML file, a folder of YAML files, or the embedded default.
//!
//! A configuration is read in these stages. The files are read into one value with the line of each key
//! (`files`, `crate::yaml`), checked against the JSON Schema of the types below (`check`), completed
//! with defaults that depend on other keys (`complete`), deserialized, and validated by each part and as
//! a whole (`validate`). All problems are reported at once, each with file, line and key path. Nothing
//! here opens a port or touches the data folder.

mod check;
mod complete;
mod files;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
pub mod reference;
mod shell;
mod suggest;
mod validate;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::batch::Offset;
use crate::hints::Hints;
use crate::listeners::{http, mqtt};
use crate::problems::{KeyPath, Places, Problem, Problems};
use crate::stream::log::ReadOnly;
use crate::topic::Namespace;
use crate::{access, admin, devices, pipeline, plugin, sinks, stream, threads};

/// The whole configuration of a host. Each part owns its own section. A section that is left out has
/// defaults (see `complete`).
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Folder of all durable data: streams, dead letters, caches. It is created if missing, and used by
    /// one host at a time.
    pub data_dir: PathBuf,
    /// The MQTT listener.
    pub mqtt: mqtt::Config,
    /// The HTTP listener. It is off unless `http.listeners` names an address.
    pub http: http::Config,
    /// Names of the levels of a topic, one of which is `{device_id}`. A message whose topic does not
    /// match is accepted too; its device is then the client that published it.
    pub topics: String,
    /// Streams by name. A message goes to the first stream with a matching topic filter, otherwise to
    /// the one stream without `topics`. If unset: one stream `telemetry`, which takes every topic.
    pub streams: BTreeMap<String, stream::Config>,
    /// The plugins folder and the limits of every plugin.
    pub plugins: plugin::Config,
    /// Pipelines by name. If unset: one pipeline for each stream, with the stream's name, that runs the
    /// plugins of the folder.
    pub pipelines: BTreeMap<String, pipeline::Config>,
    /// Sinks by name. If unset: one sink `telemetry`, which writes to the table `telemetry` in the
    /// SQLite file `telemetry.db` in the data folder.
    pub sinks: BTreeMap<String, sinks::Config>,
    /// Metadata of devices, such as location, site and model.
    pub devices: devices::Config,
    /// How long rejected messages are kept.
    pub dead_letters: pipeline::DeadLettersConfig,
    /// Health, metrics and status over HTTP.
    pub admin: admin::Config,
    /// What the host's threads ask of the kernel.
    pub runtime: threads::Config,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: "data".into(),
            mqtt: mqtt::Config::default(),
            http: http::Config::default(),
            topics: Namespace::DEFAULT_PATTERN.to_owned(),
            streams: BTreeMap::new(),
            plugins: plugin::Config::default(),
            pipelines: BTreeMap::new(),
            sinks: BTreeMap::new(),
            devices: devices::Config::default(),
            dead_letters: pipeline::DeadLettersConfig::default(),
            admin: admin::Config::default(),
            runtime: threads::Config::default(),
        }
    }
}

impl Config {
    /// Returns the name of the stream that takes all topics that no other stream takes. A validated
    /// config has exactly one.
    pub fn default_stream(&self) -> &str {
        let written = self.written_streams();
        let takes_rest =
            |name: &str, stream: &stream::Config| stream.topics.is_empty() && !written.contains(name);
        let rest = self.streams.iter().find(|(name, stream)| takes_rest(name, stream));
        rest.map_or(complete::REST_STREAM, |(name, _)| name)
    }

    /// Returns the names of the streams that pipelines write to.
    pub fn written_streams(&self) -> BTreeSet<&str> {
        let pipelines = self.pipelines.iter();
        pipelines.flat_map(|(name, pipeline)| self.written_by(name, pipeline)).collect()
    }

    /// Names of the streams that a pipeline writes to: where a sink has the name too, the sink is meant.
    pub fn written_by<'c>(
        &'c self,
        name: &str,
        pipeline: &'c pipeline::Config,
    ) -> impl Iterator<Item = &'c str> {
        let is_stream = |name: &&str| !self.sinks.contains_key(*name) && self.streams.contains_key(*name);
        let out = self.out_stream(name, pipeline).and_then(|out| self.streams.get_key_value(&out));
        let out = out.map(|(out, _)| out.as_str());
        pipeline.sinks().into_iter().filter(is_stream).chain(out)
    }

    /// Name of the stream between the steps of a pipeline and its sinks: `PIPELINE.out`. A pipeline with one
    /// sink has none.
    pub fn out_stream(&self, name: &str, pipeline: &pipeline::Config) -> Option<String> {
        (pipeline.sinks().len() > 1).then(|| pipeline::out_stream_of(name))
    }

    /// Adds the streams of pipelines that the config does not configure: each as the stream that the pipeline
    /// reads.
    fn add_out_streams(&mut self) {
        loop {
            let outs = self.pipelines.iter().filter_map(|(name, pipeline)| {
                let from = self.streams.get(&pipeline.from)?;
                let own = stream::Config { topics: Vec::new(), topic_prefix: None, ..from.clone() };
                Some((self.out_stream(name, pipeline)?, own))
            });
            let new: Vec<_> = outs.filter(|(name, _)| !self.streams.contains_key(name)).collect();
            // Another pipeline may read the stream that a pipeline writes, so this is repeated until none is new.
            if new.is_empty() {
                return;
            }
            self.streams.extend(new);
        }
    }

    /// Returns whether devices write to a stream. A stream that pipelines write to takes messages of
    /// devices only if it has `topics`.
    pub fn takes_messages(&self, stream: &str) -> bool {
        let topics = self.streams.get(stream).is_some_and(|stream| !stream.topics.is_empty());
        topics || !self.written_streams().contains(stream)
    }

    /// Returns whether MQTT clients receive messages of a stream.
    pub fn has_subscribers(&self, stream: &str) -> bool {
        let prefix = self.streams.get(stream).and_then(|stream| stream.topic_prefix.as_ref());
        prefix.is_some() || self.takes_messages(stream)
    }

    /// Returns each combination of a pipeline and a sink to which its routes lead.
    pub fn claims(&self) -> BTreeSet<sinks::Name> {
        let of = |(pipeline, config): (&String, &pipeline::Config)| {
            let sinks =
                config.sinks().into_iter().map(str::to_owned).chain(self.out_stream(pipeline, config));
            sinks.map(|sink| (pipeline.clone(), sink)).collect::<Vec<_>>()
        };
        self.pipelines.iter().flat_map(of).collect()
    }

    /// Returns the name of the stream that a command uses if the user names none: the only stream that
    /// pipelines read, otherwise the default stream.
    pub fn main_stream(&self) -> &str {
        let written = self.written_streams();
        let read = self.pipelines.values().map(|pipeline| pipeline.from.as_str());
        let mut read: Vec<&str> = read.filter(|stream| !written.contains(stream)).collect();
        read.dedup();
        match read.as_slice() {
            [only] => only,
            _ => self.default_stream(),
        }
    }

    /// Folder of compiled plugins and of the record of which plugins ran.
    pub fn plugin_cache_dir(&self) -> PathBuf {
        self.data_dir.join("plugin-cache")
    }

    /// Folder of the plugin files of recorded versions of steps.
    pub fn plugin_files_dir(&self) -> PathBuf {
        self.data_dir.join("plugin-files")
    }

    /// Folder of a stream, or of the dead letters.
    pub fn stream_dir(&self, name: &str) -> PathBuf {
        match name {
            DEAD_LETTERS => self.data_dir.join(DEAD_LETTERS),
            name => self.data_dir.join("streams").join(name),
        }
    }

    /// Folder of the broker's own stream.
    pub fn broker_dir(&self) -> PathBuf {
        self.data_dir.join("broker")
    }
}

pub use validate::DEAD_LETTERS;

/// Where a config came from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Source {
    /// Path that the user gave. `None` stands for the embedded default.
    pub path: Option<PathBuf>,
    /// Files that were read, in the order of their names.
    pub files: Vec<PathBuf>,
    /// File and line of each key.
    pub places: Places,
}

impl Source {
    /// Returns a factory for commands that concern the host with this configuration.
    pub fn hints(&self) -> Hints {
        Hints::of(self.path.as_deref())
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.path {
            Some(path) => write!(f, "{}", path.display()),
            None => f.write_str("embedded default"),
        }
    }
}

/// A configuration without problems.
#[derive(Clone, Debug)]
pub struct Loaded {
    pub config: Config,
    pub source: Source,
    /// Settings that are valid but probably not intended: `sinks.alerts: no route leads here`.
    pub warnings: Vec<String>,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read {}: {error}", path.display())]
    Read { path: PathBuf, error: String },
    /// All problems, in the order of files and lines.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Invalid(Vec<Located>),
}

/// A problem and its place, shown as `headworks.yaml:14: sinks.warehouse.batch.rows_max: must be at
/// least 1, is 0`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Located {
    pub file: String,
    /// Line, from 1. `None` if the problem concerns the whole file.
    pub line: Option<usize>,
    /// Path of the key. Empty if the problem concerns no key.
    pub key: String,
    pub message: String,
}

impl fmt::Display for Located {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        if !self.key.is_empty() {
            write!(f, ": {}", self.key)?;
        }
        write!(f, ": {}", self.message)
    }
}

/// Reads a file, a folder of files, or, with `None`, the embedded default.
pub fn load(path: Option<&Path>) -> Result<Loaded, Error> {
    let files = read(path)?;
    parse(&files).into_loaded(path, &files)
}

/// Reads a configuration as [`load`] does, and also reads the files it names: certificates, passwords,
/// keys, devices, plugins.
pub fn load_with_files(path: Option<&Path>) -> Result<Loaded, Error> {
    let files = read(path)?;
    let mut parsed = parse(&files);
    let mut problems = Problems::default();
    let (root, config) = (KeyPath::root(), &parsed.config);
    config.mqtt.look(&root.key("mqtt"), &mut problems);
    config.http.look(&root.key("http"), &mut problems);
    config.devices.look(&root.key("devices"), &mut problems);
    config.admin.look(&root.key("admin"), &mut problems);
    for (name, sink) in &config.sinks {
        sink.look(&root.key("sinks").key(name), &mut problems);
    }
    look_at_streams(config, &root.key("streams"), &mut problems);
    parsed.add(problems.into_vec());
    let mut loaded = parsed.into_loaded(path, &files)?;
    loaded.warnings.extend(loaded.config.mqtt.warnings());
    let takes_secrets = loaded.config.mqtt.access.as_ref().is_some_and(access::Config::takes_secrets);
    loaded.warnings.extend(loaded.config.http.warnings(takes_secrets));
    loaded.warnings.extend(missing_plugins(&loaded.config));
    loaded.warnings.extend(missing_folder(&loaded.config, &files));
    try_plugins(&mut loaded, &files)?;
    Ok(loaded)
}

/// Adds the problems for which a host with this configuration would refuse its existing streams. A
/// stream that cannot be read is left to the host to report, since this process may run as another user.
fn look_at_streams(config: &Config, streams: &KeyPath, problems: &mut Problems) {
    for (name, stream) in &config.streams {
        let made = ReadOnly::open(&config.stream_dir(name), Offset(0)).partitions();
        if let Ok(Some(made)) = made
            && made != stream.partitions
        {
            problems.add(
                streams.key(name).key("partitions"),
                format!(
                    "the stream was made with {made}, is {}: set {made}, or use another stream name",
                    stream.partitions
                ),
            );
        }
    }
}

/// Returns a warning if the config names a plugins folder that does not exist. The folder may still be
/// created.
fn missing_folder(config: &Config, files: &files::Files) -> Option<String> {
    let is_named = files.value.pointer("/plugins/dir").is_some();
    let of_folder: Vec<&str> = config
        .pipelines
        .iter()
        .filter(|(_, pipeline)| pipeline.steps.is_none())
        .map(|(name, _)| name.as_str())
        .collect();
    if !is_named || of_folder.is_empty() || config.plugins.dir.exists() {
        return None;
    }
    Some(format!(
        "plugins.dir: there is no folder {}: until there is one, messages pass without a step through {}",
        config.plugins.dir.display(),
        of_folder.join(", ")
    ))
}

/// Starts the plugin of each step with its config, and adds a warning for each unused file in the
/// folder.
fn try_plugins(loaded: &mut Loaded, files: &files::Files) -> Result<(), Error> {
    let config = &loaded.config;
    let check = plugin::Check {
        config: &config.plugins,
        cache_dir: &config.plugin_cache_dir(),
        devices: Arc::new(devices::Devices::load(&config.devices).unwrap_or_default()),
        namespace: Arc::new(Namespace::parse(&config.topics).unwrap_or_default()),
    };
    let pipelines = config.pipelines.iter().map(|(name, pipeline)| (&**name, pipeline.steps.as_deref()));
    let found = match check.run(pipelines) {
        Ok(found) => found,
        Err(error) => {
            let problem = Problem { path: KeyPath::root().key("plugins"), message: error.to_string() };
            return Err(Error::Invalid(files.locate(vec![problem])));
        }
    };
    let elsewhere = found.elsewhere.into_iter().map(|(place, path, message)| Located {
        file: place.file,
        line: place.line,
        key: path.as_str().to_owned(),
        message,
    });
    let problems: Vec<_> = files.locate(found.problems).into_iter().chain(elsewhere).collect();
    loaded.warnings.extend(found.warnings);
    if problems.is_empty() { Ok(()) } else { Err(Error::Invalid(problems)) }
}

/// Returns a warning for each step whose file is not in the folder. The file may still be added.
fn missing_plugins(config: &Config) -> Vec<String> {
    let folder = &config.plugins.dir;
    let listed = match plugin::survey(folder, &config.plugin_cache_dir()) {
        Ok(listed) => listed,
        Err(error) => return vec![format!("{error}: until it can be read nothing goes through its plugins")],
    };
    let there = || {
        listed.iter().filter(|listed| listed.state == plugin::FileState::There).map(|listed| &*listed.name)
    };
    let mut missing = Vec::new();
    for (name, pipeline) in &config.pipelines {
        for (at, step) in pipeline.steps.iter().flatten().enumerate() {
            let wanted = &*step.plugin;
            if there().any(|there| there == wanted) {
                continue;
            }
            let meant = suggest::closest(wanted, there()).map(|meant| format!(", did you mean `{meant}`?"));
            missing.push(format!(
                "pipelines.{name}.steps[{at}].plugin: no file {wanted}.wasm in {}, until there is one nothing goes \
                 through{}",
                folder.display(),
                meant.unwrap_or_default()
            ));
        }
    }
    missing
}

fn read(path: Option<&Path>) -> Result<files::Files, Error> {
    path.map_or_else(|| Ok(files::Files::default()), files::read)
}

/// Returns the JSON Schema of the configuration, for editors and for `check`.
pub fn schema() -> Value {
    schema_of(schemars::schema_for!(Config))
}

/// A configuration as far as it could be read, with its problems.
#[derive(Debug)]
struct Parsed {
    config: Config,
    warnings: Vec<String>,
    problems: Vec<Problem>,
    /// Keys whose values were replaced because a problem was reported for them.
    repaired: Vec<KeyPath>,
}

fn parse(files: &files::Files) -> Parsed {
    let schema = schema();
    let checked = check::check(&schema, &files.value);
    let mut found: Vec<Problem> = files.problems.clone();
    found.extend(checked.problems);

    let mut value = checked.value;
    let mut problems = Problems::default();
    shell::check(&value, &mut problems);
    complete::complete(&mut value, &mut problems);
    found.extend(std::mem::take(&mut problems).into_vec());
    let mut warnings = files.warnings.clone();
    let config = match serde_path_to_error::deserialize::<_, Config>(&value) {
        Ok(mut config) => {
            config.add_out_streams();
            validate::validate(&config, &mut problems);
            warnings.extend(validate::warnings(&config));
            config
        }
        Err(error) => {
            let path = validate::key_path(&error.path().to_string());
            problems.add(path, error.inner().to_string());
            Config::default()
        }
    };
    let mut parsed = Parsed { config, warnings, problems: found, repaired: checked.repaired };
    parsed.add(problems.into_vec());
    parsed
}

impl Parsed {
    /// Adds problems, except those below a key that was already reported.
    fn add(&mut self, problems: Vec<Problem>) {
        let is_said = |problem: &Problem| {
            self.repaired.iter().any(|repaired| files::is_within(&problem.path, repaired))
                || self.problems.iter().any(|known| known.path == problem.path)
        };
        let fresh: Vec<Problem> = problems.into_iter().filter(|problem| !is_said(problem)).collect();
        self.problems.extend(fresh);
    }

    fn into_loaded(self, path: Option<&Path>, files: &files::Files) -> Result<Loaded, Error> {
        if !self.problems.is_empty() {
            return Err(Error::Invalid(files.locate(self.problems)));
        }
        let source = Source { path: path.map(Path::to_owned), files: files.names(), places: files.places() };
        Ok(Loaded { config: self.config, source, warnings: self.warnings })
    }
}

/// Converts a schema as schemars creates it. Options behind a tag are merged: the tag and the keys of
/// its struct become one object, so that the struct's `additionalProperties: false` does not refuse the
/// tag.
fn schema_of(schema: schemars::Schema) -> Value {
    let mut root = schema.to_value();
    let defs = root.get("$defs").cloned().unwrap_or_default();
    inline_tagged(&mut root, &defs);
    root
}

fn inline_tagged(schema: &mut Value, defs: &Value) {
    match schema {
        Value::Array(items) => items.iter_mut().for_each(|item| inline_tagged(item, defs)),
        Value::Object(keys) => {
            keys.values_mut().for_each(|value| inline_tagged(value, defs));
            let target =
                keys.get("$ref").and_then(Value::as_str).and_then(|target| target.rsplit('/').next());
            let Some(Value::Object(mut target)) =
                target.filter(|_| keys.contains_key("properties")).and_then(|name| defs.get(name)).cloned()
            else {
                return;
            };
            keys.remove("$ref");
            for (key, value) in std::mem::take(keys) {
                match (target.get_mut(&key), value) {
                    (Some(Value::Object(into)), Value::Object(more)) => into.extend(more),
                    (Some(Value::Array(into)), Value::Array(more)) => into.extend(more),
                    (_, value) => {
                        target.insert(key, value);
                    }
                }
            }
            *keys = target;
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests;
