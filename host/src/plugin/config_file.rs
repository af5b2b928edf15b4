//! The config file beside a plugin, with the line of each key.

use serde_json::Value;

use crate::problems::{KeyPath, Place, Places, Problem};
use crate::yaml;

/// A plugin's config as it was read.
#[derive(Clone, Debug)]
pub(super) struct ConfigFile {
    pub value: Value,
    pub places: Places,
}

impl ConfigFile {
    /// Errors name the file and the line.
    pub fn parse(file: &str, text: &str) -> Result<Self, String> {
        let document = yaml::parse(text).map_err(|error| format!("{file}:{}: {error}", error.line))?;
        let place = |line| Place { file: file.to_owned(), line };
        let lines = document.lines.into_iter().map(|(path, line)| (path, place(Some(line))));
        let places = Places::new(lines.chain([(KeyPath::root(), place(None))]));
        match document.problems.first() {
            Some(problem) => Err(places.locate(problem)),
            None => Ok(Self { value: document.value, places }),
        }
    }
}

/// What a plugin says of its config, with the place of each key: the config begins at `base`.
pub(super) fn located(problems: &[Problem], places: &Places, base: &KeyPath) -> Vec<String> {
    let whole = |problem: &Problem| Problem { path: base.join(&problem.path), ..problem.clone() };
    problems.iter().map(|problem| places.locate(&whole(problem))).collect()
}
