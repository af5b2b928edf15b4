//! Tables with unique keys.

use async_trait::async_trait;

use super::*;
use crate::sinks::conformance::{Keyed, keyed_conformance_tests};

#[async_trait]
impl Keyed for File {
    async fn sink_on_conflict(&self, on_conflict: OnConflict) -> Box<dyn Sink> {
        Box::new(with(self, on_conflict))
    }
}

fn with(file: &File, on_conflict: OnConflict) -> SqliteSink {
    SqliteSink::new("warehouse", Config { on_conflict, ..file.config() }, Arc::default(), Failures::default())
}

keyed_conformance_tests!(File::with(&format!(
    "CREATE TABLE telemetry ({TABLE}, UNIQUE (value), PRIMARY KEY (device_id, metric))"
)));

/// `on_conflict` of the sink counts, whatever the table says.
mod of_a_table_that_replaces {
    use super::*;

    keyed_conformance_tests!(File::with(&format!(
        "CREATE TABLE telemetry ({TABLE}, UNIQUE (value) ON CONFLICT REPLACE,
                                 PRIMARY KEY (device_id, metric) on  conflict replace)"
    )));
}

mod of_a_table_that_ignores {
    use super::*;

    keyed_conformance_tests!(File::with(&format!(
        "CREATE TABLE telemetry ({TABLE}, UNIQUE (value) ON CONFLICT IGNORE,
                                 PRIMARY KEY (device_id, metric) ON CONFLICT IGNORE)"
    )));
}

/// A trigger that keeps a list of devices, as many do.
const REGISTER: &str = "CREATE TABLE devices (id TEXT PRIMARY KEY);
     CREATE TRIGGER register AFTER INSERT ON telemetry
     BEGIN INSERT OR IGNORE INTO devices VALUES (NEW.device_id); END";

#[tokio::test]
async fn what_a_trigger_says_of_conflicts_holds_within_the_trigger() {
    let file = File::with(&format!("CREATE TABLE telemetry ({TABLE}); {REGISTER}"));
    let mut sink = file.sink();
    sink.open(&claim(), None).await.unwrap();
    sink.commit(&rows([message("a", "1"), message("a", "2")]), &[advance(0, 0, 2)]).await.unwrap();
    assert_eq!(file.written().await.len(), 2);
    // SQLite has the clause of the statement count in its triggers too.
    let file = File::with(&format!(
        "CREATE TABLE telemetry ({TABLE}, PRIMARY KEY (device_id, value) ON CONFLICT REPLACE); {REGISTER}"
    ));
    let error = file.sink().open(&claim(), None).await.unwrap_err();
    assert!(
        matches!(&error, Error::Setup(text) if text.contains("the one of trigger register")),
        "{error:?}"
    );
}

#[test]
fn ignore_without_a_unique_key_is_warned_of() {
    let ignore = |file: &File| Config { on_conflict: OnConflict::Ignore, ..file.config() };
    let file = File::with(&format!("CREATE TABLE telemetry ({TABLE})"));
    assert!(checked(&ignore(&file)).warnings[0].contains("has no unique key"));
    let file = File::with(&format!("CREATE TABLE telemetry ({TABLE}, UNIQUE (device_id, time))"));
    assert_eq!(checked(&ignore(&file)).warnings, [""; 0]);
}
