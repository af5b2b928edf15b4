//! The table changes while the sink runs: nothing wrong is written, nothing good is rejected.

use super::*;

#[tokio::test]
async fn a_table_that_changed_is_bound_again_before_a_row_is_written_or_rejected() {
    const OTHER: &str =
        "time TIMESTAMPTZ NOT NULL, device_id TEXT NOT NULL, location TEXT, metric TEXT NOT NULL, value";
    for change in [
        "ALTER TABLE telemetry ALTER COLUMN value TYPE BIGINT",
        "ALTER TABLE telemetry ALTER COLUMN value TYPE REAL",
        "ALTER TABLE telemetry ALTER COLUMN value TYPE TEXT",
        "ALTER TABLE telemetry ALTER COLUMN value TYPE NUMERIC(9, 3)",
        "ALTER TABLE telemetry ALTER COLUMN time TYPE BIGINT USING 0",
        "ALTER TABLE telemetry ALTER COLUMN location SET NOT NULL, ALTER COLUMN location SET DEFAULT ''",
        &format!("ALTER TABLE telemetry RENAME TO before; CREATE TABLE telemetry ({OTHER} BIGINT)"),
        &format!("DROP TABLE telemetry; CREATE TABLE telemetry ({OTHER} TEXT)"),
    ] {
        for warm in [0, 1] {
            let fresh = Fresh::with("CREATE TABLE telemetry ({TABLE})").await;
            let mut sink = fresh.sink();
            sink.open(&claim(), None).await.unwrap();
            for n in 0..warm {
                sink.commit(
                    &rows([message("a", r#"{"value": 21, "location": "x"}"#)]),
                    &[advance(0, n, n + 1)],
                )
                .await
                .unwrap();
            }
            fresh.execute(change).await;
            let next = rows((0..50).map(|_| ("a", r#"{"value": 22, "location": "x"}"#)));
            let steps = [advance(0, warm, warm + 50)];
            let error = sink.commit(&next, &steps).await.unwrap_err();
            assert!(matches!(error, Error::Retry(_)), "{change}: {error:?}");
            sink.open(&claim(), None).await.unwrap();
            let outcome = sink.commit(&next, &steps).await.unwrap();
            assert_eq!(outcome, Outcome::Committed(Written { written: 50, ignored: 0 }), "{change}");
            let row = fresh
                .client()
                .await
                .query_one("SELECT count(*) FROM telemetry WHERE value::text IN ('22', '22.000')", &[])
                .await
                .unwrap();
            assert_eq!(row.get::<_, i64>(0), 50, "{change}");
        }
    }
}

#[tokio::test]
async fn what_the_table_wants_since_then_is_said_and_no_row_is_rejected_for_it() {
    let fresh = Fresh::with("CREATE TABLE telemetry ({TABLE})").await;
    let mut sink = fresh.sink();
    sink.open(&claim(), None).await.unwrap();
    fresh.execute("ALTER TABLE telemetry ADD COLUMN site TEXT NOT NULL").await;
    let error = sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.unwrap_err();
    assert!(matches!(error, Error::Retry(_)), "{error:?}");
    let error = sink.open(&claim(), None).await.unwrap_err();
    assert!(matches!(&error, Error::Setup(text) if text.contains("column \"site\"")), "{error:?}");
}

#[tokio::test]
async fn a_table_that_was_filled_and_is_gone_is_not_created_again() {
    let fresh = Fresh::new().await;
    let mut sink = fresh.sink();
    sink.open(&claim(), None).await.unwrap();
    sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.unwrap();
    fresh.execute("DROP TABLE telemetry").await;
    sink.commit(&rows([message("a", "2")]), &[advance(0, 1, 2)]).await.unwrap_err();
    let error = sink.open(&claim(), None).await.unwrap_err();
    assert!(matches!(&error, Error::Setup(text) if text.contains("it was dropped or renamed")), "{error:?}");
}

#[tokio::test]
async fn a_name_in_other_case_makes_no_second_table() {
    let fresh = Fresh::with("CREATE TABLE telemetry_x ({TABLE}); CREATE TABLE \"site.1\" ({TABLE})").await;
    let config = Config { table: "Telemetry_X".to_owned(), ..fresh.config() };
    let error = sink(config).open(&claim(), None).await.unwrap_err();
    assert!(
        matches!(&error, Error::Setup(text) if text.contains("no table Telemetry_X, but there is telemetry_x: ")),
        "{error:?}"
    );
    let config = Config { table: "public.\"site.1\"".to_owned(), create: false, ..fresh.config() };
    sink(config).open(&claim(), None).await.unwrap();
}

#[tokio::test]
async fn a_key_that_the_table_fills_itself_does_not_slow_copy() {
    let fresh =
        Fresh::with("CREATE TABLE telemetry (id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, {TABLE})")
            .await;
    let config = Config { on_conflict: OnConflict::Ignore, ..fresh.config() };
    let mut sink = sink(config);
    sink.open(&claim(), None).await.unwrap();
    assert!(!sink.is_staged());
    fresh.execute("CREATE UNIQUE INDEX ON telemetry (device_id, value)").await;
    let batch = rows([message("a", "1"), message("a", "1")]);
    sink.commit(&batch, &[advance(0, 0, 2)]).await.unwrap_err();
    sink.open(&claim(), None).await.unwrap();
    assert!(sink.is_staged());
    let outcome = sink.commit(&batch, &[advance(0, 0, 2)]).await.unwrap();
    assert_eq!(outcome, Outcome::Committed(Written { written: 1, ignored: 1 }));
}

#[tokio::test]
async fn a_table_under_row_level_security_is_written() {
    let fresh = Fresh::new().await;
    let role = format!("r{}", uuid::Uuid::new_v4().simple());
    fresh
        .execute(&format!(
            "CREATE ROLE {role} LOGIN PASSWORD 'x'; GRANT CREATE ON SCHEMA public TO {role};
             CREATE TABLE telemetry ({TABLE}); GRANT INSERT ON telemetry TO {role};
             ALTER TABLE telemetry ENABLE ROW LEVEL SECURITY;
             CREATE POLICY p ON telemetry FOR INSERT TO {role} WITH CHECK (value < 100)"
        ))
        .await;
    let config = Config {
        url: Url(fresh.url.replacen("postgres://postgres@", &format!("postgres://{role}:x@"), 1)),
        ..fresh.config()
    };
    let mut sink = sink(config);
    sink.open(&claim(), None).await.unwrap();
    let refused = rejected(sink.commit(&rows([("a", "1"), ("a", "500")]), &[advance(0, 0, 2)]).await);
    assert_eq!((refused.len(), refused[0].row), (1, 1));
    assert_eq!(sink.finish().await.unwrap().written, 1);
    drop(sink);
    fresh.execute(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
}

#[tokio::test]
async fn the_default_of_a_domain_fills_its_column() {
    let fresh = Fresh::with(
        "CREATE DOMAIN source AS TEXT NOT NULL DEFAULT 'mqtt'; CREATE DOMAIN origin AS source;
         CREATE TABLE telemetry ({TABLE}, source source, origin origin)",
    )
    .await;
    let mut sink = fresh.sink();
    sink.open(&claim(), None).await.unwrap();
    sink.commit(&rows([message("a", "1")]), &[advance(0, 0, 1)]).await.unwrap();
    let row = fresh.client().await.query_one("SELECT source, origin FROM telemetry", &[]).await.unwrap();
    assert_eq!((row.get(0), row.get(1)), ("mqtt", "mqtt"));
    // NOT NULL counts wherever it is said.
    let fresh = Fresh::with(
        "CREATE DOMAIN known AS TEXT NOT NULL; CREATE DOMAIN place AS known;
         CREATE TABLE telemetry ({TABLE}, place place)",
    )
    .await;
    let error = fresh.sink().open(&claim(), None).await.unwrap_err();
    assert!(matches!(&error, Error::Setup(text) if text.contains("column \"place\"")), "{error:?}");
}

/// Schemas that a user's `search_path` names and that do not exist yet are searched once they do.
#[tokio::test]
async fn rows_never_go_to_another_table_than_the_one_that_is_bound() {
    for on_conflict in [OnConflict::Reject, OnConflict::Ignore, OnConflict::Upsert] {
        let fresh = Fresh::with("CREATE TABLE telemetry ({TABLE}, PRIMARY KEY (device_id, value))").await;
        let mut sink = sink(Config { on_conflict, ..fresh.config() });
        sink.open(&claim(), None).await.unwrap();
        sink.commit(&rows([("a", "1"), ("b", "2")]), &[advance(0, 0, 2)]).await.unwrap();
        let table = TABLE.replace("DOUBLE PRECISION", "BIGINT");
        fresh
            .execute(&format!(
                "CREATE SCHEMA AUTHORIZATION CURRENT_USER;
                 CREATE TABLE telemetry ({table}, PRIMARY KEY (device_id, value))"
            ))
            .await;
        let batch = rows([("a", "22"), ("b", "x"), ("a", "23")]);
        let error = sink.commit(&batch, &[advance(0, 2, 5)]).await.unwrap_err();
        assert!(matches!(&error, Error::Retry(text) if text.contains("no longer means")), "{error:?}");
        sink.open(&claim(), None).await.unwrap();
        let refused = rejected(sink.commit(&batch, &[advance(0, 2, 5)]).await);
        assert_eq!(refused.len(), 1, "{refused:?}");
        sink.finish().await.unwrap();
        let rows = fresh
            .client()
            .await
            .query_one(
                "SELECT (SELECT count(*) FROM public.telemetry), (SELECT sum(value)::bigint FROM telemetry)",
                &[],
            )
            .await
            .unwrap();
        assert_eq!((rows.get::<_, i64>(0), rows.get::<_, i64>(1)), (2, 45));
    }
}

#[tokio::test]
async fn tables_whose_rows_are_not_there_exactly_once_are_warned_of() {
    let server = "CREATE EXTENSION file_fdw; CREATE SERVER files FOREIGN DATA WRAPPER file_fdw;";
    for (sql, expected) in [
        ("CREATE UNLOGGED TABLE telemetry ({TABLE})", "is UNLOGGED"),
        (
            "CREATE TABLE telemetry ({TABLE}) PARTITION BY LIST (device_id);
             CREATE UNLOGGED TABLE a PARTITION OF telemetry DEFAULT",
            "is UNLOGGED",
        ),
        (
            &format!(
                "{server} CREATE TABLE telemetry ({{TABLE}}) PARTITION BY LIST (device_id);
                 CREATE FOREIGN TABLE a PARTITION OF telemetry DEFAULT SERVER files OPTIONS (filename '/dev/null')"
            ),
            "is a foreign table",
        ),
    ] {
        let fresh = Fresh::with(sql).await;
        let checked = check("warehouse", &fresh.config(), Arc::default(), vec![claim()]).await;
        assert!(checked.warnings.iter().any(|warning| warning.contains(expected)), "{:?}", checked.warnings);
    }
}
