//! `sinks:` of a config: one of the sinks, by its `type`.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Sink, columns::ColumnsConfig, columns::is_name, postgres, sqlite};
use crate::problems::{KeyPath, Problems};
use crate::stream::OnLag;
use crate::telemetry::Failures;
use crate::topic::Namespace;
use crate::units::{ByteSize, Period};

/// Most rows of one transaction.
pub const BATCH_ROWS_MAX: u32 = 100_000;
/// Most bytes of payload in one transaction.
pub const BATCH_BYTES_MAX: ByteSize = ByteSize::mib(256);

/// A batched writer.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Config {
    /// A table in PostgreSQL, a hypertable where TimescaleDB is there.
    Postgres(postgres::Config),
    /// A table in a SQLite file.
    Sqlite(sqlite::Config),
}

/// When a batch is written: at the first bound that it meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BatchConfig {
    /// Rows of one transaction, at most. All rows that were made of one message are in one transaction: a message with
    /// more rows than this has a transaction of its own.
    pub rows_max: u32,
    /// Bytes of payload in one transaction, at most. A message whose rows have more has a transaction of its own.
    pub bytes_max: ByteSize,
    /// How long a message waits for others.
    pub wait_max: Period,
}

/// Where a sink begins that has no position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Begin {
    /// With the first message that the stream still has.
    Start,
    /// With what comes after the first start of the host that has it in its config.
    Now,
}

/// What happens to a row that the table has already, by one of its unique keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnConflict {
    /// The new row goes to dead letters.
    #[default]
    #[serde(alias = "refuse")]
    Reject,
    /// The row that is there stays; the new one is counted as ignored.
    Ignore,
    /// The new row takes the place of the one that is there. Needs a unique key
    /// whose columns are all filled.
    Upsert,
    /// Read for configs of 0.1; the same as `ignore`.
    Auto,
}

impl OnConflict {
    /// Without names of earlier releases.
    pub(super) fn resolved(self) -> Self {
        if self == Self::Auto { Self::Ignore } else { self }
    }
}

impl Default for BatchConfig {
    fn default() -> Self {
        Self {
            rows_max: 5_000,
            bytes_max: ByteSize::mib(8),
            wait_max: Period(std::time::Duration::from_millis(200)),
        }
    }
}

impl Config {
    pub fn batch(&self) -> BatchConfig {
        match self {
            Self::Postgres(config) => config.batch,
            Self::Sqlite(config) => config.batch,
        }
    }

    pub fn on_lag(&self) -> OnLag {
        match self {
            Self::Postgres(config) => config.on_lag,
            Self::Sqlite(config) => config.on_lag,
        }
    }

    pub fn renamed_from(&self) -> Option<&str> {
        match self {
            Self::Postgres(config) => config.renamed_from.as_deref(),
            Self::Sqlite(config) => config.renamed_from.as_deref(),
        }
    }

    pub fn begin(&self) -> Option<Begin> {
        match self {
            Self::Postgres(config) => config.begin,
            Self::Sqlite(config) => config.begin,
        }
    }

    /// Whether a row that the table has already is left out, as the config says.
    pub fn ignores_rows(&self) -> bool {
        let on_conflict = match self {
            Self::Postgres(config) => config.on_conflict,
            Self::Sqlite(config) => config.on_conflict,
        };
        on_conflict.resolved() == OnConflict::Ignore
    }

    /// One line for the start screen: `PostgreSQL 127.0.0.1:5432/iot table telemetry`.
    pub fn describe(&self) -> String {
        match self {
            Self::Postgres(config) => config.describe(),
            Self::Sqlite(config) => config.describe(),
        }
    }

    pub fn validate(&self, path: &KeyPath, problems: &mut Problems) {
        match self {
            Self::Postgres(config) => config.validate(path, problems),
            Self::Sqlite(config) => config.validate(path, problems),
        }
    }

    /// What still works but goes, or has no effect, at `path`.
    pub fn warnings(&self, path: &str) -> Vec<String> {
        let on_conflict = match self {
            Self::Postgres(config) => config.on_conflict,
            Self::Sqlite(config) => config.on_conflict,
        };
        let mut warnings = match self {
            Self::Postgres(config) => config.url.warnings(&format!("{path}.url")),
            Self::Sqlite(_) => Vec::new(),
        };
        if on_conflict == OnConflict::Auto {
            warnings.push(format!(
                "{path}.on_conflict: auto is read as ignore and will go: write ignore, or reject, or upsert"
            ));
        }
        warnings
    }

    /// Tries the files that it names.
    pub fn look(&self, path: &KeyPath, problems: &mut Problems) {
        match self {
            Self::Postgres(config) => config.look(path, problems),
            Self::Sqlite(_) => {}
        }
    }

    /// The part of `validate` that needs the topic namespace.
    pub fn validate_namespace(&self, namespace: &Namespace, path: &KeyPath, problems: &mut Problems) {
        self.columns().validate_namespace(namespace, &path.key("columns"), problems);
    }

    /// Connects only in [`Sink::open`]. `name` is the sink's key in the config.
    pub fn build(&self, name: &str, namespace: Arc<Namespace>, failures: Failures) -> Box<dyn Sink> {
        match self {
            Self::Postgres(config) => {
                Box::new(postgres::PostgresSink::new(name, config.clone(), namespace, failures))
            }
            Self::Sqlite(config) => {
                Box::new(sqlite::SqliteSink::new(name, config.clone(), namespace, failures))
            }
        }
    }

    fn columns(&self) -> &ColumnsConfig {
        match self {
            Self::Postgres(config) => &config.columns,
            Self::Sqlite(config) => &config.columns,
        }
    }
}

/// The embedded default: rows in `data/telemetry.db`.
impl Default for Config {
    fn default() -> Self {
        Self::Sqlite(sqlite::Config::default())
    }
}

impl BatchConfig {
    pub fn validate(&self, path: &KeyPath, problems: &mut Problems) {
        if !(1..=BATCH_ROWS_MAX).contains(&self.rows_max) {
            problems.add(
                path.key("rows_max"),
                format!("must be between 1 and {BATCH_ROWS_MAX}, is {}", self.rows_max),
            );
        }
        if self.bytes_max.0 < 1_024 || self.bytes_max > BATCH_BYTES_MAX {
            problems.add(
                path.key("bytes_max"),
                format!("must be between 1KiB and {BATCH_BYTES_MAX}, is {}", self.bytes_max),
            );
        }
        within(self.wait_max, 0, 60_000, &path.key("wait_max"), problems);
    }
}

/// Adds a problem unless `period` is between the two, in milliseconds.
pub(super) fn within(period: Period, min_ms: u64, max_ms: u64, path: &KeyPath, problems: &mut Problems) {
    let (min, max) = (std::time::Duration::from_millis(min_ms), std::time::Duration::from_millis(max_ms));
    if !(min..=max).contains(&period.0) {
        let (min, max) = (Period(min), Period(max));
        problems.add(path.clone(), format!("must be between {min} and {max}, is {period}"));
    }
}

/// A table's name in its parts, `iot.telemetry`; a part in double quotes may
/// hold dots: `iot."site.1"`. Names are taken exactly as written.
pub(super) fn table_parts(table: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut quoted = false;
    let mut chars = table.chars().peekable();
    while let Some(c) = chars.next() {
        let part = parts.last_mut().expect("it begins with one");
        match c {
            // A quote within quotes is written twice, as in SQL.
            '"' if quoted && chars.next_if_eq(&'"').is_some() => part.push('"'),
            '"' if quoted || part.is_empty() => quoted = !quoted,
            '.' if !quoted => parts.push(String::new()),
            c => part.push(c),
        }
    }
    parts
}

/// Says that there is no table to write to, and what to do; `was_there`: the sink has filled it.
pub(super) fn missing_table(table: &str, was_there: bool) -> String {
    if was_there {
        format!(
            "there is no table {table}, which this sink has written to before: it was dropped or renamed, and \
             Headworks does not create it again by itself; rename it back, restore it, or create it"
        )
    } else {
        format!("there is no table {table}: create it, or set `create: true`")
    }
}

/// Adds a problem unless `table` is a table's name, after a schema's where `parts_max` is 2.
pub(super) fn validate_table(table: &str, parts_max: usize, path: &KeyPath, problems: &mut Problems) {
    let parts = table_parts(table);
    if parts.len() > parts_max || !parts.iter().all(|part| is_name(part)) {
        let example = if parts_max == 2 { "telemetry or iot.telemetry" } else { "telemetry" };
        problems.add(
            path.clone(),
            format!(
                "must be the name of a table such as {example}, is \"{table}\"; \
                 a name with a dot stands in double quotes: '\"my.table\"'"
            ),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Config, serde_json::Error> {
        serde_json::from_str(json)
    }

    #[test]
    fn a_sink_is_told_by_its_type() {
        let config = parse(
            r#"{"type": "postgres", "url": "postgres://writer@db.example.com/iot",
                "password": {"env": "PGPASSWORD"}, "table": "telemetry", "batch": {"rows_max": 10}}"#,
        )
        .unwrap();
        assert_eq!(config.describe(), "PostgreSQL db.example.com:5432/iot table telemetry");
        assert_eq!(config.batch().rows_max, 10);
        assert_eq!(parse(r#"{"type": "sqlite"}"#).unwrap(), Config::default());
        assert!(parse(r#"{"type": "sqlite", "tabel": "x"}"#).unwrap_err().to_string().contains("`tabel`"));
        assert!(parse(r#"{"type": "mysql"}"#).is_err());
    }

    #[test]
    fn everything_wrong_is_said_at_once() {
        let config = parse(
            r#"{"type": "postgres", "url": "postgres://", "table": "a.b.c", "sslmode": "disable",
                "tls": {"ca": "ca.pem"}, "columns": {"v": "value"}, "connect_timeout": "0s",
                "batch": {"rows_max": 0, "bytes_max": 10, "wait_max": "2h"}}"#,
        )
        .unwrap();
        let mut problems = Problems::default();
        config.validate(&KeyPath::root().key("sinks").key("w"), &mut problems);
        let mut paths: Vec<String> =
            problems.into_vec().iter().map(|problem| problem.path.as_str().to_owned()).collect();
        paths.sort();
        let expected = [
            "sinks.w.batch.bytes_max",
            "sinks.w.batch.rows_max",
            "sinks.w.batch.wait_max",
            "sinks.w.columns.v",
            "sinks.w.connect_timeout",
            "sinks.w.table",
            "sinks.w.tls",
            "sinks.w.url",
            "sinks.w.url",
        ];
        assert_eq!(paths, expected);
    }

    #[test]
    fn a_missing_table_is_told_in_a_sentence() {
        assert_eq!(missing_table("t", false), "there is no table t: create it, or set `create: true`");
        assert_eq!(
            missing_table("t", true),
            "there is no table t, which this sink has written to before: it was dropped or renamed, and Headworks \
             does not create it again by itself; rename it back, restore it, or create it"
        );
    }

    #[test]
    fn a_password_in_a_url_is_never_shown() {
        let text = r#"{"type": "postgres", "url": "postgres://writer:hunter2@db/iot?sslmode=require"}"#;
        let config = parse(text).unwrap();
        let shown = format!("{config:?} {} {}", config.describe(), serde_json::to_string(&config).unwrap());
        assert!(!shown.contains("hunter2"), "{shown}");
    }
}
