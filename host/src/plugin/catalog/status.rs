//! What `plugin list` shows.

use serde::{Deserialize, Serialize};

use super::{Known, RefusedFile, Work, file_name};
use crate::hints::Hint;

/// A plugin as `plugin list` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PluginStatus {
    pub file: String,
    /// The step's name: the file's stem without its number.
    pub name: String,
    pub version: String,
    pub summary: String,
    /// SHA-256 of the file that runs.
    pub hash: String,
    pub state: PluginState,
    pub imports_granted: Vec<String>,
    pub topics: Vec<String>,
    /// Used, but hardly as it was meant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Whether a version of it runs, the newest or the last good one.
    #[serde(default)]
    pub runs: bool,
    /// Where it has failed: the file that is wrong, which is the plugin or its config beside it;
    /// `None` where the host's own config is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wrong_file: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "is", content = "reason")]
pub enum PluginState {
    Active,
    /// It waits to be looked into, or is being compiled; the version before runs, if there was one.
    Loading,
    /// The newest file or config is not used; the last good version runs, if there was one.
    Failed(String),
    /// Its file is gone, see the reason for what to do.
    Removed(String),
}

impl Work {
    pub fn status(&self) -> Vec<PluginStatus> {
        let mut list: Vec<_> = self.files.iter().map(|(name, known)| self.status_of(name, known)).collect();
        list.sort_by_key(|(order, status)| (*order, status.name.clone()));
        let refused = self.refused.iter().map(|RefusedFile { file, reason, .. }| PluginStatus {
            file: file.clone(),
            name: String::new(),
            version: String::new(),
            summary: String::new(),
            hash: String::new(),
            state: PluginState::Failed(reason.clone()),
            imports_granted: Vec::new(),
            topics: Vec::new(),
            note: None,
            runs: false,
            wrong_file: Some(file.clone()),
        });
        list.into_iter().map(|(_, status)| status).chain(refused).collect()
    }

    fn status_of(&self, name: &str, known: &Known) -> (u64, PluginStatus) {
        let built = || self.pipelines.iter().flat_map(|pipeline| pipeline.built_of(name));
        let not_started =
            built().find_map(|(pipeline, step, built)| Some((pipeline, step, built.not_started()?)));
        let reason = not_started.map(|(pipeline, step, why)| format!("{pipeline}/{step}: {}", why.reason));
        let state = match (known.missing, known.error.clone().or(reason)) {
            (true, _) => PluginState::Removed(self.missing_reason(name, known)),
            (false, _) if known.is_loading || known.stamp.is_none() => PluginState::Loading,
            (false, Some(reason)) => PluginState::Failed(reason),
            (false, None) => PluginState::Active,
        };
        let is_program_wrong = match &known.error {
            Some(_) => !known.is_config_wrong,
            None => not_started.is_some_and(|(.., why)| why.is_fault),
        };
        let wrong_file = match &state {
            PluginState::Failed(_) if is_program_wrong => Some(file_name(&known.path)),
            PluginState::Failed(_) => known.config.as_deref().map(file_name),
            _ => None,
        };
        let program = known.loaded.as_ref().map(|loaded| &loaded.program);
        let description = program.map(|program| program.description.clone()).unwrap_or_default();
        let status = PluginStatus {
            file: file_name(&known.path),
            name: name.to_owned(),
            version: description.version,
            summary: description.summary,
            hash: program.map(|program| program.sha256.clone()).unwrap_or_default(),
            state,
            imports_granted: program.map(|program| program.imports.clone()).unwrap_or_default(),
            topics: description.topics,
            note: known.note.clone(),
            runs: built().any(|(_, _, built)| built.runs()),
            wrong_file,
        };
        (known.order, status)
    }

    pub fn missing_reason(&self, name: &str, known: &Known) -> String {
        let remove = self.failures.hint(Hint::PluginRemove(name));
        format!(
            "{} was removed: put it back, or run `{remove}` to continue without it",
            file_name(&known.path)
        )
    }
}
