//! What is written reads back, and what does not fit is named.

use super::*;

#[tokio::test]
async fn every_type_that_is_written_reads_back() {
    // Types without a binary form of ours make all columns pass through the staging table.
    for more in ["", ", e state", ", e state, a address, iv INTERVAL, bits BIT(4), c CHAR(3), tags INTEGER[]"]
    {
        reads_back(more).await;
    }
}

async fn reads_back(more: &str) {
    let fresh = Fresh::new().await;
    fresh
        .execute(&format!(
            "CREATE DOMAIN kelvinish AS REAL CHECK (value > -274); CREATE DOMAIN celsius AS kelvinish;
             CREATE TYPE state AS ENUM ('on', 'off'); CREATE DOMAIN address AS INET;
             CREATE TABLE readings (i2 SMALLINT, i4 INTEGER, i8 BIGINT, f4 celsius, f8 DOUBLE PRECISION,
             n NUMERIC, n2 NUMERIC, n3 NUMERIC, n4 NUMERIC, b BOOLEAN, t TEXT, v VARCHAR(20), tz TIMESTAMPTZ,
             ts TIMESTAMP, d DATE, j JSON, jb JSONB, by BYTEA, u UUID, nothing TEXT{more})",
        ))
        .await;
    let mut names = vec![
        "i2", "i4", "i8", "f4", "f8", "n", "n2", "n3", "n4", "b", "t", "v", "tz", "ts", "d", "j", "jb", "u",
        "nothing",
    ];
    names.extend(more.split(", ").filter_map(|column| column.split_once(' ')).map(|(name, _)| name));
    let pointers: Vec<String> = names.iter().map(|name| format!("/{name}")).collect();
    let mut pairs: Vec<(&str, &str)> =
        names.iter().copied().zip(pointers.iter().map(String::as_str)).collect();
    pairs.push(("by", "$topic"));
    let config = Config { table: "public.readings".to_owned(), columns: columns(&pairs), ..fresh.config() };
    let mut sink = self::sink(config);
    sink.open(&claim(), None).await.unwrap();
    let payload = r#"{"i2":-7,"i4":70000,"i8":9007199254740993,"f4":21.5,"f8":1e-3,"n":-12345.67890,"n2":1e20,
        "n3":0.00012,"n4":100000000,"b":true,"t":"caf\u00e9 \"x\"","v":12.50,"tz":1771840800123,
        "ts":"2026-02-23T12:00:00+02:00","d":"2026-02-23T23:00:00Z","j":{"a": [1]},"jb":[1, 2],
        "u":"a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11","nothing":null,"e":"off","a":"10.0.0.7","iv":"90 minutes",
        "bits":"1010","c":"abc","tags":"{1,2}"}"#;
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
        ("e", serde_json::json!("off")),
        ("a", serde_json::json!("10.0.0.7")),
        ("iv", serde_json::json!("01:30:00")),
        ("bits", serde_json::json!("1010")),
        ("c", serde_json::json!("abc")),
        ("tags", serde_json::json!([1, 2])),
    ]
    .into_iter()
    .filter(|(name, _)| names.contains(name))
    {
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
            "time INTEGER, device_id TEXT, location TEXT, metric TEXT, value REAL".to_owned(),
            "column \"time\" of table telemetry is integer, which cannot hold a time",
        ),
        (format!("{base}, value REAL, site TEXT NOT NULL"), "column \"site\" of table telemetry is NOT NULL"),
    ] {
        let fresh = Fresh::new().await;
        fresh.execute(&format!("CREATE TABLE telemetry ({table})")).await;
        let error = fresh.sink().open(&claim(), None).await.unwrap_err();
        assert!(matches!(error, Error::Setup(_)), "{error:?}");
        assert!(error.to_string().contains(expected), "{error}");
    }
    let fresh = Fresh::new().await;
    let config = Config { create: false, ..fresh.config() };
    let error = sink(config).open(&claim(), None).await.unwrap_err();
    assert!(matches!(&error, Error::Setup(text) if text.contains("no table telemetry")), "{error:?}");
}

#[tokio::test]
async fn a_batch_of_many_chunks_is_one_transaction() {
    let fresh = Fresh::new().await;
    let mut sink = fresh.sink();
    let claim = Claim { partitions: 4, ..claim() };
    sink.open(&claim, None).await.unwrap();
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

#[tokio::test]
async fn a_bigint_holds_times_in_the_unit_that_the_config_says() {
    let fresh =
        Fresh::with("CREATE TABLE telemetry (s BIGINT, ms BIGINT, us BIGINT, raw BIGINT, own BIGINT)").await;
    let columns = serde_json::from_value(serde_json::json!({
        "s": { "from": "$time", "unit": "s" },
        "ms": { "from": "$time", "unit": "ms" },
        "us": "$received",
        "raw": "/ts",
        "own": { "from": "/ts", "unit": "ms", "zone": "+02:00" },
    }));
    let mut sink = self::sink(Config { columns: columns.unwrap(), ..fresh.config() });
    sink.open(&claim(), None).await.unwrap();
    let batch = rows([message("a", r#"{"ts": 1771840800}"#)]);
    sink.commit(&batch, &[advance(0, 0, 1)]).await.unwrap();
    let row = fresh
        .client()
        .await
        .query_one("SELECT ARRAY[s, ms, us, raw, own] FROM telemetry", &[])
        .await
        .unwrap();
    let expected: Vec<i64> =
        vec![1_771_840_800, 1_771_840_800_123, 1_771_840_800_123_456, 1_771_840_800, 1_771_840_800_000];
    assert_eq!(row.get::<_, Vec<i64>>(0), expected);
}

#[tokio::test]
async fn rules_of_the_table_hold_for_every_row_whatever_its_neighbours() {
    const ALARMS: &str = "CREATE RULE alarm AS ON INSERT TO telemetry WHERE NEW.value > 50
                          DO ALSO INSERT INTO alarms VALUES (NEW.value)";
    let fresh = Fresh::with(
        "CREATE TABLE telemetry ({TABLE}, CHECK (value < 100)); CREATE TABLE alarms (value FLOAT8)",
    )
    .await;
    let mut sink = fresh.sink();
    sink.open(&claim(), None).await.unwrap();
    sink.commit(&rows([("a", "60")]), &[advance(0, 0, 1)]).await.unwrap();
    // One that is made or dropped meanwhile holds from then on.
    for (change, alarms) in [(ALARMS, 2), ("DROP RULE alarm ON telemetry", 2)] {
        fresh.execute(change).await;
        let clean = rows([("a", "60"), ("a", "5")]);
        let error = sink.commit(&clean, &[advance(0, 1, 3)]).await.unwrap_err();
        assert!(matches!(error, Error::Retry(_)), "{error:?}");
        sink.open(&claim(), None).await.unwrap();
        sink.commit(&clean, &[advance(0, 1, 1)]).await.unwrap();
        rejected(sink.commit(&rows([("a", "70"), ("a", "500")]), &[advance(0, 1, 1)]).await);
        sink.finish().await.unwrap();
        let row = fresh.client().await.query_one("SELECT count(*) FROM alarms", &[]).await.unwrap();
        assert_eq!(row.get::<_, i64>(0), alarms, "{change}");
    }
    assert_eq!(fresh.written().await.len(), 7);
}

#[tokio::test]
async fn a_json_array_is_an_array() {
    let fresh = Fresh::with(
        "CREATE TABLE telemetry (numbers FLOAT8[], words VARCHAR(10)[], grid INT[], docs JSONB[], note TEXT)",
    )
    .await;
    let of = [("numbers", "/n"), ("words", "/w"), ("grid", "/g"), ("docs", "/d"), ("note", "/n")];
    let mut sink = sink(Config { columns: columns(&of), ..fresh.config() });
    sink.open(&claim(), None).await.unwrap();
    let many = rows([
        (
            "a",
            r#"{"n": [1.5, null, -2e3], "w": ["a \"b\" \\", "{x,y}", "NULL", "é", ""], "g": [[1, 2], [3, 4]], "d": [{"k": ["v"]}, true, "a \"b\"", null]}"#,
        ),
        ("a", r#"{"n": [], "w": "{x,y}", "g": "[0:1]={1,2}"}"#),
        ("a", r#"{"n": ["x"]}"#),
        ("a", r#"{"g": [[1], [2, 3]]}"#),
        ("a", r#"{"g": [[[[[[[1]]]]]]]}"#),
        ("a", r#"{"w": ["\u0000"]}"#),
    ]);
    let mut refused = rejected(sink.commit(&many, &[advance(0, 0, 6)]).await);
    refused.sort_by_key(|row| row.row);
    assert_eq!(refused.iter().map(|row| row.row).collect::<Vec<_>>(), [2, 3, 4, 5], "{refused:?}");
    sink.finish().await.unwrap();
    let sql = "SELECT row_to_json(t)::text FROM telemetry t ORDER BY numbers <> '{}' DESC";
    let found = fresh.client().await.query(sql, &[]).await.unwrap();
    let found: Vec<String> = found.iter().map(|row| row.get(0)).collect();
    assert_eq!(
        found,
        [
            r#"{"numbers":[1.5,null,-2000],"words":["a \"b\" \\","{x,y}","NULL","é",""],"grid":[[1,2],[3,4]],"docs":[{"k": ["v"]},true,"a \"b\"",null],"note":"[1.5, null, -2e3]"}"#,
            r#"{"numbers":[],"words":["x","y"],"grid":[1,2],"docs":null,"note":"[]"}"#,
        ]
    );
}
