//! What is wrong with a configuration: every problem at once, each with the
//! path of its key. The `config` module turns a path into `file:line`.

use std::collections::BTreeMap;
use std::fmt;

/// Path of a key: `sinks.warehouse.batch.rows_max`, `pipelines.telemetry.steps[0].plugin`.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct KeyPath(String);

impl KeyPath {
    pub fn root() -> Self {
        Self::default()
    }

    pub fn key(&self, key: &str) -> Self {
        self.clone().into_key(key)
    }

    pub fn index(&self, index: usize) -> Self {
        self.clone().into_index(index)
    }

    /// As [`Self::key`], without a copy of what is there: for paths of many parts.
    pub fn into_key(mut self, key: &str) -> Self {
        if !self.0.is_empty() {
            self.0.push('.');
        }
        self.0.push_str(key);
        self
    }

    /// As [`Self::index`], without a copy of what is there.
    pub fn into_index(mut self, index: usize) -> Self {
        self.0.push_str(&format!("[{index}]"));
        self
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `inner` below this path.
    pub fn join(&self, inner: &Self) -> Self {
        if self.0.is_empty() || inner.0.is_empty() || inner.0.starts_with('[') {
            Self(format!("{}{}", self.0, inner.0))
        } else {
            self.key(&inner.0)
        }
    }

    /// The path of the key or list around it; the root has none.
    pub fn parent(&self) -> Option<Self> {
        let end = self.0.rfind(['.', '[']).unwrap_or(0);
        (!self.0.is_empty()).then(|| Self(self.0[..end].to_owned()))
    }
}

/// Where a key is: `headworks.yaml:14`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub file: String,
    /// From 1; none where the whole file is meant.
    pub line: Option<usize>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}", self.file),
            None => f.write_str(&self.file),
        }
    }
}

/// Where the keys of a config are, by path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Places(BTreeMap<KeyPath, Place>);

impl Places {
    pub fn new(places: impl IntoIterator<Item = (KeyPath, Place)>) -> Self {
        Self(places.into_iter().collect())
    }

    /// Of a key, else of the nearest key around it.
    pub fn of(&self, path: &KeyPath) -> Option<&Place> {
        let mut outer = Some(path.clone());
        while let Some(path) = outer {
            if let Some(place) = self.0.get(&path) {
                return Some(place);
            }
            outer = path.parent();
        }
        None
    }

    /// A problem with its place: `headworks.yaml:14: sinks.a: must be set`.
    pub fn locate(&self, problem: &Problem) -> String {
        let place = self.of(&problem.path).map(ToString::to_string);
        let path = Some(problem.path.as_str().to_owned()).filter(|path| !path.is_empty());
        [place, path, Some(problem.message.clone())].into_iter().flatten().collect::<Vec<_>>().join(": ")
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub path: KeyPath,
    /// Says what is wrong and what is right: `must be at least 1024, is 10`.
    pub message: String,
}

/// Returns the problems of a step's config as one text; a problem of the whole step has no path.
pub fn step_problems(problems: &[Problem]) -> String {
    let line = |p: &Problem| match p.path.as_str() {
        "" => p.message.clone(),
        path => format!("config.{path}: {}", p.message),
    };
    problems.iter().map(line).collect::<Vec<_>>().join("; ")
}

/// Collects problems; a part's `validate` adds to it and never stops at the first.
#[derive(Clone, Debug, Default)]
pub struct Problems(Vec<Problem>);

impl Problems {
    pub fn add(&mut self, path: KeyPath, message: impl Into<String>) {
        self.0.push(Problem { path, message: message.into() });
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn into_vec(self) -> Vec<Problem> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_of_a_whole_step_is_told_without_a_path() {
        let problem = |path, message: &str| Problem { path, message: message.to_owned() };
        let root = KeyPath::root();
        let problems = [problem(root.clone(), "trapped"), problem(root.key("a").index(1), "must be set")];
        assert_eq!(step_problems(&problems), "trapped; config.a[1]: must be set");
    }

    #[test]
    fn a_problem_has_the_place_of_the_nearest_key_around_it() {
        let root = KeyPath::root();
        let config = root.key("steps").index(0).key("config");
        let places = Places::new([(config.clone(), Place { file: "hw.yaml".to_owned(), line: Some(7) })]);
        let path = config.join(&root.key("rules").index(2).key("max"));
        let problem = Problem { path, message: "too big".to_owned() };
        assert_eq!(places.locate(&problem), "hw.yaml:7: steps[0].config.rules[2].max: too big");
        assert_eq!(config.join(&root.index(1)).as_str(), "steps[0].config[1]");
        assert_eq!(config.join(&root), config);
        assert_eq!(Places::default().locate(&Problem { path: root, ..problem }), "too big");
    }
}
