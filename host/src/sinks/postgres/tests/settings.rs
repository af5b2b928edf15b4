//! Settings that a database or a role brings along do not change what a sink writes.

use futures_util::future::join;

use super::*;

impl Fresh {
    /// With a table, and settings of the database.
    async fn set(sql: &str, settings: &[&str]) -> Self {
        let fresh = Self::with(sql).await;
        let client = fresh.client().await;
        let database: String = client.query_one("SELECT current_database()::text", &[]).await.unwrap().get(0);
        for setting in settings {
            client.batch_execute(&format!("ALTER DATABASE {database} SET {setting}")).await.unwrap();
        }
        fresh
    }
}

mod with_other_defaults {
    use super::*;

    conformance_tests!(
        Fresh::set(
            "CREATE TABLE telemetry ({TABLE})",
            &[
                "default_transaction_isolation = 'serializable'",
                "default_transaction_deferrable = on",
                "array_nulls = off",
                "transform_null_equals = on",
                "quote_all_identifiers = on",
                "standard_conforming_strings = off",
                "bytea_output = 'escape'",
                "extra_float_digits = -15",
                "DateStyle = 'SQL, DMY'",
                "TimeZone = 'Asia/Kolkata'",
                "IntervalStyle = 'sql_standard'",
                "plpgsql.extra_errors = 'all'",
                "plpgsql.variable_conflict = 'error'",
            ]
        )
        .await
    );
}

#[tokio::test]
async fn a_table_that_changes_while_a_batch_waits_for_it_is_bound_again_at_each_default_isolation() {
    for level in ["read committed", "repeatable read", "serializable"] {
        for on_conflict in [OnConflict::Reject, OnConflict::Upsert] {
            let isolation = format!("default_transaction_isolation = '{level}'");
            let fresh = Fresh::set("CREATE TABLE telemetry ({TABLE}, UNIQUE (value))", &[&isolation]).await;
            let mut sink = sink(Config { on_conflict, ..fresh.config() });
            sink.open(&claim(), None).await.unwrap();
            sink.commit(&rows([("a", "1")]), &[advance(0, 0, 1)]).await.unwrap();
            let (other, watch) = (fresh.client().await, fresh.client().await);
            other.batch_execute("BEGIN; ALTER TABLE telemetry ALTER COLUMN value TYPE bigint").await.unwrap();
            let release = async {
                let waits = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND relation = 'telemetry'::regclass
                     AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))";
                while !watch.query_one(waits, &[]).await.unwrap().get::<_, bool>(0) {}
                other.batch_execute("COMMIT").await.unwrap();
            };
            let next = rows([("a", "1000")]);
            let (outcome, ()) = join(sink.commit(&next, &[advance(0, 1, 2)]), release).await;
            assert!(matches!(outcome, Err(Error::Retry(_))), "{level}: {outcome:?}");
            sink.open(&claim(), None).await.unwrap();
            sink.commit(&next, &[advance(0, 1, 2)]).await.unwrap();
            let values = watch.query("SELECT value FROM telemetry ORDER BY value", &[]).await.unwrap();
            let values: Vec<i64> = values.iter().map(|row| row.get(0)).collect();
            assert_eq!(values, [1, 1_000], "{level}");
        }
    }
}

#[tokio::test]
async fn a_database_that_is_read_only_by_default_is_not_written() {
    let setting = "default_transaction_read_only = on";
    let fresh = Fresh::set("CREATE TABLE telemetry ({TABLE})", &[setting]).await;
    let error = fresh.sink().open(&claim(), None).await.unwrap_err();
    assert!(matches!(&error, Error::Retry(text) if text.contains("read-only transaction")), "{error:?}");
}

#[tokio::test]
async fn a_null_in_an_array_is_null_whatever_array_nulls_says() {
    let fresh =
        Fresh::set("CREATE TABLE telemetry (device_id TEXT, tags TEXT[])", &["array_nulls = off"]).await;
    let columns = columns(&[("device_id", "$device"), ("tags", "/tags")]);
    let mut sink = sink(Config { columns, ..fresh.config() });
    sink.open(&claim(), None).await.unwrap();
    sink.commit(&rows([("a", r#"{"tags": ["x", null, "NULL"]}"#)]), &[advance(0, 0, 1)]).await.unwrap();
    let row = fresh.client().await.query_one("SELECT tags FROM telemetry", &[]).await.unwrap();
    let tags: Vec<Option<&str>> = row.get(0);
    assert_eq!(tags, [Some("x"), None, Some("NULL")]);
}

#[tokio::test]
async fn names_that_the_server_writes_are_the_same_whatever_quote_all_identifiers_says() {
    let fresh = Fresh::set(
        "CREATE TABLE telemetry (device_id TEXT, code CHAR(3), docs JSON[], more JSONB[])",
        &["quote_all_identifiers = on"],
    )
    .await;
    let columns =
        columns(&[("device_id", "$device"), ("code", "/code"), ("docs", "/docs"), ("more", "/docs")]);
    let config = Config { columns, ..fresh.config() };
    let mut sink = sink(config.clone());
    sink.open(&claim(), None).await.unwrap();
    let good = ("a", r#"{"code": "abc", "docs": ["x", 1, {"y": "z"}]}"#);
    let refused =
        rejected(sink.commit(&rows([good, ("a", r#"{"code": "abcd"}"#)]), &[advance(0, 0, 2)]).await);
    assert!(refused[0].code.is_none() && refused[0].reason.contains("column's length"), "{refused:?}");
    sink.finish().await.unwrap();
    let client = fresh.client().await;
    let row = client.query_one("SELECT docs::text, more::text FROM telemetry", &[]).await.unwrap();
    let (docs, more): (&str, &str) = (row.get(0), row.get(1));
    assert_eq!(docs, r#"{"\"x\"",1,"{\"y\": \"z\"}"}"#);
    assert_eq!(more, docs);
    // What filled the table before is recognized, whatever the setting was then.
    let database: String = client.query_one("SELECT current_database()::text", &[]).await.unwrap().get(0);
    client.batch_execute(&format!("ALTER DATABASE {database} RESET quote_all_identifiers")).await.unwrap();
    let renamed = Claim { sink: "other".to_owned(), ..claim() };
    let opened = super::sink(config).open(&renamed, None).await.unwrap();
    assert_eq!(opened.found.others, [(claim().pipeline, claim().sink)]);
}

#[tokio::test]
async fn a_name_with_a_backslash_is_the_same_whatever_standard_conforming_strings_says() {
    for setting in ["on", "off"] {
        let setting = format!("standard_conforming_strings = {setting}");
        let fresh = Fresh::set(r#"SELECT"#, &[&setting]).await;
        let columns = columns(&[(r"level\n", "/v"), ("device", "$device")]);
        let table = r"read\nings".to_owned();
        let sql = format!(r#"CREATE TABLE "{table}" ("level\n" interval, device TEXT)"#);
        fresh.execute(&sql).await;
        let mut sink = sink(Config { columns, table, ..fresh.config() });
        sink.open(&claim(), None).await.unwrap();
        let values = [("a", r#"{"v":"1 day"}"#), ("a", r#"{"v":"5 parsecs"}"#)];
        let refused = rejected(sink.commit(&rows(values), &[advance(0, 0, 2)]).await);
        assert!(refused[0].reason.starts_with(r#"column "level\n": "#), "{setting}: {refused:?}");
        sink.finish().await.unwrap();
    }
}

/// The table's defaults read what the session of the sink has.
#[tokio::test]
async fn a_session_has_no_limit_of_idleness_or_of_a_whole_transaction() {
    const LIMITS: [&str; 2] = ["idle_session_timeout", "transaction_timeout"];
    let limit = |name| format!("{name} TEXT DEFAULT current_setting('{name}', true)");
    let sql = format!("CREATE TABLE telemetry ({{TABLE}}, {})", LIMITS.map(limit).join(", "));
    let fresh = Fresh::with(&sql).await;
    let client = fresh.client().await;
    let mut known = Vec::new();
    for name in LIMITS {
        let sql = "SELECT FROM pg_settings WHERE name = $1";
        if client.query_opt(sql, &[&name]).await.unwrap().is_some() {
            known.push(name);
        }
    }
    let database: String = client.query_one("SELECT current_database()::text", &[]).await.unwrap().get(0);
    for name in &known {
        client.batch_execute(&format!("ALTER DATABASE {database} SET {name} = '1h'")).await.unwrap();
    }
    let mut sink = fresh.sink();
    sink.open(&claim(), None).await.unwrap();
    sink.commit(&rows([("a", "1")]), &[advance(0, 0, 1)]).await.unwrap();
    for name in known {
        let row = client.query_one(&format!("SELECT {name} FROM telemetry"), &[]).await.unwrap();
        assert_eq!(row.get::<_, &str>(0), "0", "{name}");
    }
}
