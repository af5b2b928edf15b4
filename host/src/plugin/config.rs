//! Configuration of the plugins folder and of a step.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::problems::{KeyPath, Problems};
use crate::step::ROUTES_STEP;
use crate::units::{ByteSize, Period};

/// The plugins folder and the limits of every plugin in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Folder that is watched for `.wasm` files.
    pub dir: PathBuf,
    /// How often the folder is scanned, in addition to the system's change events, which some file
    /// systems do not send.
    pub poll: Period,
    /// A file that is written in place is loaded when its size and time have not changed for this long.
    pub settle: Period,
    /// CPU seconds that compiling one plugin may take.
    pub compile_cpu_s: u64,
    /// Address space that compiling one plugin may take.
    pub compile_memory: ByteSize,
    /// Limits of a step. A step's own `limits` replace them.
    pub limits: Limits,
    /// Configuration by plugin name, for plugins that have no file `NAME.yaml` beside them.
    pub config: BTreeMap<String, serde_json::Value>,
}

/// What one call of a plugin may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// CPU time of one call for a batch. Elapsed time is limited to ten times as much.
    pub cpu_ms: u64,
    /// Memory of one instance.
    pub memory: ByteSize,
    /// Most messages that may be made of one message.
    pub outputs_per_message_max: u32,
    /// Size of a batch's output, as a multiple of its input.
    pub output_bytes_factor: u32,
    /// Size that a batch's output may have, even if its input is small.
    pub output_bytes_min: ByteSize,
    /// Former name of `pipelines.<name>.retries.max`, which replaces it. It is still read, as a further
    /// limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retries_max: Option<u32>,
}

/// One entry of a pipeline's `steps`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StepConfig {
    /// Name of the plugin: its file name without the leading number and without `.wasm`.
    pub plugin: String,
    /// Name of this step, if one plugin is used several times. If unset: the plugin's name.
    #[serde(default, rename = "as", skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Configuration of the plugin. If unset: the file beside the plugin, otherwise `plugins.config`.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub config: serde_json::Value,
    /// Limits of this step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
    /// What happens to messages that make the plugin fault, after three faults within a minute:
    /// `dead-letters` makes them dead letters, `pass` lets them pass the step unchanged, `hold` stops the
    /// pipeline until the plugin or its config changes.
    #[serde(default)]
    pub on_failure: OnFailure,
}

/// What happens after three faults of a step within a minute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnFailure {
    /// The messages that cause a fault become dead letters, as before.
    #[default]
    DeadLetters,
    /// The messages pass the step unchanged.
    Pass,
    /// The pipeline waits until the plugin or its config changes.
    Hold,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            dir: "./plugins".into(),
            poll: Period(Duration::from_secs(1)),
            settle: Period(Duration::from_millis(300)),
            compile_cpu_s: 30,
            compile_memory: ByteSize::gib(2),
            limits: Limits::default(),
            config: BTreeMap::new(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            cpu_ms: 100,
            memory: ByteSize::mib(64),
            outputs_per_message_max: 64,
            output_bytes_factor: 4,
            output_bytes_min: ByteSize::mib(1),
            retries_max: None,
        }
    }
}

impl Config {
    pub fn validate(&self, path: &KeyPath, problems: &mut Problems) {
        if self.dir.as_os_str().is_empty() {
            problems.add(path.key("dir"), "must name a folder, is empty");
        }
        at_least(problems, path.key("poll"), self.poll.0.as_millis() as u64, 50, "ms");
        if self.settle.0 > Duration::from_secs(60) {
            problems.add(path.key("settle"), format!("must be at most 1m, is {}", self.settle));
        }
        at_least(problems, path.key("compile_cpu_s"), self.compile_cpu_s, 1, "");
        at_least(problems, path.key("compile_memory"), self.compile_memory.0, 256 << 20, " bytes");
        self.limits.validate(&path.key("limits"), problems);
        for name in self.config.keys().filter(|name| !is_step_name(name)) {
            problems.add(path.key("config").key(name), NAME_RULE);
        }
    }
}

impl Limits {
    pub fn validate(&self, path: &KeyPath, problems: &mut Problems) {
        at_least(problems, path.key("cpu_ms"), self.cpu_ms, 10, "");
        at_least(problems, path.key("memory"), self.memory.0, 1 << 20, " bytes");
        if self.memory.0 > 4 << 30 {
            problems.add(path.key("memory"), format!("must be at most 4GiB, is {}", self.memory));
        }
        at_least(problems, path.key("outputs_per_message_max"), self.outputs_per_message_max.into(), 1, "");
        at_least(problems, path.key("output_bytes_factor"), self.output_bytes_factor.into(), 1, "");
        if self.output_bytes_min.0 > 1 << 30 {
            problems.add(
                path.key("output_bytes_min"),
                format!("must be at most 1GiB, is {}", self.output_bytes_min),
            );
        }
    }
}

impl StepConfig {
    pub fn new(plugin: &str) -> Self {
        Self {
            plugin: plugin.to_owned(),
            name: None,
            config: serde_json::Value::Null,
            limits: None,
            on_failure: OnFailure::default(),
        }
    }

    /// `as`, else the plugin's name.
    pub fn step_name(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.plugin)
    }

    pub fn validate(&self, path: &KeyPath, problems: &mut Problems) {
        for (key, name) in [("plugin", Some(&self.plugin)), ("as", self.name.as_ref())] {
            let Some(name) = name else { continue };
            if !is_step_name(name) {
                problems.add(path.key(key), NAME_RULE);
            } else if name == ROUTES_STEP {
                problems.add(path.key(key), ROUTES_RULE);
            }
        }
        if let Some(limits) = &self.limits {
            limits.validate(&path.key("limits"), problems);
        }
    }
}

const NAME_RULE: &str =
    "must be 1 to 64 of the characters a-z A-Z 0-9 . _ -, the first one a letter or digit";

/// Why no step has the name [`ROUTES_STEP`].
pub(super) const ROUTES_RULE: &str = "must not be routes: in dead letters and `--from-step` that name stands for the \
                                      pipeline's routes, behind all steps; rename the plugin's file";

/// Names are file names and metric labels.
pub(super) fn is_step_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        && name.as_bytes()[0].is_ascii_alphanumeric()
}

fn at_least(problems: &mut Problems, path: KeyPath, value: u64, least: u64, unit: &str) {
    if value < least {
        problems.add(path, format!("must be at least {least}{unit}, is {value}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_problem_is_found_at_once_with_its_path() {
        let config = Config {
            compile_cpu_s: 0,
            limits: Limits { cpu_ms: 0, memory: ByteSize(3), ..Limits::default() },
            ..Config::default()
        };
        let mut problems = Problems::default();
        config.validate(&KeyPath::root().key("plugins"), &mut problems);
        let paths: Vec<_> = problems.into_vec().into_iter().map(|p| p.path.as_str().to_owned()).collect();
        assert_eq!(paths, ["plugins.compile_cpu_s", "plugins.limits.cpu_ms", "plugins.limits.memory"]);
    }

    #[test]
    fn no_step_has_the_name_that_stands_for_the_routes() {
        for (step, key) in
            [(r#"{"plugin":"routes"}"#, "plugin"), (r#"{"plugin":"route","as":"routes"}"#, "as")]
        {
            let mut problems = Problems::default();
            serde_json::from_str::<StepConfig>(step).unwrap().validate(&KeyPath::root(), &mut problems);
            let problems = problems.into_vec();
            assert!(problems.len() == 1 && problems[0].path.as_str() == key, "{problems:?}");
            assert!(problems[0].message.contains("must not be routes"));
        }
    }

    #[test]
    fn the_default_is_valid_and_a_step_reads_as_written_in_a_config() {
        let mut problems = Problems::default();
        Config::default().validate(&KeyPath::root(), &mut problems);
        let step: StepConfig = serde_json::from_str(
            r#"{"plugin":"route","as":"alerts","config":{"max":3},"on_failure":"hold"}"#,
        )
        .unwrap();
        step.validate(&KeyPath::root(), &mut problems);
        assert!(problems.is_empty(), "{problems:?}");
        assert_eq!((step.step_name(), step.on_failure), ("alerts", OnFailure::Hold));
    }
}
