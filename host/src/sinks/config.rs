//! The `sinks:` section of the configuration. `type` selects the kind of a sink.

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
        /// A writer that delivers rows in batches.
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
    /// A measurement in InfluxDB, or in another store that accepts its line protocol.
    Influxdb(super::influxdb::Config),
    /// A table in PostgreSQL. It becomes a hypertable if TimescaleDB is installed.
    Postgres(super::postgres::Config),
    /// A table in a SQLite file.
    Sqlite(super::sqlite::Config),
}

/// Properties of a sink's configuration that the host uses, for every kind of sink.
#[async_trait]
pub trait SinkConfig: Send + Sync {
    fn batch(&self) -> BatchConfig;

    fn on_lag(&self) -> OnLag;

    /// Returns the former name of the sink.
    fn renamed_from(&self) -> Option<&str>;

    fn begin(&self) -> Option<Begin>;

    /// Returns whether a row that is already in the table is ignored.
    fn ignores_rows(&self) -> bool {
        false
    }

    /// Returns one line for the start screen: `PostgreSQL 127.0.0.1:5432/iot table telemetry`.
    fn describe(&self) -> String;

    /// Adds every problem of the configuration that can be found without other sections.
    fn validate(&self, path: &KeyPath, problems: &mut Problems);

    /// Adds every problem that depends on the names of topic levels.
    fn validate_namespace(&self, namespace: &Namespace, path: &KeyPath, problems: &mut Problems);

    /// Returns warnings about keys at `path` that are deprecated or have no effect.
    fn warnings(&self, _path: &str) -> Vec<String> {
        Vec::new()
    }

    /// Reads the files and environment variables that the configuration names, and adds what is wrong
    /// with them.
    fn look(&self, _path: &KeyPath, _problems: &mut Problems) {}

    /// Creates the sink. It connects only in [`Sink::open`].
    fn build(&self, context: BuildContext<'_>) -> Box<dyn Sink>;

    /// Connects, logs in, compares the table with the configuration and looks up `claims`, as the sink
    /// would. Writes nothing. Ends within `connect_timeout` for each host to connect to, and once more
    /// for the server's answers.
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
    /// The journaled positions in the data folder, or the reason why they cannot be read.
    pub journaled: &'a Result<StateEntries, String>,
}

/// When a batch is written: as soon as one of these limits is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BatchConfig {
    /// Most rows of one transaction. All rows that were made of one message are in one transaction, so a
    /// message with more rows has a transaction of its own.
    pub rows_max: u32,
    /// Most bytes of payload in one transaction. A message whose rows have more has a transaction of its
    /// own.
    pub bytes_max: ByteSize,
    /// Longest time that a message waits for further messages.
    pub wait_max: Period,
}

/// Where a sink begins if it has no position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Begin {
    /// At the first message that the stream still has.
    Start,
    /// After the messages that the stream had at the first start of the host with this setting.
    Now,
}

/// What happens to a row whose unique key is already in the table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnConflict {
    /// The new row becomes a dead letter.
    #[default]
    Reject,
    /// The existing row stays, and the new one is counted as ignored.
    Ignore,
    /// The new row replaces the existing one. Needs a unique key whose columns are all filled.
    Upsert,
    /// Accepted for configs of 0.1. Same as `ignore`.
    Auto,
    /// Accepted for configs of 0.1. Same as `reject`.
    Refuse,
}

impl OnConflict {
    /// Returns the value with its current name.
    pub(super) fn resolved(self) -> Self {
        match self {
            Self::Auto => Self::Ignore,
            Self::Refuse => Self::Reject,
            Self::Reject | Self::Ignore | Self::Upsert => self,
        }
    }

    pub(super) fn ignores_rows(self) -> bool {
        self.resolved() == Self::Ignore
    }

    /// Returns a warning if the value at `path` is deprecated.
    pub(super) fn warning(self, path: &str) -> Option<String> {
        match self {
            Self::Auto => Some(format!(
                "{path}: auto is read as ignore and will go: write ignore, or reject, or upsert"
            )),
            Self::Refuse => Some(format!("{path}: refuse is read as reject and will go: write reject")),
            Self::Reject | Self::Ignore | Self::Upsert => None,
        }
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

/// Adds a problem unless `period` is between `min_ms` and `max_ms`.
pub(super) fn within(period: Period, min_ms: u64, max_ms: u64, path: &KeyPath, problems: &mut Problems) {
    let (min, max) = (std::time::Duration::from_millis(min_ms), std::time::Duration::from_millis(max_ms));
    if !(min..=max).contains(&period.0) {
        let (min, max) = (Period(min), Period(max));
        problems.add(path.clone(), format!("must be between {min} and {max}, is {period}"));
    }
}

/// Splits a table's name into its parts: `iot.telemetry`. A part in double quotes may contain dots:
/// `iot."site.1"`. Names are used exactly as written.
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

/// Returns the error that there is no table to write to, and what to do. `was_there` says that the sink
/// has written to the table before.
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

/// Adds a problem unless `table` is the name of a table, with a schema if `parts_max` is 2.
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
