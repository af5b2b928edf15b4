//! Plugins: sandboxed WebAssembly components as steps of a pipeline.
//!
//! A file goes `folder` → `compile` (a child, under limits, in which `load` says
//! whether it is a plugin for this host) → `cache` → `program` (described) → `version`
//! (with a config; makes steps) → `catalog` (chains of steps, republished when
//! a file changes). A batch goes `version` → `arena` (index out, answer
//! checked) → `instance` (the call) under `engine`'s clock, with `host` as all
//! that the plugin can reach. No other module names wasmtime.

use std::path::PathBuf;

pub mod access;
mod answer;
mod arena;
mod bindings;
mod cache;
mod catalog;
mod check;
mod collected;
mod compile;
mod compile_child;
mod config;
mod config_file;
mod engine;
mod folder;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod gather;
mod host;
mod instance;
mod kept_files;
mod lines;
mod load;
mod program;
mod runner;
mod series;
mod starts;
#[cfg(test)]
mod test_plugins;
#[cfg(test)]
mod tests;
mod version;

pub use answer::{Fault, MADE_PAYLOAD_BYTES_MAX};
pub use cache::CacheError;
pub use catalog::{Folders, PluginState, PluginStatus, Plugins};
pub use check::{Check, Findings};
pub use compile::{CHILD_COMMAND, CompileError, Compiler};
pub use compile_child::compile_child_main;
pub use config::{Config, Limits, OnFailure, StepConfig};
pub use folder::{FileState, Listed, remove, survey};
pub use load::{Form, Kind, LoadError};
pub use program::{Description, Inspection};
pub use runner::{Runner, inspect};
pub use series::{PREFIX as METRIC_PREFIX, render as render_metrics};

use config::is_step_name;

use crate::telemetry::{Metric, MetricKind};

/// Why a plugin, or all of them, cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot start the plugin engine: {0}")]
    Engine(String),
    #[error("cannot read {path}: {error}")]
    Read { path: PathBuf, error: std::io::Error },
    #[error("{path}: a plugin has at most {} MiB", load::FILE_BYTES_MAX >> 20)]
    TooLarge { path: PathBuf },
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Compile(#[from] CompileError),
    #[error("is not tried again until its bytes or the limits change: {0}")]
    Killed(String),
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error("does not fit the plugin contract: {0}")]
    Contract(String),
    #[error("describe: {0}")]
    Describe(String),
    #[error("config: {0}")]
    Config(String),
    #[error("{}", instance::NO_STEP)]
    NoStep,
    #[error(
        "is a step, no access plugin: put it into the plugins folder, and name one that exports `access` here"
    )]
    NoAccess,
    #[error("no plugin `{name}` in {}: {}", dir.display(), there_is(known))]
    Unknown { name: String, dir: PathBuf, known: String },
}

fn there_is(known: &str) -> String {
    if known.is_empty() { "there is none".to_owned() } else { format!("there is {known}") }
}

impl Error {
    /// Whether the same file may load later, with nothing changed.
    fn is_passing(&self) -> bool {
        match self {
            Self::Read { .. } | Self::Cache(_) => true,
            Self::Compile(error) => !error.is_of_the_file(),
            _ => false,
        }
    }

    fn wasm(error: wasmtime::Error) -> Self {
        Self::Contract(format!("{error:#}"))
    }
}

pub const METRICS: &[Metric] = &[
    Metric {
        name: "headworks_step_messages_total",
        kind: MetricKind::Counter,
        help: "Messages of the step, by outcome: passed (one message that became several counts once), dropped, refused, and skipped, which is the part of passed on which the plugin failed (`on_failure: pass`).",
        labels: &["pipeline", "step", "outcome"],
    },
    Metric {
        name: "headworks_step_faults_total",
        kind: MetricKind::Counter,
        help: "Calls of the plugin that trapped, exceeded a limit or returned an invalid answer.",
        labels: &["pipeline", "step"],
    },
    Metric {
        name: "headworks_plugin_instances_total",
        kind: MetricKind::Counter,
        help: "Plugin instances that were started. An instance that faulted or exceeded its memory limit is replaced by a new one.",
        labels: &["pipeline", "step"],
    },
    Metric {
        name: "headworks_plugin_compiles_total",
        kind: MetricKind::Counter,
        help: "Plugins that were compiled. Plugins that were loaded from the cache are not counted.",
        labels: &[],
    },
    Metric {
        name: "headworks_access_plugin_calls_total",
        kind: MetricKind::Counter,
        help: "Calls of access plugins, by outcome: accepted, refused, passed (left to the next authenticator), asked (another round of authentication is needed), answered (questions that rules leave open), fault (the call trapped, exceeded a limit or returned an invalid answer, and the client or its request is refused).",
        labels: &["outcome"],
    },
    Metric {
        name: "headworks_plugin_log_lines_dropped_total",
        kind: MetricKind::Counter,
        help: "Log lines of plugins that were dropped because a step wrote more than 100 lines or 64 KiB in a second.",
        labels: &["pipeline", "step"],
    },
];
