//! Configuration of a SQLite sink.

use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::SqliteSink;
use crate::problems::{KeyPath, Problems};
use crate::sinks::columns::ColumnsConfig;
use crate::sinks::config::{validate_table, within};
use crate::sinks::{
    BatchConfig, Begin, BuildContext, CheckContext, Checked, Claim, OnConflict, Sink, SinkConfig,
};
use crate::stream::OnLag;
use crate::topic::Namespace;
use crate::units::Period;

/// A table in a SQLite file.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The database file. The file and its folder are created if missing.
    pub path: PathBuf,
    /// Table, such as `telemetry`.
    pub table: String,
    /// Maps each column to the source of its value. The default is the table `time, device_id, location,
    /// metric, value`.
    pub columns: ColumnsConfig,
    /// Create the table and its index (device, time) if the table is missing.
    pub create: bool,
    /// What happens to a row that violates a unique key of the table: `reject` makes it a dead letter,
    /// `ignore` leaves it out and counts it, `upsert` replaces the existing row. `auto` is read as
    /// `ignore`, and `refuse` as `reject`.
    pub on_conflict: OnConflict,
    /// When a batch is written.
    pub batch: BatchConfig,
    /// What retention of the stream does while this sink lags: `block` keeps the messages that the sink
    /// needs, and devices wait when the stream reaches its size limit; `detach` removes them, which is
    /// counted and reported.
    pub on_lag: OnLag,
    /// Former name of this sink. It continues at the position of the sink with that name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub renamed_from: Option<String>,
    /// Where to begin without a position: `start` with the first message that the stream has, `now`
    /// after the messages that the stream had at the first start of the host with this key. If unset: at
    /// the start, except for a table to which the stream was written before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub begin: Option<Begin>,
    /// How long to wait for another program that writes to the file.
    pub busy_timeout: Period,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            path: PathBuf::from("data/telemetry.db"),
            table: "telemetry".to_owned(),
            columns: ColumnsConfig::default(),
            create: true,
            on_conflict: OnConflict::default(),
            batch: BatchConfig::default(),
            on_lag: OnLag::default(),
            renamed_from: None,
            begin: None,
            busy_timeout: Period(Duration::from_secs(10)),
        }
    }
}

#[async_trait]
impl SinkConfig for Config {
    fn batch(&self) -> BatchConfig {
        self.batch
    }

    fn on_lag(&self) -> OnLag {
        self.on_lag
    }

    fn renamed_from(&self) -> Option<&str> {
        self.renamed_from.as_deref()
    }

    fn begin(&self) -> Option<Begin> {
        self.begin
    }

    fn ignores_rows(&self) -> bool {
        self.on_conflict.ignores_rows()
    }

    fn describe(&self) -> String {
        format!("SQLite {} table {}", self.path.display(), self.table)
    }

    fn validate(&self, path: &KeyPath, problems: &mut Problems) {
        if self.path.as_os_str().is_empty() {
            problems.add(path.key("path"), "must be a file, such as data/telemetry.db");
        }
        validate_table(&self.table, 1, &path.key("table"), problems);
        if self.table.to_ascii_lowercase().starts_with("sqlite_") {
            problems.add(path.key("table"), "must not begin with sqlite_, which SQLite keeps for itself");
        }
        self.columns.validate(&path.key("columns"), problems);
        self.batch.validate(&path.key("batch"), problems);
        within(self.busy_timeout, 0, 600_000, &path.key("busy_timeout"), problems);
    }

    fn validate_namespace(&self, namespace: &Namespace, path: &KeyPath, problems: &mut Problems) {
        self.columns.validate_namespace(namespace, &path.key("columns"), problems);
    }

    fn warnings(&self, path: &str) -> Vec<String> {
        self.on_conflict.warning(&format!("{path}.on_conflict")).into_iter().collect()
    }

    fn build(&self, context: BuildContext<'_>) -> Box<dyn Sink> {
        let BuildContext { name, namespace, failures, .. } = context;
        Box::new(SqliteSink::new(name, self.clone(), namespace, failures))
    }

    async fn check(&self, context: CheckContext<'_>, claims: Vec<Claim>) -> Checked {
        let (config, namespace) = (self.clone(), context.namespace);
        let checked = tokio::task::spawn_blocking(move || super::check(&config, namespace, claims));
        checked.await.expect("a check does not panic")
    }
}
