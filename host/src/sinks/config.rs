//! `sinks:` of a config: one of the sinks, by its `type`.

use std::ops::Deref;
use std::sync::Arc;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::columns::is_name;
use super::{Checked, Claim, Journal, Sink};
use crate::problems::{KeyPath, Problems};
use crate::stream::{OnLag, StateEntries};
use crate::telemetry::Failures;
use crate::topic::Namespace;
use crate::units::{ByteSize, Period};

/// Most rows of one transaction.
pub const BATCH_ROWS_MAX: u32 = 100_000;
/// Most bytes of payload in one transaction.
pub const BATCH_BYTES_MAX: ByteSize = ByteSize::mib(256);

/// Makes [`Config`] of the kinds of sinks: `type` of a sink is the kind's name in lower case.
macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident($config:ty),)*) => {
        /// A batched writer.
        #[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
        #[serde(tag = "type", rename_all = "lowercase")]
        pub enum Config {
            $($(#[$doc])* $kind($config),)*
        }

        impl Deref for Config {
            type Target = dyn SinkConfig;

            fn deref(&self) -> &Self::Target {
                match self {
                    $(Self::$kind(config) => config,)*
                }
            }
        }
    };
}

// Every kind of sink there is: a new one is its folder, and a line here.
kinds! {
    /// A measurement in InfluxDB, or in a store that takes its line protocol.
    Influxdb(super::influxdb::Config),
    /// A table in PostgreSQL, a hypertable where TimescaleDB is there.
    Postgres(super::postgres::Config),
    /// A table in a SQLite file.
    Sqlite(super::sqlite::Config),
}

/// What the host asks of the config of a sink, whatever its kind.
#[async_trait]
pub trait SinkConfig: Send + Sync {
    fn batch(&self) -> BatchConfig;

    fn on_lag(&self) -> OnLag;

    /// Returns the name that the sink had.
    fn renamed_from(&self) -> Option<&str>;

    fn begin(&self) -> Option<Begin>;

    /// Returns whether a row that the table has already is left out, as the config says.
    fn ignores_rows(&self) -> bool {
        false
    }

    /// Returns one line for the start screen: `PostgreSQL 127.0.0.1:5432/iot table telemetry`.
    fn describe(&self) -> String;

    /// Adds all that is wrong with the config by itself.
    fn validate(&self, path: &KeyPath, problems: &mut Problems);

    /// Adds what is wrong with the config beside the topic namespace.
    fn validate_namespace(&self, namespace: &Namespace, path: &KeyPath, problems: &mut Problems);

    /// Returns what still works but goes, or has no effect, at `path`.
    fn warnings(&self, _path: &str) -> Vec<String> {
        Vec::new()
    }

    /// Tries the files and variables that the config names.
    fn look(&self, _path: &KeyPath, _problems: &mut Problems) {}

    /// Makes the sink, which connects only in [`Sink::open`].
    fn build(&self, context: BuildContext<'_>) -> Box<dyn Sink>;

    /// Connects, logs in, compares what is there with the config and looks `claims` up, as the sink
    /// would do it. Writes nothing. Ends within `connect_timeout` for each host to connect to and
    /// once more for the server's answers.
    async fn check(&self, context: CheckContext<'_>, claims: Vec<Claim>) -> Checked;
}

/// What a sink is built with.
pub struct BuildContext<'a> {
    /// Key of the sink in the config.
    pub name: &'a str,
    pub namespace: Arc<Namespace>,
    /// Keeps the positions of a sink whose store has no transactions.
    pub journal: Journal,
    pub failures: Failures,
}

/// What a sink is checked with.
pub struct CheckContext<'a> {
    /// Key of the sink in the config.
    pub name: &'a str,
    pub namespace: Arc<Namespace>,
    /// What the data folder has of the journal of a [`BuildContext`], or why it cannot be read.
    pub journaled: &'a Result<StateEntries, String>,
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

    pub(super) fn ignores_rows(self) -> bool {
        self.resolved() == Self::Ignore
    }

    /// Returns what will go of the key at `path`.
    pub(super) fn warning(self, path: &str) -> Option<String> {
        (self == Self::Auto).then(|| {
            format!("{path}: auto is read as ignore and will go: write ignore, or reject, or upsert")
        })
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

/// The embedded default: rows in `data/telemetry.db`.
impl Default for Config {
    fn default() -> Self {
        Self::Sqlite(super::sqlite::Config::default())
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
        let unknown = parse(r#"{"type": "mysql"}"#).unwrap_err().to_string();
        assert!(unknown.starts_with("unknown variant `mysql`, expected "), "{unknown}");
        assert!(unknown.contains("`postgres`") && unknown.contains("`sqlite`"), "{unknown}");
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
