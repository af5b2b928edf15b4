mod keys;
mod values;

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use rusqlite::Connection;

use super::*;
use crate::sinks::conformance::{
    Database, advance, claim, conformance_tests, message, position, rejected, rows,
};
use crate::sinks::{Checked, Claim, Epoch, Error, Looked, OnConflict, Sink, Written};
use crate::telemetry::Failures;

struct File {
    folder: tempfile::TempDir,
}

impl File {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn config(&self) -> Config {
        Config { path: self.folder.path().join("data/telemetry.db"), ..Config::default() }
    }

    fn read(&self) -> Connection {
        std::fs::create_dir_all(self.folder.path().join("data")).unwrap();
        Connection::open(self.config().path).unwrap()
    }

    fn sink(&self) -> SqliteSink {
        SqliteSink::new("warehouse", self.config(), Arc::default(), Failures::default())
    }
}

#[async_trait]
impl Database for File {
    async fn sink(&self) -> Box<dyn Sink> {
        Box::new(File::sink(self))
    }

    async fn written(&self) -> Vec<(String, f64)> {
        let connection = self.read();
        let mut statement = connection.prepare("SELECT device_id, value FROM telemetry").unwrap();
        let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
        rows.collect::<Result<_, _>>().unwrap()
    }

    async fn lose_positions(&self) {
        self.read().execute_batch("DELETE FROM headworks_positions").unwrap();
    }

    async fn look(&self, claim: &Claim) -> Option<Looked> {
        let checked = checked_for(&self.config(), vec![claim.clone()]);
        assert_eq!(checked.problems, [""; 0]);
        checked.claims.into_iter().next()
    }
}

conformance_tests!(File::new());

const TABLE: &str = "time TEXT, device_id TEXT, location TEXT, metric TEXT, value REAL";

impl File {
    /// With a table as a user made it.
    fn with(sql: &str) -> Self {
        let file = Self::new();
        file.read().execute_batch(sql).unwrap();
        file
    }
}

mod with_a_deferred_foreign_key {
    use super::*;
    use crate::sinks::conformance::deferred_conformance_tests;

    deferred_conformance_tests!(File::with(
        "CREATE TABLE devices (id TEXT PRIMARY KEY); INSERT INTO devices VALUES ('a'), ('b');
         CREATE TABLE telemetry (time TEXT, device_id TEXT REFERENCES devices (id) DEFERRABLE INITIALLY DEFERRED,
                                 location TEXT, metric TEXT, value REAL NOT NULL);
         CREATE TRIGGER register AFTER INSERT ON telemetry WHEN NEW.device_id = 'new'
         BEGIN INSERT OR IGNORE INTO devices VALUES (NEW.device_id); END"
    ));
}

#[tokio::test]
async fn a_table_that_is_there_gets_no_index() {
    let file = File::with(&format!("CREATE TABLE telemetry ({TABLE})"));
    file.sink().open(&claim(), None).await.unwrap();
    let count = "SELECT count(*) FROM sqlite_master WHERE type = 'index' AND tbl_name = 'telemetry'";
    assert_eq!(file.read().query_row(count, [], |row| row.get::<_, u32>(0)).unwrap(), 0);
}

#[tokio::test]
async fn rows_that_a_view_or_a_trigger_puts_elsewhere_count_as_rows() {
    for (sql, is_certain) in [
        (
            "CREATE VIEW telemetry AS SELECT * FROM readings WHERE false;
             CREATE TRIGGER t INSTEAD OF INSERT ON telemetry BEGIN INSERT INTO readings SELECT NEW.time,
             NEW.device_id, NEW.location, NEW.metric, NEW.value; END",
            false,
        ),
        (
            "CREATE TABLE Telemetry ({TABLE});
             CREATE TRIGGER t AFTER INSERT ON telemetry BEGIN INSERT INTO readings SELECT * FROM telemetry;
             DELETE FROM telemetry; END",
            false,
        ),
        ("CREATE TABLE telemetry ({TABLE})", true),
    ] {
        let file = File::with(&format!("CREATE TABLE readings ({{TABLE}}); {sql}").replace("{TABLE}", TABLE));
        let mut sink = file.sink();
        let opened = sink.open(&claim(), None).await.unwrap();
        assert_eq!(opened.found.has_rows, !is_certain, "{sql}");
        sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.unwrap();
        file.lose_positions().await;
        let error = sink.open(&claim(), Some(opened.epoch)).await.unwrap_err();
        assert!(matches!(&error, Error::Choose(text) if text.contains("are gone")), "{sql}: {error:?}");
    }
}

#[tokio::test]
async fn rows_that_a_trigger_rejects_leave_nothing_behind_however_it_raises() {
    // Whatever RAISE takes back: the statement, nothing, or the whole transaction; and an
    // error of a function, which SQLite does not call a constraint.
    for raise in
        ["RAISE(ABORT, 'no')", "RAISE(FAIL, 'no')", "RAISE(ROLLBACK, 'no')", "json_extract('{', '$.a')"]
    {
        let file = File::with(&format!(
            "CREATE TABLE telemetry ({TABLE});
             CREATE TRIGGER t AFTER INSERT ON telemetry WHEN NEW.value > 100 BEGIN SELECT {raise}; END"
        ));
        let mut sink = file.sink();
        sink.open(&claim(), None).await.unwrap();
        let many = rows((0..100).map(|i| ("a", if [3, 40, 99].contains(&i) { "500" } else { "5" })));
        let refused = rejected(sink.commit(&many, &[advance(0, 0, 100)]).await);
        assert_eq!(refused.iter().map(|row| row.row).collect::<Vec<_>>(), [3, 40, 99], "{raise}");
        assert_eq!(sink.finish().await.unwrap(), Written { written: 97, ignored: 0 }, "{raise}");
        assert_eq!(file.written().await.len(), 97, "{raise}");
        assert_eq!(sink.open(&claim(), None).await.unwrap().positions, [position(0, 100)], "{raise}");
    }
}

#[tokio::test]
async fn what_fails_for_every_row_is_not_taken_for_bad_rows() {
    let file = File::with(&format!(
        "CREATE TABLE telemetry ({TABLE});
         CREATE TRIGGER t AFTER INSERT ON telemetry BEGIN SELECT json_extract('{{', '$.a'); END"
    ));
    let mut sink = file.sink();
    sink.open(&claim(), None).await.unwrap();
    let error = sink.commit(&rows([("a", "1"), ("a", "2")]), &[advance(0, 0, 2)]).await.unwrap_err();
    assert!(matches!(error, Error::Doubtful { .. }), "{error:?}");
}

#[tokio::test]
async fn a_changed_schema_is_read_again_before_a_row_is_written() {
    let file = File::new();
    let mut sink = file.sink();
    sink.open(&claim(), None).await.unwrap();
    sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.unwrap();
    file.read()
        .execute_batch(
            "ALTER TABLE telemetry RENAME TO before;
             CREATE TABLE telemetry (time TEXT, device_id TEXT, location TEXT, metric TEXT, value REAL, site TEXT NOT NULL)",
        )
        .unwrap();
    let next = rows([message("a", "2")]);
    let error = sink.commit(&next, &[advance(0, 1, 2)]).await.unwrap_err();
    assert!(matches!(error, Error::Retry(_)), "{error:?}");
    let error = sink.open(&claim(), None).await.unwrap_err();
    assert!(matches!(&error, Error::Setup(text) if text.contains("column \"site\"")), "{error:?}");
    file.read().execute_batch("DROP TABLE telemetry").unwrap();
    let error = sink.open(&claim(), None).await.unwrap_err();
    assert!(matches!(&error, Error::Setup(text) if text.contains("it was dropped or renamed")), "{error:?}");
    file.read().execute_batch("ALTER TABLE before RENAME TO telemetry").unwrap();
    sink.open(&claim(), None).await.unwrap();
    sink.commit(&next, &[advance(0, 1, 2)]).await.unwrap();
    assert_eq!(file.written().await.len(), 2);
}

#[tokio::test]
async fn times_compare_with_sqlites_own() {
    let file = File::new();
    let mut sink = file.sink();
    sink.open(&claim(), None).await.unwrap();
    sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.unwrap();
    let (time, kind, same_day): (String, String, i64) = file
        .read()
        .query_row(
            "SELECT time, typeof(time), time > datetime('2026-02-23 09:59:00') AND
                    time < datetime('2026-02-23 10:00:00', '+5 minutes') FROM telemetry",
            [],
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
        )
        .unwrap();
    assert_eq!((time.as_str(), kind.as_str(), same_day), ("2026-02-23 10:00:00.123456Z", "text", 1));
}

#[tokio::test]
async fn times_are_never_text_among_the_numbers_of_a_column() {
    for declared in ["INTEGER NOT NULL", "bigint", "REAL", "DOUBLE PRECISION"] {
        let file = File::with(&format!(
            "CREATE TABLE telemetry (time {declared}, device_id TEXT, location TEXT, metric TEXT, value REAL)"
        ));
        let error = file.sink().open(&claim(), None).await.unwrap_err();
        assert!(matches!(&error, Error::Setup(text) if text.contains("unit: s")), "{declared}: {error:?}");
        assert!(checked(&file.config()).problems[0].contains("column \"time\""), "{declared}");
        let columns = serde_json::from_value(serde_json::json!({
            "time": { "from": "$time", "type": "bigint", "unit": "s" }, "device_id": "$device", "value": "$payload"
        }))
        .unwrap();
        let mut sink = SqliteSink::new(
            "warehouse",
            Config { columns, ..file.config() },
            Arc::default(),
            Failures::default(),
        );
        sink.open(&claim(), None).await.unwrap();
        sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.unwrap();
        let sql = "SELECT CAST(time AS INTEGER), typeof(time) <> 'text' FROM telemetry";
        let row: (i64, bool) = file.read().query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
        assert_eq!(row, (1_771_840_800, true), "{declared}");
    }
    for declared in ["TEXT", "DATETIME", "TIMESTAMP", "", "VARCHAR(30)"] {
        let file = File::with(&format!(
            "CREATE TABLE telemetry (time {declared}, device_id TEXT, location TEXT, metric TEXT, value REAL)"
        ));
        file.sink().open(&claim(), None).await.unwrap();
    }
}

#[tokio::test]
async fn the_wal_shrinks_once_no_reader_holds_it() {
    const KEPT: u64 = 8 << 20;
    let file = File::with(&format!("CREATE TABLE telemetry ({TABLE}, note TEXT)"));
    let columns = serde_json::from_value(serde_json::json!({
        "time": "$time", "device_id": "$device", "value": "/v", "note": "/n"
    }))
    .unwrap();
    let mut sink = SqliteSink::new(
        "warehouse",
        Config { columns, ..file.config() },
        Arc::default(),
        Failures::default(),
    );
    sink.open(&claim(), None).await.unwrap();
    let large = format!(r#"{{"v": 1, "n": "{}"}}"#, "x".repeat(1 << 20));
    let many = rows((0..10).map(|_| ("a", large.as_str())));
    let size = || file.config().path.with_extension("db-wal").metadata().unwrap().len();
    let reader = file.read();
    reader.execute_batch("BEGIN; SELECT count(*) FROM telemetry").unwrap();
    for batch in 0..2 {
        sink.commit(&many, &[advance(0, 10 * batch, 10 * batch + 10)]).await.unwrap();
    }
    assert!(size() > KEPT, "{}", size());
    reader.execute_batch("COMMIT").unwrap();
    // The next commit copies the file's pages into the database, the one after it begins it anew.
    for next in 20..22 {
        sink.commit(&rows([("a", r#"{"v": 1}"#)]), &[advance(0, next, next + 1)]).await.unwrap();
    }
    assert!(size() <= KEPT, "{}", size());
}

#[tokio::test]
async fn a_constraint_names_its_row_among_many() {
    let file = File::new();
    file.read()
        .execute_batch(
            "CREATE TABLE telemetry (time TEXT, device_id TEXT, location TEXT, metric TEXT,
                                     value REAL CHECK (value < 100))",
        )
        .unwrap();
    let mut sink = file.sink();
    sink.open(&claim(), None).await.unwrap();
    let many = rows((0..200).map(|i| ("a", if i == 77 { "500" } else { "5" })));
    let refused = rejected(sink.commit(&many, &[advance(0, 0, 200)]).await);
    assert_eq!(refused.iter().map(|row| row.row).collect::<Vec<_>>(), [77]);
    assert!(refused[0].reason.contains("CHECK"), "{}", refused[0].reason);
}

#[tokio::test]
async fn a_table_without_a_column_is_an_error_that_names_it() {
    let file = File::new();
    file.read().execute_batch("CREATE TABLE telemetry (time TEXT, device_id TEXT, v REAL)").unwrap();
    let error = file.sink().open(&claim(), None).await.unwrap_err();
    assert!(matches!(error, Error::Setup(_)), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("no column \"location\": it has time, device_id, v"), "{text}");
}

#[tokio::test]
async fn a_locked_file_is_tried_again() {
    let file = File::new();
    let config = Config { busy_timeout: "1ms".parse().unwrap(), ..file.config() };
    let mut sink = SqliteSink::new("warehouse", config, Arc::default(), Failures::default());
    sink.open(&claim(), None).await.unwrap();
    let other = file.read();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let batch = rows([message("a", "1")]);
    let error = sink.commit(&batch, &[advance(0, 0, 1)]).await.unwrap_err();
    assert!(matches!(error, Error::Retry(_)), "{error:?}");
    other.execute_batch("ROLLBACK").unwrap();
    sink.commit(&batch, &[advance(0, 0, 1)]).await.unwrap();
}

/// A sink that has written a row, and what it does next.
struct Writing {
    file: File,
    sink: SqliteSink,
    held: Option<Epoch>,
}

impl Writing {
    async fn begin() -> Self {
        let file = File::new();
        let mut sink = file.sink();
        let held = Some(sink.open(&claim(), None).await.unwrap().epoch);
        sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.unwrap();
        Self { file, sink, held }
    }

    /// The file, or one that SQLite has beside it, and one of that name plus `.old`.
    fn paths(&self, ending: &str) -> [PathBuf; 2] {
        [ending.to_owned(), format!("{ending}.old")]
            .map(|ending| PathBuf::from(format!("{}{ending}", self.file.config().path.display())))
    }

    fn away(&self, endings: &[&str]) {
        for ending in endings {
            let [path, old] = self.paths(ending);
            std::fs::rename(path, old).unwrap();
        }
    }

    fn back(&self, endings: &[&str]) {
        for ending in endings {
            let [path, old] = self.paths(ending);
            std::fs::rename(old, path).unwrap();
        }
    }

    /// Nothing is written, and a person is told this.
    async fn holds(&mut self, said: &str) {
        let error = self.sink.commit(&rows([message("a", "9")]), &[advance(0, 1, 2)]).await.unwrap_err();
        assert!(matches!(error, Error::Retry(_)), "{error:?}");
        for _ in 0..2 {
            let error = self.sink.open(&claim(), self.held).await.unwrap_err();
            assert!(matches!(&error, Error::Setup(text) if text.contains(said)), "{error:?}");
        }
    }

    async fn goes_on(&mut self) {
        assert_eq!(self.sink.open(&claim(), self.held).await.unwrap().positions, [position(0, 1)]);
        self.sink.commit(&rows([message("a", "2")]), &[advance(0, 1, 2)]).await.unwrap();
        let mut written = self.file.written().await;
        written.sort_by(|a, b| a.1.total_cmp(&b.1));
        assert_eq!(written, [("a".to_owned(), 1.0), ("a".to_owned(), 2.0)]);
    }
}

#[tokio::test]
async fn a_file_that_is_moved_away_holds_the_sink_until_it_is_back() {
    for endings in [&[""][..], &["", "-wal", "-shm"]] {
        let mut writing = Writing::begin().await;
        writing.away(endings);
        writing.holds("moved or removed while the host runs").await;
        assert!(!writing.paths("")[0].exists(), "none is made in its place");
        writing.back(endings);
        writing.goes_on().await;
    }
    let mut writing = Writing::begin().await;
    std::fs::remove_file(&writing.paths("")[0]).unwrap();
    writing.holds("restart the host to begin a new file").await;
    std::fs::remove_file(&writing.paths("-wal")[0]).unwrap();
    assert_eq!(writing.file.sink().open(&claim(), None).await.unwrap().positions, [], "another process");
}

#[tokio::test]
async fn another_file_in_its_place_is_not_written_to_unless_it_has_the_positions() {
    let mut writing = Writing::begin().await;
    let backup = writing.file.folder.path().join("backup.db");
    writing.file.read().execute("VACUUM INTO ?1", [backup.to_str().unwrap()]).unwrap();
    writing.away(&["", "-wal", "-shm"]);
    writing.file.read().execute_batch("CREATE TABLE other (a)").unwrap();
    writing.holds("are not in it").await;
    assert_eq!(
        writing.file.read().query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0)),
        Ok(1)
    );
    for ending in ["", "-wal", "-shm"] {
        // SQLite takes its own away with the last connection.
        let _ = std::fs::remove_file(&writing.paths(ending)[0]);
    }
    std::fs::rename(backup, &writing.paths("")[0]).unwrap();
    writing.goes_on().await;
}

#[tokio::test]
async fn rows_of_one_file_are_never_read_into_another_that_takes_its_place() {
    let mut writing = Writing::begin().await;
    let backup = writing.file.folder.path().join("backup.db");
    writing.file.read().execute("VACUUM INTO ?1", [backup.to_str().unwrap()]).unwrap();
    writing.away(&[""]);
    std::fs::rename(backup, &writing.paths("")[0]).unwrap();
    writing.holds("SQLite would mix the two").await;
    writing.away(&["-wal"]);
    writing.goes_on().await;
}

#[tokio::test]
async fn a_wal_file_that_is_removed_loses_no_row() {
    let mut writing = Writing::begin().await;
    std::fs::remove_file(&writing.paths("-wal")[0]).unwrap();
    let error = writing.sink.commit(&rows([message("a", "2")]), &[advance(0, 1, 2)]).await.unwrap_err();
    assert!(matches!(&error, Error::Retry(text) if text.contains("-wal")), "{error:?}");
    writing.goes_on().await;
}

/// As where it is moved between the look at the file and COMMIT.
#[tokio::test]
async fn a_commit_to_a_file_that_is_moved_meanwhile_is_not_believed() {
    let mut writing = Writing::begin().await;
    // A bad row leaves the transaction open.
    let bad = rows([message("a", "2"), message("b", "\"hot\"")]);
    rejected(writing.sink.commit(&bad, &[advance(0, 1, 3)]).await);
    writing.away(&[""]);
    let error = writing.sink.finish().await.unwrap_err();
    assert!(matches!(&error, Error::Unknown(text) if text.contains("moved")), "{error:?}");
    writing.back(&[""]);
    let opened = writing.sink.open(&claim(), writing.held).await.unwrap();
    assert_eq!(opened.positions, [position(0, 3)], "and is known once the file is back");
}

#[tokio::test]
async fn positions_of_the_first_version_are_read_and_get_what_they_lack() {
    let file = File::with(&format!(
        "CREATE TABLE telemetry ({TABLE});
         CREATE TABLE headworks_positions (
             pipeline TEXT NOT NULL, sink TEXT NOT NULL, log TEXT NOT NULL, generation INTEGER NOT NULL,
             \"partition\" INTEGER NOT NULL, epoch INTEGER NOT NULL, next_offset INTEGER, holder TEXT NOT NULL,
             updated_at TEXT NOT NULL, PRIMARY KEY (pipeline, sink, log, generation, \"partition\")) WITHOUT ROWID;
         INSERT INTO headworks_positions VALUES
             ('telemetry', 'warehouse', '{}', 0, 0, 3, 41, 'edge-7 (process 1)', '2026-01-01 00:00:00Z')",
        claim().log
    ));
    let mut sink = file.sink();
    let opened = sink.open(&claim(), None).await.unwrap();
    assert_eq!((opened.epoch.0, opened.positions), (4, vec![position(0, 41)]));
    sink.commit(&rows([message("a", "1")]), &[advance(0, 41, 42)]).await.unwrap();
    assert_eq!(file.sink().open(&claim(), None).await.unwrap().positions, [position(0, 42)]);
}

#[tokio::test]
async fn a_file_that_is_no_database_is_an_error_for_a_person() {
    let file = File::new();
    drop(file.read());
    std::fs::write(file.config().path, "this is not a database, but long enough to look at").unwrap();
    let error = file.sink().open(&claim(), None).await.unwrap_err();
    assert!(matches!(error, Error::Setup(_)), "{error:?}");
}

fn checked(config: &Config) -> Checked {
    checked_for(config, Vec::new())
}

fn checked_for(config: &Config, claims: Vec<Claim>) -> Checked {
    check(config, Arc::default(), claims)
}

/// Names, sizes and times of change below the folder.
fn state(file: &File) -> Vec<(std::path::PathBuf, u64, std::time::SystemTime)> {
    let mut state = Vec::new();
    let mut folders = vec![file.folder.path().to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let data = path.metadata().unwrap();
            state.push((path.clone(), data.len(), data.modified().unwrap()));
            if data.is_dir() {
                folders.push(path);
            }
        }
    }
    state.sort();
    state
}

#[tokio::test]
async fn a_check_says_what_would_be_created_and_writes_nothing() {
    let file = File::new();
    let nothing = checked(&file.config());
    assert_eq!((nothing.problems, state(&file)), (vec![], vec![]));
    assert!(nothing.found.concat().contains("creates the file"), "{:?}", nothing.found);

    let mut sink = file.sink();
    sink.open(&claim(), None).await.unwrap();
    sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.unwrap();
    // Beside the host, whose rows are still in the WAL.
    let before = state(&file);
    let there = checked(&file.config());
    assert_eq!((there.problems, there.found), (vec![], vec!["table telemetry is there".to_owned()]));
    assert_eq!(state(&file), before);
    drop(sink);
    let other = Config { table: "readings".to_owned(), ..file.config() };
    assert!(checked(&other).found.concat().contains("creates the table readings"));
    let gone = checked_for(&other, vec![claim()]).problems;
    assert!(gone[0].contains("no table readings, which this sink has written to before"), "{gone:?}");
    // As 0.1.0 made it.
    for column in ["openings", "table_name", "claimed_at", "letters"] {
        file.read().execute_batch(&format!("ALTER TABLE headworks_positions DROP COLUMN {column}")).unwrap();
    }
    let looked = |pipeline: &str| {
        let claim = Claim { pipeline: pipeline.to_owned(), ..claim() };
        checked_for(&file.config(), vec![claim]).claims.remove(0)
    };
    assert_eq!(looked("telemetry").positions.len(), 1);
    assert_eq!(looked("alerts").found.others, [("telemetry".to_owned(), "warehouse".to_owned())]);
}

#[tokio::test]
async fn a_closed_file_is_checked_without_files_beside_it() {
    let file = File::with(&format!("PRAGMA journal_mode = WAL; CREATE TABLE telemetry ({TABLE})"));
    let before = state(&file);
    assert_eq!(checked(&file.config()).problems, [""; 0]);
    assert_eq!(state(&file), before);
}

#[test]
fn what_keeps_a_file_from_being_written_is_named() {
    for (sql, change, said) in [
        ("CREATE TABLE telemetry (ts TEXT)", Config::default(), "has no column \"time\""),
        ("", Config { create: false, ..Config::default() }, "set `create: true`"),
        (
            "CREATE TABLE telemetry ({TABLE})",
            Config { on_conflict: OnConflict::Upsert, ..Config::default() },
            "add one, such as PRIMARY KEY",
        ),
        (
            "CREATE TABLE readings ({TABLE}); CREATE VIEW telemetry AS SELECT * FROM readings",
            Config::default(),
            "because it is a view",
        ),
    ] {
        let file = File::with(&sql.replace("{TABLE}", TABLE));
        let problems = checked(&Config { path: file.config().path, ..change }).problems;
        assert!(problems.len() == 1 && problems[0].contains(said), "{said}: {problems:?}");
    }
    let file = File::new();
    drop(file.read());
    std::fs::write(file.config().path, "this is not a database, but long enough to look at").unwrap();
    let below = Config { path: file.config().path.join("telemetry.db"), ..file.config() };
    let folder = Config { path: file.folder.path().join("data"), ..file.config() };
    for (config, said) in [
        (file.config(), "is not a SQLite database: move the file away"),
        (below, "is not a folder: correct `path`"),
        (folder, "is not a file: correct `path`"),
    ] {
        let problems = checked(&config).problems;
        assert!(problems.len() == 1 && problems[0].contains(said), "{said}: {problems:?}");
    }
}
