//! What SQLite makes of values by how their columns are declared.

use super::*;

/// Types of columns, with every affinity.
const DECLARED: [&str; 12] = [
    "TEXT",
    "VARCHAR(30)",
    "",
    "BLOB",
    "STRING",
    "NUMERIC",
    "DATETIME",
    "JSON",
    "INTEGER",
    "BIGINT",
    "REAL",
    "DOUBLE PRECISION",
];

/// Device ids, codes and serial numbers, some of which look like numbers.
const TEXTS: [&str; 36] = [
    "sensor-1",
    "007",
    "7",
    "0",
    "-7",
    "-0",
    "+7",
    " 7",
    "7 ",
    "\t7",
    "5E3412",
    "1E400000",
    "1e3",
    "1e",
    "15E2621",
    "00123456789012345678901",
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775808",
    "11871832136131022815",
    "8.5",
    "8.50",
    "8.",
    ".5",
    "0.5",
    "-8.5",
    "0.00001",
    "1234567890.12345678",
    "8.5.1",
    "0x10",
    "inf",
    "nan",
    "Infinity",
    "1_000",
    "1,5",
    "",
];

/// A sink that fills these columns from the fields of the same names.
async fn filling(file: &File, columns: serde_json::Value) -> SqliteSink {
    let columns = serde_json::from_value(columns).unwrap();
    let config = Config { columns, ..file.config() };
    let mut sink = SqliteSink::new("warehouse", config, Arc::default(), Failures::default());
    sink.open(&claim(), None).await.unwrap();
    sink
}

/// Commits the messages, and returns which were rejected and why.
async fn commit(sink: &mut SqliteSink, payloads: &[String]) -> Vec<(usize, String)> {
    let messages = rows(payloads.iter().map(|payload| ("a", payload.as_str())));
    let end = payloads.len() as u64;
    match sink.commit(&messages, &[advance(0, 0, end)]).await.unwrap() {
        crate::sinks::Outcome::Committed(_) => Vec::new(),
        crate::sinks::Outcome::Rejected(rejected) => {
            sink.finish().await.unwrap();
            rejected.into_iter().map(|row| (row.row, row.reason)).collect()
        }
    }
}

#[tokio::test]
async fn text_is_stored_as_it_was_sent_or_rejected_whatever_the_column_is_declared() {
    for declared in DECLARED {
        let file = File::with(&format!("CREATE TABLE telemetry (n INTEGER, id {declared})"));
        let columns = serde_json::json!({ "n": "/n", "id": { "from": "/id", "type": "text" } });
        let mut sink = filling(&file, columns).await;
        let payloads: Vec<String> = (TEXTS.iter().enumerate())
            .map(|(n, id)| serde_json::json!({ "n": n, "id": id }).to_string())
            .collect();
        let rejected = commit(&mut sink, &payloads).await;
        let mut stored = 0;
        for (n, text) in TEXTS.iter().enumerate() {
            let sql = "SELECT CAST(id AS TEXT) FROM telemetry WHERE n = ?1";
            match file.read().query_row(sql, [n as i64], |row| row.get::<_, String>(0)) {
                Ok(found) => assert_eq!(found, *text, "{declared}"),
                Err(_) => {
                    let (_, reason) = rejected.iter().find(|(row, _)| *row == n).expect("a row or a reason");
                    assert!(reason.contains("declare the column TEXT"), "{reason}");
                    continue;
                }
            }
            stored += 1;
        }
        assert_eq!(stored + rejected.len(), TEXTS.len(), "{declared}");
        let is_kept = |text: &str| !rejected.iter().any(|(row, _)| TEXTS[*row] == text);
        assert!(["sensor-1", "8.5.1", "1e", "", "inf"].iter().all(|text| is_kept(text)), "{declared}");
        // SQLite makes no number of text here.
        let is_text = ["TEXT", "VARCHAR(30)", "", "BLOB"].contains(&declared);
        assert_eq!(rejected.is_empty(), is_text, "{declared}: {rejected:?}");
        let is_warned = checked(&Config {
            columns: serde_json::from_value(serde_json::json!({ "id": { "from": "/id", "type": "text" } }))
                .unwrap(),
            ..file.config()
        });
        assert_eq!(is_warned.warnings.is_empty(), is_text, "{declared}: {:?}", is_warned.warnings);
    }
}

#[tokio::test]
async fn two_devices_whose_ids_are_one_number_are_not_one_device() {
    let file = File::with(
        "CREATE TABLE telemetry (time DATETIME NOT NULL, device_id STRING NOT NULL, location STRING,
                                 metric STRING NOT NULL, value FLOAT NOT NULL)",
    );
    let mut sink = file.sink();
    sink.open(&claim(), None).await.unwrap();
    let devices = rows([("5E3412", "1"), ("sensor-1", "1"), ("1E400000", "1"), ("42", "1")]);
    let refused = rejected(sink.commit(&devices, &[advance(0, 0, 4)]).await);
    assert_eq!(refused.iter().map(|row| row.row).collect::<Vec<_>>(), [0, 2]);
    assert!(
        refused[0].reason.starts_with("column \"device_id\": the device id is not text that"),
        "{refused:?}"
    );
    assert_eq!(sink.finish().await.unwrap(), Written { written: 2, ignored: 0 });
}

#[tokio::test]
async fn a_column_of_a_strict_table_that_takes_any_value_keeps_text() {
    let file = File::with("CREATE TABLE telemetry (id ANY) STRICT");
    let mut sink = filling(&file, serde_json::json!({ "id": { "from": "/id", "type": "text" } })).await;
    assert_eq!(commit(&mut sink, &[r#"{"id":"007"}"#.to_owned()]).await, []);
    let found = file.read().query_row("SELECT id FROM telemetry", [], |row| row.get::<_, String>(0));
    assert_eq!(found.as_deref(), Ok("007"));
}

/// Numbers as JSON writes them, and what columns of numbers hold of them; `None`: rejected.
#[tokio::test]
async fn numbers_are_stored_as_they_were_sent_or_rejected() {
    use rusqlite::types::Value::{self, Integer, Real, Text};
    const EUI: &str = "11871832136131022815";
    for (number, whole, real) in [
        ("42", Some(Integer(42)), Some(Real(42.0))),
        ("9007199254740993", Some(Integer(9_007_199_254_740_993)), Some(Real(9_007_199_254_740_992.0))),
        ("-9223372036854775808", Some(Integer(i64::MIN)), Some(Real(-9_223_372_036_854_775_808.0))),
        (EUI, None, Some(Real(11_871_832_136_131_022_815.0))),
        ("-9223372036854775809", None, Some(Real(-9_223_372_036_854_775_808.0))),
        ("21.50", Some(Real(21.5)), Some(Real(21.5))),
        ("0.30000000000000004", Some(Real(0.1 + 0.2)), Some(Real(0.1 + 0.2))),
    ] {
        for (declared, expected) in [
            ("TEXT", Some(Text(number.to_owned()))),
            ("INTEGER", whole.clone()),
            ("NUMERIC", whole.clone()),
            ("", whole),
            ("REAL", real),
        ] {
            let file = File::with(&format!("CREATE TABLE telemetry (id {declared})"));
            let mut sink = filling(&file, serde_json::json!({ "id": "/id" })).await;
            let rejected = commit(&mut sink, &[format!("{{\"id\":{number}}}")]).await;
            let found =
                file.read().query_row("SELECT id FROM telemetry", [], |row| row.get::<_, Value>(0)).ok();
            assert_eq!(found, expected, "{number} in {declared}: {rejected:?}");
            assert_eq!(rejected.len(), usize::from(expected.is_none()), "{number} in {declared}");
        }
    }
}

#[tokio::test]
async fn a_whole_number_of_64_bits_is_not_rounded_in_a_column_of_doubles() {
    let file = File::with("CREATE TABLE telemetry (id DOUBLE)");
    let mut sink = filling(&file, serde_json::json!({ "id": { "from": "/id", "type": "bigint" } })).await;
    let sent = ["9007199254740992", "-9007199254740994", "9007199254740993", "9223372036854775807"];
    let payloads = sent.map(|number| format!("{{\"id\":{number}}}"));
    let rejected = commit(&mut sink, &payloads).await;
    assert_eq!(rejected.iter().map(|(row, _)| *row).collect::<Vec<_>>(), [2, 3], "{rejected:?}");
}

#[tokio::test]
async fn numbers_of_a_type_are_exact_in_a_column_of_text_and_so_is_json() {
    let file = File::with("CREATE TABLE telemetry (value TEXT, uid TEXT, doc JSON)");
    let columns = serde_json::json!({
        "value": { "from": "/value", "type": "double" },
        "uid": { "from": "/uid", "type": "bigint" },
        "doc": { "from": "/doc", "type": "jsonb" },
    });
    let mut sink = filling(&file, columns).await;
    let payloads = [
        r#"{"value":0.30000000000000004,"uid":9007199254740993,"doc":"007"}"#,
        r#"{"value":1e300,"uid":-1,"doc":8.50}"#,
        r#"{"value":"hot"}"#,
        r#"{"uid":11871832136131022815}"#,
        r#"{"doc":11871832136131022815}"#,
    ];
    let rejected = commit(&mut sink, &payloads.map(str::to_owned)).await;
    assert_eq!(rejected.iter().map(|(row, _)| *row).collect::<Vec<_>>(), [2, 3, 4], "{rejected:?}");
    let connection = file.read();
    let mut statement = connection.prepare("SELECT value, uid, CAST(doc AS TEXT) FROM telemetry").unwrap();
    let found = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?))).unwrap();
    let found: Vec<(String, String, String)> = found.collect::<Result<_, _>>().unwrap();
    let expected = [("0.30000000000000004", "9007199254740993", "\"007\""), ("1e300", "-1", "8.5")];
    assert_eq!(found, expected.map(|(a, b, c)| (a.to_owned(), b.to_owned(), c.to_owned())));
}
