//! What is wrong with a configuration: every problem at once, each with the
//! path of its key. The `config` module turns a path into `file:line`.

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
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub path: KeyPath,
    /// Says what is wrong and what is right: `must be at least 1024, is 10`.
    pub message: String,
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
