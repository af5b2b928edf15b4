//! `validate --connect`: what is wrong is said with what to do, and nothing is written.

use super::*;
use crate::sinks::Checked;
use crate::sinks::Password;

pub(super) async fn check(config: Config) -> Checked {
    check_for(config, Vec::new()).await
}

async fn check_for(config: Config, claims: Vec<Claim>) -> Checked {
    super::super::check("warehouse", &config, Arc::default(), claims).await
}

/// The only problem.
pub(super) async fn problem(config: Config) -> String {
    let checked = check(config).await;
    assert_eq!(checked.problems.len(), 1, "{checked:?}");
    checked.problems.into_iter().next().expect("one")
}

async fn tables(fresh: &Fresh) -> Vec<String> {
    let sql = "SELECT relname::text FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace
               WHERE nspname = 'public' ORDER BY 1";
    fresh.client().await.query(sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

/// A role of its own with a password, and the database by that role.
pub(super) struct Writer<'f> {
    fresh: &'f Fresh,
    role: String,
}

impl<'f> Writer<'f> {
    pub(super) async fn new(fresh: &'f Fresh) -> Self {
        let role = format!("r{}", uuid::Uuid::new_v4().simple());
        fresh.execute(&format!("CREATE ROLE {role} LOGIN PASSWORD 'x'")).await;
        Self { fresh, role }
    }

    pub(super) fn config(&self) -> Config {
        let target = Url(self.fresh.url.clone()).target();
        Config { url: Url(format!("postgres://{}:x@{target}", self.role)), ..self.fresh.config() }
    }

    /// Runs what a problem says to do.
    pub(super) async fn follow(&self, advice: &str) {
        let at = advice.find("GRANT ").unwrap_or_else(|| panic!("{advice}"));
        let sql = advice[at..].split(", or ").next().expect("a first part");
        self.fresh.execute(sql).await;
    }

    pub(super) async fn end(self) {
        self.fresh.execute(&format!("DROP OWNED BY {0}; DROP ROLE {0}", self.role)).await;
    }
}

#[tokio::test]
async fn what_would_be_created_is_said_and_not_created() {
    let fresh = Fresh::new().await;
    let checked = check(fresh.config()).await;
    assert_eq!(checked.problems, [""; 0]);
    let found = checked.found.join(", ");
    assert!(found.contains("creates the table headworks_positions, creates the table telemetry"), "{found}");
    assert_eq!(tables(&fresh).await, [""; 0]);

    fresh.sink().open(&claim(), None).await.unwrap();
    let before = tables(&fresh).await;
    let checked = check(fresh.config()).await;
    assert_eq!((checked.problems, checked.warnings), (vec![], vec![]));
    assert!(checked.found.ends_with(&["table telemetry is there".to_owned()]), "{:?}", checked.found);
    assert_eq!(tables(&fresh).await, before);
}

#[tokio::test]
async fn a_check_takes_no_claim_from_the_host_that_writes() {
    let fresh = Fresh::new().await;
    let mut sink = fresh.sink();
    sink.open(&claim(), None).await.unwrap();
    assert_eq!(check(fresh.config()).await.problems, [""; 0]);
    let outcome = sink.commit(&rows([("a", "1")]), &[advance(0, 0, 1)]).await.unwrap();
    assert_eq!(outcome, Outcome::Committed(Written { written: 1, ignored: 0 }));
}

#[tokio::test]
async fn a_server_that_is_not_there_or_does_not_answer_is_given_up() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = Url(format!("postgres://writer@{}/iot", listener.local_addr().unwrap()));
    let config = Config {
        url,
        connect_timeout: crate::units::Period(std::time::Duration::from_secs(1)),
        ..Config::default()
    };
    // It accepts, as a port that a firewall or a hung server holds does, and says nothing.
    let said = problem(config.clone()).await;
    assert!(said.contains("no answer for 1 s"), "{said}");
    drop(listener);
    let said = problem(config).await;
    assert!(said.contains("Connection refused") && said.contains("; start the server"), "{said}");
}

#[tokio::test]
async fn a_wrong_database_role_or_host_is_named_with_what_to_do() {
    let fresh = Fresh::new().await;
    let target = Url(fresh.url.clone()).target();
    let (host, _) = target.split_once('/').unwrap();
    for (url, said, todo) in [
        (
            format!("postgres://postgres@{host}/nowhere"),
            "database \"nowhere\" does not exist",
            "create the database",
        ),
        (format!("postgres://nobody_{}@{target}", std::process::id()), "does not exist", "create the role"),
        (
            "postgres://writer@no-such-host.invalid/iot".to_owned(),
            "cannot connect to no-such-host",
            "host's name",
        ),
    ] {
        let problem = problem(Config { url: Url(url.clone()), ..fresh.config() }).await;
        assert!(problem.contains(said) && problem.contains(todo), "{url}: {problem}");
    }
}

#[tokio::test]
async fn a_table_that_does_not_fit_is_told_as_the_sink_would_tell_it() {
    for (table, change, said) in [
        ("CREATE TABLE telemetry (ts TIMESTAMPTZ, dev TEXT)", Config::default(), "has no column \"time\""),
        ("CREATE TABLE \"Telemetry\" ({TABLE})", Config::default(), "but there is Telemetry"),
        ("", Config { create: false, ..Config::default() }, "set `create: true`"),
        ("CREATE TABLE telemetry ({TABLE}, site TEXT NOT NULL)", Config::default(), "column \"site\""),
        (
            "CREATE TABLE telemetry ({TABLE})",
            Config { on_conflict: OnConflict::Upsert, ..Config::default() },
            "add one, such as PRIMARY KEY",
        ),
        (
            "CREATE TABLE telemetry ({TABLE}, CONSTRAINT once UNIQUE (device_id, time) DEFERRABLE)",
            Config { on_conflict: OnConflict::Ignore, ..Config::default() },
            "key once is DEFERRABLE",
        ),
        (
            "CREATE TABLE telemetry ({TABLE}, PRIMARY KEY (device_id, time));
             CREATE RULE r AS ON UPDATE TO telemetry DO ALSO NOTHING",
            Config { on_conflict: OnConflict::Upsert, ..Config::default() },
            "drop the rule, or set `on_conflict: reject`",
        ),
        (
            "CREATE TABLE readings ({TABLE}); CREATE VIEW telemetry AS SELECT DISTINCT * FROM readings",
            Config::default(),
            "cannot insert into view",
        ),
        (
            "CREATE TABLE telemetry (time TIMESTAMPTZ, device_id TEXT, location TEXT, metric TEXT,
                                     value DOUBLE PRECISION GENERATED ALWAYS AS (1) STORED)",
            Config::default(),
            "value",
        ),
        ("", Config { table: "iot.telemetry".to_owned(), ..Config::default() }, "CREATE SCHEMA \"iot\""),
    ] {
        let fresh = Fresh::with(table).await;
        let problem = problem(Config { url: Url(fresh.url.clone()), ..change }).await;
        assert!(problem.contains(said), "{table}: {problem}");
    }
}

#[tokio::test]
async fn each_right_that_is_missing_is_named_and_granting_it_is_enough() {
    let fresh =
        Fresh::with("CREATE TABLE telemetry (id SERIAL, {TABLE}, PRIMARY KEY (device_id, time))").await;
    let writer = Writer::new(&fresh).await;
    let database = fresh.url.rsplit('/').next().unwrap();
    fresh
        .execute(&format!(
            "REVOKE CREATE ON SCHEMA public FROM PUBLIC; REVOKE TEMPORARY ON DATABASE {database} FROM PUBLIC"
        ))
        .await;
    let upsert = Config { on_conflict: OnConflict::Upsert, ..writer.config() };
    let problems = check(upsert.clone()).await.problems;
    let expected =
        ["headworks_positions", "TEMPORARY", "telemetry_id_seq", "INSERT, UPDATE ON \"telemetry\""];
    assert_eq!(problems.len(), expected.len(), "{problems:?}");
    for (problem, expected) in problems.iter().zip(expected) {
        assert!(problem.contains(expected), "{expected}: {problem}");
        writer.follow(problem).await;
    }
    assert_eq!(check(upsert.clone()).await.problems, [""; 0]);
    let mut sink = self::sink(upsert.clone());
    sink.open(&claim(), None).await.expect("it may do all it needs");
    sink.commit(&rows([("a", "1")]), &[advance(0, 0, 1)]).await.unwrap();

    fresh.execute("ALTER TABLE headworks_positions OWNER TO postgres").await;
    let problem = problem(upsert.clone()).await;
    assert!(problem.contains("GRANT SELECT, INSERT, UPDATE ON headworks_positions"), "{problem}");
    writer.follow(&problem).await;
    assert_eq!(check(upsert.clone()).await.problems, [""; 0]);
    // As an earlier version made it.
    fresh.execute("ALTER TABLE headworks_positions DROP COLUMN openings").await;
    let problem = self::problem(upsert.clone()).await;
    let statement = problem.split('`').nth(1).unwrap_or_else(|| panic!("{problem}"));
    fresh.execute(statement).await;
    assert_eq!(check(upsert).await.problems, [""; 0]);
    drop(sink);
    writer.end().await;
}

#[tokio::test]
async fn positions_of_an_earlier_version_are_told_with_what_their_owner_has_to_run() {
    let fresh = Fresh::with("CREATE TABLE telemetry ({TABLE})").await;
    let writer = Writer::new(&fresh).await;
    fresh.sink().open(&claim(), None).await.unwrap();
    fresh
        .execute(&format!(
            "ALTER TABLE headworks_positions DROP COLUMN openings;
             GRANT SELECT, INSERT, UPDATE ON headworks_positions TO {0}; GRANT INSERT ON telemetry TO {0}",
            writer.role
        ))
        .await;
    let said = problem(writer.config()).await;
    let change = said.split('`').nth(1).unwrap_or_else(|| panic!("{said}"));
    assert!(said.contains("of an earlier version") && change.starts_with("ALTER TABLE"), "{said}");
    let of_owner = check_for(fresh.config(), vec![claim()]).await;
    assert!(of_owner.problems.is_empty() && of_owner.found.concat().contains("adds columns"), "{of_owner:?}");
    assert_eq!(of_owner.claims.len(), 1, "positions of that version are read");
    fresh.execute(change).await;
    assert_eq!(check(writer.config()).await.problems, [""; 0]);
    writer.end().await;
}

#[tokio::test]
async fn a_table_that_was_filled_and_is_gone_is_told_as_the_sink_would() {
    let fresh = Fresh::new().await;
    let mut sink = fresh.sink();
    sink.open(&claim(), None).await.unwrap();
    sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.unwrap();
    fresh.execute("DROP TABLE telemetry").await;
    let problems = check_for(fresh.config(), vec![claim()]).await.problems;
    let said = sink.open(&claim(), None).await.unwrap_err().to_string();
    assert!(said.ends_with(&problems[0]) && said.contains("written to before"), "{said}\n{problems:?}");
    // A claim of another data folder makes a table of its own.
    let other = Claim { log: uuid::Uuid::from_u128(1), ..claim() };
    let checked = check_for(fresh.config(), vec![other]).await;
    assert!(checked.problems.is_empty() && checked.found.concat().contains("creates"), "{checked:?}");
}

#[tokio::test]
async fn a_schema_that_may_not_be_used_is_named() {
    let fresh = Fresh::with("CREATE SCHEMA iot; CREATE TABLE iot.telemetry ({TABLE})").await;
    let writer = Writer::new(&fresh).await;
    fresh.execute("GRANT CREATE ON SCHEMA public TO PUBLIC").await;
    let config = Config { table: "iot.telemetry".to_owned(), ..writer.config() };
    let said = problem(config.clone()).await;
    assert!(said.contains("permission denied for schema iot") && said.contains("GRANT USAGE"), "{said}");
    writer.follow(&said).await;
    let said = problem(config.clone()).await;
    assert!(said.contains("GRANT INSERT ON \"iot\".\"telemetry\""), "{said}");
    writer.follow(&said).await;
    assert_eq!(check(config).await.problems, [""; 0]);
    writer.end().await;
}

#[tokio::test]
async fn ignore_on_a_table_without_a_unique_key_is_warned_of() {
    let fresh = Fresh::with("CREATE TABLE telemetry ({TABLE})").await;
    let ignore = Config { on_conflict: OnConflict::Ignore, ..fresh.config() };
    let checked = check(ignore.clone()).await;
    assert_eq!(checked.problems, [""; 0]);
    assert!(checked.warnings[0].contains("has no unique key"), "{:?}", checked.warnings);
    fresh.execute("CREATE UNIQUE INDEX ON telemetry (device_id, time)").await;
    assert_eq!(check(ignore.clone()).await.warnings, [""; 0]);
    // The row's key can be named, and two cannot.
    fresh.execute("ALTER TABLE telemetry ADD id SERIAL PRIMARY KEY").await;
    assert_eq!(check(ignore.clone()).await.warnings, [""; 0]);
    fresh.execute("CREATE UNIQUE INDEX ON telemetry (device_id, value)").await;
    let warnings = check(ignore).await.warnings;
    assert!(warnings[0].contains("a key which table telemetry fills itself"), "{warnings:?}");
}

#[tokio::test]
async fn ignore_at_keys_that_the_table_numbers_is_warned_of() {
    for id in ["id BIGSERIAL", "id BIGINT GENERATED BY DEFAULT AS IDENTITY"] {
        let fresh =
            Fresh::with(&format!("CREATE TABLE telemetry ({id}, {{TABLE}}, PRIMARY KEY (id, time))")).await;
        let ignore = Config { on_conflict: OnConflict::Ignore, ..fresh.config() };
        let warnings = check(ignore.clone()).await.warnings;
        assert!(warnings[0].contains("table telemetry has a column that the table numbers"), "{warnings:?}");
        fresh.execute("CREATE UNIQUE INDEX ON telemetry (device_id, time)").await;
        assert_eq!(check(ignore).await.warnings, [""; 0]);
    }
}

#[tokio::test]
async fn ignore_is_not_warned_of_where_only_partitions_have_a_unique_key_and_ignores_rows_there() {
    let parts = "CREATE TABLE telemetry ({TABLE}) PARTITION BY RANGE (time);
        CREATE TABLE old PARTITION OF telemetry FOR VALUES FROM (MINVALUE) TO ('2020-01-01');
        CREATE TABLE new PARTITION OF telemetry FOR VALUES FROM ('2020-01-01') TO (MAXVALUE)
            PARTITION BY LIST (device_id);
        CREATE TABLE one PARTITION OF new FOR VALUES IN ('a'); CREATE TABLE others PARTITION OF new DEFAULT";
    let fresh = Fresh::with(parts).await;
    let ignore = Config { on_conflict: OnConflict::Ignore, ..fresh.config() };
    assert!(check(ignore.clone()).await.warnings[0].contains("has no unique key"));
    fresh.execute("CREATE UNIQUE INDEX ON one (device_id)").await;
    let checked = check(ignore.clone()).await;
    assert_eq!((checked.problems, checked.warnings), (vec![], vec![]));
    let mut sink = super::sink(ignore);
    sink.open(&claim(), None).await.unwrap();
    let messages = rows([message("a", "1"), message("a", "2"), message("b", "3")]);
    let outcome = sink.commit(&messages, &[advance(0, 0, 3)]).await.unwrap();
    assert_eq!(outcome, Outcome::Committed(Written { written: 2, ignored: 1 }));
    // It has no name that ON CONFLICT takes.
    let upsert = Config { on_conflict: OnConflict::Upsert, ..fresh.config() };
    assert!(check(upsert).await.problems[0].contains("needs a unique key"));
}

#[tokio::test]
async fn a_wrong_password_and_a_server_without_tls_are_told_with_what_to_do() {
    let (server, ca) = tokio::task::spawn_blocking(super::access::guarded).await.unwrap();
    let config = |mode: SslMode, password: &str| Config {
        url: Url(format!("postgres://writer@localhost:{}/iot", server.port)),
        password: Some(Password::File(server.write("password", password))),
        sslmode: Some(mode),
        ..Config::default()
    };
    let said = problem(config(SslMode::Require, "close sesame")).await;
    assert!(said.contains("password authentication failed") && said.contains("`password`"), "{said}");
    assert!(!said.contains("sesame"), "{said}");
    let said = problem(config(SslMode::Disable, "open sesame")).await;
    assert!(said.contains("pg_hba.conf"), "{said}");
    let ca = Tls { ca: Some(ca), ..Tls::default() };
    let good = Config { tls: ca.clone(), ..config(SslMode::VerifyFull, "open sesame") };
    assert_eq!(check(good).await.problems, [""; 0]);
    tokio::task::spawn_blocking(move || drop(server)).await.unwrap();

    let fresh = Fresh::new().await;
    let said = problem(Config { sslmode: Some(SslMode::Require), ..fresh.config() }).await;
    assert!(said.contains("does not support TLS") && said.contains("ssl = on"), "{said}");
}
