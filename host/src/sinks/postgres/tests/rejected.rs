//! Rows that the server rejects are isolated; what concerns all rows is not taken for a bad row.

use super::*;

/// Raises for values over 100, with this SQLSTATE.
fn trigger(code: &str, when: &str) -> String {
    format!(
        "CREATE TABLE telemetry ({{TABLE}});
         CREATE FUNCTION plausible() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN IF NEW.value > 100 THEN RAISE EXCEPTION 'implausible' USING ERRCODE = '{code}'; END IF; RETURN NEW; END $$;
         CREATE {when} INSERT ON telemetry FOR EACH ROW EXECUTE FUNCTION plausible()"
    )
}

async fn opened(fresh: &Fresh) -> PostgresSink {
    let mut sink = fresh.sink();
    sink.open(&claim(), None).await.unwrap();
    sink.commit(&Rows::default(), &[advance(0, 0, 0)]).await.unwrap();
    sink
}

#[tokio::test]
async fn each_row_that_the_server_rejects_is_isolated_and_all_others_are_written() {
    const ROWS: u64 = 1_000;
    let bad = [0, 1, 17, 500, 999];
    let before = |code| (trigger(code, "TRIGGER t BEFORE"), code.to_owned());
    let table = |sql: &str, code: &str| (format!("CREATE TABLE telemetry ({{TABLE}}{sql})"), code.to_owned());
    for (sql, code) in [
        before("P0001"),
        before("0A000"),
        before("XX000"),
        before("IOT01"),
        (trigger("P0001", "TRIGGER t AFTER"), "P0001".to_owned()),
        (
            trigger("23000", "CONSTRAINT TRIGGER t AFTER")
                .replace("ON telemetry FOR", "ON telemetry DEFERRABLE INITIALLY DEFERRED FOR"),
            "23000".to_owned(),
        ),
        table(", CHECK (value < 100)", "23514"),
        table(", UNIQUE (value)", "23505"),
        (
            "CREATE TABLE plausible (value DOUBLE PRECISION PRIMARY KEY);
             INSERT INTO plausible SELECT generate_series(1001, 3000);
             CREATE TABLE telemetry ({TABLE}, FOREIGN KEY (value) REFERENCES plausible)"
                .to_owned(),
            "23503".to_owned(),
        ),
    ] {
        let fresh = Fresh::with(&sql).await;
        let mut sink = opened(&fresh).await;
        let good = |n: u64| match code.as_str() {
            // Two with the same value: the second is the bad one.
            "23505" | "23503" => (1_001 + n).to_string(),
            _ => "5".to_owned(),
        };
        if code == "23505" {
            sink.commit(&rows([("a", "500")]), &[advance(0, 0, 0)]).await.unwrap();
        }
        // The first batch is tried without the staging table, the second is isolated at once.
        for batch in 0..2 {
            let payloads: Vec<String> = (0..ROWS)
                .map(|n| if bad.contains(&(n as usize)) { "500".to_owned() } else { good(batch * ROWS + n) })
                .collect();
            let many = rows(payloads.iter().map(|payload| ("a", payload.as_str())));
            let steps = [advance(0, batch * ROWS, (batch + 1) * ROWS)];
            let refused = rejected(sink.commit(&many, &steps).await);
            assert_eq!(refused.iter().map(|row| row.row).collect::<Vec<_>>(), bad, "{code}");
            assert!(refused.iter().all(|row| row.code.as_deref() == Some(&code)), "{refused:?}");
            let written = ROWS - bad.len() as u64;
            assert_eq!(sink.finish().await.unwrap(), Written { written, ignored: 0 }, "{code}");
        }
        let there = fresh.written().await.len() - usize::from(code == "23505");
        assert_eq!(there, 2 * (ROWS as usize - bad.len()), "{code}");
        let clean = rows([("a", "5")]);
        if code != "23503" {
            let outcome = sink.commit(&clean, &[advance(0, 2 * ROWS, 2 * ROWS + 1)]).await.unwrap();
            assert_eq!(outcome, Outcome::Committed(Written { written: 1, ignored: 0 }));
        }
    }
}

#[tokio::test]
async fn exactly_the_bad_rows_are_rejected_however_they_lie() {
    const ROWS: usize = 300;
    // Takes rows in batches, and raises at another row than the bad one.
    let foreign = "CREATE EXTENSION postgres_fdw;
         CREATE TABLE readings ({TABLE}, CHECK (value < 100));
         DO $$ BEGIN EXECUTE format(
             'CREATE SERVER itself FOREIGN DATA WRAPPER postgres_fdw
              OPTIONS (dbname %L, host %L, port %L, batch_size ''10'')', current_database(),
             coalesce(host(inet_server_addr()), split_part(current_setting('unix_socket_directories'), ',', 1)),
             current_setting('port')); END $$;
         CREATE USER MAPPING FOR CURRENT_USER SERVER itself;
         CREATE FOREIGN TABLE telemetry ({TABLE}) SERVER itself OPTIONS (table_name 'readings')";
    let by_column = "CREATE TABLE telemetry ({TABLE}, CHECK (value < 100))".to_owned();
    for sql in [by_column, trigger("P0001", "TRIGGER t AFTER"), foreign.to_owned()] {
        let fresh = Fresh::with(&sql).await;
        let mut sink = opened(&fresh).await;
        let mut written = 0;
        let is_bad: [fn(usize) -> bool; 8] = [
            |n| n % 100 == 50,
            |n| n % 10 == 3,
            |n| n % 32 == 31,
            |n| n % 8 < 2,
            |n| (40..140).contains(&n),
            |n| n < 9,
            |n| n >= ROWS - 2,
            |n| n * 7_919 % 10_007 % 5 == 0,
        ];
        for (number, is_bad) in is_bad.into_iter().enumerate() {
            let payloads = (0..ROWS).map(|n| ("a", if is_bad(n) { "500" } else { "5" }));
            let steps = [advance(0, (number * ROWS) as u64, ((number + 1) * ROWS) as u64)];
            let refused = rejected(sink.commit(&rows(payloads), &steps).await);
            let bad: Vec<usize> = (0..ROWS).filter(|n| is_bad(*n)).collect();
            assert_eq!(refused.iter().map(|row| row.row).collect::<Vec<_>>(), bad, "{number}: {sql}");
            let good = (ROWS - bad.len()) as u64;
            assert_eq!(
                sink.finish().await.unwrap(),
                Written { written: good, ignored: 0 },
                "{number}: {sql}"
            );
            written += good as usize;
        }
        assert_eq!(fresh.written().await.len(), written, "{sql}");
    }
}

#[tokio::test]
async fn a_bad_row_among_upserts_costs_no_good_one() {
    let fresh =
        Fresh::with("CREATE TABLE telemetry ({TABLE}, UNIQUE (device_id), CHECK (value < 100))").await;
    let mut sink = self::sink(Config { on_conflict: OnConflict::Upsert, ..fresh.config() });
    sink.open(&claim(), None).await.unwrap();
    sink.commit(&Rows::default(), &[advance(0, 0, 0)]).await.unwrap();
    let many = rows([("a", "1"), ("a", "2"), ("b", "500"), ("c", "3"), ("c", "4")]);
    let refused = rejected(sink.commit(&many, &[advance(0, 0, 5)]).await);
    assert_eq!(refused.iter().map(|row| row.row).collect::<Vec<_>>(), [2]);
    assert_eq!(sink.finish().await.unwrap(), Written { written: 4, ignored: 0 });
    let mut written = fresh.written().await;
    written.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(written, [("a".to_owned(), 2.0), ("c".to_owned(), 4.0)]);
    // Isolated at once, without a bad row.
    let outcome =
        sink.commit(&rows([("a", "5"), ("a", "6"), ("c", "7")]), &[advance(0, 5, 8)]).await.unwrap();
    assert_eq!(outcome, Outcome::Committed(Written { written: 3, ignored: 0 }));
    // What a trigger leaves out is told beside them.
    fresh
        .execute(
            "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 IF NEW.device_id = 'left out' THEN RETURN NULL; END IF; RETURN NEW; END $$;
             CREATE TRIGGER t BEFORE INSERT ON telemetry FOR EACH ROW EXECUTE FUNCTION f()",
        )
        .await;
    let batch = rows([("a", "8"), ("a", "9"), ("left out", "1")]);
    // Which keys rows meet others at may be another with the trigger.
    sink.commit(&batch, &[advance(0, 8, 11)]).await.unwrap_err();
    sink.open(&claim(), None).await.unwrap();
    let outcome = sink.commit(&batch, &[advance(0, 8, 11)]).await;
    assert_eq!(outcome.unwrap(), Outcome::Committed(Written { written: 2, ignored: 1 }));
}

#[tokio::test]
async fn an_identity_that_is_always_generated_is_written_beside_a_bad_row_as_without_one() {
    let columns = columns(&[("id", "/id"), ("value", "/value")]);
    for on_conflict in [OnConflict::Reject, OnConflict::Ignore, OnConflict::Upsert] {
        let fresh = Fresh::with(
            "CREATE TABLE telemetry (id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
                                     value DOUBLE PRECISION CHECK (value < 100))",
        )
        .await;
        let config = Config { on_conflict, columns: columns.clone(), ..fresh.config() };
        let checked = super::super::check("warehouse", &config, Arc::default(), Vec::new()).await;
        assert_eq!(checked.problems, [""; 0], "{on_conflict:?}");
        let mut sink = self::sink(config);
        sink.open(&claim(), None).await.unwrap();
        let numbered = |values: &[(u32, u32)]| {
            let payload = |(id, value): &(u32, u32)| format!("{{\"id\":{id},\"value\":{value}}}");
            let payloads: Vec<String> = values.iter().map(payload).collect();
            rows(payloads.iter().map(|payload| ("a", payload.as_str())))
        };
        sink.commit(&numbered(&[(7, 1)]), &[advance(0, 0, 1)]).await.unwrap();
        let many = numbered(&[(8, 2), (9, 500), (10, 4)]);
        let refused = rejected(sink.commit(&many, &[advance(0, 1, 4)]).await);
        assert_eq!(refused.iter().map(|row| row.row).collect::<Vec<_>>(), [1], "{on_conflict:?}");
        sink.finish().await.unwrap();
        if on_conflict == OnConflict::Upsert {
            sink.commit(&numbered(&[(8, 3)]), &[advance(0, 4, 5)]).await.unwrap();
        }
        let written = fresh.client().await.query("SELECT id, value FROM telemetry ORDER BY id", &[]).await;
        let written: Vec<(i64, f64)> = written.unwrap().iter().map(|row| (row.get(0), row.get(1))).collect();
        let second = if on_conflict == OnConflict::Upsert { 3.0 } else { 2.0 };
        assert_eq!(written, [(7, 1.0), (8, second), (10, 4.0)], "{on_conflict:?}");
    }
}

#[tokio::test]
async fn rows_stay_in_order_around_a_bad_one() {
    let fresh = Fresh::with("CREATE TABLE telemetry (id SERIAL, {TABLE}, CHECK (value <> 55))").await;
    let mut sink = opened(&fresh).await;
    let numbers: Vec<String> = (0..100).map(|n| n.to_string()).collect();
    rejected(sink.commit(&rows(numbers.iter().map(|n| ("a", n.as_str()))), &[advance(0, 0, 100)]).await);
    sink.finish().await.unwrap();
    let row = fresh
        .client()
        .await
        .query_one("SELECT array_agg(value ORDER BY id) FROM telemetry", &[])
        .await
        .unwrap();
    let values: Vec<f64> = row.get(0);
    assert_eq!(values, (0..100).filter(|n| *n != 55).map(f64::from).collect::<Vec<_>>());
}

#[tokio::test]
async fn what_every_row_runs_into_is_set_up_and_not_data() {
    for (code, expected) in
        [("0A000", "Doubtful"), ("XX000", "Doubtful"), ("42501", "Setup"), ("55000", "Setup")]
    {
        let fresh = Fresh::with(&trigger(code, "TRIGGER t BEFORE")).await;
        let mut sink = opened(&fresh).await;
        let error = sink.commit(&rows([("a", "500"), ("a", "600")]), &[advance(0, 0, 2)]).await.unwrap_err();
        assert!(format!("{error:?}").starts_with(expected), "{error:?}");
        if expected == "Setup" {
            assert_eq!(sink.open(&claim(), None).await.unwrap().positions, [position(0, 0)]);
        }
        sink.commit(&rows([("a", "5")]), &[advance(0, 0, 1)]).await.unwrap();
    }
    // What a trigger raises by itself is about the row, also where it is alone.
    let fresh = Fresh::with(&trigger("P0001", "TRIGGER t BEFORE")).await;
    let mut sink = opened(&fresh).await;
    rejected(sink.commit(&rows([("a", "500")]), &[advance(0, 0, 1)]).await);
}

#[tokio::test]
async fn a_limit_of_time_or_size_asks_for_fewer_rows_and_leaves_the_sink_usable() {
    let fresh = Fresh::with(
        "CREATE TABLE telemetry ({TABLE});
         CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.05); RETURN NEW; END $$;
         CREATE TRIGGER slow BEFORE INSERT ON telemetry FOR EACH ROW EXECUTE FUNCTION slow()",
    )
    .await;
    let mut sink = self::sink(Config { statement_timeout: "1s".parse().unwrap(), ..fresh.config() });
    sink.open(&claim(), None).await.unwrap();
    let many = rows((0..100).map(|_| ("a", "5")));
    let error = sink.commit(&many, &[advance(0, 0, 100)]).await.unwrap_err();
    assert!(matches!(&error, Error::TooMuch(text) if text.contains("57014")), "{error:?}");
    sink.commit(&many.select(0..2), &[advance(0, 0, 2)]).await.unwrap();
    assert_eq!(fresh.written().await.len(), 2);

    let fresh = Fresh::with(&trigger("53400", "TRIGGER t BEFORE")).await;
    let mut sink = opened(&fresh).await;
    let error = sink.commit(&rows([("a", "5"), ("a", "500")]), &[advance(0, 0, 2)]).await.unwrap_err();
    assert!(matches!(error, Error::TooMuch(_)), "{error:?}");
    let error = sink.commit(&rows([("a", "500")]), &[advance(0, 0, 1)]).await.unwrap_err();
    assert!(matches!(error, Error::Doubtful { .. }), "{error:?}");
    sink.commit(&rows([("a", "5")]), &[advance(0, 0, 1)]).await.unwrap();
}

#[tokio::test]
async fn what_does_not_fit_a_declared_length_is_named_with_its_column() {
    let fresh = Fresh::with(
        "CREATE TABLE telemetry (time TIMESTAMPTZ, device_id VARCHAR(3), location TEXT, metric TEXT, value NUMERIC(5, 2))",
    )
    .await;
    let mut sink = opened(&fresh).await;
    let many = rows([("abc", "1"), ("long", "2"), ("a", "1000"), ("a", "999.99")]);
    let refused = rejected(sink.commit(&many, &[advance(0, 0, 4)]).await);
    let reasons: Vec<(usize, &str)> = refused.iter().map(|row| (row.row, row.reason.as_str())).collect();
    assert_eq!(
        reasons,
        [
            (1, "column \"device_id\": the device id is not text that fits the column's length: long"),
            (2, "column \"value\": the payload is not a number that fits the column's precision: 1000"),
        ]
    );
    assert_eq!(sink.finish().await.unwrap().written, 2);
}

#[tokio::test]
async fn what_commits_alone_commits_beside_a_bad_row() {
    // A deferred foreign key, because the parent comes later in the transaction.
    let fresh = Fresh::with(
        "CREATE TABLE devices (id TEXT PRIMARY KEY);
         CREATE TABLE telemetry ({TABLE}, CHECK (value < 100),
             FOREIGN KEY (device_id) REFERENCES devices DEFERRABLE INITIALLY DEFERRED);
         CREATE FUNCTION register() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
             IF NEW.device_id <> 'unknown' THEN
                 INSERT INTO devices VALUES (NEW.device_id) ON CONFLICT DO NOTHING;
             END IF;
             RETURN NULL;
         END $$;
         CREATE TRIGGER register AFTER INSERT ON telemetry FOR EACH ROW EXECUTE FUNCTION register()",
    )
    .await;
    let mut sink = opened(&fresh).await;
    let devices: Vec<String> = (0..40).map(|number| format!("d{number}")).collect();
    for (batch, bad) in [vec![], vec![3], vec![0, 20, 39], vec![]].into_iter().enumerate() {
        let at = batch as u64 * 40;
        let device = |n: usize| if n == 20 && !bad.is_empty() { "unknown" } else { devices[n].as_str() };
        let many = rows((0..40).map(|n| (device(n), if bad.contains(&n) { "500" } else { "5" })));
        let mut expected = bad.clone();
        if !bad.is_empty() && !bad.contains(&20) {
            expected.push(20);
        }
        let outcome = sink.commit(&many, &[advance(0, at, at + 40)]).await;
        if expected.is_empty() {
            assert_eq!(outcome.unwrap(), Outcome::Committed(Written { written: 40, ignored: 0 }));
            continue;
        }
        let refused = rejected(outcome);
        assert_eq!(refused.iter().map(|row| row.row).collect::<Vec<_>>(), expected, "{refused:?}");
        sink.finish().await.unwrap();
        // The next batch is not judged by one of which nothing could be written.
        rejected(sink.commit(&rows([("unknown", "5")]), &[advance(0, at + 40, at + 40)]).await);
        sink.finish().await.unwrap();
    }
    assert_eq!(fresh.written().await.len(), 160 - 2 - 3);
}

#[tokio::test]
async fn a_character_that_the_database_lacks_is_one_rows_error() {
    let fresh = Fresh::created("ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0").await;
    fresh
        .execute(
            "CREATE TYPE mood AS ENUM ('fähig');
             CREATE TABLE telemetry (device VARCHAR(5), note TEXT, mood mood, doc JSONB, words TEXT[])",
        )
        .await;
    let of = [("device", "$device"), ("note", "/n"), ("mood", "/m"), ("doc", "/d"), ("words", "/w")];
    let mut sink = self::sink(Config { columns: columns(&of), ..fresh.config() });
    sink.open(&claim(), None).await.unwrap();
    let many = rows([
        ("é", r#"{"n": "5 £", "m": "fähig", "d": {"å": 1}, "w": "{ü}"}"#),
        ("a", r#"{"n": "5 €"}"#),
        ("б", r#"{"n": "5"}"#),
        ("a", r#"{"d": {"€": 1}}"#),
        ("a", r#"{"w": "{€}"}"#),
        ("a", r#"{"n": "5"}"#),
    ]);
    for batch in 0..2 {
        let refused = rejected(sink.commit(&many, &[advance(0, 6 * batch, 6 * batch + 6)]).await);
        let of: Vec<(usize, &str, &str)> = refused
            .iter()
            .map(|row| (row.row, row.code.as_deref().unwrap(), row.reason.split(':').next().unwrap()))
            .collect();
        let expected = [(1, "note"), (2, "device"), (3, "doc"), (4, "words")]
            .map(|(n, of)| (n, format!("column \"{of}\"")));
        assert!(of.iter().all(|(_, code, _)| *code == "22P05"), "{refused:?}");
        assert_eq!(of.iter().map(|(n, _, of)| (*n, (*of).to_owned())).collect::<Vec<_>>(), expected);
        assert_eq!(sink.finish().await.unwrap().written, 2);
    }
    let sql = "SELECT note || mood || doc::text || words::text FROM telemetry WHERE device = 'é' LIMIT 1";
    let text: String = fresh.client().await.query_one(sql, &[]).await.unwrap().get(0);
    assert_eq!(text, r#"5 £fähig{"å": 1}{ü}"#);
}

const HOUR_US: i64 = 3_600_000_000;

fn now_us() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    i64::try_from(now.as_micros()).unwrap()
}

/// Rows that were received now, each of a site and of a time in hours from now.
fn of_hours(of: &[(&'static str, f64)]) -> Rows {
    let payloads: Vec<String> = of
        .iter()
        .map(|(_, hours)| format!(r#"{{"ts": {}, "value": 1}}"#, now_us() + (hours * HOUR_US as f64) as i64))
        .collect();
    let mut rows = rows(of.iter().zip(&payloads).map(|((site, _), payload)| (*site, payload.as_str())));
    rows.set_received_us(now_us() as u64);
    rows
}

/// A table that is partitioned by `key`, with one partition for `bounds` of `time` around now.
async fn partitioned(key: &str, bounds: &str) -> (Fresh, Config) {
    let fresh = Fresh::with(&format!(
        "CREATE TABLE telemetry (time TIMESTAMPTZ, t TEXT, site TEXT, value FLOAT8) PARTITION BY {key};
         DO $$ BEGIN EXECUTE format('CREATE TABLE part PARTITION OF telemetry {bounds}',
             now() - interval '1 hour', now() + interval '1 hour'); END $$;
         GRANT INSERT ON telemetry TO PUBLIC; GRANT ALL ON SCHEMA public TO PUBLIC"
    ))
    .await;
    let columns: ColumnsConfig = serde_json::from_value(serde_json::json!({
        "time": { "from": ["/ts", "$time"], "type": "timestamptz" }, "t": "$topic", "site": "$device",
        "value": "/value"
    }))
    .unwrap();
    let config = Config { columns, ..fresh.config() };
    (fresh, config)
}

#[tokio::test]
async fn a_row_without_a_partition_waits_only_where_the_partition_of_now_is_missing() {
    let by_time = ("RANGE (time)", "FOR VALUES FROM (%L) TO (%L)");
    let by_expression = (
        "RANGE (date_trunc(''hour'', time AT TIME ZONE ''UTC''))",
        "FOR VALUES FROM (''2020-01-01'') TO (''2020-01-02'')",
    );
    let by_site = ("LIST (site)", "FOR VALUES IN (''a'')");
    let by_both = (by_time.0, "FOR VALUES FROM (%L) TO (%L) PARTITION BY LIST (site)");
    for ((key, bounds), prepare, of, expected) in [
        // The column `t` is not a part of `site`.
        (by_site, "", &[("a", 0.0), ("b", 0.0)][..], Ok(&[1][..])),
        (by_site, "", &[("b", 0.0)], Ok(&[0])),
        (by_time, "", &[("a", 0.0), ("a", -9.0), ("a", 18.0), ("a", 0.1)], Ok(&[1, 2])),
        (by_time, "", &[("a", -9.0)], Ok(&[0])),
        (by_time, "", &[("a", 18.0)], Ok(&[0])),
        (by_time, "", &[("a", 1.2)], Ok(&[0])),
        (by_time, "DROP TABLE part", &[("a", 0.0)], Err(())),
        (by_time, "DROP TABLE part", &[("a", -9.0), ("a", 0.0)], Err(())),
        (by_expression, "", &[("a", 0.0)], Err(())),
        (by_both, "CREATE TABLE leaf PARTITION OF part FOR VALUES IN ('a')", &[("b", 0.0)], Ok(&[0])),
        (by_both, "DROP TABLE part", &[("b", 0.0)], Err(())),
    ] {
        let key = key.replace("''", "'");
        let (fresh, config) = partitioned(&key, bounds).await;
        fresh.execute(prepare).await;
        let writer = super::check::Writer::new(&fresh).await;
        // The server tells the key's values only to users with the right to read.
        for url in [config.url.clone(), writer.config().url] {
            let mut sink = self::sink(Config { url, ..config.clone() });
            sink.open(&claim(), None).await.unwrap();
            fresh.execute("GRANT ALL ON headworks_positions TO PUBLIC").await;
            let next = Claim { pipeline: uuid::Uuid::new_v4().to_string(), ..claim() };
            sink.open(&next, None).await.unwrap();
            let outcome = sink.commit(&of_hours(of), &[advance(0, 0, 9)]).await;
            match expected {
                Ok(expected) => {
                    let refused = rejected(outcome);
                    let refused: Vec<usize> = refused.iter().map(|row| row.row).collect();
                    assert_eq!(refused, expected, "{key} {of:?}");
                    sink.finish().await.unwrap();
                }
                Err(()) => {
                    let error = outcome.unwrap_err();
                    assert!(
                        matches!(&error, Error::Setup(text) if text.contains("create the partition")),
                        "{error:?}"
                    );
                }
            }
        }
        writer.end().await;
    }
    // Received in February 2026, which is not now.
    let (_fresh, config) = partitioned(by_time.0, by_time.1).await;
    let mut sink = self::sink(config);
    sink.open(&claim(), None).await.unwrap();
    let refused = rejected(sink.commit(&rows([("a", r#"{"value": 1}"#)]), &[advance(0, 0, 1)]).await);
    assert!(refused[0].reason.contains("no partition of relation"), "{refused:?}");
}

/// The only reason of a batch whose second row is bad, when it is tried at once and when isolated at once.
async fn reasons(sql: &str, config: Config, [good, bad]: [&str; 2]) -> Vec<String> {
    let fresh = Fresh::with(sql).await;
    let mut sink = self::sink(Config { url: Url(fresh.url.clone()), ..config });
    sink.open(&claim(), None).await.unwrap();
    let mut reasons = Vec::new();
    for batch in 0..2 {
        let rows = rows([("a", good), ("a", bad), ("a", good)]);
        let refused = rejected(sink.commit(&rows, &[advance(0, 3 * batch, 3 * (batch + 1))]).await);
        assert_eq!(refused.iter().map(|row| row.row).collect::<Vec<_>>(), [1], "{sql}: {refused:?}");
        sink.finish().await.unwrap();
        reasons.extend(refused.into_iter().map(|row| row.reason));
    }
    reasons
}

#[tokio::test]
async fn a_rejected_value_is_told_with_its_column() {
    let config = Config { columns: columns(&[("device", "$device"), ("level", "/v")]), ..Config::default() };
    for (sql, values, code) in [
        (
            "CREATE TABLE telemetry (device TEXT, level inet)",
            [r#"{"v":"10.0.0.1"}"#, r#"{"v":"x"}"#],
            "22P02",
        ),
        (
            "CREATE TYPE mood AS ENUM ('good'); CREATE TABLE telemetry (device TEXT, level mood)",
            [r#"{"v":"good"}"#, r#"{"v":"bad"}"#],
            "22P02",
        ),
        (
            "CREATE TABLE telemetry (device TEXT, level interval)",
            [r#"{"v":"1 day"}"#, r#"{"v":"5 parsecs"}"#],
            "22007",
        ),
        (
            "CREATE TABLE telemetry (device TEXT, level numeric(2, 0)[])",
            [r#"{"v":"{1}"}"#, r#"{"v":"{100}"}"#],
            "22003",
        ),
        (
            "CREATE DOMAIN code AS varchar(3); CREATE TABLE telemetry (device TEXT, level code[])",
            [r#"{"v":"{abc}"}"#, r#"{"v":"{abcd}"}"#],
            "22001",
        ),
    ] {
        for reason in reasons(sql, config.clone(), values).await {
            assert!(reason.starts_with("column \"level\": ") && reason.contains(code), "{sql}: {reason}");
        }
    }
}

#[tokio::test]
async fn what_a_trigger_raises_is_told_with_its_function_and_line() {
    for reason in reasons(&trigger("P0001", "TRIGGER t BEFORE"), Config::default(), ["5", "500"]).await {
        assert!(reason.contains("implausible (SQLSTATE P0001)"), "{reason}");
        assert!(reason.contains("PL/pgSQL function plausible() line 2 at RAISE"), "{reason}");
        assert!(!reason.contains("headworks_"), "{reason}");
    }
}

#[tokio::test]
async fn a_trigger_that_sets_the_search_path_keeps_no_row_from_its_table() {
    for is_local in [false, true] {
        let fresh = Fresh::with(&format!(
            "CREATE TYPE mood AS ENUM ('fine');
             CREATE TABLE telemetry (device_id TEXT, value DOUBLE PRECISION CHECK (value < 100), mood mood);
             CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 PERFORM set_config('search_path', '', {is_local}); RETURN NEW; END $$;
             CREATE TRIGGER t BEFORE INSERT ON telemetry FOR EACH ROW EXECUTE FUNCTION f()"
        ))
        .await;
        let columns = columns(&[("device_id", "$device"), ("value", "/value"), ("mood", "/mood")]);
        let mut sink = sink(Config { columns, ..fresh.config() });
        sink.open(&claim(), None).await.unwrap();
        let of = |values: &[u32]| {
            let payload = |value| format!("{{\"value\":{value},\"mood\":\"fine\"}}");
            let payloads: Vec<String> = values.iter().map(payload).collect();
            rows(payloads.iter().map(|payload| ("a", payload.as_str())))
        };
        sink.commit(&of(&[1, 2]), &[advance(0, 0, 2)]).await.unwrap();
        sink.commit(&of(&[3]), &[advance(0, 2, 3)]).await.unwrap();
        for from in [3, 6] {
            let refused = rejected(sink.commit(&of(&[4, 500, 6]), &[advance(0, from, from + 3)]).await);
            assert_eq!(refused.iter().map(|row| row.row).collect::<Vec<_>>(), [1]);
            sink.finish().await.unwrap();
        }
        sink.commit(&of(&[7]), &[advance(0, 9, 10)]).await.unwrap();
        assert_eq!(fresh.written().await.len(), 8);
        fresh.lose_positions().await;
        let error = sink.commit(&of(&[8]), &[advance(0, 10, 11)]).await.unwrap_err();
        assert!(error.to_string().contains("are gone from headworks_positions"), "{error}");
    }
}

#[tokio::test]
async fn what_a_default_does_to_find_out_why_a_row_is_rejected_is_taken_back() {
    let fresh = Fresh::with(
        "CREATE TABLE calls (n INTEGER);
         CREATE FUNCTION f() RETURNS integer LANGUAGE sql AS 'INSERT INTO calls VALUES (1); SELECT 1';
         CREATE TABLE telemetry ({TABLE}, small SMALLINT GENERATED ALWAYS AS (1000 * value) STORED,
                                 called INTEGER DEFAULT f())",
    )
    .await;
    let mut sink = fresh.sink();
    sink.open(&claim(), None).await.unwrap();
    let refused = rejected(sink.commit(&rows([("a", "1"), ("b", "70")]), &[advance(0, 0, 2)]).await);
    assert_eq!(refused.iter().map(|row| row.row).collect::<Vec<_>>(), [1], "{refused:?}");
    sink.finish().await.unwrap();
    let calls: i64 = fresh.client().await.query_one("SELECT count(*) FROM calls", &[]).await.unwrap().get(0);
    assert_eq!(calls, 1, "one for each row that is written");
}

/// The server cannot vacuum the temporary tables of a session.
#[tokio::test]
async fn the_staging_table_of_an_idle_sink_holds_back_neither_the_age_of_transactions_nor_room() {
    let ignore = |config| Config { on_conflict: OnConflict::Ignore, ..config };
    for (key, staged) in [(", PRIMARY KEY (device_id, value)", true), (", code INTEGER DEFAULT 1", false)] {
        let fresh = Fresh::with(&format!(
            "CREATE TABLE telemetry ({{TABLE}}{key}, CHECK (value < 100));
             CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 IF NEW.value = 13 THEN RAISE EXCEPTION 'not now' USING ERRCODE = 'XX000'; END IF; RETURN NEW; END $$;
             CREATE TRIGGER t BEFORE INSERT ON telemetry FOR EACH ROW EXECUTE FUNCTION f()"
        ))
        .await;
        let mut sink = sink(ignore(fresh.config()));
        sink.open(&claim(), None).await.unwrap();
        assert_eq!(sink.is_staged(), staged);
        rejected(sink.commit(&rows([("a", "1"), ("b", "700")]), &[advance(0, 0, 2)]).await);
        sink.finish().await.unwrap();
        let client = fresh.client().await;
        let stage = async || -> (u32, i64) {
            let sql =
                "SELECT relfilenode, pg_relation_size(oid) FROM pg_class WHERE relname = 'headworks_stage'";
            let row = client.query_one(sql, &[]).await.unwrap();
            (row.get(0), row.get(1))
        };
        let (file, bytes) = stage().await;
        assert_eq!(bytes, 0, "COMMIT has emptied it");
        sink.commit(&rows([("a", "3")]), &[advance(0, 2, 3)]).await.unwrap();
        assert_eq!(stage().await, (file, 0), "the catalog does not change with each commit");
        // A transaction that is rolled back leaves its bytes in the file of the table.
        let error = sink.commit(&rows([("a", "13"), ("b", "13")]), &[advance(0, 3, 5)]).await.unwrap_err();
        assert!(matches!(error, Error::Doubtful { .. }), "{error:?}");
        let (same, bytes) = stage().await;
        assert!(same == file && bytes > 0, "{bytes}");
        sink.age_stage();
        // The sink is idle; each look is a round trip.
        while stage().await == (file, bytes) {}
        let (young, bytes) = stage().await;
        assert!(young != file && bytes == 0, "a truncated table has a new file, as old as now: {bytes}");
        // A transaction that waits is left alone. The keeper looks before the round trip is over.
        rejected(sink.commit(&rows([("a", "4"), ("b", "700")]), &[advance(0, 3, 5)]).await);
        sink.age_stage();
        assert_eq!(stage().await.0, young);
        sink.finish().await.unwrap();
        assert_eq!(stage().await, (young, 0));
        sink.commit(&rows([("a", "6")]), &[advance(0, 5, 6)]).await.unwrap();
        let mut written: Vec<f64> = fresh.written().await.into_iter().map(|(_, value)| value).collect();
        written.sort_by(f64::total_cmp);
        assert_eq!(written, [1.0, 3.0, 4.0, 6.0]);
    }
}
