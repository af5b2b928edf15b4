//! What is written reads back, and what does not fit is named.

use super::*;

#[tokio::test]
async fn a_row_that_is_there_is_left_alone_where_a_unique_key_says_so() {
    let fresh = Fresh::new().await;
    let mut sink = fresh.sink();
    sink.open(&claim()).await.unwrap();
    fresh.execute("CREATE UNIQUE INDEX ON telemetry (device_id, value)").await;
    sink.open(&claim()).await.unwrap();
    let batch = rows([message("a", "1"), message("a", "1"), message("a", "2")]);
    sink.commit(&batch, &[advance(0, 0, 3)]).await.unwrap();
    sink.commit(&batch, &[advance(0, 3, 6)]).await.unwrap();
    assert_eq!(fresh.written().await.len(), 2);

    let refuse = Config { on_conflict: OnConflict::Refuse, ..fresh.config() };
    let mut refusing = self::sink(refuse);
    refusing.open(&claim()).await.unwrap();
    let batch = rows([message("b", "1"), message("a", "2")]);
    let error = refusing.commit(&batch, &[advance(0, 6, 8)]).await.unwrap_err();
    let Error::Rows(refused) = error else { panic!("{error:?}") };
    assert_eq!(refused[0].row, 1, "{refused:?}");
    assert!(refused[0].reason.contains("23505"), "{refused:?}");
}

#[tokio::test]
async fn the_server_names_the_row_that_it_refuses() {
    let fresh = Fresh::new().await;
    fresh
        .execute(
            "CREATE TABLE telemetry (time TIMESTAMPTZ, device_id VARCHAR(3), location TEXT, metric TEXT,
             value DOUBLE PRECISION CHECK (value < 100))",
        )
        .await;
    let mut sink = fresh.sink();
    sink.open(&claim()).await.unwrap();
    // 22001: too long for its column. 23514: check.
    for (bad, code) in [(("long", "5"), "22001"), (("a", "500"), "23514")] {
        let many = rows((0..2_000).map(|i| if i == 1_777 { bad } else { ("a", "5") }));
        let error = sink.commit(&many, &[advance(0, 0, 2_000)]).await.unwrap_err();
        let Error::Rows(refused) = error else { panic!("{error:?}") };
        assert_eq!(refused.iter().map(|row| row.row).collect::<Vec<_>>(), [1_777], "{refused:?}");
        assert!(refused[0].reason.contains(code), "{refused:?}");
    }
    // Usable as it is, without another open.
    sink.commit(&rows([message("a", "5")]), &[advance(0, 0, 1)]).await.unwrap();
}

#[tokio::test]
async fn every_type_that_is_written_reads_back() {
    let fresh = Fresh::new().await;
    fresh
        .execute(
            "CREATE DOMAIN celsius AS REAL CHECK (value > -274);
             CREATE TABLE readings (i2 SMALLINT, i4 INTEGER, i8 BIGINT, f4 celsius, f8 DOUBLE PRECISION,
             n NUMERIC, n2 NUMERIC, n3 NUMERIC, n4 NUMERIC, b BOOLEAN, t TEXT, v VARCHAR(20), tz TIMESTAMPTZ,
             ts TIMESTAMP, d DATE, j JSON, jb JSONB, by BYTEA, u UUID, nothing TEXT)",
        )
        .await;
    let names = [
        "i2", "i4", "i8", "f4", "f8", "n", "n2", "n3", "n4", "b", "t", "v", "tz", "ts", "d", "j", "jb", "u",
        "nothing",
    ];
    let pointers: Vec<String> = names.iter().map(|name| format!("/{name}")).collect();
    let mut pairs: Vec<(&str, &str)> = names.into_iter().zip(pointers.iter().map(String::as_str)).collect();
    pairs.push(("by", "$topic"));
    let config = Config { table: "public.readings".to_owned(), columns: columns(&pairs), ..fresh.config() };
    let mut sink = self::sink(config);
    sink.open(&claim()).await.unwrap();
    let payload = r#"{"i2":-7,"i4":70000,"i8":9007199254740993,"f4":21.5,"f8":1e-3,"n":-12345.67890,"n2":1e20,
        "n3":0.00012,"n4":100000000,"b":true,"t":"caf\u00e9 \"x\"","v":12.50,"tz":1771840800123,
        "ts":"2026-02-23T12:00:00+02:00","d":"2026-02-23T23:00:00Z","j":{"a": [1]},"jb":[1, 2],
        "u":"a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11","nothing":null}"#;
    sink.commit(&rows([("s", payload)]), &[advance(0, 0, 1)]).await.unwrap();
    let client = fresh.client().await;
    client.batch_execute("SET timezone = 'UTC'").await.unwrap();
    let row = client.query_one("SELECT row_to_json(readings)::text FROM readings", &[]).await.unwrap();
    let row: serde_json::Value = serde_json::from_str(row.get(0)).unwrap();
    let numbers = client.query_one("SELECT concat_ws(' ', n, n2, n3, n4) FROM readings", &[]).await.unwrap();
    assert_eq!(numbers.get::<_, &str>(0), "-12345.67890 100000000000000000000 0.00012 100000000");
    for (name, expected) in [
        ("i2", serde_json::json!(-7)),
        ("i4", serde_json::json!(70_000)),
        ("i8", serde_json::json!(9_007_199_254_740_993_i64)),
        ("f4", serde_json::json!(21.5)),
        ("f8", serde_json::json!(0.001)),
        ("b", serde_json::json!(true)),
        ("t", serde_json::json!("café \"x\"")),
        ("v", serde_json::json!("12.50")),
        ("tz", serde_json::json!("2026-02-23T10:00:00.123+00:00")),
        ("ts", serde_json::json!("2026-02-23T10:00:00")),
        ("d", serde_json::json!("2026-02-23")),
        ("j", serde_json::json!({"a": [1]})),
        ("jb", serde_json::json!([1, 2])),
        ("u", serde_json::json!("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11")),
        ("nothing", serde_json::Value::Null),
    ] {
        assert_eq!(row[name], expected, "{name}");
    }
}

#[tokio::test]
async fn a_table_that_does_not_fit_is_an_error_that_names_the_column() {
    let base = "time TIMESTAMPTZ, device_id TEXT, location TEXT, metric TEXT";
    for (table, expected) in [
        (
            format!("{base}, reading REAL"),
            "no column \"value\": it has time, device_id, location, metric, reading",
        ),
        (
            format!("{base}, value POINT"),
            "column \"value\" of table telemetry is point, which cannot be written",
        ),
        (format!("{base}, value REAL, site TEXT NOT NULL"), "column \"site\" of table telemetry is NOT NULL"),
    ] {
        let fresh = Fresh::new().await;
        fresh.execute(&format!("CREATE TABLE telemetry ({table})")).await;
        let error = fresh.sink().open(&claim()).await.unwrap_err();
        assert!(matches!(error, Error::Setup(_)), "{error:?}");
        assert!(error.to_string().contains(expected), "{error}");
    }
    let fresh = Fresh::new().await;
    let config = Config { create: false, ..fresh.config() };
    let error = sink(config).open(&claim()).await.unwrap_err();
    assert!(matches!(&error, Error::Setup(text) if text.contains("no table telemetry")), "{error:?}");
}

#[tokio::test]
async fn a_batch_of_many_chunks_is_one_transaction() {
    let fresh = Fresh::new().await;
    let mut sink = fresh.sink();
    let claim = Claim { partitions: 4, ..claim() };
    sink.open(&claim).await.unwrap();
    let filler = "x".repeat(1_000);
    let payload = format!("{{\"value\": 1.5, \"location\": \"{filler}\"}}");
    let many = rows((0..5_000).map(|_| ("a", payload.as_str())));
    let steps: Vec<_> = (0..4).map(|partition| advance(partition, 0, 5_000)).collect();
    sink.commit(&many, &steps).await.unwrap();
    let row = fresh
        .client()
        .await
        .query_one("SELECT count(*), count(DISTINCT xmin::text), min(length(location)) FROM telemetry", &[])
        .await
        .unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1), row.get::<_, i32>(2)), (5_000, 1, 1_000));
}
